package archtest

// layer is the place of a package. A package imports only packages of lower
// layers: what stands further up in the table below, and never a neighbour.
type layer struct {
	path string // below the module; "x/..." is everything below x
	// only is all of the program that the package may import; nil is
	// everything of lower layers. A sibling of the same layer may be named.
	only []string
	// by is who may import the package; nil is everyone of higher layers.
	by []string
	// tests says that only test files may import the package, and packages
	// under test/ and bench/.
	tests bool
	// steps says that the package is a step machine: it starts no goroutine,
	// looks at no clock and touches neither files nor network, so that tests
	// can single-step it and a simulator can replay it.
	steps bool
	why   string // what a broken rule would cost; part of the message
}

// none is for only: nothing of the program.
var none = []string{}

// assemblers put layers together: they alone choose drivers and open things.
var assemblers = []string{"internal/host", "internal/guest", "internal/dump", "internal/cli", "internal/domain/...", "test/...", "bench/..."}

// layers is the program from the bottom up. Packages between two rules of the
// table are one layer.
var layers = [][]layer{
	{
		{path: "internal/fenced", only: none, why: "the order of stores in shared memory is the same whoever shares it"},
		{path: "internal/units", only: none, why: "people write numbers of bytes in one way, whoever reads them"},
	},
	{
		{path: "internal/block", only: none, why: "the vocabulary means the same everywhere because it depends on nothing"},
		{path: "hpdi", only: []string{"internal/units"}, why: "the device interface is public: a program outside must be able to use all of it, so it exports no internal type"},
		{path: "internal/nbdproto", only: none, why: "the numbers of a protocol are the same at both ends"},
		{path: "internal/config", only: []string{"internal/units"}, why: "configuration is plain data; who uses it decides what it means"},
		{path: "internal/virtio", only: []string{"internal/fenced"}, why: "the layout of a queue is the same at both ends, whatever memory it is in"},
		{path: "internal/crash", only: none, by: assemblers, why: "what is left of a failure must be kept whatever has failed"},
		{path: "internal/eventfd", only: none, why: "what a peer can do to an eventfd is the same whatever is counted"},
		{path: "internal/spin", only: none, why: "how long somebody looks before sleeping depends on what comes, not on what it is"},
		{path: "internal/planted", only: none, why: "a planted fault is a condition in somebody else's code and knows nothing of it"},
		{path: "internal/release", only: none, why: "what a build says of itself must not depend on what it can do"},
		{path: "internal/archtest", only: none, by: none, why: "it watches the program and is no part of it"},
	},
	{
		{path: "internal/ring", only: []string{"internal/eventfd", "internal/fenced", "internal/planted", "internal/spin"}, why: "what two domains share is the same whatever is served and whoever asks"},
		{path: "internal/vhost", only: []string{"internal/planted", "internal/virtio"}, why: "messages and the in-flight area are the same at both ends of a vhost-user socket"},
		{path: "hpdi/hpditest", only: []string{"hpdi"}, tests: true, why: "the conformance suite must work for drivers outside this program"},
		{path: "internal/ondisk", only: []string{"internal/block"}, why: "formats must be readable without the code that makes them"},
		{path: "internal/stack", only: []string{"hpdi"}, by: []string{"internal/mirror", "internal/flashmap"}, why: "what devices made of devices have in common knows none of them"},
		{path: "internal/table", only: []string{"hpdi"}, why: "a table holds numbers, whatever they mean to whoever has it"},
		{path: "internal/control", only: []string{"internal/block", "hpdi"}, why: "clients of the management interface must not pull in the storage they manage"},
	},
	{
		{path: "hpdi/...", only: []string{"hpdi", "internal/nbdproto", "internal/virtio", "internal/spin", "internal/vhost", "internal/ring"}, by: append([]string{"hpdi/open"}, assemblers...), why: "a driver is public and knows only the interface; nobody but who assembles the program knows a driver"},
		{path: "internal/block/blocktest", only: []string{"hpdi", "internal/block"}, tests: true, why: "faults are injected by tests, never compiled into the program"},
		{path: "internal/flashmap", only: []string{"hpdi", "internal/block", "internal/ondisk", "internal/planted", "internal/stack"}, why: "the flash layer is a device made of devices; volumes and names reach it only as extents and attributes"},
		{path: "internal/flashmap/collect", only: []string{"hpdi", "internal/block", "internal/config", "internal/ondisk"}, why: "how a device is used is counted the same whatever is decided by it"},
		{path: "internal/flashmap/policy", only: []string{"internal/config", "internal/flashmap/collect"}, steps: true, why: "what is moved must follow from what was counted, so that a simulation decides as a guest would"},
		{path: "internal/devbench", only: []string{"hpdi"}, by: []string{"internal/cli", "bench/..."}, why: "a measurement of a device knows it by the interface alone"},
		{path: "internal/devcopy", only: []string{"hpdi"}, by: []string{"internal/cli", "bench/..."}, why: "a copy of a device knows both by the interface alone"},
		{path: "internal/mirror", only: []string{"hpdi", "internal/block", "internal/ondisk", "internal/planted", "internal/stack"}, why: "a mirror is a device made of devices; what is on it is not its business"},
		{path: "internal/cache", only: []string{"internal/block", "internal/ondisk", "internal/planted", "hpdi"}, why: "a frame is told by its key alone, whoever asks"},
		{path: "internal/restart", only: []string{"internal/block", "internal/config", "internal/ondisk"}, why: "a record is compared with what is so by whoever knows that; it knows nothing but bytes and how a file is replaced"},
		{path: "internal/region", only: []string{"internal/block", "internal/ondisk", "internal/planted"}, why: "a region is memory with sections; what is in them is their owners' business"},
	},
	{
		{path: "hpdi/open", only: []string{"hpdi", "hpdi/..."}, by: assemblers, why: "whoever opens a device by a URI has all drivers in his program; the storage system chooses its own"},
		{path: "internal/rawvolume", only: []string{"hpdi", "internal/block"}, by: assemblers, why: "a device that is offered as it is has nothing of a pool"},
		{path: "internal/devices", why: "the devices of a pool lie below everything that has an address on them"},
		{path: "internal/oplog", only: []string{"internal/block", "internal/ondisk", "internal/planted", "hpdi"}, why: "the log is given its memory and its device; it must be readable by a partner that has nothing else of the pool"},
	},
	{
		{path: "internal/session", only: []string{"internal/block", "internal/ondisk", "internal/planted"}, why: "what clients have submitted is noted whatever their requests were"},
		{path: "internal/space", why: "free space is known by block, not by what the blocks are used for"},
		{path: "internal/blockio", why: "reading and proving a block must not depend on how its address was found"},
		{path: "internal/catalogue", why: "names of volumes are data of a consistency point, not a way to reach volumes"},
	},
	{
		{path: "internal/blockmap", why: "the map is asked by volumes and consistency points and knows neither"},
	},
	{
		{path: "internal/dirty", why: "the dirty index is rebuilt from the log alone after a takeover"},
		{path: "internal/dedup", why: "deduplication decides about blocks that it is shown; consistency points ask it, not the reverse"},
	},
	{
		{path: "internal/estimate", only: []string{"internal/block", "internal/dedup"}, by: []string{"internal/cli", "bench/..."}, why: "what a policy would save must not depend on a pool, and nothing that serves on an estimate"},
		{path: "internal/cp", steps: true, why: "a consistency point is single-stepped by crash tests; volumes wait for it, it waits for nobody"},
	},
	{
		{path: "internal/volume", by: []string{"internal/pool", "internal/guest", "test/...", "bench/..."}, why: "everybody else sees a block.Volume"},
	},
	{
		{path: "internal/pool", by: append([]string{"internal/guest"}, assemblers...), why: "the pool assembles storage; below the guest nobody needs more than a part of it"},
	},
	{
		{path: "internal/export/...", only: []string{"internal/block", "internal/eventfd", "internal/nbdproto", "internal/planted", "internal/ring", "internal/spin", "internal/vhost", "internal/virtio"}, by: assemblers, why: "a protocol serves any block.Volume and must stay testable on one in memory"},
		{path: "internal/partner", only: []string{"internal/block", "internal/planted"}, by: assemblers, steps: true, why: "the takeover protocol is a pure machine: what it says must follow from what it was told"},
		{path: "internal/identity", only: []string{"internal/block"}, by: assemblers, why: "addresses and names are moved by who has fenced, and know nothing of what they lead to"},
	},
	{
		{path: "internal/domain", only: none, by: assemblers, why: "it says what a guest runs in, whatever runs it"},
		{path: "internal/metrics", only: []string{"internal/control"}, by: []string{"internal/host", "internal/cli"}, why: "monitoring sees what status shows, and nothing that serves depends on it"},
		{path: "internal/dump", by: []string{"internal/cli"}, why: "it looks at stored bytes without a guest, and nothing that serves may depend on it"},
		{path: "internal/guest", by: assemblers, why: "a guest is one storage system, complete; the host reaches it through its sockets"},
	},
	{
		{path: "internal/domain/...", only: []string{"internal/domain", "internal/block", "internal/config", "internal/control", "internal/crash"}, by: assemblers, why: "what runs a guest must survive the guest's faults, so it shares no code with storage"},
	},
	{
		{path: "internal/host", by: assemblers, why: "the agent starts, watches and fences guests from outside"},
	},
	{
		{path: "internal/cli", by: []string{"cmd/..."}, why: "commands call the program, nothing calls commands"},
	},
	{
		{path: "cmd/...", only: []string{"internal/cli"}, by: none, why: "main is for starting"},
		{path: "test/...", by: []string{"test/...", "bench/..."}, why: "tests of the whole are not part of it"},
		{path: "bench/...", by: []string{"bench/...", "test/..."}, why: "measurements are not part of what they measure"},
	},
}
