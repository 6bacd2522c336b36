// Package devices makes the devices of one pool addressable by physical block.
// It hands each caller a queue of its own for the time of a call, so that
// readers, consistency points and flushes do not wait for each other's
// completions, and it knows which devices hold writes that no sync has covered.
package devices

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
)

// queueDepth is how many requests one caller has in flight at a device; idle
// is how many unused queues are kept for the next callers.
const (
	queueDepth = 64
	idle       = 16
)

// Set is an ordered list of devices. Block numbers address it by device index.
// Its methods may be called concurrently.
type Set struct {
	mu   sync.RWMutex // guards devs, which only grows
	devs []*member
}

type member struct {
	dev   hpdi.Device
	index int
	free  chan hpdi.Queue
	dirty atomic.Bool // written since the last sync began
}

// NewSet returns a set of devs, in order.
func NewSet(devs []hpdi.Device) *Set {
	s := &Set{}
	for _, d := range devs {
		s.Add(d)
	}
	return s
}

// Add appends a device and returns its index.
func (s *Set) Add(d hpdi.Device) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.devs = append(s.devs, &member{dev: d, index: len(s.devs), free: make(chan hpdi.Queue, idle)})
	return len(s.devs) - 1
}

// RemoveLast takes back the newest Add, before anything used the device. The
// device stays open.
func (s *Set) RemoveLast() {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.devs[len(s.devs)-1]
	for len(m.free) > 0 {
		_ = (<-m.free).Close() // nothing was in flight
	}
	s.devs = s.devs[:len(s.devs)-1]
}

// Len returns the number of devices.
func (s *Set) Len() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.devs)
}

// Info describes device i.
func (s *Set) Info(i int) hpdi.Info {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.devs[i].dev.Info()
}

// IO is one transfer of consecutive blocks.
type IO struct {
	Op   hpdi.Op // OpRead, OpWrite or OpDiscard
	At   block.Physical
	Vec  [][]byte // of reads and writes; whole blocks
	N    int      // blocks of a discard
	Err  error    // result
	req  hpdi.Request
	done bool
}

// Do carries out all ios, which may be on several devices, and waits for them.
// Each IO has its own result; the error returned is the first of them.
func (s *Set) Do(ios []*IO) error {
	// Grouped in the order of first use, so that the same calls make the same
	// run.
	type group struct {
		device int
		reqs   []*hpdi.Request
	}
	var groups []group
	for _, io := range ios {
		io.req = hpdi.Request{
			Op: io.Op, Offset: int64(io.At.Block()) * block.Size,
			Vec: io.Vec, Length: int64(io.N) * block.Size, User: io,
		}
		io.Err, io.done = nil, false
		d := io.At.Device()
		i := slices.IndexFunc(groups, func(g group) bool { return g.device == d })
		if i < 0 {
			i = len(groups)
			groups = append(groups, group{device: d})
		}
		groups[i].reqs = append(groups[i].reqs, &io.req)
	}
	if len(groups) == 1 {
		s.runOn(groups[0].device, groups[0].reqs)
	} else {
		var wg sync.WaitGroup
		for _, g := range groups {
			wg.Go(func() { s.runOn(g.device, g.reqs) })
		}
		wg.Wait()
	}
	for _, io := range ios {
		if io.Err != nil {
			return io.Err
		}
	}
	return nil
}

// runOn executes reqs on device d and stores each one's result in its IO.
func (s *Set) runOn(d int, reqs []*hpdi.Request) {
	m, err := s.member(d)
	if err == nil {
		if reqs[0].Op != hpdi.OpRead {
			m.dirty.Store(true)
		}
		err = m.run(reqs)
	}
	for _, r := range reqs {
		io := r.User.(*IO)
		switch {
		case io.done && r.Err != nil:
			io.Err = fmt.Errorf("%s block %v of device %s: %w", r.Op, io.At, m.dev.Info().Name, r.Err)
		case !io.done:
			io.Err = fmt.Errorf("%s block %v: %w", r.Op, io.At, err)
		}
	}
}

func (s *Set) member(d int) (*member, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if d >= len(s.devs) {
		return nil, &block.CorruptError{What: "block address", Where: fmt.Sprintf("device index %d", d),
			Why: fmt.Sprintf("the pool has %d devices", len(s.devs))}
	}
	return s.devs[d], nil
}

var errLost = errors.New("request did not complete")

// run executes reqs on a queue that is this call's own meanwhile.
func (m *member) run(reqs []*hpdi.Request) error {
	q, err := m.take()
	if err != nil {
		return err
	}
	done := make([]*hpdi.Request, 0, min(len(reqs), queueDepth))
	for len(reqs) > 0 {
		n := min(len(reqs), queueDepth)
		if err := q.Submit(reqs[:n]...); err != nil {
			return errors.Join(err, q.Close())
		}
		if done, err = q.Wait(n, done[:0]); err != nil {
			return errors.Join(err, q.Close())
		}
		for _, r := range done {
			if io, ok := r.User.(*IO); ok {
				io.done = true
			}
		}
		if len(done) != n {
			return errors.Join(errLost, q.Close())
		}
		reqs = reqs[n:]
	}
	select {
	case m.free <- q:
		return nil
	default:
		return q.Close()
	}
}

func (m *member) take() (hpdi.Queue, error) {
	select {
	case q := <-m.free:
		return q, nil
	default:
		q, err := m.dev.NewQueue(queueDepth)
		if err != nil {
			return nil, fmt.Errorf("open a queue of device %s: %w", m.dev.Info().Name, err)
		}
		return q, nil
	}
}

// Sync makes all completed writes to all devices durable. A device whose sync
// failed counts as unsynced, so that the next Sync tries it again.
func (s *Set) Sync() error {
	s.mu.RLock()
	devs := s.devs
	s.mu.RUnlock()
	errs := make([]error, len(devs))
	var wg sync.WaitGroup
	for i, m := range devs {
		if planted.Has(planted.SyncFirstDeviceOnly) && i > 0 {
			continue
		}
		if !m.dirty.Swap(false) {
			continue
		}
		sync := func() {
			r := &hpdi.Request{Op: hpdi.OpFlush}
			err := m.run([]*hpdi.Request{r})
			if err == nil {
				err = r.Err
			}
			if err != nil {
				m.dirty.Store(true)
				errs[i] = fmt.Errorf("sync device %s: %w", m.dev.Info().Name, err)
			}
		}
		if len(devs) == 1 {
			sync()
			continue
		}
		wg.Go(sync)
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Queue opens a queue of device i for the caller's own use.
func (s *Set) Queue(i int) (hpdi.Queue, error) {
	m, err := s.member(i)
	if err != nil {
		return nil, err
	}
	return m.dev.NewQueue(queueDepth)
}

// ReleaseQueues closes the set's queues and leaves the devices open, for an
// owner that keeps them. No call may be under way.
func (s *Set) ReleaseQueues() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, m := range s.devs {
		for len(m.free) > 0 {
			errs = append(errs, (<-m.free).Close())
		}
	}
	return errors.Join(errs...)
}

// Close closes all queues and devices; no call may be under way.
func (s *Set) Close() error {
	errs := []error{s.ReleaseQueues()}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.devs {
		errs = append(errs, m.dev.Close())
	}
	s.devs = nil
	return errors.Join(errs...)
}
