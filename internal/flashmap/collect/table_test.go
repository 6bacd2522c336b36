package collect

import (
	"testing"
)

// check proves that index and entries agree.
func (tb *table) check(t *testing.T) {
	t.Helper()
	n := 0
	for _, k := range tb.index {
		if k != 0 {
			n++
		}
	}
	if n != len(tb.entries) || len(tb.entries) > tb.most || 2*len(tb.entries) > len(tb.index) {
		t.Fatalf("%d entries of at most %d, %d of %d places", len(tb.entries), tb.most, n, len(tb.index))
	}
	for i := range tb.entries {
		if e := tb.find(tb.entries[i].set); e != &tb.entries[i] {
			t.Fatalf("set %d is not found", tb.entries[i].set)
		}
	}
}

// The table finds what was put into it and not thrown out, whatever is thrown out.
func TestTable(t *testing.T) {
	rnd := random(t)
	for _, most := range []int64{1, 7, 100} {
		tb := newTable(most*(entryBytes+4*indexBytes), 1<<40, 0.5)
		known := map[Set]float32{}
		for i := range 3000 {
			set := Set(rnd.Uint64N(uint64(most) * 3))
			if rnd.IntN(4) == 0 {
				set = Set(rnd.Uint64())
			}
			had, evicted := tb.find(set) != nil, tb.evicted
			e := tb.at(set, uint32(i/500))
			if had && e.current.reads+e.past.reads == 0 || !had && e.current.reads+e.past.reads != 0 {
				t.Fatalf("set %d: %+v, had %t", set, *e, had)
			}
			if tb.evicted > evicted && len(known) < int(most) {
				t.Fatalf("%d of %d, and one had to go", len(known), most)
			}
			e.current.reads++
			known[set]++
			for s := range known {
				if tb.find(s) == nil {
					delete(known, s)
				}
			}
			if len(known) != len(tb.entries) {
				t.Fatalf("%d sets are known, %d in the table", len(known), len(tb.entries))
			}
			if i%50 == 0 {
				tb.check(t)
			}
		}
		tb.check(t)
	}
}
