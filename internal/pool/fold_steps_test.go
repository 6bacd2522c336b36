package pool

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// errDead ends a job at a place where its guest dies.
var errDead = errors.New("dead")

// What a fold replaced is freed some thousand runs at a time, with consistency
// points in between, after it is durable: a guest may die there, and counts are
// right for the one after it.
func TestFoldFreesInSteps(t *testing.T) {
	for _, die := range []bool{false, true} {
		ctx := context.Background()
		r := newRig(t, 1, testSize)
		r.mustOpen()
		v := r.volume("v", 64<<20)
		const blocks = 8192
		rng := rand.New(rand.NewPCG(1, 1))
		page := bytes.Repeat([]byte{1}, block.Size)
		// Neighbours are written by different points: each is a run by itself.
		must := func(err error) {
			if err != nil {
				t.Fatal(err)
			}
		}
		shuffle := func() {
			for i, n := range rng.Perm(blocks) {
				must(write(v, int64(n)*2*block.Size, page))
				if i%128 == 127 {
					must(r.Pool.Commit(ctx))
				}
			}
		}
		shuffle()
		must(r.do(ctx, r.foldEverything))
		shuffle()
		steps, most, all := 0, int64(0), int64(0)
		err := r.do(ctx, func() error {
			for done := false; !done; steps++ {
				before := r.space.Usage().Free
				var err error
				if done, err = r.machine.Fold(); err != nil {
					return err
				}
				if freed := r.space.Usage().Free - before; freed > 0 {
					most, all = max(most, freed), all+freed
					if die {
						return errDead
					}
				}
				if !done && !r.machine.Folding() {
					t.Error("a fold that is not done is not under way")
				}
				// Consistency points go on.
				page[9]++
				if err := errors.Join(write(v, block.Size, page), r.commit(nil)); err != nil {
					return err
				}
			}
			return nil
		})
		switch {
		case die:
			if !errors.Is(err, errDead) {
				t.Fatal(err)
			}
			r.die()
			r.mustOpen()
		case err != nil:
			t.Fatal(err)
		case most > blocks*3/4 || all < blocks:
			t.Errorf("%d of %d blocks were freed in one of %d steps", most, all, steps)
		}
		r.mustCheck()
		r.shut()
	}
}
