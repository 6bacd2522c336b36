package devices

import (
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/pollux-storage/pollux/internal/planted"
)

// proof is what must be known of a device before it is used.
type proof struct {
	run  func() error
	made atomic.Bool   // somebody makes it
	done chan struct{} // closed when err is known
	err  error
}

// wait makes the proof, or waits for whoever makes it: as for a device, which a simulated
// clock must see, and so it is no lock.
func (p *proof) wait() error {
	if p.made.CompareAndSwap(false, true) {
		p.err = p.run()
		close(p.done)
	}
	<-p.done
	return p.err
}

// Prove makes everything that is asked of device i wait until proof has returned, once,
// without an error; after one it fails with that. It is called by whoever needs the device
// first, or by ProveAll, and may use the device itself but not by way of the set. Nobody
// may use the device yet.
func (s *Set) Prove(i int, run func() error) {
	if planted.Has(planted.RecordUnproved) {
		return
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	s.devs[i].unproved.Store(&proof{run: run, done: make(chan struct{})})
}

// Unproved reports whether a device is not proved yet.
func (s *Set) Unproved() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.ContainsFunc(s.devs, func(m *member) bool { return m.unproved.Load() != nil })
}

// ProveAll returns when every device is proved, with the first error. each calls f with 0 to
// n-1, for several at once if it likes.
func (s *Set) ProveAll(each func(n int, f func(i int))) error {
	s.mu.RLock()
	devs := s.devs
	s.mu.RUnlock()
	var waiting []*member
	for _, m := range devs {
		if m.unproved.Load() != nil {
			waiting = append(waiting, m)
		}
	}
	errs := make([]error, len(waiting))
	each(len(waiting), func(i int) {
		if errs[i] = waiting[i].enter(); errs[i] == nil {
			waiting[i].leave()
		}
	})
	for i, err := range errs {
		if err != nil {
			return fmt.Errorf("device number %d: %w", waiting[i].index+1, err)
		}
	}
	return nil
}
