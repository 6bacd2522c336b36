package nbd

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Sizes of reads from the socket. After a large payload little is read ahead:
// what is read ahead of the next payload has to be copied once more.
const (
	inBytes      = 128 << 10
	shortAhead   = 4 << 10
	largePayload = 32 << 10
)

// wire is the receiving side of a connection. Only the reader uses it, except
// for stop.
type wire struct {
	nc  net.Conn
	raw syscall.RawConn // nil when nc is not a plain socket

	mem   *segment // that buf lies in, nil once it is given back
	buf   []byte
	r, w  int // buf[r:w] is received and not yet consumed
	ahead int // how much to read ahead

	timeout  time.Duration // for a begun request
	began    time.Time     // when the reader began to wait for the rest of one; zero when idle
	deadline time.Time     // what the socket's read deadline is
	fixed    bool          // the deadline is that of the whole negotiation

	vec    vector
	readFn func(uintptr) bool // w.readv, made once
	readN  int
	readE  syscall.Errno

	received int64

	mu      sync.Mutex // guards stopped and the order of setting deadlines
	stopped bool
}

func newWire(nc net.Conn, timeout time.Duration) *wire {
	mem := getSegment(inBytes)
	w := &wire{mem: mem, buf: mem.mem[:inBytes], ahead: inBytes, timeout: timeout}
	w.readFn = w.readv
	w.attach(nc)
	return w
}

// release gives the memory back, for the next connection, when the reader and all that
// it has handed pieces of it to have ended: clients that come back after a restart come
// all at once. Only stop may be called afterwards.
func (w *wire) release() {
	w.mem.release()
	w.mem, w.buf, w.r, w.w = nil, nil, 0, 0
}

// attach changes the connection below: at the start, and when TLS begins.
func (w *wire) attach(nc net.Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.nc, w.raw = nc, rawConn(nc)
}

// rawConn returns the means for system calls of our own on nc, or nil.
func rawConn(nc net.Conn) syscall.RawConn {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}

// buffered returns how many bytes can be consumed without a system call.
func (w *wire) buffered() int { return w.w - w.r }

// stop makes the current and all later reads from the socket fail.
func (w *wire) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stopped = true
	_ = w.nc.SetReadDeadline(time.Unix(1, 0)) // fails only on a closed socket
}

// limit sets one deadline for all reads until unlimit.
func (w *wire) limit(t time.Time) {
	w.fixed = true
	w.setDeadline(t)
}

func (w *wire) unlimit() {
	w.fixed = false
	w.done()
	w.setDeadline(time.Time{})
}

// isStopped reports whether stop was called.
func (w *wire) isStopped() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stopped
}

// setDeadline sets the read deadline unless the connection was stopped.
func (w *wire) setDeadline(t time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped {
		return
	}
	w.deadline = t
	_ = w.nc.SetReadDeadline(t)
}

// arm prepares for a read that may block: with part of a request there, the
// clock of that request runs. A deadline that is set already may be an older
// request's; expired sorts that out, so that a steady stream of requests costs
// one change of the deadline every few seconds.
func (w *wire) arm() {
	if w.began.IsZero() {
		w.began = time.Now()
	}
	if w.deadline.IsZero() && !w.fixed {
		w.setDeadline(w.began.Add(w.timeout))
	}
}

// expired decides about a read that failed for its deadline: nil means try
// again.
func (w *wire) expired() error {
	switch {
	case w.isStopped():
		return errStopped
	case w.fixed:
		return errPayloadSlow
	case w.began.IsZero():
		w.setDeadline(time.Time{})
	case time.Since(w.began) >= w.timeout:
		return errPayloadSlow
	default:
		w.setDeadline(w.began.Add(w.timeout))
	}
	return nil
}

// failed translates an error of a read: nil means try again.
func (w *wire) failed(err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return w.expired()
	case errors.Is(err, io.EOF):
		if w.began.IsZero() {
			return errDisconnect
		}
		return io.ErrUnexpectedEOF
	case errors.Is(err, net.ErrClosed):
		return errStopped
	}
	return err
}

// more reads what there is, at least one byte, to the end of the buffer.
// partial says that a request has begun.
func (w *wire) more(partial bool) error {
	w.compact()
	if partial {
		w.arm()
	} else {
		w.began = time.Time{}
	}
	end := min(w.w+w.ahead, len(w.buf))
	for {
		n, err := w.nc.Read(w.buf[w.w:end])
		if n > 0 {
			w.w += n
			w.received += int64(n)
			return nil
		}
		if err == nil {
			continue
		}
		if err = w.failed(err); err != nil {
			return err
		}
	}
}

// compact makes room at the end of the buffer.
func (w *wire) compact() {
	switch {
	case w.r == w.w:
		w.r, w.w = 0, 0
	case len(w.buf)-w.w < shortAhead:
		copy(w.buf, w.buf[w.r:w.w])
		w.r, w.w = 0, w.w-w.r
	}
}

// done ends the clock of a request whose last byte was received.
func (w *wire) done() { w.began = time.Time{} }

// take returns the next n bytes, which stay valid until the next read. n is
// at most the size of the buffer less shortAhead.
func (w *wire) take(n int) ([]byte, error) {
	for w.buffered() < n {
		if err := w.more(w.buffered() > 0); err != nil {
			return nil, err
		}
	}
	b := w.buf[w.r : w.r+n]
	w.r += n
	return b, nil
}

// discard consumes n bytes of a begun request.
func (w *wire) discard(n int64) error {
	for {
		k := min(n, int64(w.buffered()))
		w.r += int(k)
		if n -= k; n == 0 {
			w.done()
			return nil
		}
		if err := w.more(true); err != nil {
			return err
		}
	}
}

// payload fills bufs in order: from the buffer, then from the socket without
// a detour. When it returns an error, the bytes are not all there.
func (w *wire) payload(bufs [][]byte) error {
	i, off := 0, 0 // bufs[i][off:] is the next to be filled
	for w.r < w.w && i < len(bufs) {
		n := copy(bufs[i][off:], w.buf[w.r:w.w])
		w.r += n
		if off += n; off == len(bufs[i]) {
			i, off = i+1, 0
		}
	}
	for i < len(bufs) {
		if off == len(bufs[i]) { // an empty piece
			i, off = i+1, 0
			continue
		}
		n, err := w.scatter(bufs[i:], off)
		if err != nil {
			return err
		}
		for n > 0 {
			k := min(n, len(bufs[i])-off)
			n -= k
			if off += k; off == len(bufs[i]) {
				if i, off = i+1, 0; i == len(bufs) {
					w.w += n // what followed the payload is in the buffer
					break
				}
			}
		}
	}
	w.done()
	return nil
}

// scatter reads into bufs from offset off of the first and, when it reaches
// behind them, into the empty buffer. It returns how much it read in all.
func (w *wire) scatter(bufs [][]byte, off int) (int, error) {
	w.r, w.w = 0, 0
	w.arm()
	for {
		n, err := w.scatterOnce(bufs, off)
		if n > 0 {
			w.received += int64(n)
			return n, nil
		}
		if err == nil {
			continue
		}
		if err = w.failed(err); err != nil {
			return 0, err
		}
	}
}

func (w *wire) scatterOnce(bufs [][]byte, off int) (int, error) {
	if w.raw == nil {
		return w.nc.Read(bufs[0][off:])
	}
	all := w.vec.add(bufs[0][off:])
	for _, b := range bufs[1:] {
		if all = w.vec.add(b); !all {
			break
		}
	}
	if all {
		w.vec.add(w.buf[:w.ahead])
	}
	err := w.raw.Read(w.readFn)
	w.vec.clear()
	switch {
	case err != nil:
		return 0, err
	case w.readE != 0:
		return 0, w.readE
	case w.readN == 0:
		return 0, io.EOF
	}
	return w.readN, nil
}

// readv is the system call of scatterOnce; false makes the runtime wait until
// the socket is readable.
func (w *wire) readv(fd uintptr) bool {
	w.readN, w.readE = w.vec.call(syscall.SYS_READV, fd)
	return w.readE != syscall.EAGAIN
}
