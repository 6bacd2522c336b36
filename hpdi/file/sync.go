package file

import (
	"errors"
	"runtime"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// syncWorkers is the greatest number of goroutines, and so of threads blocked
// in the kernel, of one queue.
const syncWorkers = 8

// syncQueue serves requests with blocking calls on goroutines of its own.
//
//	0 <= waiting.n <= inflight <= depth
type syncQueue struct {
	dev    *device
	depth  int
	wg     sync.WaitGroup
	mem    []byte // the workers' iovecs
	closed bool   // used by the queue's goroutine only

	mu       sync.Mutex // guards what follows
	begun    sync.Cond  // a request waits for a worker, or the queue is being closed
	ended    sync.Cond  // a request has completed
	waiting  waiting    // those that no worker has begun
	inflight int        // they, and those that workers have
	done     []*hpdi.Request
	closing  bool
	event    hpdi.Signal // set while there is something in done
	timer    *time.Timer // calls expire at next; nil until a request has a deadline
	next     time.Time
}

func newSyncQueue(d *device, depth int) (hpdi.Queue, error) {
	workers := min(depth, syncWorkers)
	iov, mem, err := allocIovecs(workers * maxIovecs)
	if err != nil {
		return nil, err
	}
	q := &syncQueue{dev: d, depth: depth, mem: mem, waiting: waiting{ring: make([]*hpdi.Request, depth)}}
	q.begun.L, q.ended.L = &q.mu, &q.mu
	for w := range workers {
		own := iov[w*maxIovecs : (w+1)*maxIovecs]
		q.wg.Go(func() { q.serve(own) })
	}
	return q, nil
}

// Submit hands the requests to the workers.
func (q *syncQueue) Submit(reqs ...*hpdi.Request) error {
	if q.closed {
		return q.dev.fail(hpdi.ErrClosed)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, r := range reqs {
		r.Err = r.Check(q.dev.info)
		if r.Err != nil || empty(r) {
			q.completeLocked(r)
			continue
		}
		for q.inflight == q.depth {
			q.ended.Wait()
		}
		if !r.Deadline.IsZero() {
			if err := r.Late(time.Now()); err != nil {
				r.Err = q.dev.fail(err)
				q.completeLocked(r)
				continue
			}
			q.armLocked(r.Deadline)
		}
		q.inflight++
		q.waiting.push(r)
		q.begun.Signal()
	}
	return nil
}

// completeLocked puts r where Wait takes it.
func (q *syncQueue) completeLocked(r *hpdi.Request) {
	q.done = append(q.done, r)
	q.event.Set(true)
}

// empty says whether r is done by doing nothing.
func empty(r *hpdi.Request) bool { return r.Op != hpdi.OpFlush && r.Bytes() == 0 }

// Wait returns completed requests.
func (q *syncQueue) Wait(least int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	if q.closed {
		return done, q.dev.fail(hpdi.ErrClosed)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.done) < least && q.inflight > 0 {
		q.ended.Wait()
	}
	done = append(done, q.done...)
	clear(q.done) // the application owns the requests again
	q.done = q.done[:0]
	q.event.Set(false)
	return done, nil
}

// Cancel gives up those of reqs that no worker has begun.
func (q *syncQueue) Cancel(reqs ...*hpdi.Request) {
	if q.closed {
		return
	}
	q.giveUp(func(r *hpdi.Request) error {
		if slices.Contains(reqs, r) {
			return hpdi.ErrCanceled
		}
		return nil
	})
}

// giveUp completes the waiting requests for which why returns an error with that.
func (q *syncQueue) giveUp(why func(*hpdi.Request) error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.next = time.Time{}
	for range q.waiting.n { // each once: those that stay come back at the end
		r := q.waiting.pop()
		err := why(r)
		if err == nil {
			q.waiting.push(r)
			if !r.Deadline.IsZero() {
				q.armLocked(r.Deadline)
			}
			continue
		}
		r.Err = q.dev.fail(err)
		q.inflight--
		q.completeLocked(r)
	}
	q.ended.Broadcast()
}

// armLocked makes the timer go off at that time, or earlier.
func (q *syncQueue) armLocked(at time.Time) {
	if !q.next.IsZero() && !at.Before(q.next) {
		return
	}
	q.next = at
	if q.timer == nil {
		q.timer = time.AfterFunc(time.Until(at), q.expire)
		return
	}
	q.timer.Reset(time.Until(at))
}

// expire gives up what has waited beyond its deadline.
func (q *syncQueue) expire() {
	now := time.Now()
	q.giveUp(func(r *hpdi.Request) error { return r.Late(now) })
}

// Event returns a descriptor that is readable exactly while Wait(0) would return a
// request.
func (q *syncQueue) Event() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.event.Event()
}

// Close lets the workers finish what they have and waits for them.
func (q *syncQueue) Close() error {
	if q.closed {
		return nil
	}
	q.closed = true
	q.mu.Lock()
	q.closing = true
	q.begun.Broadcast()
	q.mu.Unlock()
	q.wg.Wait()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.timer != nil {
		q.timer.Stop()
	}
	q.event.Close()
	q.dev.queueClosed()
	return hpdi.Free(q.mem)
}

// serve is one worker.
func (q *syncQueue) serve(iov []iovec) {
	var pin runtime.Pinner
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		for q.waiting.n == 0 {
			if q.closing {
				return
			}
			q.begun.Wait()
		}
		r := q.waiting.pop()
		q.mu.Unlock()
		err := q.dev.do(r, iov, &pin)
		if err != nil {
			err = q.dev.fail(err)
		}
		q.mu.Lock()
		r.Err = err
		q.inflight--
		q.completeLocked(r)
		q.ended.Signal()
	}
}

// waiting is a queue of bounded length, first in first out.
type waiting struct {
	ring []*hpdi.Request
	at   int // the oldest
	n    int
}

func (w *waiting) push(r *hpdi.Request) {
	w.ring[(w.at+w.n)%len(w.ring)] = r
	w.n++
}

func (w *waiting) pop() *hpdi.Request {
	r := w.ring[w.at]
	w.ring[w.at] = nil // the application may own it soon
	w.at = (w.at + 1) % len(w.ring)
	w.n--
	return r
}

// do carries out one well-formed request with blocking calls.
func (d *device) do(r *hpdi.Request, iov []iovec, pin *runtime.Pinner) error {
	if !r.Deadline.IsZero() {
		if err := r.Late(time.Now()); err != nil {
			return err
		}
	}
	switch r.Op {
	case hpdi.OpStatus:
		return d.status(r)
	case hpdi.OpRead, hpdi.OpWrite:
		pinVectors(pin, r.Vec)
		defer pin.Unpin()
		return d.transfer(r, iov)
	case hpdi.OpFlush:
		return ignoringEINTR(func() error { return unix.Fdatasync(d.fd) })
	case hpdi.OpDiscard:
		if d.block {
			return d.discardNow(r.Offset, r.Length)
		}
		return d.fallocate(punchMode, r)
	case hpdi.OpWriteZeroes:
		mode := d.zeroRangeMode()
		err := d.fallocate(mode, r)
		if errors.Is(err, unix.EOPNOTSUPP) && mode == zeroMode {
			d.noZeroRange.Store(true)
			err = d.fallocate(punchMode, r)
		}
		return err
	}
	return hpdi.ErrUnsupported
}

// transfer moves all data of a read or write, in as many calls as it takes.
func (d *device) transfer(r *hpdi.Request, iov []iovec) error {
	trap, flags := uintptr(unix.SYS_PREADV), uintptr(0)
	switch {
	case r.Durable:
		trap, flags = unix.SYS_PWRITEV2, unix.RWF_DSYNC
	case r.Op == hpdi.OpWrite:
		trap = unix.SYS_PWRITEV
	}
	total := r.Bytes()
	for pos := int64(0); pos < total; {
		n := fillIovecs(iov, r.Vec, pos)
		off := uint64(r.Offset + pos)
		// The offset is passed as two longs, of which a 64-bit kernel takes
		// the first; the shift in two steps is 0 there.
		const bits = 8 * unsafe.Sizeof(uintptr(0))
		moved, _, errno := unix.Syscall6(trap, uintptr(d.fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(n),
			uintptr(off), uintptr(off>>(bits-1)>>1), flags)
		switch {
		case errno == unix.EINTR:
		case errno != 0:
			return errno
		case moved == 0:
			return endOfFile(r, pos)
		default:
			pos += int64(moved)
		}
	}
	return nil
}

func (d *device) fallocate(mode uint32, r *hpdi.Request) error {
	return ignoringEINTR(func() error { return unix.Fallocate(d.fd, mode, r.Offset, r.Length) })
}

// pinVectors keeps the vectors in place that lie in the Go heap; for others it
// does nothing.
func pinVectors(pin *runtime.Pinner, vec [][]byte) {
	for _, v := range vec {
		if len(v) > 0 {
			pin.Pin(unsafe.Pointer(unsafe.SliceData(v)))
		}
	}
}
