// Package rawvolume makes a block.Volume of any hpdi.Device: for programs that offer a
// device as it is, by a protocol that serves volumes. Reads and writes are passed on.
//
// A device has no operation log. What a write has done when the program dies nobody knows;
// a client that sends it again has it done again, as with every server of plain devices.
// While the program lives, sessions say what is done, in its memory.
//
// Payloads pass through memory of the package, which is aligned as devices want it. A read
// has one buffer of it, and what writes have together is bounded: they wait for their share.
// Offsets and lengths may be any: what is not whole blocks of the device is read, changed
// and written again, with no other write beside it. Those are the two ends of a write; the
// rest of it goes beside others.
package rawvolume

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sync/semaphore"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

const (
	// piece is the size of the buffers that payloads pass through.
	piece = 256 << 10
	// memory bounds the buffers of writes. It is more than the largest write.
	memory = 2 * block.MaxIO
	// calls is how many requests the device has at once.
	calls = 64
)

// Volume is a device as a volume.
type Volume struct {
	name string
	dev  hpdi.Device
	b    *hpdi.Blocking
	room *semaphore.Weighted
	sessions

	// parts is held by writes: exclusively by those of parts of blocks.
	parts sync.RWMutex

	bufs struct {
		sync.Mutex
		free [][]byte // no more than were in use at once; guarded by the lock
	}
}

// New returns a volume of that name. The device stays the caller's to close, after Close.
func New(name string, dev hpdi.Device) (*Volume, error) {
	if bs := dev.Info().BlockSize; bs < 1 || bs > piece || piece%bs != 0 {
		return nil, fmt.Errorf("%s: blocks of %d bytes: %w", name, bs, block.ErrUnsupported)
	}
	b, err := hpdi.NewBlocking(dev, calls)
	if err != nil {
		return nil, err
	}
	return &Volume{name: name, dev: dev, b: b, room: semaphore.NewWeighted(memory)}, nil
}

// Close ends the volume. Its calls have ended.
func (v *Volume) Close() error {
	err := v.b.Close()
	for _, b := range v.bufs.free {
		err = errors.Join(err, hpdi.Free(b))
	}
	v.bufs.free = nil
	return err
}

// Info implements block.Volume.
func (v *Volume) Info() block.VolumeInfo {
	i := v.dev.Info()
	return block.VolumeInfo{Name: v.name, Size: i.Size, ReadOnly: i.ReadOnly}
}

// buffer returns a buffer of piece bytes.
func (v *Volume) buffer() ([]byte, error) {
	v.bufs.Lock()
	if n := len(v.bufs.free); n > 0 {
		b := v.bufs.free[n-1]
		v.bufs.free = v.bufs.free[:n-1]
		v.bufs.Unlock()
		return b, nil
	}
	v.bufs.Unlock()
	return hpdi.Alloc(piece)
}

func (v *Volume) give(b []byte) {
	v.bufs.Lock()
	defer v.bufs.Unlock()
	v.bufs.free = append(v.bufs.free, b[:piece])
}

// check returns an error unless the volume has the range.
func (v *Volume) check(what string, off, n int64) error {
	if size := v.dev.Info().Size; off < 0 || n < 0 || off > size-n {
		return fmt.Errorf("%s of %d bytes at %d of %s, which has %d bytes: %w", what, n, off, v.name, size, block.ErrInvalid)
	}
	return nil
}

// whole reports whether a range is whole blocks of the device.
func (v *Volume) whole(off, n int64) bool {
	bs := int64(v.dev.Info().BlockSize)
	return off%bs == 0 && n%bs == 0
}

// around returns the whole blocks that hold the beginning of a range, at most a piece, and
// how much of the range is in them. A device's blocks are no larger than a piece.
func (v *Volume) around(off, n int64) (from, blocks, part int64) {
	bs := int64(v.dev.Info().BlockSize)
	from = off / bs * bs
	blocks = min((off+n-from+bs-1)/bs*bs, piece)
	return from, blocks, min(n, from+blocks-off)
}

// kind gives a device's error the kind that protocols know.
func kind(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, hpdi.ErrNoSpace):
		return fmt.Errorf("%s: %w: %w", what, block.ErrNoSpace, err)
	case errors.Is(err, hpdi.ErrReadOnly):
		return fmt.Errorf("%s: %w: %w", what, block.ErrReadOnly, err)
	case errors.Is(err, hpdi.ErrUnsupported):
		return fmt.Errorf("%s: %w: %w", what, block.ErrUnsupported, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// TryRead implements block.Volume: a device may always have to wait.
func (v *Volume) TryRead([]byte, int64) (bool, error) { return false, nil }

// Read implements block.Volume.
func (v *Volume) Read(ctx context.Context, p []byte, off int64) error {
	if err := v.check("read", off, int64(len(p))); err != nil {
		return err
	}
	b, err := v.buffer()
	if err != nil {
		return err
	}
	defer v.give(b)
	for len(p) > 0 {
		from, blocks, n := v.around(off, int64(len(p)))
		if err := v.b.Read(ctx, b[:blocks], from); err != nil {
			return kind("read", err)
		}
		copy(p[:n], b[off-from:])
		p, off = p[n:], off+n
	}
	return nil
}

// TryStage implements block.Volume.
func (v *Volume) TryStage(off int64, n int) (block.Write, error) {
	return v.stage(off, n, func(n int64) error {
		if !v.room.TryAcquire(n) {
			return errNoRoom
		}
		return nil
	})
}

var errNoRoom = errors.New("no room")

// Stage implements block.Volume.
func (v *Volume) Stage(ctx context.Context, off int64, n int) (block.Write, error) {
	return v.stage(off, n, func(n int64) error { return v.room.Acquire(ctx, n) })
}

func (v *Volume) stage(off int64, n int, acquire func(int64) error) (block.Write, error) {
	if n <= 0 || n > block.MaxIO {
		return nil, fmt.Errorf("write of %d bytes, at most %d are possible: %w", n, block.MaxIO, block.ErrInvalid)
	}
	if err := v.check("write", off, int64(n)); err != nil {
		return nil, err
	}
	w := &write{v: v, off: off}
	for left := int64(n); left > 0; left -= v.cut(off+int64(n)-left, left) {
		w.room += piece
	}
	if err := acquire(w.room); err != nil {
		if errors.Is(err, errNoRoom) {
			return nil, nil
		}
		return nil, err
	}
	for left := int64(n); left > 0; {
		b, err := v.buffer()
		if err != nil {
			w.Abort()
			return nil, err
		}
		b = b[:v.cut(off+int64(n)-left, left)]
		w.bufs = append(w.bufs, b)
		left -= int64(len(b))
	}
	return w, nil
}

// cut returns how much of n bytes at off goes into one buffer: whole blocks of the device,
// or less than one where a write begins or ends within a block.
func (v *Volume) cut(off, n int64) int64 {
	bs := int64(v.dev.Info().BlockSize)
	switch {
	case off%bs != 0:
		return min(n, bs-off%bs)
	case n < bs:
		return n
	}
	return min(n/bs*bs, piece)
}

// write is a write that is staged.
type write struct {
	v    *Volume
	off  int64
	room int64
	bufs [][]byte
	tag  block.Tag
}

// Buffers implements block.Write.
func (w *write) Buffers() [][]byte { return w.bufs }

// SetTag implements block.Write.
func (w *write) SetTag(tag block.Tag) { w.tag = tag }

// TryCommit implements block.Write: a device may always have to wait.
func (w *write) TryCommit() (bool, error) { return false, nil }

// Commit implements block.Write. A device may have done a part of a write that fails.
func (w *write) Commit(ctx context.Context) error {
	defer w.Abort()
	off := w.off
	for _, b := range w.bufs {
		if err := w.v.put(ctx, b, off); err != nil {
			return kind("write", err)
		}
		off += int64(len(b))
	}
	return w.v.note(w.tag)
}

// put writes p, which is memory of the package, at off.
func (v *Volume) put(ctx context.Context, p []byte, off int64) error {
	if v.whole(off, int64(len(p))) {
		v.parts.RLock()
		defer v.parts.RUnlock()
		return v.b.Write(ctx, p, off)
	}
	b, err := v.buffer()
	if err != nil {
		return err
	}
	defer v.give(b)
	v.parts.Lock()
	defer v.parts.Unlock()
	for len(p) > 0 {
		from, blocks, n := v.around(off, int64(len(p)))
		if err := v.b.Read(ctx, b[:blocks], from); err != nil {
			return err
		}
		copy(b[off-from:], p[:n])
		if err := v.b.Write(ctx, b[:blocks], from); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// Abort implements block.Write.
func (w *write) Abort() {
	for _, b := range w.bufs {
		w.v.give(b)
	}
	w.v.room.Release(w.room)
	w.bufs = nil
}

// Trim implements block.Volume: the range reads as zero, which a discard of a device does
// not promise.
func (v *Volume) Trim(ctx context.Context, off, n int64, tag block.Tag) error {
	return v.WriteZeroes(ctx, off, n, true, tag)
}

// WriteZeroes implements block.Volume.
func (v *Volume) WriteZeroes(ctx context.Context, off, n int64, _ bool, tag block.Tag) error {
	if err := v.check("write zeroes", off, n); err != nil {
		return err
	}
	b, err := v.buffer()
	if err != nil {
		return err
	}
	defer v.give(b)
	clear(b)
	// Whole blocks in the middle go quickly, if there are many of them.
	bs := int64(v.dev.Info().BlockSize)
	for n > 0 {
		m := min(n, piece)
		if off%bs != 0 {
			m = min(m, bs-off%bs)
		}
		if rest := n / bs * bs; off%bs == 0 && rest > 0 && v.dev.Info().Zeroes {
			m = rest
			v.parts.RLock()
			err = v.b.WriteZeroes(ctx, off, m)
			v.parts.RUnlock()
		} else {
			err = v.put(ctx, b[:m], off)
		}
		if err != nil {
			return kind("write zeroes", err)
		}
		off, n = off+m, n-m
	}
	return v.note(tag)
}

// Flush implements block.Volume.
func (v *Volume) Flush(ctx context.Context) error { return kind("flush", v.b.Flush(ctx)) }

// Status implements block.Volume.
func (v *Volume) Status(ctx context.Context, off, n int64, most int, ext []block.Extent) ([]block.Extent, error) {
	if err := v.check("block status", off, n); err != nil {
		return ext, err
	}
	if most < 1 || n == 0 {
		return ext, nil
	}
	if !v.dev.Info().Status {
		return append(ext, block.Extent{Offset: off, Length: n}), nil
	}
	bs := int64(v.dev.Info().BlockSize)
	from, end := off/bs*bs, off+n
	found, err := v.b.Status(ctx, from, (end-from+bs-1)/bs*bs, nil)
	if err != nil {
		return ext, kind("block status", err)
	}
	for _, x := range found[:min(len(found), most)] {
		to := min(from+x.Length, end)
		ext = append(ext, block.Extent{Offset: off, Length: to - off, Hole: x.State == hpdi.Hole})
		from, off = from+x.Length, to
	}
	return ext, nil
}
