package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/partner"
)

func lastPath(dir string) string { return filepath.Join(dir, "last-takeover.json") }

func readLast(dir string) *control.Takeover {
	b, err := os.ReadFile(lastPath(dir))
	if err != nil {
		return nil
	}
	var t control.Takeover
	if json.Unmarshal(b, &t) != nil {
		return nil // it is only history
	}
	return &t
}

// serving records that a guest serves an identity, and what it took.
func (a *agent) serving(m *member, msg partner.Message) {
	g := a.grants[msg.Identity]
	t := &control.Takeover{
		Of: msg.Identity, By: m.name, Kind: control.KindTakeover, Reason: g.Reason, Planned: g.Planned,
		Started: time.Unix(0, msg.Since),
	}
	for _, s := range msg.Steps {
		// What the holder before took for its release is part of the wait.
		if left := a.left[msg.Identity]; s.Name == "release" && len(left) > 0 {
			for _, l := range left {
				s.Took -= l.Took
				t.Steps = append(t.Steps, control.Step{Name: "release", Took: control.Duration(l.Took)})
			}
			s.Name = "messages"
		}
		t.Steps = append(t.Steps, control.Step{Name: s.Name, Took: control.Duration(s.Took)})
	}
	delete(a.left, msg.Identity)
	for _, s := range t.Steps {
		// Not until now: the message may have waited on its way here.
		t.Total += s.Took
	}
	took := time.Duration(t.Total).Round(10 * time.Microsecond)
	switch {
	case m.name != msg.Identity:
	case g.Basis == partner.BasisRestart:
		t.Kind = control.KindResumed
		a.mu.Lock()
		m.resumed++
		a.mu.Unlock()
	default:
		if g.Basis == partner.BasisStart || a.lastBy(msg.Identity) == m.name {
			a.event(m.name, "serving", nil, "guest %s serves %s after %s", m.name, msg.Identity, took)
			return
		}
		t.Kind = control.KindGiveback
	}
	a.event(m.name, t.Kind, map[string]string{"of": t.Of, "by": t.By, "total": took.String()},
		"guest %s serves %s after %s (%s): %s", m.name, msg.Identity, took, t.Kind, t.Reason)
	a.mu.Lock()
	a.last = t
	a.mu.Unlock()
	if err := config.WriteRunJSON(lastPath(a.settings().Dir), t); err != nil {
		a.log.Warn("history", "error", err)
	}
}

// lastBy returns who served an identity after its last move, as far as known.
func (a *agent) lastBy(identity string) string {
	if a.last == nil || a.last.Of != identity {
		return identity
	}
	return a.last.By
}

// poolSeen remembers that an identity's pool exists, so that nothing ever
// makes another one in its place.
func (a *agent) poolSeen(id string) {
	g := a.settings().Guest(id)
	if g == nil || !g.Pool.Create && g.Pool.Import == nil {
		return
	}
	err := a.remember(func(st *config.State, c *config.Config) {
		gs := st.Guests[id]
		gs.Created, gs.Import = true, nil
		st.Guests[id] = gs
		p := &c.Guest(id).Pool
		p.Create, p.Import = false, nil
	})
	if err != nil {
		a.event(id, "alert", nil, "that the pool of %s exists cannot be recorded: %v", id, err)
	}
}

// remember changes what the pair remembers, and the settings in force.
func (a *agent) remember(edit func(*config.State, *config.Config)) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	st, err := config.ReadState(a.cfg.Dir)
	if err != nil {
		return err
	}
	c := *a.cfg
	c.Guests = append([]config.Guest{}, a.cfg.Guests...)
	edit(&st, &c)
	if err := errors.Join(st.Write(c.Dir), c.WriteEffective()); err != nil {
		return fmt.Errorf("remember: %w", err)
	}
	a.cfg = &c
	return nil
}
