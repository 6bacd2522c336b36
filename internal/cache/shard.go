package cache

import (
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
)

// The lists that a used frame may be in.
const (
	free = iota
	cold
	hot
)

// record describes a frame. Its bytes outlive the guest where the cache does, see
// docs/format/cache.md.
type record struct {
	phys       uint64
	birth      uint64
	sum        uint32
	hash       uint32
	next, prev uint32 // neighbours in its list, as frame number + 1; 0 at the ends
	clock      uint32 // the shard's clock when it was inserted, or came to the hot list
	list       uint8
	flags      uint8
	_          [2]byte
}

// What is true of a frame.
const (
	used     uint8 = 1 << iota // second chance: asked for since it was last considered
	unproved                   // its bytes may not be what its checksum says
	shared                     // birth is not that of the block
)

func (r *record) is(flag uint8) bool { return r.flags&flag != 0 }

func (r *record) holds(k Key) bool {
	return r.phys == uint64(k.Phys) && r.sum == k.Sum && (k.Shared || r.birth == uint64(k.Birth) && !r.is(shared))
}

// slot is an entry of the open-addressed table. The hash decides where probing
// starts, so that entries can be moved without looking at their records.
type slot struct {
	hash  uint32
	frame uint32 // number + 1; 0: empty
}

// slotsPerFrame makes the table at most half full.
const slotsPerFrame = 2

// list is a doubly linked list of frames through their records: in at the
// head, out at the tail.
type list struct {
	head, tail uint32 // number + 1
	n          uint32
}

// secondChances bounds how many frames one insertion may spare, and so how
// long it holds the lock.
const secondChances = 64

func (s *shard) init() {
	clear(s.table)
	clear(s.ghosts)
	s.coldMax = max(1, uint32(len(s.records))/8)
}

func (s *shard) frame(f uint32) []byte {
	return s.frames[int(f)*block.Size:][:block.Size:block.Size]
}

// home returns where probing for a hash starts.
func (s *shard) home(hash uint32) uint32 {
	return uint32(uint64(hash) * uint64(len(s.table)) >> 32)
}

func (s *shard) after(i uint32) uint32 {
	if i++; i < uint32(len(s.table)) {
		return i
	}
	return 0
}

// find returns the table index of the frame for a physical block.
func (s *shard) find(hash uint32, phys block.Physical) (uint32, bool) {
	if len(s.table) == 0 {
		return 0, false
	}
	for i := s.home(hash); s.table[i].frame != 0; i = s.after(i) {
		if s.table[i].hash != hash {
			continue
		}
		r := &s.records[s.table[i].frame-1]
		if r.phys == uint64(phys) {
			return i, true
		}
	}
	return 0, false
}

// hit returns the frame that holds key and marks it as used.
func (s *shard) hit(hash uint32, key Key) (uint32, bool) {
	i, ok := s.find(hash, key.Phys)
	if ok {
		f := s.table[i].frame - 1
		if r := &s.records[f]; r.holds(key) && s.proved(i, f) || planted.Has(planted.StaleCacheFrame) {
			s.hits++
			if r.list == hot || s.clock-r.clock >= s.coldMax/2 {
				r.flags |= used
			}
			return f, true
		}
	}
	s.misses++
	return 0, false
}

// proved reports whether a frame, at index i of the table, holds what its
// checksum says, and gives up one that does not.
func (s *shard) proved(i, f uint32) bool {
	r := &s.records[f]
	if !r.is(unproved) {
		return true
	}
	if ondisk.CRC(s.frame(f)) != r.sum {
		s.damaged++
		s.release(i, f)
		return false
	}
	r.flags &^= unproved
	return true
}

func (s *shard) put(hash uint32, key Key, data []byte) *record {
	if i, ok := s.find(hash, key.Phys); ok {
		f := s.table[i].frame - 1
		if s.records[f].holds(key) {
			copy(s.frame(f), data)
			s.records[f].flags &^= unproved
			return &s.records[f]
		}
		// The block was written anew since: the old content is of no use.
		s.release(i, f)
	}
	f := s.take()
	r := &s.records[f]
	// Who adopts a frame of which not all is copied finds a free one. (Its checksum
	// would not be right either.)
	r.list = free
	copy(s.frame(f), data)
	*r = record{phys: uint64(key.Phys), birth: uint64(key.Birth), sum: key.Sum, hash: hash, clock: s.clock}
	if key.Shared {
		r.flags = shared
	}
	s.clock++
	if g := s.ghost(r); *g == r.ghost() {
		*g = 0
		s.push(hot, f)
	} else {
		s.push(cold, f)
	}
	s.enlist(f)
	return r
}

// enlist puts a frame into the table.
func (s *shard) enlist(f uint32) {
	hash := s.records[f].hash
	i := s.home(hash)
	for s.table[i].frame != 0 {
		i = s.after(i)
	}
	s.table[i] = slot{hash, f + 1}
}

// take returns a frame that is in no list and not in the table.
func (s *shard) take() uint32 {
	if f := s.lists[free].tail; f != 0 {
		s.remove(f - 1)
		return f - 1
	}
	if s.fresh < uint32(len(s.records)) {
		s.fresh++
		return s.fresh - 1
	}
	s.evictions++
	for chances := 0; ; chances++ {
		from := hot
		if s.lists[cold].n > s.coldMax || s.lists[hot].n == 0 {
			from = cold
		}
		f := s.lists[from].tail - 1
		r := &s.records[f]
		if r.is(used) && chances < secondChances {
			r.flags &^= used
			r.clock = s.clock // the hot list is in this order, too
			s.remove(f)
			s.push(hot, f)
			continue
		}
		if from == cold {
			*s.ghost(r) = r.ghost()
		}
		i, _ := s.find(r.hash, block.Physical(r.phys))
		s.unslot(i)
		s.remove(f)
		return f
	}
}

// ghost returns the place where the departure of a block is remembered.
func (s *shard) ghost(r *record) *uint32 {
	// Neighbours have places far apart: one place remembers one block.
	return &s.ghosts[uint64(r.hash*0x9e3779b1)*uint64(len(s.ghosts))>>32]
}

// ghost returns the mark of a departed block, never 0.
func (r *record) ghost() uint32 {
	return (r.hash ^ r.sum ^ uint32(r.birth)*0x9e3779b9) | 1
}

// release gives frame f, at index i of the table, back.
func (s *shard) release(i, f uint32) {
	s.unslot(i)
	s.remove(f)
	s.push(free, f)
}

// unslot empties index i of the table and closes the gap, so that no probe
// ends before what it looks for.
func (s *shard) unslot(i uint32) {
	n := uint32(len(s.table))
	for j := s.after(i); s.table[j].frame != 0; j = s.after(j) {
		// The entry at j may move to i unless its home lies in (i, j].
		home := s.home(s.table[j].hash)
		if (j+n-home)%n >= (j+n-i)%n {
			s.table[i] = s.table[j]
			i = j
		}
	}
	s.table[i] = slot{}
}

// push puts a frame that is in no list at the head of one.
func (s *shard) push(to uint8, f uint32) {
	l, r := &s.lists[to], &s.records[f]
	r.list, r.next, r.prev = to, l.head, 0
	if l.head != 0 {
		s.records[l.head-1].prev = f + 1
	} else {
		l.tail = f + 1
	}
	l.head = f + 1
	l.n++
}

// remove takes a frame out of its list.
func (s *shard) remove(f uint32) {
	r := &s.records[f]
	l := &s.lists[r.list]
	if r.prev != 0 {
		s.records[r.prev-1].next = r.next
	} else {
		l.head = r.next
	}
	if r.next != 0 {
		s.records[r.next-1].prev = r.prev
	} else {
		l.tail = r.prev
	}
	l.n--
}
