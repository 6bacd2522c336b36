package sim

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
)

// answered judges a reply that reached its client.
func (w *World) answered(r *request, data []byte, err error) {
	pl := w.pools[r.s.identity]
	v := pl.volumes[r.s.volume]
	if err != nil {
		r.s.errs = append(r.s.errs, err)
		if r.tries == 1 && !r.fua && r.disown() { // of a FUA the flush may have failed
			w.violate("%s failed (%v) and took effect", r, err)
		}
		if r.logged != 0 && !r.fua && !errors.Is(err, block.ErrNotFound) {
			w.violate("%s failed (%v) although it was published at %d", r, err, r.logged)
		}
		if !pl.mayFail(r, err) {
			w.violate("%s failed: %v%s", r, err, pl.figures())
		}
		return
	}
	switch r.op {
	case opRead:
		pl.judgeRead(v, r, data)
		return
	case opFlush:
		pl.shadow.flushed = max(pl.shadow.flushed, r.arrival)
		return
	}
	newest, missing, ok := r.all()
	if !ok {
		w.violate("%s was acknowledged, but its block %d was not published", r, missing)
	}
	if r.fua {
		pl.shadow.flushed = max(pl.shadow.flushed, newest)
	}
}

// figures says how full the pool is, for messages.
func (pl *pool) figures() string {
	_, t := pl.w.serving(pl.identity)
	if t == nil {
		return ""
	}
	s := t.pool.Stats()
	need, room := pl.need(pl.shadow.seq)
	return fmt.Sprintf(" (needed at most %d of %d blocks; it has %d, free %d, reserved %d, unfolded %d, log %d)", need, room, s.Bytes/block.Size, s.FreeBytes/block.Size,
		s.ReservedBytes/block.Size, s.Unfolded, s.LogUsedBytes/block.Size)
}

// mayFail tells whether an error is what a person would expect now.
func (pl *pool) mayFail(r *request, err error) bool {
	switch {
	case errors.Is(err, block.ErrNoSpace):
		return pl.crowded(r.since)
	case errors.Is(err, errMedium):
		return pl.hindered
	case errors.Is(err, block.ErrCorrupt):
		return pl.damaged
	case errors.Is(err, block.ErrNotFound):
		return pl.unsure[r.s.volume] || r.asked != r.s.volume // it may have another name by now, or has
	case errors.Is(err, block.ErrInvalid):
		return r.off+r.n > pl.volumes[r.s.volume].size
	}
	return false
}

// crowded tells whether the pool may truly have been full at some time since a
// position of its log: with what it had to hold, a log full of new versions,
// and the metadata of both.
func (pl *pool) crowded(since block.Seq) bool {
	need, room := pl.need(since)
	return need > room
}

func (pl *pool) need(since block.Seq) (need, room int64) {
	live, leaves := int64(0), map[string]bool{}
	for id, v := range pl.ids {
		if v.gone && v.freed < since {
			continue
		}
		for b := range v.blocks {
			if v.was(b, since, func(page []byte) bool { return !bytes.Equal(page, zeroPage[:]) }) {
				live++
			}
			leaves[fmt.Sprint(id, b/256)] = true
		}
	}
	const logBlocks = logBytes / block.Size
	track := func(n int64) int64 { return (n + block.TrackBlocks - 1) &^ (block.TrackBlocks - 1) }
	for i := range len(pl.disks) / pl.copies {
		d := pl.disks[i*pl.copies]
		if d.use != useDisk || d.leaving {
			continue // nobody is promised anything of it
		}
		first := int64(block.TrackBlocks)
		if i == 0 { // labels and superblocks, journal, flush log (docs/format/label.md)
			first = track(first + pl.journal/block.Size + track(2*logBlocks+block.TrackBlocks))
		}
		if pl.copies > 1 {
			first += block.TrackBlocks // of the mirror
		}
		room += d.medium.Info().Size/block.Size - first
	}
	room -= room / 8 // kept back for trims, deletes and metadata
	// A leaf has a path above it, and is written anew beside the old one.
	return live + logBlocks + 8*int64(len(leaves)) + 320, room
}

// judgeRead compares what a read brought with what was current at some moment
// while it was under way, block by block.
func (pl *pool) judgeRead(v *volume, r *request, data []byte) {
	for off := r.off; off < r.off+r.n; {
		b := block.Logical(off / block.Size)
		n := min(r.off+r.n-off, int64(b+1)*block.Size-off)
		in := int(off - int64(b)*block.Size)
		got := data[:n]
		if !v.was(b, r.since, func(page []byte) bool { return bytes.Equal(page[in:in+int(n)], got) }) {
			pl.w.violate("%s brought for bytes %d+%d %s; while it was under way block %d held %s",
				r, off, n, describe(got), b, v.told(b, r.since))
			return
		}
		data, off = data[n:], off+n
	}
}

// was tells whether a version that was current since a position satisfies ok.
func (v *volume) was(b block.Logical, since block.Seq, ok func(page []byte) bool) bool {
	h := v.blocks[b]
	for i := len(h) - 1; i >= 0; i-- {
		if ok(h[i].bytes()) {
			return true
		}
		if h[i].seq <= since {
			return false
		}
	}
	return ok(zeroPage[:])
}

func (v *volume) told(b block.Logical, since block.Seq) string {
	s := ""
	v.was(b, since, func(page []byte) bool {
		s += describe(page) + "; "
		return false
	})
	return s
}
