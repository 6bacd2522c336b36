package nbd

import (
	"context"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// readRequest answers a read from memory, or leaves it to a worker.
func (s *session) readRequest(ctx context.Context, h header) error {
	n, head := int(h.n), s.readHead()
	if head+n > batchBytes {
		return s.readLarge(ctx, h)
	}
	b := s.reserve(head + n)
	ok, err := s.vol.TryRead(b[head:head+n], int64(h.off))
	if err != nil {
		return s.failed(&h, err)
	}
	if !ok {
		return s.dispatch(ctx, getRequest(), h, int64(n))
	}
	s.batched(s.encodeRead(b, n, &h))
	return nil
}

// readLarge is readRequest for what does not fit the batch.
func (s *session) readLarge(ctx context.Context, h header) error {
	n, head := int(h.n), s.readHead()
	if err := s.acquire(int64(n)); err != nil {
		return err
	}
	seg := getSegment(n)
	ok, err := s.vol.TryRead(seg.mem[head:head+n], int64(h.off))
	if err != nil || !ok {
		seg.release()
		if err != nil {
			s.out.release(int64(n))
			return s.failed(&h, err)
		}
		r := getRequest()
		r.h, r.charged = h, int64(n)
		s.hand(ctx, r)
		return nil
	}
	s.flush() // so that what was answered first leaves first
	seg.data = seg.mem[:s.encodeRead(seg.mem, n, &h)]
	seg.requests, seg.bytes = 1, int64(n)
	s.out.send(seg)
	s.out.throttle()
	return nil
}

// writeRequest receives a payload into staged memory and publishes it. e is
// what is wrong with the request; its payload is consumed all the same, except
// when the connection ends.
func (s *session) writeRequest(ctx context.Context, h header, e nbdproto.Errno, why string) error {
	n := int64(h.n)
	if n > block.MaxIO {
		return fmt.Errorf("%w: a write of %d bytes exceeds the maximum of %d", errProtocol, n, block.MaxIO)
	}
	s.in.ahead = inBytes
	if n >= largePayload {
		s.in.ahead = shortAhead
	}
	if e != nbdproto.EOK || n == 0 {
		return s.refuse(&h, e, why)
	}
	missing := n - int64(s.in.buffered())
	if missing > 0 {
		s.flush() // answered requests do not wait for this payload
		if !s.staged.take(missing) {
			return s.writeAside(ctx, h)
		}
		defer s.staged.give(missing)
	}
	w, err := s.vol.TryStage(int64(h.off), int(n))
	switch {
	case err != nil:
		if e = errnoOf(err); e == nbdproto.ESHUTDOWN {
			return errHandover
		}
		s.fault(&h, e, err)
		return s.refuse(&h, forCommand(e, h.cmd, h.flags), err.Error())
	case w == nil:
		return s.writeAside(ctx, h)
	}
	if err := s.in.payload(w.Buffers()); err != nil {
		w.Abort()
		return err
	}
	return s.publish(ctx, h, w)
}

// publish commits a write whose payload is whole.
func (s *session) publish(ctx context.Context, h header, w block.Write) error {
	ok, err := w.TryCommit()
	switch {
	case err != nil:
		return s.failed(&h, err)
	case ok && h.flags&nbdproto.CmdFlagFUA == 0:
		return s.succeed(&h)
	}
	r := getRequest()
	if !ok {
		r.write = w
	}
	if err := s.dispatch(ctx, r, h, int64(h.n)); err != nil {
		if !ok {
			w.Abort()
		}
		return err
	}
	return nil
}

// writeAside receives a payload into memory of the connection, because there is
// no room to stage it now; a worker waits for the room.
func (s *session) writeAside(ctx context.Context, h header) error {
	n := int64(h.n)
	if err := s.acquire(n); err != nil {
		return err
	}
	seg := getSegment(int(n))
	s.aside[0] = seg.mem[:n]
	err := s.in.payload(s.aside[:])
	s.aside[0] = nil
	if err != nil {
		seg.release()
		s.out.release(n)
		return err
	}
	r := getRequest()
	r.h, r.charged, r.side = h, n, seg
	s.hand(ctx, r)
	return nil
}

// refuse consumes the payload of a write and answers it; eOK is the answer to
// an empty write.
func (s *session) refuse(h *header, e nbdproto.Errno, why string) error {
	if s.in.buffered() < int(h.n) {
		s.flush() // answered requests do not wait for this payload
	}
	if err := s.in.discard(int64(h.n)); err != nil {
		return err
	}
	if e == nbdproto.EOK {
		return s.succeed(h)
	}
	return s.fail(h, e, why)
}

// acquire takes a request into flight. When it has to wait, what was answered
// leaves first.
func (s *session) acquire(n int64) error {
	if s.out.tryAcquire(n) {
		return nil
	}
	s.flush()
	return s.out.acquire(n)
}

// dispatch takes a request into flight and gives it to a worker.
func (s *session) dispatch(ctx context.Context, r *request, h header, n int64) error {
	if err := s.acquire(n); err != nil {
		r.release()
		return err
	}
	r.h, r.charged = h, n
	s.hand(ctx, r)
	return nil
}

// hand gives a request that is in flight to a worker. The queue has room for
// as many as can be in flight.
func (s *session) hand(ctx context.Context, r *request) {
	if int(s.pending.Add(1)) > s.workers && s.workers < cap(s.queue) {
		s.workers++
		s.wg.Go(func() {
			for r := range s.queue {
				s.execute(ctx, r)
				s.pending.Add(-1)
			}
		})
	}
	s.queue <- r
}

// reserve returns n bytes at the end of the batch; batched makes them part of
// it.
func (s *session) reserve(n int) []byte {
	if s.batch != nil && len(s.batch.data)+n > batchBytes {
		s.flush()
	}
	if s.batch == nil {
		s.batch = getSegment(batchBytes)
		s.batch.data = s.batch.mem[:0]
	}
	used := len(s.batch.data)
	return s.batch.mem[used : used+n]
}

func (s *session) batched(n int) {
	s.batch.data = s.batch.data[:len(s.batch.data)+n]
}

// flush sends the batch.
func (s *session) flush() {
	if s.batch == nil {
		return
	}
	if len(s.batch.data) == 0 || s.out.sendBatch(s.batch) {
		s.batch.release()
		s.batch = nil
		return
	}
	s.batch = nil
	s.out.throttle()
}

// succeed, fail and failed answer a request from the reader. An error of
// theirs ends the connection.
func (s *session) succeed(h *header) error {
	s.batched(s.encodeDone(s.reserve(nbdproto.ChunkSize), h))
	return nil
}

func (s *session) fail(h *header, e nbdproto.Errno, why string) error {
	s.batched(s.encodeError(s.reserve(errorReplyBytes), h, e, why))
	return nil
}

func (s *session) failed(h *header, err error) error {
	e := errnoOf(err)
	if e == nbdproto.ESHUTDOWN {
		return errHandover
	}
	s.fault(h, e, err)
	return s.fail(h, forCommand(e, h.cmd, h.flags), err.Error())
}
