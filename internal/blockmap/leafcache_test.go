package blockmap

import (
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// Where a leaf was found is remembered, holes too, until a fold has installed
// other roots.
func TestLeavesAreRemembered(t *testing.T) {
	m, f := newMap(t)
	const hole = 100 * LeafBlocks
	want(t, m, 0, at(0, 1))
	want(t, m, hole, block.Pointer{})
	root := m.Trees()[1].Root
	f.uncached[root] = true
	var got [1]block.Pointer
	for _, lba := range []block.Logical{0, hole} {
		if !m.LookupCached(1, lba, got[:]) {
			t.Errorf("block %d: the root was asked for", lba)
		}
	}
	set(m, 2, 0, hole)
	fold(t, m, f.store, 1, 1000, refs{}, refs{})
	want(t, m, 0, at(0, 2))
	want(t, m, hole, at(hole, 2))
}

// Leaves that share a slot do not answer for one another, nor do volumes or
// generations.
func TestLeafCacheTellsPlacesApart(t *testing.T) {
	var c leafCache
	if _, ok := c.find(place{1, 0, 1}); ok {
		t.Error("found in an empty cache")
	}
	p := at(5, 1)
	c.add(place{1, 7, 1}, p)
	for _, other := range []place{{1, 7 + leafSlots, 1}, {2, 7, 1}, {1, 7, 2}} {
		if got, ok := c.find(other); ok {
			t.Errorf("%v answered %v", other, got)
		}
	}
	if got, ok := c.find(place{1, 7, 1}); !ok || got != p {
		t.Errorf("got %v, %v", got, ok)
	}
}
