package file

import (
	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// ringEvent is the descriptor of a ring's queue: an epoll instance over the ring's source,
// which is readable when it has results, and over a signal for requests that are done
// without a result in the ring.
type ringEvent struct {
	epoll int // 0: nobody has asked for it
	done  hpdi.Signal
}

// open makes the descriptor.
func (e *ringEvent) open(source int) error {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return err
	}
	for _, fd := range []int{source, e.done.Event()} {
		if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}); err != nil {
			_ = unix.Close(epoll) // the error before is the one to tell
			return err
		}
	}
	e.epoll = epoll
	return nil
}

func (e *ringEvent) close() {
	e.done.Close()
	if e.epoll != 0 {
		_ = unix.Close(e.epoll) // nothing is lost with it
		e.epoll = 0
	}
}
