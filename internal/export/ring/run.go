package ring

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
	core "github.com/pollux-storage/pollux/internal/ring"
)

// pieceBytes is how much a worker reads at once into memory of its own.
const pieceBytes = 256 << 10

// queue is a queue of a ring, for its goroutine.
type queue struct {
	*runner
	q       *core.Queue
	slow    chan *core.Request
	workers int
	wg      sync.WaitGroup
	idle    atomic.Int32 // workers that wait
	calls   []call       // of each slot
	cancel  func(*core.Request)
}

// errHandover ends connections: their front-ends look for who serves the volume now.
var errHandover = errors.New("the volume was closed, or another guest serves it now")

// call is what a request in the hands of a worker can be ended by.
type call struct {
	mu     sync.Mutex // guards cancel
	cancel context.CancelFunc
}

// Run serves a queue.
func (n *runner) Run(q *core.Queue) error {
	k := &queue{runner: n, q: q, slow: make(chan *core.Request, q.Depth()), calls: make([]call, q.Depth())}
	k.cancel = func(r *core.Request) {
		c := &k.calls[r.Slot]
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.cancel != nil {
			c.cancel()
		}
	}
	// Workers end before the queue does: nobody touches the memory of the front-end later.
	defer k.wg.Wait()
	defer close(k.slow)
	return k.run()
}

func (k *queue) run() error {
	for {
		took := k.q.Reap()
		if k.q.Running() == 0 {
			k.q.Pause(false)
		}
		for {
			r, err := k.q.Next()
			if err != nil {
				return err
			}
			if r == nil {
				break
			}
			took++
			k.begin(r)
		}
		k.q.Cancels(k.cancel)
		k.q.Flush()
		if k.q.Running() == 0 {
			if k.q.Abandoned() {
				return errHandover
			}
			if k.q.Stopping() {
				return nil
			}
		}
		if took == 0 {
			if err := k.q.Idle(-1, -1, nil); err != nil {
				return err
			}
		}
	}
}

// begin runs a request, or gives it to a worker.
func (k *queue) begin(r *core.Request) {
	if r.Tag.Session != k.own {
		k.end(r, fmt.Errorf("session %x is not that of the ring: %w", r.Tag.Session, block.ErrInvalid))
		return
	}
	if r.Again {
		k.s.again.Add(1)
		done, err := k.done(r)
		if done {
			k.s.skipped.Add(1)
		}
		if done || err != nil {
			k.end(r, err)
			return
		}
		if r.Flags&core.FlagDurable == 0 {
			k.s.rerun.Add(1)
		}
		// One after the other: what follows may lie over it.
		k.q.Pause(true)
		k.later(r)
		return
	}
	ok, err := k.try(r)
	if err == nil && !ok {
		k.later(r)
		return
	}
	k.end(r, err)
}

// end completes a request on the goroutine of the queue.
func (k *queue) end(r *core.Request, err error) {
	status, text := k.answer(r, err)
	k.q.Done(r, status, text)
}

// answer returns what the front-end is told, and counts it.
func (k *queue) answer(r *core.Request, err error) (core.Status, string) {
	if err == nil {
		k.count(r)
		return core.StatusOK, ""
	}
	if errors.Is(err, block.ErrClosed) || errors.Is(err, block.ErrStale) || k.s.ctx.Err() != nil {
		return core.Abandon, ""
	}
	k.s.errs.Add(1)
	return statusOf(err), err.Error()
}

// done asks whether a request of an earlier back-end is in the log.
func (k *queue) done(r *core.Request) (bool, error) {
	if r.Op != core.OpWrite && r.Op != core.OpDiscard && r.Op != core.OpWriteZeroes {
		return false, nil
	}
	if r.Flags&core.FlagDurable != 0 {
		return false, nil // it may be in the log and not flushed: a worker asks
	}
	return k.logged(r)
}

// logged asks whether the change of a request is in the log.
func (k *queue) logged(r *core.Request) (bool, error) {
	if k.session == nil || planted.Has(planted.RingTagUnasked) {
		return false, nil
	}
	return k.session.Done(int(r.Tag.Queue), int(r.Tag.Slot), r.Tag.Counter)
}

func (k *queue) tag(r *core.Request) block.Tag {
	if k.session == nil {
		return block.Tag{}
	}
	return block.Tag{Session: block.SessionID(r.Tag.Session), Queue: r.Tag.Queue, Slot: r.Tag.Slot, Counter: r.Tag.Counter}
}

// try does what needs no device. It returns false when that would have to wait.
func (k *queue) try(r *core.Request) (bool, error) {
	vol := k.s.o.Volume
	switch {
	case r.Op == core.OpRead:
		off := r.Offset
		for _, v := range r.Vec {
			if ok, err := vol.TryRead(v, off); !ok || err != nil {
				return false, err
			}
			off += int64(len(v))
		}
		return true, nil
	case r.Op == core.OpWrite && r.Length == 0:
		return true, nil
	case r.Op == core.OpWrite && r.Flags&core.FlagDurable == 0:
		w, err := vol.TryStage(r.Offset, int(r.Length))
		if w == nil || err != nil {
			return false, err
		}
		if err := fill(w, r); err != nil {
			return false, err
		}
		w.SetTag(k.tag(r))
		ok, err := w.TryCommit()
		if !ok && err == nil {
			w.Abort() // a worker stages it anew, as nothing of it is kept with the request
		}
		return ok, err
	}
	return false, nil
}

// fill copies the payload to where the volume wants it. Memory of the front-end that
// cannot be reached aborts the write, and is the queue's trouble then.
func fill(w block.Write, r *core.Request) error {
	whole := false
	defer func() {
		if !whole {
			w.Abort()
		}
	}()
	from, at := r.Vec, 0
	for _, to := range w.Buffers() {
		for len(to) > 0 && len(from) > 0 {
			n := copy(to, from[0][at:])
			to = to[n:]
			if at += n; at == len(from[0]) {
				from, at = from[1:], 0
			}
		}
	}
	if len(from) > 0 {
		return fmt.Errorf("a write of %d bytes has room for less: %w", r.Length, block.ErrInvalid)
	}
	whole = true
	return nil
}

// later gives a request to a worker.
func (k *queue) later(r *core.Request) {
	if k.workers < k.s.o.Workers && int(k.idle.Load()) <= len(k.slow) {
		k.workers++
		k.wg.Go(k.work)
	}
	k.slow <- r // which has room for all slots
}

// work runs requests that may have to wait.
func (k *queue) work() {
	debug.SetPanicOnFault(true)
	var m memory
	for {
		k.idle.Add(1)
		r, ok := <-k.slow
		k.idle.Add(-1)
		if !ok {
			return
		}
		status, text := k.answer(r, k.perform(r, &m))
		k.q.Later(r, status, text)
	}
}

// memory is a worker's own.
type memory struct {
	piece []byte
	ext   []block.Extent
}

// perform runs a request to its end.
func (k *queue) perform(r *core.Request, m *memory) (err error) {
	ctx, cancel := context.WithCancel(k.s.ctx)
	c := &k.calls[r.Slot]
	c.mu.Lock()
	c.cancel = cancel
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		c.cancel = nil
		c.mu.Unlock()
		cancel()
		p := recover()
		if fault, ok := p.(interface{ Addr() uintptr }); ok {
			err = fmt.Errorf("memory of the front-end at %#x cannot be reached: %w", fault.Addr(), block.ErrInvalid)
		} else if p != nil {
			panic(p)
		}
	}()
	if k.q.Canceled(r) { // before there was something to call
		cancel()
	}
	vol := k.s.o.Volume
	switch r.Op {
	case core.OpRead:
		return k.read(ctx, r, m)
	case core.OpWrite:
		if err := k.write(ctx, r); err != nil || r.Flags&core.FlagDurable == 0 {
			return err
		}
		return vol.Flush(ctx)
	case core.OpFlush:
		return vol.Flush(ctx)
	case core.OpDiscard:
		return vol.Trim(ctx, r.Offset, r.Length, k.tag(r))
	case core.OpWriteZeroes:
		return vol.WriteZeroes(ctx, r.Offset, r.Length, r.Flags&core.FlagKeep == 0, k.tag(r))
	case core.OpStatus:
		return k.status(ctx, r, m)
	}
	return fmt.Errorf("%s: %w", r.Op, block.ErrUnsupported)
}

func (k *queue) read(ctx context.Context, r *core.Request, m *memory) error {
	if m.piece == nil {
		m.piece = make([]byte, pieceBytes)
	}
	to, at := r.Vec, 0
	for off, end := r.Offset, r.Offset+r.Length; off < end; {
		p := m.piece[:min(int64(pieceBytes), end-off)]
		if err := k.s.o.Volume.Read(ctx, p, off); err != nil {
			return err
		}
		off += int64(len(p))
		for len(p) > 0 {
			n := copy(to[0][at:], p)
			p = p[n:]
			if at += n; at == len(to[0]) {
				to, at = to[1:], 0
			}
		}
	}
	return nil
}

func (k *queue) write(ctx context.Context, r *core.Request) error {
	if r.Again { // a durable one: see done
		done, err := k.logged(r)
		if done {
			k.s.skipped.Add(1)
		}
		if done || err != nil {
			return err
		}
		if r.Flags&core.FlagDurable != 0 {
			k.s.rerun.Add(1)
		}
	}
	if r.Length == 0 {
		return nil
	}
	w, err := k.s.o.Volume.Stage(ctx, r.Offset, int(r.Length))
	if err != nil {
		return err
	}
	if err := fill(w, r); err != nil {
		return err
	}
	w.SetTag(k.tag(r))
	return w.Commit(ctx)
}

func (k *queue) status(ctx context.Context, r *core.Request, m *memory) error {
	ext, err := k.s.o.Volume.Status(ctx, r.Offset, r.Length, core.Segments, m.ext[:0])
	if err != nil {
		return err
	}
	m.ext = ext
	end := r.Offset + r.Length
	for at, i := r.Offset, 0; i < len(ext) && at < end; i++ {
		x := core.Extent{Length: uint64(min(ext[i].Length, end-at))}
		if ext[i].Hole {
			x.State = 1
		}
		if x.Length > 0 && !k.q.AddExtent(r, x) {
			break
		}
		at += int64(x.Length)
	}
	return nil
}

// count adds a request that was done to the sums.
func (k *queue) count(r *core.Request) {
	switch r.Op {
	case core.OpRead:
		k.s.reads.Add(1)
		k.s.readBytes.Add(uint64(r.Length))
	case core.OpWrite:
		k.s.writes.Add(1)
		k.s.writtenBytes.Add(uint64(r.Length))
	case core.OpFlush:
		k.s.flushes.Add(1)
	case core.OpDiscard:
		k.s.discards.Add(1)
	case core.OpWriteZeroes:
		k.s.zeroes.Add(1)
	case core.OpStatus:
		k.s.statuses.Add(1)
	}
}

// statusOf maps the kinds of error to the statuses of a ring. This is the only place that
// does.
func statusOf(err error) core.Status {
	switch {
	case errors.Is(err, context.Canceled):
		return core.StatusCanceled
	case errors.Is(err, block.ErrNoSpace):
		return core.StatusNoSpace
	case errors.Is(err, block.ErrReadOnly):
		return core.StatusReadOnly
	case errors.Is(err, block.ErrInvalid):
		return core.StatusInvalid
	case errors.Is(err, block.ErrUnsupported):
		return core.StatusUnsupported
	case errors.Is(err, block.ErrCorrupt):
		return core.StatusCorrupt
	}
	return core.StatusIO
}
