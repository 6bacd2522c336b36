package vhostuser

import (
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/spin"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// queue is a path to the device. It has a virtqueue, alone or with others.
type queue struct {
	d      *device
	v      *vring
	closed bool        // of the owner
	poller spin.Poller // of the owner
	ready  func() bool
	count  [8]byte // of the owner: what is read from an event descriptor

	// Guarded by vring.mu.
	cond   sync.Cond
	want   int  // how many are to be in done; 0: nobody waits
	asleep bool // who waits has to be woken
	flying int  // requests that are not in done
	done   []*hpdi.Request
	free   *operation // to be used again
	told   int        // event descriptor of this queue, -1: none
	rung   bool       // told is readable
	taking bool       // its owner waits, and will take what comes
	event  int        // what the application waits on, -1: none
}

// NewQueue returns a queue on the virtqueue that has the fewest. However deep it is said
// to be, it takes what is submitted, and puts into the virtqueue what has room there.
func (d *device) NewQueue(depth int) (hpdi.Queue, error) {
	if depth < 1 {
		return nil, fmt.Errorf("%s: queue depth %d is less than 1", d.path, depth)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, fmt.Errorf("%s: %w", d.path, hpdi.ErrClosed)
	}
	v := d.rings[0]
	for _, o := range d.rings {
		if len(o.queues) < len(v.queues) {
			v = o
		}
	}
	q := &queue{d: d, v: v, told: -1, event: -1, poller: spin.Poller{Max: d.o.Poll}}
	q.cond.L = &v.mu
	q.ready = q.look
	d.queues++
	v.mu.Lock()
	defer v.mu.Unlock()
	v.queues = append(v.queues, q)
	return q, nil
}

// kinds are the types of virtio's requests.
var kinds = [...]uint32{
	hpdi.OpRead: virtio.BlkIn, hpdi.OpWrite: virtio.BlkOut, hpdi.OpFlush: virtio.BlkFlushCache,
	hpdi.OpDiscard: virtio.BlkDiscardRange, hpdi.OpWriteZeroes: virtio.BlkWriteZeroRange,
}

// Submit puts requests into the virtqueue.
func (q *queue) Submit(reqs ...*hpdi.Request) error {
	if q.closed {
		return fmt.Errorf("%s: queue: %w", q.d.path, hpdi.ErrClosed)
	}
	info := q.d.info.Load()
	for _, r := range reqs {
		if r.Err = r.Check(*info); r.Err == nil && len(r.Vec) > 0 {
			r.Err = q.d.known(r)
		}
		if r.Err == nil && !r.Deadline.IsZero() {
			r.Err = r.Late(time.Now())
		}
	}
	v := q.v
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, r := range reqs {
		n := r.Bytes()
		if r.Err == nil {
			r.Err = v.dead
		}
		if r.Err != nil || n == 0 && r.Op != hpdi.OpFlush || r.Op == hpdi.OpFlush && !q.d.flush {
			q.done = append(q.done, r)
			q.toldLocked()
			continue
		}
		q.startLocked(r, n)
	}
	v.pumpLocked()
	if v.timed > 0 && v.leader != nil && v.leader.asleep {
		signal(v.call) // it has to know until when it may sleep
	}
	return nil
}

// startLocked puts a request at the end of those that are to go into the virtqueue.
func (q *queue) startLocked(r *hpdi.Request, n int64) {
	v, op := q.v, q.free
	if op == nil {
		op = &operation{}
	} else {
		q.free = op.next
	}
	*op = operation{q: q, r: r, kind: kinds[r.Op], n: n}
	q.flying++
	if v.first == nil {
		v.first = op
	} else {
		v.last.next = op
	}
	v.last = op
	if !r.Deadline.IsZero() {
		v.timed++
	}
}

// satisfiedLocked reports whether who waits for that many need not do so.
func (q *queue) satisfiedLocked(least int) bool { return len(q.done) >= least || q.flying == 0 }

// toldLocked lets whoever waits know that there is more in done.
func (q *queue) toldLocked() {
	if !q.taking {
		q.ringLocked()
	}
	if !q.asleep || !q.satisfiedLocked(q.want) {
		return
	}
	if q.v.leader == q {
		signal(q.v.call)
	} else {
		q.cond.Signal()
	}
}

// ringLocked makes the queue's own event descriptor readable, if there is one.
func (q *queue) ringLocked() {
	if q.told >= 0 && !q.rung {
		q.rung = true
		signal(q.told)
	}
}

// look reports whether something has changed for who waits.
func (q *queue) look() bool {
	if !q.v.mu.TryLock() {
		return false
	}
	defer q.v.mu.Unlock()
	return q.v.drv.Ready() || q.satisfiedLocked(q.want)
}

// Wait returns requests that are complete.
func (q *queue) Wait(least int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	if q.closed {
		return done, fmt.Errorf("%s: queue: %w", q.d.path, hpdi.ErrClosed)
	}
	v := q.v
	v.mu.Lock()
	defer v.mu.Unlock()
	if q.rung {
		q.rung = false
		drain(q.told)
	}
	q.taking = true
	q.waitLocked(least)
	q.taking = false
	done = append(done, q.done...)
	clear(q.done) // the application owns the requests again
	q.done = q.done[:0]
	return done, nil
}

// waitLocked waits until there are that many in done. Of those that wait at a virtqueue one
// looks at it and sleeps on its event descriptor, and wakes the others.
func (q *queue) waitLocked(least int) {
	v := q.v
	if v.events > 0 {
		drain(v.call)
	}
	v.harvestLocked()
	next := v.lateLocked()
	if v.events > 0 && !next.IsZero() && v.leader != nil && v.leader.asleep {
		signal(v.call) // the notice may have told it until when it may sleep
	}
	q.want = least
	for !q.satisfiedLocked(least) {
		if v.leader != nil {
			q.asleep = true
			q.cond.Wait()
			q.asleep = false
		} else {
			v.leader = q
			v.mu.Unlock()
			found := q.poller.Poll(q.ready)
			v.mu.Lock()
			next = v.lateLocked() // there may be others by now
			if !found && !q.satisfiedLocked(least) && v.drv.Arm(q.needLocked(least)) {
				q.asleep = true
				v.mu.Unlock()
				q.sleep(next)
				q.poller.Woke()
				v.mu.Lock()
				q.asleep = false
				v.drv.Disarm()
			}
			v.leader = nil
		}
		v.harvestLocked()
		v.lateLocked()
	}
	q.want = 0
	if v.leader == nil {
		for _, o := range v.queues {
			if o.asleep {
				o.cond.Signal() // the next one to look
				break
			}
		}
	}
	for v.events > 0 && !v.drv.Arm(1) && v.dead == nil {
		v.harvestLocked()
	}
}

// needLocked is after how many chains a notice is wanted. Each request that is missing is
// at least one; others who wait, and requests that there was no room for, are not to wait
// for all of them.
func (q *queue) needLocked(least int) int {
	switch v := q.v; {
	case len(v.queues) > 1:
		return 1
	case v.first != nil:
		return 1 + v.drv.InFlight()/4
	default:
		return max(1, min(least-len(q.done), v.drv.InFlight()))
	}
}

// sleep waits for a notice, up to a time if that is not zero.
func (q *queue) sleep(until time.Time) {
	wait := q.v.wait
	if !until.IsZero() {
		_ = wait.SetReadDeadline(until) // an event descriptor can be waited for
		defer func() { _ = wait.SetReadDeadline(time.Time{}) }()
	}
	if _, err := wait.Read(q.count[:]); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		panic(fmt.Sprintf("vhostuser: wait on an event descriptor: %v", err)) // it is ours, and open
	}
}

// Cancel ends requests that are in no back-end's hands.
func (q *queue) Cancel(reqs ...*hpdi.Request) {
	if q.closed {
		return
	}
	q.v.mu.Lock()
	defer q.v.mu.Unlock()
	for _, r := range reqs {
		q.v.endLocked(func(op *operation) error {
			if op.r != r || op.q != q {
				return nil
			}
			return fmt.Errorf("%s: %w", q.d.path, hpdi.ErrCanceled)
		})
	}
	q.v.pumpLocked() // there may be room for those behind
}

// Event returns a descriptor that is readable when something is complete.
func (q *queue) Event() int {
	q.v.mu.Lock()
	defer q.v.mu.Unlock()
	if q.event >= 0 || q.closed {
		return q.event
	}
	if err := q.openEventLocked(); err != nil {
		return -1 // there are no descriptors left; the next call tries again
	}
	if len(q.done) > 0 || !q.v.drv.Arm(1) {
		q.ringLocked()
	}
	return q.event
}

// openEventLocked makes one descriptor of two: that of the virtqueue, and the queue's own,
// for what somebody else has found in the virtqueue.
func (q *queue) openEventLocked() error {
	told, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return err
	}
	event, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	for _, fd := range []int{told, q.v.call} {
		if err == nil {
			err = unix.EpollCtl(event, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
		}
	}
	if err != nil {
		_, _ = unix.Close(told), unix.Close(event)
		return err
	}
	q.told, q.event = told, event
	q.v.events++
	return nil
}

// Close waits for what is under way and frees the queue.
func (q *queue) Close() error {
	if q.closed {
		return nil
	}
	q.closed = true
	v := q.v
	v.mu.Lock()
	q.waitLocked(math.MaxInt)
	for i, o := range v.queues {
		if o == q {
			v.queues = append(v.queues[:i], v.queues[i+1:]...)
			break
		}
	}
	if q.event >= 0 {
		v.events--
		_, _ = unix.Close(q.event), unix.Close(q.told)
		q.event, q.told = -1, -1
	}
	q.done, q.free = nil, nil
	v.mu.Unlock()
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	q.d.queues--
	return nil
}
