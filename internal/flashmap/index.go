package flashmap

import (
	"math/bits"
	"sync"

	"github.com/pollux-storage/pollux/hpdi"
)

// slotNumber is the number of a slot. Each page of the table has pageWords of them, and
// those of the last page of a segment for which there is no room are never used.
type slotNumber uint32

// none is no slot.
const none = ^slotNumber(0)

// stripeCount divides the data sets among locks.
const (
	stripeShift = 10
	stripeCount = 1 << stripeShift
)

// stripe is what is known of the data sets of one hash: which of them are on flash,
// and what is under way.
type stripe struct {
	mu sync.Mutex // guards all below, and in Flash.keys what index names
	// index leads from a data set to its slot: an open-addressed table of slots plus 1.
	index  []uint32
	used   int
	active []active
}

// active is a data set with requests under way, or on the move. There are few at once
// in a stripe, so that they are looked for one by one.
type active struct {
	key key
	// writes are under way, here or there, as are discards and writes of zeroes.
	writes int32
	// flash is how many requests are under way at the slot.
	flash int32
	// serial counts the writes that have begun since there are some.
	serial uint32
	move   *Move
}

// hash returns a number whose upper bits choose a stripe, and whose lower ones a place.
func hash(k key) uint64 {
	h := uint64(k) * 0x9e3779b97f4a7c15
	h ^= h >> 32
	return h * 0xd6e8feb86659fd93
}

func (f *Flash) stripeOf(h uint64) *stripe { return &f.stripes[h>>(64-stripeShift)] }

// lock returns the stripe of a data set, locked.
func (f *Flash) lock(k key) *stripe {
	s := f.stripeOf(hash(k))
	s.mu.Lock()
	return s
}

// home returns where looking for a hash starts.
func (s *stripe) home(h uint64) int {
	hi, _ := bits.Mul64(h<<stripeShift, uint64(len(s.index)))
	return int(hi)
}

// findLocked returns the slot of a data set, none when it is not on flash.
func (s *stripe) findLocked(keys []key, k key, h uint64) slotNumber {
	if s.used == 0 {
		return none
	}
	for i := s.home(h); s.index[i] != 0; {
		if slot := slotNumber(s.index[i] - 1); keys[slot] == k {
			return slot
		}
		if i++; i == len(s.index) {
			i = 0
		}
	}
	return none
}

// insertLocked puts a data set, which is not there, into a slot.
func (s *stripe) insertLocked(keys []key, slot slotNumber) {
	// Four fifths full at most, so that an entry takes 5 to 7 bytes.
	if 5*(s.used+1) > 4*len(s.index) {
		old := s.index
		s.index, s.used = make([]uint32, max(8, len(old)*5/4+1)), 0
		for _, v := range old {
			if v != 0 {
				s.placeLocked(keys, v)
			}
		}
	}
	s.placeLocked(keys, uint32(slot)+1)
}

func (s *stripe) placeLocked(keys []key, v uint32) {
	i := s.home(hash(keys[v-1]))
	for s.index[i] != 0 {
		if i++; i == len(s.index) {
			i = 0
		}
	}
	s.index[i] = v
	s.used++
}

// removeLocked takes out the data set in a slot, while its key is still known.
func (s *stripe) removeLocked(keys []key, slot slotNumber) {
	n := len(s.index)
	i := s.home(hash(keys[slot]))
	for s.index[i] != uint32(slot)+1 {
		i = (i + 1) % n
	}
	// What probing would not find behind the gap moves into it.
	for j := (i + 1) % n; s.index[j] != 0; j = (j + 1) % n {
		from := s.home(hash(keys[s.index[j]-1]))
		if (j-from+n)%n >= (j-i+n)%n {
			s.index[i] = s.index[j]
			i = j
		}
	}
	s.index[i] = 0
	s.used--
}

// activeLocked returns the record of a data set, a new one if add is set, else nil.
// It is valid until the lock is released or another one is asked for.
func (s *stripe) activeLocked(k key, add bool) *active {
	for i := range s.active {
		if s.active[i].key == k {
			return &s.active[i]
		}
	}
	if !add {
		return nil
	}
	s.active = append(s.active, active{key: k})
	return &s.active[len(s.active)-1]
}

// restLocked forgets a record of which nothing is under way.
func (s *stripe) restLocked(a *active) {
	if a.writes == 0 && a.flash == 0 && a.move == nil {
		last := len(s.active) - 1
		*a = s.active[last]
		s.active[last] = active{}
		s.active = s.active[:last]
	}
}

// entry is how a request has come into a data set.
type entry struct {
	slot   slotNumber // none: it goes to the primary
	at     int64      // where the slot begins, in bytes
	serial uint32     // of a write
	held   chan struct{}
	err    error // it must not go anywhere
}

// enter looks where a data set is, and notes a request that goes there until leave is
// called for it. It is not noted when it comes back with held, which is closed when
// the request can try again, or an error.
func (f *Flash) enter(p *primary, set Set, write bool) (e entry) {
	k := keyOf(p.number, set)
	h := hash(k)
	s := f.stripeOf(h)
	s.mu.Lock()
	defer s.mu.Unlock()
	e.slot = none
	if p.has(set) {
		if e.slot = s.findLocked(f.keys, k, h); e.slot == none {
			e.err = f.lostError(k)
			return e
		}
	}
	if !write && e.slot == none {
		return e // what is under way at the primary is in nobody's way
	}
	a := s.activeLocked(k, true)
	switch m := a.move; {
	case !write || m == nil:
	case m.doubt != nil:
		e.err = m.doubt
		return e
	case m.held != nil:
		e.held = m.held
		return e
	}
	if write {
		a.writes++
		a.serial++
		e.serial = a.serial
	}
	if e.slot != none {
		e.at = f.offset(e.slot)
		a.flash++
		if write && f.unwanted.Has(int(e.slot)) {
			f.unwanted.Clear(int(e.slot))
		}
	}
	return e
}

// leave says that a request which has entered a data set at a slot, or at the primary,
// is complete. off and n are the bytes of the set that it has changed.
func (f *Flash) leave(p *primary, set Set, slot slotNumber, op hpdi.Op, serial uint32, off, n int64) {
	write := op != hpdi.OpRead
	if !write && slot == none {
		return
	}
	k := keyOf(p.number, set)
	s := f.lock(k)
	defer s.mu.Unlock()
	a := s.activeLocked(k, false)
	if write {
		if m := a.move; m != nil {
			m.markLocked(off, n)
		}
		// A data set that was discarded whole, with nothing else beside it, is not
		// wanted on flash until somebody writes to it.
		if op == hpdi.OpDiscard && slot != none && n == 1<<f.shift && a.writes == 1 && a.serial == serial {
			f.unwanted.Set(int(slot))
		}
		a.writes--
	}
	if slot != none {
		a.flash--
	}
	if a.move != nil && (a.writes == 0 || a.flash == 0) {
		f.wakeUp()
	}
	s.restLocked(a)
}

// onFlash reports whether a data set is on flash.
func (f *Flash) onFlash(p *primary, set Set) bool {
	return p.has(set) && f.lookup(keyOf(p.number, set)) != none
}

// lookup returns the slot of a data set, none when it is not on flash.
func (f *Flash) lookup(k key) slotNumber {
	h := hash(k)
	s := f.stripeOf(h)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.findLocked(f.keys, k, h)
}

// lockAll takes the locks of all stripes, for what all of them read.
func (f *Flash) lockAll() {
	for i := range f.stripes {
		f.stripes[i].mu.Lock()
	}
}

func (f *Flash) unlockAll() {
	for i := range f.stripes {
		f.stripes[i].mu.Unlock()
	}
}
