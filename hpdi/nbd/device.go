package nbd

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	proto "github.com/pollux-storage/pollux/internal/nbdproto"
)

// Options are how a device is opened.
type Options struct {
	// Connections is how many there are at most, 1 if 0. A server that does not allow
	// several gets one.
	Connections int
	// Reconnect is how long a request waits at most for a connection to be made again that
	// has ended; 0: it fails at once, and so do all later ones.
	Reconnect time.Duration
	// ReadOnly refuses requests that change the device.
	ReadOnly bool
	// TLS is used for nbds: URIs; nil trusts the system's authorities.
	TLS *tls.Config
	// Handshake is how long one may take, DefaultHandshake if 0.
	Handshake time.Duration
	// Dial makes connections in place of net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// mostConnections is how many an URI may ask for.
const mostConnections = 64

// Properties is what URIs of this driver take.
var Properties = []hpdi.Property{
	{Name: "socket", Type: hpdi.TypeString, Meaning: "Path of the server's socket, with nbd+unix and nbds+unix"},
	{Name: "connections", Type: hpdi.TypeInt, Default: "1", Min: 1, Max: mostConnections, Meaning: "Connections at most, if the server allows several"},
	{Name: "reconnect", Type: hpdi.TypeDuration, Default: "0s", Max: int64(24 * time.Hour), Meaning: "How long requests wait at most for a new connection when one has ended"},
	{Name: "handshake", Type: hpdi.TypeDuration, Default: DefaultHandshake.String(), Min: int64(time.Millisecond), Max: int64(time.Hour), Meaning: "How long it may take until a connection is ready"},
	{Name: "read-only", Type: hpdi.TypeBool, Default: "off", Meaning: "Refuse requests that change the device"},
	{Name: "tls-certificates", Type: hpdi.TypeString, Meaning: "Folder with ca-cert.pem to trust, and client-cert.pem and client-key.pem to show; without it the system's authorities are trusted"},
	{Name: "tls-hostname", Type: hpdi.TypeString, Meaning: "Name that the server's certificate must have, that of the URI if none is given"},
}

// ParseOptions makes options of the query of a URI. Its errors wrap hpdi.ErrProperty.
func ParseOptions(values url.Values) (Options, error) {
	s, err := hpdi.ParseSettings(Properties, values)
	if err != nil {
		return Options{}, err
	}
	o := Options{Connections: s.Int("connections"), Reconnect: s.Duration("reconnect"), Handshake: s.Duration("handshake"), ReadOnly: s.Bool("read-only")}
	if s.Given("tls-certificates") {
		if o.TLS, err = readTLS(s.Text("tls-certificates")); err != nil {
			return Options{}, fmt.Errorf("%w %q: %w", hpdi.ErrProperty, "tls-certificates", err)
		}
	}
	if s.Given("tls-hostname") {
		if o.TLS == nil {
			o.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
		}
		o.TLS.ServerName = s.Text("tls-hostname")
	}
	return o, nil
}

// DefaultHandshake is how long a handshake may take unless Options say otherwise.
const DefaultHandshake = 30 * time.Second

const (
	minBlock = 512
	// defaultMost is the largest payload by the protocol where a server says nothing.
	defaultMost = 32 << 20
	// mostRange is the longest range of a discard or a write of zeroes in one command.
	mostRange = 1 << 30
)

// device is an open export.
type device struct {
	uri    string
	t      target
	o      Options
	info   hpdi.Info
	exp    export
	most   int64 // bytes of a command with payload
	links  []*link
	ghosts ghosts

	mu     sync.Mutex // guards the rest
	closed bool
	queues int
	next   int // link of the next queue
}

// Open connects to an export. The context bounds that alone.
func Open(ctx context.Context, uri string, o Options) (hpdi.Device, error) {
	t, err := parse(uri)
	if err != nil {
		return nil, err
	}
	o.Handshake = cmp.Or(o.Handshake, DefaultHandshake)
	if o.Dial == nil {
		o.Dial = dialer.DialContext
	}
	d := &device{uri: uri, t: t, o: o}
	conn, exp, err := d.dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", uri, err)
	}
	if err := d.describe(exp); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("open %s: %w", uri, err)
	}
	d.links = []*link{newLink(d, conn)}
	for exp.flags&proto.FlagMultiConn != 0 && len(d.links) < o.Connections {
		// One that the server does not want is no reason to do without those it does.
		if conn, _, err = d.dial(ctx); err != nil {
			d.info.Note = fmt.Sprintf("only %d of %d connections: %v", len(d.links), o.Connections, err)
			break
		}
		d.links = append(d.links, newLink(d, conn))
	}
	for _, l := range d.links {
		l.open(l.conn)
	}
	return d, nil
}

// dialer notices within a minute that a host has gone.
var dialer = net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 6}}

// dial makes a connection to the export.
func (d *device) dial(ctx context.Context) (net.Conn, export, error) {
	ctx, cancel := context.WithTimeout(ctx, d.o.Handshake)
	defer cancel()
	raw, err := d.o.Dial(ctx, d.t.network, d.t.address)
	if err != nil {
		return nil, export{}, err
	}
	end := context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })
	conn, exp, err := negotiate(raw, d.t, d.o.TLS)
	if !end() && err == nil {
		err = ctx.Err() // its deadline is set, or about to be
	}
	if err != nil {
		_ = raw.Close() // nothing is under way on it
		if e := ctx.Err(); e != nil && !errors.Is(err, e) {
			err = fmt.Errorf("%w: %w", e, err)
		}
		return nil, export{}, err
	}
	return conn, exp, nil
}

// describe makes the info of what a server has said.
func (d *device) describe(exp export) error {
	has := func(flag uint16) bool { return exp.flags&flag != 0 }
	bs := max(minBlock, int(exp.least))
	readOnly := d.o.ReadOnly || has(proto.FlagReadOnly)
	d.exp, d.most = exp, int64(min(exp.most, defaultMost))
	if d.most -= d.most % int64(bs); d.most == 0 {
		return fmt.Errorf("the server takes %d bytes at once, less than a block of %d", exp.most, bs)
	}
	d.info = hpdi.Info{
		Name: d.uri, Driver: "nbd", Size: int64(exp.size) / int64(bs) * int64(bs), BlockSize: bs,
		Discard: has(proto.FlagSendTrim) && !readOnly, Zeroes: has(proto.FlagSendZeroes) && !readOnly, Durable: has(proto.FlagSendFUA) && !readOnly,
		ReadOnly: readOnly, Rotates: has(proto.FlagRotational),
		Status: exp.status, Event: true, Cancel: hpdi.CancelAll,
	}
	switch {
	case !has(proto.FlagSendFlush) && !readOnly:
		d.info.Note = "the server knows no flush: what it has completed is as durable as it makes it"
	case d.info.Size != int64(exp.size):
		d.info.Note = fmt.Sprintf("the last %d bytes are not a whole block and cannot be reached", int64(exp.size)-d.info.Size)
	case !exp.structured:
		d.info.Note = "the server knows no structured replies: a read that fails halfway ends the connection"
	}
	return nil
}

// fits reports why what a server says now is not the device that was opened.
func (d *device) fits(exp export) error {
	lost := d.exp.flags &^ exp.flags & (proto.FlagSendFlush | proto.FlagSendFUA | proto.FlagSendTrim | proto.FlagSendZeroes)
	if len(d.links) > 1 {
		lost |= d.exp.flags &^ exp.flags & proto.FlagMultiConn
	}
	switch {
	case exp.size < d.exp.size:
		return fmt.Errorf("export %q had %d bytes and has %d now", d.t.export, d.exp.size, exp.size)
	case !d.info.ReadOnly && exp.flags&proto.FlagReadOnly != 0:
		return fmt.Errorf("export %q is read-only now", d.t.export)
	case !d.info.ReadOnly && lost != 0:
		return fmt.Errorf("export %q cannot do any more what flags %#x stand for", d.t.export, lost)
	case d.exp.status && !exp.status:
		return fmt.Errorf("export %q does not tell holes from data any more", d.t.export)
	case exp.least > uint32(d.info.BlockSize) || int64(exp.most) < d.most:
		return fmt.Errorf("export %q takes blocks from %d to %d bytes now", d.t.export, exp.least, exp.most)
	}
	return nil
}

// Info describes the export as it was when it was opened.
func (d *device) Info() hpdi.Info { return d.info }

// Register does nothing: the kernel takes payload from wherever it lies.
func (d *device) Register([]byte) error { return nil }

// Unregister does nothing.
func (d *device) Unregister([]byte) error { return nil }

// NewQueue returns a queue on one of the connections. How many requests are under way at once
// is for the server to limit: who submits more waits until it reads them.
func (d *device) NewQueue(depth int) (hpdi.Queue, error) {
	if depth < 1 {
		return nil, fmt.Errorf("%s: queue depth %d is less than 1", d.uri, depth)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, fmt.Errorf("%s: %w", d.uri, hpdi.ErrClosed)
	}
	d.queues++
	q := &queue{d: d, l: d.links[d.next%len(d.links)]}
	q.cond.L = &q.mu
	d.next++
	return q, nil
}

// Close tells the server that the client leaves, and ends the connections.
func (d *device) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	if d.queues > 0 {
		defer d.mu.Unlock()
		return fmt.Errorf("%s: %d queues are still open, close them first", d.uri, d.queues)
	}
	d.closed = true
	d.mu.Unlock()
	for _, l := range d.links {
		l.close()
	}
	return nil
}
