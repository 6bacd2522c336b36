// Package nbdtest holds a block.Volume in memory for tests of protocols: a
// faithful model with holes, whose waits and errors a test injects, and which
// panics when its caller breaks the contract of block.Write.
package nbdtest

import (
	"bytes"
	"context"
	"fmt"
	"sync"

	"github.com/pollux-storage/pollux/internal/block"
)

// Op names a call of a volume to a hook.
type Op string

// The operations a hook sees.
const (
	OpTryRead   Op = "tryread"
	OpRead      Op = "read"
	OpTryStage  Op = "trystage"
	OpStage     Op = "stage"
	OpTryCommit Op = "trycommit"
	OpCommit    Op = "commit"
	OpTrim      Op = "trim"
	OpZero      Op = "zero"
	OpFlush     Op = "flush"
	OpStatus    Op = "status"
)

// ErrWouldWait is what a hook returns to make a Try method decline.
var ErrWouldWait = fmt.Errorf("would have to wait")

// Volume is a thin volume in memory.
type Volume struct {
	// Hook, when set, is called before each operation and may wait or fail. It
	// must be set before the volume is used.
	Hook func(ctx context.Context, op Op, off, n int64) error

	Sessions

	mu       sync.Mutex
	info     block.VolumeInfo
	blocks   map[block.Logical][]byte
	staged   int // writes neither committed nor aborted
	unstable int // changes since the last flush
	calls    map[Op]int
}

// New returns an empty volume of size bytes, a multiple of block.Size.
func New(name string, size int64) *Volume {
	if size%block.Size != 0 {
		panic("nbdtest: size is not a whole number of blocks")
	}
	return &Volume{
		info:   block.VolumeInfo{ID: 1, Name: name, Size: size},
		blocks: map[block.Logical][]byte{},
		calls:  map[Op]int{},
	}
}

// SetID changes the number, which is 1 otherwise.
func (v *Volume) SetID(id block.VolumeID) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.info.ID = id
}

// Grow changes the size.
func (v *Volume) Grow(size int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.info.Size = size
}

// SetReadOnly changes whether the volume takes writes.
func (v *Volume) SetReadOnly(ro bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.info.ReadOnly = ro
}

// Staged returns how many writes are neither committed nor aborted.
func (v *Volume) Staged() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.staged
}

// Unstable returns how many changes no flush has covered.
func (v *Volume) Unstable() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.unstable
}

// Calls returns how often an operation was called.
func (v *Volume) Calls(op Op) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.calls[op]
}

// Bytes returns a copy of a range, without hooks.
func (v *Volume) Bytes(off, n int64) []byte {
	v.mu.Lock()
	defer v.mu.Unlock()
	p := make([]byte, n)
	v.readLocked(p, off)
	return p
}

// Info implements block.Volume.
func (v *Volume) Info() block.VolumeInfo {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.info
}

// begin runs the hook and checks the range.
func (v *Volume) begin(ctx context.Context, op Op, off, n int64) error {
	v.mu.Lock()
	v.calls[op]++
	size := v.info.Size
	v.mu.Unlock()
	if off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("%s of %d bytes at %d of a volume of %d: %w", op, n, off, size, block.ErrInvalid)
	}
	if v.Hook != nil {
		return v.Hook(ctx, op, off, n)
	}
	return nil
}

// TryRead implements block.Volume.
func (v *Volume) TryRead(p []byte, off int64) (bool, error) {
	if err := v.begin(context.Background(), OpTryRead, off, int64(len(p))); err != nil {
		if err == ErrWouldWait {
			for i := range p { // undefined, by the contract
				p[i] = 0xee
			}
			return false, nil
		}
		return false, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.readLocked(p, off)
	return true, nil
}

// Read implements block.Volume.
func (v *Volume) Read(ctx context.Context, p []byte, off int64) error {
	if err := v.begin(ctx, OpRead, off, int64(len(p))); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.readLocked(p, off)
	return nil
}

func (v *Volume) readLocked(p []byte, off int64) {
	for len(p) > 0 {
		b, at := v.blocks[block.Logical(off/block.Size)], int(off%block.Size)
		n := min(len(p), block.Size-at)
		if b == nil {
			clear(p[:n])
		} else {
			copy(p, b[at:at+n])
		}
		p, off = p[n:], off+int64(n)
	}
}

// writeLocked changes a range; zeroes that fill a block leave a hole if punch.
func (v *Volume) writeLocked(p []byte, off int64, punch bool) {
	v.unstable++
	for len(p) > 0 {
		l, at := block.Logical(off/block.Size), int(off%block.Size)
		n := min(len(p), block.Size-at)
		b := v.blocks[l]
		if b == nil {
			b = make([]byte, block.Size)
			v.blocks[l] = b
		}
		copy(b[at:], p[:n])
		if punch && bytes.Count(b, []byte{0}) == block.Size {
			delete(v.blocks, l)
		}
		p, off = p[n:], off+int64(n)
	}
}

// TryStage implements block.Volume.
func (v *Volume) TryStage(off int64, n int) (block.Write, error) {
	if err := v.begin(context.Background(), OpTryStage, off, int64(n)); err != nil {
		if err == ErrWouldWait {
			return nil, nil
		}
		return nil, err
	}
	return v.stage(off, n), nil
}

// Stage implements block.Volume.
func (v *Volume) Stage(ctx context.Context, off int64, n int) (block.Write, error) {
	if err := v.begin(ctx, OpStage, off, int64(n)); err != nil {
		return nil, err
	}
	return v.stage(off, n), nil
}

func (v *Volume) stage(off int64, n int) block.Write {
	if n <= 0 || n > block.MaxIO {
		panic(fmt.Sprintf("nbdtest: staging %d bytes", n))
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.staged++
	w := &write{v: v, off: off, mem: bytes.Repeat([]byte{0xdb}, n)}
	// Extents as the operation log gives them: cut at block boundaries, in
	// pieces of different lengths.
	for rest, k := w.mem, 1; len(rest) > 0; k++ {
		m := min(len(rest), k%3*block.Size+block.Size-int(off%block.Size))
		w.bufs = append(w.bufs, rest[:m])
		rest = rest[m:]
	}
	return w
}

// write implements block.Write.
type write struct {
	v    *Volume
	off  int64
	mem  []byte
	bufs [][]byte
	tag  block.Tag
	over bool
}

func (w *write) Buffers() [][]byte {
	if w.over {
		panic("nbdtest: Buffers of a write that is over")
	}
	return w.bufs
}

func (w *write) SetTag(tag block.Tag) { w.tag = tag }

func (w *write) TryCommit() (bool, error) {
	if err := w.v.begin(context.Background(), OpTryCommit, w.off, int64(len(w.mem))); err != nil {
		if err == ErrWouldWait {
			return false, nil
		}
		w.end(false)
		return true, err
	}
	w.end(true)
	return true, nil
}

func (w *write) Commit(ctx context.Context) error {
	err := w.v.begin(ctx, OpCommit, w.off, int64(len(w.mem)))
	w.end(err == nil)
	return err
}

func (w *write) Abort() { w.end(false) }

func (w *write) end(publish bool) {
	w.v.mu.Lock()
	defer w.v.mu.Unlock()
	if w.over {
		panic("nbdtest: a write was committed or aborted twice")
	}
	w.over = true
	w.v.staged--
	if publish {
		w.v.writeLocked(w.mem, w.off, false)
		w.v.note(w.tag)
	}
	for i := range w.mem { // whoever still looks shall notice
		w.mem[i] = 0xdd
	}
}

// note says that the change of a tag was made; only a mistake of a test names a session
// that is not open.
func (v *Volume) note(tag block.Tag) {
	if err := v.Note(tag); err != nil {
		panic("nbdtest: " + err.Error())
	}
}

// Trim implements block.Volume.
func (v *Volume) Trim(ctx context.Context, off, n int64, tag block.Tag) error {
	if err := v.begin(ctx, OpTrim, off, n); err != nil {
		return err
	}
	v.zero(off, n, true, tag)
	return nil
}

// WriteZeroes implements block.Volume.
func (v *Volume) WriteZeroes(ctx context.Context, off, n int64, punch bool, tag block.Tag) error {
	if err := v.begin(ctx, OpZero, off, n); err != nil {
		return err
	}
	v.zero(off, n, punch, tag)
	return nil
}

func (v *Volume) zero(off, n int64, punch bool, tag block.Tag) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.note(tag)
	var zeroes [block.Size]byte
	for n > 0 {
		k := min(n, block.Size-off%block.Size)
		l := block.Logical(off / block.Size)
		switch _, there := v.blocks[l]; {
		case punch && k == block.Size:
			delete(v.blocks, l)
			v.unstable++
		case there || !punch:
			v.writeLocked(zeroes[:k], off, punch)
		}
		off, n = off+k, n-k
	}
}

// Flush implements block.Volume.
func (v *Volume) Flush(ctx context.Context) error {
	v.mu.Lock()
	covered := v.unstable
	v.mu.Unlock()
	if err := v.begin(ctx, OpFlush, 0, 0); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.unstable -= min(v.unstable, covered)
	return nil
}

// Status implements block.Volume.
func (v *Volume) Status(ctx context.Context, off, n int64, most int, ext []block.Extent) ([]block.Extent, error) {
	if err := v.begin(ctx, OpStatus, off, n); err != nil {
		return ext, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	first := len(ext)
	for n > 0 {
		k := min(n, block.Size-off%block.Size)
		hole := v.blocks[block.Logical(off/block.Size)] == nil
		if i := len(ext) - 1; i >= first && ext[i].Hole == hole {
			ext[i].Length += k
		} else if len(ext)-first == most {
			break
		} else {
			ext = append(ext, block.Extent{Offset: off, Length: k, Hole: hole})
		}
		off, n = off+k, n-k
	}
	return ext, nil
}
