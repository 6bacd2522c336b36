package nbdtest

import (
	"context"
	"fmt"
	"sync"

	"github.com/pollux-storage/pollux/internal/block"
)

// Sessions keeps the sessions of a volume that lives in the memory of a test: that a
// server died is told by opening them again. The zero Sessions is ready.
type Sessions struct {
	mu   sync.Mutex
	open map[block.SessionID]*session // guarded by mu
}

// session is one of them; its fields are guarded by the lock of its Sessions.
type session struct {
	of            *Sessions
	id            block.SessionID
	queues, slots int
	last          map[[2]int]uint64 // by queue and slot
}

// opened is a session as one that opened it has it.
type opened struct {
	*session
	fresh bool
}

// OpenSession implements [block.Sessions].
func (s *Sessions) OpenSession(_ context.Context, id block.SessionID, queues, slots int) (block.Session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.open[id]
	switch {
	case id == 0 || queues < 1 || slots < 1 || x != nil && (x.queues != queues || x.slots != slots):
		return nil, fmt.Errorf("session %d of %d queues of %d slots: %w", id, queues, slots, block.ErrInvalid)
	case x != nil:
		return opened{session: x}, nil
	}
	x = &session{of: s, id: id, queues: queues, slots: slots, last: map[[2]int]uint64{}}
	if s.open == nil {
		s.open = map[block.SessionID]*session{}
	}
	s.open[id] = x
	return opened{session: x, fresh: true}, nil
}

// Note says that the change of a tag has been made.
func (s *Sessions) Note(tag block.Tag) error {
	if tag == (block.Tag{}) {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.open[tag.Session]
	if x == nil || int(tag.Queue) >= x.queues || int(tag.Slot) >= x.slots || tag.Counter == 0 {
		return fmt.Errorf("tag %+v: %w", tag, block.ErrInvalid)
	}
	x.last[[2]int{int(tag.Queue), int(tag.Slot)}] = tag.Counter
	return nil
}

// Count returns how many sessions there are.
func (s *Sessions) Count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open)
}

// Fresh implements [block.Session].
func (o opened) Fresh() bool { return o.fresh }

// Done implements [block.Session].
func (o opened) Done(queue, slot int, counter uint64) (bool, error) {
	o.of.mu.Lock()
	defer o.of.mu.Unlock()
	switch {
	case o.of.open[o.id] != o.session:
		return false, fmt.Errorf("session %d: %w", o.id, block.ErrClosed)
	case queue < 0 || queue >= o.queues || slot < 0 || slot >= o.slots:
		return false, fmt.Errorf("session %d: queue %d, slot %d: %w", o.id, queue, slot, block.ErrInvalid)
	}
	return counter != 0 && o.last[[2]int{queue, slot}] == counter, nil
}

// Close implements [block.Session].
func (o opened) Close() {
	o.of.mu.Lock()
	defer o.of.mu.Unlock()
	if o.of.open[o.id] == o.session {
		delete(o.of.open, o.id)
	}
}

// Leave implements [block.Session].
func (o opened) Leave() {}
