package hpdi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sys/unix"
)

// Blocking is a device for programs that do one thing after the other: each call submits a
// request and waits for it. Calls may be made concurrently; each uses a queue of its own,
// of which a few are kept.
//
// The end of a context, by cancellation or by its deadline, ends the request as far as
// Info.Cancel and Info.Event go; the call returns when the memory is the caller's again.
// Offsets, lengths and memory must be as the device demands it: nothing is copied.
type Blocking struct {
	dev   Device
	info  Info
	slots chan struct{} // a token for each call that may run

	mu     sync.Mutex // guards what follows
	idle   []*caller
	closed bool
}

var (
	_ io.ReaderAt = (*Blocking)(nil)
	_ io.WriterAt = (*Blocking)(nil)
)

// caller is a queue of one request, and what wakes whoever waits for that.
type caller struct {
	q    Queue
	req  Request
	vec  [1][]byte
	done []*Request
	wake Signal
}

// NewBlocking returns a view of a device on which up to calls run at once; others wait. The
// device stays the caller's to close, after the view.
func NewBlocking(dev Device, calls int) (*Blocking, error) {
	if calls < 1 {
		return nil, fmt.Errorf("%s: %d calls at once, at least 1 is needed", dev.Info().Name, calls)
	}
	return &Blocking{dev: dev, info: dev.Info(), slots: make(chan struct{}, calls)}, nil
}

// Read fills p from the device at off.
func (b *Blocking) Read(ctx context.Context, p []byte, off int64) error {
	return b.do(ctx, Request{Op: OpRead, Offset: off}, p)
}

// Write sends p to the device at off.
func (b *Blocking) Write(ctx context.Context, p []byte, off int64) error {
	return b.do(ctx, Request{Op: OpWrite, Offset: off}, p)
}

// WriteDurable is Write that survives a power cut when it has returned, by a flush where the
// device has no durable writes.
func (b *Blocking) WriteDurable(ctx context.Context, p []byte, off int64) error {
	err := b.do(ctx, Request{Op: OpWrite, Offset: off, Durable: b.info.Durable}, p)
	if err == nil && !b.info.Durable {
		err = b.Flush(ctx)
	}
	return err
}

// Flush makes all writes durable that have returned.
func (b *Blocking) Flush(ctx context.Context) error { return b.do(ctx, Request{Op: OpFlush}, nil) }

// Discard tells the device that n bytes at off are not needed.
func (b *Blocking) Discard(ctx context.Context, off, n int64) error {
	return b.do(ctx, Request{Op: OpDiscard, Offset: off, Length: n}, nil)
}

// WriteZeroes makes n bytes at off read as zero.
func (b *Blocking) WriteZeroes(ctx context.Context, off, n int64) error {
	return b.do(ctx, Request{Op: OpWriteZeroes, Offset: off, Length: n}, nil)
}

// Status appends to extents what n bytes at off are made of, all of it.
func (b *Blocking) Status(ctx context.Context, off, n int64, extents []Extent) ([]Extent, error) {
	if n < 0 {
		return extents, fmt.Errorf("%s of %d bytes at %d of %s: %w", OpStatus, n, off, b.info.Name, ErrRange)
	}
	place := make([]Extent, 0, 64)
	for end := off + n; off < end; {
		r := Request{Op: OpStatus, Offset: off, Length: end - off, Extents: place}
		got, err := b.run(ctx, r, nil)
		if err != nil {
			return extents, err
		}
		for _, e := range got {
			if last := len(extents) - 1; last >= 0 && extents[last].State == e.State {
				extents[last].Length += e.Length
			} else {
				extents = append(extents, e)
			}
			off += e.Length
		}
		if len(got) == 0 {
			return extents, fmt.Errorf("%s: block status of %d bytes at %d told nothing: %w", b.info.Name, end-off, off, ErrIO)
		}
	}
	return extents, nil
}

// ReadAt implements io.ReaderAt. What reaches past the device is left out, with io.EOF.
func (b *Blocking) ReadAt(p []byte, off int64) (int, error) {
	n := len(p)
	if off >= 0 && off <= b.info.Size {
		n = int(min(int64(n), b.info.Size-off))
	}
	if err := b.Read(context.Background(), p[:n], off); err != nil {
		return 0, err
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt implements io.WriterAt.
func (b *Blocking) WriteAt(p []byte, off int64) (int, error) {
	if err := b.Write(context.Background(), p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Close frees the queues. All calls must have returned.
func (b *Blocking) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	var errs []error
	for _, c := range b.idle {
		errs = append(errs, c.close())
	}
	b.idle = nil
	return errors.Join(errs...)
}

func (c *caller) close() error {
	c.wake.Close()
	return c.q.Close()
}

func (b *Blocking) do(ctx context.Context, r Request, p []byte) error {
	_, err := b.run(ctx, r, p)
	return err
}

// run carries out a request, with p as its only vector.
func (b *Blocking) run(ctx context.Context, r Request, p []byte) ([]Extent, error) {
	wrap := func(err error) error {
		n := r.Length + int64(len(p))
		switch end := ctx.Err(); {
		case errors.Is(err, ErrDeadline): // of the context, which need not know yet
			err = fmt.Errorf("%w: %w", context.DeadlineExceeded, err)
		case end != nil && errors.Is(err, ErrCanceled):
			err = fmt.Errorf("%w: %w", end, err)
		}
		return fmt.Errorf("%s of %d bytes at %d of %s: %w", r.Op, n, r.Offset, b.info.Name, err)
	}
	if ctx.Err() != nil {
		return nil, wrap(ErrCanceled)
	}
	select {
	case b.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, wrap(ErrCanceled)
	}
	defer func() { <-b.slots }()
	c, err := b.take()
	if err != nil {
		return nil, wrap(err)
	}
	c.req = r
	if p != nil {
		c.vec[0] = p
		c.req.Vec = c.vec[:]
	}
	if at, ok := ctx.Deadline(); ok {
		c.req.Deadline = at
	}
	if err = c.q.Submit(&c.req); err == nil {
		err = b.await(ctx, c)
	}
	if err != nil {
		// The queue works no more, and its Close waits for what is under way.
		return nil, wrap(errors.Join(err, c.close()))
	}
	extents, err := c.req.Extents, c.req.Err
	c.req, c.vec[0] = Request{}, nil // the memory is the caller's
	b.give(c)
	if err != nil {
		return nil, wrap(err)
	}
	return extents, nil
}

// take returns a queue that nobody uses.
func (b *Blocking) take() (*caller, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, ErrClosed
	}
	if n := len(b.idle); n > 0 {
		c := b.idle[n-1]
		b.idle = b.idle[:n-1]
		return c, nil
	}
	q, err := b.dev.NewQueue(1)
	if err != nil {
		return nil, err
	}
	return &caller{q: q, done: make([]*Request, 0, 1)}, nil
}

func (b *Blocking) give(c *caller) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.idle = append(b.idle, c)
}

// await waits for the only request of a queue, and cancels it when the context ends.
func (b *Blocking) await(ctx context.Context, c *caller) error {
	var err error
	event, wake := -1, -1
	if ctx.Done() != nil && b.info.Event && b.info.Cancel != CancelNone {
		event, wake = c.q.Event(), c.wake.Event()
	}
	if event < 0 || wake < 0 {
		c.done, err = c.q.Wait(1, c.done[:0])
		return err
	}
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		c.wake.Set(true)
		close(woken)
	})
	defer func() {
		if !stop() {
			<-woken
		}
		c.wake.Set(false)
	}()
	for {
		if c.done, err = c.q.Wait(0, c.done[:0]); err != nil || len(c.done) > 0 {
			return err
		}
		// The context ends at the deadline as well, so that nothing else has to wake for it.
		fds := [2]unix.PollFd{{Fd: int32(event), Events: unix.POLLIN}, {Fd: int32(wake), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds[:], -1); err != nil && err != unix.EINTR {
			return fmt.Errorf("poll: %w", err)
		}
		if ctx.Err() != nil {
			c.q.Cancel(&c.req) // those of which the deadline has passed end in Wait
			c.done, err = c.q.Wait(1, c.done[:0])
			return err
		}
	}
}
