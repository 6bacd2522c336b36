// Package nbdclient is a small NBD client for tests that kill servers: many
// requests in flight, reconnection without end, and every request that was not
// answered is sent again. What a program above it must know to judge the
// outcome is kept for each request: when each attempt was sent, and by when
// one that was lost with its connection had taken effect or never would.
package nbdclient

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// Command is what a request does.
type Command uint16

// The commands.
const (
	Read        Command = 0
	Write       Command = 1
	Flush       Command = 3
	Trim        Command = 4
	WriteZeroes Command = 6
)

// Request is one request and, after Do, what became of it.
type Request struct {
	Command Command
	Offset  int64
	Data    []byte // payload of a write; filled by a read
	Length  int    // of a trim or write-zeroes
	FUA     bool
	NoHole  bool // write zeroes without giving space up

	// Attempts are in order; the last one was answered when Do returns nil or
	// an Errno.
	Attempts []Attempt
}

// Attempt is one sending of a request.
type Attempt struct {
	Sent time.Time
	// Ended is when the reply came, or, for a lost attempt, when the next
	// connection was ready: whoever serves then has fenced the one before, so
	// that an attempt which had no effect by then must never have one.
	Ended time.Time
	Lost  bool
}

func (r *Request) length() int {
	if r.Command == Read || r.Command == Write {
		return len(r.Data)
	}
	return r.Length
}

// Options say where to and how.
type Options struct {
	// URI is nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH.
	URI string
	// Structured asks for structured replies.
	Structured bool
	// Redial is the wait after a failed attempt to connect; 1 ms when zero.
	Redial time.Duration
}

// Stats are counts since New.
type Stats struct {
	Connects int // successful ones
	Failed   int // attempts to connect that failed
	// Refused are those in which the server refused the export. That it is about to end,
	// which who connects during a handover may be told, only means that one has to try
	// again, and does not count.
	Refused int
	Last    error // the newest failure
}

// ErrClosed is the error of requests that Close gave up.
var ErrClosed = errors.New("the NBD client was closed")

// Client is a connection that comes back. Do may be called concurrently.
//
// Lock order: there is one lock. The session's writer and reader own the two
// directions of the socket.
type Client struct {
	opt                      Options
	network, address, export string
	cancel                   context.CancelFunc
	ended                    chan struct{}

	mu      sync.Mutex // guards what follows
	changed *sync.Cond // the queue or the session changed
	session net.Conn   // nil while there is none
	pending map[uint64]*call
	queue   []*call // to be sent on this session
	cookie  uint64
	size    int64
	flags   uint16
	stats   Stats
	fatal   error // a broken protocol ends the client
	closed  bool
}

// call is a request in flight.
type call struct {
	*Request
	cookie uint64
	errno  Errno
	got    int // bytes that chunks of this attempt brought
	err    error
	done   chan struct{}
}

// ParseURI returns where an NBD URI leads.
func ParseURI(uri string) (network, address, export string, err error) {
	u, err := url.Parse(uri)
	if err != nil {
		return "", "", "", err
	}
	export = strings.TrimPrefix(u.Path, "/")
	switch u.Scheme {
	case "nbd":
		return "tcp", u.Host, export, nil
	case "nbd+unix":
		if socket := u.Query().Get("socket"); socket != "" {
			return "unix", socket, export, nil
		}
	}
	return "", "", "", fmt.Errorf("%q is neither nbd://HOST:PORT/NAME nor nbd+unix:///NAME?socket=PATH", uri)
}

// New returns a client that connects in the background and for ever.
func New(opt Options) (*Client, error) {
	c := &Client{opt: opt, ended: make(chan struct{}), pending: map[uint64]*call{}}
	c.changed = sync.NewCond(&c.mu)
	var err error
	if c.network, c.address, c.export, err = ParseURI(opt.URI); err != nil {
		return nil, err
	}
	if c.opt.Redial == 0 {
		c.opt.Redial = time.Millisecond
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	go c.run(ctx)
	return c, nil
}

// Ask connects once, and returns the size of an export as the server tells it.
func Ask(ctx context.Context, uri string) (int64, error) {
	network, address, export, err := ParseURI(uri)
	if err != nil {
		return 0, err
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if err != nil {
		return 0, err
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	size, _, err := negotiate(conn, bufio.NewReader(conn), export, false)
	if err == nil {
		_, err = conn.Write(appendRequest(nil, &Request{Command: nbdproto.CmdDisc}, 0))
	}
	return size, err
}

// Close ends the client; requests in flight get ErrClosed.
func (c *Client) Close() {
	c.mu.Lock()
	c.closed = true
	conn := c.session
	idle := len(c.pending) == 0
	c.mu.Unlock()
	if conn != nil && idle {
		// Best effort: a server that is gone needs no farewell.
		_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
		_, _ = conn.Write(appendRequest(nil, &Request{Command: nbdproto.CmdDisc}, 0))
	}
	c.cancel()
	<-c.ended
}

// Size returns the size of the export as the newest connection learned it, 0
// before the first one.
func (c *Client) Size() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.size
}

// Stats returns the counts.
func (c *Client) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stats
}

// Do sends a request, as often as connections end under it, and waits for its
// reply. It returns an Errno when the server answers with an error. When ctx
// ends first the outcome is unknown: the request stays in flight, and its Data
// and Attempts must not be touched until Close has returned.
func (c *Client) Do(ctx context.Context, r *Request) error {
	k := &call{Request: r, done: make(chan struct{})}
	r.Attempts = r.Attempts[:0]
	c.mu.Lock()
	if err := c.over(); err != nil {
		c.mu.Unlock()
		return err
	}
	c.cookie++
	k.cookie = c.cookie
	c.pending[k.cookie] = k
	if c.session != nil {
		c.queue = append(c.queue, k)
		c.changed.Broadcast()
	}
	c.mu.Unlock()
	select {
	case <-k.done:
		return k.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *Client) over() error {
	if c.fatal != nil {
		return c.fatal
	}
	if c.closed {
		return ErrClosed
	}
	return nil
}

// run keeps a session up until the client is closed.
func (c *Client) run(ctx context.Context) {
	defer close(c.ended)
	defer c.abandon()
	for ctx.Err() == nil {
		conn, r, err := c.connect(ctx)
		if err != nil {
			c.mu.Lock()
			c.stats.Failed++
			c.stats.Last = err
			if r, ok := errors.AsType[*RefusedError](err); ok && r.Reply != nbdproto.RepErrShutdown {
				c.stats.Refused++
			}
			c.mu.Unlock()
			select {
			case <-ctx.Done():
			case <-time.After(c.opt.Redial):
			}
			continue
		}
		c.serve(ctx, conn, r)
		c.mu.Lock()
		fatal := c.fatal
		c.mu.Unlock()
		if fatal != nil {
			return
		}
	}
}

// connect dials and negotiates.
func (c *Client) connect(ctx context.Context) (net.Conn, *bufio.Reader, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, c.network, c.address)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	r := bufio.NewReaderSize(conn, 64<<10)
	size, flags, err := negotiate(conn, r, c.export, c.opt.Structured)
	if err != nil {
		_ = conn.Close()
		return nil, nil, err
	}
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.size, c.flags = size, flags
	c.stats.Connects++
	c.session = conn
	c.queue = c.queue[:0]
	for _, k := range c.pending {
		if n := len(k.Attempts); n > 0 {
			k.Attempts[n-1].Ended, k.Attempts[n-1].Lost = now, true
		}
		k.got, k.errno = 0, 0
		c.queue = append(c.queue, k)
	}
	slices.SortFunc(c.queue, func(a, b *call) int { return cmp.Compare(a.cookie, b.cookie) })
	return conn, r, nil
}

// serve runs one session until its connection ends.
func (c *Client) serve(ctx context.Context, conn net.Conn, r *bufio.Reader) {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	written := make(chan struct{})
	go func() { defer close(written); c.send(conn) }()
	err := c.receive(r)
	_ = conn.Close() // frees the writer too
	c.mu.Lock()
	c.session = nil
	if errors.Is(err, errProtocol) {
		c.fatal = err
	}
	c.stats.Last = err
	c.changed.Broadcast()
	c.mu.Unlock()
	<-written
}

// send writes queued requests to one session. Several that wait leave in one
// write.
func (c *Client) send(conn net.Conn) {
	var b []byte
	for {
		b = b[:0]
		c.mu.Lock()
		for len(c.queue) == 0 && c.session == conn {
			c.changed.Wait()
		}
		if c.session != conn {
			c.mu.Unlock()
			return
		}
		now := time.Now()
		for _, k := range c.queue {
			k.Attempts = append(k.Attempts, Attempt{Sent: now})
			b = appendRequest(b, k.Request, k.cookie)
			if k.Command == Write {
				b = append(b, k.Data...)
			}
		}
		c.queue = c.queue[:0]
		c.mu.Unlock()
		if _, err := conn.Write(b); err != nil {
			_ = conn.Close() // the reader notices
		}
	}
}

// receive reads replies until the connection ends.
func (c *Client) receive(r *bufio.Reader) error {
	for {
		p, err := readReply(r)
		if err != nil {
			return err
		}
		c.mu.Lock()
		k := c.pending[p.cookie]
		sent := k != nil && len(k.Attempts) > 0 && !k.Attempts[len(k.Attempts)-1].Lost
		c.mu.Unlock()
		if !sent {
			return fmt.Errorf("%w: a reply to no request (cookie %d)", errProtocol, p.cookie)
		}
		done := true
		if p.structured {
			done = p.flags&nbdproto.ChunkDone != 0
			err = k.chunk(r, p)
		} else if k.errno = p.errno; p.errno == 0 && k.Command == Read {
			if c.opt.Structured {
				return fmt.Errorf("%w: a simple reply to a read", errProtocol)
			}
			_, err = io.ReadFull(r, k.Data)
			k.got = len(k.Data)
		}
		if err != nil {
			return err
		}
		if done {
			if err := c.finish(k); err != nil {
				return err
			}
		}
	}
}

// chunk takes one structured chunk of the reply to k.
func (k *call) chunk(r *bufio.Reader, p reply) error {
	be := binary.BigEndian
	var h [12]byte
	head := map[uint16]int{nbdproto.ChunkOffsetData: 8, nbdproto.ChunkOffsetHole: 12}[p.kind]
	if int(p.length) < head {
		return fmt.Errorf("%w: chunk type %d of %d bytes", errProtocol, p.kind, p.length)
	}
	switch {
	case p.kind == nbdproto.ChunkNone && p.length == 0:
		return nil
	case p.kind&chunkErrorBit != 0:
		b := make([]byte, p.length)
		if _, err := io.ReadFull(r, b); err != nil {
			return err
		}
		if len(b) < 6 {
			return fmt.Errorf("%w: an error chunk of %d bytes", errProtocol, len(b))
		}
		k.errno = Errno(be.Uint32(b))
		return nil
	case head == 0 || k.Command != Read:
		return fmt.Errorf("%w: chunk type %d in reply to command %d", errProtocol, p.kind, k.Command)
	}
	if _, err := io.ReadFull(r, h[:head]); err != nil {
		return err
	}
	n := int64(p.length) - 8
	if p.kind == nbdproto.ChunkOffsetHole {
		n = int64(be.Uint32(h[8:]))
	}
	off := int64(be.Uint64(h[:])) - k.Offset
	if off < 0 || n > int64(len(k.Data)) || off > int64(len(k.Data))-n {
		return fmt.Errorf("%w: a chunk outside the read", errProtocol)
	}
	k.got += int(n)
	part := k.Data[off : off+n]
	if p.kind == nbdproto.ChunkOffsetHole {
		clear(part)
		return nil
	}
	_, err := io.ReadFull(r, part)
	return err
}

// finish hands the outcome to whoever waits in Do.
func (c *Client) finish(k *call) error {
	if k.errno == 0 && k.Command == Read && k.got != len(k.Data) {
		return fmt.Errorf("%w: %d bytes answer a read of %d", errProtocol, k.got, len(k.Data))
	}
	if k.errno != 0 {
		k.err = k.errno
	}
	c.mu.Lock()
	k.Attempts[len(k.Attempts)-1].Ended = time.Now()
	delete(c.pending, k.cookie)
	c.mu.Unlock()
	close(k.done)
	return nil
}

// abandon ends what is still in flight.
func (c *Client) abandon() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for _, k := range c.pending {
		k.err = c.over()
		close(k.done)
	}
	clear(c.pending)
}
