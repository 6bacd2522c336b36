package file

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// signal is a descriptor (eventfd) that is readable while it is raised.
//
// It is for one goroutine at a time, or whoever holds the queue's lock.
type signal struct {
	fd     int
	raised bool
}

func newSignal() (signal, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	return signal{fd: fd}, err
}

// set raises or lowers the signal. Neither can fail: the count goes from 0 to 1 and back.
func (s *signal) set(up bool) {
	if s.raised == up {
		return
	}
	s.raised = up
	var one [8]byte
	if up {
		binary.NativeEndian.PutUint64(one[:], 1)
		_, _ = unix.Write(s.fd, one[:])
		return
	}
	_, _ = unix.Read(s.fd, one[:])
}

// ringEvent is the descriptor of a ring's queue: an epoll instance over the ring itself,
// which is readable while it has results, and over a signal for requests that are done
// without a result in the ring.
type ringEvent struct {
	epoll int // 0: nobody has asked for it
	done  signal
}

// open makes the descriptor.
func (e *ringEvent) open(ring int) (err error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return err
	}
	if e.done, err = newSignal(); err != nil {
		_ = unix.Close(epoll)
		return err
	}
	for _, fd := range []int{ring, e.done.fd} {
		if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}); err != nil {
			_, _ = unix.Close(epoll), unix.Close(e.done.fd)
			return err
		}
	}
	e.epoll = epoll
	return nil
}

// show says whether there are requests that are done without a result in the ring.
func (e *ringEvent) show(done bool) {
	if e.epoll != 0 {
		e.done.set(done)
	}
}

func (e *ringEvent) close() {
	if e.epoll != 0 {
		_, _ = unix.Close(e.epoll), unix.Close(e.done.fd)
		e.epoll = 0
	}
}
