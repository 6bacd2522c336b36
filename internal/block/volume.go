package block

import "context"

// VolumeInfo describes a volume to a protocol.
type VolumeInfo struct {
	ID       VolumeID
	Name     string
	Size     int64 // bytes; a multiple of Size
	ReadOnly bool
}

// Volume is a virtual block device as protocols see it. All its methods may
// be called concurrently and return errors of the kinds in this package.
// Offsets and lengths are bytes at any alignment; a range that reaches past
// the volume is ErrInvalid.
//
// A write or trim that has returned nil survives the death of the guest. It
// survives a power cut of the host once a Flush that was called after it has
// returned.
//
// A write or trim with a Tag is atomic in the operation log: after the death of the
// guest the whole change is there and [Session.Done] says so, or nothing of it.
type Volume interface {
	Info() VolumeInfo
	Sessions

	// TryRead fills p from memory alone. It returns false, with p undefined,
	// when that would need a device.
	TryRead(p []byte, off int64) (bool, error)
	// Read fills p. It may wait for devices.
	Read(ctx context.Context, p []byte, off int64) error

	// TryStage is Stage for callers that cannot wait: it returns nil and no
	// error when Stage would have to.
	TryStage(off int64, n int) (Write, error)
	// Stage reserves memory of the operation log for a write of n bytes at
	// off (at most MaxIO) and waits for room, until ctx ends.
	Stage(ctx context.Context, off int64, n int) (Write, error)

	// Trim makes a range read as zero and frees its space. The tag may be zero.
	Trim(ctx context.Context, off, n int64, tag Tag) error
	// WriteZeroes makes a range read as zero. With punch false the space
	// the zeroes would take stays reserved where the implementation can do
	// so; thin volumes may punch all the same. The tag may be zero.
	WriteZeroes(ctx context.Context, off, n int64, punch bool, tag Tag) error
	// Flush makes everything that was acknowledged before it, on any
	// connection, survive a power cut of the host.
	Flush(ctx context.Context) error
	// Status appends the extents of a range in order, without gaps; the last
	// may end before the range does when max extents were found.
	Status(ctx context.Context, off, n int64, max int, ext []Extent) ([]Extent, error)
}

// MaxIO is the largest single read or write in bytes.
const MaxIO = 32 << 20

// Write is a staged write, of one goroutine. It ends with a TryCommit that
// returns true or an error, with Commit, whatever it returns, or with Abort;
// one of these must happen, and nothing may be called afterwards.
//
// So an error of TryCommit or Commit consumes the write: nothing was written,
// its memory has been given back, and Abort must not be called.
type Write interface {
	// Buffers returns the memory that the payload is to be received into;
	// their lengths add up to the length of the write. They are invalid once
	// the write has ended.
	Buffers() [][]byte
	// SetTag names the submission that the write belongs to, before it is
	// committed. A tag of no open session makes the commit fail.
	SetTag(tag Tag)
	// TryCommit publishes the write as Commit does and returns true, or does
	// nothing and returns false when that would have to wait (for a partial
	// block whose rest must be read from a device, or for space to be freed).
	TryCommit() (bool, error)
	// Commit publishes the write: after it returns nil the write may be
	// acknowledged.
	Commit(ctx context.Context) error
	// Abort gives the memory back. Nothing was written.
	Abort()
}
