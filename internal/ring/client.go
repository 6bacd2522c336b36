package ring

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Link is a front-end's connection to a back-end.
type Link struct {
	c    *net.UnixConn
	mu   sync.Mutex   // one question at a time
	says chan message // answers
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
	l := &Link{c: c.(*net.UnixConn), says: make(chan message, 1), gone: make(chan struct{})}
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
	select {
	case <-l.gone:
	case <-time.After(patience):
		l.c.Close()
		<-l.gone
	}
}

// Drop ends the connection without a word, as the death of the front-end does. It
// returns when the back-end has ended what it ran.
func (l *Link) Drop() {
	_ = l.c.CloseWrite()
	<-l.gone
}

func (l *Link) ask(m message, fds ...int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := send(l.c, m, fds...); err != nil {
		// Whatever it is, this connection is of no more use. Who asks is to find it gone.
		l.Drop()
		return fmt.Errorf("%w: %w", err, l.err)
	}
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case <-l.says:
		return nil
	case <-l.gone:
		return fmt.Errorf("%s: %w", messageNames[m.kind], l.err)
	case <-late.C:
		return fmt.Errorf("%s: the back-end does not answer within %v: %w", messageNames[m.kind], patience, ErrBroken)
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
