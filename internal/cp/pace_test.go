package cp

import (
	"testing"

	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/space"
)

// While a durable fold frees what it replaced, as much may gather for the next one as
// was freed, up to the limit: were it more, the next one would begin where nothing may
// gather any more, and clients would stand still until it ends.
func TestFreeingLeavesRoom(t *testing.T) {
	const limit = 1000
	for _, test := range []struct {
		gathered, waiting, entries, left int
		want                             bool
	}{
		{gathered: 300, waiting: 300, entries: 1, left: 10, want: true},
		{gathered: 300, waiting: 300, entries: 350, left: 5},
		{gathered: 300, waiting: 300, entries: 351, left: 5, want: true},
		{gathered: 300, waiting: 900, entries: 100, left: 0},
		{gathered: 300, waiting: 900, entries: 101, left: 0, want: true},
		{gathered: 1200, waiting: 1200, entries: 1, left: 5, want: true},
	} {
		m := &Machine{Config: Config{FoldLimit: limit, Map: blockmap.NewMap(nil)}, journalled: test.waiting}
		m.folding = &fold{m: m, durable: true, gathered: test.gathered, losing: 10, lost: make([]space.Run, test.left)}
		if got := m.FoldFirst(test.entries); got != test.want {
			t.Errorf("%+v: %t", test, got)
		}
	}
	nothing := &fold{durable: true, gathered: 10}
	if nothing.freed() != 1 {
		t.Errorf("a fold that frees nothing has freed %v", nothing.freed())
	}
}
