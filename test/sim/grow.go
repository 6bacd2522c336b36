package sim

import (
	"context"
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/ondisk"
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

// withoutCandidate leaves out a disk whose addition did not come as far as a
// whole label.
func (pl *pool) withoutCandidate(devs []hpdi.Device) []hpdi.Device {
	last := devs[len(devs)-1]
	if len(devs) <= len(pl.disks) {
		return devs
	}
	if _, err := spool.ReadLabel(last); errors.Is(err, ondisk.ErrMagic) || errors.Is(err, block.ErrCorrupt) {
		_ = last.Close()
		return devs[:len(devs)-1]
	}
	return devs
}

// wanted are the disks that guests open a pool with.
func (pl *pool) wanted() []*disk {
	if pl.candidate == nil {
		return pl.disks
	}
	return append(pl.disks[:len(pl.disks):len(pl.disks)], pl.candidate)
}
