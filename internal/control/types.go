package control

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// Duration is a time.Duration that travels as a number of milliseconds.
type Duration time.Duration

// MarshalJSON writes milliseconds with microsecond precision.
func (d Duration) MarshalJSON() ([]byte, error) {
	return json.Marshal(math.Round(float64(d)/1e3) / 1e3)
}

// UnmarshalJSON reads milliseconds.
func (d *Duration) UnmarshalJSON(p []byte) error {
	var ms float64
	if err := json.Unmarshal(p, &ms); err != nil {
		return err
	}
	*d = Duration(ms * 1e6)
	return nil
}

// String returns the duration as Go prints it.
func (d Duration) String() string { return time.Duration(d).String() }

// Status is everything that `pollux status` shows.
type Status struct {
	Agent        AgentStatus   `json:"agent"`
	Protected    bool          `json:"protected"` // either guest may die now and nothing is lost
	Guests       []GuestStatus `json:"guests"`
	LastTakeover *Takeover     `json:"last_takeover,omitempty"`
	Alerts       []string      `json:"alerts"` // what a person must look at
	Notes        []string      `json:"notes,omitempty"`
	// Upgrade is one that is under way, or half done.
	Upgrade *Upgrade `json:"upgrade,omitempty"`
}

// AllAlerts returns those of the pair and of its guests, each once, with the name of
// the guest that has it.
func (st Status) AllAlerts() []string {
	return st.alerts(func(guest, text string) string { return "guest " + guest + ": " + text })
}

// AlertTexts is AllAlerts without the names: an alert about a pool stays the same when
// another guest serves it.
func (st Status) AlertTexts() []string {
	return st.alerts(func(_, text string) string { return text })
}

func (st Status) alerts(of func(guest, text string) string) []string {
	all := append([]string{}, st.Alerts...)
	for _, g := range st.Guests {
		for _, a := range g.Alerts {
			told := slices.ContainsFunc(st.Alerts, func(have string) bool { return strings.Contains(have, a) })
			if text := of(g.Name, a); !told && !slices.Contains(all, text) {
				all = append(all, text)
			}
		}
	}
	return all
}

// AgentStatus describes the host agent.
type AgentStatus struct {
	Running bool      `json:"running"`
	PID     int       `json:"pid,omitempty"`
	Version string    `json:"version,omitempty"`
	Build   string    `json:"build,omitempty"` // see Program
	Dir     string    `json:"dir"`
	Socket  string    `json:"socket"`
	Started time.Time `json:"started,omitzero"`
	Uptime  Duration  `json:"uptime_ms"`
}

// The states of a guest as status shows them.
const (
	StateStarting  = "starting"      // its process runs and has not said hello
	StateServing   = "serving"       // it serves at least one identity
	StateWaiting   = "waiting"       // it is well; the partner serves its identity
	StateTakeover  = "takeover"      // it is taking over an identity
	StateReleasing = "releasing"     // it is handing an identity over
	StateFailed    = "failed"        // its process ended; it will be started again
	StateStopped   = "stopped"       // it was stopped, or crashed too often
	StateHung      = "not answering" // its process runs and does not answer
)

// GuestStatus describes one guest and the identity of the same name.
type GuestStatus struct {
	Name      string         `json:"name"`
	State     string         `json:"state"`
	PID       int            `json:"pid"`
	Version   string         `json:"version,omitempty"` // of its program
	Build     string         `json:"build,omitempty"`   // see Program
	Serves    []string       `json:"serves"`            // identities that this guest serves now
	ServedBy  string         `json:"served_by"`         // guest that serves this guest's identity, "" when none does
	Pools     []string       `json:"pools"`             // pools that this guest owns now
	Protected bool           `json:"protected"`         // its partner would take over at once
	Why       string         `json:"why,omitempty"`     // why it is not protected
	Address   string         `json:"address"`           // TCP address of its identity
	Socket    string         `json:"socket"`            // unix socket of its identity
	Exports   []Export       `json:"exports"`           // exports of its identity, whoever serves them
	Region    []RegionStatus `json:"regions"`
	Devices   []DeviceStatus `json:"devices"`
	PoolStats []PoolStatus   `json:"pool_stats"`
	Memory    MemoryStatus   `json:"memory"`
	Uptime    Duration       `json:"uptime_ms"`
	Restarts  int            `json:"restarts"`
	// Policy is what comes first when it fails: "restart-first" or "takeover-first".
	Policy string `json:"policy,omitempty"`
	// Resumed is how often it served again after a restart that came before a
	// takeover, ResumedLate how often such a restart was not in time.
	Resumed     int `json:"restarted_in_place,omitempty"`
	ResumedLate int `json:"restarted_late,omitempty"`
	// Spare tells whether its next process is ready.
	Spare      bool     `json:"spare"`
	GivebackIn Duration `json:"giveback_in_ms,omitempty"`      // until the automatic giveback to this guest
	LockedOut  bool     `json:"giveback_locked_out,omitempty"` // automatic giveback was stopped, see alerts
	Alerts     []string `json:"alerts,omitempty"`
}

// Export is a volume as clients reach it.
type Export struct {
	Volume      string `json:"volume"`
	Guest       string `json:"guest"` // the identity that clients know
	ServedBy    string `json:"served_by"`
	Size        int64  `json:"size"`
	ReadOnly    bool   `json:"read_only,omitempty"`
	NBD         string `json:"nbd"`
	NBDUnix     string `json:"nbd_unix"`
	Connections int    `json:"connections"` // of NBD
	// VhostUser is where virtual machines attach, Ring where programs open it over rings in
	// shared memory; nil if the settings switch that off.
	VhostUser *VhostUser    `json:"vhost_user,omitempty"`
	Ring      *VolumeSocket `json:"ring,omitempty"`
	// Survey is nil if the volume was not surveyed since its pool was opened.
	Survey *VolumeSurvey `json:"survey,omitempty"`
}

// VhostUser describes the socket at which virtual machines attach to a volume, as to a
// back-end of vhost-user-blk.
type VhostUser struct {
	VolumeSocket
	Serial string `json:"serial"` // what a machine finds the disk by
	// QEMU are the arguments that attach a machine of 2 GiB.
	QEMU []string `json:"qemu,omitempty"`
}

// VolumeSocket describes a socket at which clients on the same host attach to a volume.
type VolumeSocket struct {
	Socket  string `json:"socket,omitempty"`
	URI     string `json:"uri,omitempty"` // as the interface to devices names it
	Clients int    `json:"clients"`       // that are attached
	// Note says why there is no socket.
	Note string `json:"note,omitempty"`
	SocketCounts
}

// Number says in words how many there are of what.
func Number(n int, what string) string {
	switch n {
	case 0:
		return "no " + what
	case 1:
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// SocketCounts are figures of a volume's socket since the identity was taken up by whoever
// serves it, or the volume was made.
type SocketCounts struct {
	Reads        uint64 `json:"reads"`
	Writes       uint64 `json:"writes"`
	Flushes      uint64 `json:"flushes"`
	Discards     uint64 `json:"discards"`
	WriteZeroes  uint64 `json:"write_zeroes"`
	Errors       uint64 `json:"errors"`
	ReadBytes    uint64 `json:"read_bytes"`
	WrittenBytes uint64 `json:"written_bytes"`
	// Resubmitted requests were under way when their server ended, and were run again;
	// Skipped ones were in the log already.
	Resubmitted uint64 `json:"resubmitted"`
	Skipped     uint64 `json:"skipped"`
}

// RegionStatus describes a region that a guest owns or maps.
type RegionStatus struct {
	Identity  string `json:"identity"`
	Path      string `json:"path"`
	Bytes     int64  `json:"bytes"`
	HugePages bool   `json:"huge_pages"`
	Mapped    string `json:"mapped"` // "owner" or "partner, read-only"
	Heartbeat uint64 `json:"heartbeat"`
	Note      string `json:"note,omitempty"`
}

// DeviceStatus describes an open device.
type DeviceStatus struct {
	Pool   string `json:"pool"`
	Path   string `json:"path"`
	Driver string `json:"driver"`
	Size   int64  `json:"size"`
	Direct bool   `json:"direct"`
	Note   string `json:"note,omitempty"`
	// Class is ClassLLRRM or ClassFlash for such a device, empty for a disk.
	Class string `json:"class,omitempty"`
	// Of one of several copies: which mirror of the pool, from 1, and how far
	// the copy can be believed; what is left to be resilvered, in bytes.
	Mirror   int    `json:"mirror,omitempty"`
	State    string `json:"state,omitempty"` // "in sync", "resilvering", "absent"
	Resilver int64  `json:"resilver,omitempty"`
	Repaired uint64 `json:"repaired,omitempty"` // ranges written again
	DeviceErrors
}

// DeviceErrors counts what went wrong with a device since the pool was opened.
type DeviceErrors struct {
	ReadErrors  uint64 `json:"read_errors,omitempty"`
	WriteErrors uint64 `json:"write_errors,omitempty"` // discards and syncs too
	// Corrupt is how many blocks that were read were not what had been written. Where
	// there are copies, none was.
	Corrupt uint64 `json:"corrupt,omitempty"`
}

// PoolStatus are the figures of an open pool.
type PoolStatus struct {
	Name     string `json:"name"`
	Identity string `json:"identity"`
	Epoch    uint64 `json:"epoch"`
	CP       uint64 `json:"cp"`
	Capacity int64  `json:"capacity"`
	Free     int64  `json:"free"`
	LogBytes int64  `json:"log_bytes"`
	LogUsed  int64  `json:"log_used"`
	Dirty    int64  `json:"dirty_bytes"`
	// Faults are the errors of its devices that had any, by their names.
	Faults map[string]DeviceErrors `json:"faults,omitempty"`
	// CountsBytes is the memory of its reference counts.
	CountsBytes int64 `json:"counts_bytes"`
	// RegionKept are bytes of its region that keep what a takeover need not read: the
	// unfolded journal, and what was collected of the use of disks.
	RegionKept int64 `json:"region_kept_bytes,omitempty"`
	// Loading says that the counts are still being read: clients are served,
	// and nothing is taken to the devices yet.
	Loading bool   `json:"loading,omitempty"`
	Error   string `json:"error,omitempty"` // why the newest consistency point failed
	// PagesMended is how many pages of metadata were bad since the pool was opened,
	// and were written again from their twins.
	PagesMended uint64        `json:"pages_mended,omitempty"`
	Cache       CacheStatus   `json:"cache"`
	Cleaner     CleanerStatus `json:"cleaner"`
	Dedup       DedupStatus   `json:"dedup"`
	Scrub       ScrubStatus   `json:"scrub"`
	Settings    PoolSettings  `json:"settings,omitzero"`
	Restart     RestartStatus `json:"restart"`
	// LLRRM tells of low-latency random read memory, if the pool has some.
	LLRRM *LLRRMStatus `json:"llrrm,omitempty"`
	// Flash tells of the flash of the pool, if it has some.
	Flash *FlashStatus `json:"flash,omitempty"`
	// Removal is that of a device, if one is being removed.
	Removal *RemovalStatus `json:"removal,omitempty"`
	// Removed are paths of devices that were removed since the pool was opened.
	Removed []string `json:"removed,omitempty"`
}

// CacheStatus tells of the cache of a pool. Its counts are those since the pool was opened.
type CacheStatus struct {
	Bytes int64 `json:"bytes"` // of memory
	Used  int64 `json:"used"`  // bytes of blocks
	// Own are bytes of memory that end with the guest. Those of others are of the region.
	Own int64 `json:"own_bytes,omitempty"`
	// Why says why the cache ends with the guest, empty if it does not.
	Why string `json:"why,omitempty"`
	// Adopted is how many blocks a guest before has left.
	Adopted   int64  `json:"adopted"`
	Hits      uint64 `json:"hits"` // blocks that were found, pages of metadata too
	Misses    uint64 `json:"misses"`
	Evictions uint64 `json:"evictions"`
	Damaged   uint64 `json:"damaged,omitempty"` // blocks that were not what their checksum says
}

// RestartStatus tells how a pool was opened.
type RestartStatus struct {
	// Record says that it was by its restart record, and Number which one that was.
	Record bool   `json:"record"`
	Number uint64 `json:"number,omitempty"`
	Why    string `json:"why,omitempty"` // it was not
}

// LLRRMStatus tells of the blocks that series leave over and that moved to low-latency
// random read memory. Its counts are those since the pool was opened.
type LLRRMStatus struct {
	// Devices are the names of those that are such memory.
	Devices []string `json:"devices"`
	// Bytes of it, those of a device that is being removed left out, and those in use.
	Bytes int64 `json:"bytes"`
	Used  int64 `json:"used"`
	// Threshold is the number of places of a block on disks with which it moves there.
	Threshold int `json:"threshold"`
	// Written blocks went there, and Moved references followed them from disks; Waiting
	// blocks on disks have references that are still to do so.
	Written uint64 `json:"written_blocks"`
	Moved   uint64 `json:"moved_references"`
	Waiting int64  `json:"waiting_blocks"`
	// Failed says that it could not be written: nothing moves there any more.
	Failed bool `json:"failed,omitempty"`
}

// RemovalStatus tells how far the removal of a device is.
type RemovalStatus struct {
	Device string `json:"device"` // or the mirror
	// Paths are that of the device, or those of the copies that are there.
	Paths []string `json:"paths,omitempty"`
	State string   `json:"state"` // what is done
	Stuck string   `json:"stuck,omitempty"`
	Total int64    `json:"total"` // bytes in use on it when the removal began
	Left  int64    `json:"left"`  // and now
}

// Percent returns how much of what was on the device is on the others.
func (r RemovalStatus) Percent() float64 {
	if r.Total == 0 {
		return 100
	}
	return 100 * float64(max(0, r.Total-r.Left)) / float64(r.Total)
}

// CleanerStatus tells how the free space of a pool lies, and what the cleaner has
// done about it since the pool was opened.
type CleanerStatus struct {
	State  string `json:"state"`  // what it does, or why it does nothing
	Tracks int64  `json:"tracks"` // of the pool, of 1 MiB each
	Whole  int64  `json:"whole"`  // of them wholly free at the last look
	Passes uint64 `json:"passes"`
	Freed  uint64 `json:"freed"`  // tracks that it has made wholly free
	Moved  uint64 `json:"moved"`  // blocks of 4 KiB
	Failed uint64 `json:"failed"` // blocks that it could not read
}

// MemoryStatus says what a guest takes.
type MemoryStatus struct {
	Resident  int64        `json:"resident"`            // of the process, shared memory included
	Anonymous int64        `json:"anonymous,omitempty"` // of that, what is its own
	Shared    int64        `json:"shared,omitempty"`    // of that, in regions
	Region    int64        `json:"region"`
	Cache     int64        `json:"cache"`
	Heap      int64        `json:"heap"`
	Limit     int64        `json:"limit,omitempty"` // the setting `memory`
	Parts     []MemoryPart `json:"parts,omitempty"`
}

// MemoryPart is what a guest's memory is for.
type MemoryPart struct {
	Name    string `json:"name"`
	Planned int64  `json:"planned"` // with the partner's pool taken over
	Used    int64  `json:"used"`
	Why     string `json:"why"`
}

// Step is one timed part of a takeover.
type Step struct {
	Name string   `json:"name"`
	Took Duration `json:"took_ms"`
}

// The kinds of a [Takeover].
const (
	KindTakeover = "takeover" // the partner serves
	KindGiveback = "giveback" // the guest serves again what its partner served
	KindResumed  = "restart"  // the guest was started again before its partner took over, and serves
)

// Takeover is the record of one takeover or giveback, or of a restart in its place.
type Takeover struct {
	Of      string    `json:"of"`   // the identity
	By      string    `json:"by"`   // the guest that serves it since
	Kind    string    `json:"kind"` // one of the kinds above
	Reason  string    `json:"reason"`
	Planned bool      `json:"planned"`
	Started time.Time `json:"started"` // when the end or hang was noticed, or the command came
	Steps   []Step    `json:"steps"`
	Total   Duration  `json:"total_ms"`
	Error   string    `json:"error,omitempty"`
}

// CheckItem is one line of a dry run.
type CheckItem struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
	Why  string `json:"why"`
}

// TakeoverCheck says whether a takeover would work now.
type TakeoverCheck struct {
	Of     string      `json:"of"`
	By     string      `json:"by"`
	OK     bool        `json:"ok"`
	Checks []CheckItem `json:"checks"`
}

// Volume describes a volume.
type Volume struct {
	Name    string    `json:"name"`
	Pool    string    `json:"pool"`
	Guest   string    `json:"guest"` // its identity
	Size    int64     `json:"size"`
	Used    int64     `json:"used"`
	Dedup   bool      `json:"dedup"` // it shares blocks with what is stored already
	THN     int       `json:"thn"`   // in series of so many at least; 0 if it does not
	Created time.Time `json:"created,omitzero"`
	NBD     string    `json:"nbd"`
	NBDUnix string    `json:"nbd_unix"`
	// VhostUser is where virtual machines attach, Ring where programs open it over rings in
	// shared memory; nil if the settings switch that off.
	VhostUser *VhostUser    `json:"vhost_user,omitempty"`
	Ring      *VolumeSocket `json:"ring,omitempty"`
}

// Sharing says in words what of its blocks the volume shares.
func (v Volume) Sharing() string {
	if !v.Dedup {
		return "off"
	}
	return fmt.Sprintf("on, THN %d", v.THN)
}

// VolumeCreate asks for a new volume. Guest may be empty for the first one.
type VolumeCreate struct {
	Name  string `json:"name"`
	Size  int64  `json:"size"`
	Guest string `json:"guest,omitempty"`
	Dedup bool   `json:"dedup,omitempty"` // share blocks with what is stored already
	THN   int    `json:"thn,omitempty"`   // in series of so many at least; 0 for the default
}

// VolumeChange changes a volume; zero fields stay as they are.
type VolumeChange struct {
	Size   int64  `json:"size,omitempty"`
	Rename string `json:"rename,omitempty"`
	Dedup  *bool  `json:"dedup,omitempty"` // begin to share blocks, or share no more
	THN    int    `json:"thn,omitempty"`   // only of a volume that shares blocks
	Scan   string `json:"scan,omitempty"`  // one of the things that can be asked of a scan
}

// Pool describes a pool, open or not.
type Pool struct {
	Name     string         `json:"name"`
	ID       string         `json:"id,omitempty"`
	Guest    string         `json:"guest"`
	ServedBy string         `json:"served_by"`
	State    string         `json:"state"` // "open", "closed", or why it does not open
	Stats    PoolStatus     `json:"stats"`
	Devices  []DeviceStatus `json:"devices"`
	Volumes  int            `json:"volumes"`
}

// PoolCreate asks for a pool for a guest that has none.
type PoolCreate struct {
	Name     string   `json:"name"`
	Guest    string   `json:"guest"`
	Devices  []string `json:"devices"`             // paths; files that do not exist are created
	Copies   int      `json:"copies,omitempty"`    // devices that keep the same; 1 if 0
	Size     int64    `json:"size,omitempty"`      // of files that are created
	LogBytes int64    `json:"log_bytes,omitempty"` // of the operation log in the region
}

// PoolAdd asks for one more device, or for a mirror of several.
type PoolAdd struct {
	Device string   `json:"device"`
	Copies []string `json:"copies,omitempty"` // the others that keep the same
	Size   int64    `json:"size,omitempty"`   // of files that are created
	// Force adds a device by itself to a pool of mirrors.
	Force bool `json:"force,omitempty"`
	// Class says what it is used for; ClassDisk if empty.
	Class string `json:"class,omitempty"`
	// SetBytes is the size of data sets, of ClassFlash alone; 0 is the default.
	SetBytes int64 `json:"set_bytes,omitempty"`
}

// The classes of devices.
const (
	ClassDisk  = "disk"  // data and metadata
	ClassLLRRM = "llrrm" // low-latency random read memory: single blocks that are shared
	ClassFlash = "flash" // data sets of the disks that are used most
)

// PoolRemove asks for the removal of a device, or for its end.
type PoolRemove struct {
	Device string `json:"device,omitempty"` // path; of a mirror that of any copy
	Cancel bool   `json:"cancel,omitempty"` // the device that is being removed stays
	// Paths are the device, or all copies of the mirror that it is one of. The agent
	// fills it in for the guest.
	Paths []string `json:"paths,omitempty"`
}

// What may be done to one of several copies.
const (
	CopyOffline = "offline" // take it out
	CopyOnline  = "online"  // take it back
	CopyReplace = "replace" // put another device in its place
)

// CopyChange asks for a change of a device that is one of several copies.
type CopyChange struct {
	Action string `json:"action"`
	Device string `json:"device"`         // path, as the pool's settings name it
	New    string `json:"new,omitempty"`  // of a replacement; Device if empty
	Size   int64  `json:"size,omitempty"` // of a file that is created
	// Place is that of the device among those of its pool, from 0. The agent
	// fills it in for the guest.
	Place int `json:"place,omitempty"`
}

// CheckReport is the outcome of a recount.
type CheckReport struct {
	OK     bool        `json:"ok"`
	Online bool        `json:"online"`
	Repair bool        `json:"repair,omitempty"` // what could be mended was
	Pools  []PoolCheck `json:"pools"`
	Notes  []string    `json:"notes,omitempty"`
}

// Mended reports whether anything was mended.
func (r *CheckReport) Mended() bool {
	return slices.ContainsFunc(r.Pools, func(c PoolCheck) bool { return len(c.Mended) > 0 })
}

// PoolCheck is the outcome for one pool.
type PoolCheck struct {
	Pool     string   `json:"pool"`
	Guest    string   `json:"guest"`
	OK       bool     `json:"ok"`
	Volumes  int      `json:"volumes"`
	Blocks   int64    `json:"blocks"`           // blocks in use by the recount
	Problems []string `json:"problems"`         // after a repair those that remain
	Mended   []string `json:"mended,omitempty"` // what was wrong before a repair
	Took     Duration `json:"took_ms"`
}

// CheckProgress tells how far a check of a pool has come.
type CheckProgress struct {
	Pool  string `json:"pool"`
	Guest string `json:"guest"`
	Phase string `json:"phase"` // "metadata", then "data"
	Done  int64  `json:"done"`  // bytes read in this phase
	Total int64  `json:"total"` // bytes of it, 0 when that is not known
}

// Event is one entry of the event log.
type Event struct {
	Seq     uint64            `json:"seq"`
	Time    time.Time         `json:"time"`
	Guest   string            `json:"guest,omitempty"`
	Kind    string            `json:"kind"`
	Message string            `json:"message"`
	Fields  map[string]string `json:"fields,omitempty"`
}

// EventQuery chooses events.
type EventQuery struct {
	After  uint64 // only those with a higher Seq
	Last   int    // at most so many of the past, 0 for all that are kept
	Follow bool   // go on until the context ends
}

// The drills that can be run on a guest.
const (
	DrillKill    = "kill"    // SIGKILL
	DrillHang    = "hang"    // SIGSTOP
	DrillResume  = "resume"  // SIGCONT
	DrillRestart = "restart" // stop it cleanly and start it again
)
