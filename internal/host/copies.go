package host

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
)

// changeCopy changes one of several copies. The settings name a replacement
// before anything is written to it: a crash in between leaves a device that is
// known and holds nothing, beside copies that hold all, and the replacement can be
// repeated.
func (a *agent) changeCopy(ctx context.Context, name string, c control.CopyChange) (control.Pool, error) {
	if err := a.beginChange(); err != nil {
		return control.Pool{}, err
	}
	defer a.change.Unlock()
	p, g, cl, err := a.poolToChange(ctx, name)
	if err != nil {
		return p, err
	}
	c.Device = a.absolute(c.Device)
	if c.Place = slices.Index(g.Pool.Members(), c.Device); c.Place < 0 {
		return p, control.NewError(control.KindNotFound, fmt.Sprintf("%s is no device of pool %s", c.Device, name), fmt.Sprintf("see `pollux pool show %s`", name))
	}
	if !slices.ContainsFunc(g.Pool.Groups(), func(group []string) bool { return len(group) > 1 && slices.Contains(group, c.Device) }) {
		return p, control.NewError(control.KindInvalid, fmt.Sprintf("device %s of pool %s is no copy of a mirror: the pool needs it", c.Device, name), "")
	}
	if c.Action != control.CopyReplace {
		if p, err = cl.ChangeCopy(ctx, name, c); err == nil {
			a.event(g.Name, "copy-"+c.Action, map[string]string{"pool": name, "device": c.Device}, "device %s of pool %s is %s", c.Device, name, c.Action)
		}
		return p, err
	}
	return a.replaceCopy(ctx, cl, g, name, c)
}

func (a *agent) replaceCopy(ctx context.Context, cl *control.Client, g *config.Guest, name string, c control.CopyChange) (control.Pool, error) {
	if c.New == "" {
		c.New = c.Device
	}
	c.New = a.absolute(c.New)
	if c.New != c.Device && slices.Contains(g.Pool.Devices, c.New) {
		return control.Pool{}, control.NewError(control.KindExists, fmt.Sprintf("device %s is part of pool %s already", c.New, name), "")
	}
	made, err := makeDevice(g, c.New, c.Size)
	if err != nil {
		return control.Pool{}, err
	}
	before, after := slices.Clone(g.Pool.Members()), slices.Clone(g.Pool.Members())
	after[c.Place] = c.New
	set := func(devices []string) error {
		return a.remember(func(st *config.State, cfg *config.Config) {
			gs := st.Guests[g.Name]
			gs.Devices, gs.Copies, gs.Widths = devices, g.Pool.Copies, g.Pool.Widths
			st.Guests[g.Name] = gs
			cfg.Guest(g.Name).Pool.Devices = append(slices.Clone(devices), g.Pool.Candidate()...)
		})
	}
	if err := set(after); err != nil {
		_ = set(before) // half of it may have been written
		return control.Pool{}, err
	}
	p, err := cl.ChangeCopy(ctx, name, c)
	if err != nil {
		// Else the new device may be a copy by now.
		if !unanswered(ctx, err) {
			err = errors.Join(err, set(before))
			if made {
				removeAll([]string{c.New})
			}
		}
		return p, err
	}
	a.event(g.Name, "copy-replaced", map[string]string{"pool": name, "device": c.Device, "new": c.New}, "device %s takes the place of %s in pool %s", c.New, c.Device, name)
	return p, nil
}
