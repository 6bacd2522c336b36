package pool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

const labelVersion = 1

// The header's generation tells the label of a device that joins the pool from
// that of a member.
const (
	generationJoining = 0
	generationMember  = 1
)

// labelBlocks are the blocks of a device that hold the copies of its label.
var labelBlocks = [2]uint64{0, 128}

// Label says what a device is. What changes is in the superblock.
type Label struct {
	Pool   block.PoolID
	Device block.DeviceID
	// Joining says that the device was to become part of the pool, and is it
	// only if the superblock names it. Other labels are of members.
	Joining  bool
	Index    int    // of the device in the pool
	Name     string // of the pool
	Identity string // of the guest that the pool belongs to
	Blocks   uint64 // of the device when it was labelled
	LogBytes int64  // payload of the pool's operation log
	Layout   Layout
	// Host is the host that had the pool last, as far as is known; for people.
	Host string
	// Exported says that the pool was closed to be taken elsewhere: nobody has
	// it, unless its superblock names a region.
	Exported bool
}

// Layout says where the parts of a device are, in blocks. Only device 0 has a
// journal and a flush log.
type Layout struct {
	Journal, JournalBlocks uint64
	Flush, FlushBlocks     uint64
	First                  uint64 // first block for data and metadata pages
}

func (l Label) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, ondisk.HeaderSize, block.Size)
	b = append(b, l.Device[:]...)
	b = le.AppendUint32(b, uint32(l.Index))
	b = le.AppendUint64(b, l.Blocks)
	b = le.AppendUint64(b, uint64(l.LogBytes))
	for _, v := range []uint64{l.Layout.Journal, l.Layout.JournalBlocks, l.Layout.Flush, l.Layout.FlushBlocks, l.Layout.First} {
		b = le.AppendUint64(b, v)
	}
	b = ondisk.AppendString(b, l.Name)
	b = ondisk.AppendString(b, l.Identity)
	if l.Host != "" || l.Exported {
		b = ondisk.AppendString(b, l.Host)
		b = le.AppendUint16(b, flags(l.Exported))
	}
	n := len(b)
	b = b[:block.Size]
	generation := uint64(generationMember)
	if l.Joining {
		generation = generationJoining
	}
	ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindLabel, Version: labelVersion, Length: n, Pool: l.Pool, Generation: generation})
	return b
}

// stored returns the label as it is on a device, without the zeroes behind it.
func (l Label) stored() []byte {
	b := l.encode()
	return b[:ondisk.Length(b)]
}

// flagExported is the flag of a label that stands for Exported.
const flagExported = 1

func flags(exported bool) uint16 {
	if exported {
		return flagExported
	}
	return 0
}

func decodeLabel(b []byte) (Label, error) {
	h, err := ondisk.Open(b, ondisk.KindLabel, labelVersion)
	if err != nil {
		return Label{}, err
	}
	d := ondisk.NewDecoder(b[ondisk.HeaderSize:h.Length])
	l := Label{Pool: h.Pool, Joining: h.Generation == generationJoining}
	copy(l.Device[:], d.Bytes(len(l.Device)))
	l.Index, l.Blocks, l.LogBytes = int(d.U32()), d.U64(), int64(d.U64())
	l.Layout = Layout{Journal: d.U64(), JournalBlocks: d.U64(), Flush: d.U64(), FlushBlocks: d.U64(), First: d.U64()}
	l.Name, l.Identity = d.String(), d.String()
	if d.Len() > 0 { // labels of earlier releases end here
		l.Host, l.Exported = d.String(), d.U16()&flagExported != 0
	}
	if d.Err() == nil {
		if why := l.wrong(); why != "" {
			d.Fail("%s", why)
		}
	}
	if err := d.Err(); err != nil {
		return Label{}, fmt.Errorf("label: %w", err)
	}
	return l, nil
}

// wrong says what makes the label impossible. Nothing of it is believed
// before, for sizes are computed from it.
func (l Label) wrong() string {
	y := l.Layout
	switch {
	case l.Index >= maxDevices || l.Blocks > block.MaxDeviceBlocks:
		return fmt.Sprintf("device %d of %d blocks", l.Index, l.Blocks)
	case y.First < block.TrackBlocks || y.First > l.Blocks:
		return fmt.Sprintf("data begin at block %d of %d", y.First, l.Blocks)
	case l.Index == 0 && (y.Journal < block.TrackBlocks || y.JournalBlocks == 0 || y.JournalBlocks > y.First ||
		y.Flush != y.Journal+y.JournalBlocks || y.FlushBlocks == 0 || y.FlushBlocks > y.First || y.Flush+y.FlushBlocks > y.First):
		return fmt.Sprintf("journal and flush log do not fit: %+v", y)
	case l.LogBytes < minLog || l.LogBytes > maxLog:
		return fmt.Sprintf("operation log of %d bytes", l.LogBytes)
	}
	return ""
}

// ReadLabel returns the label of a device. ondisk.ErrMagic says that it has
// none.
func ReadLabel(dev hpdi.Device) (Label, error) {
	name := dev.Info().Name
	if c, ok := dev.(hpdi.Copies); ok {
		c.Verified(0) // everything in a pool is, or is settled when it is opened
	}
	set := devices.NewSet([]hpdi.Device{dev})
	defer func() { _ = set.ReleaseQueues() }() // nothing is in flight
	buf, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		return Label{}, err
	}
	defer func() { _ = hpdi.Free(buf) }()
	var errs []error
	for _, b := range labelBlocks {
		err := set.ReadBest(block.At(0, b), buf, func(buf []byte) uint64 {
			h, err := decodeLabel(buf)
			switch {
			case errors.Is(err, ondisk.ErrVersion):
				return math.MaxUint64
			case err != nil:
				return 0
			case h.Joining:
				return 1
			}
			return 2
		})
		if err == nil {
			var l Label
			if l, err = decodeLabel(buf); err == nil {
				return l, nil
			}
		}
		errs = append(errs, fmt.Errorf("block %d: %w", b, err))
	}
	return Label{}, fmt.Errorf("device %s has no valid label: %w", name, errors.Join(errs...))
}

// writeLabel writes the copies of a label.
func writeLabel(dev hpdi.Device, l Label) error {
	if err := writeLabelBlocks(dev, l.encode()); err != nil {
		return fmt.Errorf("label device %s: %w", dev.Info().Name, err)
	}
	return nil
}

// wipeLabel makes a device one without a label.
func wipeLabel(dev hpdi.Device) error { return writeLabelBlocks(dev, nil) }

// writeLabelBlocks writes the blocks of a label one after the other, so that
// wherever it ends one of them is whole or gone: the device may be a member.
func writeLabelBlocks(dev hpdi.Device, content []byte) error {
	q, err := dev.NewQueue(1)
	if err != nil {
		return err
	}
	buf, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		return errors.Join(err, q.Close())
	}
	defer func() { _ = hpdi.Free(buf) }()
	copy(buf, content)
	for _, b := range labelBlocks {
		err = hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Offset: int64(b) * block.Size, Vec: [][]byte{buf}})
		if err == nil {
			err = hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush})
		}
		if err != nil {
			break
		}
	}
	return errors.Join(err, q.Close())
}

// arrange checks that devs are of one pool, and among them its first, and returns them
// with their labels in the pool's order. The superblock tells whether they are all. read
// are their labels if somebody has read them already.
func arrange(devs []hpdi.Device, read []Label) ([]hpdi.Device, []Label, error) {
	if len(devs) == 0 {
		return nil, nil, fmt.Errorf("a pool needs at least one device: %w", block.ErrInvalid)
	}
	type labelled struct {
		dev hpdi.Device
		Label
	}
	var all []labelled
	for i, d := range devs {
		name := d.Info().Name
		var l Label
		if read != nil {
			l = read[i]
		} else {
			var err error
			if l, err = ReadLabel(d); err != nil {
				return nil, nil, err
			}
		}
		all = append(all, labelled{d, l})
		if first := all[0].Label; l.Pool != first.Pool {
			return nil, nil, fmt.Errorf("device %s belongs to pool %s (%v), not to %s (%v): %w",
				name, l.Name, l.Pool, first.Name, first.Pool, block.ErrInvalid)
		}
		if uint64(d.Info().Size)/block.Size < l.Blocks {
			return nil, nil, shrunk(d.Info(), l.Blocks)
		}
	}
	slices.SortStableFunc(all, func(a, b labelled) int { return a.Index - b.Index })
	var labels []Label
	ordered := make([]hpdi.Device, 0, len(devs))
	for i, l := range all {
		if i > 0 && l.Index == all[i-1].Index {
			return nil, nil, fmt.Errorf("devices %s and %s both are number %d of pool %s; one must be a copy: %w",
				all[i-1].dev.Info().Name, l.dev.Info().Name, l.Index+1, l.Name, block.ErrInvalid)
		}
		ordered, labels = append(ordered, l.dev), append(labels, l.Label)
	}
	if l := all[0]; l.Index > 0 {
		last := all[len(all)-1]
		return nil, nil, fmt.Errorf("device %s is number %d of pool %s, whose first device is missing: %w", last.dev.Info().Name, last.Index+1, l.Name, block.ErrInvalid)
	}
	return ordered, labels, nil
}

// shrunk says that a device is smaller than it was.
func shrunk(info hpdi.Info, blocks uint64) error {
	return fmt.Errorf("device %s has shrunk from %d to %d blocks; make it as large as it was: %w", info.Name, blocks, info.Size/block.Size, block.ErrInvalid)
}
