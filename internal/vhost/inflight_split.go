package vhost

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/planted"
)

// Split tracks what is in flight of one split queue. It is of the goroutine that owns the
// queue. Each of its methods makes at most one store to the area, except where it says
// otherwise, so that a test can end a back-end between any two.
//
// A batch of completions is linked (LinkEntry and LinkHead for each), the used ring's index
// is stored by the queue, each entry is cleared, and Settle ends the batch. Whoever attaches the area after
// a death tells by the ring's index whether the last batch was published.
type Split struct {
	Resumed bool // the region was in use: the queue is where it says

	mem     []byte
	trailer []byte // the queue's counter in it
	size    int
	counter uint64 // of the next submission
	last    uint16 // last_batch_head
	usedIdx uint16
	next    []uint16 // of each entry, as it is in the area
}

// Entry words: inflight in bits 0 to 7, next in bits 48 to 63; then the counter.
func splitAt(slot uint16) int { return splitHeader + int(slot)*splitEntry }

// AttachSplit goes on with a queue whose used ring has index used. It returns what was in
// flight in the order of submission. A region that was never used, or was left in good
// order, becomes a new one.
func (a *Area) AttachSplit(queue int, used uint16) (*Split, []Submission, error) {
	if a.packed {
		return nil, nil, fmt.Errorf("queue %d: an in-flight area for packed rings: %w", queue, ErrProtocol)
	}
	s := &Split{mem: a.region(queue), trailer: a.trailer()[counterAt(queue):][:8:8], size: a.size, next: make([]uint16, a.size)}
	if s.counter = load(s.trailer, 0); s.counter > counterLimit {
		return nil, nil, fmt.Errorf("queue %d: the in-flight area's counter is %d: %w", queue, s.counter, ErrProtocol)
	}
	h := load(s.mem, 8)
	if uint16(h) == 0 {
		s.usedIdx = used
		for i := range a.size {
			store(s.mem, splitAt(uint16(i)), 0)
		}
		s.counter = max(s.counter, 1)
		s.head()
		return s, nil, nil
	}
	if uint16(h) != regionLayout || int(uint16(h>>16)) != a.size {
		return nil, nil, fmt.Errorf("queue %d: its in-flight region has version %d and %d descriptors, not %d and %d: %w",
			queue, uint16(h), uint16(h>>16), regionLayout, a.size, ErrProtocol)
	}
	s.Resumed = true
	s.last, s.usedIdx = uint16(h>>32), uint16(h>>48)
	// What was published belongs to the driver, though its entries may say otherwise.
	at := s.last
	for n := used - s.usedIdx; n > 0 && int(n) <= a.size; n-- {
		if int(at) >= a.size {
			return nil, nil, fmt.Errorf("queue %d: its in-flight region's last batch names descriptor %d of %d: %w", queue, at, a.size, ErrProtocol)
		}
		w := load(s.mem, splitAt(at))
		if !planted.Has(planted.InflightBatchIgnored) {
			store(s.mem, splitAt(at), w&^0xff)
		}
		at = uint16(w >> 48)
	}
	s.usedIdx = used
	var subs []Submission
	for i := range a.size {
		w, c := load(s.mem, splitAt(uint16(i))), load(s.mem, splitAt(uint16(i))+8)
		if c > counterLimit {
			return nil, nil, fmt.Errorf("queue %d: the counter of descriptor %d in its in-flight region is %d: %w", queue, i, c, ErrProtocol)
		}
		s.counter = max(s.counter, c+1)
		if byte(w) != 0 {
			subs = append(subs, Submission{Slot: uint16(i), Counter: c})
		}
	}
	slices.SortFunc(subs, func(x, y Submission) int { return cmp.Compare(x.Counter, y.Counter) })
	s.head()
	return s, subs, nil
}

func (s *Split) head() {
	store(s.mem, 8, regionLayout|uint64(s.size)<<16|uint64(s.last)<<32|uint64(s.usedIdx)<<48)
}

// Fetch notes that the request with that head descriptor is in flight, with two stores, of
// which the second counts. It returns its counter. The queue has checked that head is less
// than its size and not in flight.
func (s *Split) Fetch(head uint16) uint64 {
	c := s.counter
	s.counter++
	store(s.mem, splitAt(head)+8, c)
	store(s.mem, splitAt(head), 1)
	return c
}

// LinkEntry and LinkHead add a completion to the batch, before the ring has it.
func (s *Split) LinkEntry(slot uint16) {
	s.next[slot] = s.last
	store(s.mem, splitAt(slot), 1|uint64(s.last)<<48)
}

// LinkHead is the second half of LinkEntry.
func (s *Split) LinkHead(slot uint16) {
	s.last = slot
	s.head()
}

// Advance is for packed queues.
func (s *Split) Advance(int) {}

// Clear notes that a completion of the batch is in the ring. The list stays, for the rest
// of the batch.
func (s *Split) Clear(slot uint16) { store(s.mem, splitAt(slot), uint64(s.next[slot])<<48) }

// Unlink is for packed queues.
func (s *Split) Unlink() {}

// Settle ends a batch of n completions, of which all are cleared.
func (s *Split) Settle(n int) {
	s.usedIdx += uint16(n)
	s.head()
}

// Retire leaves the region in good order, with nothing in flight, so that the queue can
// begin anew anywhere. Counters go on.
func (s *Split) Retire() {
	if planted.Has(planted.InflightCounterReset) {
		s.counter = 0
	}
	store(s.trailer, 0, s.counter)
	store(s.mem, 8, 0)
}
