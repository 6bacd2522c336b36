package dirty

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/oplog"
)

// partial stages bytes [from, to) of a block: they are of one value, what the
// client did not send is rubbish.
func (r *rig) partial(lba block.Logical, from, to int, value byte) ([]oplog.Extent, []oplog.Record, []Edge) {
	r.t.Helper()
	ext, recs := r.stage(1, lba, 1, 0)
	page := r.Payload(ext[0], 1)
	copy(page, bytes.Repeat([]byte{0xee}, block.Size))
	copy(page[from:to], bytes.Repeat([]byte{value}, to-from))
	recs[0].CRC[0] = 0
	return ext, recs, []Edge{{LBA: lba, Extent: ext[0], From: from, To: to}}
}

// pieces proves the content of a block in runs of value and length.
func (r *rig) pieces(lba block.Logical, pieces ...int) {
	r.t.Helper()
	var want []byte
	for i := 0; i < len(pieces); i += 2 {
		want = append(want, bytes.Repeat([]byte{byte(pieces[i])}, pieces[i+1])...)
	}
	n := r.Read(1, lba, 1, func(_ int, p []byte, sum uint32) {
		if !bytes.Equal(p, want) {
			at := 0
			for p[at] == want[at] {
				at++
			}
			r.t.Errorf("block %d: byte %d is %d instead of %d", lba, at, p[at], want[at])
		}
		if ondisk.CRC(p) != sum {
			r.t.Errorf("block %d: wrong checksum", lba)
		}
	})
	if n != 1 {
		r.t.Errorf("block %d was not found", lba)
	}
}

// The rest of a partial block comes from the newest version in the log,
// whichever generation that is in.
func TestEdgeFromLog(t *testing.T) {
	r := newRig(t, 32)
	put := func(lba block.Logical, from, to int, value byte) {
		t.Helper()
		_, recs, edges := r.partial(lba, from, to, value)
		r.must(r.Publish(recs, edges))
	}
	r.zero(1, 0, 100)
	put(5, 1000, 2000, 1)
	r.pieces(5, 0, 1000, 1, 1000, 0, 2096)
	put(5, 0, 10, 2)
	r.pieces(5, 2, 10, 0, 990, 1, 1000, 0, 2096)
	r.Freeze()
	put(5, 4000, 4096, 3)
	r.pieces(5, 2, 10, 0, 990, 1, 1000, 0, 2000, 3, 96)
	r.zero(1, 5, 1)
	put(5, 1, 2, 4)
	r.pieces(5, 0, 1, 4, 1, 0, 4094)
	// A frozen hole.
	put(7, 0, 1, 5)
	r.pieces(7, 5, 1, 0, 4095)
	r.drain()
	r.settled()
}

// A rest that only the devices have counts as long as no generation was
// dropped since it was read.
func TestEdgeFromDevice(t *testing.T) {
	r := newRig(t, 32)
	ext, recs, edges := r.partial(5, 10, 20, 1)
	head := r.Head()
	r.want(r.Publish(recs, edges), ErrEdge)
	edges[0].AsOf = r.Drops()
	r.want(r.Publish(recs, edges), ErrEdge)

	fill := func(value byte) {
		page := r.Payload(ext[0], 1)
		for i := range page {
			if i < 10 || i >= 20 {
				page[i] = value
			}
		}
		edges[0].Filled, edges[0].AsOf = true, r.Drops()
	}
	fill(7)
	r.write(1, 9, 1, 1) // another block
	r.drain()
	head++
	r.want(r.Publish(recs, edges), ErrEdge)
	if r.Head() != head {
		t.Error("a refused publication was published")
	}
	fill(8)
	r.write(1, 10, 1, 1)
	r.Freeze() // a freeze changes no device
	r.must(r.Publish(recs, edges))
	r.pieces(5, 8, 10, 1, 10, 8, 4076)
	r.drain()
	r.settled()
}

// A write of its own between reading the rest and publishing wins.
func TestEdgeReadThenWritten(t *testing.T) {
	r := newRig(t, 32)
	_, recs, edges := r.partial(5, 10, 20, 1)
	edges[0].Filled, edges[0].AsOf = true, r.Drops() // with rubbish
	_, other, edge := r.partial(5, 0, 4096, 9)
	r.must(r.Publish(other, edge[:0:0]))
	// Its checksum was left 0: what is damaged must not be taken over.
	err := r.Publish(recs, edges)
	r.want(err, block.ErrCorrupt)
	if err == nil || !strings.Contains(err.Error(), "block 5 of volume 1") {
		t.Errorf("%v does not say where", err)
	}
	_, whole := r.stage(1, 5, 1, 77)
	r.must(r.Publish(whole, nil))
	r.must(r.Publish(recs, edges))
	n := 0
	r.Read(1, 5, 1, func(_ int, p []byte, _ uint32) { n = int(p[0]) + 1000*int(p[15]) })
	if n != 1077 {
		t.Errorf("the rest is of another version: %d", n)
	}
	r.drain()
	r.settled()
}

// Edges of a write are completed in whichever of its records they are.
func TestEdgesOfSeveralRecords(t *testing.T) {
	r := newRig(t, 32)
	r.write(1, 0, 10, 50)
	ext, ok, err := r.TryAcquire(3, nil)
	if !ok || err != nil || ext[1] != ext[0]+1 || ext[2] != ext[0]+2 {
		t.Fatalf("%v %v %v", ext, ok, err)
	}
	for i, e := range ext {
		r.fill(e, uint64(i))
	}
	recs := []oplog.Record{
		{Kind: oplog.KindZero, Volume: 1, LBA: 7, Count: 2},
		{Kind: oplog.KindWrite, Volume: 1, LBA: 2, Count: 2, First: ext[0]},
		{Kind: oplog.KindWrite, Volume: 1, LBA: 4, Count: 1, First: ext[2]},
	}
	r.log.Sum(&recs[1])
	r.must(r.Permit(t.Context(), 1))
	r.must(r.Publish(recs, []Edge{
		{LBA: 2, Extent: ext[0], From: 100, To: block.Size},
		{LBA: 4, Extent: ext[2], From: 0, To: 200},
	}))
	first := func(lba block.Logical) (lo, hi uint64) {
		r.Read(1, lba, 1, func(_ int, p []byte, sum uint32) {
			if ondisk.CRC(p) != sum {
				t.Errorf("block %d: wrong checksum", lba)
			}
			lo, hi = uint64(p[0]), uint64(p[block.Size-8])
		})
		return lo, hi
	}
	if lo, hi := first(2); lo != 52 || hi != 0 {
		t.Errorf("block 2: %d %d", lo, hi)
	}
	if lo, hi := first(4); lo != 2 || hi != 54 {
		t.Errorf("block 4: %d %d", lo, hi)
	}
	r.reads(1, 3, 1)
	r.reads(1, 6, 56, hole, hole, 59)
	r.drain()
	r.settled()

	defer func() {
		if recover() == nil {
			t.Error("an edge that is in no record")
		}
	}()
	r.zero(1, 2, 1)
	ext, recs1 := r.stage(1, 3, 1, 1)
	_ = r.Publish(recs1, []Edge{{LBA: 2, Extent: ext[0] + 1, From: 1, To: 2}})
}

// Nothing is published by a guest that has lost the pool, and what was staged
// stays its owner's.
func TestPublishWithoutPool(t *testing.T) {
	r := newRig(t, 8)
	ext, recs := r.stage(1, 0, 2, 1)
	r.lost = block.ErrStale
	r.want(r.Publish(recs, nil), block.ErrStale)
	r.reads(1, 0, clean, clean)
	if r.Head() != 0 || r.space.Usage().Reserved != 0 {
		t.Errorf("head %d, %+v", r.Head(), r.space.Usage())
	}
	r.Give(ext)
	r.settled()
}

// reserved returns what dirty blocks hold, without the credit.
func (r *rig) reserved() int64 {
	r.ReturnCredit()
	return r.space.Usage().Reserved
}

// Each block that was not dirty in this generation needs a place, and each
// page of metadata once.
func TestReservation(t *testing.T) {
	r := newRig(t, 128)
	steps := []struct {
		name string
		do   func()
		want int64
	}{
		{"a first block: leaf, two inner pages, root", func() { r.write(1, 0, 1, 1) }, 1 + 4},
		{"again", func() { r.write(1, 0, 1, 2) }, 5},
		{"its neighbour", func() { r.write(1, 1, 1, 3) }, 6},
		{"the next leaf", func() { r.write(1, LeafBlocks, 1, 4) }, 8},
		{"a trim in known leaves", func() { r.zero(1, 0, 2) }, 8},
		{"written after the trim", func() { r.write(1, 0, 1, 5) }, 9},
		{"a trim to a leaf far away", func() { r.zero(1, 0, 1<<30) }, 9 + 3},
		{"a record over the border of two leaves", func() {
			ext, ok, err := r.TryAcquire(2, nil)
			if !ok || err != nil {
				t.Fatal(ok, err)
			}
			rec := oplog.Record{Kind: oplog.KindWrite, Volume: 2, LBA: 2*LeafBlocks - 1, Count: 2, First: ext[0]}
			r.log.Sum(&rec)
			r.must(r.Publish([]oplog.Record{rec}, nil))
		}, 12 + 2 + 4 + 4}, // pages above are counted for both ends
		{"a record without blocks", func() {
			r.must(r.Publish([]oplog.Record{{Kind: oplog.KindNop}}, nil))
		}, 22},
	}
	for _, s := range steps {
		s.do()
		if got := r.reserved(); got != s.want {
			t.Fatalf("%s: %d blocks are reserved instead of %d", s.name, got, s.want)
		}
	}
	r.Freeze()
	r.write(1, 0, 1, 6) // frozen, and written again: it needs both places
	if got := r.reserved(); got != 22+5 {
		t.Errorf("%d blocks are reserved for two generations", got)
	}
	r.Drop()
	if got := r.reserved(); got != 5 {
		t.Errorf("%d blocks are reserved after the drop", got)
	}
	r.drain()
	r.settled()
}

// Reservations are made ahead and used up before more is asked for.
func TestCredit(t *testing.T) {
	r := newRig(t, 2048)
	r.write(1, 0, 1, 1)
	first := r.space.Usage().Reserved
	if first != 5+creditChunk {
		t.Errorf("%d blocks are reserved for a first write", first)
	}
	for i := range block.Logical(LeafBlocks - 1) {
		r.write(1, 1+i, 1, 1)
	}
	if got := r.space.Usage().Reserved; got != first {
		t.Errorf("%d blocks reserved, %d before: the credit is not used", got, first)
	}
	if got := r.reserved(); got != LeafBlocks+4 {
		t.Errorf("%d blocks are reserved for a leaf", got)
	}
	r.drain()
	r.settled()
}

// Full pools refuse what they cannot promise, exactly, and nothing is lost by
// the refusal. A trim may go on where a write may not.
func TestNoSpace(t *testing.T) {
	r := newRig(t, 64)
	u := r.space.Usage()
	room := u.Free - u.Slop
	if !r.space.Reserve(room - 5) {
		t.Fatal("no room")
	}
	r.write(1, 0, 1, 1) // all there is: the credit ahead does not fit
	if got := r.space.Usage().Reserved; got != room {
		t.Errorf("%d blocks reserved instead of %d", got, room)
	}
	r.write(1, 0, 1, 2)
	ext, recs := r.stage(1, 1, 1, 3)
	head := r.Head()
	r.want(r.Publish(recs, nil), block.ErrNoSpace)
	r.reads(1, 0, 2, clean)
	if r.Head() != head || r.space.Usage().Reserved != room {
		t.Errorf("head %d instead of %d, %+v", r.Head(), head, r.space.Usage())
	}
	r.zero(1, 1<<20, 1)   // pages that were not reserved
	r.zero(1, 1<<20, 1e6) // and more of them
	r.want(r.Publish(recs, nil), block.ErrNoSpace)
	if got := r.reserved(); got <= room || got > room+u.Slop/2 {
		t.Errorf("%d blocks reserved, of which trims have %d", got, got-room)
	}
	// Down to half of what is kept back, then trims are refused too.
	rest := u.Free - u.Slop/2 - r.space.Usage().Reserved
	r.space.ForceReserve(rest)
	r.must(r.Permit(t.Context(), 1))
	trim := []oplog.Record{{Kind: oplog.KindZero, Volume: 2, LBA: 0, Count: 1}}
	r.want(r.Publish(trim, nil), block.ErrNoSpace)
	r.space.Unreserve(rest)
	r.must(r.Publish(trim, nil))
	r.Give(ext)
	r.drain()
	r.space.Unreserve(room - 5)
	r.settled()
}

// What was reserved ahead is given back before a write is refused, so that
// the last blocks are not lost to it.
func TestReturnCredit(t *testing.T) {
	r := newRig(t, 64)
	r.write(1, 0, 1, 1)
	r.ReturnCredit()
	r.ReturnCredit()
	if got := r.space.Usage().Reserved; got != 5 {
		t.Errorf("%d blocks are reserved", got)
	}
	r.write(1, 1, 1, 1)
	r.drain()
	r.settled()
}

// restoreRefused expects an error of a kind that says so.
func restoreRefused(t *testing.T, err error, word string) {
	t.Helper()
	if !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), word) {
		t.Errorf("%v: want an error about %q", err, word)
	}
}

// An index from the log is the one that was lost.
func TestRestore(t *testing.T) {
	r := newRig(t, 64)
	r.write(1, 0, 4, 10)
	committed := r.Head()
	r.write(1, 2, 2, 20)
	r.zero(1, 3, 1)
	r.zero(2, 0, 1000)
	r.write(2, 500, 1, 30)
	r.Freeze()
	r.write(1, 300, 1, 40)
	want := r.used.Load()
	held := r.reserved()

	log, s := r.attach()
	r.space.Unreserve(held) // of the guest that died
	r.log, r.Set = log, s
	r.must(r.Restore(committed))
	r.reads(1, 0, clean, clean, 20, hole, clean)
	r.reads(1, 300, 40)
	r.reads(2, 499, hole, 30, hole)
	if log.Tail() != committed {
		t.Errorf("released up to %d instead of %d", log.Tail(), committed)
	}
	if got := r.used.Load(); got != want-4 {
		t.Errorf("%d permits in use instead of %d", got, want-4)
	}
	if got := r.Usage(); got.Active != want-4 || got.Frozen != 0 {
		t.Errorf("usage %+v", got)
	}
	// 2, 3 (now a hole) and 300 in two leaves of volume 1; 500 in one of
	// volume 2, whose hole ends in another two.
	if got := r.reserved(); got != 3+5+1+6 {
		t.Errorf("%d blocks are reserved", got)
	}
	r.write(1, 0, 1, 50)
	r.drain()
	r.settled()
}

func TestRestoreRefusals(t *testing.T) {
	build := func() *rig {
		r := newRig(t, 16)
		for i := range block.Logical(8) {
			r.write(1, i, 1, 1)
		}
		r.log.Release(3)
		return r
	}
	t.Run("released past the commit", func(t *testing.T) {
		r := build()
		log, s := r.attach()
		restoreRefused(t, s.Restore(2), "released up to 3")
		if log.Tail() != 3 || log.ExtentsFree() != 11 || s.Usage().Active != 0 {
			t.Errorf("tail %d, %d extents free, %+v", log.Tail(), log.ExtentsFree(), s.Usage())
		}
		r.must(s.Restore(3)) // the very border
	})
	t.Run("committed past the end", func(t *testing.T) {
		_, s := build().attach()
		restoreRefused(t, s.Restore(9), "ends at position 8")
		if err := s.Restore(8); err != nil || s.Usage().Active != 0 {
			t.Errorf("a log that is committed to its end: %v %+v", err, s.Usage())
		}
	})
	t.Run("a damaged record", func(t *testing.T) {
		r := build()
		_, s := r.attach()
		for at := block.Size; at < len(r.mem)-block.Size; at++ {
			if r.isRecord(at, 6) {
				r.mem[at] ^= 0xff
			}
		}
		restoreRefused(t, s.Restore(3), "position 6")
	})
	t.Run("more than the permits", func(t *testing.T) {
		r := build()
		log, _ := r.attach()
		s := New(Options{Log: log, Space: r.space, Permits: 4})
		restoreRefused(t, s.Restore(3), "more than fits")
	})
}
