package sim

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	spool "github.com/pollux-storage/pollux/internal/pool"
)

// doAdd: add ID [size=S] [llrrm]. It adds a disk to a pool, as `pollux pool add` does;
// once more the same one when the last answer left it open whether it is part of
// the pool. From the first try on guests open the disk with the others.
func (w *World) doAdd(l Line) error {
	id := l.arg(1)
	pl, err := w.poolOf(id)
	if err != nil {
		return err
	}
	if pl.copies > 1 {
		return nil // mirrors are added as such
	}
	if pl.candidate == nil {
		size := int64(diskSize)
		if v, ok := l.option("size"); ok {
			if size, err = bytesOf(v); err != nil {
				return err
			}
		}
		name := fmt.Sprintf("%s%d", id, len(pl.disks))
		pl.candidate = &disk{w: w, name: name, owner: id, slow: 1, llrrm: l.has("llrrm"),
			medium: blocktest.NewCrashWith(blocktest.CrashOptions{Name: name, Size: size, Seed: w.rng.Uint64()})}
		w.disks = append(w.disks, pl.candidate)
	}
	d := pl.candidate
	err = w.ask(id, l.String(), func(ctx context.Context, p *spool.Pool) error { return d.join(ctx, p) })
	if err == nil {
		pl.disks, pl.candidate = append(pl.disks, d), nil
	} else if !pl.tolerable(err) {
		w.violate("%s: %v", l, err)
	}
	return nil
}

// join makes a disk part of the pool unless it is that already.
func (d *disk) join(ctx context.Context, p *spool.Pool) error {
	for _, info := range p.Stats().Devices {
		if info.Name == d.name {
			return nil
		}
	}
	got := make(chan *handle, 1)
	d.w.post(nil, func() {
		var h *handle
		if q, t := d.w.serving(d.owner); q != nil && t.pool == p {
			h = d.open(q)
		}
		got <- h
	})
	h := <-got
	if h == nil {
		return errNobody // or a dead guest's last request is still on its way
	}
	add := p.AddDevice
	if d.llrrm {
		add = p.AddMemory
	}
	err := add(ctx, h)
	if err != nil {
		_ = h.Close()
	}
	return err
}

// doRemove: remove ID. It takes the newest low-latency memory out of a pool, as `pollux
// pool remove` does; in the background, and over deaths of guests.
func (w *World) doRemove(l Line) error {
	id := l.arg(1)
	pl, err := w.poolOf(id)
	if err != nil {
		return err
	}
	i := len(pl.disks) - 1
	for i > 0 && !pl.disks[i].llrrm {
		i--
	}
	if i <= 0 {
		return nil // there is none, or it is not known whether there is
	}
	d := pl.disks[i]
	d.leaving = true
	err = w.ask(id, l.String(), func(ctx context.Context, p *spool.Pool) error { return p.RemoveDevice(ctx, d.name) })
	if errors.Is(err, block.ErrNotFound) || errors.Is(err, block.ErrNoSpace) || errors.Is(err, block.ErrExists) {
		err = nil // it is gone, the disks have no room for what it has, or another one leaves
	}
	if !pl.tolerable(err) {
		w.violate("%s: %v", l, err)
	}
	return nil
}

// members leaves out disks whose addition did not come as far as a whole label, or
// whose removal has come as far as none.
func (pl *pool) members(devs []hpdi.Device) []hpdi.Device {
	return slices.DeleteFunc(devs, func(dev hpdi.Device) bool {
		h, ok := dev.(*handle)
		if !ok || h.d != pl.candidate && !h.d.leaving {
			return false
		}
		_, err := spool.ReadLabel(dev)
		if !spool.Wiped(err) {
			return false
		}
		_ = dev.Close()
		return true
	})
}

// wanted are the disks that guests open a pool with.
func (pl *pool) wanted() []*disk {
	if pl.candidate == nil {
		return pl.disks
	}
	return append(pl.disks[:len(pl.disks):len(pl.disks)], pl.candidate)
}
