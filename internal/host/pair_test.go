package host

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/domain/process"
	"github.com/pollux-storage/pollux/internal/guest"
)

// TestMain lets the test's program be agent and guests too.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		var err error
		switch os.Args[1] {
		case "guest-process":
			err = guest.Main(context.Background(), os.Args[2:])
		case "agent-process":
			err = agentProcess(os.Args[2])
		default:
			os.Exit(m.Run())
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func agentProcess(dir string) error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	cfg, err := config.Load(dir, "")
	if err != nil {
		return err
	}
	return RunWith(ctx, cfg, Options{
		Driver:  &process.Driver{Program: os.Args[0], RunDir: cfg.RunDir(), LogDir: cfg.LogDir(), LogMax: 1 << 20},
		Command: []string{"guest-process"}, Version: "test",
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
}

// pair is a pair of real processes.
type pair struct {
	t      *testing.T
	dir    string
	agent  *exec.Cmd
	client *control.Client
}

const pairConfig = `
log: 16MiB
cache: 16MiB
failover: {giveback_delay: -1s, restart_delay: 100ms, hang_timeout: 700ms}
guests:
  - {name: a, address: 127.0.0.1, port: 0, pool: {size: 256MiB}}
  - {name: b, address: 127.0.0.1, port: 0, pool: {size: 256MiB}}
`

func newPair(t *testing.T, settings string) *pair {
	t.Helper()
	dir, err := os.MkdirTemp("", "plx") // short, for the paths of sockets
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(settings), 0o600); err != nil {
		t.Fatal(err)
	}
	p := &pair{t: t, dir: dir, client: control.NewClient(dir)}
	t.Cleanup(p.end)
	p.startAgent()
	return p
}

func (p *pair) startAgent() {
	p.t.Helper()
	log, err := os.OpenFile(filepath.Join(p.dir, "agent.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer log.Close()
	p.agent = exec.Command(os.Args[0], "agent-process", p.dir)
	p.agent.Stdout, p.agent.Stderr = log, log
	if err := p.agent.Start(); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pair) killAgent() {
	p.t.Helper()
	_ = p.agent.Process.Kill()
	_ = p.agent.Wait()
}

// end takes the pair down whatever state the test left it in.
func (p *pair) end() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := p.client.Down(ctx); err != nil && control.KindOf(err) != control.KindNotRunning {
		p.t.Errorf("down: %v", err)
	}
	if p.agent.ProcessState == nil {
		done := make(chan error, 1)
		go func() { done <- p.agent.Wait() }()
		select {
		case <-done:
		case <-ctx.Done():
			_ = p.agent.Process.Kill()
			p.t.Error("the agent did not end")
		}
	}
	for _, f := range []string{"agent.log", "log/guest-a.log", "log/guest-b.log"} {
		b, _ := os.ReadFile(filepath.Join(p.dir, f))
		if bytes.Contains(b, []byte("DATA RACE")) || bytes.Contains(b, []byte("panic:")) {
			p.t.Errorf("%s tells of a fault", f)
		}
		if p.t.Failed() {
			p.t.Logf("%s:\n%s", f, b)
		}
	}
	for _, n := range []string{"run/agent.sock", "run/nbd-a.sock", "run/guest-a.sock", "run/guest-a.json", "region"} {
		if _, err := os.Stat(filepath.Join(p.dir, n)); err == nil {
			p.t.Errorf("%s was left behind", n)
		}
	}
	_ = os.RemoveAll(p.dir)
}

// until waits for a condition on the status.
func (p *pair) until(what string, cond func(control.Status) bool) control.Status {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), 30*time.Second)
	defer cancel()
	tk := time.NewTicker(10 * time.Millisecond)
	defer tk.Stop()
	for {
		st, err := p.client.Status(ctx)
		if err == nil && cond(st) {
			return st
		}
		select {
		case <-tk.C:
		case <-ctx.Done():
			p.t.Fatalf("%s: it did not come to that: %+v, %v", what, st, err)
		}
	}
}

func protected(st control.Status) bool { return st.Agent.Running && st.Protected }

// servedBy tells who serves whom, as "a by b".
func servedBy(a, b string) func(control.Status) bool {
	return func(st control.Status) bool {
		return len(st.Guests) == 2 && st.Guests[0].ServedBy == a && st.Guests[1].ServedBy == b && protected(st)
	}
}

// greets proves that somebody serves an identity: the server of NBD speaks
// first.
func (p *pair) greets(st control.Status, guest string) {
	p.t.Helper()
	for _, g := range st.Guests {
		if g.Name != guest {
			continue
		}
		for _, at := range [][2]string{{"tcp", g.Address}, {"unix", g.Socket}} {
			c, err := net.Dial(at[0], at[1])
			if err != nil {
				p.t.Errorf("%s: %v", guest, err)
				continue
			}
			b := make([]byte, 8)
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			if _, err := io.ReadFull(c, b); err != nil || string(b) != "NBDMAGIC" {
				p.t.Errorf("%s at %s: %q, %v", guest, at[1], b, err)
			}
			_ = c.Close()
		}
	}
}

func (p *pair) ok(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// TestPair drives a pair of real processes through every way of a takeover.
func TestPair(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	p := newPair(t, pairConfig)
	ctx := t.Context()
	st := p.until("start", servedBy("a", "b"))
	_, err := p.client.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 64 << 20, Guest: "a"})
	p.ok(err)
	p.greets(st, "a")

	p.ok(p.client.Drill(ctx, "a", control.DrillKill))
	st = p.until("b takes over a that was killed", servedBy("b", "b"))
	p.greets(st, "a")
	if tk := st.LastTakeover; tk == nil || tk.Of != "a" || tk.By != "b" || tk.Planned {
		t.Errorf("last takeover %+v", tk)
	} else {
		t.Logf("kill: %v, %v", tk.Total, tk.Steps)
	}
	tk, err := p.client.Giveback(ctx, "a")
	p.ok(err)
	if tk.Kind != "giveback" || tk.Of != "a" {
		t.Errorf("giveback %+v", tk)
	}
	t.Logf("giveback: %v, %v", tk.Total, tk.Steps)
	p.until("a has its identity", servedBy("a", "b"))

	p.ok(p.client.Drill(ctx, "b", control.DrillHang))
	st = p.until("a takes over b that hangs", servedBy("a", "a"))
	t.Logf("hang: %v, %v", st.LastTakeover.Total, st.LastTakeover.Steps)
	p.greets(st, "b")

	// Both die: whoever serves last, everything is served again.
	for _, g := range st.Guests {
		p.ok(unix.Kill(g.PID, unix.SIGKILL))
	}
	p.until("both come back", func(now control.Status) bool {
		return protected(now) && now.Guests[0].PID != st.Guests[0].PID && now.Guests[1].PID != st.Guests[1].PID
	})
	vols, err := p.client.Volumes(ctx)
	p.ok(err)
	if len(vols) != 1 || vols[0].Name != "v" || vols[0].Guest != "a" {
		t.Errorf("volumes %+v", vols)
	}
	r, err := p.client.Check(ctx)
	if err != nil || !r.OK || len(r.Pools) != 2 {
		t.Errorf("check %+v, %v", r, err)
	}
}

// TestAgentDies: guests serve on without the agent, nothing is taken over
// then, and the next agent finds them.
func TestAgentDies(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	p := newPair(t, pairConfig)
	before := p.until("start", servedBy("a", "b"))
	p.killAgent()
	st := p.until("guests answer for themselves", func(st control.Status) bool { return len(st.Guests) == 2 && !st.Agent.Running })
	if st.Protected || len(st.Alerts) == 0 {
		t.Errorf("without an agent: %+v", st)
	}
	p.greets(before, "a")
	p.ok(unix.Kill(before.Guests[0].PID, unix.SIGKILL))
	p.until("b notices", func(st control.Status) bool { return len(st.Guests) == 1 && len(st.Guests[0].Serves) == 1 })

	p.startAgent()
	st = p.until("the new agent has b take over", servedBy("b", "b"))
	p.greets(st, "a")
	if st.Guests[1].PID != before.Guests[1].PID {
		t.Error("the new agent started b again")
	}
	// Once more, with nothing amiss: nothing moves.
	p.killAgent()
	p.startAgent()
	again := p.until("the third agent finds both", servedBy("b", "b"))
	for i, g := range again.Guests {
		if g.PID != st.Guests[i].PID {
			t.Errorf("guest %s was started again", g.Name)
		}
	}
}

// TestPlanned: commands move identities, dry runs do not, and a restart takes
// the way over the partner.
func TestPlanned(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	p := newPair(t, pairConfig)
	ctx := t.Context()
	st := p.until("start", servedBy("a", "b"))
	c, err := p.client.CheckTakeover(ctx, "a")
	if err != nil || !c.OK || len(c.Checks) < 5 {
		t.Fatalf("dry run %+v, %v", c, err)
	}
	tk, err := p.client.Takeover(ctx, "a")
	p.ok(err)
	if !tk.Planned || tk.By != "b" {
		t.Errorf("%+v", tk)
	}
	t.Logf("planned: %v, %v", tk.Total, tk.Steps)
	p.until("b serves both", servedBy("b", "b"))
	if _, err := p.client.Takeover(ctx, "a"); control.KindOf(err) != control.KindRefused {
		t.Errorf("a second takeover: %v", err)
	}
	if c, err := p.client.CheckTakeover(ctx, "a"); err != nil || c.OK {
		t.Errorf("dry run of what is done %+v, %v", c, err)
	}
	_, err = p.client.Giveback(ctx, "a")
	p.ok(err)
	p.until("a is back", servedBy("a", "b"))
	p.ok(p.client.Drill(ctx, "b", control.DrillRestart))
	now := p.until("b was started again", servedBy("a", "a"))
	if now.Guests[1].PID == st.Guests[1].PID || now.Guests[0].PID != st.Guests[0].PID {
		t.Errorf("%+v", now.Guests)
	}
	var kinds []string
	p.ok(p.client.Events(ctx, control.EventQuery{}, func(e control.Event) error { kinds = append(kinds, e.Kind); return nil }))
	for _, k := range []string{"agent-started", "guest-started", "takeover", "giveback", "guest-ended"} {
		if !strings.Contains(strings.Join(kinds, " "), k) {
			t.Errorf("no event %s in %v", k, kinds)
		}
	}
}

// TestHangAndResume: a guest that hangs for a moment, with nobody to take over,
// goes on as the process that it was.
func TestHangAndResume(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	p := newPair(t, pairConfig[:strings.Index(pairConfig, "  - {name: b")])
	served := func(st control.Status) bool { return len(st.Guests) == 1 && st.Guests[0].ServedBy == "a" }
	before := p.until("start", served)
	p.ok(p.client.Drill(t.Context(), "a", control.DrillHang))
	p.until("it is seen to hang", func(st control.Status) bool { return st.Guests[0].State == control.StateHung })
	p.ok(p.client.Drill(t.Context(), "a", control.DrillResume))
	after := p.until("it answers", func(st control.Status) bool { return served(st) && st.Guests[0].State == control.StateServing })
	p.greets(after, "a")
	if after.Guests[0].PID != before.Guests[0].PID {
		t.Error("it was started again")
	}
}

// TestPoolsByCommand: pools are made and grown while the pair runs, and the
// next start knows the devices.
func TestPoolsByCommand(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	p := newPair(t, strings.Replace(pairConfig, "size: 256MiB}", "size: 256MiB, manual: true}", 1))
	ctx := t.Context()
	st := func(st control.Status) bool { return len(st.Guests) == 2 && st.Guests[0].ServedBy == "a" }
	p.until("start without a pool", st)
	if _, err := p.client.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 1 << 20, Guest: "a"}); control.KindOf(err) != control.KindUnavailable {
		t.Errorf("volume without a pool: %v", err)
	}
	pool, err := p.client.CreatePool(ctx, control.PoolCreate{Name: "tank", Guest: "a", Devices: []string{"d0.img"}})
	p.ok(err)
	if pool.State != "open" || pool.Name != "tank" {
		t.Errorf("%+v", pool)
	}
	_, err = p.client.AddDevice(ctx, "tank", control.PoolAdd{Device: "d1.img"})
	p.ok(err)
	foreign := filepath.Join(p.dir, "foreign.img")
	p.ok(os.WriteFile(foreign, append([]byte("precious"), make([]byte, 256<<20)...), 0o600))
	if _, err := p.client.AddDevice(ctx, "tank", control.PoolAdd{Device: foreign}); control.KindOf(err) != control.KindExists {
		t.Errorf("a device with somebody's data: %v", err)
	}
	_, err = p.client.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 1 << 20, Guest: "a"})
	p.ok(err)
	if _, err := p.client.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 1 << 20, Guest: "b"}); control.KindOf(err) != control.KindExists {
		t.Errorf("a name that the other guest has: %v", err)
	}
	p.until("protected with the new pool", protected)
	p.ok(p.client.Down(ctx))
	_ = p.agent.Wait()
	p.startAgent()
	p.until("second start", protected)
	pool, err = p.client.Pool(ctx, "tank")
	if err != nil || len(pool.Devices) != 2 || pool.Volumes != 1 {
		t.Errorf("%+v, %v", pool, err)
	}
}
