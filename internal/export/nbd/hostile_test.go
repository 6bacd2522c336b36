package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
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

// pipes is a listener in memory, so that tests can have a clock of their own.
type pipes struct {
	conns chan net.Conn
	stop  chan struct{}
	once  sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), stop: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.stop:
		return nil, os.ErrDeadlineExceeded
	}
}
func (p *pipes) Close() error   { return errors.New("the server closed a listener that is not its own") }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipes", Net: "unix"} }
func (p *pipes) SetDeadline(t time.Time) error {
	if !t.IsZero() {
		p.once.Do(func() { close(p.stop) })
	}
	return nil
}

// inBubble runs a test against a server on pipes with a false clock.
func inBubble(t *testing.T, v block.Volume, limits Limits, test func(t *testing.T, s *Server, dial func() *client)) {
	synctest.Test(t, func(t *testing.T) {
		s, err := New(Config{Exports: &exports{list: []Export{{Name: "v", Volume: v}}}, Limits: limits})
		if err != nil {
			t.Fatal(err)
		}
		p := newPipes()
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() { _ = s.Serve(ctx, p) })
		test(t, s, func() *client {
			a, b := net.Pipe()
			p.conns <- b
			t.Cleanup(func() { a.Close() })
			return &client{t: t, nc: a}
		})
		cancel()
		wg.Wait()
	})
}

func TestDeadlines(t *testing.T) {
	limits := Limits{Handshake: 10 * time.Second, Payload: 20 * time.Second, Reply: 30 * time.Second}
	cases := map[string]struct {
		act  func(c *client)
		want time.Duration
	}{
		"silent from the start": {func(c *client) { c.read(18) }, 10 * time.Second},
		"half an option":        {func(c *client) { c.hello(nbdproto.FlagFixedNewstyle).write([]byte("IHAVEO")) }, 10 * time.Second},
		"takes no greeting":     {func(*client) {}, 10 * time.Second},
		"half a request":        {func(c *client) { c.enter("v").write(requestBytes(nbdproto.CmdRead, 0, 1, 0, 512, nil)[:20]) }, 20 * time.Second},
		"half a payload": {func(c *client) {
			c.enter("v").write(requestBytes(nbdproto.CmdWrite, 0, 1, 0, 8192, make([]byte, 5000)))
		}, 20 * time.Second},
		"half a payload, refused": {func(c *client) {
			c.enter("v").write(requestBytes(nbdproto.CmdWrite, 0, 1, 1<<40, 8192, make([]byte, 5000)))
		}, 20 * time.Second},
		"does not take a reply": {func(c *client) { c.enter("v").write(requestBytes(nbdproto.CmdRead, 0, 1, 0, 512, nil)) }, 30 * time.Second},
	}
	for name, x := range cases {
		t.Run(name, func(t *testing.T) {
			v := nbdtest.New("v", testSize)
			inBubble(t, v, limits, func(t *testing.T, s *Server, dial func() *client) {
				c, other := dial(), dial().enter("v")
				begin := time.Now()
				x.act(c)
				for len(s.Connections()) > 1 {
					time.Sleep(time.Second) // of the false clock
				}
				if took := time.Since(begin); took < x.want || took > x.want+2*time.Second {
					t.Errorf("cut after %v, want %v", took, x.want)
				}
				other.expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 512, nil)
				if v.Staged() != 0 || v.Unstable() != 0 {
					t.Error("half a payload left something behind")
				}
			})
		})
	}
}

// TestIdleIsAllowed checks that no deadline is left over from earlier requests.
func TestIdleIsAllowed(t *testing.T) {
	v := nbdtest.New("v", testSize)
	inBubble(t, v, Limits{Payload: 20 * time.Second}, func(t *testing.T, s *Server, dial func() *client) {
		c := dial().enter("v")
		for range 5 {
			r := requestBytes(nbdproto.CmdWrite, 0, 7, 0, 8192, pattern(1, 8192))
			c.write(r[:5000])
			time.Sleep(15 * time.Second)
			c.write(r[5000:])
			if r := c.receive(0, 0, false); r.err != nbdproto.EOK {
				t.Fatal(r.err)
			}
			time.Sleep(time.Hour)
		}
	})
}

// TestHostile runs clients that misbehave beside one that must not notice.
func TestHostile(t *testing.T) {
	request := func(cmd, flags uint16, off uint64, n uint32, p []byte) []byte {
		return requestBytes(cmd, flags, 1, off, n, p)
	}
	cases := map[string]func(h *harness, c *client){
		"garbage at once": func(_ *harness, c *client) {
			c.hello(nbdproto.FlagFixedNewstyle).write([]byte(strings.Repeat("GET / HTTP/1.1\r\n", 9)))
		},
		"garbage request": func(_ *harness, c *client) { c.enter("v").write(bytes.Repeat([]byte{0xff}, 1000)) },
		"giant option": func(_ *harness, c *client) {
			b := binary.BigEndian.AppendUint64(nil, nbdproto.MagicOption)
			c.hello(nbdproto.FlagFixedNewstyle).write(binary.BigEndian.AppendUint64(b, uint64(nbdproto.OptGo)<<32|0xffffffff))
		},
		"giant export name": func(_ *harness, c *client) {
			b := binary.BigEndian.AppendUint64(nil, nbdproto.MagicOption)
			c.hello(nbdproto.FlagFixedNewstyle).write(binary.BigEndian.AppendUint64(b, uint64(nbdproto.OptExportName)<<32|20000))
		},
		"giant write": func(_ *harness, c *client) { c.enter("v").write(request(nbdproto.CmdWrite, 0, 0, block.MaxIO+1, nil)) },
		"flood of options": func(_ *harness, c *client) {
			c.hello(nbdproto.FlagFixedNewstyle)
			go io.Copy(io.Discard, c.nc)
			for {
				if _, err := c.nc.Write(optionBytes(nbdproto.OptList, nil)); err != nil {
					return
				}
			}
		},
		"leaves in mid payload": func(_ *harness, c *client) {
			c.enter("v").write(request(nbdproto.CmdWrite, 0, 0, 1<<20, make([]byte, 300000)))
			c.nc.Close()
		},
		"leaves in mid request": func(_ *harness, c *client) {
			c.enter("v").write(request(nbdproto.CmdRead, 0, 0, 512, nil)[:11])
			c.nc.Close()
		},
		"leaves before its replies": func(_ *harness, c *client) {
			c.enter("v")
			for range 20 {
				c.write(request(nbdproto.CmdRead, nbdproto.CmdFlagDF, 0, testSize, nil))
			}
			c.nc.Close()
		},
	}
	for name, act := range cases {
		for _, network := range []string{"unix", "tcp"} {
			t.Run(name+"/"+network, func(t *testing.T) {
				v := nbdtest.New("v", testSize)
				h := serveVolume(t, v, Limits{Options: 10})
				good := h.dialUnix().enter("v")
				p := pattern(3, 4096)
				good.expect(nbdproto.EOK, nbdproto.CmdWrite, 0, 0, 4096, p)
				c := h.dialUnix()
				if network == "tcp" {
					c = h.dialTCP()
				}
				act(h, c)
				c.nc.SetReadDeadline(time.Now().Add(20 * time.Second))
				// Cut by the server, or closed by ourselves.
				if _, err := io.Copy(io.Discard, c.nc); errors.Is(err, os.ErrDeadlineExceeded) {
					t.Error("the server did not cut the client")
				}
				if r := good.expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 4096, nil); !bytes.Equal(r.data, p) {
					t.Error("the good client reads something else")
				}
				h.stop()
				if n := v.Staged(); n != 0 {
					t.Errorf("%d writes are still staged", n)
				}
			})
		}
	}
}

// TestSlowReader checks that a client which takes no replies is bounded, holds
// up nobody and is cut, also when its replies come from workers.
func TestSlowReader(t *testing.T) {
	for name, hook := range map[string]func(context.Context, nbdtest.Op, int64, int64) error{"memory": nil, "device": wouldWait} {
		t.Run(name, func(t *testing.T) {
			v := nbdtest.New("v", testSize)
			v.Hook = hook
			const most = 4 << 20
			h := serveVolume(t, v, Limits{Reply: 300 * time.Millisecond, Bytes: most, Requests: 16})
			good, slow := h.dialUnix().enter("v"), h.dialTCP().enter("v")
			good.expect(nbdproto.EOK, nbdproto.CmdWrite, 0, 0, testSize, pattern(1, testSize))
			go func() {
				for { // until cut
					if _, err := slow.nc.Write(requestBytes(nbdproto.CmdRead, 0, 1, 0, testSize/2, nil)); err != nil {
						return
					}
				}
			}()
			cut := false
			for !cut { // the good client works all the time
				good.expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 4096, nil)
				infos := h.srv.Connections()
				cut = len(infos) == 1
				h.srv.mu.Lock()
				for c := range h.srv.conns {
					if a := c.active.Load(); a != nil {
						a.out.mu.Lock()
						if a.out.bytes > most+testSize || a.out.requests > 16 {
							t.Errorf("%d requests with %d bytes in flight", a.out.requests, a.out.bytes)
						}
						a.out.mu.Unlock()
					}
				}
				h.srv.mu.Unlock()
			}
		})
	}
}

// TestPipelineWithoutReading checks that a client may send all its requests
// before it takes a reply, as long as they fit the limits: the server must not
// stop reading because its replies are not taken.
func TestPipelineWithoutReading(t *testing.T) {
	v := nbdtest.New("v", 32<<20)
	h := serveVolume(t, v, Limits{})
	c := h.dialUnix().enter("v")
	p := pattern(1, 256<<10)
	for i := range 60 {
		off := uint64(i/2) * 256 << 10
		if i%2 == 0 {
			c.send(nbdproto.CmdWrite, 0, off, 256<<10, p)
		} else {
			c.send(nbdproto.CmdRead, 0, off, 256<<10, nil)
		}
	}
	for i := range 60 {
		r := c.receive(uint64(i/2)*256<<10, 256<<10, i%2 == 1)
		if r.err != nbdproto.EOK || r.cookie != uint64(i+1) || i%2 == 1 && !bytes.Equal(r.data, p) {
			t.Fatalf("reply %d: cookie %d error %d", i, r.cookie, r.err)
		}
	}
}

// TestStagedBudget checks that unfinished payloads cannot fill the log.
func TestStagedBudget(t *testing.T) {
	v := nbdtest.New("v", 64<<20)
	h := serveVolume(t, v, Limits{StagedBytes: 100 << 10})
	half := func(n int) *client {
		c := h.dialUnix().enter("v")
		c.write(requestBytes(nbdproto.CmdWrite, 0, 1, 0, uint32(n), pattern(1, n/2)))
		return c
	}
	a, b := half(64<<10), half(1<<20)
	good := h.dialUnix().enter("v")
	for range 50 {
		good.expect(nbdproto.EOK, nbdproto.CmdWrite, 0, 1<<20, 4096, pattern(2, 4096))
	}
	if n := v.Calls(nbdtest.OpTryStage); n > 51 {
		t.Errorf("%d writes were staged, the budget allows 51", n)
	}
	for c, n := range map[*client]int{a: 64 << 10, b: 1 << 20} {
		c.write(pattern(1, n)[n/2:])
		if r := c.receive(0, 0, false); r.err != nbdproto.EOK {
			t.Errorf("write of %d: error %d", n, r.err)
		}
	}
}

// TestFullLog checks that writes which wait for room hold up no reads, and are
// done when there is room.
func TestFullLog(t *testing.T) {
	v := nbdtest.New("v", testSize)
	room := make(chan struct{})
	v.Hook = func(ctx context.Context, op nbdtest.Op, _, _ int64) error {
		switch op {
		case nbdtest.OpTryStage:
			return nbdtest.ErrWouldWait
		case nbdtest.OpStage:
			select {
			case <-room:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	}
	h := serveVolume(t, v, Limits{})
	c := h.dialUnix().enter("v")
	for i := range 10 {
		c.send(nbdproto.CmdWrite, 0, uint64(i)*4096, 4096, pattern(1, 4096))
	}
	c.expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 4096, nil)
	// A client that leaves while its write waits takes it along.
	gone := h.dialUnix().enter("v")
	gone.send(nbdproto.CmdWrite, 0, 0, 4096, pattern(1, 4096))
	gone.write([]byte("garbage that makes the server cut it, longer than a request"))
	gone.expectCut()
	close(room)
	for range 10 {
		if r := c.receive(0, 0, false); r.err != nbdproto.EOK {
			t.Errorf("error %d", r.err)
		}
	}
}

func TestConnectionLimit(t *testing.T) {
	h := serveVolume(t, nbdtest.New("v", testSize), Limits{Connections: 2})
	a, b := h.dialUnix().enter("v"), h.dialTCP().enter("v")
	h.dialUnix().expectCut()
	h.dialTCP().expectCut()
	a.expect(nbdproto.EOK, nbdproto.CmdFlush, 0, 0, 0, nil)
	b.send(nbdproto.CmdDisc, 0, 0, 0, nil)
	b.expectCut()
	for len(h.srv.Connections()) > 1 {
		a.expect(nbdproto.EOK, nbdproto.CmdFlush, 0, 0, 0, nil)
	}
	h.dialTCP().enter("v")
}

// TestShutdownAnswersWhatIsInFlight is the way of a giveback.
func TestShutdownAnswersWhatIsInFlight(t *testing.T) {
	v := nbdtest.New("v", testSize)
	begun, finish := make(chan struct{}, 8), make(chan struct{})
	v.Hook = func(ctx context.Context, op nbdtest.Op, _, _ int64) error {
		if op == nbdtest.OpFlush {
			begun <- struct{}{}
			<-finish
		}
		return nil
	}
	h := serveVolume(t, v, Limits{})
	a, b, young := h.dialUnix().enter("v"), h.dialTCP().enter("v"), h.dialUnix()
	young.read(18)
	cookies := map[*client]uint64{a: a.send(nbdproto.CmdFlush, 0, 0, 0, nil), b: b.send(nbdproto.CmdFlush, 0, 0, 0, nil)}
	<-begun
	<-begun
	done := make(chan error)
	go func() { done <- h.srv.Shutdown(context.Background()) }()
	young.expectCut()
	for stopped := 0; stopped < 2; runtime.Gosched() {
		stopped = 0
		h.srv.mu.Lock()
		for c := range h.srv.conns {
			if c.in.isStopped() {
				stopped++
			}
		}
		h.srv.mu.Unlock()
	}
	// A request that comes now is not answered, and the client asks the next
	// owner. Only a reader that was just about to look still takes it.
	const late = 99
	a.write(requestBytes(nbdproto.CmdFlush, 0, late, 0, 0, nil))
	close(finish)
	for c, cookie := range cookies {
		b, err := io.ReadAll(c.nc)
		if err != nil && !errors.Is(err, syscall.ECONNRESET) { // as an unread request makes the end of a unix socket
			t.Error(err)
		}
		found := 0
		for ; len(b) >= 16; b = b[16:] {
			e, got := nbdproto.Errno(binary.BigEndian.Uint32(b[4:])), binary.BigEndian.Uint64(b[8:])
			if e != nbdproto.EOK || got != cookie && (c != a || got != late) {
				t.Errorf("error %d cookie %d", e, got)
			}
			if got == cookie {
				found++
			}
		}
		if found != 1 || len(b) != 0 {
			t.Errorf("flush in flight was answered %d times, and %d bytes more", found, len(b))
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := h.srv.Serve(context.Background(), newPipes()); !errors.Is(err, ErrServerClosed) {
		t.Errorf("Serve after Shutdown: %v", err)
	}
	// The listening socket is still there: clients queue for the next owner.
	nc, err := net.Dial("unix", h.unix)
	if err != nil {
		t.Fatalf("the shared listener was closed: %v", err)
	}
	nc.Close()
}

func TestShutdownCutsAtItsDeadline(t *testing.T) {
	v := nbdtest.New("v", testSize)
	begun := make(chan struct{})
	v.Hook = func(ctx context.Context, op nbdtest.Op, _, _ int64) error {
		if op == nbdtest.OpFlush {
			close(begun)
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	}
	h := serveVolume(t, v, Limits{})
	c := h.dialUnix().enter("v")
	c.send(nbdproto.CmdFlush, 0, 0, 0, nil)
	<-begun
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := h.srv.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Shutdown: %v", err)
	}
	c.expectCut()
}

func TestCloseExport(t *testing.T) {
	v, w := nbdtest.New("v", testSize), nbdtest.New("w", testSize)
	e := &exports{list: []Export{{Name: "v", Volume: v}, {Name: "w", Volume: w}}}
	h := start(t, Config{Exports: e})
	a, b := h.dialUnix().enter("v"), h.dialUnix().enter("w")
	e.remove("v")
	if err := h.srv.CloseExport(context.Background(), "v"); err != nil {
		t.Fatal(err)
	}
	a.expectCut()
	b.expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 512, nil)
	b.expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 512, nil) // after which the first one is in the books
	h.dialUnix().hello(nbdproto.FlagFixedNewstyle).expectOption(nbdproto.OptGo, goData("v"), nbdproto.RepErrUnknown)
	infos := h.srv.Connections()
	found := false
	for _, i := range infos {
		found = found || i.Export == "w" && i.Remote == "unix" && i.Requests == 2 && i.Sent > 0 && i.Received > 0
	}
	if !found {
		t.Errorf("connections: %+v", infos)
	}
}

// TestListenerIsHandedOn serves one socket from two servers in turn, as two
// guests do, while a client waits in the backlog.
func TestListenerIsHandedOn(t *testing.T) {
	path := t.TempDir() + "/s"
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	v := nbdtest.New("v", testSize)
	cfg := Config{Exports: &exports{list: []Export{{Name: "v", Volume: v}}}, Logger: slog.New(slog.DiscardHandler)}
	h := &harness{t: t, unix: path}
	for range 3 {
		s, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		c := h.dialUnix() // before anybody accepts
		ended := make(chan error)
		go func() { ended <- s.Serve(context.Background(), l) }()
		c.enter("v").expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 512, nil)
		if err := s.Shutdown(context.Background()); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; !errors.Is(err, ErrServerClosed) {
			t.Errorf("Serve: %v", err)
		}
		c.expectCut()
	}
}
