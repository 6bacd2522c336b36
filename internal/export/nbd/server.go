package nbd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

// Server serves exports on any number of listeners.
type Server struct {
	cfg    Config
	limits Limits
	log    *slog.Logger
	staged budget

	mu        sync.Mutex // guards what follows
	closed    bool
	listeners map[Listener]struct{}
	conns     map[*conn]struct{}
	changed   chan struct{} // closed and replaced when a connection ends
	refusals  int           // connections turned away since refusedAt
	refusedAt time.Time
}

// Listener is what Serve accepts from: a [net.TCPListener], a
// [net.UnixListener], or another that can be interrupted without closing it.
type Listener interface {
	net.Listener
	SetDeadline(t time.Time) error
}

// New returns a server that serves once Serve is called.
func New(cfg Config) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := &Server{
		cfg: cfg, limits: cfg.Limits.withDefaults(), log: cfg.Logger,
		listeners: map[Listener]struct{}{}, conns: map[*conn]struct{}{},
		changed: make(chan struct{}),
	}
	s.staged.limit = s.limits.StagedBytes
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	return s, nil
}

// Serve accepts connections from l until ctx ends, which cuts them, or until
// Shutdown, which lets them finish, and returns when the connections it
// accepted have ended. It leaves l open (see the package comment on shared
// listeners). It returns ErrServerClosed after Shutdown, and the cause when ctx
// ended.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	dl, ok := l.(Listener)
	if !ok {
		return fmt.Errorf("nbd: accept cannot be interrupted on a %T: %w", l, block.ErrUnsupported)
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	// A deadline may be left from an earlier Serve on this listener.
	if err := dl.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("nbd: listener %v: %w", l.Addr(), err)
	}
	if !s.addListener(dl) {
		return ErrServerClosed
	}
	defer s.removeListener(dl)
	defer context.AfterFunc(ctx, func() { interrupt(dl) })()
	s.log.Info("nbd: serving", "address", l.Addr().String(), "tls", s.cfg.TLS.Mode.String())
	err := s.accept(ctx, dl, &wg)
	if errors.Is(err, ErrServerClosed) {
		wg.Wait() // before cancel cuts what Shutdown lets finish
	}
	return err
}

// accept is the loop of Serve.
func (s *Server) accept(ctx context.Context, l Listener, wg *sync.WaitGroup) error {
	const firstPause, longestPause = 5 * time.Millisecond, time.Second
	pause := firstPause
	for {
		nc, err := l.Accept()
		if err == nil {
			pause = firstPause
			s.admit(ctx, nc, wg)
			continue
		}
		switch {
		case s.isClosed():
			return ErrServerClosed
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("nbd: accept on %v: %w", l.Addr(), err)
		}
		// Most likely out of descriptors: it helps to wait.
		s.log.Warn("nbd: cannot accept a connection, trying again", "address", l.Addr().String(), "error", err, "pause", pause)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, longestPause)
	}
}

// admit starts a connection, or closes it when there are too many.
func (s *Server) admit(ctx context.Context, nc net.Conn, wg *sync.WaitGroup) {
	c := newConn(s, nc)
	switch s.addConn(c) {
	case nil:
		wg.Go(func() {
			defer s.removeConn(c)
			c.serve(ctx)
		})
	default:
		_ = nc.Close() // nothing was exchanged
		c.in.release()
	}
}

// interrupt ends a blocked Accept of this process and leaves the socket alone.
func interrupt(l Listener) { _ = l.SetDeadline(time.Unix(1, 0)) }

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

func (s *Server) addListener(l Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.listeners[l] = struct{}{}
	return true
}

func (s *Server) removeListener(l Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, l)
}

var errTooMany = errors.New("too many connections")

func (s *Server) addConn(c *conn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrServerClosed
	}
	if len(s.conns) >= s.limits.Connections {
		s.refusals++
		if now := time.Now(); now.Sub(s.refusedAt) >= time.Second { // a flood shall not fill the log
			s.log.Warn("nbd: connection refused, all are in use", "remote", c.remote, "limit", s.limits.Connections, "refused", s.refusals)
			s.refusals, s.refusedAt = 0, now
		}
		return errTooMany
	}
	s.conns[c] = struct{}{}
	return nil
}

func (s *Server) removeConn(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	close(s.changed)
	s.changed = make(chan struct{})
}

// Shutdown stops accepting at once and lets every connection answer the
// requests it has received; then it closes them. When ctx ends first, the rest
// is cut and ctx's error returned. A server that was shut down stays so.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	for l := range s.listeners {
		interrupt(l)
	}
	s.mu.Unlock()
	return s.end(ctx, func(*conn) bool { return true })
}

// CloseExport ends the connections to an export as Shutdown does. The caller
// makes sure before that Exports does not offer it any more: a connection
// claims an export before it looks it up, so that it is either found here or
// finds nothing there.
func (s *Server) CloseExport(ctx context.Context, name string) error {
	return s.end(ctx, func(c *conn) bool { return c.uses(name) })
}

// end stops the connections that match and waits until they are gone; when ctx
// ends it cuts them, which does not take long.
func (s *Server) end(ctx context.Context, match func(*conn) bool) error {
	var cut error
	done := ctx.Done()
	for {
		s.mu.Lock()
		left, changed := 0, s.changed
		for c := range s.conns {
			if match(c) {
				left++
				c.in.stop()
				if cut != nil {
					c.kill()
				}
			}
		}
		s.mu.Unlock()
		if left == 0 {
			return cut
		}
		select {
		case <-changed:
		case <-done:
			cut, done = fmt.Errorf("nbd: %d connections were cut: %w", left, context.Cause(ctx)), nil
		}
	}
}

// Connections describes the connections there are, in no order.
func (s *Server) Connections() []ConnInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	infos := make([]ConnInfo, 0, len(s.conns))
	for c := range s.conns {
		infos = append(infos, c.info())
	}
	return infos
}
