package mirror

import (
	"errors"
	"fmt"
	"sync"

	"github.com/pollux-storage/pollux/hpdi"
)

// queue is a path to the mirror: a queue of each copy's disk, opened when it is
// needed.
type queue struct {
	hpdi.Plain
	m     *Mirror
	depth int

	mu sync.Mutex // held by whoever uses the queue; only sweep competes with them

	paths   [MaxCopies]path
	pending []*operation // with parts under way
	over    []*operation // whose parts are all complete
	done    []*hpdi.Request
	spare   []*operation
	comp    []*hpdi.Request // memory for completions
	ranges  [][2]int64      // and for what Submit begins
	closed  bool
}

// path is a queue of one copy's disk.
type path struct {
	hpdi.Queue
	disk   *disk
	batch  []*hpdi.Request // to be submitted
	flight int
}

// operation is a request that is under way at the copies.
type operation struct {
	r      *hpdi.Request
	parts  [MaxCopies]part
	place  int // in pending
	left   int // parts that are under way
	good   int // parts that went well
	failed marked
	errs   []error
}

// part is an operation at one copy.
type part struct {
	hpdi.Request
	op   *operation
	copy int
	disk *disk // nil when the part is not under way
}

// NewQueue returns a queue that takes depth requests at once.
func (m *Mirror) NewQueue(depth int) (hpdi.Queue, error) {
	if m.closed.Load() {
		return nil, fmt.Errorf("%s: %w", m.info.Name, hpdi.ErrClosed)
	}
	if depth < 1 {
		return nil, fmt.Errorf("%s: queue depth %d is less than 1", m.info.Name, depth)
	}
	q := &queue{m: m, depth: depth}
	m.queuesMu.Lock()
	defer m.queuesMu.Unlock()
	m.queues[q] = struct{}{}
	return q, nil
}

// sweep makes queues at rest give up devices that were taken out, so that they
// can be closed.
func (m *Mirror) sweep() {
	m.queuesMu.Lock()
	defer m.queuesMu.Unlock()
	for q := range m.queues {
		if !q.mu.TryLock() {
			continue // it is in use, and at rest the next time
		}
		for i, c := range m.copies {
			if p := &q.paths[i]; p.disk != nil && p.disk != c.present() && len(q.pending) == 0 {
				q.drop(p)
			}
		}
		q.mu.Unlock()
	}
}

// Submit hands requests to the copies.
func (q *queue) Submit(reqs ...*hpdi.Request) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return fmt.Errorf("%s: queue: %w", q.m.info.Name, hpdi.ErrClosed)
	}
	q.ranges = q.ranges[:0]
	for _, r := range reqs {
		if r.Err = r.Check(q.m.info); r.Err == nil && changes(r) {
			q.ranges = append(q.ranges, [2]int64{r.Offset, r.Bytes()})
		}
	}
	marks := q.m.begin(q.ranges...)
	if !q.current() {
		q.refresh()
	}
	for _, r := range reqs {
		switch {
		case r.Err != nil || r.Op != hpdi.OpFlush && r.Bytes() == 0:
			q.done = append(q.done, r)
		case changes(r) && marks != nil:
			r.Err = marks
			q.done = append(q.done, r)
		case changes(r):
			q.enter(r)
			q.toAll(r)
		case r.Op == hpdi.OpFlush:
			q.toAll(r)
		case !q.m.isOld(r.Offset, r.Bytes()):
			q.toOne(r, false)
		case q.m.trusted(r.Offset):
			q.toOne(r, true)
		default:
			q.send()
			q.drain()
			r.Err = q.m.readSafely(r)
			q.done = append(q.done, r)
		}
	}
	q.send()
	return nil
}

// enter takes the stripes of a write, with paths to all copies that are there. A
// copy that comes later waits for the write when it is resilvered; one that came
// before the stripes were held may have been resilvered already.
func (q *queue) enter(r *hpdi.Request) {
	for {
		q.m.stripes.share(r.Offset, r.Bytes())
		if q.current() {
			return
		}
		q.m.stripes.unshare(r.Offset, r.Bytes())
		q.refresh()
	}
}

// current reports whether there is a path to each copy that is there.
func (q *queue) current() bool {
	for i, c := range q.m.copies {
		if d := c.present(); d != nil && d != q.paths[i].disk {
			return false
		}
	}
	return true
}

// changes reports whether a request alters the device.
func changes(r *hpdi.Request) bool {
	return (r.Op == hpdi.OpWrite || r.Op == hpdi.OpDiscard || r.Op == hpdi.OpWriteZeroes) && r.Bytes() > 0
}

// refresh finishes what is under way, gives up paths to disks that are no longer
// those of their copies, and opens what is missing.
func (q *queue) refresh() {
	q.send()
	q.drain()
	for i := range q.paths {
		p := &q.paths[i]
		var want *disk
		if i < len(q.m.copies) {
			want = q.m.copies[i].present()
		}
		if p.disk == want {
			continue
		}
		if p.disk != nil {
			q.drop(p)
		}
		if want == nil || !want.use() {
			continue
		}
		in, err := want.dev.NewQueue(q.depth)
		if err != nil {
			// Writes must not pass the copy by as if it were absent.
			err = errors.Join(fmt.Errorf("open a queue of device %s: %w", want.dev.Info().Name, err), want.unuse())
			in = broken{err: err}
			p.Queue, p.disk = in, want
			continue
		}
		p.Queue, p.disk = in, want
	}
}

// drop closes a path that has nothing under way.
func (q *queue) drop(p *path) {
	_ = p.Close() // its requests are all known
	if _, never := p.Queue.(broken); !never {
		_ = p.disk.unuse()
	}
	*p = path{batch: p.batch[:0]}
}

// broken stands for a queue that could not be opened.
type broken struct {
	hpdi.Plain
	err error
}

func (b broken) Submit(...*hpdi.Request) error { return b.err }
func (b broken) Wait(_ int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	return done, b.err
}
func (b broken) Close() error { return nil }

// operation returns one for r.
func (q *queue) operation(r *hpdi.Request) *operation {
	var op *operation
	if n := len(q.spare); n > 0 {
		op, q.spare = q.spare[n-1], q.spare[:n-1]
	} else {
		op = &operation{}
	}
	op.r, op.place = r, len(q.pending)
	q.pending = append(q.pending, op)
	return op
}

// add puts the part of an operation for copy i into the next batch.
func (q *queue) add(op *operation, i int) {
	p, r := &op.parts[i], op.r
	*p = part{Request: hpdi.Request{Op: r.Op, Offset: r.Offset + base, Vec: r.Vec, Length: r.Length, Durable: r.Durable, User: p}, op: op, copy: i, disk: q.paths[i].disk}
	if r.Op == hpdi.OpFlush {
		p.Offset = 0
	}
	op.left++
	q.paths[i].batch = append(q.paths[i].batch, &p.Request)
}

// toAll makes an operation of all copies that are there.
func (q *queue) toAll(r *hpdi.Request) {
	op := q.operation(r)
	for i, c := range q.m.copies {
		if d := c.present(); d != nil && d == q.paths[i].disk {
			q.add(op, i)
		}
	}
	if op.left == 0 {
		op.errs = append(op.errs, errNoCopy)
		q.finish(op)
	}
}

// toOne makes an operation of the copy that has least to do, of those in sync if
// the range is old.
func (q *queue) toOne(r *hpdi.Request, old bool) {
	op := q.operation(r)
	best, turn := -1, int(q.m.reads.Add(1))
	for k := range q.m.copies {
		i := (turn + k) % len(q.m.copies)
		c := q.m.copies[i]
		if d := c.present(); d == nil || d != q.paths[i].disk || old && !c.is(InSync) {
			continue
		}
		if best < 0 || c.flight.Load() < q.m.copies[best].flight.Load() {
			best = i
		}
	}
	if best < 0 {
		op.errs = append(op.errs, errNoCopy)
		q.finish(op)
		return
	}
	q.m.copies[best].flight.Add(r.Bytes())
	q.add(op, best)
}

// send submits what was gathered for each copy.
func (q *queue) send() {
	for i := range q.paths {
		p := &q.paths[i]
		if len(p.batch) == 0 {
			continue
		}
		p.flight += len(p.batch)
		if err := p.Submit(p.batch...); err != nil {
			q.fail(p, err)
		}
		clear(p.batch)
		p.batch = p.batch[:0]
	}
}
