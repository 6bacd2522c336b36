package host

import (
	"context"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
)

// removeDevice begins to take a device out of a pool, or cancels that. The settings say
// so first: then a guest that opens the pool does without the device if the pool does,
// whatever is left of it. Once the pool has no such device the settings forget it.
func (a *agent) removeDevice(ctx context.Context, name string, c control.PoolRemove) (control.Pool, error) {
	if err := a.beginChange(); err != nil {
		return control.Pool{}, err
	}
	defer a.change.Unlock()
	p, g, cl, err := a.poolToChange(ctx, name)
	if err != nil {
		return p, err
	}
	before, after := g.Pool.Removing, []string(nil)
	if !c.Cancel {
		c.Device = a.absolute(c.Device)
		if c.Paths = pathsOf(&g.Pool, c.Device); c.Paths == nil {
			return p, control.NewError(control.KindNotFound, fmt.Sprintf("%s is no device of pool %s", c.Device, name), fmt.Sprintf("see `pollux pool show %s`", name))
		}
		after = slices.Clone(before)
		for _, path := range c.Paths {
			if !slices.Contains(after, path) {
				after = append(after, path)
			}
		}
		if err := a.setRemoving(g, g.Pool.MemberGroups(), after); err != nil {
			return p, err
		}
	}
	p, err = cl.RemoveDevice(ctx, name, c)
	switch {
	case err == nil && c.Cancel:
		err = a.setRemoving(g, g.Pool.MemberGroups(), nil)
	case err != nil && !c.Cancel && !unanswered(ctx, err):
		if serr := a.setRemoving(g, g.Pool.MemberGroups(), before); serr != nil {
			err = fmt.Errorf("%w; and %w", err, serr)
		}
	}
	return p, err
}

// pathsOf returns the device of a path, or all copies of the mirror that it is one of.
func pathsOf(p *config.Pool, path string) []string {
	for _, group := range p.MemberGroups() {
		if slices.Contains(group, path) {
			return slices.Clone(group)
		}
	}
	return nil
}

// setRemoving remembers the devices of a pool, and which of them are being removed.
func (a *agent) setRemoving(g *config.Guest, groups [][]string, removing []string) error {
	devices, widths := slices.Concat(groups...), config.WidthsOf(groups, max(g.Pool.Copies, 1))
	return a.remember(func(st *config.State, cfg *config.Config) {
		gs := st.Guests[g.Name]
		gs.Devices, gs.Widths, gs.Removing, gs.Copies = devices, widths, removing, g.Pool.Copies
		st.Guests[g.Name] = gs
		p := &cfg.Guest(g.Name).Pool
		p.Devices, p.Widths, p.Removing = append(slices.Clone(devices), g.Pool.Candidate()...), widths, removing
	})
}

// poolToChange is poolHolder for what changes the devices of a pool: the settings are
// in line with removals that have come to their end. change is held.
func (a *agent) poolToChange(ctx context.Context, name string) (p control.Pool, g *config.Guest, cl *control.Client, err error) {
	if p, g, cl, err = a.poolHolder(ctx, name); err == nil {
		g, err = a.forgetRemoved(p, g)
	}
	return p, g, cl, err
}

// forgetRemoved takes the devices out of the settings whose removal from an open pool
// has come to its end, notes the one that is being removed, and returns the settings
// that hold then. change is held.
func (a *agent) forgetRemoved(p control.Pool, g *config.Guest) (*config.Guest, error) {
	if p.State != "open" {
		return g, nil
	}
	// A mirror is there as long as one of its copies is.
	there := func(group []string) bool {
		return slices.ContainsFunc(p.Devices, func(d control.DeviceStatus) bool { return slices.Contains(group, d.Path) })
	}
	var groups [][]string
	removing, changed := slices.Clone(g.Pool.Removing), false
	for _, group := range g.Pool.MemberGroups() {
		in := func(paths []string) bool {
			return slices.ContainsFunc(paths, func(path string) bool { return slices.Contains(group, path) })
		}
		marked := in(g.Pool.Removing)
		if !there(group) && (marked || in(p.Stats.Removed)) {
			removing = slices.DeleteFunc(removing, func(path string) bool { return slices.Contains(group, path) })
			changed = true
			continue
		}
		groups = append(groups, group)
		// A removal may have been begun on another host.
		if r := p.Stats.Removal; r != nil && in(r.Paths) && !marked {
			removing, changed = append(removing, group...), true
		}
	}
	if !changed {
		return g, nil
	}
	if err := a.setRemoving(g, groups, removing); err != nil {
		return nil, err
	}
	return a.known(g.Name)
}

// tidyRemoved brings the settings in line with removals that have come to their end,
// unless a command changes pools just now. st tells whether there may be anything to do.
func (a *agent) tidyRemoved(ctx context.Context, st control.Status) {
	due := slices.ContainsFunc(a.settings().Guests, func(g config.Guest) bool { return len(g.Pool.Removing) > 0 })
	for _, g := range st.Guests {
		due = due || slices.ContainsFunc(g.PoolStats, func(p control.PoolStatus) bool { return p.Removal != nil || len(p.Removed) > 0 })
	}
	if !due || !a.change.TryLock() {
		return
	}
	defer a.change.Unlock()
	pools, err := a.pools(ctx)
	if err != nil {
		return // the next look tells
	}
	for _, p := range pools {
		g, err := a.known(p.Guest)
		if err == nil {
			_, err = a.forgetRemoved(p, g)
		}
		if err != nil {
			a.event(p.Guest, "alert", nil, "that a device was removed from pool %s cannot be recorded: %v", p.Name, err)
		}
	}
}
