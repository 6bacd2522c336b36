package flashmap

import (
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
)

// Wait returns requests that are complete at all sides that they went to.
//
// While requests are under way at both sides it waits for the flash device, which is
// the faster one, and looks at the primary between: so what is on flash never waits
// for a disk, and what a disk has done for one request of flash at most.
func (q *queue) Wait(min int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	if q.closed {
		return done, fmt.Errorf("%s: queue: %w", q.d.info.Name, hpdi.ErrClosed)
	}
	q.await(min)
	q.noteBusy()
	done = append(done, q.done...)
	clear(q.done) // the application owns the requests again
	q.done = q.done[:0]
	return done, nil
}

// await waits until min requests are complete, or all. With something at both sides it
// looks first at what is complete already.
func (q *queue) await(min int) {
	for block := !q.sides[onFlash].busy() || !q.sides[onPrimary].busy(); ; block = true {
		q.unpark()
		need := 0
		if block {
			need = max(0, min-len(q.done))
		}
		q.collect(need)
		if len(q.done) >= min || q.pending == 0 && len(q.parked) == 0 {
			return
		}
	}
}

// unpark starts writes that nothing holds any more.
func (q *queue) unpark() {
	if len(q.parked) == 0 {
		return
	}
	all := q.parked
	q.parked = nil
	for _, w := range all {
		select {
		case <-w.held:
			q.start(w.r)
		default:
			q.parked = append(q.parked, w)
		}
	}
	q.send()
}

// collect takes completed parts from both sides. For need requests, if there are more than
// none, it waits for one part at least, or until a parked write can go on when nothing else
// is there to wait for. With one side alone it waits for as many parts as requests: to be
// woken for each costs more than all else here.
func (q *queue) collect(need int) {
	alone := len(q.parked) == 0 && (!q.sides[onFlash].busy() || !q.sides[onPrimary].busy())
	for _, i := range [...]int{onFlash, onPrimary} {
		if !q.sides[i].busy() {
			continue
		}
		least := 0
		if need > 0 {
			q.settle()
			if least = 1; alone {
				least = min(need, len(q.sides[i].flying)+len(q.sides[i].passed))
			}
			need = 0
		}
		q.reap(i, least)
	}
	if need > 0 && q.pending == 0 && len(q.parked) > 0 {
		<-q.parked[0].held
	}
}

// reap takes at least n completed parts from a side.
func (q *queue) reap(i, n int) {
	s := &q.sides[i]
	comp, err := s.Wait(n, q.comp[:0])
	if err == nil && n > 0 && len(comp) == 0 {
		err = errors.New("the device lost requests")
	}
	for _, r := range comp {
		if p, ok := r.User.(*part); ok && r == &p.Request {
			q.complete(p)
		} else {
			q.completePassed(s, r)
		}
	}
	clear(comp)
	q.comp = comp[:0]
	if err != nil {
		q.fail(i, err)
	}
}

// fail ends all parts that are under way at a side that works no more.
func (q *queue) fail(i int, err error) {
	s := &q.sides[i]
	_ = s.Close() // waits for what is under way
	s.Queue = broken{err: err}
	for n := len(s.flying); n > 0; n = len(s.flying) {
		p := s.flying[n-1]
		p.Err = err
		q.complete(p)
	}
	for _, r := range slices.Clone(s.passed) {
		r.Err = err
		q.completePassed(s, r)
	}
}

// completePassed takes a request that was passed on for complete. Devices mostly complete
// what they got first, so that it is soon found.
func (q *queue) completePassed(s *side, r *hpdi.Request) {
	i := slices.Index(s.passed, r)
	s.passed = slices.Delete(s.passed, i, i+1)
	q.sampled(r, onPrimary)
	q.done = append(q.done, r)
	q.pending--
}

// complete notes the result of a part.
func (q *queue) complete(p *part) {
	f, op := q.d.f, p.op
	err := p.Err
	q.sampled(&p.Request, p.side)
	switch {
	case p.side != onFlash:
	case err != nil:
		err = f.fail(err)
	case op.r.Op == hpdi.OpFlush:
		for old := f.flushed.Load(); old < p.count && !f.flushed.CompareAndSwap(old, p.count); {
			old = f.flushed.Load()
		}
	case op.r.Op != hpdi.OpRead && !op.r.Durable:
		f.written.Add(1) // before anybody learns of it
	}
	if op.r.Op != hpdi.OpFlush {
		q.leave(p, op.r.Op, p.n)
	}
	q.remove(p)
	q.keep(p)
	if op.err == nil {
		op.err = err
	}
	if op.left--; op.left == 0 {
		q.finish(op)
	}
}

// leave leaves the data sets of a part, of which it has changed n bytes.
func (q *queue) leave(p *part, op hpdi.Op, n int64) {
	f, shift := q.d.f, q.d.f.shift
	slot := p.slot
	for off, end := p.off, p.off+p.n; off < end; {
		set := Set(off >> shift)
		k := min(end, int64(set+1)<<shift) - off
		f.leave(q.d.p, set, slot, op, p.serial, off&(1<<shift-1), min(k, n))
		off += k
		if slot != none {
			slot++ // they follow each other
		}
	}
}

// finish gives a request its result.
func (q *queue) finish(op *operation) {
	op.r.Err = op.err
	q.done = append(q.done, op.r)
	op.r = nil
	q.ops = append(q.ops, op)
	q.pending--
}

// Close waits for what is under way and frees the queue.
func (q *queue) Close() error {
	if q.closed {
		return fmt.Errorf("%s: queue: %w", q.d.info.Name, hpdi.ErrClosed)
	}
	q.await(int(^uint(0) >> 1))
	q.settle()
	q.closed = true
	q.done = nil
	q.d.queuesMu.Lock()
	delete(q.d.queues, q)
	q.d.queuesMu.Unlock()
	if q.observer != nil {
		q.observer.Close()
	}
	return errors.Join(q.sides[onPrimary].Close(), q.sides[onFlash].Close())
}
