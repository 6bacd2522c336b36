package flashmap

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
)

// spareQueues is how many queues of a device are kept for short use.
const spareQueues = 4

// disk is an open device with queues for what the layer itself reads and writes.
type disk struct {
	dev   hpdi.Device
	spare chan hpdi.Queue
}

func newDisk(dev hpdi.Device) *disk {
	return &disk{dev: dev, spare: make(chan hpdi.Queue, spareQueues)}
}

// do carries out requests and waits for them.
func (d *disk) do(reqs ...*hpdi.Request) error {
	var q hpdi.Queue
	select {
	case q = <-d.spare:
	default:
		var err error
		if q, err = d.dev.NewQueue(changesAtOnce); err != nil {
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

// flush makes all that was written to the device durable.
func (d *disk) flush() error { return d.do(&hpdi.Request{Op: hpdi.OpFlush}) }

// release closes the spare queues and leaves the device open.
func (d *disk) release() error {
	var errs []error
	for {
		select {
		case q := <-d.spare:
			errs = append(errs, q.Close())
		default:
			return errors.Join(errs...)
		}
	}
}

// ioLock is a lock that its holder may keep while it waits for devices. It is
// a channel of one place, empty while nobody has it: who waits for it waits as
// for the devices, which a simulated clock must see.
type ioLock chan struct{}

func newIOLock() ioLock { return make(ioLock, 1) }

// Lock waits until nobody has the lock, and takes it.
func (l ioLock) Lock() { l <- struct{}{} }

// Unlock gives it back.
func (l ioLock) Unlock() { <-l }
