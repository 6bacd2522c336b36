package host

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/domain"
	"github.com/pollux-storage/pollux/internal/guest"
	"github.com/pollux-storage/pollux/internal/identity"
)

// restartConfig is a pair whose guests are started again first.
var restartConfig = strings.Replace(pairConfig, "failover: {", "failover: {policy: restart-first, restart_limit: 20s, ", 1)

// cmdline is how a process was started.
func cmdline(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.ReplaceAll(string(b), "\x00", " ")
}

// withSpares tells whether each guest serves its own and has a spare process.
func withSpares(st control.Status) bool {
	return servedBy("a", "b")(st) && st.Guests[0].Spare && st.Guests[1].Spare
}

// eventKinds lists what happened.
func (p *pair) eventKinds() (kinds []string) {
	p.t.Helper()
	p.ok(p.client.Events(p.t.Context(), control.EventQuery{}, func(e control.Event) error {
		kinds = append(kinds, e.Kind)
		return nil
	}))
	return kinds
}

// TestRestartFirst drives a pair of real processes through restarts that come before
// takeovers.
func TestRestartFirst(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	p := newPair(t, restartConfig)
	ctx := t.Context()
	st := p.until("start, with spares", withSpares)
	_, err := p.client.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 64 << 20, Guest: "a"})
	p.ok(err)

	// A failure is the first one: the guest itself serves again, from its spare process.
	first := st.Guests[0].PID
	p.ok(p.client.Drill(ctx, "a", control.DrillKill))
	st = p.until("a serves again", func(st control.Status) bool { return servedBy("a", "b")(st) && st.Guests[0].PID != first })
	p.greets(st, "a")
	if tk := st.LastTakeover; tk == nil || tk.Of != "a" || tk.By != "a" || tk.Kind != control.KindResumed || len(tk.Steps) == 0 || tk.Steps[0].Name != "restart" {
		t.Errorf("last takeover %+v", tk)
	}
	if g := st.Guests[0]; g.Policy != "restart-first" || g.Resumed != 1 || g.ResumedLate != 0 {
		t.Errorf("%+v", g)
	}
	if line := cmdline(st.Guests[0].PID); !strings.Contains(line, "--spare") {
		t.Errorf("it is no spare process: %s", line)
	}
	if k := p.eventKinds(); slices.Contains(k, control.KindTakeover) || !slices.Contains(k, control.KindResumed) {
		t.Errorf("%v", k)
	}

	// The second failure within the window is the partner's.
	p.ok(p.client.Drill(ctx, "a", control.DrillKill))
	st = p.until("b takes over", servedBy("b", "b"))
	p.greets(st, "a")
	if tk := st.LastTakeover; tk.Kind != control.KindTakeover || tk.By != "b" {
		t.Errorf("last takeover %+v", tk)
	}

	// B hangs, for the first time, and serves both: a has its own back, b starts again.
	second := st.Guests[1].PID
	p.ok(p.client.Drill(ctx, "b", control.DrillHang))
	st = p.until("each serves its own", func(st control.Status) bool { return servedBy("a", "b")(st) && st.Guests[1].PID != second })
	p.greets(st, "a")
	p.greets(st, "b")
	if g := st.Guests[1]; g.Resumed != 1 {
		t.Errorf("%+v", g)
	}
	vols, err := p.client.Volumes(ctx)
	p.ok(err)
	if len(vols) != 1 || vols[0].Name != "v" || vols[0].Guest != "a" {
		t.Errorf("volumes %+v", vols)
	}
	if r, err := p.client.Check(ctx); err != nil || !r.OK || len(r.Pools) != 2 {
		t.Errorf("check %+v, %v", r, err)
	}
}

// TestRestartLate: a guest that is started again and does not get on is fenced, and
// its partner takes over.
func TestRestartLate(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	p := newPair(t, strings.Replace(restartConfig, "restart_limit: 20s", "restart_limit: 300ms", 1))
	st := p.until("start, with spares", withSpares)
	// Its spare process stands still, and it is what a becomes.
	dirs, err := os.ReadDir("/proc")
	p.ok(err)
	for _, d := range dirs {
		var pid int
		if _, err := fmt.Sscan(d.Name(), &pid); err == nil {
			if line := cmdline(pid); strings.Contains(line, p.dir) && strings.Contains(line, "--guest a --spare") {
				p.ok(unix.Kill(pid, unix.SIGSTOP))
				defer func() { _ = unix.Kill(pid, unix.SIGKILL) }()
			}
		}
	}
	p.ok(unix.Kill(st.Guests[0].PID, unix.SIGKILL))
	st = p.until("b takes over", func(st control.Status) bool { return len(st.Guests) == 2 && st.Guests[0].ServedBy == "b" })
	p.greets(st, "a")
	if g := st.Guests[0]; g.Resumed != 0 || g.ResumedLate != 1 {
		t.Errorf("%+v", g)
	}
	if tk := st.LastTakeover; tk.Kind != control.KindTakeover || time.Duration(tk.Total) < 300*time.Millisecond {
		t.Errorf("last takeover %+v", tk)
	}
	if k := p.eventKinds(); !slices.Contains(k, "restart-late") {
		t.Errorf("%v", k)
	}
}

// ending is a domain that has ended.
type ending struct{ idle }

func newEnding() *ending {
	e := &ending{idle{ended: make(chan struct{})}}
	close(e.ended)
	return e
}

// TestOldLine: what keeps the line of a run that has ended leaves the next run alone,
// which listens at the same place.
func TestOldLine(t *testing.T) {
	a := bareAgent(t, pairConfig)
	if err := os.MkdirAll(a.cfg.RunDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	m := &member{name: "a"}
	spec, err := a.spec("a", linkPath(a.cfg, "a"), guest.Args(a.cfg.Dir, "a", 2))
	if err != nil {
		t.Fatal(err)
	}
	ln, err := listener(spec.Files[0])
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		a.keepLine(m, domain.Domain(newEnding()), nil)
	}()
	if err := ln.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	c, err := ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if err := identity.Send(c, []*os.File{null}); err != nil {
		t.Fatal(err)
	}
	<-done
	if n, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the line was kept: %d, %v", n, err)
	}
	if m.line != nil {
		t.Error("it is the line of a run that has ended")
	}
}
