package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/devices"
)

// A pool moves between pairs by its labels. Export closes it and then labels each
// device as exported; Adopt labels each for another guest, under another name if
// need be; Open takes the mark back, after the superblock names its region. So a
// pool whose labels are all marked, and whose superblock names no region, is used
// by nobody, wherever an export, an import or an opening was interrupted.

// Export is Close for a pool that is to be taken elsewhere: its labels say
// afterwards that nobody has it. After an error the pool is closed, and is to be
// opened again where it was.
func (p *Pool) Export(ctx context.Context) error {
	if err := p.drain(ctx); err != nil {
		return err
	}
	err := p.settleWhole(ctx)
	if err == nil {
		err = relabel(p.set, func(l *Label) { l.Exported = true })
	}
	if err != nil {
		err = fmt.Errorf("export pool %s: %w; nothing is lost, it is to be opened again where it was", p.label.Name, err)
	}
	return errors.Join(err, p.free())
}

// relabel changes the labels of all devices.
func relabel(set *devices.Set, change func(*Label)) error {
	for i := range set.Len() {
		if !set.Has(i) {
			continue
		}
		l, err := ReadLabel(set.Device(i))
		if err != nil {
			return err
		}
		old := l
		if change(&l); l == old {
			continue
		}
		if err := writeLabel(set.Device(i), l); err != nil {
			return err
		}
	}
	return nil
}

// AdoptOptions says whose a pool is to become.
type AdoptOptions struct {
	Pool     block.PoolID
	Name     string // that it is to have
	Identity string // of the guest that it is to belong to
	// Epoch, if not 0, is that of the pool when somebody decided that it may be
	// had: if it is another one by now, somebody has opened it since.
	Epoch block.Epoch
}

// Adopt labels devices, all of one pool that nobody has open, for a guest. It may
// be repeated when it was interrupted; until it is through the pool does not open
// for that guest. Devices of other pools are refused before anything is written.
func Adopt(devs []hpdi.Device, o AdoptOptions) error {
	if o.Name == "" || len(o.Name) > maxName || len(o.Identity) > maxName {
		return fmt.Errorf("pool name %q of guest %q: %w", o.Name, o.Identity, block.ErrInvalid)
	}
	index := map[hpdi.Device]int{}
	for _, d := range devs {
		l, err := ReadLabel(d)
		if err != nil {
			return err
		}
		index[d] = l.Index
		if l.Pool != o.Pool {
			return fmt.Errorf("device %s belongs to pool %s (%v), not to %v: %w", d.Info().Name, l.Name, l.Pool, o.Pool, block.ErrInvalid)
		}
		if l.Index > 0 || o.Epoch == 0 || l.Name == o.Name && l.Identity == o.Identity {
			continue // the first label is written first
		}
		if u, err := ReadLastUse(d, l.Pool); err != nil {
			return err
		} else if u.Epoch != o.Epoch {
			return fmt.Errorf("pool %s was opened by somebody since it was found, in epoch %d: it is now in %d: %w", l.Name, o.Epoch, u.Epoch, block.ErrStale)
		}
	}
	sorted := slices.Clone(devs)
	slices.SortStableFunc(sorted, func(x, y hpdi.Device) int { return index[x] - index[y] })
	set := devices.NewSet(sorted)
	err := relabel(set, func(l *Label) { l.Name, l.Identity = o.Name, o.Identity })
	return errors.Join(err, set.ReleaseQueues())
}

// LastUse is what the first device of a pool tells of its last use.
type LastUse struct {
	Devices []block.DeviceID // of the pool, in their order; zero for one that was removed
	Epoch   block.Epoch
	// The region in which the newest writes are, if the pool was not closed, and
	// the boot of the host on which that was.
	RegionID string
	BootID   string
	Settings cp.Settings
	// Flash says that the pool has some. Disks is how many disks it has, and Blocks how many
	// blocks are on all its devices but flash, which is not part of its room.
	Flash  bool
	Disks  int
	Blocks uint64
}

// ReadLastUse reads it from the first device.
func ReadLastUse(first hpdi.Device, pool block.PoolID) (LastUse, error) {
	set := devices.NewSet([]hpdi.Device{first})
	sb, err := cp.ReadSuperblock(set, pool)
	if err = errors.Join(err, set.ReleaseQueues()); err != nil {
		return LastUse{}, err
	}
	u := LastUse{Epoch: sb.Epoch, RegionID: sb.RegionID, BootID: sb.BootID, Settings: sb.Settings}
	for _, d := range sb.Devices {
		if d.State == cp.DeviceGone {
			d.ID = block.DeviceID{}
		} else {
			u.count(d.Class, d.Blocks)
		}
		u.Devices = append(u.Devices, d.ID)
	}
	return u, nil
}

// count adds a device of so many blocks.
func (u *LastUse) count(class cp.DeviceClass, blocks uint64) {
	switch class {
	case cp.ClassFlash:
		u.Flash = true
	case cp.ClassDisk:
		u.Disks++
		fallthrough
	default:
		u.Blocks += blocks
	}
}
