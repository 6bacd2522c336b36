package volume

import (
	"context"
	"errors"
	"fmt"
	"math/bits"

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
	return v.read(p, off, false)
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
		if _, err := v.read(p[:n], off, true); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (v *Volume) read(p []byte, off int64, wait bool) (bool, error) {
	for len(p) > 0 {
		first := off / block.Size
		n := int(min(int64(len(p)), (first+chunk)*block.Size-off))
		w := window{p: p[:n], off: off, first: block.Logical(first), n: int((off+int64(n)-1)/block.Size-first) + 1}
		for try := 0; ; try++ {
			ok, err := v.readWindow(&w, wait)
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

// window is a read of up to chunk blocks.
type window struct {
	p     []byte
	off   int64 // of p, in bytes
	first block.Logical
	n     int
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

func (v *Volume) readWindow(w *window, wait bool) (bool, error) {
	missing, err := v.readDirty(w)
	if err != nil || missing == 0 {
		return err == nil, err
	}
	var ptrs [chunk]block.Pointer
	lo, hi := bits.TrailingZeros64(missing), 64-bits.LeadingZeros64(missing)
	if wait {
		err = v.Map.Lookup(v.id, w.first+block.Logical(lo), ptrs[lo:hi])
	} else if !v.Map.LookupCached(v.id, w.first+block.Logical(lo), ptrs[lo:hi]) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var fetches []blockio.Fetch
	for i := lo; i < hi; i++ {
		if missing&(1<<i) == 0 {
			continue
		}
		dst, from := w.part(i)
		switch {
		case ptrs[i].IsHole():
			clear(dst)
		case v.Reader.Cached(ptrs[i], from, dst):
		case !wait:
			return false, nil
		default:
			fetches = append(fetches, blockio.Fetch{Ptr: ptrs[i], Off: from, Dst: dst})
		}
	}
	if len(fetches) == 0 {
		return true, nil
	}
	if err := v.Reader.ReadAll(fetches); err != nil {
		return false, v.explain(w, lo, ptrs[lo:hi], err)
	}
	return true, nil
}

// explain turns a checksum mismatch into errStale when the map has other
// pointers by now, for then the block may have been reused.
func (v *Volume) explain(w *window, lo int, ptrs []block.Pointer, err error) error {
	if !errors.Is(err, block.ErrCorrupt) {
		return err
	}
	var now [chunk]block.Pointer
	if e := v.Map.Lookup(v.id, w.first+block.Logical(lo), now[:len(ptrs)]); e != nil {
		return e
	}
	for i := range ptrs {
		if ptrs[i] != now[i] {
			return errStale
		}
	}
	return fmt.Errorf("bytes [%d, %d): %w", w.off, w.off+int64(len(w.p)), err)
}

// readDirty copies what the operation log holds and returns the other blocks
// as a bit mask.
func (v *Volume) readDirty(w *window) (missing uint64, err error) {
	missing = ^uint64(0) >> (64 - w.n)
	v.Dirty.Read(v.id, w.first, w.n, func(i int, payload []byte, sum uint32) {
		missing &^= 1 << i
		dst, from := w.part(i)
		if payload == nil {
			clear(dst)
			return
		}
		if got := ondisk.CRC(payload); got != sum {
			err = &block.CorruptError{What: "block in the operation log", Where: fmt.Sprintf("block %d of volume %s", w.first+block.Logical(i), *v.name.Load()),
				Why: fmt.Sprintf("checksum %08x instead of %08x", got, sum)}
			return
		}
		copy(dst, payload[from:])
	})
	return missing, err
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
