package control

import "time"

// What may be asked of the scrub of a pool.
const (
	ScrubStart  = "start"
	ScrubPause  = "pause"
	ScrubResume = "resume"
	ScrubStop   = "stop"
)

// The states of the scrub of a pool.
const (
	ScrubNever   = "never" // as far as is known
	ScrubRunning = "running"
	ScrubPaused  = "paused"
	ScrubStopped = "stopped" // before it was through
	ScrubDone    = "done"
)

// ScrubChange asks for a change of the scrub of a pool.
type ScrubChange struct {
	Action string `json:"action"`
}

// ScrubStatus tells how far the newest scrub of a pool is, and what the newest one
// that went through has found.
type ScrubStatus struct {
	State string      `json:"state"`
	Now   ScrubResult `json:"now"`  // of the newest one
	Last  ScrubResult `json:"last"` // of the newest that went through
	Done  int64       `json:"done_blocks"`
	Total int64       `json:"total_blocks"` // an estimate
	Left  Duration    `json:"left_ms"`      // until it ends; 0 when that is not known
	Next  time.Time   `json:"next,omitzero"`
}

// Unreadable returns how many blocks the newest scrub or the newest that went
// through has found that no copy has.
func (s ScrubStatus) Unreadable() int64 { return max(s.Now.Unreadable, s.Last.Unreadable) }

// ScrubResult is what a scrub has come to.
type ScrubResult struct {
	Begun      time.Time      `json:"begun,omitzero"`
	Ended      time.Time      `json:"ended,omitzero"`
	Took       Duration       `json:"took_ms"` // without pauses
	Blocks     int64          `json:"blocks"`  // read, whatever the number of copies
	Bytes      int64          `json:"bytes"`   // read from all copies
	Repaired   int64          `json:"repaired"`
	Unreadable int64          `json:"unreadable"`
	Findings   []ScrubFinding `json:"findings,omitempty"` // the first of the unreadable blocks
}

// ScrubFinding is a block that no copy has.
type ScrubFinding struct {
	Volume string `json:"volume,omitempty"` // empty for what is no volume's
	Block  int64  `json:"block"`            // of the volume, of 4 KiB
	Text   string `json:"text"`
}
