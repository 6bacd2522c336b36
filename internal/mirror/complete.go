package mirror

import (
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/planted"
)

// Wait returns requests that are complete at all copies that they went to.
func (q *queue) Wait(min int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return done, fmt.Errorf("%s: queue: %w", q.m.info.Name, hpdi.ErrClosed)
	}
	for block := false; ; block = true {
		q.collect(block)
		q.settle()
		if len(q.done) >= min || len(q.pending) == 0 {
			break
		}
	}
	done = append(done, q.done...)
	clear(q.done) // the application owns the requests again
	q.done = q.done[:0]
	return done, nil
}

// Close waits for what is under way and frees the queue.
func (q *queue) Close() error {
	q.m.queuesMu.Lock()
	delete(q.m.queues, q)
	q.m.queuesMu.Unlock()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return fmt.Errorf("%s: queue: %w", q.m.info.Name, hpdi.ErrClosed)
	}
	q.drain()
	q.closed = true
	for i := range q.paths {
		if p := &q.paths[i]; p.disk != nil {
			q.drop(p)
		}
	}
	q.done = nil
	return nil
}

// collect takes completed parts from the copies. With block it waits for one at
// least.
func (q *queue) collect(block bool) {
	for i := range q.paths {
		p := &q.paths[i]
		if p.flight == 0 {
			continue
		}
		min := 0
		if block {
			min = 1
		}
		before := len(q.over)
		q.reap(p, min)
		// A copy that is slow holds up no operation that another completes.
		block = block && len(q.over) == before
	}
}

// drain waits until nothing is under way.
func (q *queue) drain() {
	for i := range q.paths {
		for p := &q.paths[i]; p.flight > 0; {
			q.reap(p, p.flight)
		}
	}
	q.release()
}

// reap takes at least n completed parts from a path.
func (q *queue) reap(p *path, n int) {
	comp, err := p.Wait(n, q.comp[:0])
	if err == nil && n > 0 && len(comp) == 0 {
		err = errors.New("the device lost requests")
	}
	p.flight -= len(comp)
	for _, r := range comp {
		q.complete(r.User.(*part))
	}
	clear(comp)
	q.comp = comp[:0]
	if err != nil {
		q.fail(p, err)
	}
}

// fail ends all parts that are under way on a path that works no more.
func (q *queue) fail(p *path, err error) {
	_ = p.Close() // waits for what is under way
	if _, never := p.Queue.(broken); !never {
		_ = p.disk.unuse()
	}
	p.Queue, p.flight = broken{err: err}, 0
	for _, op := range slices.Clone(q.pending) {
		for i := range op.parts {
			if x := &op.parts[i]; x.disk != nil && x.disk == p.disk {
				x.Err = err
				q.complete(x)
			}
		}
	}
}

// complete notes the result of a part.
func (q *queue) complete(x *part) {
	op, c := x.op, q.m.copies[x.copy]
	if op.r.Op == hpdi.OpRead {
		c.flight.Add(-op.r.Bytes())
	}
	if x.Err == nil {
		op.good++
	} else {
		op.failed[x.copy] = x.disk
		op.errs = append(op.errs, x.Err)
		if op.r.Op == hpdi.OpRead {
			c.readErrors.Add(1)
		} else {
			c.writeErrors.Add(1)
		}
	}
	x.disk, x.Vec = nil, nil
	if op.left--; op.left == 0 {
		q.finish(op)
	}
}

// finish moves an operation from those that are pending to those that are over.
func (q *queue) finish(op *operation) {
	last := len(q.pending) - 1
	q.pending[op.place] = q.pending[last]
	q.pending[op.place].place = op.place
	q.pending[last] = nil
	q.pending = q.pending[:last]
	q.over = append(q.over, op)
}

// settle gives all operations that are over their results.
func (q *queue) settle() {
	if slices.ContainsFunc(q.over, (*operation).unread) {
		q.drain() // who reads safely holds no stripes
		return
	}
	q.release()
}

// unread reports whether the operation is a read that failed at its copy.
func (op *operation) unread() bool { return op.r.Op == hpdi.OpRead && op.good == 0 }

// release gives operations their results: writes and flushes first, for reads
// that failed are repeated only while nothing is under way.
func (q *queue) release() {
	kept := q.over[:0]
	for _, op := range q.over {
		if op.unread() {
			kept = append(kept, op)
			continue
		}
		if op.r.Op != hpdi.OpRead {
			q.settleWrite(op)
		}
		q.retire(op)
	}
	if len(q.pending) == 0 {
		for _, op := range kept {
			op.r.Err = q.m.readSafely(op.r)
			q.retire(op)
		}
		kept = kept[:0]
	}
	clear(q.over[len(kept):])
	q.over = kept
}

// retire hands a request back, and keeps its operation for the next.
func (q *queue) retire(op *operation) {
	q.done = append(q.done, op.r)
	*op = operation{errs: op.errs[:0]}
	q.spare = append(q.spare, op)
}

// settleWrite decides what a write or a flush has come to. It went well when
// one copy in sync has it and those that have not are left out.
func (q *queue) settleWrite(op *operation) {
	r := op.r
	cause := errors.Join(op.errs...)
	switch {
	case op.good == 0:
		r.Err = cause
	case !op.failed.empty() && !planted.Has(planted.MirrorWriteErrorKept):
		r.Err = q.m.lose(op.failed, cause)
	}
	if !changes(r) {
		return
	}
	if r.Err != nil {
		// Some copies may have it, and none is left out.
		q.m.distrust(r.Offset, r.Bytes())
	}
	q.m.end(r.Offset, r.Bytes())
	q.m.stripes.unshare(r.Offset, r.Bytes())
}
