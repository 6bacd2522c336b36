package pool

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

// FlashChange changes what is kept of the policy of a pool's flash; what is nil stays.
type FlashChange struct {
	// Params returns the parameters that are to count instead of those that do.
	Params func(now policy.Params) (policy.Params, error)
	// Classes are given to devices, by their names; an empty one takes back what was given.
	Classes map[string]string
	// Pin and Unpin are added and taken away. A pin that is there already and one that is
	// not there are errors, block.ErrExists and block.ErrNotFound.
	Pin, Unpin []FlashPin
}

// noFlash is the error of a pool without flash.
func (p *Pool) noFlash() error {
	return fmt.Errorf("pool %s has no flash device; add one with `pollux pool add --class flash`: %w", p.label.Name, block.ErrNotFound)
}

// doFlash is do for a pool with flash.
func (p *Pool) doFlash(ctx context.Context, fn func(f *flash) error) error {
	return p.do(ctx, func() error {
		if p.flash.layer == nil {
			return p.noFlash()
		}
		return fn(p.flash)
	})
}

// FlashPolicy returns the parameters that count, and the pins. The error is of kind
// block.ErrNotFound for a pool without flash, as that of all that follow.
func (p *Pool) FlashPolicy(ctx context.Context) (params policy.Params, pins []FlashPin, err error) {
	err = p.doFlash(ctx, func(f *flash) error {
		params = f.kept.Policy
		for _, k := range f.kept.Pins {
			pins = append(pins, f.pinOf(k))
		}
		return nil
	})
	return params, pins, err
}

// ChangeFlash changes the policy, durably, and returns what that changes of the parameters.
// Where something is wrong nothing changes; the error of a rule is a *policy.RuleError.
func (p *Pool) ChangeFlash(ctx context.Context, c FlashChange) (changes []policy.Change, err error) {
	err = p.doFlash(ctx, func(f *flash) error {
		if changes, err = f.change(c); err != nil {
			return fmt.Errorf("flash of pool %s: %w", p.label.Name, err)
		}
		return nil
	})
	return changes, err
}

func (f *flash) change(c FlashChange) ([]policy.Change, error) {
	k := f.kept.clone()
	if c.Params != nil {
		params, err := c.Params(k.Policy)
		if err == nil {
			err = params.Validate()
		}
		if err != nil {
			return nil, err
		}
		k.Policy = params
	}
	if err := f.classify(&k, c.Classes); err != nil {
		return nil, err
	}
	pins := f.kept.Pins
	for _, x := range c.Unpin {
		pin, err := f.keptPin(x)
		if err != nil {
			return nil, err
		}
		i := slices.Index(k.Pins, pin)
		if i < 0 {
			return nil, fmt.Errorf("%d bytes at %d of volume %s are not pinned: %w", x.Length, x.Offset, x.Volume, block.ErrNotFound)
		}
		k.Pins = slices.Delete(k.Pins, i, i+1)
	}
	for _, x := range c.Pin {
		pin, err := f.keptPin(x)
		switch {
		case err != nil:
			return nil, err
		case slices.Contains(k.Pins, pin):
			return nil, fmt.Errorf("%d bytes at %d of volume %s are pinned already: %w", x.Length, x.Offset, x.Volume, block.ErrExists)
		case len(k.Pins) >= maxPins:
			return nil, fmt.Errorf("there are %d pins, no more are possible: %w", maxPins, block.ErrInvalid)
		}
		k.Pins = append(k.Pins, pin)
	}
	k.Pins = slices.DeleteFunc(k.Pins, func(pin keptPin) bool {
		_, ok := f.p.catalogue.Get(pin.Volume)
		return !ok // it was deleted
	})
	if err := f.store(k); err != nil {
		return nil, err
	}
	if !slices.Equal(pins, k.Pins) {
		f.pins.again()
	}
	now := time.Now()
	changes, err := f.engine.Use(k.Policy)
	for _, d := range f.disks {
		if err == nil {
			err = d.collector.Use(k.Policy.Collect, now)
		}
	}
	f.pace.Use(k.Policy.Budget)
	f.refresh()
	return changes, err
}

// keptPin returns a pin as it is kept.
func (f *flash) keptPin(x FlashPin) (keptPin, error) {
	v, ok := f.p.catalogue.ByName(x.Volume)
	switch {
	case !ok:
		return keptPin{}, f.p.unknown(x.Volume)
	case x.Offset < 0 || x.Length < 0 || uint64(x.Offset) >= uint64(v.Size):
		return keptPin{}, fmt.Errorf("a pin of %d bytes at %d of volume %s, which has %d: %w", x.Length, x.Offset, x.Volume, v.Size, block.ErrInvalid)
	}
	return keptPin{v.ID, x.Offset, x.Length}, nil
}

// classify gives devices classes.
func (f *flash) classify(k *flashKept, classes map[string]string) error {
	for name, class := range classes {
		i := slices.IndexFunc(f.disks, func(d *flashDisk) bool { return d.name == name })
		switch {
		case i < 0:
			return fmt.Errorf("device %s is none whose data move to flash: %w", name, block.ErrNotFound)
		case len(class) > policy.MaxTypeName:
			return fmt.Errorf("a class of devices with a name of %d bytes; up to %d are possible: %w", len(class), policy.MaxTypeName, block.ErrInvalid)
		case class == "":
			delete(k.Classes, f.disks[i].id.String())
			continue
		}
		if k.Classes == nil {
			k.Classes = map[string]string{}
		}
		k.Classes[f.disks[i].id.String()] = class
	}
	return nil
}

// What can be asked of an evacuation.
const (
	EvacuateStart = "start"
	EvacuateStop  = "stop"
)

// EvacuateFlash begins to move all data sets back to their devices (start), across restarts
// and takeovers, or ends that, so that flash is used again (stop). To ask for what is so
// already changes nothing.
func (p *Pool) EvacuateFlash(ctx context.Context, action string) error {
	return p.doFlash(ctx, func(f *flash) error {
		if action != EvacuateStart && action != EvacuateStop {
			return fmt.Errorf("an evacuation cannot be made to %q: %w", action, block.ErrInvalid)
		}
		k := f.kept.clone()
		if k.Evacuate = action == EvacuateStart; k.Evacuate == f.kept.Evacuate {
			return nil
		}
		if err := f.store(k); err != nil {
			return fmt.Errorf("flash of pool %s: %w", p.label.Name, err)
		}
		f.refresh()
		return nil
	})
}
