package pool

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// Consistency points of thousands of mappings, in two volumes, one of which is deleted
// in the end: whoever opens the pool next finds all of them and nothing else.
func TestReplayOfManyMappings(t *testing.T) {
	long(t)
	const blocks, scattered, seed = 4 << 20, 2500, 1
	r := newRigWithLog(t, 1, 1<<30, 64<<20)
	open := func() {
		o := r.options()
		o.FoldEntries = 1 << 20
		if err := r.openWith(o); err != nil {
			t.Fatal(err)
		}
	}
	open()
	rng := rand.New(rand.NewPCG(seed, 9))
	v, w := r.volume("v", blocks*block.Size), r.volume("w", blocks*block.Size)
	holds := map[int64]byte{}
	for point := range 3 {
		for range scattered {
			b, c := rng.Int64N(blocks), byte(1+rng.IntN(250))
			if err := write(v, b*block.Size, pattern(c)); err != nil {
				t.Fatal(err)
			}
			if holds[b] = c; rng.IntN(4) == 0 {
				if err := write(w, b*block.Size, pattern(c)); err != nil {
					t.Fatal(err)
				}
			}
		}
		// Blocks that follow each other across the end of a page above leaves.
		first := int64(point+1)<<16 - 100
		if err := write(v, first*block.Size, bytes.Repeat(pattern(7), 200)); err != nil {
			t.Fatal(err)
		}
		for i := range int64(200) {
			holds[first+i] = 7
		}
		if point == 2 {
			if err := r.DeleteVolume(t.Context(), "w"); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	waiting, _ := r.bmap.Overlays()
	for _, power := range []bool{true, false}[:few(2)] {
		if power {
			r.cutPower(blocktest.DropAll, seed)
		} else {
			r.die()
		}
		open()
		if n, _ := r.bmap.Overlays(); n != waiting || n < 3*scattered*9/10 {
			t.Errorf("%d mappings were replayed instead of %d", n, waiting)
		}
		v, err := r.Volume("v")
		if err != nil {
			t.Fatal(err)
		}
		verifyBlocks(t, v, holds)
		r.mustCheck()
	}
	r.shut()
}
