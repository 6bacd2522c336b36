package pool

import (
	"time"

	"github.com/pollux-storage/pollux/internal/flashmap/collect"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

// FlashState says what the flash device of a pool does.
type FlashState string

// The states of a flash device.
const (
	FlashInUse      FlashState = "in use"
	FlashEvacuating FlashState = "evacuating" // data sets move back, and none comes
	FlashEvacuated  FlashState = "evacuated"  // nothing is on it, and nothing comes
	FlashFailed     FlashState = "failed"     // it cannot be written, or parts of its table are lost
)

// FlashStats tells of the flash layer of a pool.
type FlashStats struct {
	Device string // its name, empty when the pool has none; then the rest is empty, too
	State  FlashState
	Why    string // what it waits for, or cannot do
	// SetBytes is the size of a data set. Slots of them find room, Used are on flash, and
	// Lost of those cannot be reached, because their entries of the table are lost.
	SetBytes          int64
	Slots, Used, Lost int
	// Left of Total data sets are still to be moved back by an evacuation.
	Left, Total int
	Primaries   []FlashPrimary
	// Moves of data sets since the pool was opened. Queued are those that are decided and
	// not done.
	Promoted, Demoted uint64
	GivenUp           uint64 // whose data was deleted or overwritten elsewhere: nothing was copied
	FailedMoves       uint64
	Queued            int
	Stopped           string // the limit for which more moves wait, see policy.Status
	// Worn is how many bytes were written to flash in 24 hours, and Written since the pool
	// was opened: by clients, and by moves.
	Worn                             int64
	WrittenByClients, WrittenByMoves uint64
	Failures                         []policy.Failure
	// RulesEvaluated and RulesBroken are how often rules were evaluated and could not be,
	// RuleError is why, of the newest one.
	RulesEvaluated, RulesBroken uint64
	RuleError                   string
	Pins                        []FlashPinned
	// Top are the data sets that save most time on flash or would, those first that save
	// more.
	Top []FlashSet
	// Kept is when what was collected was written to the flash device last, zero if it was
	// not since the pool was opened.
	Kept time.Time
}

// FlashPrimary is a device of the pool whose data sets may be on flash.
type FlashPrimary struct {
	Device  string // its name
	Number  int    // in the pool, from 0
	Class   string // selects the pattern parameters
	Given   bool   // somebody has said its class; else it follows from the device
	OnFlash int    // data sets
	// Flash and Primary are the requests since the pool was opened, by where their data was.
	Flash, Primary FlashTier
	Collected      collect.Status
}

// FlashTier counts requests that went to one tier.
type FlashTier struct {
	Reads, Writes         uint64
	ReadBytes, WriteBytes uint64
	// ReadLatency and WriteLatency are means of a sample; 0 when none was timed.
	ReadLatency, WriteLatency time.Duration
}

// FlashPin says that a range of a volume shall be on flash, whatever its use.
type FlashPin struct {
	Volume string
	Offset int64 // bytes
	Length int64 // bytes; 0 is to the end of the volume, however long it becomes
}

// FlashPinned is a pin and what has become of it.
type FlashPinned struct {
	FlashPin
	Sets  int    // data sets that hold something of the range
	On    int    // of them on flash
	Room  int    // of the others that will come
	State string // as policy.Pinned has it, or "no volume" when it was deleted
}

// FlashSet is a data set and its use.
type FlashSet struct {
	Device  string
	Offset  int64 // on the device, bytes
	OnFlash bool
	Pinned  bool
	// Reads and Writes are those in a window outside of runs, Runs the accesses in runs.
	Reads, Writes, Runs float64
	RequestBytes        float64       // mean size of the requests
	Age                 time.Duration // since the newest access outside of runs
	Benefit             float64       // milliseconds saved in a window
}

// FlashExplanation says why a block of a volume is where it is.
type FlashExplanation struct {
	Volume string
	Offset int64 // bytes
	// Where it is: "hole", "log" for what no consistency point has written yet, or "device".
	Where   string
	Device  string // its name
	At      int64  // on the device, bytes
	OnFlash bool
	Movable string // why its data set never moves, empty when it may
	// Explanation is the policy's, for a data set that may move.
	policy.Explanation
}

// FlashPrediction is what a policy would have come to over the history that was collected.
type FlashPrediction struct {
	Windows  int           // of the history
	From, To time.Time     // of the history; zero without any
	Now      FlashForecast // the policy and the flash size that count
	Then     FlashForecast // those that were asked for
}

// FlashForecast is the share of accesses outside of runs that flash serves, the mean time of
// all accesses, and the moves it takes.
type FlashForecast struct {
	Slots int
	Hits  float64 // 0 to 1, of the second half of the history
	Mean  time.Duration
	Moves policy.Moves
}
