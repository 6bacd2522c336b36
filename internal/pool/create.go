package pool

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// Limits of a pool.
const (
	maxDevices = cp.MaxDevices
	minLog     = 1 << 20
	maxLog     = 64 << 30
	maxName    = 64
	maxHost    = 255

	// minJournal takes the largest consistency point of the smallest log, and
	// the fold after it.
	minJournal = 12 * block.Size
)

// CreateOptions says what pool to make.
type CreateOptions struct {
	Name     string
	Identity string // of the guest that the pool belongs to
	Devices  []hpdi.Device
	LogBytes int64 // payload of the operation log; 256 MiB if 0
	// JournalBytes is the size of the metadata journal, by the sizes of log and
	// devices if 0. A small one makes folds frequent.
	JournalBytes int64
	// FillFlushArea writes the area of the flush log, or the first GiB of it, so
	// that a flush never meets blocks which the file system below has yet to
	// place: it would take 1.7 times as long, or fail because the disk is full.
	FillFlushArea bool
	// Force allows devices that are labelled already. All that is on them is
	// lost.
	Force bool
	// Host is the name of this host, for people.
	Host string
}

// DefaultLogBytes is the payload of an operation log unless one is asked for.
const DefaultLogBytes = 256 << 20

// Validate fills in defaults and checks the options.
func (o *CreateOptions) Validate() error {
	if o.LogBytes == 0 {
		o.LogBytes = DefaultLogBytes
	}
	switch {
	case o.Name == "" || len(o.Name) > maxName || len(o.Identity) > maxName || len(o.Host) > maxHost:
		return fmt.Errorf("pool name %q of guest %q: %w", o.Name, o.Identity, block.ErrInvalid)
	case len(o.Devices) == 0 || len(o.Devices) > maxDevices:
		return fmt.Errorf("a pool of %d devices; 1 to %d are possible: %w", len(o.Devices), maxDevices, block.ErrInvalid)
	case o.LogBytes < minLog || o.LogBytes > maxLog || o.LogBytes%block.Size != 0:
		return fmt.Errorf("operation log of %d bytes; %d to %d in steps of %d are possible: %w", o.LogBytes, minLog, int64(maxLog), block.Size, block.ErrInvalid)
	case o.JournalBytes != 0 && (o.JournalBytes < max(minJournal, o.LogBytes/32) || o.JournalBytes%block.Size != 0):
		return fmt.Errorf("metadata journal of %d bytes; %d and more are possible, in steps of %d: %w", o.JournalBytes, max(minJournal, o.LogBytes/32), block.Size, block.ErrInvalid)
	}
	return nil
}

// layout divides device 0: labels and superblocks, the metadata journal, the
// flush log, data. The journal takes 32 of the largest consistency points, and
// more on large devices, where folds gather more and list more pages, unless journalBytes is
// given. The flush log is twice the operation log and some, so that all that is
// uncommitted always fits.
func layout(index int, blocks uint64, logBytes, journalBytes int64) Layout {
	if index > 0 {
		return Layout{First: block.TrackBlocks}
	}
	track := func(n uint64) uint64 { return (n + block.TrackBlocks - 1) &^ (block.TrackBlocks - 1) }
	logBlocks := uint64(logBytes) / block.Size
	const mib = 1 << 20 / block.Size
	journal := max(logBlocks*40*32/block.Size, blocks/5120)
	journal = track(min(max(journal, 4*mib), 384*mib))
	if journalBytes > 0 {
		journal = uint64(journalBytes) / block.Size
	}
	l := Layout{Journal: block.TrackBlocks, JournalBlocks: journal}
	l.Flush = l.Journal + l.JournalBlocks
	l.FlushBlocks = track(2*logBlocks + mib)
	l.First = track(l.Flush + l.FlushBlocks)
	return l
}

// Create makes an empty pool of devices that are opened for writing, and
// returns its identity. The devices remain open.
func Create(ctx context.Context, o CreateOptions) (block.PoolID, error) {
	if err := o.Validate(); err != nil {
		return block.PoolID{}, err
	}
	var id block.PoolID
	_, _ = rand.Read(id[:]) // documented never to fail
	sb := &cp.Superblock{Pool: id, Epoch: 0, Generation: 1}
	var labels []Label
	for i, dev := range o.Devices {
		if err := ctx.Err(); err != nil {
			return id, err
		}
		l, err := newLabel(o, id, i, dev)
		if err != nil {
			return id, err
		}
		labels = append(labels, l)
		sb.Devices = append(sb.Devices, cp.DeviceRoot{ID: l.Device, Blocks: l.Blocks, First: l.Layout.First})
	}
	sb.Journal = cp.JournalPos{Number: 1}
	// The superblock before the labels: what has labels is a pool. Its slots
	// may hold superblocks of an earlier pool, which the identity tells apart.
	set := devices.NewSet(o.Devices)
	if o.FillFlushArea {
		if err := fillFlushArea(ctx, set, labels[0].Layout); err != nil {
			return id, fmt.Errorf("create pool %s: fill its flush log: %w", o.Name, err)
		}
	}
	if err := cp.WriteSuperblock(set, sb); err != nil {
		return id, fmt.Errorf("create pool %s: %w", o.Name, err)
	}
	for i := len(labels) - 1; i >= 0; i-- {
		if err := writeLabel(o.Devices[i], labels[i]); err != nil {
			return id, fmt.Errorf("create pool %s: %w", o.Name, err)
		}
	}
	return id, set.ReleaseQueues()
}

const (
	// fillMost is how many blocks of the flush log are filled: a larger one fills
	// itself as it is used.
	fillMost = 1 << 30 / block.Size
	// fillAtOnce is how many tracks are written together.
	fillAtOnce = 16
)

// fillFlushArea writes zeroes to the flush log.
func fillFlushArea(ctx context.Context, set *devices.Set, l Layout) error {
	buf, err := hpdi.AllocPrivate(block.TrackBytes)
	if err != nil {
		return err
	}
	defer func() { _ = hpdi.Free(buf) }()
	var ios []*devices.IO
	n := min(l.FlushBlocks, fillMost)
	for b := uint64(0); b < n; b += block.TrackBlocks {
		if err := ctx.Err(); err != nil {
			return err
		}
		k := min(block.TrackBlocks, n-b)
		ios = append(ios, &devices.IO{Op: hpdi.OpWrite, At: block.At(0, l.Flush+b), Vec: [][]byte{buf[:k*block.Size]}})
		if len(ios) == fillAtOnce || b+k == n {
			if err := set.Do(ios); err != nil {
				return err
			}
			ios = ios[:0]
		}
	}
	return set.Sync()
}

func newLabel(o CreateOptions, id block.PoolID, index int, dev hpdi.Device) (Label, error) {
	info := dev.Info()
	if !o.Force {
		switch old, err := ReadLabel(dev); {
		case err == nil:
			return Label{}, fmt.Errorf("device %s belongs to pool %s (%v) already: %w", info.Name, old.Name, old.Pool, block.ErrExists)
		case !errors.Is(err, ondisk.ErrMagic):
			return Label{}, fmt.Errorf("device %s may belong to a pool: %w", info.Name, err)
		}
	}
	l := Label{Pool: id, Index: index, Name: o.Name, Identity: o.Identity, Blocks: uint64(info.Size) / block.Size, LogBytes: o.LogBytes, Host: o.Host}
	_, _ = rand.Read(l.Device[:])
	l.Layout = layout(index, l.Blocks, o.LogBytes, o.JournalBytes)
	if need := l.Layout.First + 4*block.TrackBlocks; l.Blocks < need {
		return Label{}, fmt.Errorf("device %s has %d bytes; with an operation log of %d it needs at least %d: %w",
			info.Name, info.Size, o.LogBytes, need*block.Size, block.ErrInvalid)
	}
	if l.Blocks > block.MaxDeviceBlocks {
		return Label{}, fmt.Errorf("device %s has more than %d blocks: %w", info.Name, uint64(block.MaxDeviceBlocks), block.ErrInvalid)
	}
	return l, nil
}
