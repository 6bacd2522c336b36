package pool

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// The leaves of large count trees are read many at a time, past the cache; the
// end of the pool, and a page that is bad, end that.
func TestReadLeaves(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.mustOpen()
	defer r.die()
	v := r.volume("v", 8<<20)
	rng := rand.New(rand.NewPCG(1, 1))
	buf := make([]byte, block.Size)
	for i := range 1000 {
		for j := range buf {
			buf[j] = byte(rng.Uint32())
		}
		err := write(v, int64(i)*block.Size, buf)
		if i%100 == 99 {
			err = errors.Join(err, r.Commit(t.Context())) // the log holds no more
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Fold(t.Context()); err != nil {
		t.Fatal(err)
	}
	ps := make([]block.Pointer, 1000)
	for id := range r.bmap.Trees() {
		for i := 0; i < len(ps); i += 100 {
			if err := r.bmap.Lookup(id, block.Logical(i), ps[i:i+100]); err != nil {
				t.Fatal(err)
			}
		}
	}
	b, err := newBulk(r.set)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	seen := make([]int, len(ps))
	count := func(i int, page []byte) error {
		seen[i]++ // each by one worker
		return prove(ps[i], page)
	}
	if err := b.readLeaves(t.Context(), ps, count); err != nil {
		t.Fatal(err)
	}
	if slices.Max(seen) != 1 || slices.Min(seen) != 1 {
		t.Error("not each page came once")
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if err := b.readLeaves(ended, ps, count); !errors.Is(err, context.Canceled) {
		t.Errorf("with the end of the pool: %v", err)
	}
	ps[500].Sum++
	if err := b.readLeaves(t.Context(), ps, func(int, []byte) error { return nil }); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("with a bad page: %v", err)
	}
}
