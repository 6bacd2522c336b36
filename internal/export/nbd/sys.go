package nbd

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxIovecs is how many pieces one vectored system call takes at most.
const maxIovecs = 64

// vector is the argument of a readv or writev: reused, so that a call does not
// allocate.
type vector struct {
	iov [maxIovecs]unix.Iovec
	n   int
}

// add appends a piece and reports whether there was room. Empty pieces are
// skipped.
func (v *vector) add(b []byte) bool {
	if len(b) == 0 {
		return true
	}
	if v.n == maxIovecs {
		return false
	}
	v.iov[v.n].Base = &b[0]
	v.iov[v.n].SetLen(len(b))
	v.n++
	return true
}

// clear drops the pieces, so that they do not stay reachable.
func (v *vector) clear() {
	clear(v.iov[:v.n])
	v.n = 0
}

// call does a readv or writev on a non-blocking descriptor.
func (v *vector) call(trap, fd uintptr) (int, syscall.Errno) {
	for {
		n, _, e := syscall.Syscall(trap, fd, uintptr(unsafe.Pointer(&v.iov[0])), uintptr(v.n))
		if e == syscall.EINTR {
			continue
		}
		if e != 0 {
			return 0, e
		}
		return int(n), 0
	}
}
