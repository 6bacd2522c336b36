package pool

import (
	"testing"
	"time"

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
