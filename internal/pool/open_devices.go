package pool

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/region"
)

// leaveOut closes the devices that are no part of the pool.
func (op *opener) leaveOut() {
	for _, d := range op.extra {
		_ = d.Close() // nothing was written through it
		if op.o.LeftOut != nil {
			op.o.LeftOut(d)
		}
	}
}

func (op *opener) findDevices() error {
	if op.o.Restart != nil {
		if err := op.recall(); err != nil {
			return err
		}
	}
	devs, labels, err := arrange(op.o.Devices, op.o.Labels)
	if err != nil {
		return err
	}
	op.label = labels[0]
	if op.boot = op.o.BootID; op.boot == "" {
		if op.boot, err = region.BootID(); err != nil {
			return err
		}
	}
	first := devices.NewSet(devs[:1])
	op.sb, err = cp.ReadSuperblock(first, op.label.Pool)
	if err = errors.Join(err, first.ReleaseQueues()); err != nil {
		return fmt.Errorf("open pool %s: %w", op.label.Name, err)
	}
	if op.o.Restart != nil {
		if err := op.agree(); err != nil {
			return err
		}
	}
	op.set, op.labels = devices.NewSet(nil), make([]Label, len(op.sb.Devices))
	for i, root := range op.sb.Devices {
		j := slices.IndexFunc(labels, func(l Label) bool { return l.Index == i })
		if root.State == cp.DeviceGone {
			op.set.AddGap()
			if j < 0 {
				continue
			}
			if err := op.leftover(devs[j], labels[j], root); err != nil {
				return err
			}
			continue
		}
		if j < 0 && root.Class == cp.ClassFlash && planted.Has(planted.FlashNotRequired) {
			op.sb.Devices[i] = cp.DeviceRoot{ID: root.ID, State: cp.DeviceGone}
			op.set.AddGap()
			continue
		}
		if j < 0 {
			return op.missing(i, devs)
		}
		if err := op.member(devs[j], labels[j], root); err != nil {
			return err
		}
		op.set.Add(devs[j])
		op.labels[i] = labels[j]
	}
	for j, l := range labels {
		if l.Index < len(op.sb.Devices) {
			continue
		}
		if !l.Joining {
			return fmt.Errorf("device %s was labelled for pool %s but never became part of it, or a newer superblock was lost: %w",
				devs[j].Info().Name, op.label.Name, block.ErrInvalid)
		}
		op.extra = append(op.extra, devs[j])
	}
	op.proveLater()
	return nil
}

// missing says that a device of the pool was not given.
func (op *opener) missing(i int, given []hpdi.Device) error {
	want := 0
	for _, d := range op.sb.Devices {
		if d.State != cp.DeviceGone {
			want++
		}
	}
	var names []string
	for _, d := range given {
		names = append(names, d.Info().Name)
	}
	return fmt.Errorf("pool %s has %d devices, of which %d were given (%s); number %d is missing: %w",
		op.label.Name, want, len(given), strings.Join(names, ", "), i+1, block.ErrInvalid)
}

// member checks that a device is the one that the superblock has in its place.
func (op *opener) member(dev hpdi.Device, l Label, root cp.DeviceRoot) error {
	info := dev.Info()
	if root.ID != l.Device || root.Blocks < l.Blocks || root.First != l.Layout.First {
		return notMember(info, l)
	}
	if uint64(info.Size)/block.Size < root.Blocks {
		return shrunk(info, root.Blocks)
	}
	return nil
}

func notMember(info hpdi.Info, l Label) error {
	return fmt.Errorf("device %s is not device number %d of pool %s: it was replaced or is an old copy: %w", info.Name, l.Index+1, l.Name, block.ErrInvalid)
}

// leftover takes a device that has the number of one that was removed.
func (op *opener) leftover(dev hpdi.Device, l Label, root cp.DeviceRoot) error {
	switch {
	case l.Device == root.ID:
		op.gone = append(op.gone, dev)
	case l.Joining:
		op.extra = append(op.extra, dev)
	default:
		return notMember(dev.Info(), l)
	}
	return nil
}

// grow takes into use what devices have become larger by, in whole tracks. The
// superblock that says so is the one that the new owner writes before anything else.
func (op *opener) grow() {
	for i := range op.sb.Devices {
		d, dev := &op.sb.Devices[i], op.set.Device(i)
		if d.State != cp.DeviceUsed || d.Class == cp.ClassFlash {
			continue
		}
		n := min(uint64(dev.Info().Size)/block.Size, block.MaxDeviceBlocks) / block.TrackBlocks * block.TrackBlocks
		if n <= d.Blocks {
			continue
		}
		if op.o.Grown != nil {
			op.o.Grown(dev, int64(n-d.Blocks)*block.Size)
		}
		d.Blocks = n
	}
}
