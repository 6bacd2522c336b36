package host

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/domain"
	"github.com/pollux-storage/pollux/internal/identity"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/region"
)

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// settingsIn loads settings for a pair in a folder of its own.
func settingsIn(t *testing.T, text string) *config.Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "plx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	// Not below the file system that a pair mounts for its regions.
	t.Cleanup(func() { _ = region.RemoveDir(cfg.RegionDir) })
	return cfg
}

// noDriver starts nothing; found are the domains that it knows.
type noDriver struct {
	found    map[string]domain.Domain
	findErr  error
	startErr error
}

func (d *noDriver) Start(domain.Spec) (domain.Domain, error)              { return nil, d.startErr }
func (d *noDriver) Prepare(domain.Spec) (domain.Spare, error)             { return nil, d.startErr }
func (d *noDriver) Find(name string) (domain.Domain, error)               { return d.found[name], d.findErr }
func (d *noDriver) Tidy(string) error                                     { return nil }
func (d *noDriver) Remains(domain.Domain, int64) (*domain.Remains, error) { return nil, nil }
func (d *noDriver) Forget(string) error                                   { return errors.New("the record stays") }

// idle is a domain that does nothing until it is killed.
type idle struct {
	ended chan struct{}
	err   error // of every signal
}

func (d *idle) Name() string           { return "a" }
func (d *idle) Inc() uint64            { return 1 }
func (d *idle) PID() int               { return 1 << 30 }
func (d *idle) Program() string        { return "" }
func (d *idle) Started() time.Time     { return time.Time{} }
func (d *idle) Ended() <-chan struct{} { return d.ended }
func (d *idle) Reason() string         { return "killed" }
func (d *idle) Terminate() error       { return d.err }
func (d *idle) Pause() error           { return d.err }
func (d *idle) Resume() error          { return d.err }
func (d *idle) Kill() error {
	if d.err == nil {
		close(d.ended)
	}
	return d.err
}

// TestAgentRefuses: an agent that lacks something says what, and leaves no
// socket behind.
func TestAgentRefuses(t *testing.T) {
	file := func(path string) error {
		return errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte("{"), 0o600))
	}
	for name, c := range map[string]struct {
		spoil func(*config.Config, *noDriver) error
		want  string
	}{
		"folder": {func(c *config.Config, _ *noDriver) error { return file(c.LogDir()) }, "directory of the pair"},
		"lock": {func(c *config.Config, _ *noDriver) error {
			return os.MkdirAll(filepath.Join(c.RunDir(), "agent.lock"), 0o700)
		}, "lock of the agent"},
		"events": {func(c *config.Config, _ *noDriver) error { return os.Mkdir(filepath.Join(c.Dir, "events.log"), 0o700) }, "event log"},
		"old events": {func(c *config.Config, _ *noDriver) error {
			return os.Symlink("events.log.1", filepath.Join(c.Dir, "events.log.1"))
		}, "event log"},
		"record":  {func(_ *config.Config, d *noDriver) error { d.findErr = errors.New("record is damaged"); return nil }, "record is damaged"},
		"state":   {func(c *config.Config, _ *noDriver) error { return file(filepath.Join(c.Dir, "state.json")) }, "state.json is damaged"},
		"address": {func(c *config.Config, _ *noDriver) error { c.Guests[1].Address = "192.0.2.1"; return nil }, "guests[1]"},
		"regions": {func(c *config.Config, _ *noDriver) error { return file(filepath.Join(c.RegionDir, "precious")) }, "region folder"},
		"device": {func(c *config.Config, _ *noDriver) error {
			c.Guests[0].Pool.Devices[0] += "/none"
			return file(filepath.Dir(c.Guests[0].Pool.Devices[0]))
		}, "device of pool"},
		"size":     {func(c *config.Config, _ *noDriver) error { c.Guests[0].Pool.Size = -1; return nil }, "device of pool"},
		"settings": {func(c *config.Config, _ *noDriver) error { return os.MkdirAll(config.EffectivePath(c.Dir), 0o700) }, "effective.json"},
		"socket": {func(c *config.Config, _ *noDriver) error {
			return os.MkdirAll(filepath.Join(control.AgentSocket(c.Dir), "x"), 0o700)
		}, "agent.sock"},
		"sockets": {func(c *config.Config, d *noDriver) error {
			d.found = map[string]domain.Domain{"a": &idle{ended: make(chan struct{})}}
			if err := os.MkdirAll(c.RunDir(), 0o700); err != nil {
				return err
			}
			ln, err := identity.ListenUnix(linkPath(c, "a"), 0o600)
			if err != nil {
				return err
			}
			go func() {
				defer ln.Close()
				if conn, err := ln.AcceptUnix(); err == nil {
					_ = identity.Send(conn, []*os.File{os.Stdin})
				}
			}()
			return nil
		}, "sockets from guest a"},
		"fence": {func(_ *config.Config, d *noDriver) error {
			d.found = map[string]domain.Domain{"a": &idle{make(chan struct{}), errors.New("it cannot be killed")}}
			return nil
		}, "it cannot be killed"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg, d := settingsIn(t, pairConfig), &noDriver{}
			if err := c.spoil(cfg, d); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			err := RunWith(ctx, cfg, Options{Driver: d, Logger: quiet()})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestEndingAgent: whatever is asked of an agent that ends, or that does not
// turn, is answered.
func TestEndingAgent(t *testing.T) {
	cfg := settingsIn(t, strings.Replace(pairConfig, "size: 256MiB}", "size: 256MiB, manual: true}", 1))
	cfg.Guests[0].Pool.Devices = nil
	events, err := openEvents(filepath.Join(cfg.Dir, "events.log"), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer events.close()
	for name, c := range map[string]struct {
		ended bool
		want  control.Kind
	}{"ended": {true, control.KindNotRunning}, "stuck": {false, control.KindTimeout}} {
		a := &agent{cfg: cfg, log: quiet(), events: events, ended: make(chan struct{}), inputs: make(chan func(), 64), members: map[string]*member{}}
		for _, g := range cfg.Guests {
			a.members[g.Name] = &member{name: g.Name}
		}
		a.members["b"].dom = &idle{ended: make(chan struct{})}
		ctx, cancel := context.WithDeadline(t.Context(), time.Unix(1, 0))
		defer cancel()
		if c.ended {
			ctx = t.Context()
			close(a.ended)
			a.inputs = nil // nobody takes what is posted
		}
		for what, do := range map[string]func() error{
			"status":  func() error { _, err := a.status(ctx); return err },
			"volumes": func() error { _, err := a.volumes(ctx); return err },
			"volume":  func() error { _, err := a.volume(ctx, "v"); return err },
			"create":  func() error { _, err := a.createVolume(ctx, control.VolumeCreate{Name: "v"}); return err },
			"change":  func() error { _, err := a.changeVolume(ctx, "v", control.VolumeChange{Rename: "w"}); return err },
			"delete":  func() error { return a.deleteVolume(ctx, "v") },
			"free":    func() error { return a.free(ctx, "v") },
			"pools":   func() error { _, err := a.pools(ctx); return err },
			"pool":    func() error { _, err := a.pool(ctx, "p"); return err },
			"new pool": func() error {
				_, err := a.createPool(ctx, control.PoolCreate{Name: "p", Guest: "a", Devices: []string{"d"}})
				return err
			},
			"add":      func() error { _, err := a.addDevice(ctx, "p", control.PoolAdd{Device: "d"}); return err },
			"check":    func() error { _, err := a.check(ctx); return err },
			"dry run":  func() error { _, err := a.checkTakeover(ctx, "a"); return err },
			"takeover": func() error { _, err := a.takeover(ctx, "a"); return err },
			"giveback": func() error { _, err := a.giveback(ctx, "a"); return err },
			"restart":  func() error { return a.drill(ctx, "a", control.DrillRestart) },
			"running":  func() error { return a.drill(ctx, "b", control.DrillRestart) },
			"down":     func() error { return a.endGuests(ctx) },
			"until":    func() error { return a.until(ctx, func() bool { return false }) },
		} {
			if err := do(); control.KindOf(err) != c.want {
				t.Errorf("%s, %s: %v", name, what, err)
			}
		}
		a.settle(ctx) // returns
	}
}

// TestDeafGuestIsFenced: a guest that an earlier agent started, and that does
// not answer, is killed before anything is started.
func TestDeafGuestIsFenced(t *testing.T) {
	cfg := settingsIn(t, pairConfig)
	d := &idle{ended: make(chan struct{})}
	// It goes no further than its own socket.
	if err := os.MkdirAll(filepath.Join(control.AgentSocket(cfg.Dir), "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	err := RunWith(t.Context(), cfg, Options{Driver: &noDriver{found: map[string]domain.Domain{"a": d}}, Logger: quiet()})
	if err == nil || !strings.Contains(err.Error(), "agent.sock") || !hasEnded(d) {
		t.Errorf("ended: %v, %v", hasEnded(d), err)
	}
}

// TestSilentGuests: commands name the guest that does not answer.
func TestSilentGuests(t *testing.T) {
	a := bareAgent(t, pairConfig)
	for _, g := range a.cfg.Guests {
		a.members[g.Name] = &member{name: g.Name, client: control.NewSocketClient(filepath.Join(a.cfg.Dir, "none"))}
		a.step(t, partner.Message{Kind: partner.KindStarted, Guest: g.Name, Inc: 1})
	}
	for _, g := range a.cfg.Guests {
		a.step(t, partner.Message{Kind: partner.KindHello, From: g.Name, Inc: 1, Term: 1, Holds: []partner.Hold{{Identity: g.Name, Term: 1, Phase: partner.PhaseServing}}})
	}
	ctx := t.Context()
	for what, do := range map[string]func() error{
		"volumes": func() error { _, err := a.volumes(ctx); return err },
		"create":  func() error { _, err := a.createVolume(ctx, control.VolumeCreate{Name: "v", Guest: "b"}); return err },
		"check":   func() error { _, err := a.check(ctx); return err },
	} {
		if err := do(); err == nil || !strings.Contains(err.Error(), "guest a: ") {
			t.Errorf("%s: %v", what, err)
		}
	}
	r, err := a.checkTakeover(ctx, "a")
	if last := r.Checks[len(r.Checks)-1]; err != nil || r.OK || last.OK || last.Name != "partner answers" {
		t.Errorf("%+v, %v", r, err)
	}
	st, err := a.status(ctx)
	if err != nil || st.Protected || st.Guests[0].State != control.StateHung || !strings.Contains(strings.Join(st.Alerts, "\n"), "guest a does not answer") {
		t.Errorf("%+v, %v", st, err)
	}
	short, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	if err := a.until(short, func() bool { return false }); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("what does not come: %v", err)
	}
}

// TestHistoryIsNoHindrance: a record of the newest takeover that is damaged
// counts as none.
func TestHistoryIsNoHindrance(t *testing.T) {
	dir := t.TempDir()
	if err := config.WriteRunJSON(lastPath(dir), control.Takeover{Of: "a", By: "b"}); err != nil {
		t.Fatal(err)
	}
	a := &agent{last: readLast(dir)}
	if a.lastBy("a") != "b" || a.lastBy("b") != "b" || a.lastOf("a").By != "b" || a.lastOf("b").By != "" {
		t.Errorf("%+v", a.last)
	}
	if err := os.WriteFile(lastPath(dir), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	a.last = readLast(dir)
	if a.last != nil || a.lastBy("a") != "a" {
		t.Errorf("%+v", a.last)
	}
}

// TestMoveGivesUp: whoever waits for a move hears that it goes on, or that the
// agent ends.
func TestMoveGivesUp(t *testing.T) {
	cfg := settingsIn(t, pairConfig)
	for _, ending := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			a := &agent{
				cfg: cfg, log: quiet(), ended: make(chan struct{}), inputs: make(chan func()), waiting: map[uint64]chan string{},
				ref: partner.NewReferee(refereeConfig(cfg), time.Now()),
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			err := make(chan error, 1)
			go func() { err <- a.move(ctx, "a", "b", "test") }()
			(<-a.inputs)()
			synctest.Wait() // it waits for the move itself
			want := "which goes on"
			if ending {
				want = "the agent is ending"
				close(a.ended)
			} else {
				cancel()
			}
			if e := <-err; e == nil || !strings.Contains(e.Error(), want) {
				t.Errorf("ending %v: %v", ending, e)
			}
		})
	}
}
