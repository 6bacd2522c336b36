package ring

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Link is a front-end's connection to a back-end.
type Link struct {
	c    *net.UnixConn
	mu   sync.Mutex            // one question at a time
	says chan message          // answers
	wait time.Duration         // for an answer, and for the back-end to end
	why  atomic.Pointer[error] // this side has ended it for that reason
	gone chan struct{}
	err  error // why it is gone; valid once gone is closed
}

// Dial connects to the back-end at a socket.
func Dial(ctx context.Context, path string) (*Link, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, err
	}
	l := &Link{c: c.(*net.UnixConn), says: make(chan message, 1), wait: patience, gone: make(chan struct{})}
	go l.listen()
	return l, nil
}

// listen receives answers until the connection ends.
func (l *Link) listen() {
	for {
		m, fds, err := receive(l.c)
		closeAll(fds)
		if err == nil && m.kind == msgNo {
			err = fmt.Errorf("the back-end has refused: %s: %w", m.text, ErrGone)
		}
		if err == nil && m.kind != msgYes {
			err = fmt.Errorf("%s from the back-end: %w", messageNames[m.kind], ErrBroken)
		}
		if err == nil {
			select {
			case l.says <- m:
				continue
			default:
				err = fmt.Errorf("an answer that nobody asked for: %w", ErrBroken)
			}
		}
		l.err = err
		if why := l.why.Load(); why != nil {
			l.err = *why
		}
		// The back-end closes the connection when nothing of it runs any more. Until
		// then it must not be forgotten, whatever it says.
		_ = l.c.CloseWrite()
		l.drain()
		l.c.Close()
		close(l.gone)
		return
	}
}

// drain waits until the other end is closed.
func (l *Link) drain() {
	for {
		_, fds, err := receive(l.c)
		closeAll(fds)
		if errors.Is(err, ErrGone) {
			return
		}
	}
}

// Gone is closed when the connection has ended, and nothing of the back-end runs.
func (l *Link) Gone() <-chan struct{} { return l.gone }

// Err returns why the connection has ended.
func (l *Link) Err() error {
	<-l.gone
	return l.err
}

// Attach hands the ring over: its descriptor and size in bytes, and the bells of each
// queue, that of the back-end first.
func (l *Link) Attach(fd int, size int64, bells []*Bell) error {
	fds := make([]int, 0, 1+len(bells))
	fds = append(fds, fd)
	for _, b := range bells {
		fds = append(fds, b.fd)
	}
	return l.ask(message{kind: msgAttach, number: uint64(size)}, fds...)
}

// Memory hands a memory over, by its descriptor and size in bytes.
func (l *Link) Memory(number uint16, fd int, size int64) error {
	return l.ask(message{kind: msgMemory, number: uint64(number), size: uint64(size)}, fd)
}

// Forget takes a memory back that no request uses.
func (l *Link) Forget(number uint16) error {
	return l.ask(message{kind: msgForget, number: uint64(number)})
}

// Start lets the back-end begin with what is submitted.
func (l *Link) Start() error { return l.ask(message{kind: msgStart}) }

// Bye ends the connection of a front-end that will not come back, with nothing in
// flight.
func (l *Link) Bye() {
	_ = send(l.c, message{kind: msgBye})
	l.leave()
}

// Drop ends the connection without a word, as the death of the front-end does. It
// returns when the back-end has ended what it ran. One that does not within 10 s is left
// alone: it may still do what it has begun.
func (l *Link) Drop() {
	_ = l.c.CloseWrite()
	l.leave()
}

// Cut ends the connection at once. Nothing must have been started.
func (l *Link) Cut() {
	l.c.Close()
	<-l.gone
}

// leave waits for the back-end to end.
func (l *Link) leave() {
	late := time.NewTimer(l.wait)
	defer late.Stop()
	select {
	case <-l.gone:
	case <-late.C:
		l.Cut()
	}
}

// end ends the connection for a reason of this side, which it returns. The connection is gone
// once the back-end has closed it, and takes no more questions until then.
func (l *Link) end(why error) error {
	l.why.CompareAndSwap(nil, &why)
	_ = l.c.CloseWrite()
	return why
}

// ask asks a question and waits for its answer. An error ends the connection: the back-end
// may have done what was asked or do it yet, so nothing that follows can build on it.
func (l *Link) ask(m message, fds ...int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if why := l.why.Load(); why != nil {
		return fmt.Errorf("%s: the connection is at its end: %w", messageNames[m.kind], *why)
	}
	if err := send(l.c, m, fds...); err != nil {
		// Whatever it is, this connection is of no more use. Who asks is to find it gone.
		l.Drop()
		return fmt.Errorf("%w: %w", err, l.err)
	}
	late := time.NewTimer(l.wait)
	defer late.Stop()
	select {
	case a := <-l.says:
		if a.number != uint64(m.kind) {
			return l.end(fmt.Errorf("%s: the back-end has answered a question of kind %d instead of %d: %w", messageNames[m.kind], a.number, m.kind, ErrBroken))
		}
		return nil
	case <-l.gone:
		return fmt.Errorf("%s: %w", messageNames[m.kind], l.err)
	case <-late.C:
		// Its answer may come yet, and must not be taken for that to another question.
		return l.end(fmt.Errorf("%s: the back-end does not answer within %v: %w", messageNames[m.kind], l.wait, ErrGone))
	}
}

// NewMemory makes a file of memory for a ring of this shape, sealed against changes of
// its size, and formats it. The descriptor is the caller's.
func NewMemory(s Shape) (*Memory, []byte, int, error) {
	if err := s.Check(); err != nil {
		return nil, nil, -1, err
	}
	fd, err := unix.MemfdCreate("pollux-ring", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, nil, -1, fmt.Errorf("make a file of memory for a ring: %w", err)
	}
	mem, err := fill(fd, s.Size())
	if err != nil {
		unix.Close(fd)
		return nil, nil, -1, fmt.Errorf("memory of %d bytes for a ring: %w", s.Size(), err)
	}
	m, err := Format(mem, s)
	if err != nil {
		_ = unix.Munmap(mem)
		unix.Close(fd)
		return nil, nil, -1, err
	}
	return m, mem, fd, nil
}

func fill(fd int, size int64) ([]byte, error) {
	if err := unix.Ftruncate(fd, size); err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return nil, err
	}
	return Map(fd, size)
}
