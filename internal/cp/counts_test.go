package cp

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/space"
)

// A change of counts is what it was made of, and changes are in the order of
// leaves, within each those first that raise counts.
func TestCountChanges(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	var all []countChange
	for range 2000 {
		n := 1 + rng.IntN(block.TrackBlocks)
		track := rng.Uint64N(block.MaxDeviceBlocks / block.TrackBlocks)
		if rng.IntN(2) == 0 {
			track %= 64
		}
		want := space.Run{At: block.At(rng.IntN(MaxDevices), track*block.TrackBlocks+rng.Uint64N(uint64(block.TrackBlocks-n)+1)), N: n}
		lower := rng.IntN(2) == 0
		c := changeOf(want, lower)
		if got, down := c.run(); got != want || down != lower {
			t.Fatalf("%+v, lower %t became %+v, %t", want, lower, got, down)
		}
		if c.leaf() != uint64(want.At)/countsPerLeaf {
			t.Fatalf("%+v is in leaf %d", want, c.leaf())
		}
		all = append(all, c)
	}
	slices.Sort(all)
	for i := range all[1:] {
		a, b := all[i], all[i+1]
		_, down := a.run()
		if _, down2 := b.run(); a.leaf() > b.leaf() || a.leaf() == b.leaf() && down && !down2 {
			t.Fatalf("%x comes before %x", a, b)
		}
	}
}
