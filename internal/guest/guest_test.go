package guest

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/identity"
	"github.com/pollux-storage/pollux/internal/partner"
)

// bench runs guest a in this process, with the test as its agent.
type bench struct {
	t       *testing.T
	cfg     *config.Config
	storage *fakeStorage
	sockets []*identity.Sockets
	line    *Line
	got     chan partner.Message
	ended   chan error
	cancel  context.CancelFunc
	link    string
}

// newBench starts a guest whose settings were edited before.
func newBench(t *testing.T, edit ...func(*config.Config)) *bench {
	t.Helper()
	dir, err := os.MkdirTemp("", "plx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	text := "log: 16MiB\ncache: 1MiB\nfailover: {fence_timeout: 20s}\nguests:\n" +
		"  - {name: a, address: 127.0.0.1, port: 0, pool: {size: 64MiB}}\n  - {name: b, address: 127.0.0.1, port: 0, pool: {size: 64MiB}}\n"
	if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{cfg.RunDir(), cfg.RegionDir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, g := range cfg.Guests {
		f, err := os.Create(g.Pool.Devices[0])
		if err == nil {
			err = errors.Join(f.Truncate(1<<20), f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range edit {
		f(cfg)
	}
	if err := cfg.WriteEffective(); err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, cfg: cfg, storage: newFakeStorage(), got: make(chan partner.Message, 100), ended: make(chan error, 1)}
	b.start()
	return b
}

func (b *bench) start() {
	b.t.Helper()
	for i, g := range b.cfg.Guests {
		s, err := identity.Listen(g.Name, "127.0.0.1:0", g.Socket, "guests")
		if err != nil {
			b.t.Fatal(i, err)
		}
		b.sockets = append(b.sockets, s)
	}
	b.link = filepath.Join(b.cfg.RunDir(), "guest-a.link")
	ln, err := identity.ListenUnix(b.link, 0o600)
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	b.cancel = cancel
	go func() {
		b.ended <- Run(ctx, Options{Config: b.cfg, Name: "a", Inc: 1, Sockets: b.sockets, Line: ln, Storage: b.storage,
			Logger: quiet()})
	}()
	b.dial()
	b.t.Cleanup(func() {
		cancel()
		b.line.Close()
	})
}

// dial is a new agent.
func (b *bench) dial() {
	b.t.Helper()
	c, err := net.Dial("unix", b.link)
	if err != nil {
		b.t.Fatal(err)
	}
	files, err := identity.Receive(c.(*net.UnixConn))
	if err != nil || len(files) != 4 {
		b.t.Fatalf("%d sockets, %v", len(files), err)
	}
	for _, f := range files {
		_ = f.Close()
	}
	b.line = NewLine(c.(*net.UnixConn))
	go func() { _ = b.line.Read(func(m partner.Message) { b.got <- m }) }()
}

// expect returns the next message of a kind, and fails on failures.
func (b *bench) expect(kind partner.Kind) partner.Message {
	b.t.Helper()
	timeout := time.After(30 * time.Second)
	for {
		select {
		case m := <-b.got:
			if m.Kind == kind {
				return m
			}
			if m.Kind == partner.KindFailed {
				b.t.Fatalf("waiting for %s: %s", kind, m)
			}
		case <-timeout:
			b.t.Fatalf("no %s", kind)
		}
	}
}

// failure returns why something that was granted failed.
func (b *bench) failure() string {
	b.t.Helper()
	timeout := time.After(30 * time.Second)
	for {
		select {
		case m := <-b.got:
			if m.Kind == partner.KindFailed {
				return m.Reason
			}
		case <-timeout:
			b.t.Fatal("no failure")
		}
	}
}

// client talks to the guest's control socket.
func (b *bench) client() *control.Client {
	c := control.NewSocketClient(control.GuestSocket(b.cfg.Dir, "a"))
	b.t.Cleanup(c.Close)
	return c
}

func (b *bench) grant(id, basis string, term uint64) {
	b.line.Send(partner.Message{Kind: partner.KindGrant, Identity: id, Term: term, Basis: basis, Since: time.Now().UnixNano()})
}

func (b *bench) end() error {
	b.t.Helper()
	select {
	case err := <-b.ended:
		return err
	case <-time.After(30 * time.Second):
		b.t.Fatal("the guest did not end")
		return nil
	}
}

// locked tells whether somebody has the device of an identity open.
func (b *bench) locked(id string) bool {
	b.t.Helper()
	d, err := file.Open(b.cfg.Guest(id).Pool.Devices[0], file.Options{Lock: true})
	if err == nil {
		_ = d.Close()
	}
	return err != nil
}

func TestLifeOfATenancy(t *testing.T) {
	b := newBench(t)
	if h := b.expect(partner.KindHello); h.Inc != 1 || len(h.Holds) != 0 {
		t.Fatal(h)
	}
	b.grant("a", partner.BasisStart, 1)
	r := b.expect(partner.KindRegion)
	if r.Region.Path != b.cfg.RegionPath("a") || r.Region.Pool == (block.PoolID{}) {
		t.Errorf("%+v", r)
	}
	s := b.expect(partner.KindServing)
	if len(s.Steps) < 4 || s.Term != 1 {
		t.Errorf("%+v", s)
	}
	if !b.locked("a") {
		t.Error("the device is served without its lock")
	}
	c := control.NewSocketClient(control.GuestSocket(b.cfg.Dir, "a"))
	defer c.Close()
	v, err := c.CreateVolume(t.Context(), control.VolumeCreate{Name: "v w", Size: 4096, Guest: "a"})
	if err != nil || v.NBDUnix != "nbd+unix:///v%20w?socket="+b.cfg.Guest("a").Socket {
		t.Errorf("%+v, %v", v, err)
	}
	if _, err := c.CreateVolume(t.Context(), control.VolumeCreate{Name: "v", Size: 4096, Guest: "b"}); control.KindOf(err) != control.KindUnavailable {
		t.Errorf("volume of an identity that it does not hold: %v", err)
	}
	st, err := c.Status(t.Context())
	if err != nil || st.Guests[0].State != control.StateServing || len(st.Guests[0].Exports) != 1 {
		t.Errorf("%+v, %v", st, err)
	}
	b.line.Send(partner.Message{Kind: partner.KindRelease, Identity: "a", Term: 1, Reason: "test"})
	if m := b.expect(partner.KindReleased); m.Reason != "test" || len(m.Steps) != 1 {
		t.Errorf("%+v", m)
	}
	if b.locked("a") || b.storage.last().how.Load() != "released" {
		t.Error("it said released and had not let go")
	}
	// The same identity again, which adopts the region.
	b.grant("a", partner.BasisReleased, 2)
	b.expect(partner.KindServing)
	b.line.Send(partner.Message{Kind: partner.KindStop})
	if err := b.end(); err != nil || b.storage.last().how.Load() != "closed" {
		t.Errorf("%v, %v", err, b.storage.last().how.Load())
	}
}

// TestTakeoverWaitsForTheLock: the partner's last I/O may outlive it.
func TestTakeoverWaitsForTheLock(t *testing.T) {
	b := newBench(t)
	dev := b.cfg.Guest("b").Pool.Devices[0]
	held, err := file.Open(dev, file.Options{Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	b.storage.labels[dev] = Label{Pool: block.PoolID{1, 'b'}, Name: "pool-b", Identity: "b"}
	b.line.Send(partner.Message{Kind: partner.KindEnded, Guest: "b", Inc: 1, Reason: "test"})
	if m := b.expect(partner.KindWantFence); m.Guest != "b" || m.Inc != 1 {
		t.Fatal(m)
	}
	b.line.Send(partner.Message{Kind: partner.KindFenced, Guest: "b", Inc: 1})
	b.grant("b", partner.BasisFenced, 1)
	deadline := time.Now().Add(20 * time.Millisecond)
	for time.Now().Before(deadline) { // it must not get there meanwhile
		if b.storage.last() != nil {
			t.Fatal("opened without the lock")
		}
	}
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	if m := b.expect(partner.KindServing); m.Identity != "b" {
		t.Fatal(m)
	}
	b.cancel()
	if err := b.end(); err != nil {
		t.Fatal(err)
	}
}

func TestNoForeignPoolWithoutFence(t *testing.T) {
	b := newBench(t)
	b.line.Send(partner.Message{Kind: partner.KindUp, Guest: "b", Inc: 3, Well: true})
	b.grant("b", partner.BasisFenced, 1)
	timeout := time.After(30 * time.Second)
	for {
		select {
		case m := <-b.got:
			if m.Kind != partner.KindFailed {
				continue
			}
			if !strings.Contains(m.Reason, "without a confirmed fence") || b.storage.last() != nil {
				t.Error(m)
			}
			return
		case <-timeout:
			t.Fatal("no answer")
		}
	}
}

// TestHigherEpoch: a pool that has another owner is given up at once.
func TestHigherEpoch(t *testing.T) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	b.storage.last().lost <- block.ErrStale
	timeout := time.After(30 * time.Second)
	for m := (partner.Message{}); m.Kind != partner.KindFailed; {
		select {
		case m = <-b.got:
		case <-timeout:
			t.Fatal("it holds on")
		}
	}
	if b.locked("a") {
		t.Error("the device is still locked")
	}
}

// TestHeartbeat: it advances while the probe passes, and not otherwise.
func TestHeartbeat(t *testing.T) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	s := b.storage.last()
	end := time.Now().Add(30 * time.Second)
	for first := s.Heartbeat(); s.Heartbeat() < first+3; {
		if time.Now().After(end) {
			t.Fatal("no heartbeat")
		}
	}
	s.sick.Store(true)
	// One beat may be under way; after it there is none.
	stop := time.Now().Add(3 * b.cfg.Failover.Heartbeat)
	first := s.Heartbeat()
	for time.Now().Before(stop) {
		if s.Heartbeat() > first+1 {
			t.Fatal("it beats although the probe fails")
		}
	}
}

// TestHeartbeatWhileGivingUp: a slow device makes a giveback long. The guest is
// well all the time, and its partner must see that.
func TestHeartbeatWhileGivingUp(t *testing.T) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	s := b.storage.last()
	finish := make(chan struct{})
	s.finish.Store(&finish)
	b.line.Send(partner.Message{Kind: partner.KindRelease, Identity: "a", Term: 1, Reason: "test"})
	end := time.Now().Add(30 * time.Second)
	// The pool is given up once nothing can be probed any more.
	s.sick.Store(true)
	for first := s.Heartbeat(); s.Heartbeat() < first+4; {
		if time.Now().After(end) {
			t.Fatal("the heart stopped before the pool was given up")
		}
	}
	close(finish)
	b.expect(partner.KindReleased)
}

// TestAnswersWhileClosing: the last fold of a large pool takes long, and the
// agent would fence a guest that is silent meanwhile.
func TestAnswersWhileClosing(t *testing.T) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	finish := make(chan struct{})
	b.storage.last().finish.Store(&finish)
	b.line.Send(partner.Message{Kind: partner.KindStop})
	for range 3 {
		b.line.Send(partner.Message{Kind: partner.KindPing})
		b.expect(partner.KindPong)
	}
	close(finish)
	if err := b.end(); err != nil {
		t.Error(err)
	}
	if how := b.storage.last().how.Load(); how != "closed" {
		t.Errorf("the pool was %v", how)
	}
}

// TestAgentChanges: a new agent hears what is held and what was announced.
func TestAgentChanges(t *testing.T) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 7)
	b.expect(partner.KindServing)
	b.line.Close()
	b.dial()
	h := b.expect(partner.KindHello)
	if len(h.Holds) != 1 || h.Holds[0].Term != 7 || h.Term != 7 {
		t.Fatal(h)
	}
	b.expect(partner.KindRegion)
}

// TestCannotLetGo: a guest that cannot release a pool ends, because the end of
// its process is the only fence that is left.
func TestCannotLetGo(t *testing.T) {
	b := newBench(t)
	b.storage.stuck = true
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	b.line.Send(partner.Message{Kind: partner.KindRelease, Identity: "a", Term: 1})
	if err := b.end(); err == nil {
		t.Fatal("it lives on with a pool that it should have released")
	}
}

func TestForeignDataIsNotOverwritten(t *testing.T) {
	b := newBench(t)
	dev := b.cfg.Guest("a").Pool.Devices[0]
	if err := os.WriteFile(dev, append([]byte("a file system"), make([]byte, 1<<20)...), 0o600); err != nil {
		t.Fatal(err)
	}
	b.grant("a", partner.BasisStart, 1)
	timeout := time.After(30 * time.Second)
	for {
		select {
		case m := <-b.got:
			if m.Kind == partner.KindFailed {
				if !strings.Contains(m.Reason, "holds something that is not Pollux's") {
					t.Error(m.Reason)
				}
				return
			}
		case <-timeout:
			t.Fatal("no answer")
		}
	}
}

func FuzzParseMessage(f *testing.F) {
	f.Add([]byte(`{"kind":"grant","identity":"a","term":3,"basis":"fenced","since":1}`))
	f.Add([]byte(`{"kind":"hello","inc":1,"holds":[{"identity":"a","term":1,"phase":"serving"}]}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, p []byte) { _, _ = parseMessage(p) })
}

func TestUnrecordedGuestEnds(t *testing.T) {
	if err := awaitRecord(strings.NewReader("")); err == nil {
		t.Error("a guest starts although its agent died before it was recorded")
	}
	if err := awaitRecord(strings.NewReader("\x01")); err != nil {
		t.Error(err)
	}
}

// A client whose handshake meets a handover has to come again; it must not be
// told that its volume does not exist.
func TestExportsOfATenancyThatIsGone(t *testing.T) {
	e := exports{cfg: &config.Config{}, t: &tenancy{}}
	if _, err := e.Lookup("v"); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("without a pool: %v", err)
	}
	e.t.gone = true
	if _, err := e.Lookup("v"); !errors.Is(err, block.ErrClosed) {
		t.Errorf("given up: %v", err)
	}
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }
