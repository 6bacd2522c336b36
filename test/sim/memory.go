package sim

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/region"
)

// privatise replaces a dead guest's mapping of a region by a private copy in
// the same place: whatever its goroutines still store, nobody else sees.
func privatise(r *region.Region) error {
	f, err := os.Open(r.Path())
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	replace := func(at unsafe.Pointer, offset, n int64) error {
		_, err := unix.MmapPtr(int(f.Fd()), offset, at, uintptr(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_FIXED)
		return err
	}
	h := r.Header()
	for _, s := range h.Sections[1:] {
		mem, err := r.MapSection(s)
		if err != nil {
			continue // it was usurped, and has not mapped that
		}
		// Pages that it does not touch would go on showing what others store: tables of
		// a cache that belong to two.
		was := bytes.Clone(mem)
		if err := replace(unsafe.Pointer(unsafe.SliceData(mem)), s.Offset, s.Length); err != nil {
			return err
		}
		copy(mem, was)
	}
	return replace(unsafe.Add(unsafe.Pointer(unsafe.SliceData(r.Log())), -int(h.Sections[0].Offset)), 0, h.Fixed())
}

// loseRegion ends a region as a power cut does.
func (w *World) loseRegion(pl *pool) error {
	if err := os.Remove(pl.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// scribble leaves in a dead guest's log what publishing one more record would
// have stored up to some instruction. It is a record that changes nothing, so
// that it does not matter whether it counts; or a write, or a change with a tag, of
// which too little was stored to count.
func (w *World) scribble(id string) {
	pl := w.pools[id]
	if pl.region == nil || !w.chance(2) || pl.full() {
		return // a full log has no room for a record that is not counted
	}
	mem := alignedPart(make([]byte, len(pl.region.Log())+block.Size), len(pl.region.Log()))
	copy(mem, pl.region.Log())
	l, err := oplog.Attach(mem)
	if err != nil {
		return
	}
	const copyStores = 8 // of a copy of a record; there are two of each
	recs, most := []oplog.Record{{Kind: oplog.KindNop}}, 1<<10
	switch w.rng.IntN(4) {
	case 0, 1:
		recs[0] = oplog.Record{Kind: oplog.KindWrite, Volume: 1, Count: 1}
		most = copyStores // the first copy of the record lacks its last word
	case 2:
		recs = []oplog.Record{oplog.TagRecord(1, block.Tag{Session: 1, Counter: 1}, 2), recs[0], recs[0]}
		most = 2*2*copyStores + copyStores // that of the last one does
	}
	stores := l.Stores(recs)
	if len(stores) == 0 {
		return
	}
	n := w.rng.IntN(min(most, len(stores)+1))
	w.log("the log of %s is left after %d of %d stores of a %s", id, n, len(stores), recs[0].Kind)
	w.store(pl, func(log []byte) {
		for _, s := range stores[:n] {
			copy(log[s.Off:], s.Word[:])
		}
	})
}

// blotch leaves parts of a dead guest's region beside the log that it did not write so: a
// frame of its cache of which half is copied, or whatever else memory may come to hold.
func (w *World) blotch(id string) {
	pl := w.pools[id]
	if pl.region == nil || slices.ContainsFunc(pl.acting, func(p *proc) bool { return !p.dead.Load() }) || !w.chance(2) {
		return
	}
	r, err := region.Open(pl.path, false)
	if err != nil {
		return // it is being removed
	}
	defer func() { _ = r.Close() }()
	for _, s := range r.Header().Sections[1:] {
		mem, err := r.MapSection(s)
		if err != nil {
			return // somebody else's
		}
		if s.Kind == region.SectionSessions {
			continue // requests would end with errors
		}
		if s.Kind == region.SectionCache {
			w.blotchFrames(mem)
		} else if w.chance(2) {
			// State and what follows it, or all of it.
			for range 1 + w.rng.IntN(8) {
				mem[w.rng.IntN(len(mem)>>w.rng.IntN(8))] ^= 1 << w.rng.IntN(8)
			}
		}
		w.log("the %s of %s is damaged", s.Kind, id)
	}
}

// blotchFrames damages a cache, or leaves nothing of it: what a warm cache hides shall come
// to light, too.
func (w *World) blotchFrames(mem []byte) {
	if w.chance(2) {
		clear(mem)
		return
	}
	frames := len(mem) / block.Size * 9 / 10
	for range 1 + w.rng.IntN(frames) {
		at := (2 + w.rng.IntN(frames)) * block.Size
		switch w.rng.IntN(4) {
		case 0:
			copy(mem[at:at+block.Size/2], mem[(2+w.rng.IntN(frames))*block.Size:])
		case 1:
			mem[w.rng.IntN(len(mem))] ^= 1 << w.rng.IntN(8)
		default:
			mem[at+w.rng.IntN(block.Size)] ^= 1 << w.rng.IntN(8)
		}
	}
}

// store changes the log section of a region behind everybody's back.
func (w *World) store(pl *pool, change func(log []byte)) {
	r, err := region.Open(pl.path, false)
	if err != nil {
		return // it is being removed
	}
	change(r.Log())
	_ = r.Close()
}

// rotMemory flips a bit in a region whose owner is dead: in a copy of the
// region's or the log's header or of the newest record, of each of which there
// are two, or in the payload of that record.
func (w *World) rotMemory(pl *pool, where string) {
	if pl.region == nil || slices.ContainsFunc(pl.acting, func(p *proc) bool { return !p.dead.Load() }) {
		return // only who opens it looks at both copies
	}
	if pl.rotted == pl.epoch {
		return // one copy of two, until the next owner has mended it
	}
	pl.rotted = pl.epoch
	mem := alignedPart(make([]byte, len(pl.region.Log())+block.Size), len(pl.region.Log()))
	copy(mem, pl.region.Log())
	l, err := oplog.Attach(mem)
	if err != nil || l.Head() == l.Tail() && (where == "record" || where == "payload") {
		return
	}
	at := w.rng.IntN(128)
	switch where {
	case "region":
		at += w.rng.IntN(2)*block.Size - int(pl.region.Header().Sections[0].Offset)
	case "header": // its fields, or a position in it
		at += w.rng.IntN(3) * 1024
		if w.chance(2) {
			at += len(mem) - block.Size
		}
	case "record":
		if rec, err := l.Get(l.Head()); err != nil || rec.Kind == oplog.KindNop {
			return // half-published: there may be one copy only
		}
		// A record is as large as its place is away from the next one.
		const size = 64
		next := l.Stores([]oplog.Record{{Kind: oplog.KindNop}})
		at = next[0].Off&^(size-1) - size + w.rng.IntN(size)
		if at < block.Size {
			return // the newest one is at the end of its ring
		}
	case "payload":
		rec, err := l.Get(l.Head())
		if err != nil || rec.Kind != oplog.KindWrite {
			return
		}
		page := l.Payload(rec.First, 1)
		at += int(uintptr(unsafe.Pointer(&page[0])) - uintptr(unsafe.Pointer(&mem[0])))
		pl.damaged = true
	}
	w.log("a bit of the %s of %s flips", where, pl.identity)
	bit := byte(1) << w.rng.IntN(8)
	w.store(pl, func(log []byte) { *(*byte)(unsafe.Add(unsafe.Pointer(&log[0]), at)) ^= bit })
}

// full tells whether the log has no room for one more record.
func (pl *pool) full() bool {
	used := uint64(0)
	for seq := pl.log.Tail() + 1; seq <= pl.log.Head(); seq++ {
		rec, err := pl.log.Get(seq)
		if err != nil {
			return true
		}
		if rec.Kind == oplog.KindTag {
			continue // it needs no room that a change has
		}
		used++
		if rec.Kind == oplog.KindWrite {
			used += rec.Count - 1
		}
	}
	return used >= logBytes/block.Size
}

// alignedPart returns n bytes of mem that begin at a multiple of the block size.
func alignedPart(mem []byte, n int) []byte {
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(mem))) % block.Size
	return mem[skip : int(skip)+n : int(skip)+n]
}

// rot flips bits in so many places of the disk, behind the labels, or what a mirror
// keeps for itself.
func (d *disk) rot(w *World, places int) {
	size := d.medium.Info().Size
	for range places {
		d.medium.Corrupt(1<<20+w.rng.Int64N(size-1<<20), 1<<w.rng.IntN(8))
	}
}
