package nbd

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// ConnInfo describes a connection to people.
type ConnInfo struct {
	Remote   string // address, or "unix" for a local client
	Export   string // empty during negotiation
	TLS      bool
	Since    time.Time
	Requests int64
	Received int64 // bytes
	Sent     int64 // bytes
	InFlight int   // requests with a worker, or with replies the client has not taken
}

// conn is one connection: handshake, then session.
type conn struct {
	server *Server
	nc     net.Conn // the socket itself, below TLS
	in     *wire
	remote string
	addr   netip.Addr
	unix   bool
	since  time.Time

	claimed atomic.Pointer[string] // export in hand; see Server.CloseExport

	cancel atomic.Pointer[context.CancelFunc]
	active atomic.Pointer[active]
}

// active is what a connection has once it is in the transmission phase.
type active struct {
	session *session
	out     *replies
	tls     bool
}

func newConn(s *Server, nc net.Conn) *conn {
	c := &conn{server: s, nc: nc, in: newWire(nc, s.limits.Payload), remote: "unix", since: time.Now()}
	switch a := nc.RemoteAddr().(type) {
	case *net.TCPAddr:
		c.addr, c.remote = a.AddrPort().Addr().Unmap().WithZone(""), a.String()
	default:
		c.unix = true
	}
	return c
}

// kill cuts the connection: its socket fails and its requests are called off.
func (c *conn) kill() {
	_ = c.nc.Close() // closing twice is harmless
	if cancel := c.cancel.Load(); cancel != nil {
		(*cancel)()
	}
}

// serve runs the connection to its end.
func (c *conn) serve(ctx context.Context) {
	defer c.in.release()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.cancel.Store(&cancel)
	defer context.AfterFunc(ctx, c.kill)()
	defer func() { _ = c.nc.Close() }()

	log := c.server.log.With("remote", c.remote)
	h := &handshake{
		cfg: &c.server.cfg, limits: c.server.limits, nc: c.nc, in: c.in,
		addr: c.addr, unix: c.unix, claim: func(name string) { c.claimed.Store(&name) },
	}
	n, err := h.run()
	if err != nil {
		if quiet(err) {
			log.Debug("nbd: client left during negotiation", "reason", err)
		} else {
			log.Warn("nbd: negotiation failed", "reason", err)
		}
		return
	}
	out := newReplies(h.nc, c.server.limits, func(error) { c.kill() })
	log = log.With("export", n.export.Name)
	ses := newSession(*n, c.in, out, c.server.limits, &c.server.staged, log)
	c.active.Store(&active{session: ses, out: out, tls: h.encrypted})
	log.Info("nbd: client connected", "tls", h.encrypted, "readonly", n.flags&nbdproto.FlagReadOnly != 0)
	err = ses.run(ctx, c.kill)
	if h.encrypted {
		_ = h.nc.Close() // says goodbye in TLS first
	} else if t, ok := c.nc.(*net.TCPConn); ok {
		_ = t.CloseWrite() // so that unread requests do not turn the end into a reset
	}
	c.logEnd(err)
}

// quiet reports whether an end is in the normal run of things.
func quiet(err error) bool {
	return errors.Is(err, errAborted) || errors.Is(err, errDisconnect) || errors.Is(err, errStopped)
}

// logEnd says how a session ended.
func (c *conn) logEnd(err error) {
	a := c.active.Load()
	info := c.info()
	log := c.server.log.With("remote", c.remote, "export", info.Export, "requests", info.Requests,
		"received", info.Received, "sent", info.Sent)
	cause := a.out.failure()
	switch {
	case cause != nil && !errors.Is(cause, net.ErrClosed):
		if errors.Is(cause, syscall.EPIPE) || errors.Is(cause, syscall.ECONNRESET) {
			log.Info("nbd: client went away before its replies")
			return
		}
		log.Warn("nbd: client cut, it did not take its replies", "limit", c.server.limits.Reply, "error", cause)
	case quiet(err):
		log.Info("nbd: client disconnected", "reason", err)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, errHandover):
		log.Info("nbd: connection ended", "reason", err)
	default:
		log.Warn("nbd: client cut", "reason", err)
	}
}

// anyExport is claimed while it is not known yet which export a client will
// get. No export has that name: it is not UTF-8.
const anyExport = "\xff"

// uses reports whether the connection has, or may be about to get, an export.
func (c *conn) uses(name string) bool {
	p := c.claimed.Load()
	return p != nil && (*p == name || *p == anyExport)
}

func (c *conn) info() ConnInfo {
	i := ConnInfo{Remote: c.remote, Since: c.since}
	if a := c.active.Load(); a != nil {
		i.Export, i.TLS = a.session.export.Name, a.tls
		i.Requests, i.Received = a.session.requests.Load(), a.session.received.Load()
		i.InFlight, i.Sent = a.out.account()
	}
	return i
}
