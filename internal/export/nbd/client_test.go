package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// exports is the provider of the tests.
type exports struct {
	mu   sync.Mutex
	list []Export
}

func (e *exports) Lookup(name string) (Export, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, x := range e.list {
		if x.Name == name {
			return x, nil
		}
	}
	return Export{}, block.ErrNotFound
}

func (e *exports) List() []Export {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]Export(nil), e.list...)
}

func (e *exports) remove(name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var rest []Export
	for _, x := range e.list {
		if x.Name != name {
			rest = append(rest, x)
		}
	}
	e.list = rest
}

// harness is a server on a Unix and a TCP socket.
type harness struct {
	t    *testing.T
	srv  *Server
	unix string // path
	tcp  string // address
	stop func()
}

type logWriter struct{ t *testing.T }

func (w logWriter) Write(p []byte) (int, error) {
	w.t.Log(string(bytes.TrimSpace(p)))
	return len(p), nil
}

func start(t *testing.T, cfg Config) *harness {
	t.Helper()
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.NewTextHandler(logWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	srv, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	h := &harness{t: t, srv: srv, unix: filepath.Join(t.TempDir(), "s")}
	ul, err := net.Listen("unix", h.unix)
	if err != nil {
		t.Fatal(err)
	}
	tl, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.tcp = tl.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, l := range []net.Listener{ul, tl} {
		wg.Go(func() {
			if err := srv.Serve(ctx, l); !errors.Is(err, context.Canceled) && !errors.Is(err, ErrServerClosed) {
				t.Errorf("Serve: %v", err)
			}
		})
	}
	h.stop = sync.OnceFunc(func() { cancel(); wg.Wait(); ul.Close(); tl.Close() })
	t.Cleanup(h.stop)
	return h
}

// serveVolume starts a server with one volume.
func serveVolume(t *testing.T, v *nbdtest.Volume, limits Limits) *harness {
	t.Helper()
	return start(t, Config{
		Exports: &exports{list: []Export{{Name: v.Info().Name, Volume: v}}}, Limits: limits,
	})
}

// client speaks the protocol by hand.
type client struct {
	t          *testing.T
	nc         net.Conn
	structured bool
	size       uint64
	flags      uint16
	cookie     uint64
}

func (h *harness) dialTCP() *client  { return h.dial("tcp", h.tcp) }
func (h *harness) dialUnix() *client { return h.dial("unix", h.unix) }

func (h *harness) dial(network, addr string) *client {
	h.t.Helper()
	nc, err := net.Dial(network, addr)
	if err != nil {
		h.t.Fatal(err)
	}
	c := &client{t: h.t, nc: nc}
	h.t.Cleanup(func() { nc.Close() })
	// So that a test that hangs says where.
	nc.SetDeadline(time.Now().Add(60 * time.Second))
	return c
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c.nc, b); err != nil {
		c.t.Fatalf("read %d bytes: %v", n, err)
	}
	return b
}

func (c *client) write(b []byte) {
	c.t.Helper()
	if _, err := c.nc.Write(b); err != nil {
		c.t.Fatalf("write: %v", err)
	}
}

// expectCut checks that the server ends the connection without another byte.
func (c *client) expectCut() {
	c.t.Helper()
	n, err := c.nc.Read(make([]byte, 1))
	if n != 0 || err == nil {
		c.t.Fatal("server went on instead of cutting the connection")
	}
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() {
		c.t.Fatal("server did not cut the connection")
	}
}

func (c *client) hello(flags uint32) *client {
	c.t.Helper()
	b := c.read(18)
	if binary.BigEndian.Uint64(b) != nbdproto.MagicServer || binary.BigEndian.Uint64(b[8:]) != nbdproto.MagicOption {
		c.t.Fatalf("greeting % x", b)
	}
	if f := binary.BigEndian.Uint16(b[16:]); f != nbdproto.FlagFixedNewstyle|nbdproto.FlagNoZeroes {
		c.t.Fatalf("handshake flags %#x", f)
	}
	c.write(binary.BigEndian.AppendUint32(nil, flags))
	return c
}

type optReply struct {
	kind uint32
	data []byte
}

func optionBytes(opt uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, nbdproto.MagicOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// option sends an option and returns its replies up to the final one.
func (c *client) option(opt uint32, data []byte) []optReply {
	c.t.Helper()
	c.write(optionBytes(opt, data))
	var replies []optReply
	for {
		b := c.read(20)
		if binary.BigEndian.Uint64(b) != nbdproto.MagicOptReply || binary.BigEndian.Uint32(b[8:]) != opt {
			c.t.Fatalf("reply to option %d: % x", opt, b)
		}
		r := optReply{kind: binary.BigEndian.Uint32(b[12:])}
		r.data = c.read(int(binary.BigEndian.Uint32(b[16:])))
		replies = append(replies, r)
		if r.kind == nbdproto.RepAck || r.kind&(1<<31) != 0 {
			return replies
		}
	}
}

func (c *client) expectOption(opt uint32, data []byte, want uint32) []optReply {
	c.t.Helper()
	r := c.option(opt, data)
	if got := r[len(r)-1].kind; got != want {
		c.t.Fatalf("option %d: final reply %#x (%q), want %#x", opt, got, r[len(r)-1].data, want)
	}
	return r
}

func goData(name string, infos ...uint16) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(infos)))
	for _, i := range infos {
		b = binary.BigEndian.AppendUint16(b, i)
	}
	return b
}

func contextData(name string, queries ...string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = binary.BigEndian.AppendUint32(b, uint32(len(q)))
		b = append(b, q...)
	}
	return b
}

// enter goes to the transmission phase with everything modern.
func (c *client) enter(name string) *client {
	c.t.Helper()
	c.hello(nbdproto.FlagFixedNewstyle | nbdproto.FlagNoZeroes)
	c.expectOption(nbdproto.OptStructured, nil, nbdproto.RepAck)
	c.structured = true
	c.expectOption(nbdproto.OptSetContext, contextData(name, nbdproto.ContextAllocation), nbdproto.RepAck)
	return c.goTo(name)
}

// enterSimple goes there without structured replies.
func (c *client) enterSimple(name string) *client {
	c.t.Helper()
	return c.hello(nbdproto.FlagFixedNewstyle | nbdproto.FlagNoZeroes).goTo(name)
}

func (c *client) goTo(name string) *client {
	c.t.Helper()
	for _, r := range c.expectOption(nbdproto.OptGo, goData(name, nbdproto.InfoBlockSize), nbdproto.RepAck) {
		if r.kind == nbdproto.RepInfo && binary.BigEndian.Uint16(r.data) == nbdproto.InfoExport {
			c.size, c.flags = binary.BigEndian.Uint64(r.data[2:]), binary.BigEndian.Uint16(r.data[10:])
		}
	}
	return c
}

func (c *client) startTLS(cfg *tls.Config) *client {
	c.t.Helper()
	c.expectOption(nbdproto.OptStartTLS, nil, nbdproto.RepAck)
	secure := tls.Client(c.nc, cfg)
	if err := secure.Handshake(); err != nil {
		c.t.Fatal(err)
	}
	c.nc = secure
	return c
}

func requestBytes(cmd, flags uint16, cookie, off uint64, n uint32, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, nbdproto.MagicRequest)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	b = binary.BigEndian.AppendUint32(b, n)
	return append(b, payload...)
}

// send sends a request and returns its cookie.
func (c *client) send(cmd, flags uint16, off uint64, n uint32, payload []byte) uint64 {
	c.t.Helper()
	c.cookie++
	c.write(requestBytes(cmd, flags, c.cookie, off, n, payload))
	return c.cookie
}

// reply is a whole reply, however many chunks it came in.
type reply struct {
	cookie uint64
	err    nbdproto.Errno
	text   string
	chunks []uint16
	holes  int
	data   []byte // of a read, put together
	off    uint64
	extent []block.Extent
}

// receive takes the next reply; off and n are those of the read it answers.
func (c *client) receive(off uint64, n uint32, isRead bool) reply {
	c.t.Helper()
	r := reply{off: off}
	for {
		magic := binary.BigEndian.Uint32(c.read(4))
		if magic == nbdproto.MagicSimple {
			b := c.read(12)
			r.err, r.cookie = nbdproto.Errno(binary.BigEndian.Uint32(b)), binary.BigEndian.Uint64(b[4:])
			if isRead {
				if c.structured {
					c.t.Fatal("simple reply to a read")
				}
				if r.err == nbdproto.EOK {
					r.data = c.read(int(n))
				}
			}
			return r
		}
		if magic != nbdproto.MagicStructured || !c.structured {
			c.t.Fatalf("reply magic %#x", magic)
		}
		b := c.read(16)
		flags, kind := binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
		if r.cookie = binary.BigEndian.Uint64(b[4:]); kind == nbdproto.ChunkOffsetData || kind == nbdproto.ChunkOffsetHole {
			if r.data == nil {
				r.data = bytes.Repeat([]byte{0xcc}, int(n))
			}
		}
		r.chunk(c, kind, c.read(int(binary.BigEndian.Uint32(b[12:]))))
		if flags&nbdproto.ChunkDone != 0 {
			return r
		}
	}
}

func (r *reply) chunk(c *client, kind uint16, p []byte) {
	c.t.Helper()
	r.chunks = append(r.chunks, kind)
	switch kind {
	case nbdproto.ChunkNone:
	case nbdproto.ChunkOffsetData:
		copy(r.data[binary.BigEndian.Uint64(p)-r.off:], p[8:])
	case nbdproto.ChunkOffsetHole:
		at, n := binary.BigEndian.Uint64(p)-r.off, binary.BigEndian.Uint32(p[8:])
		clear(r.data[at : at+uint64(n)])
		r.holes++
	case nbdproto.ChunkError:
		r.err = nbdproto.Errno(binary.BigEndian.Uint32(p))
		r.text = string(p[6:])
	case nbdproto.ChunkBlockStatus:
		if id := binary.BigEndian.Uint32(p); id != contextAllocationID {
			c.t.Fatalf("context %d", id)
		}
		at := int64(r.off)
		for p = p[4:]; len(p) > 0; p = p[8:] {
			n := int64(binary.BigEndian.Uint32(p))
			r.extent = append(r.extent, block.Extent{Offset: at, Length: n, Hole: binary.BigEndian.Uint32(p[4:]) == nbdproto.StateHole|nbdproto.StateZero})
			at += n
		}
	default:
		c.t.Fatalf("chunk type %d", kind)
	}
}

// do sends one request and takes its reply.
func (c *client) do(cmd, flags uint16, off uint64, n uint32, payload []byte) reply {
	c.t.Helper()
	cookie := c.send(cmd, flags, off, n, payload)
	r := c.receive(off, n, cmd == nbdproto.CmdRead)
	if r.cookie != cookie {
		c.t.Fatalf("reply to %d, want %d", r.cookie, cookie)
	}
	return r
}

func (c *client) expect(want nbdproto.Errno, cmd, flags uint16, off uint64, n uint32, payload []byte) reply {
	c.t.Helper()
	r := c.do(cmd, flags, off, n, payload)
	if r.err != want {
		c.t.Fatalf("command %d flags %#x at %d+%d: error %d (%s), want %d", cmd, flags, off, n, r.err, r.text, want)
	}
	return r
}

// testSeed returns the seed of a test, from POLLUX_SEED when that is set, and
// prints it.
func testSeed(t *testing.T) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("POLLUX_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("POLLUX_SEED: %v", err)
		}
	}
	t.Logf("POLLUX_SEED=%d", seed)
	return seed
}

// pattern is n bytes that are nowhere zero.
func pattern(seed byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7)%251 + 1 + seed%4
	}
	return b
}

// unread is a connection with bytes put back in front.
type unread struct {
	net.Conn
	head []byte
}

func (u *unread) Read(p []byte) (int, error) {
	if len(u.head) > 0 {
		n := copy(p, u.head)
		u.head = u.head[n:]
		return n, nil
	}
	if u.Conn == nil {
		return 0, io.EOF
	}
	return u.Conn.Read(p)
}
