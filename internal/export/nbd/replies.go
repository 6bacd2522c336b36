package nbd

import (
	"net"
	"sync"
	"syscall"
	"time"
)

// replies is the sending side of a connection: a queue of segments and the
// account of what is in flight.
//
// writing says that somebody writes to the socket: the reader or a worker
// without blocking, or the writer goroutine. It passes on under mu, and only
// its holder touches the socket, the vector and the head of the queue.
type replies struct {
	nc      net.Conn
	raw     syscall.RawConn // nil: all is left to the writer goroutine
	timeout time.Duration   // for one blocking write
	onError func(error)     // called once, when the client is found gone or stuck
	wake    chan struct{}   // tells the writer goroutine that writing is its
	vec     vector
	writeFn func(uintptr) bool // r.writev, made once
	wrote   int
	wroteE  syscall.Errno

	mu       sync.Mutex
	changed  sync.Cond // the flight shrank, writing ended or err was set
	queue    []*segment
	writing  bool
	err      error // nothing can be sent any more
	waiting  int   // goroutines in changed.Wait
	requests int   // in flight
	bytes    int64
	sent     int64

	maxRequests int
	maxBytes    int64
}

func newReplies(nc net.Conn, l Limits, onError func(error)) *replies {
	r := &replies{
		nc: nc, raw: rawConn(nc), timeout: l.Reply, onError: onError,
		wake:        make(chan struct{}, 1),
		maxRequests: l.Requests, maxBytes: l.Bytes,
	}
	r.changed.L = &r.mu
	r.writeFn = r.writev
	return r
}

// fullLocked reports whether a request of n bytes has to wait.
func (r *replies) fullLocked(n int64) bool {
	return r.requests >= r.maxRequests || r.bytes > 0 && r.bytes+n > r.maxBytes
}

// tryAcquire is acquire for a flight that has room; otherwise it does nothing
// and returns false.
func (r *replies) tryAcquire(n int64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil || r.fullLocked(n) {
		return false
	}
	r.requests++
	r.bytes += n
	return true
}

// acquire takes one request of n bytes into flight and waits while the flight
// is full. An empty flight takes any request.
func (r *replies) acquire(n int64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.err == nil && r.fullLocked(n) {
		r.waitLocked()
	}
	if r.err != nil {
		return r.err
	}
	r.requests++
	r.bytes += n
	return nil
}

// throttle waits while replies that the client has not read fill the flight.
func (r *replies) throttle() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.err == nil && r.bytes > r.maxBytes {
		r.waitLocked()
	}
}

// release takes a request that gets no reply out of flight.
func (r *replies) release(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.landLocked(1, n)
}

func (r *replies) landLocked(requests int, n int64) {
	r.requests -= requests
	r.bytes -= n
	if r.requests < 0 || r.bytes < 0 {
		panic("nbd: more requests left the flight than entered it")
	}
	r.signalLocked()
}

func (r *replies) waitLocked() {
	r.waiting++
	r.changed.Wait()
	r.waiting--
}

func (r *replies) signalLocked() {
	if r.waiting > 0 {
		r.changed.Broadcast()
	}
}

// send queues a segment and writes what the socket takes.
func (r *replies) send(s *segment) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		r.dropLocked(s)
		return
	}
	r.queue = append(r.queue, s)
	if !r.writing {
		r.writing = true
		r.pumpLocked()
	}
}

// sendBatch sends the reader's batch. It returns true when all of it has left
// and the reader can go on with the segment; otherwise the segment is queued.
func (r *replies) sendBatch(s *segment) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		s.data = nil
		return true
	}
	if r.writing || r.raw == nil {
		s.bytes = int64(len(s.data))
		r.bytes += s.bytes
		r.queue = append(r.queue, s)
		if !r.writing {
			r.writing = true
			r.pumpLocked()
		}
		return false
	}
	r.writing = true
	r.mu.Unlock()
	r.vec.add(s.data)
	n, err := r.try()
	r.mu.Lock()
	r.sent += int64(n)
	if n < len(s.data) {
		s.data = s.data[n:]
		s.bytes = int64(len(s.data))
		r.bytes += s.bytes
		r.queue = append(r.queue, nil)
		copy(r.queue[1:], r.queue)
		r.queue[0] = s
		if err != nil {
			r.failLocked(err)
		} else {
			r.wake <- struct{}{}
		}
		return false
	}
	s.data = nil
	if len(r.queue) > 0 {
		r.pumpLocked()
		return true
	}
	r.writing = false
	r.signalLocked()
	return true
}

// pumpLocked writes the queue until it is empty or the socket is full, and
// then leaves the rest to the writer goroutine. writing must be the caller's.
func (r *replies) pumpLocked() {
	for len(r.queue) > 0 {
		if r.raw == nil {
			r.wake <- struct{}{}
			return
		}
		total := 0
		for _, s := range r.queue {
			if !r.vec.add(s.data) {
				break
			}
			total += len(s.data)
		}
		r.mu.Unlock()
		n, err := r.try()
		r.mu.Lock()
		r.advanceLocked(n)
		if err != nil {
			r.failLocked(err)
			return
		}
		if n < total {
			r.wake <- struct{}{}
			return
		}
	}
	r.writing = false
	r.signalLocked()
}

// advanceLocked takes n written bytes off the queue.
func (r *replies) advanceLocked(n int) {
	r.sent += int64(n)
	i := 0
	for ; i < len(r.queue); i++ {
		s := r.queue[i]
		if n < len(s.data) {
			s.data = s.data[n:]
			break
		}
		n -= len(s.data)
		r.dropLocked(s)
	}
	rest := copy(r.queue, r.queue[i:])
	clear(r.queue[rest:])
	r.queue = r.queue[:rest]
}

// dropLocked ends a segment's life.
func (r *replies) dropLocked(s *segment) {
	requests, n := s.requests, s.bytes
	s.release()
	r.landLocked(requests, n)
}

// failLocked gives up on the client. writing must be the caller's, and ends.
func (r *replies) failLocked(err error) {
	r.err = err
	for _, s := range r.queue {
		r.dropLocked(s)
	}
	clear(r.queue)
	r.queue = r.queue[:0]
	r.writing = false
	r.changed.Broadcast()
	r.mu.Unlock()
	r.onError(err)
	r.mu.Lock()
}

// try writes the vector without blocking and clears it.
func (r *replies) try() (int, error) {
	err := r.raw.Write(r.writeFn)
	r.vec.clear()
	switch {
	case err != nil:
		return 0, err
	case r.wroteE == syscall.EAGAIN:
		return 0, nil
	case r.wroteE != 0:
		return 0, r.wroteE
	}
	return r.wrote, nil
}

func (r *replies) writev(fd uintptr) bool {
	r.wrote, r.wroteE = r.vec.call(syscall.SYS_WRITEV, fd)
	return true
}

// writer is the writer goroutine: it takes over when the socket is full, and
// always under TLS. It ends when wake is closed.
func (r *replies) writer() {
	for range r.wake {
		r.mu.Lock()
		for len(r.queue) > 0 {
			s := r.queue[0]
			piece := s.data[:min(len(s.data), 1<<20)]
			r.mu.Unlock()
			// A failure to set the deadline is that of a closed socket.
			_ = r.nc.SetWriteDeadline(time.Now().Add(r.timeout))
			n, err := r.nc.Write(piece)
			r.mu.Lock()
			r.advanceLocked(n)
			if err != nil {
				r.failLocked(err)
				break
			}
		}
		if r.writing {
			r.mu.Unlock()
			_ = r.nc.SetWriteDeadline(time.Time{})
			r.mu.Lock()
			if len(r.queue) > 0 { // somebody queued meanwhile
				r.wake <- struct{}{}
			} else {
				r.writing = false
				r.signalLocked()
			}
		}
		r.mu.Unlock()
	}
}

// drained waits until every queued reply was taken by the socket or the client
// is gone.
func (r *replies) drained() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.err == nil && (r.writing || len(r.queue) > 0) {
		r.waitLocked()
	}
}

// failure returns why nothing can be sent any more, or nil.
func (r *replies) failure() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// account returns the requests in flight and the bytes sent so far.
func (r *replies) account() (int, int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.requests, r.sent
}
