package file

import (
	"errors"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// syncWorkers is the greatest number of goroutines, and so of threads blocked
// in the kernel, of one queue.
const syncWorkers = 8

// syncQueue serves requests with blocking calls on goroutines of its own.
//
// 0 <= inflight <= depth = cap(work), so that sending to work never blocks.
type syncQueue struct {
	hpdi.Plain
	dev    *device
	depth  int
	work   chan *hpdi.Request
	wg     sync.WaitGroup
	mem    []byte // the workers' iovecs
	closed bool   // used by the queue's goroutine only

	mu       sync.Mutex // guards what follows
	ended    sync.Cond  // a request has completed
	inflight int
	done     []*hpdi.Request // completed, not yet returned
}

func newSyncQueue(d *device, depth int) (hpdi.Queue, error) {
	workers := min(depth, syncWorkers)
	iov, mem, err := allocIovecs(workers * maxIovecs)
	if err != nil {
		return nil, err
	}
	q := &syncQueue{dev: d, depth: depth, work: make(chan *hpdi.Request, depth), mem: mem}
	q.ended.L = &q.mu
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
	for _, r := range reqs {
		r.Err = r.Check(q.dev.info)
		q.mu.Lock()
		if r.Err != nil || empty(r) {
			q.done = append(q.done, r)
			q.mu.Unlock()
			continue
		}
		for q.inflight == q.depth {
			q.ended.Wait()
		}
		q.inflight++
		q.mu.Unlock()
		q.work <- r
	}
	return nil
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
	return done, nil
}

// Close lets the workers finish what they have and waits for them.
func (q *syncQueue) Close() error {
	if q.closed {
		return nil
	}
	q.closed = true
	close(q.work)
	q.wg.Wait()
	q.dev.queueClosed()
	return hpdi.Free(q.mem)
}

// serve is one worker.
func (q *syncQueue) serve(iov []iovec) {
	var pin runtime.Pinner
	for r := range q.work {
		if err := q.dev.do(r, iov, &pin); err != nil {
			r.Err = q.dev.fail(err)
		}
		q.mu.Lock()
		q.inflight--
		q.done = append(q.done, r)
		q.mu.Unlock()
		q.ended.Signal()
	}
}

// do carries out one well-formed request with blocking calls.
func (d *device) do(r *hpdi.Request, iov []iovec, pin *runtime.Pinner) error {
	switch r.Op {
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
