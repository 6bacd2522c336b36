package mirror

import (
	"errors"
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/stack"
)

// base is where the mirror's first byte lies on each copy.
const base = reserved * block.Size

// copyOf is one copy. Its disk is another one after it was replaced or came
// back.
type copyOf struct {
	state  atomic.Uint32 // a State
	disk   atomic.Pointer[disk]
	flight atomic.Int64 // bytes of reads under way, to choose whom to ask

	readErrors, writeErrors, repaired atomic.Uint64
}

// is reports whether the copy is in state s.
func (c *copyOf) is(s State) bool { return State(c.state.Load()) == s }

// present returns the copy's disk if writes go to it, else nil.
func (c *copyOf) present() *disk {
	if c.is(Absent) {
		return nil
	}
	return c.disk.Load()
}

// disk is an open device that holds a copy. It is closed when it was retired
// and nobody uses it any more.
type disk struct {
	dev    hpdi.Device
	slot   int // in which the newest header lies; guarded by Mirror.mark
	queues *stack.Queues

	mu      sync.Mutex
	users   int // guarded by mu, as retired and closeErr
	retired bool
}

func newDisk(dev hpdi.Device) *disk {
	return &disk{dev: dev, queues: stack.NewQueues(dev, mapPages+2)}
}

// use keeps the disk open until unuse, or returns false when it is retired.
func (d *disk) use() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.retired {
		return false
	}
	d.users++
	return true
}

func (d *disk) unuse() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.users--
	return d.closeLocked()
}

// retire closes the disk as soon as nobody uses it.
func (d *disk) retire() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.retired {
		return nil
	}
	d.retired = true
	return d.closeLocked()
}

func (d *disk) closeLocked() error {
	if !d.retired || d.users > 0 {
		return nil
	}
	return errors.Join(d.queues.Release(), d.dev.Close())
}

var errRetired = errors.New("the device was taken out of the mirror")

// do carries out requests, at offsets of the device, and waits for them.
func (d *disk) do(reqs ...*hpdi.Request) error {
	if !d.use() {
		return errRetired
	}
	err := d.queues.Do(reqs...)
	return errors.Join(err, d.unuse())
}

// flush makes all that was written to the disk durable.
func (d *disk) flush() error { return d.do(&hpdi.Request{Op: hpdi.OpFlush}) }

// transfer reads or writes at an offset of the mirror.
func (d *disk) transfer(op hpdi.Op, off int64, vec ...[]byte) error {
	return d.do(&hpdi.Request{Op: op, Offset: base + off, Vec: vec})
}
