package file

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// openRings keeps every open queue reachable. The kernel writes to memory that
// only a queue knows of; a queue that the application forgot to close must
// therefore leak rather than be collected.
var openRings sync.Map

// maxTries bounds how often an operation is handed to the kernel again that it
// gave back undone.
const maxTries = 100

// aside marks the user data of entries that belong to no slot: the kernel's answers to
// them are of no interest.
const aside = 1 << 63

// slot is a request in flight, and its iovecs.
type slot struct {
	req     *hpdi.Request
	iov     []iovec
	timeout *timespec
	pin     runtime.Pinner
	pinned  bool
	stopped bool   // the application has cancelled it
	pos     int64  // bytes transferred so far
	mode    uint32 // of the fallocate in flight
	tries   int
}

// timespec is the kernel's struct __kernel_timespec.
type timespec struct{ sec, nsec int64 }

func (t *timespec) address() uint64 { return uint64(uintptr(unsafe.Pointer(t))) }

// uringQueue serves requests with a ring of its own. A request holds a slot
// from Submit to its completion. All that time it has one entry in the ring, and
// one for its timeout if it has a deadline, so entries for two times depth
// suffice, and for those of Cancel, which finds none of these left:
//
//	ring.unsubmitted() <= 2 * (depth - len(free)) <= 2 * depth
//
// Results are twice as many as entries: of each slot its request's, its timeout's,
// one of a Cancel, and one of a timeout that comes late.
type uringQueue struct {
	dev   *device
	ring  *ring
	mem   []byte                 // the slots' iovecs and timeouts
	fixed atomic.Pointer[pieces] // registered memory; Register and Unregister store it
	late  lateChanges            // what the thread of a bound ring has yet to register
	event ringEvent
	slot  []slot
	free  []uint32        // slots without a request
	done  []*hpdi.Request // completed, not yet returned
	err   error           // why the ring no longer works
	shut  bool            // closed
}

func newURingQueue(d *device, depth int) (hpdi.Queue, error) {
	r, err := newRing(2*depth, d.opts.Thread, d.opts.Block)
	if err != nil {
		return nil, err
	}
	// A timeout is as long as an iovec.
	iov, mem, err := allocIovecs(depth * (maxIovecs + 1))
	if err != nil {
		return nil, errors.Join(err, r.close())
	}
	r.poll.Max = d.opts.Poll
	if !d.lock && d.opts.Fixed != FixedOff {
		r.registerFile(d.fd)
	}
	q := &uringQueue{dev: d, ring: r, mem: mem, slot: make([]slot, depth), free: make([]uint32, depth)}
	for i := range q.slot {
		q.slot[i].iov = iov[i*maxIovecs : (i+1)*maxIovecs]
		q.slot[i].timeout = (*timespec)(unsafe.Pointer(&iov[depth*maxIovecs+i]))
		q.free[i] = uint32(depth - 1 - i)
	}
	openRings.Store(q, nil)
	return q, nil
}

var _ [unsafe.Sizeof(iovec{})]byte = [unsafe.Sizeof(timespec{})]byte{}

// usable returns why the queue cannot be used, or nil.
func (q *uringQueue) usable() error {
	if q.shut {
		return q.dev.fail(hpdi.ErrClosed)
	}
	return q.err
}

func (q *uringQueue) inflight() int { return len(q.slot) - len(q.free) }

// Submit hands the requests to the kernel, with one call for all that fit.
func (q *uringQueue) Submit(reqs ...*hpdi.Request) error {
	if err := q.usable(); err != nil {
		return err
	}
	defer q.show()
	if err := q.enterThread(); err != nil {
		q.refuse(reqs, err)
		return err
	}
	for i, r := range reqs {
		if r.Err = r.Check(q.dev.info); r.Err == nil && r.Op == hpdi.OpStatus {
			r.Err = q.dev.statusNow(r)
		}
		if r.Err != nil || r.Op == hpdi.OpStatus || empty(r) {
			q.done = append(q.done, r)
			continue
		}
		for len(q.free) == 0 {
			if err := q.advance(1); err != nil {
				q.refuse(reqs[i:], err)
				return err
			}
		}
		q.start(r)
	}
	return q.push()
}

// refuse completes requests with the error for which the queue does not take them.
func (q *uringQueue) refuse(reqs []*hpdi.Request, err error) {
	for _, r := range reqs {
		r.Err = err
		q.done = append(q.done, r)
	}
}

// Wait returns completed requests.
func (q *uringQueue) Wait(least int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	if q.shut {
		return done, q.usable()
	}
	err := q.await(least)
	done = append(done, q.done...)
	clear(q.done) // the application owns the requests again
	q.done = q.done[:0]
	q.show()
	return done, err
}

// show keeps the event descriptor true.
func (q *uringQueue) show() { q.event.done.Set(len(q.done) > 0 || q.ring.deferred()) }

// Event returns a descriptor that is readable while Wait(0) would return a request, and
// sometimes once in vain: when a request has come back that is to go on.
func (q *uringQueue) Event() int {
	if q.event.epoll == 0 && q.usable() == nil {
		source, err := q.ring.source()
		if err == nil {
			err = q.event.open(source)
		}
		if err != nil {
			return -1
		}
		q.show() // of what came before
	}
	if q.event.epoll == 0 {
		return -1
	}
	return q.event.epoll
}

// await waits until least requests are done, or none is in flight.
func (q *uringQueue) await(least int) error {
	if q.err != nil {
		return q.err
	}
	if errno := q.ring.collect(); errno != 0 && errno != unix.EINTR {
		return q.refused(errno)
	}
	q.ring.quiet()
	q.reap()
	for missing := least - len(q.done); missing > 0 && q.inflight() > 0; missing = least - len(q.done) {
		if err := q.advance(min(missing, q.inflight())); err != nil {
			return err
		}
	}
	return q.push() // what reap had to hand in again
}

// Close waits for what is in flight and frees the ring. If the ring is broken,
// nobody knows what the kernel still does; then its memory and the device stay
// as they are for the life of the process.
func (q *uringQueue) Close() error {
	if q.shut {
		return nil
	}
	for q.inflight() > 0 {
		if err := q.advance(1); errors.Is(err, ErrThread) {
			return err // its own thread may close it
		} else if err != nil {
			q.shut = true
			q.dev.forget(q)
			q.event.close()
			return fmt.Errorf("close queue with %d requests in flight: %w", q.inflight(), err)
		}
	}
	q.shut = true
	q.dev.forget(q)
	q.event.close()
	err := errors.Join(q.ring.close(), hpdi.Free(q.mem))
	openRings.Delete(q)
	q.dev.queueClosed()
	if err != nil {
		return fmt.Errorf("%s: close queue: %w", q.dev.info.Name, err)
	}
	return nil
}

// push hands prepared entries to the kernel without waiting for results.
func (q *uringQueue) push() error {
	for q.err == nil && q.ring.unsubmitted() > 0 {
		if err := q.advance(0); err != nil {
			return err
		}
	}
	return q.err
}

// advance hands prepared entries to the kernel, waits for least results and
// takes all there are.
func (q *uringQueue) advance(least int) error {
	if q.err != nil {
		return q.err
	}
	var errno unix.Errno
	if q.ring.unsubmitted() > 0 {
		errno = q.ring.submit()
	}
	// What the kernel has not taken yet would never complete.
	if least > 0 && errno == 0 && q.ring.unsubmitted() == 0 {
		errno = q.ring.wait(least)
	}
	before := len(q.free)
	q.reap()
	switch errno {
	case 0, unix.EINTR:
		return nil
	case unix.EAGAIN, unix.EBUSY:
		// The kernel is short of memory. Completions free some.
		if len(q.free) == before {
			time.Sleep(time.Millisecond)
		}
		return nil
	}
	return q.refused(errno)
}

// refused takes back what the kernel has not taken, and says what it has said. The queue
// works no more, unless that was a wrong thread.
func (q *uringQueue) refused(errno unix.Errno) error {
	why := fmt.Errorf("io_uring no longer takes requests: %w", errno)
	err := q.dev.fail(why)
	if q.ring.bound != ringFree && errno == unix.EEXIST {
		why = ErrThread
		err = q.dev.fail(why)
	} else {
		q.err = err
	}
	q.ring.takeBack(func(data uint64) {
		if data&aside == 0 {
			q.finish(uint32(data), why)
		}
	})
	return err
}

// reap takes the results that are there.
func (q *uringQueue) reap() {
	for {
		c, ok := q.ring.take()
		if !ok {
			return
		}
		if c.userData&aside == 0 {
			q.result(uint32(c.userData), c.res)
		}
	}
}

// start gives r a slot and prepares its first entry.
func (q *uringQueue) start(r *hpdi.Request) {
	i := q.free[len(q.free)-1]
	q.free = q.free[:len(q.free)-1]
	s := &q.slot[i]
	s.req, s.pos, s.tries, s.stopped = r, 0, 0, false
	q.issue(i)
}

// issue prepares the entry for what is left of the request in slot i.
func (q *uringQueue) issue(i uint32) {
	s := &q.slot[i]
	r := s.req
	if err := s.over(); err != nil {
		q.finish(i, err)
		return
	}
	if r.Op == hpdi.OpDiscard && q.dev.block && q.dev.noAsyncDiscard.Load() {
		q.finish(i, q.dev.discardNow(r.Offset, r.Length))
		return
	}
	e := q.ring.next()
	e.userData = uint64(i)
	if q.ring.fixedFile {
		e.flags = ringFixedFile
	} else {
		e.fd = int32(q.dev.fd)
	}
	switch r.Op {
	case hpdi.OpRead, hpdi.OpWrite:
		q.transfer(e, s)
	case hpdi.OpFlush:
		e.opcode, e.opFlags = ringOpFsync, ringFsyncDatasync
	case hpdi.OpDiscard:
		if q.dev.block {
			e.opcode, e.off = ringOpCommand, blockCommandDiscard
			e.addr, e.addr3 = uint64(r.Offset), uint64(r.Length)
			break
		}
		s.mode = punchMode
		e.opcode, e.off, e.addr, e.len = ringOpFallocate, uint64(r.Offset), uint64(r.Length), s.mode
	case hpdi.OpWriteZeroes:
		s.mode = q.dev.zeroRangeMode()
		e.opcode, e.off, e.addr, e.len = ringOpFallocate, uint64(r.Offset), uint64(r.Length), s.mode
	}
	if !r.Deadline.IsZero() {
		q.limit(e, s)
	}
}

// transfer makes e an entry that moves what is left of the data of s.
func (q *uringQueue) transfer(e *sqe, s *slot) {
	r := s.req
	e.off = uint64(r.Offset + s.pos)
	n := fillIovecs(s.iov, r.Vec, s.pos)
	index, fixed := q.pieces().findAll(s.iov[:n])
	fixed = fixed && (n == 1 || q.ring.knows.vectorsFixed)
	if n == 1 { // spares the kernel reading the array
		e.opcode, e.addr, e.len = ringOpRead, uint64(s.iov[0].base), uint32(s.iov[0].len)
		if fixed {
			e.opcode = ringOpReadFixed
		}
	} else {
		e.opcode, e.addr, e.len = ringOpReadv, uint64(uintptr(unsafe.Pointer(&s.iov[0]))), uint32(n)
		if fixed {
			e.opcode = ringOpReadvFixed
		}
	}
	if fixed {
		e.bufIndex = index
	} else if !s.pinned {
		pinVectors(&s.pin, r.Vec)
		s.pinned = true
	}
	if r.Op == hpdi.OpWrite {
		e.opcode++ // each write follows its read
		if r.Durable {
			e.opFlags = unix.RWF_DSYNC
		}
	}
}

// result handles what the kernel says of slot i: the request is done, or goes
// on.
func (q *uringQueue) result(i uint32, res int32) {
	s := &q.slot[i]
	if res < 0 {
		q.failed(i, unix.Errno(-res))
		return
	}
	if s.req.Op != hpdi.OpRead && s.req.Op != hpdi.OpWrite {
		q.finish(i, nil)
		return
	}
	if res == 0 {
		q.finish(i, endOfFile(s.req, s.pos))
		return
	}
	if s.pos += int64(res); s.pos < s.req.Bytes() {
		s.tries = 0
		q.issue(i)
		return
	}
	q.finish(i, nil)
}

// failed handles an error of slot i: some mean that there is another way.
func (q *uringQueue) failed(i uint32, errno unix.Errno) {
	s := &q.slot[i]
	switch errno {
	case unix.EINTR, unix.EAGAIN, unix.ECANCELED:
		// Cancelled is what the application has given up, or work that a thread
		// left behind when it exited. Threads come and go under goroutines.
		if s.tries++; s.tries < maxTries {
			q.issue(i)
			return
		}
	case unix.EOPNOTSUPP, unix.EINVAL, unix.EBUSY:
		if s.req.Op == hpdi.OpDiscard && q.dev.block {
			// Before Linux 6.12 discard is an ioctl only, which the ring
			// cannot carry. Later ones do not wait for cached pages that are
			// in use (EBUSY). If neither was the reason, the ioctl will say.
			err := q.dev.discardNow(s.req.Offset, s.req.Length)
			if err == nil && errno != unix.EBUSY {
				q.dev.noAsyncDiscard.Store(true)
			}
			q.finish(i, err)
			return
		}
		if s.req.Op == hpdi.OpWriteZeroes && s.mode == zeroMode {
			q.dev.noZeroRange.Store(true)
			q.issue(i)
			return
		}
	}
	q.finish(i, errno)
}

// finish completes the request in slot i and frees the slot.
func (q *uringQueue) finish(i uint32, err error) {
	s := &q.slot[i]
	if err != nil {
		s.req.Err = q.dev.fail(err)
	}
	if s.pinned {
		s.pin.Unpin()
		s.pinned = false
	}
	q.done = append(q.done, s.req)
	s.req = nil
	q.free = append(q.free, i)
}
