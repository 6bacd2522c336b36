package guest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/partner"
)

// exportLimit bounds the end of an export: the last consistency point and fold.
const exportLimit = time.Minute

// exportPool closes a pool, so that it can be taken elsewhere, and serves the
// identity on without one. The agent makes the pair forget it then; should that not
// happen, whoever opens the identity the next time opens the pool again, and an
// export that is asked for before then finds it closed.
func (g *Guest) exportPool(ctx context.Context, name string, c control.PoolExport) (control.Pool, error) {
	t, st, err := g.serving(name)
	if err != nil {
		if p, ok := g.exportedBefore(name); ok {
			return p, nil
		}
		return control.Pool{}, err
	}
	p, err := g.poolOf(ctx, t.identity)
	if err != nil {
		return p, err
	}
	for _, v := range st.Volumes() {
		if err := t.unused(v.Name, ", or cut them off with --force"); err != nil && !c.Force {
			return p, err
		}
	}
	// Its heart stands still before it is closed: the partner must not wait for it.
	served := false
	err = g.ask(ctx, func() {
		if served = g.servesNow(t); served {
			g.input(partner.Message{Kind: partner.KindClosing, Identity: t.identity, Term: t.term})
		}
	})
	if err == nil && !served {
		err = control.NewError(control.KindUnavailable, t.identity+" is about to move", "try again")
	}
	if err != nil {
		return p, err
	}
	ended := false
	err = g.leaveWithin(t, closeGrace, func(s Store) error {
		ended = true
		// It is not left half-way because somebody does not wait any more.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), exportLimit)
		defer cancel()
		return s.Export(ctx)
	})
	switch {
	case errors.Is(err, context.DeadlineExceeded): // it may be open still
		g.die(fmt.Errorf("export of %s: %w", name, err))
		return p, err
	case err != nil:
		g.step(partner.Message{Kind: partner.KindLost, Identity: t.identity, Term: t.term, Reason: err.Error()})
		return p, err
	case !ended:
		return p, control.NewError(control.KindUnavailable, t.identity+" moved meanwhile", "try again")
	}
	g.forgetRecord(t.identity)
	p.State, p.ServedBy, p.Stats = control.FoundExported, "", control.PoolStatus{}
	return p, g.serveWithout(context.WithoutCancel(ctx), t, name)
}

// servesNow tells whether the machine has a tenancy served. The loop calls it.
func (g *Guest) servesNow(t *tenancy) bool {
	for _, h := range g.m.Holds() {
		if h.Identity == t.identity && h.Term == t.term {
			return h.Phase == partner.PhaseServing
		}
	}
	return false
}

// serveWithout puts a tenancy without a pool in the place of one whose pool was
// exported, unless the identity moves meanwhile.
func (g *Guest) serveWithout(ctx context.Context, old *tenancy, pool string) error {
	t := newTenancy(old.identity, old.term)
	t.exported = pool
	ctx, cancel := context.WithTimeout(ctx, reopenLimit)
	defer cancel()
	here := false
	err := g.ask(ctx, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if here = g.servesNow(old) && !g.closing; here {
			g.tenants[t.identity] = t
		}
	})
	if err != nil || !here {
		t.cancel()
		return nil // who holds it next opens it by the settings
	}
	if err := g.startServer(t); err != nil {
		g.log.Error("serve failed", "identity", t.identity, "error", err)
		g.wg.Go(func() { g.lose(t, err) })
	}
	return nil
}

// exportedBefore returns a pool that was exported and that the settings still name.
func (g *Guest) exportedBefore(name string) (control.Pool, bool) {
	for _, t := range g.all() {
		if t.exported == name && t.open() == nil && !t.isGone() {
			return control.Pool{Name: name, Guest: t.identity, State: control.FoundExported, Devices: []control.DeviceStatus{}}, true
		}
	}
	return control.Pool{}, false
}

// importPool opens a pool from elsewhere for an identity that this guest holds
// without one. The settings name it already; the agent put it there.
func (g *Guest) importPool(ctx context.Context, c control.PoolImport) (control.Pool, error) {
	t := g.tenant(c.Guest)
	if t == nil || t.isGone() || t.open() != nil {
		return control.Pool{}, control.NewError(control.KindRefused, fmt.Sprintf("%s has a pool already, or is not served by guest %s", c.Guest, g.opt.Name), "")
	}
	set := g.settings(c.Guest)
	if set == nil || set.Pool.Import == nil {
		return control.Pool{}, control.NewError(control.KindInvalid, "the settings name no pool that "+c.Guest+" is to import", "ask the agent")
	}
	devs, _, err := g.openDevices(set, nil, func(d hpdi.Device) { _ = d.Close() })
	if err == nil {
		err = g.adopt(set, devs)
	}
	if err != nil {
		closeAll(devs)
		return control.Pool{}, err
	}
	return g.take(ctx, t, set, devs)
}

// adopt labels the devices of a pool that is being imported. It is repeated by
// whoever opens the pool until the agent has seen it open.
func (g *Guest) adopt(set *config.Guest, devs []hpdi.Device) error {
	i := set.Pool.Import
	if i == nil || len(devs) == 0 {
		return nil
	}
	err := g.opt.Storage.Adopt(AdoptSpec{Pool: i.ID, Name: set.Pool.Name, Identity: set.Name, Devices: devs, Epoch: block.Epoch(i.Epoch)})
	if err != nil {
		return fmt.Errorf("import pool %s: %w", set.Pool.Name, err)
	}
	return nil
}
