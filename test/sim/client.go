package sim

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

// op is what a request of a client does.
type op string

const (
	opRead  op = "read"
	opWrite op = "write"
	opTrim  op = "trim"
	opZero  op = "zero"
	opFlush op = "flush"
)

// request is one request of a client. It lives until the client has its reply,
// over any number of connections.
type request struct {
	id     int
	s      *session
	op     op
	off, n int64
	data   []byte // of a write; of a read, what the last reply brought
	fua    bool
	issued time.Duration
	tries  int
	asked  string // the name of the volume when it last arrived at a guest
	// Of a client that sends requests again, see numbered.
	slot    int
	counter uint64
	logged  block.Seq // where its tag was published

	// Of the oracle: the log's head when the request was made, and for each
	// of its blocks where it was published.
	since     block.Seq
	arrival   block.Seq // the head when it last arrived at a guest
	published map[block.Logical]block.Seq
	holes     []hole    // long ranges instead of their blocks
	origins   []*origin // of the records that it may have published
}

// hole is a published range of zeroes.
type hole struct {
	block.Range
	seq block.Seq
}

func (r *request) String() string {
	s := fmt.Sprintf("%s %s %s", r.s.name, r.op, r.s.volume)
	if r.op != opFlush {
		s += fmt.Sprintf(" %d %d", r.off, r.n)
	}
	if r.fua {
		s += " fua"
	}
	return s + fmt.Sprintf(" (request %d)", r.id)
}

// session is a client's use of one volume: a queue of requests, of which some
// are under way, and a connection that is made again whenever it breaks.
type session struct {
	w        *World
	name     string // of the client
	volume   string
	identity string
	depth    int
	todo     []*request
	flying   []*request
	conn     *conn
	seeking  bool
	wait     time.Duration // before it looks for a server again
	errs     []error       // replies that were errors
	numbered numbered
}

// conn is one connection to a guest.
type conn struct {
	s      *session
	p      *proc
	t      *tenant
	ctx    context.Context
	cancel context.CancelFunc
	up     bool

	session block.Session // of a client that sends requests again, once one has arrived
	vol     block.VolumeID
}

// client is a name with sessions.
type client struct {
	sessions map[string]*session
}

// session returns the client's session with a volume.
func (w *World) session(name, volume string) *session {
	c := w.cls[name]
	if c == nil {
		c = &client{sessions: map[string]*session{}}
		w.cls[name] = c
	}
	s := c.sessions[volume]
	if s == nil {
		s = &session{w: w, name: name, volume: volume, identity: w.identityOf(volume), depth: 1 + w.rng.IntN(8)}
		if slices.Contains(w.resubmits, name) {
			s.numbered = numbered{on: true, id: block.SessionID(w.rng.Uint64() | 1)}
		}
		c.sessions[volume] = s
	}
	return s
}

// sessions lists all sessions in a fixed order.
func (w *World) sessions() []*session {
	var all []*session
	for _, n := range sortedKeys(w.cls) {
		for _, v := range sortedKeys(w.cls[n].sessions) {
			all = append(all, w.cls[n].sessions[v])
		}
	}
	return all
}

// idle says that no client waits for anything that it can get.
func (w *World) idle() bool {
	return !slices.ContainsFunc(w.sessions(), func(s *session) bool {
		return len(s.todo)+len(s.flying) > 0 && !w.pools[s.identity].lost()
	})
}

func (s *session) add(r *request) {
	s.todo = append(s.todo, r)
	s.pump()
}

// pump keeps the connection and as many requests under way as the client
// wants.
func (s *session) pump() {
	if len(s.todo)+len(s.flying) == 0 {
		return
	}
	if s.conn == nil {
		s.seek()
		return
	}
	for len(s.todo) > 0 && len(s.flying) < s.depth {
		r := s.todo[0]
		s.todo = s.todo[1:]
		s.flying = append(s.flying, r)
		s.number(r)
		r.issued, r.since = s.w.now(), s.w.pools[s.identity].shadow.seq
		s.send(r)
	}
}

// seek looks for who serves the volume until it finds one.
func (s *session) seek() {
	if s.seeking {
		return
	}
	s.seeking = true
	s.wait = min(max(2*s.wait, 2*time.Millisecond), 100*time.Millisecond)
	s.w.after(s.w.between(s.wait/16, s.wait), nil, "", func() {
		s.seeking = false
		if s.conn != nil {
			return
		}
		p, t := s.w.serving(s.identity)
		if p == nil {
			s.seek()
			return
		}
		s.wait = 0
		ctx, cancel := context.WithCancel(t.ctx)
		s.conn = &conn{s: s, p: p, t: t, ctx: ctx, cancel: cancel, up: true}
		s.w.log("%s connects to %s#%d", s.name, p.name, p.inc)
		for _, r := range s.flying {
			s.send(r)
		}
		s.pump()
	})
}

// serving returns who serves an identity.
func (w *World) serving(id string) (*proc, *tenant) {
	for _, g := range w.host.names {
		if p := w.procs[g]; p != nil && !p.dead.Load() {
			if t := p.tenants[id]; t != nil && t.serving {
				return p, t
			}
		}
	}
	return nil, nil
}

// cut breaks the session's connection, at both ends.
func (s *session) cut() {
	if c := s.conn; c != nil {
		c.up = false
		if c.session != nil && !c.p.dead.Load() {
			c.session.Leave()
		}
		c.cancel()
		s.conn = nil
		s.pump()
	}
}

// unserved breaks the connections of all clients of a tenant.
func (w *World) unserved(t *tenant) {
	t.serving = false
	w.pools[t.identity].countMoves(t)
	for _, s := range w.sessions() {
		if s.conn != nil && s.conn.t == t {
			s.cut()
		}
	}
}

// send puts a request on the connection.
func (s *session) send(r *request) {
	c := s.conn
	r.tries++
	s.w.after(s.w.between(5*time.Microsecond, 100*time.Microsecond), c.p, "", func() { c.arrive(r) })
}

// arrive is the server reading a request.
func (c *conn) arrive(r *request) {
	w := c.s.w
	if !c.up || c.t.gone {
		return
	}
	w.count(c.p, "gets "+r.String())
	if c.p.dead.Load() || !c.up {
		return
	}
	r.arrival, r.asked = w.pools[c.s.identity].shadow.seq, c.s.volume
	v, err := c.t.pool.Volume(c.s.volume)
	if err != nil {
		c.reply(r, nil, err)
		return
	}
	done, err := c.resume(v, r)
	if err != nil {
		c.reply(r, nil, err)
		return
	}
	var pause time.Duration
	if r.op == opWrite && w.chance(30) {
		pause = w.between(0, 20*time.Millisecond) // the payload comes slowly
	}
	data := r.data
	if r.op == opRead {
		data = make([]byte, r.n)
	}
	c.t.wg.Go(func() {
		var err error
		if done {
			err = finish(c.ctx, v, r)
		} else {
			err = serve(c.ctx, v, r, data, pause)
		}
		w.post(c.p, func() { c.reply(r, data, err) })
	})
}

// serve carries a request out as the protocol servers do: without waiting if
// that is possible.
func serve(ctx context.Context, v block.Volume, r *request, data []byte, pause time.Duration) error {
	var err error
	switch r.op {
	case opRead:
		if ok, err := v.TryRead(data, r.off); ok || err != nil {
			return err
		}
		return v.Read(ctx, data, r.off)
	case opWrite:
		err = write(ctx, v, r.off, data, pause, r.tag())
	case opTrim:
		err = v.Trim(ctx, r.off, r.n, r.tag())
	case opZero:
		err = v.WriteZeroes(ctx, r.off, r.n, false, r.tag())
	case opFlush:
		return v.Flush(ctx)
	}
	if err == nil && r.fua {
		err = v.Flush(ctx)
	}
	return err
}

func write(ctx context.Context, v block.Volume, off int64, data []byte, pause time.Duration, tag block.Tag) error {
	w, err := v.TryStage(off, len(data))
	if w == nil && err == nil {
		w, err = v.Stage(ctx, off, len(data))
	}
	if err != nil {
		return err
	}
	for i, b := range w.Buffers() {
		if i == 0 && pause > 0 {
			t := time.NewTimer(pause)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
				w.Abort()
				return ctx.Err()
			}
		}
		data = data[copy(b, data):]
	}
	w.SetTag(tag)
	if ok, err := w.TryCommit(); ok || err != nil {
		return err
	}
	return w.Commit(ctx)
}

// reply is the server sending its answer.
func (c *conn) reply(r *request, data []byte, err error) {
	w := c.s.w
	if c.p.hung {
		c.p.freeze(func() { c.reply(r, data, err) })
		return
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, block.ErrClosed) || errors.Is(err, block.ErrStale) {
		// The server hangs up without an answer.
		if c.up {
			c.s.cut()
		}
		return
	}
	w.count(c.p, "answers "+r.String())
	if c.p.dead.Load() || !c.up {
		return
	}
	w.after(w.between(5*time.Microsecond, 100*time.Microsecond), nil, "", func() {
		if !c.up {
			return // lost with the connection
		}
		if err != nil {
			w.log("%s fails: %v", r, err)
		} else {
			w.log("%s is done", r)
		}
		c.s.flying = slices.DeleteFunc(c.s.flying, func(o *request) bool { return o == r })
		w.answered(r, data, err)
		c.s.pump()
	})
}
