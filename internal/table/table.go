package table

import (
	"fmt"
	"iter"
	"math/bits"
	"math/rand/v2"
	"reflect"
	"unsafe"
)

// The shape of a segment.
const (
	slots     = 1024
	fill      = slots * 5 / 8 // entries at which it is split
	groupBits = 3             // neighbours of 1<<groupBits keys share a line
)

// MaxKey is the largest key.
const MaxKey = 1<<64 - 2

// seed makes places unpredictable, as those of Go's maps are: else a client
// could choose blocks that all meet in one segment.
var seed = rand.Uint64()

// Table maps keys to values of a type without pointers. The zero Table is
// empty and has no memory.
type Table[V any] struct {
	dir      []*segment[V] // by the upper bits of the hash; outside the heap
	depth    uint          // how many: len(dir) = 1<<depth
	segments int
	n        int
	arena    arena
}

// segment is a piece of the table with its own depth: how many bits of the
// hash all its keys share.
type segment[V any] struct {
	keys   [slots]uint64 // + 1
	values [slots]V
	n      uint32
	depth  uint32
}

func hash(key uint64) uint64 {
	hi, lo := bits.Mul64(key>>groupBits^seed, 0x9e3779b97f4a7c15)
	x := (hi ^ lo) * 0xd6e8feb86659fd93
	return x ^ x>>32
}

func (t *Table[V]) segment(h uint64) *segment[V] { return t.dir[h>>(64-t.depth)] }

// home returns the slot where probing for a key starts.
func home(h, key uint64) uint {
	const groups = slots >> groupBits
	return uint(h%groups)<<groupBits | uint(key%(1<<groupBits))
}

// find returns the slot of a key, or the empty one where it would be.
func (s *segment[V]) find(h, key uint64) (i uint, ok bool) {
	for i = home(h, key); ; i++ {
		switch s.keys[i%slots] {
		case key + 1:
			return i % slots, true
		case 0:
			return i % slots, false
		}
	}
}

// Len returns the number of entries.
func (t *Table[V]) Len() int { return t.n }

// Bytes returns how much memory the table has, in bytes.
func (t *Table[V]) Bytes() int64 {
	return t.arena.bytes() + int64(len(t.dir))*int64(unsafe.Sizeof(t.dir[0]))
}

// Get returns the value of a key.
func (t *Table[V]) Get(key uint64) (v V, ok bool) {
	if t.n == 0 {
		return v, false
	}
	h := hash(key)
	s := t.segment(h)
	i, ok := s.find(h, key)
	if ok {
		v = s.values[i]
	}
	return v, ok
}

// Has reports whether there is an entry for a key.
func (t *Table[V]) Has(key uint64) bool {
	_, ok := t.Get(key)
	return ok
}

// Put sets the value of a key and returns the one that it had.
func (t *Table[V]) Put(key uint64, v V) (old V, had bool) {
	s, i, had := t.slot(key)
	if had {
		old = s.values[i]
	}
	s.values[i] = v
	return old, had
}

// At returns where the value of a key is, until the table is changed; the zero
// value is put where there was none.
func (t *Table[V]) At(key uint64) *V {
	s, i, had := t.slot(key)
	if !had {
		var zero V
		s.values[i] = zero
	}
	return &s.values[i]
}

// slot returns the slot of a key, which has no value yet unless it had one.
func (t *Table[V]) slot(key uint64) (s *segment[V], i uint, had bool) {
	if key > MaxKey {
		panic(fmt.Sprintf("table: key %d", key))
	}
	if t.dir == nil {
		t.Grow(1)
	}
	h := hash(key)
	s = t.segment(h)
	if i, had = s.find(h, key); had {
		return s, i, true
	}
	for s.n == fill {
		t.split(s, h)
		s = t.segment(h)
		i, _ = s.find(h, key)
	}
	s.keys[i] = key + 1
	s.n++
	t.n++
	return s, i, false
}

// Touch brings what Get, Put and At of these keys will look at into the
// processor's cache, for all of them at once: a table that is larger than that
// answers one by one as fast as memory does. Inlined where nobody wants the sum it would
// touch nothing.
//
//go:noinline
func (t *Table[V]) Touch(keys []uint64) (sum uint64) {
	if t.n == 0 {
		return 0
	}
	for _, key := range keys {
		h := hash(key)
		s := t.segment(h)
		i := home(h, key)
		sum += s.keys[i] + uint64(*(*byte)(unsafe.Pointer(&s.values[i]))) + uint64(s.n)
	}
	return sum
}

// Grow gives an empty table the room for n entries, which spares it growing.
func (t *Table[V]) Grow(n int) {
	if t.n > 0 {
		return
	}
	depth := uint(0)
	for n > fill/4*3<<depth {
		depth++ // fuller, and many would be split for what lies unevenly
	}
	if t.dir != nil && depth <= t.depth {
		return
	}
	t.Free()
	t.depth = depth
	t.dir = make([]*segment[V], 1<<depth)
	t.arena.reserve(round(unsafe.Sizeof(segment[V]{})) << depth)
	for i := range t.dir {
		t.dir[i] = t.newSegment(depth)
	}
}

func (t *Table[V]) newSegment(depth uint) *segment[V] {
	if typ := reflect.TypeFor[V](); t.segments == 0 && hasPointers(typ) {
		panic(fmt.Sprintf("table: values of type %v have pointers", typ))
	}
	s := (*segment[V])(t.arena.take(unsafe.Sizeof(segment[V]{})))
	s.depth = uint32(depth)
	t.segments++
	return s
}

// split moves half of the entries of s, which h leads to, into a new segment.
func (t *Table[V]) split(s *segment[V], h uint64) {
	if uint(s.depth) == t.depth {
		double := make([]*segment[V], 2*len(t.dir))
		for i := range double {
			double[i] = t.dir[i/2]
		}
		t.dir, t.depth = double, t.depth+1
	}
	s.depth++
	other := t.newSegment(uint(s.depth))
	// The places of s are neighbours; the upper half of them leads to the new one.
	places := uint64(1) << (t.depth - uint(s.depth))
	first := h >> (64 - t.depth) &^ (2*places - 1)
	for i := range places {
		t.dir[first+places+i] = other
	}
	bit := uint64(1) << (64 - uint(s.depth))
	for i := uint(0); i < slots; {
		key := s.keys[i] - 1
		if hk := hash(key); s.keys[i] != 0 && hk&bit != 0 {
			j, _ := other.find(hk, key)
			other.keys[j], other.values[j] = key+1, s.values[i]
			other.n++
			s.remove(i)
			continue // another may have come to its place
		}
		i++
	}
}

// remove empties slot i and closes the gap. What it moves comes from further on
// in the way of probing: who goes through the slots upwards and looks at slot i
// again misses none.
func (s *segment[V]) remove(i uint) {
	for j := (i + 1) % slots; s.keys[j] != 0; j = (j + 1) % slots {
		// The entry at j may move to i unless its home lies in (i, j].
		key := s.keys[j] - 1
		if h := home(hash(key), key); (j-h)%slots >= (j-i)%slots {
			s.keys[i], s.values[i] = s.keys[j], s.values[j]
			i = j
		}
	}
	s.keys[i] = 0
	s.n--
}

// Delete removes a key and returns the value that it had.
func (t *Table[V]) Delete(key uint64) (old V, had bool) {
	if t.n == 0 {
		return old, false
	}
	h := hash(key)
	s := t.segment(h)
	i, had := s.find(h, key)
	if had {
		old = s.values[i]
		s.remove(i)
		t.n--
	}
	return old, had
}

// DeleteRange removes the keys of [from, to) and calls deleted, which must not
// use the table, for each. It takes as long as the smaller of range and table.
func (t *Table[V]) DeleteRange(from, to uint64, deleted func(key uint64, v V)) {
	if to-from <= uint64(t.n) {
		for key := from; key < to; key++ {
			if v, ok := t.Delete(key); ok {
				deleted(key, v)
			}
		}
		return
	}
	for s := range t.all {
		for i := uint(0); i < slots; {
			if key := s.keys[i] - 1; s.keys[i] != 0 && from <= key && key < to {
				deleted(key, s.values[i])
				s.remove(i)
				t.n--
				continue
			}
			i++
		}
	}
}

// all calls yield for each segment.
func (t *Table[V]) all(yield func(*segment[V]) bool) {
	for i := 0; i < len(t.dir); {
		s := t.dir[i]
		if !yield(s) {
			return
		}
		i += 1 << (t.depth - uint(s.depth))
	}
}

// All returns the entries in no order. The table must not be changed meanwhile.
func (t *Table[V]) All() iter.Seq2[uint64, V] {
	return func(yield func(uint64, V) bool) {
		for s := range t.all {
			for i, key := range &s.keys {
				if key != 0 && !yield(key-1, s.values[i]) {
					return
				}
			}
		}
	}
}

// Clear removes all entries. It takes as long as putting them there did: memory
// is kept if an eighth of it was used, and given back otherwise.
func (t *Table[V]) Clear() {
	if t.segments > 1 && t.n < t.segments*fill/8 {
		t.Free()
		return
	}
	for s := range t.all {
		if s.n > 0 {
			clear(s.keys[:])
			s.n = 0
		}
	}
	t.n = 0
}

// Free empties the table and gives its memory back.
func (t *Table[V]) Free() {
	t.arena.free()
	t.dir, t.depth, t.segments, t.n = nil, 0, 0, 0
}

// hasPointers reports whether values of a type may refer to the Go heap.
func hasPointers(t reflect.Type) bool {
	switch k := t.Kind(); k {
	case reflect.Array:
		return hasPointers(t.Elem())
	case reflect.Struct:
		for i := range t.NumField() {
			if hasPointers(t.Field(i).Type) {
				return true
			}
		}
		return false
	default:
		return k >= reflect.Chan // chan, func, interface, map, pointer, slice, string
	}
}
