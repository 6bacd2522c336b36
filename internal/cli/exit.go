package cli

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/internal/control"
)

// The exit statuses.
const (
	exitOK         = 0
	exitFailure    = 1
	exitUsage      = 2
	exitNotFound   = 3
	exitNotRunning = 4
	exitRefused    = 5
	exitProblems   = 6
)

const exitHelp = `Exit statuses:
  0  done
  1  failed
  2  the command line or a value in it makes no sense
  3  there is no such guest, volume or pool
  4  nothing runs in this directory, or the agent does not
  5  refused: sensible, but not in the state that things are in
  6  check found problems or could not mend all of them, dump found damage,
     or stored data is corrupt`

// errReported ends a command with a failure that its output has told already.
var errReported = errors.New("reported")

// statusError gives an error an exit status of its own.
type statusError struct {
	status int
	err    error
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error {
	return &statusError{exitUsage, fmt.Errorf(format, args...)}
}

// refused is a refusal by the command line itself.
func refused(message, hint string) error {
	return control.NewError(control.KindRefused, message, hint)
}

func exitStatus(err error) int {
	if err == nil {
		return exitOK
	}
	var s *statusError
	if errors.As(err, &s) {
		return s.status
	}
	switch control.KindOf(err) {
	case control.KindInvalid:
		return exitUsage
	case control.KindNotFound:
		return exitNotFound
	case control.KindNotRunning:
		return exitNotRunning
	case control.KindRefused, control.KindExists:
		return exitRefused
	case control.KindCorrupt:
		return exitProblems
	}
	return exitFailure
}

// message splits an error into what happened and what to do about it.
func message(err error, dir string) (what, todo string) {
	var e *control.Error
	if !errors.As(err, &e) {
		return err.Error(), ""
	}
	// The text of an error that adds something to e has the hint in it.
	if err.Error() != e.Error() {
		return err.Error(), ""
	}
	if e.Kind == control.KindNotRunning {
		return e.Message, startHint(dir)
	}
	return e.Message, e.Hint
}

// startHint says how to start the pair of a directory.
func startHint(dir string) string {
	return "start it with: pollux up --detach" + dirFlag(dir)
}

// dirFlag returns the --dir that a suggested command needs.
func dirFlag(dir string) string {
	if dir == defaultDir {
		return ""
	}
	return " --dir " + shellQuote(dir)
}
