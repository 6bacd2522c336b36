package nbd

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	proto "github.com/pollux-storage/pollux/internal/nbdproto"
)

// A command that was sent cannot be taken back. To give it up is to keep it in flight
// without its request: a ghost, whose reply is read and thrown away. The server may still
// carry it out, so that one which changes the device holds back what comes behind it.

// past is a deadline that wakes whoever reads or writes.
var past = time.Unix(1, 0)

// ghosts are commands that were given up, may still change the device, and have not been
// answered.
type ghosts struct {
	n    atomic.Int32 // of all, so that it costs nothing while there is none
	mu   sync.Mutex   // a leaf; guards the rest
	all  []*command
	held bool // a command waits for one of them
}

func changes(kind uint16) bool {
	return kind == proto.CmdWrite || kind == proto.CmdTrim || kind == proto.CmdWriteZeroes
}

// holds reports whether a command must wait, and remembers that one does.
func (g *ghosts) holds(c *command) bool {
	if !changes(c.kind) || g.n.Load() == 0 {
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, x := range g.all {
		if c.off < x.off+x.n && x.off < c.off+c.n {
			g.held = true
			return true
		}
	}
	return false
}

func (g *ghosts) add(c *command) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.all = append(g.all, c)
	g.n.Add(1)
}

// remove forgets a ghost, and reports whether commands are to be tried again.
func (g *ghosts) remove(c *command) (retry bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for i, x := range g.all {
		if x == c {
			g.all[i] = g.all[len(g.all)-1]
			g.all = g.all[:len(g.all)-1]
			g.n.Add(-1)
			break
		}
	}
	retry, g.held = g.held, false
	return retry
}

// giveUp ends the commands of an operation with an error, as soon as nobody has their
// memory in hand. Only the owner of the queue calls it, so that the operation is not used
// again meanwhile.
func (l *link) giveUp(op *operation, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.flying {
		if c.op == op {
			l.giveUpLocked(c, err)
		}
	}
}

func (l *link) giveUpLocked(c *command, err error) {
	switch {
	case c.sending:
		c.quit = err // transmit comes back to it
		l.hurryLocked(time.Now())
	case l.conn == nil || c.sent != l.number:
		c.err = err // it was not sent, or on a connection from which no reply comes any more
		l.finishLocked(c)
	case c == l.current:
		c.quit = err // who reads comes back to it, at once
		_ = l.conn.SetReadDeadline(past)
	default:
		l.leaveLocked(c, err)
	}
}

// leaveLocked makes a ghost of a command whose memory nobody has in hand.
func (l *link) leaveLocked(c *command, err error) {
	op := c.op
	c.op, c.vec, c.mem, c.quit = nil, nil, nil, nil
	if changes(c.kind) {
		l.d.ghosts.add(c)
	}
	op.q.settle(op, err)
}

// nudged is called by who reads when a deadline has woken it, which is when somebody gives
// up what it reads.
func (l *link) nudged() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == nil {
		return
	}
	_ = l.conn.SetReadDeadline(time.Time{})
	if c := l.current; c != nil && c.quit != nil && !c.sending {
		l.leaveLocked(c, c.quit)
	}
}

// pause is called by who reads when it has read a part of a reply.
func (l *link) pause() {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.current
	l.current = nil
	if c != nil && c.quit != nil && !c.sending {
		l.leaveLocked(c, c.quit)
	}
}

// cutOff notes that the connection has ended: no ghost is answered any more, and what was
// to be given up is.
func (l *link) cutOff() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conn, l.current = nil, nil
	for _, c := range l.flying {
		if c.op == nil || c.quit != nil && !c.sending {
			c.err = c.quit
			l.finishLocked(c)
		}
	}
}

// retry sends what ghosts have held back, on all connections.
func (l *link) retry() {
	l.wg.Go(func() {
		for _, x := range l.d.links {
			x.wmu.Lock()
			x.transmit(x.underWay())
			x.wmu.Unlock()
		}
	})
}

// late returns why a request has taken too long, nil if it has not.
func (c *command) late(now time.Time) error {
	if c.quit != nil || c.op == nil {
		return c.quit
	}
	return c.op.r.Late(now)
}

// Cancel gives requests up. They come out of Wait at once, unless their memory is in hand:
// then when the payload has left, for which the server has a second, or the rest of it that
// comes can be thrown away.
func (q *queue) Cancel(reqs ...*hpdi.Request) {
	for _, r := range reqs {
		if op := q.find(r); op != nil {
			q.l.giveUp(op, hpdi.ErrCanceled)
		}
	}
}

// find returns the operation of a request that is under way, or nil.
func (q *queue) find(r *hpdi.Request) *operation {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, op := range q.live {
		if op.r == r {
			return op
		}
	}
	return nil
}

// expire gives up requests whose deadlines have passed, and returns the next deadline; the
// zero time is none.
func (q *queue) expire() time.Time {
	for {
		var next time.Time
		var due *operation
		q.mu.Lock()
		if q.timed > 0 {
			now := time.Now()
			for _, op := range q.live {
				if at := op.r.Deadline; at.IsZero() || op.quit {
					continue
				} else if op.r.Late(now) != nil {
					due = op
				} else if next.IsZero() || at.Before(next) {
					next = at
				}
			}
		}
		if due != nil {
			due.quit = true
		}
		q.mu.Unlock()
		if due == nil {
			return next
		}
		q.l.giveUp(due, hpdi.ErrDeadline)
	}
}
