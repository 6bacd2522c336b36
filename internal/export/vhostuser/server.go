package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

// Server serves one volume on any number of listeners.
type Server struct {
	o     Options
	size  atomic.Int64 // bytes of the volume, as Resized has seen it
	fixed bool         // writes are refused
	// shared is the bytes of memory that all connections have reserved, at most o.Memory.
	shared atomic.Int64
	count  counters

	mu        sync.Mutex // guards what follows
	closed    bool
	listeners map[*net.UnixListener]struct{}
	clients   map[*client]struct{}
	owners    map[block.SessionID]*client // which connection has the in-flight area of a session
	changed   chan struct{}               // closed and replaced when a connection ends
	ids       uint64
	told      time.Time // begin of the present second of the log
	lines     int       // connections that the log has heard of in it
}

// counters are the sums of Stats.
type counters struct {
	reads, writes, flushes, discards, zeroes, readBytes, writtenBytes, errors atomic.Uint64
	resubmitted, skipped, kicks, calls, disconnects                           atomic.Uint64
	queues, inflight                                                          atomic.Int64
}

// New returns a server that serves once Serve is called. The volume stays the caller's.
func New(o Options) (*Server, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	s := &Server{o: o, listeners: map[*net.UnixListener]struct{}{}, clients: map[*client]struct{}{}, owners: map[block.SessionID]*client{}, changed: make(chan struct{})}
	info := o.Volume.Info()
	s.size.Store(info.Size)
	s.fixed = o.ReadOnly || info.ReadOnly
	return s, nil
}

// Serve accepts front-ends from l until ctx ends, which cuts them, or until Shutdown, which
// lets requests in flight end. It returns when the connections that it accepted have ended:
// ErrServerClosed after Shutdown, and the cause when ctx ended. It leaves l open: it may be
// shared with other processes, or be used again.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	if err := l.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("vhost-user: listener %v: %w", l.Addr(), err)
	}
	s.mu.Lock()
	closed := s.closed
	if !closed {
		s.listeners[l] = struct{}{}
	}
	s.mu.Unlock()
	if closed {
		return ErrServerClosed
	}
	defer func() {
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
	}()
	defer context.AfterFunc(ctx, func() { interrupt(l) })()
	err := s.accept(ctx, l, &wg)
	if errors.Is(err, ErrServerClosed) {
		wg.Wait() // before cancel cuts what Shutdown lets end
	}
	return err
}

// ServeConn serves one front-end that is connected already, until it or ctx ends, or
// Shutdown. It closes the connection. It returns why the connection was cut, nil if the
// front-end has closed it.
func (s *Server) ServeConn(ctx context.Context, conn *net.UnixConn) error {
	c, err := s.admit(conn)
	if err != nil {
		_ = conn.Close()
		return err
	}
	return c.serve(ctx)
}

// interrupt ends a blocked Accept of this process and leaves the socket alone.
func interrupt(l *net.UnixListener) { _ = l.SetDeadline(time.Unix(1, 0)) }

func (s *Server) accept(ctx context.Context, l *net.UnixListener, wg *sync.WaitGroup) error {
	const firstPause, longestPause = 5 * time.Millisecond, time.Second
	pause := firstPause
	for {
		conn, err := l.AcceptUnix()
		if err == nil {
			pause = firstPause
			c, err := s.admit(conn)
			if err != nil {
				_ = conn.Close()
				if !s.loud() {
					continue
				}
				s.o.Log.Warn("vhost-user: connection refused", "volume", s.o.Volume.Info().Name, "error", err)
				continue
			}
			wg.Go(func() { _ = c.serve(ctx) }) // which has logged why it ended
			continue
		}
		s.mu.Lock()
		closed := s.closed
		s.mu.Unlock()
		switch {
		case closed:
			return ErrServerClosed
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("vhost-user: accept on %v: %w", l.Addr(), err)
		}
		// Most likely out of descriptors: it helps to wait.
		s.o.Log.Warn("vhost-user: cannot accept a connection, trying again", "address", l.Addr().String(), "error", err, "pause", pause)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, longestPause)
	}
}

func (s *Server) admit(conn *net.UnixConn) (*client, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return nil, ErrServerClosed
	case len(s.clients) >= s.o.Clients:
		return nil, fmt.Errorf("all %d connections are in use", s.o.Clients)
	}
	s.ids++
	c := newClient(s, conn, s.ids)
	s.clients[c] = struct{}{}
	return c, nil
}

// loud reports whether the log shall hear of one more connection: whoever connects without
// end shall not fill it.
func (s *Server) loud() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := time.Now(); now.Sub(s.told) >= time.Second {
		s.told, s.lines = now, 0
	}
	s.lines++
	return s.lines <= 10
}

func (s *Server) gone(c *client) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.clients, c)
	s.disownLocked(c, 0)
	close(s.changed)
	s.changed = make(chan struct{})
}

// own makes the session of an in-flight area a connection's. A front-end gives its area to
// one connection after the other: one that still has it is cut, and waited for. Otherwise
// both would run what is in flight, and write to the ring.
func (s *Server) own(c *client, id block.SessionID) error {
	for {
		s.mu.Lock()
		other, changed := s.owners[id], s.changed
		if other == nil || other == c {
			s.owners[id] = c
			s.mu.Unlock()
			return nil
		}
		s.mu.Unlock()
		other.cut(errReplaced)
		select {
		case <-changed:
		case <-c.ctx.Done():
			return context.Cause(c.ctx)
		}
	}
}

// errReplaced is why the connection of a front-end that has made another one is cut.
var errReplaced = errors.New("the front-end has given its in-flight area to another connection")

// disownLocked forgets which sessions were a connection's, but for one, 0 for none.
func (s *Server) disownLocked(c *client, but block.SessionID) {
	for id, owner := range s.owners { // few more than there are connections
		if owner == c && id != but {
			delete(s.owners, id)
		}
	}
}

// Shutdown stops accepting and taking requests at once, lets the requests that were taken
// end, and closes the connections. When ctx ends first the rest is cut, and ctx's error
// returned. What is not done stays in the front-ends' in-flight areas. A server that was
// shut down stays so.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	for l := range s.listeners {
		interrupt(l)
	}
	for c := range s.clients {
		c.helpers.Go(func() { c.leave(ErrServerClosed) })
	}
	s.mu.Unlock()
	var cut error
	done := ctx.Done()
	for {
		s.mu.Lock()
		left, changed := len(s.clients), s.changed
		if cut != nil {
			for c := range s.clients {
				c.cut(cut)
			}
		}
		s.mu.Unlock()
		if left == 0 {
			return cut
		}
		select {
		case <-changed:
		case <-done:
			cut, done = fmt.Errorf("vhost-user: %d connections were cut: %w", left, context.Cause(ctx)), nil
		}
	}
}

// Resized tells the drivers that the volume has another size.
func (s *Server) Resized() {
	s.size.Store(s.o.Volume.Info().Size)
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.clients {
		c.helpers.Go(c.configChanged)
	}
}

// Stats returns what the server has done.
func (s *Server) Stats() Stats {
	n := &s.count
	s.mu.Lock()
	clients := len(s.clients)
	s.mu.Unlock()
	return Stats{
		Clients: clients, Queues: int(n.queues.Load()), InFlight: int(n.inflight.Load()),
		Reads: n.reads.Load(), Writes: n.writes.Load(), Flushes: n.flushes.Load(), Discards: n.discards.Load(), WriteZeroes: n.zeroes.Load(),
		ReadBytes: n.readBytes.Load(), WrittenBytes: n.writtenBytes.Load(), Errors: n.errors.Load(),
		Resubmitted: n.resubmitted.Load(), Skipped: n.skipped.Load(), Kicks: n.kicks.Load(), Calls: n.calls.Load(), Disconnects: n.disconnects.Load(),
	}
}

// lost reports whether an error says that the volume is no longer this process's to serve.
func lost(err error) bool { return errors.Is(err, block.ErrClosed) || errors.Is(err, block.ErrStale) }
