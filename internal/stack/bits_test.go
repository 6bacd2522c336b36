package stack

import (
	"math/rand/v2"
	"testing"
)

// TestBits compares a set with a map.
func TestBits(t *testing.T) {
	const n = 200
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		b, other, want := NewBits(n), NewBits(n), map[int]bool{}
		filled := rng.IntN(n / 2)
		b.Fill(filled)
		for i := range filled {
			want[i] = true
		}
		for range 100 {
			i := rng.IntN(n)
			switch rng.IntN(3) {
			case 0:
				b.Set(i)
				want[i] = true
			case 1:
				b.Clear(i)
				delete(want, i)
			case 2:
				other.Set(i)
			}
		}
		for i := range n {
			if other.Has(i) {
				want[i] = true
			}
		}
		b.Or(other)
		if b.Count() != len(want) {
			t.Errorf("seed %d: %d members instead of %d", seed, b.Count(), len(want))
		}
		c := b.Resized(2 * n)
		next, gap := -1, -1
		for i := 2*n - 1; i >= 0; i-- {
			if want[i] {
				next = i
			} else {
				gap = i
			}
			if c.Has(i) != want[i] || c.Next(i) != next || gap >= 0 && c.Gap(i) != gap {
				t.Fatalf("seed %d: at %d: %v, next %d, gap %d; wanted %v, %d, %d", seed, i, c.Has(i), c.Next(i), c.Gap(i), want[i], next, gap)
			}
		}
		if b.Resized(64).Count() > 64 || NewBits(0).Next(0) != -1 {
			t.Errorf("seed %d: too many members", seed)
		}
	}
}
