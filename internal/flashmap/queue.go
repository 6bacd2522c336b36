package flashmap

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/planted"
)

// The two sides of a device.
const (
	onPrimary = 0
	onFlash   = 1
)

// queue is a path to a device: a queue of each of its sides.
type queue struct {
	hpdi.Plain
	d     *device
	sides [2]side
	// observer is told of requests; nil when nobody wants to know.
	observer Observer

	tally   tally
	pending int // operations with parts under way
	// parked are writes to data sets that are held, and wait for nothing else.
	parked []parked
	done   []*hpdi.Request
	comp   []*hpdi.Request // memory for completions
	ops    []*operation    // to be used again
	parts  []*part         // to be used again
	closed bool

	// busy says whether requests are under way at the primary, for whoever asks the device.
	busy atomic.Bool
}

// noteBusy sets busy. It is what others read of a queue, so it is not written without need.
func (q *queue) noteBusy() {
	if b := q.sides[onPrimary].busy(); b != q.busy.Load() {
		q.busy.Store(b)
	}
}

// side is a queue of the primary or of the flash device.
type side struct {
	hpdi.Queue
	discards bool
	batch    []*hpdi.Request // to be submitted
	flying   []*part         // submitted or in batch
	// passed are requests of the application that are submitted or in batch as they are.
	passed []*hpdi.Request
}

// busy reports whether anything is under way at the side.
func (s *side) busy() bool { return len(s.flying)+len(s.passed) > 0 }

// parked is a write that waits until held is closed.
type parked struct {
	r    *hpdi.Request
	held chan struct{}
}

// operation is a request with parts under way.
type operation struct {
	r    *hpdi.Request
	left int
	err  error
}

// part is what of an operation goes to one side in one piece. It covers one data set,
// or several that follow each other there, too.
type part struct {
	hpdi.Request
	op     *operation
	side   int
	place  int   // in flying
	off    int64 // on the device
	n      int64
	serial uint32     // of a discard of one data set
	slot   slotNumber // of the first data set
	count  uint64     // of a flush: writes to flash that it covers
	mem    [][]byte   // for Vec
}

// NewQueue returns a queue that takes depth requests at once.
func (d *device) NewQueue(depth int) (hpdi.Queue, error) {
	if d.closed.Load() {
		return nil, fmt.Errorf("%s: %w", d.info.Name, hpdi.ErrClosed)
	}
	primary, err := d.primary.NewQueue(depth)
	if err != nil {
		return nil, err
	}
	q := &queue{d: d}
	q.sides[onPrimary].discards, q.sides[onFlash].discards = d.primary.Info().Discard, d.f.info.Discard
	q.sides[onPrimary].Queue = primary
	if q.sides[onFlash].Queue, err = d.f.io.Device.NewQueue(depth); err != nil {
		// What is not on flash is not disturbed.
		q.sides[onFlash].Queue = broken{err: fmt.Errorf("open a queue: %w", err)}
	}
	if d.observe != nil {
		q.observer = d.observe()
	}
	d.queuesMu.Lock()
	defer d.queuesMu.Unlock()
	d.queues[q] = struct{}{}
	return q, nil
}

// broken stands for a queue that works no more.
type broken struct {
	hpdi.Plain
	err error
}

func (b broken) Submit(...*hpdi.Request) error { return b.err }
func (b broken) Wait(_ int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	return done, b.err
}
func (b broken) Close() error { return nil }

// Submit hands requests to the sides.
func (q *queue) Submit(reqs ...*hpdi.Request) error {
	if q.closed {
		return fmt.Errorf("%s: queue: %w", q.d.info.Name, hpdi.ErrClosed)
	}
	for _, r := range reqs {
		r.Err = r.Check(q.d.info)
		switch {
		case r.Err != nil || r.Op != hpdi.OpFlush && r.Bytes() == 0:
			q.done = append(q.done, r)
		case r.Op == hpdi.OpFlush:
			q.flush(r)
		default:
			if q.observer != nil {
				q.observer.Record(r.Op, r.Offset, r.Bytes())
			}
			if r.Op == hpdi.OpRead && q.d.stays(r.Offset, r.Bytes()) {
				q.pass(r)
			} else {
				q.start(r)
			}
		}
	}
	q.send()
	q.noteBusy()
	return nil
}

// pass sends a read of what is on the primary alone there as it is: nobody has to know of
// it, so that it costs next to nothing where little is on flash.
func (q *queue) pass(r *hpdi.Request) {
	s := &q.sides[onPrimary]
	s.passed = append(s.passed, r)
	s.batch = append(s.batch, r)
	q.pending++
	if q.tally.count(onPrimary, r.Op, r.Bytes()) {
		q.sample(r)
	}
}

// flush makes an operation of both sides, of the primary alone if all that was
// written to flash is durable: then a flash device that fails disturbs nobody.
func (q *queue) flush(r *hpdi.Request) {
	op := q.operation(r)
	q.add(op, onPrimary).Op = hpdi.OpFlush
	if n := q.d.f.written.Load(); n != q.d.f.flushed.Load() && !planted.Has(planted.FlushLeavesOutFlash) {
		p := q.add(op, onFlash)
		p.Op, p.count = hpdi.OpFlush, n
	}
}

// start sends a request to where its data sets are, in as few parts as possible.
// When one of them is held it is not sent at all: what holds it may wait for others.
func (q *queue) start(r *hpdi.Request) {
	f, shift := q.d.f, q.d.f.shift
	op := q.operation(r)
	first, end := r.Offset, r.Offset+r.Bytes()
	var last *part
	for off := first; off < end; {
		set := Set(off >> shift)
		n := min(end, int64(set+1)<<shift) - off
		e := f.enter(q.d.p, set, r.Op != hpdi.OpRead)
		if e.err != nil && q.abandons(r, set, n, e.err) {
			off += n
			continue
		}
		if e.err != nil || e.held != nil {
			q.retreat(op, r, e)
			return
		}
		side, at := onPrimary, off
		if e.slot != none {
			side, at = onFlash, e.at+off&(1<<shift-1)
		}
		// Each discard of a whole data set on flash has to know what came after it.
		alone := r.Op == hpdi.OpDiscard && side == onFlash
		if last != nil && last.side == side && last.Offset+last.n == at && last.off+last.n == off && !alone {
			last.n += n
		} else {
			last = q.add(op, side)
			last.Offset, last.off, last.n, last.serial, last.slot = at, off, n, e.serial, e.slot
		}
		off += n
	}
	if op.left == 0 {
		q.finish(op)
		return
	}
	if op.left == 1 { // as most are: all of it is in one place
		q.prepare(last, r)
		last.Vec = r.Vec
		return
	}
	q.fill(op, r, &cursor{vec: r.Vec})
}

// prepare says what a part has to do, but for its vectors.
func (q *queue) prepare(p *part, r *hpdi.Request) {
	p.Op, p.Durable = r.Op, r.Durable
	if r.Op == hpdi.OpDiscard || r.Op == hpdi.OpWriteZeroes {
		p.Length = p.n
	}
	if q.tally.count(p.side, r.Op, p.n) {
		q.sample(&p.Request)
	}
}

// fill gives the several parts of an operation, which were added last, what to do.
func (q *queue) fill(op *operation, r *hpdi.Request, cur *cursor) {
	var at [2]int
	for i := range at {
		at[i] = len(q.sides[i].flying)
		for at[i] > 0 && q.sides[i].flying[at[i]-1].op == op {
			at[i]--
		}
	}
	// In the order of the device, so that the vectors are gone through once.
	for range op.left {
		i := onPrimary
		if f := q.sides[onFlash].flying; at[onFlash] < len(f) {
			if p := q.sides[onPrimary].flying; at[onPrimary] == len(p) || f[at[onFlash]].off < p[at[onPrimary]].off {
				i = onFlash
			}
		}
		p := q.sides[i].flying[at[i]]
		at[i]++
		q.prepare(p, r)
		if len(r.Vec) > 0 {
			p.mem = cur.take(p.mem[:0], p.n)
			p.Vec = p.mem
		}
	}
}

// abandons reports whether a request only says that nobody needs what a data set held
// whose place is lost. Once it has said so of all of it the data set can be used again.
func (q *queue) abandons(r *hpdi.Request, set Set, n int64, err error) bool {
	if r.Op != hpdi.OpDiscard || !errors.Is(err, ErrLost) {
		return false
	}
	if n == q.d.f.SetBytes() {
		q.d.f.abandon(keyOf(q.d.p.number, set))
	}
	return true
}

// retreat leaves all data sets that an operation has entered, and parks its request,
// or ends it with an error.
func (q *queue) retreat(op *operation, r *hpdi.Request, e entry) {
	for i := range q.sides {
		s := &q.sides[i]
		for n := len(s.flying); n > 0 && s.flying[n-1].op == op; n-- {
			p := s.flying[n-1]
			q.leave(p, r.Op, 0)
			q.remove(p)
			q.keep(p)
			s.batch = s.batch[:len(s.batch)-1]
		}
	}
	q.ops = append(q.ops, op)
	q.pending--
	if e.held != nil {
		q.parked = append(q.parked, parked{r, e.held})
		return
	}
	r.Err = e.err
	q.done = append(q.done, r)
}

// operation returns one for r.
func (q *queue) operation(r *hpdi.Request) *operation {
	var op *operation
	if n := len(q.ops); n > 0 {
		op, q.ops = q.ops[n-1], q.ops[:n-1]
	} else {
		op = &operation{}
	}
	*op = operation{r: r}
	q.pending++
	return op
}

// add puts a new part of an operation into the next batch of a side.
func (q *queue) add(op *operation, i int) *part {
	var p *part
	if n := len(q.parts); n > 0 {
		p, q.parts = q.parts[n-1], q.parts[:n-1]
	} else {
		p = &part{}
		p.User = p
	}
	s := &q.sides[i]
	// Field by field: what a range needs is set by start, and vectors were dropped by
	// keep. Zeroing all of it took a tenth of a request's time.
	p.op, p.side, p.place, p.count = op, i, len(s.flying), 0
	p.Offset, p.Length, p.Durable, p.Err = 0, 0, false, nil
	op.left++
	s.flying = append(s.flying, p)
	s.batch = append(s.batch, &p.Request)
	return p
}

// remove takes a part out of those that are under way.
func (q *queue) remove(p *part) {
	s := &q.sides[p.side]
	last := len(s.flying) - 1
	s.flying[p.place] = s.flying[last]
	s.flying[p.place].place = p.place
	s.flying[last] = nil
	s.flying = s.flying[:last]
}

// keep keeps a part for the next operation.
func (q *queue) keep(p *part) {
	clear(p.mem)
	p.Vec, p.op = nil, nil
	q.parts = append(q.parts, p)
}

// send submits what was gathered for each side.
func (q *queue) send() {
	for i := range q.sides {
		s := &q.sides[i]
		if len(s.batch) == 0 {
			continue
		}
		if !s.discards {
			s.batch = slices.DeleteFunc(s.batch, q.skipDiscard)
		}
		err := s.Submit(s.batch...)
		clear(s.batch)
		s.batch = s.batch[:0]
		if err != nil {
			q.fail(i, err)
		}
	}
}

// skipDiscard completes a part for a side that cannot discard: what it holds is as
// undefined as it would be.
func (q *queue) skipDiscard(r *hpdi.Request) bool {
	if r.Op != hpdi.OpDiscard {
		return false
	}
	q.complete(r.User.(*part))
	return true
}

// cursor goes through the vectors of a request.
type cursor struct {
	vec [][]byte
	off int // in the first of them
}

// take appends the next n bytes to out.
func (c *cursor) take(out [][]byte, n int64) [][]byte {
	for n > 0 {
		v := c.vec[0][c.off:]
		if int64(len(v)) > n {
			v = v[:n]
			c.off += int(n)
		} else {
			c.vec, c.off = c.vec[1:], 0
		}
		if len(v) > 0 {
			out = append(out, v)
		}
		n -= int64(len(v))
	}
	return out
}
