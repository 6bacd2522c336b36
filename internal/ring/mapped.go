package ring

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The locks on the file of a ring without a socket, by byte: each side has one, where files can
// be locked.
const (
	FrontLock = 0
	BackLock  = 1
)

const (
	// Beat is how often each side of a ring without a socket shows that it lives.
	Beat = 50 * time.Millisecond
	// Silence is after how long without it a side counts as gone.
	Silence = 3 * time.Second
)

// ErrTaken: somebody else is this side of the ring.
var ErrTaken = errors.New("somebody else is this side of the ring")

// LockFile takes one of the locks of a ring's file, for as long as the file is open. Devices,
// which cannot be locked, are for whoever starts both sides to look after.
func LockFile(f *os.File, lock int64) error {
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return err
	}
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: lock, Len: 1}
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return ErrTaken
	}
	if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	return nil
}

// Watch tells whether the other side of a ring without a socket lives, by its heartbeat.
type Watch struct {
	last uint64
	at   time.Time
	seen bool
}

// Lives is given the heartbeat as it is now, and says whether it has changed not too long
// ago. A heartbeat that is seen for the first time says nothing yet.
func (w *Watch) Lives(beat uint64, now time.Time) bool {
	if w.at.IsZero() || beat != w.last {
		w.seen = w.seen || !w.at.IsZero()
		w.last, w.at = beat, now
	}
	return w.seen && now.Sub(w.at) < Silence
}

// Known says whether a side that does not live has been watched for long enough to say
// that it is gone.
func (w *Watch) Known(now time.Time) bool { return !w.at.IsZero() && now.Sub(w.at) >= Silence }

// ServeFile serves the ring in a file that both sides map: on a memory file system, or
// a device that two machines see (/dev/dax0.0, the BAR of an ivshmem device). It waits for a
// front-end, serves it, waits for the next one, and returns after Close. Nobody else may be the
// back-end of the ring. size is that of the memory in bytes. The sides wake each other by
// looking from time to time.
//
// A file that is made shorter while it is mapped ends this side of the ring with an error, and
// whoever makes it shorter must be trusted not to do so within a system call.
func (s *Server) ServeFile(f *os.File, size int64) error {
	if err := LockFile(f, BackLock); err != nil {
		return fmt.Errorf("ring %s: back-end: %w", f.Name(), err)
	}
	if size > MaxRing {
		return fmt.Errorf("ring %s of %d bytes: the largest has %d", f.Name(), size, int64(MaxRing))
	}
	mem, err := Map(int(f.Fd()), size)
	if err != nil {
		return fmt.Errorf("ring %s: %w", f.Name(), err)
	}
	defer unix.Munmap(mem)
	if err := faults(func() error { return s.serveMemory(mem) }); err != nil {
		return fmt.Errorf("ring %s: %w", f.Name(), err)
	}
	return nil
}

// serveMemory serves the rings that front-ends make in mem, one after the other.
func (s *Server) serveMemory(mem []byte) error {
	var refused [16]byte // a ring that was found broken
	silent := ^uint64(0) // the heartbeat of a front-end that has shown no other for long
	tick := time.NewTicker(Beat)
	defer tick.Stop()
	for {
		m, err := Open(mem)
		if err == nil && m.shape.ID != refused && m.FrontServes() && m.frontBeat() != silent {
			switch err := s.serveRing(m, mem); {
			case errors.Is(err, errSilent):
				silent = m.frontBeat()
			case err != nil && !errors.Is(err, ErrGone):
				refused = m.shape.ID
			}
		}
		select {
		case <-s.ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// serveRing serves a ring in mem, unless the server is closed.
func (s *Server) serveRing(m *Memory, mem []byte) error {
	k := &conn{s: s, m: m, hung: make(chan struct{})}
	s.mu.Lock()
	closed := s.ctx.Err() != nil
	if !closed {
		s.open[k] = true
		s.conns.Add(1)
	}
	s.mu.Unlock()
	if closed {
		return ErrGone
	}
	defer func() {
		s.mu.Lock()
		delete(s.open, k)
		s.mu.Unlock()
		s.conns.Done()
	}()
	return k.watch(mem)
}

// FrontServes says whether a front-end has said that it is there.
func (m *Memory) FrontServes() bool { return word(m.mem, frontPage+frontState).Load() == stateServing }

var errSilent = fmt.Errorf("the front-end has not shown itself for %v: %w", Silence, ErrGone)

func (m *Memory) frontBeat() uint64 {
	front, _ := m.Beats()
	return front
}

// watch serves a ring until its front-end ends, is silent for long or makes a new ring, another
// back-end has come, or this one is to end.
func (k *conn) watch(mem []byte) error {
	for range 2 * k.m.shape.Queues {
		k.bells = append(k.bells, &Bell{})
	}
	k.mapped.Store(&[][]byte{k.m.Data()})
	err := faults(k.start)
	if err == nil {
		err = faults(func() error { return k.follow(mem) })
	}
	err = k.end(err)
	k.free()
	return err
}

// follow returns why the ring is to be left.
func (k *conn) follow(mem []byte) error {
	shape, m := k.m.shape, k.m
	tick := time.NewTicker(Beat)
	defer tick.Stop()
	var front Watch
	for {
		select {
		case <-k.hung:
			return ErrGone
		case now := <-tick.C:
			m.BeatBack()
			lives := front.Lives(m.frontBeat(), now)
			again, err := Open(mem)
			switch {
			case err != nil || again.shape != shape:
				return fmt.Errorf("the ring is another one now: %w", ErrGone)
			case m.FrontGone():
				k.bye = true
				return ErrGone
			case m.Attached() != k.number:
				return fmt.Errorf("another back-end has come: %w", ErrGone)
			case !lives && front.Known(now):
				return errSilent
			}
		}
	}
}
