package collect

import (
	"math"
	"math/bits"
)

// counts of one data set: of one window, or means over several.
type counts struct {
	reads, writes float32 // accesses outside of runs
	runs          float32 // accesses in runs
	bytes         float32 // of the requests of all of them
}

func (c counts) times(f float32) counts {
	return counts{c.reads * f, c.writes * f, c.runs * f, c.bytes * f}
}

func (c counts) plus(o counts) counts {
	return counts{c.reads + o.reads, c.writes + o.writes, c.runs + o.runs, c.bytes + o.bytes}
}

func (c counts) accesses() float32 { return c.reads + c.writes }

// entry is a data set in the table.
type entry struct {
	set           Set
	current, past counts
	last          uint32 // seconds since the table's base, of the newest access outside of runs
	window        uint32 // the window of current
	carry         float32
}

// Sizes of the table's parts in bytes: an entry, and its share of the index, which is never
// more than half full.
const (
	entryBytes = 56
	indexBytes = 4
)

// sampled is how many entries are compared when one has to go.
const sampled = 16

// table holds a bounded number of data sets. Entries are dense, and found by an index of
// open addressing that holds their numbers, from 1 on, 0 for none. Above the number a place
// has as much of the set's hash as fits, so that hardly an entry of another set is looked at:
// each would have to be fetched from memory.
type table struct {
	entries []entry
	index   []uint32
	number  uint32 // mask of the number in a place
	most    int    // entries
	hand    int    // where the next entry to go is looked for
	decay   float32
	evicted uint64
}

// newTable returns a table of at most so many bytes, and no more than sets entries.
func newTable(bytes int64, sets uint64, decay float64) *table {
	t := &table{decay: float32(decay)}
	t.bound(bytes, sets)
	t.grow(64)
	return t
}

// bound sets how many entries there may be. There must not be more.
func (t *table) bound(bytes int64, sets uint64) {
	// The index is a power of two of places, up to four for an entry.
	most := bytes / (entryBytes + 4*indexBytes)
	t.most = int(max(1, min(uint64(most), sets)))
	t.number = 1<<bits.Len(uint(t.most)) - 1
}

// bytes returns the memory of the table.
func (t *table) bytes() int64 {
	return int64(cap(t.entries))*entryBytes + int64(cap(t.index))*indexBytes
}

// grow makes room for n entries, or as many as there may be.
func (t *table) grow(n int) {
	n = min(n, t.most)
	entries := make([]entry, len(t.entries), n)
	copy(entries, t.entries)
	t.entries = entries
	t.index = make([]uint32, 1<<bits.Len(uint(2*n-1)))
	for i := range t.entries {
		t.point(i)
	}
}

// point makes the index name entry i.
func (t *table) point(i int) {
	set := t.entries[i].set
	t.index[t.place(set)] = hashed(set)&^t.number | uint32(i+1)
}

// entry returns the entry that a place of the index names.
func (t *table) entry(k uint32) *entry { return &t.entries[k&t.number-1] }

// place returns the place of the index that has a set, or the empty one where it would be.
func (t *table) place(set Set) int {
	mask := len(t.index) - 1
	h := hashed(set)
	for i := int(h) & mask; ; i = (i + 1) & mask {
		if k := t.index[i]; k == 0 || (k^h)&^t.number == 0 && t.entry(k).set == set {
			return i
		}
	}
}

func hashed(set Set) uint32 { return uint32(uint64(set) * 0x9e3779b97f4a7c15 >> 32) }

// find returns the entry of a set, or nil.
func (t *table) find(set Set) *entry {
	if k := t.index[t.place(set)]; k != 0 {
		return t.entry(k)
	}
	return nil
}

// at returns the entry of a set in a window, and makes one where there is none.
func (t *table) at(set Set, window uint32) *entry {
	if e := t.find(set); e != nil {
		t.roll(e, window)
		return e
	}
	i, carry := len(t.entries), float32(0)
	if i == t.most {
		i, carry = t.evict(window)
	} else {
		if i == cap(t.entries) {
			t.grow(2 * cap(t.entries))
		}
		t.entries = t.entries[:i+1]
	}
	t.entries[i] = entry{set: set, window: window, carry: carry}
	t.point(i)
	return &t.entries[i]
}

// roll closes the windows of an entry that have ended.
func (t *table) roll(e *entry, window uint32) {
	if e.window >= window {
		return
	}
	d := t.decay
	e.past = e.past.times(d).plus(e.current.times(1 - d))
	e.carry *= d
	if k := window - e.window; k > 1 {
		more := float32(math.Pow(float64(d), float64(k-1)))
		e.past, e.carry = e.past.times(more), e.carry*more
	}
	e.current, e.window = counts{}, window
}

// worth is how much it would be a loss to forget an entry.
func (e *entry) worth() float32 {
	return e.past.accesses() + e.current.accesses() + e.carry + (e.past.runs+e.current.runs)/16
}

// evict takes the least worth of some entries out of the index, and returns which one that is
// and what it was worth.
func (t *table) evict(window uint32) (int, float32) {
	least, worth := -1, float32(0)
	for range min(sampled, len(t.entries)) {
		if t.hand++; t.hand == len(t.entries) {
			t.hand = 0
		}
		e := &t.entries[t.hand]
		t.roll(e, window)
		if w := e.worth(); least < 0 || w < worth {
			least, worth = t.hand, w
		}
	}
	t.unindex(t.entries[least].set)
	t.evicted++
	return least, worth
}

// unindex takes a set out of the index and closes the gap that it leaves.
func (t *table) unindex(set Set) {
	mask := len(t.index) - 1
	hole := t.place(set)
	for i := (hole + 1) & mask; t.index[i] != 0; i = (i + 1) & mask {
		// What lies behind its home may move into the hole unless its home lies between.
		home := int(hashed(t.entry(t.index[i]).set)) & mask
		if (i-home)&mask >= (i-hole)&mask {
			t.index[hole] = t.index[i]
			hole = i
		}
	}
	t.index[hole] = 0
}
