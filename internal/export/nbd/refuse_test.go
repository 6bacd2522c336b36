package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// What an administrator can get wrong is refused in words that name it.
func TestConfigRefuses(t *testing.T) {
	_, mode := ParseTLSMode("sometimes")
	_, pair := NewTLSConfig([]byte("no certificate"), nil, nil)
	cert, key := serverPEM(t)
	_, ca := NewTLSConfig(cert, key, []byte("no certificate"))
	_, limits := New(Config{Exports: &exports{}, Limits: Limits{Requests: -1}})
	for want, err := range map[string]error{
		`TLS mode "sometimes": use off, allowed or required`: mode,
		"server certificate and key":                         pair,
		"certificate authorities of clients":                 ca,
		"Requests":                                           limits,
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// A listener that cannot be interrupted, or is closed already, is refused
// before anything is served.
func TestServeRefusesListener(t *testing.T) {
	s, err := New(Config{Exports: &exports{}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(context.Background(), struct{ net.Listener }{l}); !errors.Is(err, block.ErrUnsupported) || !strings.Contains(err.Error(), "cannot be interrupted") {
		t.Errorf("without deadlines: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(context.Background(), l); !errors.Is(err, net.ErrClosed) || !strings.Contains(err.Error(), l.Addr().String()) {
		t.Errorf("closed: %v", err)
	}
}

// failing is a listener whose Accept fails a number of times.
type failing struct {
	*pipes
	mu    sync.Mutex
	fails []error
	calls []time.Time
}

func (f *failing) Accept() (net.Conn, error) {
	f.mu.Lock()
	f.calls = append(f.calls, time.Now())
	var err error
	if len(f.fails) > 0 {
		err, f.fails = f.fails[0], f.fails[1:]
	}
	f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return f.pipes.Accept()
}

// A server that is out of descriptors says so, waits longer each time, and
// serves when there are some again.
func TestAcceptFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log lockedBuffer
		s, err := New(Config{Exports: &exports{list: []Export{{Name: "v", Volume: nbdtest.New("v", testSize)}}}, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		f := &failing{pipes: newPipes(), fails: slices.Repeat([]error{&net.OpError{Op: "accept", Err: syscall.EMFILE}}, 12)}
		ctx, cancel := context.WithCancelCause(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := s.Serve(ctx, f); err == nil || err.Error() != "enough" {
				t.Errorf("serve ended with %v", err)
			}
		})
		a, b := net.Pipe()
		f.conns <- b
		c := &client{t: t, nc: a}
		c.enter("v").expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 512, nil)
		a.Close()
		if n := strings.Count(log.String(), "cannot accept a connection"); n != 12 || !strings.Contains(log.String(), "too many open files") {
			t.Errorf("%d complaints:\n%s", n, log.String())
		}
		f.mu.Lock()
		calls := slices.Clone(f.calls)
		f.mu.Unlock()
		if first, last := calls[1].Sub(calls[0]), calls[12].Sub(calls[11]); first != 5*time.Millisecond || last != time.Second {
			t.Errorf("tried again after %v first, %v at last", first, last)
		}
		cancel(errors.New("enough"))
		wg.Wait()

		// While it waits it can be stopped.
		g := &failing{pipes: newPipes(), fails: slices.Repeat([]error{syscall.EMFILE}, 1000)}
		ctx, stop := context.WithTimeout(context.Background(), 10*time.Second+time.Millisecond)
		defer stop()
		begin := time.Now()
		if err := s.Serve(ctx, g); !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) != 10*time.Second+time.Millisecond {
			t.Errorf("stopped after %v: %v", time.Since(begin), err)
		}
		// A listener that somebody closes cannot come back.
		g = &failing{pipes: newPipes(), fails: []error{net.ErrClosed}}
		if err := s.Serve(context.Background(), g); !errors.Is(err, net.ErrClosed) || !strings.Contains(err.Error(), "pipes") {
			t.Errorf("closed: %v", err)
		}
	})
}

// odd is a provider with an export that cannot be looked up.
type odd struct{ exports }

func (o *odd) Lookup(name string) (Export, error) {
	if name == "v" {
		return o.exports.Lookup(name)
	}
	return Export{}, fmt.Errorf("pool of %s: %w", name, block.ErrCorrupt)
}

// What is wrong with an export is told to the client, who may choose another.
func TestLookupFails(t *testing.T) {
	h := start(t, Config{Exports: &odd{exports{list: []Export{{Name: "v", Volume: nbdtest.New("v", testSize)}}}}})
	c := h.dialUnix().hello(nbdproto.FlagFixedNewstyle | nbdproto.FlagNoZeroes)
	r := c.expectOption(nbdproto.OptGo, goData("w"), nbdproto.RepErrUnknown)
	if text := string(r[len(r)-1].data); text != "pool of w: corrupt data" {
		t.Errorf("told %q", text)
	}
	c.goTo("v").expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 512, nil)
}

// Negotiations that break off, or that the protocol forbids, end without a
// connection left, and the log says why.
func TestNegotiationBreaksOff(t *testing.T) {
	cert, key := serverPEM(t)
	secure, err := NewTLSConfig(cert, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	tooLong := optionBytes(nbdproto.OptGo, make([]byte, 100<<10))
	for name, x := range map[string]struct {
		act  func(c *client)
		want string
	}{
		"within an option": {func(c *client) {
			c.hello(nbdproto.FlagFixedNewstyle).write(optionBytes(nbdproto.OptGo, goData("v"))[:20])
		}, "unexpected EOF"},
		"within a long option":        {func(c *client) { c.hello(nbdproto.FlagFixedNewstyle).write(tooLong[:50<<10]) }, "unexpected EOF"},
		"before the reply to it":      {func(c *client) { c.hello(nbdproto.FlagFixedNewstyle).write(optionBytes(nbdproto.OptList, nil)) }, "closed pipe"},
		"before STARTTLS is answered": {func(c *client) { c.hello(nbdproto.FlagFixedNewstyle).write(optionBytes(nbdproto.OptStartTLS, nil)) }, "closed pipe"},
		"instead of TLS": {func(c *client) {
			c.hello(nbdproto.FlagFixedNewstyle).expectOption(nbdproto.OptStartTLS, nil, nbdproto.RepAck)
			c.write([]byte(strings.Repeat("in clear ", 9)))
			_, _ = c.nc.Read(make([]byte, 100)) // what TLS says to that
		}, "TLS handshake"},
		"an option of the new style": {func(c *client) { c.hello(0).write(optionBytes(nbdproto.OptList, nil)) }, "option 3 without fixed newstyle"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log lockedBuffer
				s, err := New(Config{Exports: &exports{list: []Export{{Name: "v", Volume: nbdtest.New("v", testSize)}}},
					TLS: TLS{Mode: TLSAllowed, Config: secure}, Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
				if err != nil {
					t.Fatal(err)
				}
				p := newPipes()
				ctx, cancel := context.WithCancel(context.Background())
				var wg sync.WaitGroup
				wg.Go(func() { _ = s.Serve(ctx, p) })
				a, b := net.Pipe()
				p.conns <- b
				x.act(&client{t: t, nc: a})
				a.Close()
				synctest.Wait()
				if n := len(s.Connections()); n != 0 {
					t.Errorf("%d connections are left", n)
				}
				if !strings.Contains(log.String(), x.want) {
					t.Errorf("the log does not say %q:\n%s", x.want, log.String())
				}
				cancel()
				wg.Wait()
			})
		})
	}
}

// STARTTLS that brings data along is refused, and may be repeated without.
func TestStartTLSWithData(t *testing.T) {
	cert, key := serverPEM(t)
	secure, err := NewTLSConfig(cert, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	h := start(t, Config{Exports: &exports{}, TLS: TLS{Mode: TLSRequired, Config: secure}})
	c := h.dialTCP().hello(nbdproto.FlagFixedNewstyle | nbdproto.FlagNoZeroes)
	c.expectOption(nbdproto.OptStartTLS, []byte("x"), nbdproto.RepErrInvalid)
	c.expectOption(nbdproto.OptStartTLS, nil, nbdproto.RepAck)
}

// Block status puts alike neighbours together, skips what is empty or before
// the range, and never tells more than 32 bits hold.
func TestStatusEncoding(t *testing.T) {
	const b = block.Size
	for name, x := range map[string]struct {
		off, n uint64
		ext    []block.Extent
		want   []uint32 // length and flags in turn
	}{
		"alike":    {0, 4 * b, []block.Extent{{Offset: 0, Length: b}, {Offset: b, Length: b}, {Offset: 2 * b, Length: 2 * b, Hole: true}}, []uint32{2 * b, 0, 2 * b, 3}},
		"empty":    {0, 2 * b, []block.Extent{{Offset: 0, Length: b}, {Offset: b}, {Offset: b, Length: b, Hole: true}}, []uint32{b, 0, b, 3}},
		"outside":  {b, b, []block.Extent{{Offset: 0, Length: b, Hole: true}, {Offset: b, Length: 9 * b}}, []uint32{b, 0}},
		"too long": {0, 1<<32 - 1, []block.Extent{{Offset: 0, Length: 1 << 40}}, []uint32{1<<32 - b, 0}},
		"too long together": {0, 1<<32 - 1, []block.Extent{{Offset: 0, Length: 1 << 31}, {Offset: 1 << 31, Length: 1 << 31}},
			[]uint32{1 << 31, 0, 1<<31 - 1, 0}},
	} {
		mem := make([]byte, statusBytes(len(x.ext)))
		s := &session{}
		n := s.encodeStatus(mem, &header{off: x.off, n: uint32(x.n)}, x.ext)
		var got []uint32
		for at := nbdproto.ChunkSize + 4; at < n; at += 4 {
			got = append(got, binary.BigEndian.Uint32(mem[at:]))
		}
		if !slices.Equal(got, x.want) {
			t.Errorf("%s: %v, want %v", name, got, x.want)
		}
	}
}

// A volume that answers block status with nothing is an error of the request.
func TestStatusWithoutExtents(t *testing.T) {
	h := start(t, Config{Exports: &exports{list: []Export{{Name: "v", Volume: mute{nbdtest.New("v", testSize)}}}}})
	c := h.dialUnix().enter("v")
	c.expect(nbdproto.EIO, nbdproto.CmdBlockStatus, 0, 0, 4096, nil)
	c.expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 4096, nil)
}

type mute struct{ *nbdtest.Volume }

func (mute) Status(_ context.Context, _, _ int64, _ int, ext []block.Extent) ([]block.Extent, error) {
	return ext, nil
}

// serverPEM returns the server's certificate and key of a test.
func serverPEM(t *testing.T) (cert, key []byte) {
	t.Helper()
	dir := certificates(t)
	cert, err := os.ReadFile(filepath.Join(dir, "server-cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if key, err = os.ReadFile(filepath.Join(dir, "server-key.pem")); err != nil {
		t.Fatal(err)
	}
	return cert, key
}
