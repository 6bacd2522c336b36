package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/region"
)

// bareAgent is an agent whose loop only runs what is posted.
func bareAgent(t *testing.T, settings string) *agent {
	t.Helper()
	cfg := settingsIn(t, settings)
	events, err := openEvents(filepath.Join(cfg.Dir, "events.log"), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{
		opt: Options{Driver: &noDriver{}}, cfg: cfg, base: cfg.RegionDir, log: quiet(), events: events, ended: make(chan struct{}), inputs: make(chan func()),
		members: map[string]*member{}, exports: map[string][]control.Export{}, ref: partner.NewReferee(refereeConfig(cfg), time.Now()),
	}
	go func() {
		for {
			select {
			case f := <-a.inputs:
				f()
			case <-a.ended:
				return
			}
		}
	}()
	t.Cleanup(func() { close(a.ended); events.close() })
	return a
}

// step hands a message to the referee, in the loop.
func (a *agent) step(t *testing.T, m partner.Message) {
	t.Helper()
	if err := a.ask(t.Context(), func() { a.ref.Step(m) }); err != nil {
		t.Fatal(err)
	}
}

// TestDownKillsWhoStays: a guest that does not end when it is told to is
// killed, and the person hears of it.
func TestDownKillsWhoStays(t *testing.T) {
	a := bareAgent(t, pairConfig)
	d := &idle{ended: make(chan struct{})}
	a.members["a"] = &member{name: "a", dom: d}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond) // enough to be told
	defer cancel()
	if err := a.endGuests(ctx); err == nil || !strings.Contains(err.Error(), "was killed") || !hasEnded(d) {
		t.Errorf("ended: %v, %v", hasEnded(d), err)
	}
}

// TestRegionsThatAreLeft: what could not be brought to the devices stays in
// memory when the pair goes down.
func TestRegionsThatAreLeft(t *testing.T) {
	a := bareAgent(t, pairConfig)
	m, err := region.Dir(a.base)
	if err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(m.Path, "region-a")
	if err := os.WriteFile(left, []byte("acknowledged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := a.cleanUp(); err == nil || !strings.Contains(err.Error(), "nothing is lost") {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(left); err != nil {
		t.Error(err)
	}
	if err := os.Remove(left); err != nil {
		t.Fatal(err)
	}
	if err := a.cleanUp(); err != nil {
		t.Error(err)
	}
}

// TestSettle: the pair does not go down in the middle of a takeover that ends
// soon, and does not wait for ever.
func TestSettle(t *testing.T) {
	a := bareAgent(t, pairConfig)
	a.step(t, partner.Message{Kind: partner.KindStarted, Guest: "a", Inc: 1})
	s, err := a.snapshot(t.Context())
	if err != nil || s.settled() {
		t.Errorf("nobody serves yet: %+v, %v", s, err)
	}
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	a.settle(ctx)
	if took := time.Since(began); took < 20*time.Millisecond {
		t.Errorf("it waited only %v", took)
	}
	a.step(t, partner.Message{Kind: partner.KindReaped, Guest: "a", Inc: 1})
	if s, err := a.snapshot(t.Context()); err != nil || !s.settled() {
		t.Errorf("nobody lives: %+v, %v", s, err)
	}
}

// TestCannotRemember: what cannot be recorded does not hold either.
func TestCannotRemember(t *testing.T) {
	a := bareAgent(t, pairConfig)
	if err := os.RemoveAll(a.cfg.RunDir()); err != nil {
		t.Fatal(err)
	}
	err := a.remember(func(_ *config.State, c *config.Config) { c.Guests[0].Pool.Name = "tank" })
	if err == nil || !strings.Contains(err.Error(), "remember: ") || a.cfg.Guests[0].Pool.Name == "tank" {
		t.Errorf("%v, %s", err, a.cfg.Guests[0].Pool.Name)
	}
	a.poolSeen("a")
	if e, _ := a.events.since(0); len(e) != 1 || e[0].Kind != "alert" || !a.cfg.Guests[0].Pool.Create {
		t.Errorf("%+v", e)
	}
}

// TestFenceFails: nobody is told that a guest was killed when it was not.
func TestFenceFails(t *testing.T) {
	a := bareAgent(t, pairConfig)
	d := &idle{make(chan struct{}), errors.New("not permitted")}
	a.members["a"] = &member{name: "a", dom: d}
	a.act(partner.Action{Do: partner.DoKill, Guest: "a", Inc: 1})
	e, _ := a.events.since(0)
	if len(e) != 1 || e[0].Kind != "alert" || !strings.Contains(e[0].Message, "cannot be killed") || !strings.Contains(e[0].Message, "not permitted") {
		t.Errorf("%+v", e)
	}
}

// TestHistoryCannotBeWritten: a takeover counts although its record, or the
// log of events, takes nothing.
func TestHistoryCannotBeWritten(t *testing.T) {
	a := bareAgent(t, pairConfig)
	a.grants = map[string]partner.Message{}
	a.left = map[string][]partner.Step{}
	if err := os.MkdirAll(filepath.Join(lastPath(a.cfg.Dir), "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	a.events.close()
	a.serving(&member{name: "b"}, partner.Message{Kind: partner.KindServing, Identity: "a", Since: time.Now().UnixNano()})
	if got := a.lastOf("a"); got.By != "b" {
		t.Errorf("%+v", got)
	}
	if e, _ := a.events.since(0); len(e) != 1 || e[0].Kind != "takeover" {
		t.Errorf("%+v", e)
	}
}
