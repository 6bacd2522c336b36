package blockio

import (
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/internal/block"
)

// mostSuspects is how many pages are remembered to be mended. Whoever reads another one
// has its bytes all the same.
const mostSuspects = 64

// suspects are pages that were read from their twins, and are in use still.
type suspects struct {
	// n is never lower than how many there are. It rises before add asks whether a
	// page is in use: who frees one, which begins with an end of that, and sees none
	// can be sure that none is added.
	n    atomic.Int64
	mu   sync.Mutex
	list []block.Pointer
}

func (s *suspects) add(p block.Pointer, current func() bool) {
	s.n.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, have := range s.list {
		if have == p {
			s.n.Add(-1)
			return
		}
	}
	if len(s.list) == mostSuspects || !current() {
		s.n.Add(-1)
		return
	}
	s.list = append(s.list, p)
}

// forget removes pages of which a block was freed.
func (s *suspects) forget(at block.Physical, n int) {
	if s.n.Load() == 0 {
		return
	}
	freed := func(p block.Physical) bool { return p >= at && p < at+block.Physical(n) }
	s.mu.Lock()
	defer s.mu.Unlock()
	kept := s.list[:0]
	for _, p := range s.list {
		if !freed(p.Phys) && !freed(p.Second().Phys) {
			kept = append(kept, p)
		}
	}
	s.n.Add(int64(len(kept) - len(s.list)))
	s.list = kept
}

// take empties the list.
func (s *suspects) take() []block.Pointer {
	if s.n.Load() == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	list := s.list
	s.n.Add(-int64(len(list)))
	s.list = nil
	return list
}

// Mend writes pages again that were read from their twins. Nothing may be freed
// meanwhile.
func (r *Reader) Mend() {
	for _, p := range r.bad.take() {
		b := r.take()
		frame := b.frame(0)
		if r.set.Read(p.Phys, frame) != nil || verify(p, frame) != nil {
			// If it fails, the next reader notices.
			_, _ = r.set.FromTwin(p.Phys, p.Second().Phys, frame, proves(p))
		}
		r.give(b)
	}
}
