// Package wire is what a test and the first process of its virtual machine say
// to each other: lines of JSON over a virtio-serial port.
package wire

import "time"

// Port is the name of the port.
const Port = "pollux.test"

// OutputLimit bounds, in bytes, what of a program's output is passed on: the end of it.
const OutputLimit = 1 << 20

// Request asks the machine to do one thing. Several may be under way.
type Request struct {
	ID uint64 `json:"id"`
	// Args is a program with its arguments, behind NAME=VALUE for its environment. A name
	// that begins with @ is done by the first process itself: see the package init.
	Args []string `json:"args"`
}

// Reply answers a request, or tells with ID 0 that the machine is up.
type Reply struct {
	ID     uint64 `json:"id"`
	Output string `json:"output"`
	Status int    `json:"status"` // exit status; -1 if it could not be run
	Error  string `json:"error,omitempty"`
}

// Pause is from when on a round of a probe counts as a pause.
const Pause = 250 * time.Millisecond

// Probe is what came of writing one block and reading it back, again and again.
type Probe struct {
	Rounds int       `json:"rounds"`
	Pauses []float64 `json:"pauses"` // in seconds, of rounds that took at least Pause
}
