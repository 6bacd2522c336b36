package vhostuser

import (
	"syscall"

	"github.com/pollux-storage/pollux/internal/eventfd"
)

// waiter waits for eventfds by the runtime's poller.
type waiter struct {
	eventfd.Reader
	got  bool
	read func(fd uintptr) bool
}

func (w *waiter) init() { w.read = w.drain } // once, because it allocates

// wait waits until an eventfd has counted, and resets it. It returns false when the wait
// was interrupted.
func (w *waiter) wait(raw syscall.RawConn) bool {
	w.got = false
	return raw.Read(w.read) == nil && w.got
}

// drain resets an eventfd, and reports whether there is no reason to wait for it.
func (w *waiter) drain(fd uintptr) bool {
	var wait bool
	w.got, wait = w.Read(int(fd))
	return !wait
}
