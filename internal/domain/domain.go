// Package domain says what a guest runs in, as the agent sees it: something
// that can be started, watched, paused and killed. domain/process, where a
// guest is a process, is the embedded default.
//
// A domain's end is certain once Ended is closed: none of its instructions
// runs any more, and its memory is unmapped. I/O that it had given to the
// kernel may still be under way; the locks on the devices guard against that.
package domain

import (
	"os"
	"time"
)

// Spec describes a domain to be started.
type Spec struct {
	Name string // of the guest
	Inc  uint64 // incarnation, higher than all before
	// Program is the file that runs; empty for the driver's own.
	Program string
	Args    []string // of the guest's program
	Files   []*os.File
}

// Domain is one run of a guest.
type Domain interface {
	Name() string
	Inc() uint64
	PID() int
	// Program is the file that runs, "" when that was not recorded.
	Program() string
	Started() time.Time
	// Ended is closed when the domain has ended.
	Ended() <-chan struct{}
	// Reason says why, once it has ended.
	Reason() string

	// Kill ends it without its consent. Ended is closed soon after.
	Kill() error
	// Terminate asks it to end.
	Terminate() error
	// Pause stops it between two instructions, Resume lets it go on.
	Pause() error
	Resume() error
}

// ExitStuck is the status with which a guest ends itself when it finds that it does
// nothing any more.
const ExitStuck = 70

// Remains is what a domain that failed has left for those who look for the cause.
type Remains struct {
	// Said is what its runtime or its watchdog wrote as it died, from the beginning.
	Said []byte
	// Log is the end of its output, which may hold that of earlier runs.
	Log []byte
}

// Spare is a domain in which nothing runs yet that anybody would miss: all has been
// loaded, and it waits to be told that it is the next run of its guest.
type Spare interface {
	// Start makes it that run, with an incarnation higher than all before. After an
	// error it is of no use.
	Start(inc uint64) (Domain, error)
	// Ended is closed when it has ended, before it was started or after.
	Ended() <-chan struct{}
	// Discard ends it, unless it was started, and returns when it has ended.
	Discard()
}

// Driver starts domains and finds those that an earlier agent started.
type Driver interface {
	Start(Spec) (Domain, error)
	// Prepare makes a spare. The Spec's number does not matter, and its arguments
	// are those by which a program waits for its number. A spare ends when the agent
	// does.
	Prepare(Spec) (Spare, error)
	// Find returns the domain of a guest as it was recorded. A domain that
	// has ended since is returned as such; nil means that there never was one.
	Find(name string) (Domain, error)
	// Remains returns what a domain that has ended left, each part of at most limit
	// bytes, and removes what nobody else needs of it; nil when it ended in good order.
	// It may be called beside all else, once for each domain.
	Remains(d Domain, limit int64) (*Remains, error)
	// Tidy keeps what the driver writes about a guest within its limits.
	Tidy(name string) error
	// Forget removes what was recorded about a guest.
	Forget(name string) error
}
