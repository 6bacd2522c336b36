package sim

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/mirror"
	spool "github.com/pollux-storage/pollux/internal/pool"
)

// use is what a disk is to its pool.
type use string

const (
	useDisk  use = "disk"
	useLLRRM use = "llrrm" // low-latency memory
	useFlash use = "flash"
)

// useOf returns what a line says that a disk is for.
func useOf(l Line) use {
	for _, u := range []use{useLLRRM, useFlash} {
		if l.has(string(u)) {
			return u
		}
	}
	return useDisk
}

// doAdd: add ID [size=S] [llrrm | flash]. It adds a disk to a pool, as `pollux pool add`
// does; once more the same one when the last answer left it open whether it is part of the
// pool. From the first try on guests open the disk with the others. Where the pool keeps
// copies, flash is a mirror of as many disks.
func (w *World) doAdd(l Line) error {
	id := l.arg(1)
	pl, err := w.poolOf(id)
	if err != nil {
		return err
	}
	as := useOf(l)
	if pl.copies > 1 && as != useFlash {
		return nil // mirrors are added as such
	}
	for first := true; w.fail == nil; first = false {
		if len(pl.candidate) == 0 {
			size := int64(diskSize)
			if v, ok := l.option("size"); ok {
				if size, err = bytesOf(v); err != nil {
					return err
				}
			}
			if err := w.prepare(pl, as, size); err != nil {
				return err
			}
		}
		c := pl.candidate
		err = w.ask(id, l.String(), func(ctx context.Context, p *spool.Pool) error { return w.join(ctx, pl, c, p) })
		if err == nil {
			pl.disks, pl.candidate = append(pl.disks, c...), nil
			if c[0].use == useFlash {
				clear(pl.pins) // they were those of one that has left
				pl.decides = true
			}
			if first && c[0].use != as {
				continue // that was another one, of which nobody knew
			}
		} else if c[0].use == useFlash && errors.Is(err, block.ErrExists) {
			err = nil // there is one, and this one waits
		}
		if !pl.tolerable(err) {
			w.violate("%s: %v", l, err)
		}
		break
	}
	return nil
}

// prepare makes a disk that is to join a pool, or the copies of a mirror.
func (w *World) prepare(pl *pool, as use, size int64) error {
	var devs []hpdi.Device
	for i := range pl.copies {
		name := fmt.Sprintf("%s%d", pl.identity, len(pl.disks)+i)
		d := &disk{w: w, name: name, owner: pl.identity, slow: 1, use: as,
			medium: blocktest.NewCrashWith(blocktest.CrashOptions{Name: name, Size: size, Seed: w.rng.Uint64()})}
		devs = append(devs, d.medium)
		w.disks, pl.candidate = append(w.disks, d), append(pl.candidate, d)
	}
	if pl.copies == 1 {
		return nil
	}
	id, err := mirror.Create(devs)
	for _, d := range pl.candidate {
		d.mirror, d.medium = id, d.medium.Reopen()
	}
	return err
}

// join makes disks part of the pool unless they are that already.
func (w *World) join(ctx context.Context, pl *pool, disks []*disk, p *spool.Pool) error {
	flash := disks[0].use == useFlash
	for _, info := range p.Stats().Devices {
		if info.Name != disks[0].name {
			continue
		}
		if flash {
			return decideSoon(ctx, p)
		}
		return nil
	}
	var handles []hpdi.Device
	for _, d := range disks {
		h := d.openFor(p)
		if h == nil {
			for _, h := range handles {
				_ = h.Close()
			}
			return errNobody // or a dead guest's last request is still on its way
		}
		handles = append(handles, h)
	}
	dev := handles[0]
	if pl.copies > 1 {
		ms, err := mirror.Assemble(handles, mirror.Options{Degraded: true, Known: pl.known, Remember: pl.remember})
		if err != nil {
			return err
		}
		dev = ms[0]
	}
	var err error
	switch disks[0].use {
	case useLLRRM:
		err = p.AddMemory(ctx, dev)
	case useFlash:
		err = p.AddFlash(ctx, dev, flashSet)
	default:
		err = p.AddDevice(ctx, dev)
	}
	if err != nil {
		return errors.Join(err, dev.Close())
	}
	if m, ok := dev.(*mirror.Mirror); ok {
		w.post(nil, func() {
			if _, t := w.serving(pl.identity); t != nil && t.pool == p {
				t.mirrors = append(t.mirrors, m)
				t.wg.Go(func() { keep(t.ctx, m) })
			}
		})
	}
	if flash {
		return decideSoon(ctx, p)
	}
	return nil
}

// openFor opens a disk for the guest that serves a pool. It returns nil when another one
// does by now, or the disk cannot be had.
func (d *disk) openFor(p *spool.Pool) *handle {
	got := make(chan *handle, 1)
	d.w.post(nil, func() {
		var h *handle
		if q, t := d.w.serving(d.owner); q != nil && t.pool == p && !d.gone {
			h = d.open(q)
		}
		got <- h
	})
	return <-got
}

// doRemove: remove ID [disk | flash]. It takes the newest low-latency memory out of a pool,
// or the newest disk, or the flash device, as `pollux pool remove` does; in the background,
// and over deaths of guests.
func (w *World) doRemove(l Line) error {
	id := l.arg(1)
	pl, err := w.poolOf(id)
	if err != nil {
		return err
	}
	as := useLLRRM
	if l.has("disk") || l.has("flash") {
		as = useOf(l)
	}
	i := len(pl.disks) - pl.copies
	for i > 0 && (pl.disks[i].use != as || as != useLLRRM && pl.left(pl.disks[i])) {
		i -= pl.copies
	}
	if i <= 0 {
		return nil // there is none, or it is not known whether there is
	}
	group := pl.disks[i : i+pl.copies]
	for _, d := range group {
		d.leaving = true
	}
	pl.empties = pl.empties || as == useDisk
	pl.decides = pl.decides && as != useFlash
	err = w.ask(id, l.String(), func(ctx context.Context, p *spool.Pool) error { return p.RemoveDevice(ctx, group[0].name) })
	if errors.Is(err, block.ErrNotFound) || errors.Is(err, block.ErrNoSpace) || errors.Is(err, block.ErrExists) {
		err = nil // it is gone, the disks have no room for what it has, or another one leaves
	}
	if !pl.tolerable(err) {
		w.violate("%s: %v", l, err)
	}
	return nil
}

// left tells whether a disk is known to be no part of its pool any more.
func (pl *pool) left(d *disk) bool {
	_, t := pl.w.serving(pl.identity)
	return d.leaving && t != nil && !slices.ContainsFunc(t.pool.Stats().Devices, func(s spool.DeviceStats) bool { return s.Name == d.name })
}

// doGrow: grow DISK SIZE. Whoever opens it next finds it larger by so much.
func (w *World) doGrow(l Line) error {
	d, err := w.disk(l.arg(1))
	if d == nil || w.pools[d.owner].copies > 1 {
		return err
	}
	n, err := bytesOf(l.arg(2))
	d.grows += n
	return err
}

// members leaves out devices whose addition did not come as far as a whole label, or whose
// removal has come as far as none.
func (pl *pool) members(devs []hpdi.Device) []hpdi.Device {
	return slices.DeleteFunc(devs, func(dev hpdi.Device) bool {
		if !slices.ContainsFunc(pl.disksOf(dev), func(d *disk) bool { return pl.isCandidate(d) || d.leaving }) {
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

// disksOf returns the disks that a device consists of.
func (pl *pool) disksOf(dev hpdi.Device) (of []*disk) {
	switch dev := dev.(type) {
	case *handle:
		return []*disk{dev.d}
	case *mirror.Mirror:
		for _, d := range append(slices.Clone(pl.disks), pl.candidate...) {
			if d.mirror == dev.ID() {
				of = append(of, d)
			}
		}
	}
	return of
}

// isCandidate tells whether a disk may be part of the pool, or become it.
func (pl *pool) isCandidate(d *disk) bool { return slices.Contains(pl.candidate, d) }

// wanted are the disks that guests open a pool with.
func (pl *pool) wanted() []*disk {
	return slices.DeleteFunc(append(slices.Clone(pl.disks), pl.candidate...), func(d *disk) bool { return d.missing })
}
