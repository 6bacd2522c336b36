package stack

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
)

// spareQueues is how many queues of a device are kept for short use.
const spareQueues = 4

// Queues are those of an open device for what its user reads and writes by itself, from
// any goroutine.
type Queues struct {
	Device hpdi.Device
	depth  int
	spare  chan hpdi.Queue
}

// NewQueues returns queues for up to depth requests at once.
func NewQueues(dev hpdi.Device, depth int) *Queues {
	return &Queues{Device: dev, depth: depth, spare: make(chan hpdi.Queue, spareQueues)}
}

// Do carries out requests and waits for them. The error names the device.
func (q *Queues) Do(reqs ...*hpdi.Request) error {
	var one hpdi.Queue
	select {
	case one = <-q.spare:
	default:
		var err error
		if one, err = q.Device.NewQueue(q.depth); err != nil {
			return fmt.Errorf("open a queue of device %s: %w", q.Device.Info().Name, err)
		}
	}
	if err := hpdi.Do(one, reqs...); err != nil {
		// What the queue is good for after an error of its own is unknown.
		return errors.Join(fmt.Errorf("device %s: %w", q.Device.Info().Name, err), one.Close())
	}
	select {
	case q.spare <- one:
		return nil
	default:
		return one.Close()
	}
}

// Flush makes all that was written to the device durable.
func (q *Queues) Flush() error { return q.Do(&hpdi.Request{Op: hpdi.OpFlush}) }

// Release closes the spare queues and leaves the device open.
func (q *Queues) Release() error {
	var errs []error
	for {
		select {
		case one := <-q.spare:
			errs = append(errs, one.Close())
		default:
			return errors.Join(errs...)
		}
	}
}
