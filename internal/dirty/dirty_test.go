package dirty

import (
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/oplog"
)

// The active generation answers before the frozen one, and each for what the
// other does not know.
func TestGenerations(t *testing.T) {
	r := newRig(t, 64)
	if r.Freeze() != nil {
		t.Error("nothing is dirty, and yet it was frozen")
	}
	r.write(1, 0, 4, 100)
	r.write(2, 0, 1, 900)
	g := r.Freeze()
	if g == nil || g.UpTo != r.Head() || r.Freeze() != g {
		t.Fatalf("frozen %+v up to %d of %d", g, g.UpTo, r.Head())
	}
	r.write(1, 1, 1, 200)
	r.zero(1, 2, 1)
	r.write(1, 9, 1, 300)
	if g.UpTo == r.Head() || r.Freeze() != g {
		t.Error("the frozen generation moves")
	}
	r.reads(1, 0, 100, 200, hole, 103, clean)
	r.reads(1, 9, 300)
	r.reads(2, 0, 900, clean)
	r.reads(3, 0, clean)
	if ids := g.Volumes(); !slices.Equal(ids, []block.VolumeID{1, 2}) {
		t.Errorf("volumes %v", ids)
	}
	slots, holes := maps.Collect(g.Blocks(1)), g.Holes(1)
	var lbas []block.Logical
	for lba := range g.Blocks(1) {
		lbas = append(lbas, lba)
	}
	if !slices.Equal(lbas, []block.Logical{0, 1, 2, 3}) || len(slots) != 4 || len(holes) != 0 || slots[2].IsHole() {
		t.Errorf("frozen: %v %v %v", lbas, slots, holes)
	}
	before := r.Drops()
	r.Drop()
	if r.Drops() == before {
		t.Error("a drop leaves no trace")
	}
	r.reads(1, 0, clean, 200, hole, clean)
	r.reads(2, 0, clean)
	r.drain()
	r.reads(1, 1, clean)
	r.settled()
	// The memory of a generation is used again, its content is not.
	if u := r.Usage(); u.Bytes == 0 {
		t.Error("the index has no memory")
	}
	r.write(1, 3, 1, 7)
	r.drain()
	r.write(2, 0, 1, 8)
	g = r.Freeze()
	for _, id := range g.Volumes() {
		if slots, holes := maps.Collect(g.Blocks(id)), g.Holes(id); id != 2 && len(slots)+len(holes) > 0 {
			t.Errorf("a reused generation has %v %v of volume %d", slots, holes, id)
		}
	}
	r.reads(1, 3, clean)
	r.drain()
	r.settled()
}

// Entries are newer than the holes around them; long holes are ranges and
// remove the entries that they cover, by range or by entry.
func TestHolesAndBlocks(t *testing.T) {
	for _, test := range []struct {
		name   string
		length uint64
		ranges int
	}{
		{"block by block", smallHole, 0},
		{"fewer than entries", smallHole + 1, 1},
		{"more than entries", 1 << 30, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t, 128)
			for i := range block.Logical(50) {
				r.write(1, 10+i, 1, uint64(i))
			}
			r.zero(1, 20, test.length)
			r.write(1, 25, 1, 500)
			end := 20 + block.Logical(test.length)
			r.reads(1, 19, 9, hole, hole)
			r.reads(1, 24, hole, 500, hole)
			r.reads(1, end-1, hole)
			if end < 60 {
				r.reads(1, end, uint64(end-10))
			} else {
				r.reads(1, end, clean)
			}
			g := r.Freeze()
			if holes := g.Holes(1); len(holes) != test.ranges {
				t.Errorf("holes %v", holes)
			}
			for lba, slot := range g.Blocks(1) {
				if slot.IsHole() != (test.ranges == 0 && lba >= 20 && lba < end && lba != 25) {
					t.Errorf("block %d: %+v", lba, slot)
				}
			}
			if u := r.Usage(); u.Blocks != g.Len() || u.Frozen != 52 || u.Permits != 128 {
				t.Errorf("usage %+v with %d entries", u, g.Len())
			}
			r.Drop()
			r.settled()
		})
	}
}

// A hole in the active generation hides the frozen one's block, and a block
// its hole.
func TestHoleAboveFrozen(t *testing.T) {
	r := newRig(t, 64)
	r.write(1, 5, 1, 1)
	r.zero(1, 100, 1000)
	r.Freeze()
	r.zero(1, 0, 50)
	r.write(1, 300, 1, 2)
	r.reads(1, 5, hole)
	r.reads(1, 299, hole, 2, hole)
	r.Drop()
	r.reads(1, 5, hole)
	r.reads(1, 299, clean, 2, clean)
	r.drain()
	r.settled()
}

// Random changes against a map; at the end everything was given back.
func TestAgainstModel(t *testing.T) {
	deepest := 0
	for seed := range uint64(40) {
		rng := rand.New(rand.NewPCG(seed, 17))
		r := newRig(t, 256)
		type place struct {
			id  block.VolumeID
			lba block.Logical
		}
		type model map[place]uint64
		active, frozen := model{}, []model(nil) // oldest first
		const span = 600
		drop := func() {
			if len(frozen) > 0 {
				r.Drop()
				frozen = frozen[1:]
			}
		}
		follow := func() { // the index decides when it freezes
			if len(r.frozen) > len(frozen) {
				active, frozen = model{}, append(frozen, active)
			}
			if len(r.frozen) != len(frozen) {
				t.Fatalf("seed %d: %d frozen generations instead of %d", seed, len(r.frozen), len(frozen))
			}
			deepest = max(deepest, len(frozen))
		}
		for tag := uint64(1); tag < 400; tag++ {
			at := place{block.VolumeID(1 + rng.IntN(2)), block.Logical(rng.IntN(span))}
			if u := r.Usage(); u.Active+u.Frozen > 240 {
				for len(frozen) > 0 {
					drop()
				}
				r.Freeze()
				follow()
				drop()
			}
			switch rng.IntN(8) {
			case 0:
				n := 1 + rng.IntN(200)
				r.zero(at.id, at.lba, uint64(n))
				for i := range block.Logical(n) {
					active[place{at.id, at.lba + i}] = hole
				}
			case 1:
				if r.Freeze() == nil && len(active) > 0 {
					t.Fatalf("seed %d, step %d: nothing to freeze", seed, tag)
				}
			case 2:
				drop()
			default:
				n := 1 + rng.IntN(8)
				r.write(at.id, at.lba, n, tag<<8)
				for i := range n {
					active[place{at.id, at.lba + block.Logical(i)}] = tag<<8 + uint64(i)
				}
			}
			follow()
			for range 30 {
				at := place{block.VolumeID(1 + rng.IntN(2)), block.Logical(rng.IntN(span + 200))}
				want, ok := active[at]
				for i := len(frozen) - 1; i >= 0 && !ok; i-- {
					want, ok = frozen[i][at]
				}
				if !ok {
					want = clean
				}
				if got := r.get(at.id, at.lba); got != want {
					t.Fatalf("seed %d, step %d: block %v is %d instead of %d", seed, tag, at, got, want)
				}
			}
			// Every permit is a published record or extent, and each block
			// that a consistency point has to write has its place.
			u := r.Usage()
			if u.Active+u.Frozen != r.used.Load() {
				t.Fatalf("seed %d, step %d: %+v with %d permits in use", seed, tag, u, r.used.Load())
			}
			need := int64(0)
			for _, g := range append(slices.Clone(r.frozen), r.active) {
				need += int64(g.pages.Len())
				for _, s := range g.blocks.All() {
					if !s.IsHole() {
						need++
					}
				}
			}
			if have := r.space.Usage().Reserved; have < need {
				t.Fatalf("seed %d, step %d: %d blocks reserved of %d", seed, tag, have, need)
			}
		}
		r.drain()
		if r.settled(); t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	if deepest < 3 {
		t.Errorf("at most %d generations were frozen at once", deepest)
	}
}

// A volume that was asked about but never written is no part of a point.
func TestRecordsWithoutBlocks(t *testing.T) {
	r := newRig(t, 16)
	r.must(r.Publish([]oplog.Record{{Kind: oplog.KindNop}, {Kind: oplog.KindNop}}, nil))
	if u := r.Usage(); u.Active != 0 || u.Blocks != 0 {
		t.Errorf("usage %+v", u)
	}
	if g := r.Freeze(); g == nil || g.UpTo != 2 {
		t.Errorf("records without blocks keep the log: %+v", g)
	}
	r.Drop()
	if r.log.Tail() != 2 {
		t.Errorf("released up to %d", r.log.Tail())
	}
	r.settled()
}
