package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/guest"
)

// addDevice adds a device to a pool, or a mirror. The settings name what is added
// before its label does, so that a crash in between leaves devices that are known
// and unused, never some that are needed and unknown. The same may be added again
// when it is not known whether it was.
func (a *agent) addDevice(ctx context.Context, name string, c control.PoolAdd) (control.Pool, error) {
	if err := a.beginChange(); err != nil {
		return control.Pool{}, err
	}
	defer a.change.Unlock()
	p, g, cl, err := a.poolToChange(ctx, name)
	if err != nil {
		return p, err
	}
	switch {
	case c.Device == "":
		return p, control.NewError(control.KindInvalid, "a device is needed", "")
	case c.Class != "" && !slices.Contains(deviceClasses, c.Class):
		return p, control.NewError(control.KindInvalid, fmt.Sprintf("there is no class of devices %q", c.Class), "use one of "+strings.Join(deviceClasses, ", "))
	case c.SetBytes != 0 && c.Class != control.ClassFlash:
		return p, control.NewError(control.KindInvalid, "only a device of class "+control.ClassFlash+" has data sets of a size", "")
	}
	group := []string{a.absolute(c.Device)}
	for _, path := range c.Copies {
		group = append(group, a.absolute(path))
	}
	c.Device, c.Copies = group[0], group[1:]
	pool, err := settled(&g.Pool, p)
	if err != nil {
		return p, err
	}
	set := func(pool config.Pool, adding []string) error {
		return a.remember(func(st *config.State, cfg *config.Config) {
			gs := st.Guests[p.Guest]
			gs.Devices, gs.Widths, gs.Adding, gs.AddingCopies = pool.Devices, pool.Widths, "", nil
			if len(pool.Widths) > 0 {
				gs.Copies = pool.Copies // it goes with the devices
			}
			if len(adding) > 0 {
				gs.Adding, gs.AddingCopies = adding[0], adding[1:]
			}
			st.Guests[p.Guest] = gs
			now := &cfg.Guest(p.Guest).Pool
			now.Devices, now.Widths, now.Adding = append(slices.Clone(pool.Devices), adding...), pool.Widths, len(adding)
		})
	}
	if c := g.Pool.Candidate(); slices.Equal(c, group) && joined(p, c) { // the answer was lost
		return p, set(pool, nil)
	}
	if err := mayAdd(name, &pool, group, c.Force); err != nil {
		return p, err
	}
	after := pool
	after.Devices = append(slices.Clone(pool.Devices), group...)
	after.Widths = config.WidthsOf(append(pool.Groups(), group), pool.Copies)
	var made []string
	for _, path := range group {
		ok, err := makeDevice(g, path, c.Size)
		if err != nil {
			removeAll(made)
			return p, err
		}
		if ok {
			made = append(made, path)
		}
	}
	if err := set(pool, group); err != nil {
		// Half of it may have been written. A file that was made is left: it
		// must not be missing as long as anything names it.
		_ = set(pool, nil)
		return p, err
	}
	got, err := cl.AddDevice(ctx, name, c)
	if err != nil {
		// Else the device may be part of the pool: its label will tell.
		if !unanswered(ctx, err) {
			err = errors.Join(err, set(pool, nil))
			removeAll(made)
		}
		return p, err
	}
	what := "device " + group[0] + " is"
	if len(group) > 1 {
		what = "the mirror of " + strings.Join(group, ", ") + " is"
	}
	fields := map[string]string{"pool": name, "device": strings.Join(group, ",")}
	as := ""
	switch {
	case c.Class == control.ClassLLRRM:
		as = " as LLRRM"
	case c.Class == control.ClassFlash && len(group) == 1:
		as = " as flash, by itself: whatever is on it is lost with it"
	case c.Class == control.ClassFlash:
		as = " as flash"
	}
	if as != "" {
		fields["class"] = c.Class
	}
	a.event(p.Guest, "device-added", fields, "%s part of pool %s%s", what, name, as)
	return got, set(after, nil)
}

// deviceClasses are those that a device can be added as.
var deviceClasses = []string{control.ClassDisk, control.ClassLLRRM, control.ClassFlash}

// settled returns the settings of a pool without what was being added, or, where
// the open pool shows that it was, with it.
func settled(set *config.Pool, p control.Pool) (config.Pool, error) {
	out := *set
	out.Adding = 0
	candidate := set.Candidate()
	switch {
	case len(candidate) == 0:
	case p.State != "open":
		return out, control.NewError(control.KindUnavailable, fmt.Sprintf("pool %s is not open, so that it cannot be told whether %s is part of it", p.Name, strings.Join(candidate, ", ")), "see `pollux status`")
	case joined(p, candidate):
		out.Widths = config.WidthsOf(set.Groups(), set.Copies)
	case slices.ContainsFunc(candidate, guest.Locked):
		return out, control.NewError(control.KindRefused, fmt.Sprintf("%s is being added to pool %s", strings.Join(candidate, ", "), p.Name), "see `pollux pool show "+p.Name+"`, and try again")
	default:
		out.Devices = slices.Clone(set.Members())
	}
	return out, nil
}

// joined tells whether an open pool has devices.
func joined(p control.Pool, group []string) bool {
	return p.State == "open" && slices.ContainsFunc(p.Devices, func(d control.DeviceStatus) bool { return slices.Contains(group, d.Path) })
}

// mayAdd refuses what makes no sense, and what would take redundancy from a pool
// unless the person wants that.
func mayAdd(name string, pool *config.Pool, group []string, force bool) error {
	for i, path := range group {
		if slices.Contains(group[:i], path) {
			return control.NewError(control.KindInvalid, fmt.Sprintf("device %s is named twice", path), "")
		}
		if slices.Contains(pool.Devices, path) {
			return control.NewError(control.KindExists, fmt.Sprintf("device %s is part of pool %s already", path, name), "")
		}
	}
	switch {
	case len(group) > config.MaxCopies:
		return control.NewError(control.KindInvalid, fmt.Sprintf("a mirror of %d devices; up to %d are possible", len(group), config.MaxCopies), "")
	case len(group) == 1 && pool.Mirrored() && !force:
		return control.NewError(control.KindRefused, fmt.Sprintf("pool %s keeps each block on several devices, and what came to lie on a device by itself would be lost with it", name),
			"add a mirror, with --mirror and two devices; or, if redundancy may be lost, use --force")
	}
	return nil
}
