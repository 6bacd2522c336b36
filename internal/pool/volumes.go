package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/volume"
)

// VolumeInfo describes a volume of a pool.
type VolumeInfo struct {
	ID      block.VolumeID
	Name    string
	Size    int64 // bytes
	Created time.Time
	// Used is the space in bytes that the volume takes, as of the last fold.
	// After a few seconds without writes that is the present.
	Used int64
	// Run is THN, 0 if the volume shares no blocks.
	Run int
}

func infoOf(v catalogue.Volume) VolumeInfo {
	return VolumeInfo{ID: v.ID, Name: v.Name, Size: v.Size, Created: v.Created, Used: v.Used * block.Size, Run: v.Run}
}

// Volumes returns the pool's volumes in the order of their creation.
func (p *Pool) Volumes() []VolumeInfo {
	var list []VolumeInfo
	for _, v := range p.catalogue.List() {
		list = append(list, infoOf(v))
	}
	return list
}

// Volume returns a volume by name.
func (p *Pool) Volume(name string) (block.Volume, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if v := p.volumes[name]; v != nil {
		return v, nil
	}
	return nil, p.unknown(name)
}

func (p *Pool) unknown(name string) error {
	return fmt.Errorf("volume %q of pool %s: %w", name, p.label.Name, block.ErrNotFound)
}

// refreshVolumes brings the open volumes in line with the catalogue.
func (p *Pool) refreshVolumes() {
	p.mu.Lock()
	defer p.mu.Unlock()
	byID := map[block.VolumeID]*volume.Volume{}
	for _, v := range p.volumes {
		byID[v.Info().ID] = v
	}
	clear(p.volumes)
	print := p.machine.Printer()
	for _, c := range p.catalogue.List() {
		v := byID[c.ID]
		if v == nil {
			v = volume.New(p.store, c.ID, c.Name, c.Size)
		}
		v.Set(c.Name, c.Size)
		if c.Run > 0 {
			v.SetPrint(print)
		} else {
			v.SetPrint(nil)
		}
		p.volumes[c.Name] = v
		delete(byID, c.ID)
	}
	for _, v := range byID {
		v.Close()
		p.sessions.Forget(v.Info().ID)
	}
}

// change commits one change of the catalogue that decide makes of its state.
func (p *Pool) change(ctx context.Context, decide func() (catalogue.Change, error)) error {
	return p.do(ctx, func() error {
		ch, err := decide()
		if err != nil {
			return err
		}
		if err := p.commit([]catalogue.Change{ch}); err != nil {
			return err
		}
		p.refreshVolumes()
		return nil
	})
}

func checkSize(size int64) (int64, error) {
	rounded := (size + block.Size - 1) &^ (block.Size - 1)
	if size <= 0 || rounded > catalogue.MaxSize {
		return 0, fmt.Errorf("size of %d bytes; 1 to %d are possible: %w", size, int64(catalogue.MaxSize), block.ErrInvalid)
	}
	return rounded, nil
}

func (p *Pool) checkNew(name string) error {
	if name == "" || len(name) > catalogue.MaxName {
		return fmt.Errorf("volume name of %d bytes; 1 to %d are possible: %w", len(name), catalogue.MaxName, block.ErrInvalid)
	}
	if _, ok := p.catalogue.ByName(name); ok {
		return fmt.Errorf("volume %q of pool %s: %w", name, p.label.Name, block.ErrExists)
	}
	return nil
}

// CreateVolume makes an empty volume. Its size is rounded up to whole blocks.
func (p *Pool) CreateVolume(ctx context.Context, name string, size int64) (VolumeInfo, error) {
	return p.CreateSharing(ctx, name, size, 0)
}

// CreateSharing is CreateVolume for one that shares blocks from the beginning, as
// SetSharing has it.
func (p *Pool) CreateSharing(ctx context.Context, name string, size int64, run int) (VolumeInfo, error) {
	var made catalogue.Volume
	if err := p.prepareSharing(ctx, name, run); err != nil {
		return VolumeInfo{}, err
	}
	err := p.change(ctx, func() (catalogue.Change, error) {
		rounded, err := checkSize(size)
		if err == nil {
			err = p.checkNew(name)
		}
		if err == nil && len(p.catalogue.All()) >= catalogue.MaxVolumes {
			err = fmt.Errorf("pool %s has %d volumes, no more are possible: %w", p.label.Name, catalogue.MaxVolumes, block.ErrInvalid)
		}
		made = catalogue.Volume{ID: p.catalogue.NextID(), Name: name, Size: rounded, Created: time.Now().UTC(), Run: run}
		return catalogue.Change{Put: &made}, err
	})
	return infoOf(made), err
}

// alter commits a change of an existing volume.
func (p *Pool) alter(ctx context.Context, name string, edit func(*catalogue.Volume) error) error {
	return p.change(ctx, func() (catalogue.Change, error) {
		v, ok := p.catalogue.ByName(name)
		if !ok {
			return catalogue.Change{}, p.unknown(name)
		}
		return catalogue.Change{Put: &v}, edit(&v)
	})
}

// ResizeVolume grows a volume. Clients that connect afterwards see the new
// size.
func (p *Pool) ResizeVolume(ctx context.Context, name string, size int64) error {
	return p.alter(ctx, name, func(v *catalogue.Volume) error {
		rounded, err := checkSize(size)
		if err == nil && rounded < v.Size {
			err = fmt.Errorf("volume %q has %d bytes and can only grow: %w", name, v.Size, block.ErrInvalid)
		}
		v.Size = rounded
		return err
	})
}

// RenameVolume gives a volume another name.
func (p *Pool) RenameVolume(ctx context.Context, old, name string) error {
	return p.alter(ctx, old, func(v *catalogue.Volume) error {
		v.Name = name
		return p.checkNew(name)
	})
}

// DeleteVolume removes a volume at once. Its space comes back over the next
// folds, and whenever a write would fail without it.
func (p *Pool) DeleteVolume(ctx context.Context, name string) error {
	return p.change(ctx, func() (catalogue.Change, error) {
		v, ok := p.catalogue.ByName(name)
		if !ok {
			return catalogue.Change{}, p.unknown(name)
		}
		return catalogue.Change{Delete: v.ID}, nil
	})
}

// AddDevice makes a device, opened under its lock, part of the pool. After an
// error it may be called again with the same device.
func (p *Pool) AddDevice(ctx context.Context, dev hpdi.Device) error {
	return p.do(ctx, func() error { return p.addDevice(dev, cp.ClassDisk, nil) })
}

// AddMemory is AddDevice for LLRRM, low-latency random read memory: from now on blocks
// that many volumes share one by one move there.
func (p *Pool) AddMemory(ctx context.Context, dev hpdi.Device) error {
	return p.do(ctx, func() error { return p.addDevice(dev, cp.ClassMemory, nil) })
}

// addDevice adds a device of a class. prepare, if it is not nil, makes of it what it is to
// be, before the pool names it.
func (p *Pool) addDevice(dev hpdi.Device, class cp.DeviceClass, prepare func() error) error {
	if p.machine.Folding() {
		if err := p.foldAll(); err != nil {
			return err
		}
	}
	l, err := p.labelFor(dev, class)
	if err != nil {
		return err
	}
	if prepare != nil {
		if err := prepare(); err != nil {
			return err
		}
	}
	root := cp.DeviceRoot{ID: l.Device, Blocks: l.Blocks, First: l.Layout.First, Class: class}
	free, err := newSpace(root)
	if err != nil {
		return errors.Join(err, p.flash.refuse(l.Index, class))
	}
	// Wherever this ends, Open leaves out a device that is joining until a
	// superblock names it.
	l.Joining = true
	if err := writeLabel(dev, l); err != nil {
		return errors.Join(err, p.flash.refuse(l.Index, class), free.Close())
	}
	member, err := p.flash.join(dev, l.Index, root)
	if err != nil {
		return errors.Join(err, free.Close())
	}
	reused := l.Index < p.set.Len() // the number of a device that was removed
	if reused {
		p.set.Fill(l.Index, member)
	} else {
		p.set.Add(member)
	}
	err = p.machine.Rewrite(func(sb *cp.Superblock) {
		if reused {
			sb.Devices[l.Index] = root
		} else {
			sb.Devices = append(sb.Devices, root)
		}
	})
	if err != nil {
		if reused {
			_, _ = p.set.Remove(l.Index) // its queues were not used
		} else {
			p.set.RemoveLast()
		}
		// The superblock may be there all the same, and the pool would
		// not open without a device that nobody knows to be part of it.
		return errors.Join(err, p.machine.Rewrite(func(*cp.Superblock) {}), p.flash.refuse(l.Index, class), free.Close())
	}
	if reused {
		p.space.Replace(l.Index, free)
	} else {
		p.space.Attach(free)
	}
	if class == cp.ClassFlash {
		p.flash.setLayer(p.flash.layer, l.Index)
		p.flash.cover()
		p.flash.serve()
	}
	p.tellUnused()
	l.Joining = false
	if writeLabel(dev, l) == nil { // or Open does it
		p.setLabel(l)
	}
	return nil
}

// labelFor returns the label of a device that is about to join the pool. One
// that an earlier AddDevice has labelled without finishing keeps its identity,
// which a superblock may name by now.
func (p *Pool) labelFor(dev hpdi.Device, class cp.DeviceClass) (Label, error) {
	sb := p.machine.Superblock()
	index := len(sb.Devices)
	if index >= maxDevices {
		// The numbers of devices that were removed are used again only now: until
		// then one that turns up is told by its number as well.
		index = slices.IndexFunc(sb.Devices, func(d cp.DeviceRoot) bool { return d.State == cp.DeviceGone })
	}
	if index < 0 {
		return Label{}, fmt.Errorf("pool %s has %d devices, no more are possible: %w", p.label.Name, maxDevices, block.ErrInvalid)
	}
	old, err := ReadLabel(dev)
	of := slices.IndexFunc(sb.Devices, func(d cp.DeviceRoot) bool { return d.ID == old.Device })
	unfinished := err == nil && old.Pool == p.label.Pool && of < 0
	// Nobody may have erased the label of one that was removed.
	removed := err == nil && old.Pool == p.label.Pool && of >= 0 && sb.Devices[of].State == cp.DeviceGone
	l, err := newLabel(CreateOptions{Name: p.label.Name, Identity: p.label.Identity, LogBytes: p.label.LogBytes, Force: unfinished || removed, Host: p.label.Host},
		p.label.Pool, index, dev)
	if unfinished {
		l.Device = old.Device
	}
	if class == cp.ClassFlash {
		l.Blocks, l.Layout = flashBlocks, Layout{First: flashBlocks}
	}
	return l, err
}
