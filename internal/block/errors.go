package block

import (
	"errors"
	"fmt"
)

// The kinds of error. Every error that crosses a package boundary on the data
// path wraps one of them or is an I/O error of a device; protocols map them
// once, by [errors.Is].
var (
	// ErrCorrupt: stored bytes are not what was written.
	ErrCorrupt = errors.New("corrupt data")
	// ErrNoSpace: the pool is full.
	ErrNoSpace = errors.New("no space left in the pool")
	// ErrReadOnly: the volume does not take writes.
	ErrReadOnly = errors.New("volume is read-only")
	// ErrInvalid: the request makes no sense for this object.
	ErrInvalid = errors.New("invalid request")
	// ErrNotFound: there is no such object.
	ErrNotFound = errors.New("not found")
	// ErrExists: the name is taken.
	ErrExists = errors.New("exists already")
	// ErrClosed: the volume or pool was closed, or handed to the partner.
	ErrClosed = errors.New("closed")
	// ErrStale: this guest no longer owns the pool.
	ErrStale = errors.New("ownership lost to a higher epoch")
	// ErrUnsupported: a feature or format version that this program lacks.
	ErrUnsupported = errors.New("not supported")
)

// CorruptError says what is corrupt and where. It is an ErrCorrupt.
type CorruptError struct {
	What  string // "block", "map page", "journal record", ...
	Where string // address, as a person would look it up
	Why   string // "checksum 1234 instead of 5678"
}

// Error names the thing, its place and the reason.
func (e *CorruptError) Error() string {
	return fmt.Sprintf("%s at %s is corrupt: %s", e.What, e.Where, e.Why)
}

// Is makes errors.Is(err, ErrCorrupt) true.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }
