package nbd

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	proto "github.com/pollux-storage/pollux/internal/nbdproto"
)

// queue is a path to the device. Several share a connection.
type queue struct {
	d      *device
	l      *link
	closed bool       // of the owner
	batch  []*command // of the owner: what Submit sends

	mu     sync.Mutex // guards the rest
	cond   sync.Cond
	want   int // requests in done that whoever waits is to be woken for
	flying int // requests that are not in done
	timed  int // of those, how many have a deadline
	done   []*hpdi.Request
	event  hpdi.Signal  // set while there is something in done
	timer  *time.Timer  // wakes who waits at a deadline; made for the first
	live   []*operation // under way
	ops    []*operation // to be used again
	cmds   []*command   // likewise
}

// operation is a request that commands are made of.
type operation struct {
	q *queue
	r *hpdi.Request
	// Guarded by queue.mu.
	left  int  // commands that are under way
	place int  // in live
	quit  bool // its deadline has passed
}

// command is what is sent to the server, and waits for its reply.
type command struct {
	op    *operation // nil of a ghost
	kind  uint16
	flags uint16
	off   int64
	n     int64
	vec   [][]byte // payload: of the request's vectors
	mem   [][]byte // for vec, where it is not all of the request's

	// Guarded by link.mu.
	cookie  uint64
	order   uint64 // in which commands began
	sent    uint64 // number of the connection that it was sent on
	sending bool   // its payload is being written
	over    bool   // it is complete, and sending alone keeps its memory
	err     error
	quit    error // why it is to be given up once nobody has its memory in hand

	// Of whoever reads the reply.
	got  int64 // bytes of a read that have come, or of a block status that were told
	told int64 // whole blocks of it
	full bool  // the request has no place for more
}

// Submit sends requests.
func (q *queue) Submit(reqs ...*hpdi.Request) error {
	if q.closed {
		return fmt.Errorf("%s: queue: %w", q.d.uri, hpdi.ErrClosed)
	}
	q.batch = q.batch[:0]
	q.mu.Lock()
	for _, r := range reqs {
		if r.Err = r.Check(q.d.info); r.Err == nil && !r.Deadline.IsZero() {
			r.Err = r.Late(time.Now())
		}
		switch {
		case r.Err != nil, r.Op != hpdi.OpFlush && r.Bytes() == 0,
			r.Op == hpdi.OpFlush && q.d.exp.flags&proto.FlagSendFlush == 0:
			q.done = append(q.done, r)
		default:
			q.flying++
			q.cutLocked(r)
		}
	}
	q.event.Set(len(q.done) > 0)
	q.mu.Unlock()
	if len(q.batch) > 0 {
		q.l.start(q.batch)
		clear(q.batch)
	}
	return nil
}

// cutLocked makes the commands of a request, each as large as the server takes it.
func (q *queue) cutLocked(r *hpdi.Request) {
	op := q.newOperationLocked()
	op.r, op.quit, op.place = r, false, len(q.live)
	if q.live = append(q.live, op); !r.Deadline.IsZero() {
		q.timed++
	}
	kind, flags, most := uint16(proto.CmdRead), uint16(0), q.d.most
	switch r.Op {
	case hpdi.OpWrite:
		kind = proto.CmdWrite
		if r.Durable {
			flags = proto.CmdFlagFUA
		}
	case hpdi.OpFlush:
		kind = proto.CmdFlush
	case hpdi.OpDiscard:
		kind, most = proto.CmdTrim, mostRange
	case hpdi.OpWriteZeroes:
		kind, most = proto.CmdWriteZeroes, mostRange
	case hpdi.OpStatus:
		kind, most = proto.CmdBlockStatus, mostRange
		if cap(r.Extents) == 1 {
			flags = proto.CmdFlagReqOne
		}
	}
	n := r.Bytes()
	switch r.Op {
	case hpdi.OpFlush:
		n = 0
	case hpdi.OpStatus:
		n = min(n, mostRange) // the application asks again for the rest
	}
	at, in := 0, 0 // vector, and byte in it
	for off := int64(0); off < n || n == 0; {
		c := q.newCommandLocked()
		c.op, c.kind, c.flags, c.off, c.n = op, kind, flags, r.Offset+off, min(n-off, most)
		if n == 0 {
			c.off = 0
		}
		switch {
		case len(r.Vec) == 0:
		case c.n == n:
			c.vec = r.Vec
		default:
			c.mem = c.mem[:0]
			for left := c.n; left > 0; {
				v := r.Vec[at][in:]
				if int64(len(v)) > left {
					v = v[:left]
					in += len(v)
				} else {
					at, in = at+1, 0
				}
				c.mem, left = append(c.mem, v), left-int64(len(v))
			}
			c.vec = c.mem
		}
		op.left++
		q.batch = append(q.batch, c)
		if off += c.n; n == 0 {
			return
		}
	}
}

func (q *queue) newOperationLocked() *operation {
	if n := len(q.ops); n > 0 {
		op := q.ops[n-1]
		q.ops = q.ops[:n-1]
		return op
	}
	return &operation{q: q}
}

func (q *queue) newCommandLocked() *command {
	if n := len(q.cmds); n > 0 {
		c := q.cmds[n-1]
		q.cmds = q.cmds[:n-1]
		return c
	}
	return &command{}
}

// complete takes a command that is over, and whose memory nobody uses any more. Holding
// link.mu is allowed.
func (q *queue) complete(c *command) {
	op, err := c.op, c.err
	q.mu.Lock()
	defer q.mu.Unlock()
	clear(c.mem)
	*c = command{mem: c.mem[:0]}
	q.cmds = append(q.cmds, c)
	q.settleLocked(op, err)
}

// settle notes that a command of an operation is over. Holding link.mu is allowed.
func (q *queue) settle(op *operation, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.settleLocked(op, err)
}

func (q *queue) settleLocked(op *operation, err error) {
	if op.r.Err == nil && err != nil {
		if op.r.Err = err; errors.Is(err, hpdi.ErrCanceled) || errors.Is(err, hpdi.ErrDeadline) {
			op.r.Err = fmt.Errorf("%s: %w", q.d.uri, err)
		}
	}
	if op.left--; op.left > 0 {
		return
	}
	last := len(q.live) - 1
	q.live[op.place], q.live[last].place = q.live[last], op.place
	q.live[last] = nil
	q.live = q.live[:last]
	if !op.r.Deadline.IsZero() {
		q.timed--
	}
	q.done = append(q.done, op.r)
	q.event.Set(true)
	op.r = nil
	q.ops = append(q.ops, op)
	if q.flying--; q.want > 0 && (len(q.done) >= q.want || q.flying == 0) {
		q.cond.Signal()
	}
}

// Wait returns requests that are complete.
func (q *queue) Wait(least int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	if q.closed {
		return done, fmt.Errorf("%s: queue: %w", q.d.uri, hpdi.ErrClosed)
	}
	q.await(least)
	defer q.mu.Unlock()
	done = append(done, q.done...)
	clear(q.done) // the application owns the requests again
	q.done = q.done[:0]
	q.event.Set(false)
	return done, nil
}

// await waits for so many requests to be complete, or for all, and returns with mu held.
func (q *queue) await(least int) {
	for {
		next := q.expire()
		q.mu.Lock()
		if len(q.done) >= least || q.flying == 0 {
			return
		}
		if !next.IsZero() {
			q.wakeAtLocked(next)
		}
		q.want = least
		q.cond.Wait()
		q.want = 0
		if len(q.done) >= least || q.flying == 0 {
			return
		}
		q.mu.Unlock()
	}
}

// wakeAtLocked makes whoever waits look again at a time.
func (q *queue) wakeAtLocked(at time.Time) {
	if q.timer == nil {
		q.timer = time.AfterFunc(time.Until(at), func() {
			q.mu.Lock()
			defer q.mu.Unlock()
			q.cond.Signal()
		})
		return
	}
	q.timer.Reset(time.Until(at))
}

// Event returns a descriptor that is readable while requests are complete that Wait has not
// returned.
func (q *queue) Event() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.event.Event()
}

// Close waits for what is under way and frees the queue.
func (q *queue) Close() error {
	if q.closed {
		return nil
	}
	q.closed = true
	q.await(int(^uint(0) >> 1))
	q.done, q.ops, q.cmds, q.batch, q.live = nil, nil, nil, nil, nil
	if q.timer != nil {
		q.timer.Stop()
	}
	q.event.Close()
	q.mu.Unlock()
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	q.d.queues--
	return nil
}
