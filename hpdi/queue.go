package hpdi

import "fmt"

// Queue is a path to a device for one goroutine at a time.
type Queue interface {
	// Submit hands requests to the device. It may block while the queue is
	// full. Requests that are malformed complete with an error like others;
	// the returned error says that the queue itself no longer works.
	Submit(reqs ...*Request) error
	// Wait blocks until at least min submitted requests have completed and
	// appends all completed ones to done. It never waits for more than are in
	// flight, so with none it returns at once. With a min of 0 it polls: it does
	// not block.
	Wait(min int, done []*Request) ([]*Request, error)
	// Cancel asks that requests end soon, and does not wait for that: they still
	// come out of Wait. One that had no effect, or of which nobody knows whether it
	// had, comes with an Err that wraps ErrCanceled; others come as if they had not
	// been cancelled. What Info.Cancel does not reach, and what is not in flight on
	// this queue, is left alone. Like the other methods it is for the goroutine that
	// has the queue.
	Cancel(reqs ...*Request)
	// Event returns a file descriptor that is readable whenever Wait with a min of
	// 0 would return a request, for poll and epoll, level-triggered. It belongs to
	// the queue: the application neither reads nor closes it. It is -1 where
	// Info.Event is false, and when the system has no descriptor left.
	Event() int
	// Close waits for requests in flight and frees the queue. Requests that
	// Wait has not returned by then are the application's again, with Err set.
	Close() error
}

// Plain is embedded in queues that can neither cancel requests nor be waited for by a
// descriptor. Their devices say so by Info.Plain.
type Plain struct{}

// Cancel does nothing.
func (Plain) Cancel(...*Request) {}

// Event returns -1: there is no descriptor.
func (Plain) Event() int { return -1 }

// Do submits reqs, which must be the only ones in flight on q, waits for all
// of them and returns the first error in their order.
func Do(q Queue, reqs ...*Request) error {
	if err := q.Submit(reqs...); err != nil {
		return err
	}
	done, err := q.Wait(len(reqs), make([]*Request, 0, len(reqs)))
	if err != nil {
		return err
	}
	if len(done) != len(reqs) {
		return fmt.Errorf("hpdi: %d of %d requests completed", len(done), len(reqs))
	}
	for _, r := range reqs {
		if r.Err != nil {
			return fmt.Errorf("%s of %d bytes at %d: %w", r.Op, r.Bytes(), r.Offset, r.Err)
		}
	}
	return nil
}
