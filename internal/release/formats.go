package release

// Place is where bytes of a format lie.
type Place string

// The places.
const (
	OnDevices Place = "devices"  // for as long as the pool
	InRegion  Place = "region"   // for as long as the host runs
	OnHost    Place = "host"     // files of the pair's directory
	Spoken    Place = "messages" // between processes
)

// Format is a row of the ladder of versions.
type Format struct {
	Name  string `json:"name"`
	Place Place  `json:"place"`
	// Kind is what sealed structures of the format begin with; empty if they do not.
	Kind string `json:"kind,omitempty"`
	// ReadsFrom and ReadsTo are the oldest and the newest version that the build reads.
	ReadsFrom int `json:"reads_from"`
	ReadsTo   int `json:"reads_to"`
	// Writes is the newest version that the build writes of its own accord, 0 if it
	// writes the format only where something asked for it.
	Writes int `json:"writes"`
	// Asked is the newest version that it writes once a command has asked for
	// something that lower versions cannot say.
	Asked int `json:"asked"`
	// Advisory says that whoever does not understand a version does without.
	Advisory bool `json:"advisory,omitempty"`

	// number is the constant that has the newest version, below internal/.
	number string
	page   string // of docs/format
}

// formats is the table. The newest version stands once more beside the code of
// each format, where a test finds it.
var formats = []Format{
	{Name: "label", Place: OnDevices, Kind: "PLXlabel", ReadsFrom: 1, ReadsTo: 1, Writes: 1, Asked: 1, number: "pool.labelVersion", page: "label.md"},
	{Name: "superblock", Place: OnDevices, Kind: "PLXsuper", ReadsFrom: 1, ReadsTo: 6, Writes: 3, Asked: 6, number: "cp.superblockVersion", page: "superblock.md"},
	{Name: "journal", Place: OnDevices, Kind: "PLXjrnal", ReadsFrom: 1, ReadsTo: 2, Writes: 1, Asked: 2, number: "cp.journalVersion", page: "journal.md"},
	{Name: "flush log", Place: OnDevices, Kind: "PLXflush", ReadsFrom: 1, ReadsTo: 1, Writes: 1, Asked: 1, number: "oplog.flushVersion", page: "oplog.md"},
	{Name: "mirror", Place: OnDevices, Kind: "PLXmirro", ReadsFrom: 1, ReadsTo: 1, Writes: 0, Asked: 1, number: "mirror.headerVersion", page: "mirror.md"},
	{Name: "map of a mirror", Place: OnDevices, Kind: "PLXmrmap", ReadsFrom: 1, ReadsTo: 1, Writes: 0, Asked: 1, number: "mirror.mapVersion", page: "mirror.md"},
	{Name: "flash label", Place: OnDevices, Kind: "PLXremap", ReadsFrom: 1, ReadsTo: 1, Writes: 0, Asked: 1, number: "flashmap.labelVersion", page: "flash.md"},
	{Name: "flash table", Place: OnDevices, Kind: "PLXrmtab", ReadsFrom: 1, ReadsTo: 1, Writes: 0, Asked: 1, number: "flashmap.pageVersion", page: "flash.md"},
	{Name: "flash map", Place: OnDevices, Kind: "PLXrmmap", ReadsFrom: 1, ReadsTo: 1, Writes: 0, Asked: 1, number: "flashmap.pageVersion", page: "flash.md"},
	{Name: "flash note", Place: OnDevices, Kind: "PLXrmnot", ReadsFrom: 1, ReadsTo: 1, Writes: 0, Asked: 1, number: "flashmap.noteVersion", page: "flash.md"},
	{Name: "flash policy", Place: OnDevices, ReadsFrom: 1, ReadsTo: 1, Writes: 0, Asked: 1, number: "pool.keptVersion", page: "flash.md"},
	{Name: "access", Place: OnDevices, Kind: "PLXacces", ReadsFrom: 1, ReadsTo: 1, Writes: 0, Asked: 1, Advisory: true, number: "flashmap/collect.stateVersion", page: "access.md"},
	{Name: "scrub", Place: OnDevices, Kind: "PLXscrub", ReadsFrom: 1, ReadsTo: 1, Writes: 1, Asked: 1, Advisory: true, number: "pool.scrubVersion", page: "scrub.md"},
	{Name: "scan", Place: OnDevices, Kind: "PLXscan.", ReadsFrom: 1, ReadsTo: 1, Writes: 0, Asked: 1, Advisory: true, number: "pool.scanVersion", page: "scan.md"},
	{Name: "region", Place: InRegion, Kind: "PLXregio", ReadsFrom: 1, ReadsTo: 1, Writes: 1, Asked: 1, number: "region.version", page: "region.md"},
	{Name: "operation log", Place: InRegion, Kind: "PLXoplog", ReadsFrom: 1, ReadsTo: 2, Writes: 1, Asked: 2, number: "oplog.logVersion", page: "oplog.md"},
	{Name: "index", Place: InRegion, Kind: "PLXindex", ReadsFrom: 1, ReadsTo: 1, Writes: 1, Asked: 1, Advisory: true, number: "dedup.stateVersion", page: "index.md"},
	{Name: "cache", Place: InRegion, Kind: "PLXcache", ReadsFrom: 1, ReadsTo: 1, Writes: 1, Asked: 1, Advisory: true, number: "cache.cacheVersion", page: "cache.md"},
	{Name: "flash history", Place: InRegion, Kind: "PLXusage", ReadsFrom: 1, ReadsTo: 1, Writes: 0, Asked: 1, Advisory: true, number: "pool.usageVersion", page: "access.md"},
	{Name: "restart record", Place: InRegion, Kind: "PLXrestr", ReadsFrom: 1, ReadsTo: 1, Writes: 1, Asked: 1, Advisory: true, number: "restart.recordVersion", page: "restart.md"},
	{Name: "sessions", Place: InRegion, Kind: "PLXsessn", ReadsFrom: 1, ReadsTo: 1, Writes: 0, Asked: 1, Advisory: true, number: "session.tableVersion", page: "sessions.md"},
	{Name: "unfolded journal", Place: InRegion, Kind: "PLXunfld", ReadsFrom: 1, ReadsTo: 1, Writes: 1, Asked: 1, Advisory: true, number: "cp.keptVersion", page: "region.md"},
	{Name: "in-flight area", Place: OnHost, ReadsFrom: 1, ReadsTo: 1, Writes: 0, Asked: 1, number: "vhost.AreaVersion", page: "inflight.md"},
	{Name: "settings of a run", Place: OnHost, ReadsFrom: 1, ReadsTo: 1, Writes: 1, Asked: 1, number: "config.RunVersion", page: "upgrade.md"},
	{Name: "upgrade", Place: OnHost, ReadsFrom: 1, ReadsTo: 1, Writes: 1, Asked: 1, number: "host.upgradeVersion", page: "upgrade.md"},
	{Name: "line to a guest", Place: Spoken, ReadsFrom: 1, ReadsTo: 1, Writes: 1, Asked: 1, number: "guest.LineVersion", page: "upgrade.md"},
	{Name: "ring", Place: Spoken, ReadsFrom: 1, ReadsTo: 1, Writes: 1, Asked: 1, number: "ring.formatVersion", page: "ring.md"},
	{Name: "control", Place: Spoken, ReadsFrom: 1, ReadsTo: 1, Writes: 1, Asked: 1, number: "control.ProtocolVersion", page: "upgrade.md"},
}
