package guest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// addDevice adds a device to a pool that is served: one by itself, or a mirror of
// several.
func (g *Guest) addDevice(ctx context.Context, name string, c control.PoolAdd) (control.Pool, error) {
	t, st, err := g.serving(name)
	if err != nil {
		return control.Pool{}, err
	}
	d, err := g.newMember(t, st, c)
	if err != nil {
		return control.Pool{}, err
	}
	add := st.AddDevice
	switch c.Class {
	case control.ClassLLRRM:
		add = st.AddMemory
	case control.ClassFlash:
		add = func(ctx context.Context, d hpdi.Device) error { return st.AddFlash(ctx, d, c.SetBytes) }
	}
	if err := add(ctx, d); err != nil {
		_ = d.Close()
		return control.Pool{}, fmt.Errorf("add device %s: %w", d.Info().Name, err)
	}
	t.mu.Lock()
	t.devices = append(t.devices[:len(t.devices):len(t.devices)], d)
	if !t.gone {
		g.careLocked(t, d)
	}
	t.mu.Unlock()
	return g.poolOf(ctx, t.identity)
}

// newMember opens what is to be added to a pool.
func (g *Guest) newMember(t *tenancy, st Store, c control.PoolAdd) (hpdi.Device, error) {
	if len(c.Copies) > 0 {
		d, err := g.newMirror(t, st, append([]string{c.Device}, c.Copies...))
		if err != nil {
			return nil, fmt.Errorf("add a mirror: %w", err)
		}
		return d, nil
	}
	d, err := g.openOne(c.Device, time.Now(), nil)
	if err != nil {
		return nil, fmt.Errorf("device %s: %w", c.Device, err)
	}
	// A device with a label is the store's to judge: it may be of an
	// addition that failed half-way.
	if _, err = g.opt.Storage.Label(d); errors.Is(err, ErrNoPool) {
		err = blank(d)
	}
	if err != nil {
		_ = d.Close()
		return nil, fmt.Errorf("add device %s: %w", c.Device, err)
	}
	return d, nil
}

// newMirror makes a mirror of devices that hold nothing, or takes the one that an
// addition has left which failed half-way.
func (g *Guest) newMirror(t *tenancy, st Store, paths []string) (hpdi.Device, error) {
	var devs []hpdi.Device
	for _, path := range paths {
		d, err := g.openOne(path, time.Now(), nil)
		if err != nil {
			closeAll(devs)
			return nil, fmt.Errorf("device %s: %w", path, err)
		}
		devs = append(devs, d)
	}
	if !g.leftMirror(st, paths) {
		var err error
		for _, d := range devs {
			err = errors.Join(err, g.free(d))
		}
		if err == nil {
			_, err = mirror.Create(devs)
		}
		if err != nil {
			closeAll(devs)
			return nil, err
		}
	}
	devs, err := mirror.Assemble(devs, g.memory(&g.settings(t.identity).Pool).apply(mirror.Options{}))
	if err != nil {
		return nil, err
	}
	return devs[0], nil
}

// leftMirror tells whether devices are the whole of a mirror that belongs to no
// pool, or that was labelled for this one.
func (g *Guest) leftMirror(st Store, paths []string) bool {
	m, err := openMirror(paths, nil)
	if err != nil {
		return false
	}
	defer func() { _ = m.Close() }() // it was only read
	copies := m.Status().Copies
	for _, c := range copies {
		if c.State != mirror.InSync {
			return false
		}
	}
	l, err := g.opt.Storage.Label(m)
	return len(copies) == len(paths) && (errors.Is(err, ErrNoPool) || err == nil && l.Pool == st.Region().Pool)
}

// free refuses a device that holds something, unless that is a copy of a mirror
// which never became part of a pool.
func (g *Guest) free(d hpdi.Device) error {
	err := blank(d)
	if err == nil {
		return nil
	}
	m, merr := openMirror([]string{d.Info().Name}, nil)
	if merr != nil {
		return err
	}
	defer func() { _ = m.Close() }() // it was only read
	if l, lerr := g.opt.Storage.Label(m); !errors.Is(lerr, ErrNoPool) {
		return errors.Join(fmt.Errorf("device %s is a copy of a mirror of pool %q: %w", d.Info().Name, l.Name, err), lerr)
	}
	return nil
}
