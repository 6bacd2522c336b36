package mirror

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// base is where the mirror's first byte lies on each copy.
const base = reserved * block.Size

// spareQueues is how many queues of a disk are kept for short use.
const spareQueues = 4

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
	dev   hpdi.Device
	slot  int // in which the newest header lies; guarded by Mirror.mark
	spare chan hpdi.Queue

	mu      sync.Mutex
	users   int // guarded by mu, as retired and closeErr
	retired bool
}

func newDisk(dev hpdi.Device) *disk {
	return &disk{dev: dev, spare: make(chan hpdi.Queue, spareQueues)}
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
	return errors.Join(d.release(), d.dev.Close())
}

// release closes the disk's spare queues and leaves the device open.
func (d *disk) release() error {
	var errs []error
	for len(d.spare) > 0 {
		errs = append(errs, (<-d.spare).Close())
	}
	return errors.Join(errs...)
}

var errRetired = errors.New("the device was taken out of the mirror")

// do carries out requests, at offsets of the device, and waits for them.
func (d *disk) do(reqs ...*hpdi.Request) error {
	if !d.use() {
		return errRetired
	}
	err := d.doOnQueue(reqs)
	return errors.Join(err, d.unuse())
}

func (d *disk) doOnQueue(reqs []*hpdi.Request) error {
	var q hpdi.Queue
	select {
	case q = <-d.spare:
	default:
		var err error
		if q, err = d.dev.NewQueue(mapPages + 2); err != nil {
			return fmt.Errorf("open a queue of device %s: %w", d.dev.Info().Name, err)
		}
	}
	if err := hpdi.Do(q, reqs...); err != nil {
		// What the queue is good for after an error of its own is unknown.
		return errors.Join(fmt.Errorf("device %s: %w", d.dev.Info().Name, err), q.Close())
	}
	select {
	case d.spare <- q:
		return nil
	default:
		return q.Close()
	}
}

// flush makes all that was written to the disk durable.
func (d *disk) flush() error { return d.do(&hpdi.Request{Op: hpdi.OpFlush}) }

// transfer reads or writes at an offset of the mirror.
func (d *disk) transfer(op hpdi.Op, off int64, vec ...[]byte) error {
	return d.do(&hpdi.Request{Op: op, Offset: base + off, Vec: vec})
}
