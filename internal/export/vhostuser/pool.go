package vhostuser

import (
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/internal/virtio"
)

// pool is the workers of a connection: they do what may wait for the volume.
type pool struct {
	c     *client
	limit int
	wg    sync.WaitGroup

	mu      sync.Mutex // guards what follows
	some    *sync.Cond
	waiting []*request // from first on
	first   int
	workers int
	// unstaged is how many writes wait for their share of the operation log. Behind them
	// none is held: workers that wait for a share would wait for writes that no worker is
	// left for. It may be looked at without mu.
	unstaged atomic.Int32
	idle     int
	closed   bool
}

func (p *pool) init(c *client, limit int) {
	p.c, p.limit = c, limit
	p.some = sync.NewCond(&p.mu)
}

// give leaves a request to a worker. It returns false, and does nothing, if it is a write
// that is staged and must not be: others wait for memory of the operation log already, or
// the connection's share of it is in use.
func (p *pool) give(r *request) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case r.kind != virtio.BlkOut || r.flush:
	case r.write == nil:
		p.unstaged.Add(1)
	case p.unstaged.Load() > 0 || !p.c.share.TryAcquire(r.bytes):
		return false
	}
	if p.first > 0 && len(p.waiting) == cap(p.waiting) {
		p.waiting = p.waiting[:copy(p.waiting, p.waiting[p.first:])]
		p.first = 0
	}
	p.waiting = append(p.waiting, r) // at most as many as the queues have
	if len(p.waiting)-p.first > p.idle && p.workers < p.limit {
		p.workers++
		p.wg.Go(p.work)
		return true
	}
	p.some.Signal()
	return true
}

// take waits for a request. It returns nil when the pool is closed and has none.
func (p *pool) take() *request {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.idle++
	for p.first == len(p.waiting) && !p.closed {
		p.some.Wait()
	}
	p.idle--
	if p.first == len(p.waiting) {
		return nil
	}
	r := p.waiting[p.first]
	if p.first++; p.first == len(p.waiting) {
		p.waiting, p.first = p.waiting[:0], 0
	}
	return r
}

func (p *pool) work() {
	debug.SetPanicOnFault(true)
	var s scratch
	for {
		r := p.take()
		if r == nil {
			return
		}
		if err := p.do(r, &s); err != nil {
			p.c.cut(err) // first, so that nobody takes the queue for one that is done
			r.q.drop(r)
		}
	}
}

// do does a request and completes it. Its error ends the connection.
func (p *pool) do(r *request, s *scratch) (err error) {
	defer func() {
		if e := fault(recover()); e != nil {
			err = fmt.Errorf("queue %d: %w", r.q.index, e)
		}
		if err != nil {
			r.abort()
		}
	}()
	if err := r.do(p.c.ctx, s); err != nil {
		return err
	}
	r.q.finishOne(r)
	return nil
}

// close ends the workers when they have nothing left.
func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	p.some.Broadcast()
	p.mu.Unlock()
	p.wg.Wait()
}
