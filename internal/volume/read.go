package volume

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"sync"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockio"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// chunk is how many blocks are looked up together.
const chunk = 64

// staleTries bounds how often a look-up that lost races starts again. Each
// loss takes a whole fold or consistency point.
const staleTries = 16

// TryRead implements block.Volume.
func (v *Volume) TryRead(p []byte, off int64) (bool, error) {
	if err := v.enter("read", off, int64(len(p))); err != nil {
		return false, err
	}
	defer v.Gate.Exit()
	ok, err := v.read(p, off, false)
	if err == nil {
		v.saw(off, int64(len(p)), !ok)
	}
	return ok, err
}

// Read implements block.Volume.
func (v *Volume) Read(ctx context.Context, p []byte, off int64) error {
	if err := v.enter("read", off, int64(len(p))); err != nil {
		return err
	}
	defer v.Gate.Exit()
	for len(p) > 0 {
		// Piece by piece, so that a large read ends soon after its client.
		n := min(len(p), 1<<20)
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := v.ahead.await(ctx, off, int64(n)); err != nil {
			return err
		}
		if _, err := v.read(p[:n], off, true); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (v *Volume) read(p []byte, off int64, wait bool) (bool, error) {
	w := windows.Get().(*window)
	defer w.free()
	w.v = v
	for len(p) > 0 {
		first := off / block.Size
		n := int(min(int64(len(p)), (first+chunk)*block.Size-off))
		w.p, w.off, w.first, w.n = p[:n], off, block.Logical(first), int((off+int64(n)-1)/block.Size-first)+1
		for try := 0; ; try++ {
			ok, err := w.read(wait)
			if err == nil {
				if !ok {
					return false, nil
				}
				break
			}
			if !errors.Is(err, errStale) || try == staleTries {
				return false, fmt.Errorf("read volume %s: %w", *v.name.Load(), err)
			}
		}
		p, off = p[n:], off+int64(n)
	}
	return true, nil
}

// window is a read of up to chunk blocks. Windows are used again: a read that
// memory can answer allocates nothing.
type window struct {
	v     *Volume
	p     []byte
	off   int64 // of p, in bytes
	first block.Logical
	n     int

	missing uint64 // blocks that the log does not hold, as a bit mask
	err     error  // of dirty
	dirty   func(i int, payload []byte, sum uint32)
	ptrs    [chunk]block.Pointer
	fetches []blockio.Fetch
}

var windows = sync.Pool{New: func() any {
	w := &window{fetches: make([]blockio.Fetch, 0, chunk)}
	w.dirty = w.copyDirty // once, because it allocates
	return w
}}

// free gives the window back; it keeps nobody's memory alive.
func (w *window) free() {
	clear(w.fetches)
	w.v, w.p, w.err, w.fetches = nil, nil, nil, w.fetches[:0]
	windows.Put(w)
}

// part returns where the bytes of block i go, and from which offset in the
// block they come.
func (w *window) part(i int) (dst []byte, from int) {
	at := (int64(w.first)+int64(i))*block.Size - w.off
	if at < 0 {
		from, at = int(-at), 0
	}
	return w.p[at:min(int64(len(w.p)), at+int64(block.Size-from))], from
}

// errStale says that a pointer did not fit the block any more, and has changed
// since.
var errStale = errors.New("mapping changed during the read")

func (w *window) read(wait bool) (bool, error) {
	v := w.v
	w.missing, w.err = ^uint64(0)>>(64-w.n), nil
	v.Dirty.Read(v.id, w.first, w.n, w.dirty)
	if w.err != nil || w.missing == 0 {
		return w.err == nil, w.err
	}
	lo, hi := bits.TrailingZeros64(w.missing), 64-bits.LeadingZeros64(w.missing)
	ptrs := w.ptrs[lo:hi]
	if wait {
		if err := v.Map.Lookup(v.id, w.first+block.Logical(lo), ptrs); err != nil {
			return false, err
		}
	} else if !v.Map.LookupCached(v.id, w.first+block.Logical(lo), ptrs) {
		return false, nil
	}
	w.fetches = w.fetches[:0]
	for i := lo; i < hi; i++ {
		if w.missing&(1<<i) == 0 {
			continue
		}
		dst, from := w.part(i)
		switch ptr := w.ptrs[i]; {
		case ptr.IsHole():
			clear(dst)
		case v.Reader.Cached(ptr, from, dst):
		case !wait:
			return false, nil
		default:
			w.fetches = append(w.fetches, blockio.Fetch{Ptr: ptr, Off: from, Dst: dst})
		}
	}
	if len(w.fetches) == 0 {
		return true, nil
	}
	if err := v.Reader.ReadAll(w.fetches); err != nil {
		return false, w.explain(lo, ptrs, err)
	}
	return true, nil
}

// explain turns a checksum mismatch into errStale when the map has other
// pointers by now, for then the block may have been reused.
func (w *window) explain(lo int, ptrs []block.Pointer, err error) error {
	if !errors.Is(err, block.ErrCorrupt) {
		return err
	}
	var now [chunk]block.Pointer
	if e := w.v.Map.Lookup(w.v.id, w.first+block.Logical(lo), now[:len(ptrs)]); e != nil {
		return e
	}
	for i := range ptrs {
		if ptrs[i] != now[i] {
			return errStale
		}
	}
	return fmt.Errorf("bytes [%d, %d): %w", w.off, w.off+int64(len(w.p)), err)
}

// copyDirty takes block i from the operation log; nil is a hole.
func (w *window) copyDirty(i int, payload []byte, sum uint32) {
	w.missing &^= 1 << i
	dst, from := w.part(i)
	if payload == nil {
		clear(dst)
		return
	}
	if got := ondisk.CRC(payload); got != sum {
		w.err = &block.CorruptError{What: "block in the operation log", Where: fmt.Sprintf("block %d of volume %s", w.first+block.Logical(i), *w.v.name.Load()),
			Why: fmt.Sprintf("checksum %08x instead of %08x", got, sum)}
		return
	}
	copy(dst, payload[from:])
}

// Status implements block.Volume.
func (v *Volume) Status(ctx context.Context, off, n int64, most int, ext []block.Extent) ([]block.Extent, error) {
	if err := v.enter("block status", off, n); err != nil {
		return ext, err
	}
	defer v.Gate.Exit()
	start := len(ext)
	end := off + n
	for off < end {
		if err := ctx.Err(); err != nil {
			return ext, err
		}
		first := off / block.Size
		stop := min(end, (first+chunk)*block.Size)
		holes, err := v.holes(block.Logical(first), int((stop-1)/block.Size-first)+1)
		if err != nil {
			return ext, err
		}
		for i := 0; off < stop; i++ {
			to := min(stop, (first+int64(i)+1)*block.Size)
			hole := holes&(1<<i) != 0
			if last := len(ext) - 1; last >= start && ext[last].Hole == hole {
				ext[last].Length += to - off
			} else if len(ext)-start == most {
				return ext, nil
			} else {
				ext = append(ext, block.Extent{Offset: off, Length: to - off, Hole: hole})
			}
			off = to
		}
	}
	return ext, nil
}

// holes returns which of n blocks are holes as a bit mask.
func (v *Volume) holes(first block.Logical, n int) (uint64, error) {
	var holes uint64
	missing := ^uint64(0) >> (64 - n)
	v.Dirty.Read(v.id, first, n, func(i int, payload []byte, _ uint32) {
		missing &^= 1 << i
		if payload == nil {
			holes |= 1 << i
		}
	})
	if missing == 0 {
		return holes, nil
	}
	var ptrs [chunk]block.Pointer
	if err := v.Map.Lookup(v.id, first, ptrs[:n]); err != nil {
		return 0, fmt.Errorf("block status of volume %s: %w", *v.name.Load(), err)
	}
	for i := range n {
		if missing&(1<<i) != 0 && ptrs[i].IsHole() {
			holes |= 1 << i
		}
	}
	return holes, nil
}
