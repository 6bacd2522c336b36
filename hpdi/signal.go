package hpdi

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Signal is for drivers: a descriptor that is readable while it is set, made when
// somebody asks for it, so that queues nobody waits for by a descriptor cost none.
// The zero value is ready. Whoever uses it sees to it that calls do not overlap.
type Signal struct {
	fd   int // 1 more than the descriptor; 0 while there is none
	set  bool
	gone bool    // closed
	buf  [8]byte // of the system calls, which would have it allocated otherwise
}

// Event returns the descriptor, and makes it the first time. It is -1 when the system
// gives no more descriptors, or after Close.
func (s *Signal) Event() int {
	if s.fd == 0 && !s.gone {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			return -1
		}
		s.fd = fd + 1
		if s.set {
			s.raise()
		}
	}
	return s.fd - 1
}

// Set makes the descriptor readable or not. It costs a system call when that changes
// and somebody has asked for the descriptor.
func (s *Signal) Set(on bool) {
	if on == s.set {
		return
	}
	s.set = on
	switch {
	case s.fd == 0:
	case on:
		s.raise()
	default:
		_, _ = unix.Read(s.fd-1, s.buf[:]) // it does not block, and empties the counter
	}
}

func (s *Signal) raise() {
	// The counter is 0, so that nothing but a broken descriptor can refuse.
	binary.NativeEndian.PutUint64(s.buf[:], 1)
	_, _ = unix.Write(s.fd-1, s.buf[:])
}

// Close closes the descriptor.
func (s *Signal) Close() {
	if s.fd != 0 {
		_ = unix.Close(s.fd - 1) // nothing is lost with an event counter
	}
	s.fd, s.gone = 0, true
}
