package blocktest

import (
	"errors"
	"sync"
)

// ErrPowerCut is what a device returns for everything after its power was cut.
var ErrPowerCut = errors.New("power is cut")

// Clock counts the operations (write, flush, discard, write-zeroes; not reads)
// of the devices that share it, and is their power supply: all of them lose
// power in the same instant. Create one with NewClock.
type Clock struct {
	off chan struct{} // closed when power is cut

	mu    sync.Mutex // guards all below
	ops   int64
	limit int64 // the operation that fails; 0 for none
	cut   bool
}

// NewClock returns a clock that has counted nothing and never cuts.
func NewClock() *Clock { return &Clock{off: make(chan struct{})} }

// CutAfter makes the n-th operation from the clock's start and all later ones
// fail with ErrPowerCut. The n-th itself may still reach the medium, whole or
// in part. With n of 0 nothing is cut. If that many operations have passed
// already, the next one fails.
func (c *Clock) CutAfter(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.limit = n
}

// Cut turns the power of all devices of the clock off.
func (c *Clock) Cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cutLocked()
}

func (c *Clock) cutLocked() {
	if !c.cut {
		c.cut = true
		close(c.off)
	}
}

// Ops returns how many operations were counted, the failed one included.
func (c *Clock) Ops() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ops
}

// Off returns a channel that is closed when power is cut.
func (c *Clock) Off() <-chan struct{} { return c.off }

// IsOff reports whether power is cut.
func (c *Clock) IsOff() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cut
}

// tick counts one operation. reached says that the operation got as far as the
// device, ok that it was carried out: the operation at which power is cut is
// reached and not ok.
func (c *Clock) tick() (reached, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cut {
		return false, false
	}
	c.ops++
	if c.limit > 0 && c.ops >= c.limit {
		c.cutLocked()
		return true, false
	}
	return true, true
}
