package pool

import (
	"context"
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
)

// RemoveDevice begins to take a device out of the pool, by its name. What lies on it
// is moved to the others in the background, across restarts and takeovers, and then
// the device is no part of the pool any more. For one that is being removed it does
// nothing. Kinds of error: block.ErrNotFound for no device of the pool,
// block.ErrExists when another one is being removed,
// block.ErrNoSpace when the others have no room, and block.ErrInvalid for a device
// that the pool cannot do without.
func (p *Pool) RemoveDevice(ctx context.Context, name string) error {
	return p.do(ctx, func() error {
		if err := p.machine.Claimed(); err != nil {
			return err
		}
		dev, err := p.removable(name)
		if err != nil || dev == p.remover.dev {
			return err
		}
		if p.machine.Folding() { // which would write the states of devices as they were
			if err := p.foldAll(); err != nil {
				return err
			}
		}
		l, ok := p.space.Leave(dev)
		if !ok {
			// What was given up and not freed yet may make the room.
			if err := p.freeEverything(); err != nil {
				return err
			}
			l, ok = p.space.Leave(dev)
		}
		if !ok {
			return fmt.Errorf("device %s has %d MiB in use, for which the other devices of pool %s have %d MiB beside what is kept back; delete something or add a device: %w",
				name, toMiB(l.Used), p.label.Name, max(0, l.Room)*block.Size>>20, block.ErrNoSpace)
		}
		err = p.machine.Rewrite(func(sb *cp.Superblock) {
			sb.Devices[dev].State, sb.Devices[dev].Was = cp.DeviceLeaving, uint64(l.Used)
		})
		if err != nil {
			p.space.SetLeaving(dev, false)
			// The superblock may be there all the same, and whoever opens the pool
			// next would go on with a removal that nobody was promised.
			return errors.Join(err, p.machine.Rewrite(func(*cp.Superblock) {}))
		}
		p.remover.begin(dev)
		used := toMiB(l.Used)
		if p.flash.is(dev) {
			used = p.flash.bytes() >> 20
		}
		p.remover.tell("device-removing", "device %s of pool %s is being removed: %d MiB are moved to the other devices", name, p.label.Name, used)
		return nil
	})
}

// toMiB returns how many MiB blocks take, rounded up.
func toMiB(blocks int64) int64 { return (blocks*block.Size + 1<<20 - 1) >> 20 }

// removable returns the index of the device of a name, if the pool can do without it.
func (p *Pool) removable(name string) (int, error) {
	found, devices := -1, 0
	for i := range p.set.Len() {
		if !p.set.Has(i) {
			continue
		}
		if devices++; p.set.Info(i).Name == name {
			found = i
		}
	}
	switch first := p.set.Info(0).Name; {
	case found < 0:
		return 0, fmt.Errorf("device %s in pool %s: %w", name, p.label.Name, block.ErrNotFound)
	case devices == 1:
		return 0, fmt.Errorf("device %s is the only one of pool %s and cannot be removed: %w", name, p.label.Name, block.ErrInvalid)
	case found == 0:
		return 0, fmt.Errorf("device %s, the first of pool %s, holds its superblocks, its journal and its flush log, which cannot be moved; it cannot be removed, the others can: %w", first, p.label.Name, block.ErrInvalid)
	case p.remover.active() && found != p.remover.dev:
		return 0, fmt.Errorf("device %s of pool %s is being removed; one at a time can be: %w", p.set.Info(p.remover.dev).Name, p.label.Name, block.ErrExists)
	}
	return found, nil
}

// CancelRemoval makes the device that is being removed stay. What was moved remains
// where it is. The error is of kind block.ErrNotFound when no device is being removed.
func (p *Pool) CancelRemoval(ctx context.Context) error {
	return p.do(ctx, func() error {
		r := p.remover
		if !r.active() {
			return fmt.Errorf("no device of pool %s is being removed: %w", p.label.Name, block.ErrNotFound)
		}
		if p.machine.Folding() {
			if err := p.foldAll(); err != nil {
				return err
			}
		}
		dev, name := r.dev, p.set.Info(r.dev).Name
		// Nothing is allocated from the device before this is durable: after an error
		// what is on it is what was.
		err := p.machine.Rewrite(func(sb *cp.Superblock) {
			sb.Devices[dev].State, sb.Devices[dev].Was = cp.DeviceUsed, 0
		})
		if err != nil {
			return err
		}
		r.forget()
		p.space.SetLeaving(dev, false)
		r.tell("device-stays", "the removal of device %s of pool %s was cancelled", name, p.label.Name)
		return nil
	})
}
