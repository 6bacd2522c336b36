package rawvolume

import (
	"context"
	"fmt"
	"sync"

	"github.com/pollux-storage/pollux/internal/block"
)

// maxSessions is how many sessions are kept; the one that was left first goes first.
const maxSessions = 64

// sessions are what the program knows of clients that send requests again.
type sessions struct {
	mu    sync.Mutex // guards what follows, and all sessions
	known map[block.SessionID]*session
	left  []*session // those without a connection, the oldest first
}

type session struct {
	of            *sessions
	id            block.SessionID
	queues, slots int
	open          int
	last          []uint64 // counter of the last change, by queue and slot
}

// OpenSession implements block.Volume.
func (s *sessions) OpenSession(_ context.Context, id block.SessionID, queues, slots int) (block.Session, error) {
	if id == 0 || queues < 1 || slots < 1 || queues > 1<<12 || slots > 1<<16 {
		return nil, fmt.Errorf("session %016x of %d queues of %d slots: %w", uint64(id), queues, slots, block.ErrInvalid)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.known[id]
	if x != nil && (x.queues != queues || x.slots != slots) {
		return nil, fmt.Errorf("session %016x has %d queues of %d slots, not %d of %d: %w", uint64(id), x.queues, x.slots, queues, slots, block.ErrInvalid)
	}
	if x == nil {
		if len(s.known) >= maxSessions {
			if len(s.left) == 0 {
				return nil, fmt.Errorf("all %d sessions are in use: %w", maxSessions, block.ErrNoSpace)
			}
			delete(s.known, s.left[0].id)
			s.left = s.left[1:]
		}
		x = &session{of: s, id: id, queues: queues, slots: slots, last: make([]uint64, queues*slots)}
		if s.known == nil {
			s.known = map[block.SessionID]*session{}
		}
		s.known[id] = x
	}
	x.open++
	s.forgetLeftLocked(x)
	return x, nil
}

func (s *sessions) forgetLeftLocked(x *session) {
	for i, l := range s.left {
		if l == x {
			s.left = append(s.left[:i], s.left[i+1:]...)
			return
		}
	}
}

// note says that the change of a tag was made.
func (s *sessions) note(tag block.Tag) error {
	if tag == (block.Tag{}) {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.known[tag.Session]
	if x == nil || int(tag.Queue) >= x.queues || int(tag.Slot) >= x.slots {
		return fmt.Errorf("tag of session %016x, queue %d, slot %d: %w", uint64(tag.Session), tag.Queue, tag.Slot, block.ErrInvalid)
	}
	x.last[int(tag.Queue)*x.slots+int(tag.Slot)] = tag.Counter
	return nil
}

// Fresh implements block.Session. That a program that was started anew knows nothing is as
// with every server of plain devices: what was in flight is done again.
func (x *session) Fresh() bool { return false }

// Done implements block.Session.
func (x *session) Done(queue, slot int, counter uint64) (bool, error) {
	if queue < 0 || queue >= x.queues || slot < 0 || slot >= x.slots {
		return false, fmt.Errorf("session %016x has no queue %d, slot %d: %w", uint64(x.id), queue, slot, block.ErrInvalid)
	}
	x.of.mu.Lock()
	defer x.of.mu.Unlock()
	return counter != 0 && x.last[queue*x.slots+slot] == counter, nil
}

// Close implements block.Session.
func (x *session) Close() {
	x.of.mu.Lock()
	defer x.of.mu.Unlock()
	if x.of.known[x.id] == x {
		delete(x.of.known, x.id)
		x.of.forgetLeftLocked(x)
	}
}

// Leave implements block.Session.
func (x *session) Leave() {
	x.of.mu.Lock()
	defer x.of.mu.Unlock()
	if x.open--; x.open == 0 && x.of.known[x.id] == x {
		x.of.left = append(x.of.left, x)
	}
}
