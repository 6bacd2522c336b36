package mirror

import (
	"sync"

	"github.com/pollux-storage/pollux/internal/block"
)

// stripeCount divides the tracks of a mirror among locks.
const stripeCount = 256

// stripe is a lock that many writes hold together, or one copying of a track
// alone. It prefers the writes: a queue's owner that waits for a stripe while it
// holds the same one from an earlier write must get it.
type stripe struct {
	mu     sync.Mutex
	cond   sync.Cond // tells that shared or alone changed; its L is mu
	shared int
	alone  bool
}

type stripes [stripeCount]stripe

func (s *stripes) init() {
	for i := range s {
		s[i].cond.L = &s[i].mu
	}
}

func (s *stripes) of(track int64) *stripe { return &s[track%stripeCount] }

// track returns the number of the track that holds a byte of the mirror.
func track(off int64) int64 { return off / block.TrackBytes }

// share takes the stripes of a range of bytes together with other writes.
func (s *stripes) share(off, n int64) {
	for t := track(off); t <= track(off+n-1); t++ {
		p := s.of(t)
		p.mu.Lock()
		for p.alone {
			p.cond.Wait()
		}
		p.shared++
		p.mu.Unlock()
	}
}

// unshare gives back what share took.
func (s *stripes) unshare(off, n int64) {
	for t := track(off); t <= track(off+n-1); t++ {
		p := s.of(t)
		p.mu.Lock()
		if p.shared--; p.shared == 0 {
			p.cond.Broadcast()
		}
		p.mu.Unlock()
	}
}

// alone runs fn while nothing is being written to the track that off is in.
func (s *stripes) alone(off int64, fn func() error) error {
	p := s.of(track(off))
	p.mu.Lock()
	for p.alone || p.shared > 0 {
		p.cond.Wait()
	}
	p.alone = true
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		p.alone = false
		p.cond.Broadcast()
		p.mu.Unlock()
	}()
	return fn()
}
