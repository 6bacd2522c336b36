package volume

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/dirty"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/planted"
)

// staged is a write whose payload is being received into extents of the log.
type staged struct {
	v     *Volume
	off   int64
	n     int
	first block.Logical
	ext   []oplog.Extent
	bufs  [][]byte
	recs  []oplog.Record // the first is kept for the tag
	edges []dirty.Edge
	// zeroes is the number of records without payload, and so of permits
	// without extents.
	zeroes int
	tag    block.Tag
}

var stagedPool = sync.Pool{New: func() any { return new(staged) }}

// TryStage implements block.Volume.
func (v *Volume) TryStage(off int64, n int) (block.Write, error) {
	w, blocks, err := v.prepare(off, n)
	if err != nil {
		return nil, err
	}
	var ok bool
	if w.ext, ok, err = v.Dirty.TryAcquire(blocks, w.ext[:0]); err != nil || !ok {
		w.release()
		return nil, err
	}
	w.cut()
	return w, nil
}

// Stage implements block.Volume.
func (v *Volume) Stage(ctx context.Context, off int64, n int) (block.Write, error) {
	w, blocks, err := v.prepare(off, n)
	if err != nil {
		return nil, err
	}
	if w.ext, err = v.Dirty.Acquire(ctx, blocks, w.ext[:0]); err != nil {
		w.release()
		return nil, err
	}
	w.cut()
	return w, nil
}

func (v *Volume) prepare(off int64, n int) (*staged, int, error) {
	if n <= 0 || n > block.MaxIO {
		return nil, 0, fmt.Errorf("write of %d bytes, at most %d are possible: %w", n, block.MaxIO, block.ErrInvalid)
	}
	if err := v.enter("write", off, int64(n)); err != nil {
		return nil, 0, err
	}
	w := stagedPool.Get().(*staged)
	w.v, w.off, w.n, w.first = v, off, n, block.Logical(off/block.Size)
	return w, int((off+int64(n)-1)/block.Size-int64(w.first)) + 1, nil
}

// release ends the write; its extents are somebody else's by now.
func (w *staged) release() {
	w.v.Gate.Exit()
	w.v = nil
	clear(w.bufs)
	w.zeroes, w.tag = 0, block.Tag{}
	w.ext, w.bufs, w.recs, w.edges = w.ext[:0], w.bufs[:0], w.recs[:0], w.edges[:0]
	stagedPool.Put(w)
}

// cut divides the extents into records of consecutive ones, and finds the
// buffers and the partial blocks.
func (w *staged) cut() {
	w.recs = append(w.recs, oplog.Record{})
	for i := 0; i < len(w.ext); {
		n := 1
		for i+n < len(w.ext) && n < oplog.MaxRecordBlocks && w.ext[i+n] == w.ext[i]+oplog.Extent(n) {
			n++
		}
		w.recs = append(w.recs, oplog.Record{
			Kind: oplog.KindWrite, Volume: w.v.id, LBA: w.first + block.Logical(i), Count: uint64(n), First: w.ext[i],
		})
		w.bufs = append(w.bufs, w.v.Dirty.Payload(w.ext[i], n))
		i += n
	}
	head := int(w.off % block.Size)
	tail := int((w.off+int64(w.n)-1)%block.Size) + 1
	last := len(w.ext) - 1
	if last == 0 {
		if head > 0 || tail < block.Size {
			w.edges = append(w.edges, dirty.Edge{LBA: w.first, Extent: w.ext[0], From: head, To: tail})
		}
		w.bufs[0] = w.bufs[0][head:tail]
		return
	}
	if head > 0 {
		w.edges = append(w.edges, dirty.Edge{LBA: w.first, Extent: w.ext[0], From: head, To: block.Size})
		w.bufs[0] = w.bufs[0][head:]
	}
	if tail < block.Size {
		w.edges = append(w.edges, dirty.Edge{LBA: w.first + block.Logical(last), Extent: w.ext[last], From: 0, To: tail})
		b := &w.bufs[len(w.bufs)-1]
		*b = (*b)[:len(*b)-(block.Size-tail)]
	}
}

// SetTag implements block.Write.
func (w *staged) SetTag(tag block.Tag) { w.tag = tag }

// Buffers implements block.Write.
func (w *staged) Buffers() [][]byte { return w.bufs }

// Abort implements block.Write.
func (w *staged) Abort() {
	w.v.Dirty.Give(w.ext)
	w.v.Dirty.GivePermits(w.zeroes)
	w.release()
}

// TryCommit implements block.Write.
func (w *staged) TryCommit() (bool, error) {
	w.sum()
	tries := 0
	err := w.publish(func(e *dirty.Edge) error {
		ok, err := w.fill(e, false)
		if tries++; err == nil && (!ok || tries > staleTries) {
			err = dirty.ErrEdge
		}
		return err
	})
	switch {
	case err == nil:
		w.release()
		return true, nil
	case errors.Is(err, dirty.ErrEdge), errors.Is(err, block.ErrNoSpace):
		return false, nil // Commit can wait for a device, or for space
	}
	w.Abort()
	return false, err
}

// Commit implements block.Write.
func (w *staged) Commit(ctx context.Context) error {
	w.sum()
	// However often a consistency point comes between, only the client decides
	// how long to try. And once it has gone nothing may be published any more:
	// it may have asked again elsewhere, had its answer, and written anew.
	fill := func(e *dirty.Edge) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := w.fill(e, true); err != nil {
			return err
		}
		return ctx.Err()
	}
	err := ctx.Err()
	if err == nil {
		err = w.publish(fill)
	}
	for try := 0; try < 2 && errors.Is(err, block.ErrNoSpace) && !planted.Has(planted.RelieveMissing); try++ {
		w.v.Dirty.ReturnCredit()
		if e := w.v.Relieve(ctx); e != nil {
			err = e
			break
		}
		if err = ctx.Err(); err == nil {
			err = w.publish(fill)
		}
	}
	if err != nil {
		name := *w.v.name.Load()
		w.Abort()
		return fmt.Errorf("write to volume %s: %w", name, err)
	}
	w.release()
	return nil
}

// sum computes the checksums of the blocks that the payload fills, and the fingerprints
// if the volume shares; those of the edges are computed when they are complete.
func (w *staged) sum() {
	print := w.v.print.Load()
	for i := range w.recs {
		r := &w.recs[i]
		if r.Kind != oplog.KindWrite {
			continue
		}
		for j := range r.Count {
			e := r.First + oplog.Extent(j)
			payload := w.v.Dirty.Payload(e, 1)
			r.CRC[j] = ondisk.CRC(payload)
			if print != nil && r.CRC[j] != ondisk.ZeroSum { // which becomes a hole, or nearly always does
				w.v.Dirty.SetPrint(e, (*print)(payload))
			}
		}
	}
	for i := range w.edges {
		w.v.Dirty.SetPrint(w.edges[i].Extent, 0)
	}
}

// publish publishes the write, after fill has filled those edges whose rest
// is on the devices. Each failure to do so means that a consistency point came
// between.
func (w *staged) publish(fill func(*dirty.Edge) error) error {
	recs := w.recs[1:]
	if w.tag != (block.Tag{}) {
		w.recs[0] = oplog.TagRecord(w.v.id, w.tag, len(recs))
		recs = w.recs
	}
	for {
		err := w.v.Dirty.Publish(recs, w.edges)
		if !errors.Is(err, dirty.ErrEdge) {
			return err
		}
		for i := range w.edges {
			if err := fill(&w.edges[i]); err != nil {
				return err
			}
		}
	}
}

// fill reads the rest of a partial block from cache or device; ok is false
// when that would have to wait and must not.
func (w *staged) fill(e *dirty.Edge, wait bool) (ok bool, err error) {
	// What an earlier attempt has filled in is of an older state.
	e.Filled, e.AsOf = false, w.v.Dirty.Drops()
	page := w.v.Dirty.Payload(e.Extent, 1)
	var ptr [1]block.Pointer
	if wait {
		if err := w.v.Map.Lookup(w.v.id, e.LBA, ptr[:]); err != nil {
			return false, err
		}
	} else if !w.v.Map.LookupCached(w.v.id, e.LBA, ptr[:]) {
		return false, nil
	}
	rest := func(frame []byte) {
		copy(page[:e.From], frame[:e.From])
		copy(page[e.To:], frame[e.To:])
		if planted.Has(planted.PartialBlockZeroRest) && e.From > 0 {
			clear(page[e.To:])
		}
	}
	switch {
	case ptr[0].IsHole():
		clear(page[:e.From])
		clear(page[e.To:])
	case w.v.Reader.ViewCached(ptr[0], rest):
	case !wait:
		return false, nil
	default:
		// A stale pointer shows as corruption; publish will ask again.
		if err := w.v.Reader.View(ptr[0], rest); err != nil && !w.stale(e, ptr[0], err) {
			return false, err
		}
	}
	e.Filled = true
	return true, nil
}

func (w *staged) stale(e *dirty.Edge, was block.Pointer, err error) bool {
	var now [1]block.Pointer
	return errors.Is(err, block.ErrCorrupt) && w.v.Map.Lookup(w.v.id, e.LBA, now[:]) == nil && now[0] != was
}

// Trim implements block.Volume.
func (v *Volume) Trim(ctx context.Context, off, n int64, tag block.Tag) error {
	return v.zero(ctx, "trim", off, n, tag)
}

// WriteZeroes implements block.Volume. All volumes are thin, so that it always
// punches.
func (v *Volume) WriteZeroes(ctx context.Context, off, n int64, _ bool, tag block.Tag) error {
	return v.zero(ctx, "write zeroes", off, n, tag)
}

// zero makes a range read as zero, at once: whole blocks by one record,
// whatever their number, partial ones at the ends by a block each.
func (v *Volume) zero(ctx context.Context, what string, off, n int64, tag block.Tag) error {
	if n == 0 {
		return nil
	}
	if err := v.enter(what, off, n); err != nil {
		return err
	}
	w := stagedPool.Get().(*staged)
	w.v = v
	w.SetTag(tag)
	w.recs = append(w.recs, oplog.Record{})
	end := off + n
	first, last := (off+block.Size-1)/block.Size, end/block.Size // whole blocks
	if planted.Has(planted.TrimTakesEdges) {
		last = (end + block.Size - 1) / block.Size
	}
	switch {
	case first > last: // less than one block, from within it
		w.zeroEdge(off, end)
	default:
		w.zeroEdge(off, first*block.Size)
		w.zeroEdge(last*block.Size, end)
	}
	permits := len(w.edges)
	if last > first {
		permits++
		w.zeroes = 1
		w.recs = append(w.recs, oplog.Record{Kind: oplog.KindZero, Volume: v.id, LBA: block.Logical(first), Count: uint64(last - first)})
	}
	if err := v.Dirty.Permit(ctx, permits); err != nil {
		w.release()
		return fmt.Errorf("%s on volume %s: %w", what, *v.name.Load(), err)
	}
	var err error
	if w.ext, err = v.Dirty.Take(len(w.edges), w.ext[:0]); err != nil {
		v.Dirty.GivePermits(w.zeroes)
		w.release()
		return err
	}
	for i := range w.edges {
		e := &w.edges[i]
		e.Extent = w.ext[i]
		clear(v.Dirty.Payload(e.Extent, 1))
		w.recs = append(w.recs, oplog.Record{Kind: oplog.KindWrite, Volume: v.id, LBA: e.LBA, Count: 1, First: e.Extent})
	}
	return w.Commit(ctx)
}

// zeroEdge adds the partial block that [from, to) is in, if it is not empty.
func (w *staged) zeroEdge(from, to int64) {
	if from < to {
		lba := from / block.Size
		w.edges = append(w.edges, dirty.Edge{LBA: block.Logical(lba), From: int(from - lba*block.Size), To: int(to - lba*block.Size)})
	}
}
