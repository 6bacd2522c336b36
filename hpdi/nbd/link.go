package nbd

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	proto "github.com/pollux-storage/pollux/internal/nbdproto"
)

// link is a connection to the server, and the next one when that has ended. Commands are
// completed by its goroutine, with mu held; one whose payload is still being written is left
// to whoever writes it.
type link struct {
	d    *device
	ctx  context.Context // ends with the device
	stop context.CancelFunc
	wg   sync.WaitGroup

	wmu   sync.Mutex  // held while something is written; guards what follows
	heads []byte      // memory for headers
	vecs  [][]byte    // memory for out
	out   net.Buffers // what is written
	now   []*command  // that are being written

	mu      sync.Mutex // guards what follows, and of commands what they say
	conn    net.Conn   // nil while there is none
	number  uint64     // of conn, from 1
	flying  map[uint64]*command
	order   uint64   // of the newest command
	current *command // a part of whose reply is being read
	why     error    // why conn was closed from here
	failed  error    // why commands fail at once; nil while they wait for a connection

	busy  net.Conn    // what is written to; nil while nothing is
	until time.Time   // the deadline of that; zero: none
	due   []time.Time // of each start that is not over, its first deadline
}

func newLink(d *device, conn net.Conn) *link {
	l := &link{d: d, conn: conn, number: 1, flying: map[uint64]*command{}}
	l.ctx, l.stop = context.WithCancel(context.Background())
	return l
}

// open begins to read replies. The device does not change any more: links look at others.
func (l *link) open(conn net.Conn) { l.wg.Go(func() { l.run(conn, l.d.exp) }) }

// start begins commands.
func (l *link) start(cmds []*command) {
	var first time.Time
	l.mu.Lock()
	for _, c := range cmds {
		if l.failed != nil {
			c.err = l.failed
			c.op.q.complete(c)
			continue
		}
		l.order++
		c.order, c.cookie = l.order, l.order
		l.flying[c.cookie] = c
		first = earlier(first, c.op.r.Deadline)
	}
	if !first.IsZero() {
		l.due = append(l.due, first)
		l.hurryLocked(first) // whoever is before us
	}
	l.mu.Unlock()
	l.wmu.Lock()
	defer l.wmu.Unlock()
	l.transmit(cmds)
	if !first.IsZero() {
		l.mu.Lock()
		i := slices.Index(l.due, first)
		l.due = slices.Delete(l.due, i, i+1)
		l.mu.Unlock()
	}
}

// transmit sends those commands that are under way, were not sent on this connection and
// need not wait for a ghost. wmu is held.
func (l *link) transmit(cmds []*command) {
	l.mu.Lock()
	conn := l.conn
	var until time.Time
	for _, c := range cmds {
		if conn == nil || l.flying[c.cookie] != c || c.sent == l.number || c.op == nil || l.d.ghosts.holds(c) {
			continue
		}
		c.sent, c.sending, c.got, c.told, c.full, c.err = l.number, true, 0, 0, false, nil
		if r := c.op.r; c.kind == proto.CmdBlockStatus {
			r.Extents = r.Extents[:0]
		}
		until = earlier(until, c.op.r.Deadline)
		l.now = append(l.now, c)
	}
	if len(l.now) == 0 {
		l.mu.Unlock()
		return
	}
	for _, at := range l.due {
		until = earlier(until, at)
	}
	if l.busy = conn; !until.IsZero() {
		l.hurryLocked(until)
	}
	l.mu.Unlock()
	l.heads, l.vecs = slices.Grow(l.heads[:0], len(l.now)*proto.RequestSize), l.vecs[:0]
	from := 0 // of the headers that have no payload between them
	for _, c := range l.now {
		l.heads = appendRequest(l.heads, c)
		if c.kind == proto.CmdWrite {
			l.vecs = append(append(l.vecs, l.heads[from:]), c.vec...)
			from = len(l.heads)
		}
	}
	if from < len(l.heads) {
		l.vecs = append(l.vecs, l.heads[from:])
	}
	l.out = l.vecs
	_, err := l.out.WriteTo(conn)
	clear(l.vecs) // the application's memory
	l.mu.Lock()
	if !l.until.IsZero() {
		_ = conn.SetWriteDeadline(time.Time{})
	}
	l.busy, l.until = nil, time.Time{}
	if err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			l.why = errors.New("the server does not read, and a request was cancelled or its deadline has passed")
		}
		_ = conn.Close() // who reads finds out, and sends it again
	}
	for _, c := range l.now {
		switch c.sending = false; {
		case c.over:
			c.op.q.complete(c)
		case c.quit != nil:
			l.giveUpLocked(c, c.quit)
		}
	}
	l.mu.Unlock()
	clear(l.now)
	l.now = l.now[:0]
}

// grace is how long a server may take to read what is sent, even if there is a deadline
// before that.
const grace = time.Second

// hurryLocked ends the connection when what is being written has not left by a deadline: of
// one of its requests, or of one that waits behind it and may be of another queue. A server
// that does not read holds nobody up for longer.
func (l *link) hurryLocked(at time.Time) {
	if l.busy == nil {
		return
	}
	if soon := time.Now().Add(grace); at.Before(soon) {
		at = soon
	}
	if l.until.IsZero() || at.Before(l.until) {
		l.until = at
		_ = l.busy.SetWriteDeadline(at)
	}
}

// earlier returns the earlier of two deadlines, of which the zero time is none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

func appendRequest(b []byte, c *command) []byte {
	b = binary.BigEndian.AppendUint32(b, proto.MagicRequest)
	b = binary.BigEndian.AppendUint16(b, c.flags)
	b = binary.BigEndian.AppendUint16(b, c.kind)
	b = binary.BigEndian.AppendUint64(b, c.cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(c.off))
	return binary.BigEndian.AppendUint32(b, uint32(c.n))
}

// find returns the command that a reply on the present connection is for.
func (l *link) find(cookie uint64) (*command, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.flying[cookie]
	if c == nil || c.sent != l.number {
		return nil, broken("a reply with cookie %#x, which no request has", cookie)
	}
	l.current = c
	return c, nil
}

// finish ends a command with the error that it has, if any.
func (l *link) finish(c *command) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.finishLocked(c)
}

func (l *link) finishLocked(c *command) {
	delete(l.flying, c.cookie)
	if l.current == c {
		l.current = nil
	}
	if c.op == nil {
		if changes(c.kind) && l.d.ghosts.remove(c) {
			l.retry()
		}
		return
	}
	if c.over = true; !c.sending {
		c.op.q.complete(c)
	}
}

// underWay returns the commands that are, in the order in which they began.
func (l *link) underWay() []*command {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.underWayLocked()
}

func (l *link) underWayLocked() []*command {
	all := make([]*command, 0, len(l.flying))
	for _, c := range l.flying {
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b *command) int { return cmp.Compare(a.order, b.order) })
	return all
}

// fail ends all that is under way with an error, and what begins as long as there is no
// connection.
func (l *link) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = err
	now := time.Now()
	for _, c := range l.underWayLocked() {
		if c.err = c.late(now); c.err == nil {
			c.err = err
		}
		l.finishLocked(c)
	}
}

// run reads replies, of one connection after the other.
func (l *link) run(conn net.Conn, exp export) {
	for {
		why := newSource(l, conn, exp).replies()
		l.cutOff()
		_ = conn.Close()
		l.mu.Lock()
		if l.why != nil {
			why, l.why = l.why, nil
		}
		l.mu.Unlock()
		if errors.Is(why, net.ErrClosed) {
			why = errors.New("the connection has ended")
		}
		why = fmt.Errorf("%s: %w: %w", l.d.uri, hpdi.ErrDisconnected, why)
		if l.d.o.Reconnect == 0 {
			l.fail(why)
			return
		}
		if conn, exp = l.reconnect(why); conn == nil {
			return
		}
		l.mu.Lock()
		l.conn, l.failed = conn, nil
		l.number++
		l.mu.Unlock()
		// Replies are read meanwhile: a server may not read on before it has got rid of them.
		l.wg.Go(func() {
			l.wmu.Lock()
			defer l.wmu.Unlock()
			l.transmit(l.underWay())
		})
	}
}

// Between attempts to make a connection.
const (
	firstPause = 10 * time.Millisecond
	mostPause  = time.Second
)

// reconnect makes a connection, however long that takes; commands fail when it takes too
// long. It returns nil when the device is closed.
func (l *link) reconnect(why error) (net.Conn, export) {
	deadline := time.Now().Add(l.d.o.Reconnect)
	failed := false
	var newest error // of an attempt that was not only too late
	for pause := firstPause; ; pause = min(2*pause, mostPause) {
		ctx, cancel := l.ctx, context.CancelFunc(func() {})
		if !failed {
			ctx, cancel = context.WithDeadline(l.ctx, deadline)
		}
		conn, exp, err := l.d.dial(ctx)
		cancel()
		if err == nil {
			if err = l.d.fits(exp); err == nil {
				return conn, exp
			}
			_ = conn.Close()
		}
		if l.ctx.Err() != nil {
			l.fail(fmt.Errorf("%s: %w", l.d.uri, hpdi.ErrClosed))
			return nil, export{}
		}
		if newest == nil || !errors.Is(err, context.DeadlineExceeded) {
			newest = err
		}
		left := time.Until(deadline)
		if !failed && left <= 0 {
			failed = true
			l.fail(fmt.Errorf("%w; no new connection for %v: %w", why, l.d.o.Reconnect, newest))
		}
		if !failed {
			pause = min(pause, left)
		}
		select {
		case <-time.After(pause):
		case <-l.ctx.Done():
		}
	}
}

// close leaves the server. Nothing is under way.
func (l *link) close() {
	l.wmu.Lock()
	l.mu.Lock()
	conn := l.conn
	l.mu.Unlock()
	l.stop()
	if conn != nil {
		_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
		_, _ = conn.Write(appendRequest(nil, &command{kind: proto.CmdDisc})) // it sees us leave in any case
		_ = conn.Close()
	}
	l.wmu.Unlock()
	l.wg.Wait()
}
