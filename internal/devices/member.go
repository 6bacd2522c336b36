package devices

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// member is a device of a set, and who uses it.
type member struct {
	// users counts who uses dev, which stays open for them. With memberGone, dev is not the
	// set's any more, or nil; other, which is set before, says that another member is in its
	// place.
	users atomic.Int64
	other bool
	idle  chan struct{} // holds a token when nobody has used dev since it was gone
	dev   hpdi.Device
	index int
	free  chan *queue
	limit *limiter
	dirty atomic.Bool // written since the last sync began
	errs  struct{ reads, writes, corrupt atomic.Uint64 }
	ended struct{ reads, others atomic.Uint64 } // requests that have ended
	// unproved is what the first request waits for, nil when there is nothing to wait for.
	unproved atomic.Pointer[proof]
}

// queue is a queue of a device with what a call needs to use it.
type queue struct {
	hpdi.Queue
	reqs, done []*hpdi.Request
}

func newMember(d hpdi.Device, i int) *member {
	return &member{dev: d, index: i, free: make(chan *queue, idle), limit: newLimiter(), idle: make(chan struct{}, 1)}
}

// newGap returns an index without a device.
func newGap(i int) *member {
	m := newMember(nil, i)
	m.users.Store(memberGone)
	return m
}

// memberGone is in users of a member whose device is not the set's any more.
const memberGone = 1 << 32

// enter keeps the device of a member open until leave is called.
func (m *member) enter() error {
	if m.users.Add(1) >= memberGone {
		m.leave()
		return &block.CorruptError{What: "block address", Where: fmt.Sprintf("device index %d", m.index), Why: "that device was removed from the pool"}
	}
	if p := m.unproved.Load(); p != nil {
		if err := p.wait(); err != nil {
			m.leave()
			return err
		}
		m.unproved.Store(nil)
	}
	return nil
}

func (m *member) leave() {
	if m.users.Add(-1) == memberGone {
		select {
		case m.idle <- struct{}{}:
		default:
		}
	}
}

// end lets nobody use the device any more and returns once nobody does. It waits as for a
// device, which a simulated clock must see: so it is no lock.
func (m *member) end() {
	if m.users.Add(memberGone) > memberGone {
		<-m.idle
	}
}

func (m *member) releaseQueues() error {
	var errs []error
	for len(m.free) > 0 {
		errs = append(errs, (<-m.free).Close())
	}
	return errors.Join(errs...)
}

// failed counts a request that failed.
func (m *member) failed(op hpdi.Op) {
	if op == hpdi.OpRead {
		m.errs.reads.Add(1)
	} else {
		m.errs.writes.Add(1)
	}
}

var errLost = errors.New("request did not complete")

// run executes prepared ios on a queue that is this call's own meanwhile. The caller has
// entered the member.
func (m *member) run(ios []*IO) error {
	q, err := m.take()
	if err != nil {
		return err
	}
	for len(ios) > 0 {
		// Half of the limit, so that others need not wait until all is done.
		part, n := cut(ios, m.limit.limit()/2)
		ios = ios[len(part):]
		m.limit.acquire(n)
		err := q.do(part)
		m.limit.release(n)
		if part[0].Op == hpdi.OpRead {
			m.ended.reads.Add(uint64(len(part)))
		} else {
			m.ended.others.Add(uint64(len(part)))
		}
		if err != nil {
			return errors.Join(err, q.Close())
		}
	}
	select {
	case m.free <- q:
		return nil
	default:
		return q.Close()
	}
}

// cut returns the first of ios that fit a queue and have at most the given
// bytes, but at least one, and their bytes.
func cut(ios []*IO, most int64) (part []*IO, bytes int64) {
	for i, io := range ios {
		var n int64
		if io.Op != hpdi.OpDiscard { // which moves nothing
			n = io.req.Bytes()
		}
		if i == queueDepth || i > 0 && bytes+n > most {
			return ios[:i], bytes
		}
		bytes += n
	}
	return ios, bytes
}

// do executes prepared ios, no more than fit the queue.
func (q *queue) do(ios []*IO) (err error) {
	q.reqs = q.reqs[:0]
	for _, io := range ios {
		q.reqs = append(q.reqs, &io.req)
	}
	// Until the next use nothing shall keep the callers' memory alive.
	defer func() {
		clear(q.reqs)
		clear(q.done)
	}()
	if err := q.Submit(q.reqs...); err != nil {
		return err
	}
	if q.done, err = q.Wait(len(ios), q.done[:0]); err != nil {
		return err
	}
	for _, r := range q.done {
		if io, ok := r.User.(*IO); ok {
			io.done = true
		}
	}
	if len(q.done) != len(ios) {
		return errLost
	}
	return nil
}

func (m *member) take() (*queue, error) {
	select {
	case q := <-m.free:
		return q, nil
	default:
		q, err := m.dev.NewQueue(queueDepth)
		if err != nil {
			return nil, fmt.Errorf("open a queue of device %s: %w", m.dev.Info().Name, err)
		}
		return &queue{Queue: q}, nil
	}
}
