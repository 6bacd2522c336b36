package vhostuser

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// waiter reads eventfds without waiting in the kernel, whatever flags the front-end gives
// them: it shares them.
type waiter struct {
	buf  [8]byte
	iov  unix.Iovec
	got  bool
	read func(fd uintptr) bool
}

func (w *waiter) init() {
	w.iov.Base = &w.buf[0]
	w.iov.SetLen(len(w.buf))
	w.read = w.drain // once, because it allocates
}

// wait waits until an eventfd has counted, and resets it. It returns false when the wait
// was interrupted.
func (w *waiter) wait(raw syscall.RawConn) bool {
	w.got = false
	return raw.Read(w.read) == nil && w.got
}

// drain resets an eventfd, and reports whether there is no reason to wait for it.
func (w *waiter) drain(fd uintptr) bool {
	for {
		// RWF_NOWAIT holds for this call, and O_NONBLOCK for everybody who has the file.
		n, _, e := unix.Syscall6(unix.SYS_PREADV2, fd, uintptr(unsafe.Pointer(&w.iov)), 1, ^uintptr(0), ^uintptr(0), unix.RWF_NOWAIT)
		switch {
		case e == unix.EINTR:
			continue
		case e == unix.EAGAIN:
			return false
		case e == unix.EOPNOTSUPP:
			_, err := unix.Read(int(fd), w.buf[:]) // kernels before 5.9; it is O_NONBLOCK
			w.got = err == nil
			return err != unix.EAGAIN
		}
		w.got = e == 0 && n == 8
		return true
	}
}
