package guest

import (
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/space"
)

// Each block is in one of the groups of references, and blocks that are free are in none.
func TestGroupsOfReferences(t *testing.T) {
	var blocks [space.MaxCount + 1]int64
	for i := range blocks {
		blocks[i] = int64(1000 + i)
	}
	sum := func(from, to int) (n int64) {
		for i := from; i <= to; i++ {
			n += int64(1000 + i)
		}
		return n
	}
	var want []control.DedupReferences
	for _, r := range [][2]int{{1, 1}, {2, 2}, {3, 4}, {5, 8}, {9, 16}, {17, 32}, {33, 64}, {65, 128}, {129, 255}} {
		want = append(want, control.DedupReferences{From: r[0], To: r[1], Blocks: sum(r[0], r[1])})
	}
	if got := references(&blocks); !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
}
