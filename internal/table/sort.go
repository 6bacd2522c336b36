package table

import (
	"slices"
	"unsafe"
)

// A pass of the sort looks at so many bits of the keys.
const (
	digitBits = 11
	digits    = 1 << digitBits
	fewKeys   = 256 // fewer are sorted faster by comparing
)

// Sorter puts keys in order, in steps, so that whoever has something else to do
// can do it in between. It keeps its memory, which is outside the Go heap, for
// the next time. The zero Sorter is ready.
type Sorter struct {
	arena       arena
	keys, spare []uint64
	n           int
	next        func(dst []uint64) int // gathers more keys, at most a segment of them
	diff        uint64                 // bits in which keys differ
	shift       uint                   // of the digit that is being sorted by
	counting    bool
	pos         int // in keys
	places      [digits]uint32
}

// Start begins to sort the keys of t, which must not change until that is done.
func Start[V any](s *Sorter, t *Table[V]) {
	s.begin(t.Len())
	place := 0
	s.next = func(dst []uint64) int {
		n := 0
		if place < len(t.dir) {
			g := t.dir[place]
			for _, key := range &g.keys {
				if key != 0 {
					dst[n] = key - 1
					n++
				}
			}
			place += 1 << (t.depth - uint(g.depth))
		}
		return n
	}
}

// Keys returns memory for n keys. StartKeys begins to sort what is put there.
func (s *Sorter) Keys(n int) []uint64 {
	s.begin(n)
	return s.keys[:n]
}

// StartKeys begins to sort what was put into what Keys returned.
func (s *Sorter) StartKeys() {
	s.next = nil
	s.scan(s.keys)
	s.n = len(s.keys)
}

func (s *Sorter) begin(n int) {
	if n > cap(s.keys) {
		s.arena.free()
		room := max(2*cap(s.keys), n, 4096)
		size := uintptr(room) * unsafe.Sizeof(uint64(0))
		s.keys = unsafe.Slice((*uint64)(s.arena.take(size)), room)
		s.spare = unsafe.Slice((*uint64)(s.arena.take(size)), room)
	}
	s.keys, s.spare = s.keys[:n], s.spare[:n]
	s.n, s.diff, s.shift, s.counting, s.pos = 0, 0, 0, true, 0
	clear(s.places[:])
}

func (s *Sorter) scan(keys []uint64) {
	for _, k := range keys {
		s.diff |= k ^ s.keys[0]
	}
}

// Step does a part of the work, which passes over about n keys, and returns the
// keys in order when all is done.
func (s *Sorter) Step(n int) (keys []uint64, done bool) {
	for ; s.n < len(s.keys); n -= slots {
		if n <= 0 {
			return nil, false
		}
		got := s.next(s.keys[s.n:])
		s.scan(s.keys[s.n : s.n+got])
		s.n += got
	}
	s.next = nil
	if len(s.keys) < fewKeys {
		slices.Sort(s.keys)
		return s.keys, true
	}
	for ; s.shift < 64 && s.diff>>s.shift != 0; s.shift += digitBits {
		if s.diff>>s.shift%digits == 0 {
			continue
		}
		if n = s.pass(n); n < 0 {
			return nil, false
		}
	}
	return s.keys, true
}

// pass sorts by one digit. It returns what is left of n, below 0 when it could
// not complete the pass.
func (s *Sorter) pass(n int) int {
	if s.counting {
		part := s.keys[s.pos:min(len(s.keys), s.pos+max(n, 0))]
		for _, k := range part {
			s.places[k>>s.shift%digits]++
		}
		n -= len(part)
		if s.pos += len(part); s.pos < len(s.keys) {
			return -1
		}
		s.counting, s.pos = false, 0
		place := uint32(0)
		for i, count := range s.places {
			s.places[i] = place
			place += count
		}
	}
	part := s.keys[s.pos:min(len(s.keys), s.pos+max(n, 0))]
	for _, k := range part {
		p := &s.places[k>>s.shift%digits]
		s.spare[*p] = k
		*p++
	}
	n -= len(part)
	if s.pos += len(part); s.pos < len(s.keys) {
		return -1
	}
	s.keys, s.spare = s.spare, s.keys
	s.counting, s.pos = true, 0
	clear(s.places[:])
	return n
}

// Sort completes the work and returns the keys in order. They are valid until
// the Sorter is used again.
func (s *Sorter) Sort() []uint64 {
	for {
		if keys, done := s.Step(1 << 30); done {
			return keys
		}
	}
}

// Bytes returns how much memory the Sorter has, in bytes.
func (s *Sorter) Bytes() int64 { return s.arena.bytes() }

// Free gives the memory back.
func (s *Sorter) Free() {
	s.arena.free()
	s.keys, s.spare, s.next, s.n = nil, nil, nil, 0
}

// Between returns those of keys, which are in order, that lie in [from, to).
func Between(keys []uint64, from, to uint64) []uint64 {
	lo, _ := slices.BinarySearch(keys, from)
	hi, _ := slices.BinarySearch(keys, to)
	return keys[lo:hi]
}
