package cp

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/oplog"
)

// superblockVersion is the newest version of superblocks; docs/format/superblock.md
// describes all.
const superblockVersion = 6

// MaxDevices is the number of devices that a pool can have.
const MaxDevices = 64

// Superblock is the root of a pool: where everything else is found.
type Superblock struct {
	Pool       block.PoolID
	Epoch      block.Epoch
	Generation uint64 // of superblocks; decides the slot

	Fold      uint64 // number of the last fold
	CP        block.CP
	Log       block.Seq     // committed by CP
	Flush     oplog.DiskPos // as of CP
	Journal   JournalPos    // replay starts here
	Devices   []DeviceRoot
	Catalogue block.Pointer // root of the catalogue's tree
	CatBytes  uint32        // length of the catalogue's encoding
	Used      uint64        // blocks in use according to the count trees
	Twins     bool          // pages may have twins; once it is so it stays so
	// Secret is that of the pool's fingerprints, 0 as long as no volume shares blocks,
	// and Prints the page that refers to the trees of fingerprints, see prints.go.
	Secret   dedup.Secret
	Prints   block.Pointer
	Settings Settings

	// The region that holds the pool's log, and the boot of the host in which
	// it was made; empty when the log was committed and the region removed.
	RegionID string
	BootID   string

	// Last says that no newer superblock was ever written: the slot where it would be holds
	// the one before, in both places. It is not stored, but found out by who reads.
	Last bool
}

// Settings are those of a pool that are kept with it.
type Settings struct {
	// IndexBytes is the memory of the index of fingerprints; 0 leaves it to the guest.
	IndexBytes uint64
	// Threshold is the number of places of a block on disks with which it moves to
	// low-latency memory when it is received once more; 0 is DefaultThreshold.
	Threshold uint8
}

// MinCopies returns the Threshold that is in force.
func (s Settings) MinCopies() int {
	if s.Threshold > 0 {
		return int(s.Threshold)
	}
	return DefaultThreshold
}

// DefaultThreshold is the Threshold where nobody has said what it shall be. On images of
// Debian systems all but 1 to 2 % of what could be shared is, and memory has 1.4 to 1.7 % of
// the blocks that are stored; see docs/performance.md.
const DefaultThreshold = 2

// MaxThreshold is the largest Threshold. The index finds few more places of a block.
const MaxThreshold = 8

// DeviceRoot describes a device of the pool in its superblock.
type DeviceRoot struct {
	ID     block.DeviceID
	Blocks uint64
	First  uint64        // blocks before it are never allocated
	Counts block.Pointer // root of the tree of reference counts
	State  DeviceState
	Class  DeviceClass
	// Was is, of a device that leaves, how many blocks were in use on it when that
	// began.
	Was uint64
}

// DeviceState says what a pool does with a device.
type DeviceState uint8

// The states of a device.
const (
	DeviceUsed    DeviceState = iota // what is allocated may lie on it
	DeviceLeaving                    // nothing new comes onto it, and what it has goes elsewhere
	DeviceGone                       // it was removed; its number is free for another
)

// String returns a word for people, none for a device in use.
func (s DeviceState) String() string {
	switch s {
	case DeviceUsed:
		return ""
	case DeviceLeaving:
		return "leaving"
	case DeviceGone:
		return "gone"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// DeviceClass says what a device is used for.
type DeviceClass uint8

// The classes of devices.
const (
	ClassDisk   DeviceClass = iota // data and metadata
	ClassMemory                    // LLRRM, low-latency random read memory: single blocks that are shared
	ClassFlash                     // data sets of the disks, see package flashmap
)

// String returns the word that people use for the class.
func (c DeviceClass) String() string {
	switch c {
	case ClassDisk:
		return "disk"
	case ClassMemory:
		return "llrrm"
	case ClassFlash:
		return "flash"
	}
	return fmt.Sprintf("class %d", uint8(c))
}

// Leaving returns the index of the device that is leaving the pool; ok is false when
// none is.
func (s *Superblock) Leaving() (dev int, ok bool) {
	dev = slices.IndexFunc(s.Devices, func(d DeviceRoot) bool { return d.State == DeviceLeaving })
	return dev, dev >= 0
}

// Flash returns the index of the flash device; ok is false when there is none.
func (s *Superblock) Flash() (dev int, ok bool) {
	dev = slices.IndexFunc(s.Devices, DeviceRoot.isFlash)
	return dev, dev >= 0
}

// Shares reports whether volumes of the pool may share blocks, or have done so.
func (s *Superblock) Shares() bool { return s.Secret != 0 }

// JournalPos is a place between two journal records.
type JournalPos struct {
	Offset uint64 // virtual: it only rises; modulo the journal's size it is the place
	Number uint64 // of the next record
	Prev   uint32 // checksum of the record before
}

// classShift is where in the byte of a device's state its class begins, which programs
// that know no classes take for a state that is impossible.
const classShift = 4

// Sizes of an encoded device, in version 1 and now.
const (
	deviceRootSize1 = 16 + 8 + 8 + block.PointerSize
	deviceRootSize  = deviceRootSize1 + 8
)

// version returns the version that s is written in: 1 as long as no device has ever
// left the pool and no page has a twin, so that the programs that know no other can open
// it, 2 as long as no page has a twin, 3 as long as no volume has shared blocks, 4 as
// long as no device is of another class than disk and nothing was set, and 5 as long as
// there is no flash: who does not know that would read what is there no more.
func (s *Superblock) version() uint16 {
	switch {
	case slices.ContainsFunc(s.Devices, DeviceRoot.isFlash):
		return superblockVersion
	case s.Settings != Settings{} || slices.ContainsFunc(s.Devices, func(d DeviceRoot) bool { return d.Class != ClassDisk }):
		return 5
	case s.Shares():
		return 4
	case s.Twins:
		return 3
	}
	for _, d := range s.Devices {
		if d.State != DeviceUsed {
			return 2
		}
	}
	return 1
}

// Encode returns the sealed superblock: one block.
func (s *Superblock) Encode() []byte {
	le, version := binary.LittleEndian, s.version()
	b := make([]byte, ondisk.HeaderSize, block.Size)
	b = le.AppendUint64(b, s.Fold)
	b = le.AppendUint64(b, uint64(s.CP))
	b = le.AppendUint64(b, uint64(s.Log))
	b = appendDiskPos(b, s.Flush)
	b = le.AppendUint64(b, s.Journal.Offset)
	b = le.AppendUint64(b, s.Journal.Number)
	b = le.AppendUint32(b, s.Journal.Prev)
	b = ondisk.AppendPointer(b, s.Catalogue)
	b = le.AppendUint32(b, s.CatBytes)
	b = le.AppendUint64(b, s.Used)
	b = ondisk.AppendString(b, s.RegionID)
	b = ondisk.AppendString(b, s.BootID)
	b = le.AppendUint32(b, uint32(len(s.Devices)))
	for _, d := range s.Devices {
		b = append(b, d.ID[:]...)
		b = le.AppendUint64(b, d.Blocks)
		b = le.AppendUint64(b, d.First)
		b = ondisk.AppendPointer(b, d.Counts)
		if version > 1 {
			b = le.AppendUint64(b, d.Was<<8|uint64(d.Class)<<classShift|uint64(d.State))
		}
	}
	if version > 3 {
		b = append(le.AppendUint64(b, uint64(s.Secret)), byteOf(s.Twins))
		b = ondisk.AppendPointer(b, s.Prints)
	}
	if version > 4 {
		b = append(le.AppendUint64(b, s.Settings.IndexBytes), s.Settings.Threshold)
	}
	n := len(b)
	b = b[:block.Size]
	ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindSuperblock, Version: version, Length: n, Pool: s.Pool,
		Epoch: s.Epoch, Generation: s.Generation})
	return b
}

func byteOf(on bool) byte {
	if on {
		return 1
	}
	return 0
}

// DecodeSuperblock checks and decodes a superblock.
func DecodeSuperblock(b []byte) (*Superblock, error) {
	h, err := ondisk.Open(b, ondisk.KindSuperblock, superblockVersion)
	if err != nil {
		return nil, err
	}
	d := ondisk.NewDecoder(b[ondisk.HeaderSize:h.Length])
	s := &Superblock{
		Pool: h.Pool, Epoch: h.Epoch, Generation: h.Generation,
		Fold: d.U64(), CP: block.CP(d.U64()), Log: block.Seq(d.U64()),
		Flush:     decodeDiskPos(d),
		Journal:   JournalPos{Offset: d.U64(), Number: d.U64(), Prev: d.U32()},
		Catalogue: d.Pointer(), CatBytes: d.U32(), Used: d.U64(), RegionID: d.String(), BootID: d.String(),
		Twins: h.Version > 2,
	}
	size := deviceRootSize
	if h.Version == 1 {
		size = deviceRootSize1
	}
	n := d.Count(size)
	if n == 0 || n > MaxDevices {
		d.Fail("%d devices", n)
	}
	for i := range n {
		dev := DeviceRoot{}
		copy(dev.ID[:], d.Bytes(16))
		dev.Blocks, dev.First, dev.Counts = d.U64(), d.U64(), d.Pointer()
		if h.Version > 1 {
			v := d.U64()
			dev.State, dev.Was = DeviceState(v&(1<<classShift-1)), v>>8
			dev.Class = DeviceClass(v >> classShift & (1<<(8-classShift) - 1))
		}
		if dev.Blocks > block.MaxDeviceBlocks || dev.First > dev.Blocks {
			d.Fail("device of %d blocks that begins at %d", dev.Blocks, dev.First)
		}
		if why := dev.wrong(i); why != "" {
			d.Fail("device %d %s", i, why)
		}
		if dev.isFlash() && slices.ContainsFunc(s.Devices, DeviceRoot.isFlash) {
			d.Fail("device %d is a second flash device", i)
		}
		s.Devices = append(s.Devices, dev)
	}
	if h.Version > 3 {
		s.Secret = dedup.Secret(d.U64())
		twins := d.Bytes(1)
		s.Twins = len(twins) == 1 && twins[0] != 0
		s.Prints = d.Pointer()
		if !s.Shares() && h.Version == 4 {
			d.Fail("no secret of fingerprints")
		}
	}
	if h.Version > 4 {
		s.Settings.IndexBytes = d.U64()
		if b := d.Bytes(1); len(b) == 1 {
			s.Settings.Threshold = b[0]
		}
		if s.Settings.Threshold > MaxThreshold {
			d.Fail("a threshold of %d", s.Settings.Threshold)
		}
	}
	if s.CatBytes > maxRecordBytes || s.CP > block.MaxCP {
		d.Fail("catalogue of %d bytes at consistency point %d", s.CatBytes, s.CP)
	}
	if err := d.Err(); err != nil {
		return nil, fmt.Errorf("superblock of generation %d: %w", h.Generation, err)
	}
	return s, nil
}

// isFlash reports whether a device is the pool's flash.
func (d DeviceRoot) isFlash() bool { return d.Class == ClassFlash && d.State != DeviceGone }

// wrong says what makes the state of device i impossible.
func (d *DeviceRoot) wrong(i int) string {
	switch {
	case d.State > DeviceGone:
		return fmt.Sprintf("is in state %d", d.State)
	case d.Class > ClassFlash:
		return fmt.Sprintf("is of class %d", d.Class)
	case d.Class != ClassDisk && i == 0:
		return fmt.Sprintf("is of class %v, and holds the superblock", d.Class)
	case d.State != DeviceUsed && i == 0:
		return "leaves, and holds the superblock"
	case d.State == DeviceGone && (d.Blocks != 0 || !d.Counts.IsHole()):
		return "is gone and has blocks"
	case d.isFlash() && (d.Blocks != d.First || !d.Counts.IsHole()):
		return "is flash, and has blocks of its own"
	case d.State != DeviceLeaving && d.Was != 0:
		return "does not leave, and had blocks in use when it began to"
	}
	return ""
}
