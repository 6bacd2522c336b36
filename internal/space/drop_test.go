package space

import (
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// Drop tells which blocks of a run have become free: all, none, or those that nobody
// shares, each once and in runs as long as they are.
func TestDrop(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 3))
		s := newSpace(t, 3*block.TrackBlocks)
		track := block.At(0, 256)
		want := map[block.Physical]bool{}
		lo := rng.IntN(block.TrackBlocks)
		run := Run{track + block.Physical(lo), 1 + rng.IntN(block.TrackBlocks-lo)}
		if err := s.Inc(run); err != nil {
			t.Fatal(err)
		}
		density := rng.IntN(4)
		for i := range run.N {
			p := run.At + block.Physical(i)
			if want[p] = true; rng.IntN(4) < density {
				if err := s.Inc(Run{p, 1}); err != nil {
					t.Fatal(err)
				}
				want[p] = false
			}
		}
		before := []Run{{At: 1, N: 1}}
		freed, err := s.Drop(run, before)
		if err != nil || freed[0] != before[0] {
			t.Fatalf("seed %d: %v, %v", seed, freed, err)
		}
		last := block.Physical(0)
		for _, r := range freed[1:] {
			if r.At <= last {
				t.Fatalf("seed %d: %v is not one run with what is before it", seed, freed)
			}
			for i := range r.N {
				if p := r.At + block.Physical(i); !want[p] {
					t.Fatalf("seed %d: %v is not free", seed, p)
				}
				delete(want, r.At+block.Physical(i))
			}
			last = r.At + block.Physical(r.N)
		}
		for p, free := range want {
			if free || s.Count(p) != 1 {
				t.Fatalf("seed %d: nobody says that %v is free", seed, p)
			}
		}
		if err := s.CheckFree(); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}
