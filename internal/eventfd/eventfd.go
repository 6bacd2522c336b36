// Package eventfd deals with eventfds that a peer has as well, who may do with them what it
// likes: their flags belong to the open file, so that O_NONBLOCK holds until the peer takes it
// away, and their counter can be filled by whoever has them.
package eventfd

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Check returns an error unless a descriptor of a peer is an eventfd, and makes it one at
// which, so far, nobody waits in the kernel.
func Check(fd int) error {
	var name [32]byte
	n, err := unix.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd), name[:])
	if err != nil {
		return fmt.Errorf("look what an event descriptor is: %w", err)
	}
	if string(name[:n]) != "anon_inode:[eventfd]" {
		return fmt.Errorf("event descriptor is %s, an eventfd is needed", name[:n])
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return fmt.Errorf("event descriptor: %w", err)
	}
	return nil
}

// one is what counts one more.
var one = []byte{1, 0, 0, 0, 0, 0, 0, 0}

// Count adds one to the counter. A counter that is full stays so: whoever looks at it has a
// reason already. Where the peer has filled it and has taken O_NONBLOCK away the call waits,
// until somebody calls [Reader.Unstick].
func Count(fd int) { _, _ = unix.Write(fd, one) }

// Reader reads eventfds without waiting in the kernel, whatever flags they have. It does not
// allocate and is for one goroutine at a time.
type Reader struct {
	buf [8]byte
	vec [1][]byte
}

// Read resets an eventfd. It says whether there was anything counted, or else whether there
// is a reason to wait for it: an interruption and an error are none.
func (r *Reader) Read(fd int) (counted, wait bool) {
	r.vec[0] = r.buf[:]
	for {
		// RWF_NOWAIT holds for this call, and O_NONBLOCK for everybody who has the file.
		n, err := unix.Preadv2(fd, r.vec[:], -1, unix.RWF_NOWAIT)
		switch err {
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return false, true
		case unix.EOPNOTSUPP:
			_, err := unix.Read(fd, r.buf[:]) // kernels before 5.9; it is O_NONBLOCK
			return err == nil, err == unix.EAGAIN
		}
		return err == nil && n == 8, false
	}
}

// Unstick lets whoever waits in Count go on. A counter that is not full is left alone, for the
// peer may not have seen it yet.
func (r *Reader) Unstick(fd int) {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	if n, err := unix.Poll(p, 0); err == nil && n == 0 {
		r.Read(fd)
	}
}
