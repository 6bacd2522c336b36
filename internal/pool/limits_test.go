package pool

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// A consistency point begins at its size, a fold at its number of mappings, as
// the options say: at a higher one where it would write a page for each.
func TestLimits(t *testing.T) {
	const size = 100
	const together, scattered = 1, 1 << 16
	for _, test := range []struct {
		fold, limit int
		stride      int64 // of the blocks
		folds       bool  // after three points
	}{
		{0, 0, together, false}, {2 * size, 0, together, true},
		{2 * size, 10 * size, scattered, false}, {2 * size, 3 * size, scattered, true},
	} {
		r := newRig(t, 1, testSize)
		o := r.options()
		o.Interval, o.PointBytes, o.FoldEntries, o.FoldLimit = time.Hour, size*block.Size, test.fold, test.limit
		if err := r.openWith(o); err != nil {
			t.Fatal(err)
		}
		v := r.volume("v", 128<<30)
		if err := r.Fold(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := r.dirty.Usage().Permits / 2; n <= size {
			t.Fatalf("with a log of %d blocks the size says nothing", 2*n)
		}
		clock := timing{busy: time.Now(), folded: time.Now()} // as Run begins
		buf := make([]byte, block.Size)
		points, folds := r.machine.Stats().Commits, r.machine.Stats().Folds
		for i := range 3 * size {
			buf[0] = byte(i + 1)
			if err := write(v, int64(i)*test.stride*block.Size, buf); err != nil {
				t.Fatal(err)
			}
			if err := r.work(t.Context(), &clock); err != nil {
				t.Fatal(err)
			}
			if n := r.machine.Stats().Commits - points; n != uint64(i+1)/size {
				t.Fatalf("%d consistency points after %d blocks", n, i+1)
			}
		}
		if begun := r.machine.Folding() || r.machine.Stats().Folds > folds; begun != test.folds {
			t.Errorf("%+v: has a fold begun after %d? %t", test, 3*size, begun)
		}
		r.die()
	}
}

// However fast clients write, and whatever: what a takeover would have to replay is
// bounded, and they need not wait for a whole fold.
func TestUnfoldedIsBounded(t *testing.T) {
	long(t)
	const limit, size = 6000, 16 << 30
	folds := max(2, few(6))
	for _, test := range []struct {
		name   string
		blocks int64 // that are written, scattered over the volume
		asked  bool  // points are not paced: somebody asks for them, as flushes may
	}{{"scattered", 4000 << 10, false}, {"again and again", 100, false}, {"asked for", 4000 << 10, true}} {
		t.Run(test.name, func(t *testing.T) {
			r := newRigWithLog(t, 1, 1<<30, 8<<20)
			o := r.options()
			o.FoldEntries, o.FoldLimit, o.PointBytes = limit, limit, 128*block.Size
			if err := r.openWith(o); err != nil {
				t.Fatal(err)
			}
			v := r.volume("v", size)
			clock := timing{busy: time.Now(), folded: time.Now()} // as Run begins
			rng := rand.New(rand.NewPCG(1, 1))
			page := make([]byte, block.Size)
			full := r.dirty.Usage().Permits * 15 / 16
			most, waited, longest, steps := 0, 0, 0, 0
			for n := uint32(0); r.machine.Stats().Folds < uint64(folds); {
				for end := n + 256; n < end && r.dirty.Usage().Active+r.dirty.Usage().Frozen < full; n++ {
					page[0], page[1], page[2] = byte(n>>16)|1, byte(n>>8), byte(n)
					if err := write(v, rng.Int64N(test.blocks)*(size/test.blocks)&^(block.Size-1), page); err != nil {
						t.Fatal(err)
					}
				}
				points, folding := r.machine.Stats().Commits, r.machine.Folding()
				if test.asked {
					if err := r.Commit(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				if err := r.work(t.Context(), &clock); err != nil {
					t.Fatal(err)
				}
				if folding {
					steps++
				}
				if waited++; r.machine.Stats().Commits > points {
					waited = 0
				}
				longest = max(longest, waited)
				n, _ := r.bmap.Overlays()
				if most = max(most, n, r.machine.Unfolded()); most > r.machine.MostUnfolded() {
					t.Fatalf("%d mappings wait to be folded, %d in memory", r.machine.Unfolded(), n)
				}
			}
			if most < limit*5/4 {
				t.Errorf("no more than %d mappings gathered: folds begin earlier than they have to", most)
			}
			if each := steps / folds; !test.asked && (each < 30 || longest > each/3) {
				t.Errorf("clients waited for %d of the %d steps of a fold", longest, each)
			}
			t.Logf("%d mappings at most, %d steps of a fold, waited for %d", most, steps/folds, longest)
			// After a death it is known again what is in the journal.
			before := r.machine.Unfolded()
			r.die()
			r.mustOpen()
			if n := r.machine.Unfolded(); n != before {
				t.Errorf("%d mappings were replayed, and %d waited", n, before)
			}
			r.shut()
		})
	}
}

// Clients go on while folds fail, however much there is to be folded.
func TestFailingFoldsHoldNobodyUp(t *testing.T) {
	r, _ := filled(t, 300)
	holds := map[int64]byte{}
	r.die()
	f := r.faulty()
	o := r.options()
	o.FoldEntries, o.FoldLimit = 10, 10
	if err := r.openWith(o); err != nil {
		t.Fatal(err)
	}
	v, err := r.Volume("v")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.do(t.Context(), func() error { return nil }); err != nil { // loads the counts
		t.Fatal(err)
	}
	unreadable(f[0], hpdi.OpRead, r.bmap.Trees()[1].Root)
	r.forget()
	for i := range int64(100) {
		holds[i] = byte(100 + i%100)
		if err := write(v, i*block.Size, pattern(holds[i])); err != nil {
			t.Fatal(err)
		}
		if err := r.Commit(t.Context()); err != nil {
			t.Fatalf("block %d: %v", i, err)
		}
	}
	if n := r.machine.Unfolded(); n < 2*r.machine.MostUnfolded() {
		t.Fatalf("only %d mappings wait for the fold", n)
	}
	f[0].Clear()
	if err := r.Fold(t.Context()); err != nil {
		t.Fatal(err)
	}
	verifyBlocks(t, v, holds)
	r.shut()
}
