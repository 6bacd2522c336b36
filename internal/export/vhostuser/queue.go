package vhostuser

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/eventfd"
	"github.com/pollux-storage/pollux/internal/spin"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// batchSize is how many requests are taken before what is done of them is completed.
const batchSize = 16

// queue is a virtqueue of a connection. What has no other owner named is of the goroutine
// that answers messages while the queue does not run, and of the queue's own goroutine
// while it runs.
type queue struct {
	c     *client
	index int

	size    int
	addr    vhost.VringAddr
	hasAddr bool
	base    uint32
	enabled bool
	hasKick bool                    // or the front-end wants the ring to be looked at
	kick    atomic.Pointer[os.File] // nil if it has none
	call    atomic.Int32            // -1 if there is none; changed under mu
	errFD   atomic.Int32            // tells of an end by a mistake; -1 if there is none
	closing sync.Mutex              // held while call or errFD is closed, or drained by unstick; a leaf
	raw     syscall.RawConn         // of kick
	wait    waiter

	features virtio.Features
	sealed   bool      // changed under mu while the queue runs
	ring     uint64    // guest address of the descriptors of a packed queue
	dirty    *dirtyLog // nil while nothing is logged
	subs     []vhost.Submission
	poller   spin.Poller
	current  *request // that try is at
	nap      time.Duration
	stopping atomic.Bool // no more requests are taken
	running  bool        // of the goroutine that answers messages

	mu       sync.Mutex // guards what follows, and dev while the queue runs
	changed  *sync.Cond
	alive    bool // the goroutine is there
	inflight int  // requests that were taken and are not completed
	working  int  // those of them that workers have
	dev      virtio.Device
	split    *vhost.Split  // what is tracked of a split queue
	packed   *vhost.Packed // the same of a packed one
	track    tracker       // either of them, or nil
	requests []request
	free     []*request
	done     []*request // of one batch
	complete completion
	scratch  scratch
}

func newQueue(c *client, index int) *queue {
	q := &queue{c: c, index: index}
	q.call.Store(-1)
	q.errFD.Store(-1)
	q.changed = sync.NewCond(&q.mu)
	q.wait.init()
	return q
}

// setKick takes the eventfd that tells of requests, -1 if the ring is to be looked at.
func (q *queue) setKick(fd int) error {
	q.dropKick()
	q.hasKick = true
	if fd < 0 {
		return nil
	}
	f := os.NewFile(uintptr(fd), "kick")
	raw, err := f.SyscallConn()
	if err == nil {
		err = f.SetReadDeadline(time.Time{}) // which fails where the poller does not have it
	}
	if err != nil {
		_ = f.Close()
		return fmt.Errorf("queue %d: %w: its eventfd cannot be waited for: %w", q.index, errRule, err)
	}
	q.raw = raw
	q.kick.Store(f)
	return nil
}

func (q *queue) dropKick() {
	q.hasKick, q.raw = false, nil
	if f := q.kick.Swap(nil); f != nil {
		_ = f.Close()
	}
}

// setCall takes the eventfd that tells the driver of completions.
func (q *queue) setCall(fd int) {
	defer q.unstick()()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.swapFD(&q.call, fd)
	if fd >= 0 && q.dev != nil {
		q.notify() // what was completed while there was nobody to tell
	}
}

// swapFD puts an eventfd in the place of one that it closes. Whoever calls has mu.
func (q *queue) swapFD(of *atomic.Int32, fd int) {
	old := of.Swap(int32(fd))
	q.closing.Lock() // who drains it would read from whatever gets its number
	defer q.closing.Unlock()
	if old >= 0 {
		_ = unix.Close(int(old))
	}
}

// setErr takes the eventfd that tells of an end by a mistake, -1 for none.
func (q *queue) setErr(fd int) {
	defer q.unstick()()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.swapFD(&q.errFD, fd)
}

// run starts the queue if it can run.
func (q *queue) run() error {
	c := q.c
	enabled := q.enabled || !c.features.Has(vhost.FProtocolFeatures)
	if q.running || !enabled || !q.hasKick || !q.hasAddr || q.size == 0 || c.memory == nil || c.leaving.Load() != nil {
		return nil
	}
	if err := q.attach(); err != nil {
		return fmt.Errorf("queue %d: %w", q.index, err)
	}
	q.features, q.sealed, q.dirty = c.features, c.sealed(), nil
	if c.features.Has(vhost.FLogAll) {
		q.dirty = c.dirty.Load()
	}
	q.poller = spin.Poller{Max: max(c.s.o.Poll, 0)}
	q.running = true
	q.mu.Lock()
	q.alive = true // before others may settle it
	q.mu.Unlock()
	q.stopping.Store(false)
	if f := q.kick.Load(); f != nil {
		_ = f.SetReadDeadline(time.Time{})
	}
	c.s.count.queues.Add(1)
	go q.loop()
	if c.leaving.Load() != nil || c.ctx.Err() != nil {
		q.hush() // they may not have seen it
	}
	return nil
}

// attach makes the device's side of the ring, and finds what a dead back-end has left.
func (q *queue) attach() error {
	m, a, f := q.c.memory, q.addr, q.c.features
	if err := q.tracked(f.Has(virtio.FRingPacked)); err != nil {
		return err
	}
	if f.Has(virtio.FRingPacked) {
		dev, err := virtio.NewDevicePacked(m, q.size, f, a.Desc, a.Avail, a.Used, q.base)
		if err != nil {
			return err
		}
		if err := q.trackPacked(dev); err != nil {
			return err
		}
		q.dev = dev
		q.ring, _ = m.ToGuest(a.Desc) // where dev has found it
	} else {
		dev, err := virtio.NewDeviceSplit(m, q.size, f, a.Desc, a.Avail, a.Used, uint16(q.base))
		if err != nil {
			return err
		}
		if err := q.trackSplit(dev); err != nil {
			return err
		}
		q.dev = dev
	}
	if len(q.requests) != q.size {
		q.requests = make([]request, q.size)
		q.free = make([]*request, 0, q.size)
		q.done = make([]*request, 0, max(batchSize, q.size))
		for i := range q.requests {
			q.requests[i].q = q
			q.free = append(q.free, &q.requests[i])
		}
	}
	return nil
}

// setMemory tells a queue that runs of memory that was added.
func (q *queue) setMemory() {
	defer q.unstick()()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.dev.SetMemory(q.c.memory)
	q.sealed = q.c.sealed()
}

// hush lets the queue take no more requests. It may be called by anybody.
func (q *queue) hush() {
	q.stopping.Store(true)
	if f := q.kick.Load(); f != nil {
		_ = f.SetReadDeadline(time.Unix(1, 0))
	}
}

// settle waits until the queue's goroutine has ended and nothing is in flight.
func (q *queue) settle() {
	defer q.unstick()()
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.alive || q.inflight > 0 {
		q.changed.Wait()
	}
}

// pause stops the queue with nothing in flight; run goes on where it was.
func (q *queue) pause() {
	if !q.running {
		return
	}
	q.hush()
	q.settle()
	q.running = false
	q.base = q.dev.Base()
	q.dev = nil
	for i := range q.requests {
		q.requests[i].forget()
	}
	q.c.s.count.queues.Add(-1)
}

// stop ends the queue in good order: it can begin anew anywhere, with another kick.
func (q *queue) stop() {
	q.pause()
	if q.c.leaving.Load() == nil && q.c.ctx.Err() == nil && q.track != nil && q.subs == nil {
		q.track.Retire()
		q.split, q.packed, q.track = nil, nil, nil
	}
	q.dropKick()
	q.setCall(-1)
}

// retired reports whether the in-flight area says nothing of the queue.
func (q *queue) retired() bool { return q.track == nil }

func (q *queue) close() {
	q.dropKick()
	q.setCall(-1)
	q.setErr(-1)
}

// unstick makes sure that nobody who notifies the driver waits for it: a front-end could
// fill the counter of its eventfd. Call what it returns when that can be no more.
func (q *queue) unstick() func() {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		var r eventfd.Reader
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				q.closing.Lock()
				for _, fd := range []int32{q.call.Load(), q.errFD.Load()} {
					if fd >= 0 {
						r.Unstick(int(fd))
					}
				}
				q.closing.Unlock()
			}
		}
	}()
	return func() {
		close(done)
		<-ended
	}
}

// loop serves the queue until it is hushed or broken.
func (q *queue) loop() {
	defer func() {
		q.mu.Lock()
		q.alive = false
		q.changed.Broadcast()
		q.mu.Unlock()
	}()
	defer func() {
		if err := fault(recover()); err != nil {
			q.abandon()
			q.broken(err)
		}
	}()
	debug.SetPanicOnFault(true)
	if err := q.resubmit(); err != nil {
		q.broken(err)
		return
	}
	ready := func() bool { return q.stopping.Load() || q.dev.Ready() }
	for !q.stopping.Load() {
		n, err := q.batch()
		if err != nil {
			q.broken(err)
			return
		}
		if n > 0 || q.poller.Poll(ready) {
			q.nap = 50 * time.Microsecond
			continue
		}
		if !q.want(true) {
			q.sleep()
			q.poller.Woke()
		}
		q.want(false)
	}
}

// want tells the driver whether it shall notify.
func (q *queue) want(notice bool) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.dev.WantNotice(notice)
}

// sleep waits for the driver's notice, or for an end.
func (q *queue) sleep() {
	if q.raw == nil {
		// The front-end wants the ring to be looked at. How often is between its latency
		// and a processor.
		time.Sleep(min(q.nap, time.Millisecond))
		q.nap += 50 * time.Microsecond
		return
	}
	if q.wait.wait(q.raw) {
		q.c.s.count.kicks.Add(1)
	}
}

// batch takes requests and completes those that can be done at once. It returns how many it
// has taken.
func (q *queue) batch() (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.done = q.done[:0]
	n := 0
	var err error
	for n < batchSize {
		var r *request
		if r, err = q.fetch(); r == nil || err != nil {
			break
		}
		n++
		q.begin(r)
	}
	q.finish(q.done)
	return n, err
}

// begin does a request at once or gives it to a worker. Whoever calls has mu, and finishes
// the batch in q.done.
func (q *queue) begin(r *request) {
	q.current = r
	done := r.try()
	q.current = nil
	if done {
		q.done = append(q.done, r)
		return
	}
	q.working++
	if !q.c.pool.give(r) {
		r.abort()
		q.c.pool.give(r) // a worker stages it anew
	}
}

// fetch takes the next request and notes that it is in flight. It returns nil if there is
// none. Whoever calls has mu.
func (q *queue) fetch() (*request, error) {
	if len(q.free) == 0 {
		return nil, nil // the ring has no more either
	}
	r := q.free[len(q.free)-1]
	ok, err := q.dev.Next(&r.chain)
	if err != nil || !ok {
		return nil, err
	}
	switch {
	case q.split != nil:
		r.slot = r.chain.Head
		r.counter = q.split.Fetch(r.slot)
	case q.packed != nil:
		r.slot, r.counter = q.packed.Fetch(r.chain.Ring)
	}
	return r, q.took(r)
}

// took begins with a request that the device has.
func (q *queue) took(r *request) error {
	q.free = q.free[:len(q.free)-1]
	q.inflight++
	q.c.s.count.inflight.Add(1)
	if err := r.parse(); err != nil {
		q.release(r)
		return fmt.Errorf("request with head %d: %w", r.chain.Head, err)
	}
	return nil
}

// finish completes requests, and notifies the driver once. Whoever calls has mu.
func (q *queue) finish(done []*request) {
	if len(done) == 0 {
		return
	}
	for _, r := range done {
		r.seal()
		r.counted()
	}
	q.complete.begin(q, done)
	for q.complete.step() {
	}
	q.notify()
	for _, r := range done {
		q.release(r)
	}
}

// finishOne completes a request of a worker, unless the connection was cut meanwhile: ring
// and area may be another connection's soon, which finds the request in the area.
func (q *queue) finishOne(r *request) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.c.ctx.Err() != nil {
		q.release(r)
	} else {
		q.finish(append(q.done[:0], r))
	}
	q.working-- // last: where memory is gone finish does not come back, and drop follows
}

// notify tells the driver of what was completed, if it wants to know.
func (q *queue) notify() {
	fd := q.call.Load()
	if fd < 0 || !q.dev.NeedNotice() {
		return
	}
	q.c.s.count.calls.Add(1)
	eventfd.Count(int(fd))
}

// drop forgets a worker's request that is not completed: it stays in flight for the driver.
func (q *queue) drop(r *request) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.working--
	q.release(r)
}

// release has the request free for another one.
func (q *queue) release(r *request) {
	q.free = append(q.free, r)
	q.inflight--
	q.c.s.count.inflight.Add(-1)
	if q.inflight == 0 {
		q.changed.Broadcast()
	}
}

// abandon gives back what the request has that was under way when memory was gone.
func (q *queue) abandon() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if r := q.current; r != nil {
		q.current = nil
		r.abort()
	}
	// Those of the batch are lost with it; only those of workers will end.
	q.c.s.count.inflight.Add(int64(q.working - q.inflight))
	q.inflight = q.working
	q.changed.Broadcast()
}

// broken ends the connection.
func (q *queue) broken(err error) {
	err = fmt.Errorf("queue %d: %w", q.index, err)
	q.c.cut(err)
	q.mu.Lock()
	defer q.mu.Unlock()
	if fd := q.errFD.Load(); fd >= 0 && !errors.Is(err, errGone) {
		eventfd.Count(int(fd))
	}
}
