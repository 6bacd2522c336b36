package cp

import (
	"encoding/binary"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/space"
)

// Format versions; docs/format/journal.md and superblock.md describe them.
const (
	journalVersion    = 1
	superblockVersion = 1
)

// recordType says what a journal record carries.
type recordType uint32

const (
	typeCommit recordType = 1
	typeFold   recordType = 2
)

// record is one decoded journal record.
type record struct {
	Number uint64 // of records, rising by one; the header's generation
	Epoch  block.Epoch
	Prev   uint32 // checksum of the record before
	Type   recordType
	Commit commit
	Fold   foldPages
}

// commit is what a consistency point changed.
type commit struct {
	CP        block.CP
	Log       block.Seq     // everything up to it is committed
	Flush     oplog.DiskPos // where the flush log has to be scanned from
	Holes     []volumeRange
	Runs      []mapRun
	Catalogue []catalogue.Change
}

// volumeRange is a range of a volume that became a hole. Holes are applied
// before runs.
type volumeRange struct {
	Volume block.VolumeID
	block.Range
}

// mapRun maps consecutive logical blocks to consecutive physical ones, or to
// holes when At is block.None.
type mapRun struct {
	Volume block.VolumeID
	LBA    block.Logical
	At     block.Physical
	Sums   []uint32 // one a block; its length is the run's
}

// foldPages lists the metadata blocks that fold number Fold took and freed.
type foldPages struct {
	Fold  uint64
	Taken []space.Run
	Freed []space.Run
}

const (
	recordFixed    = ondisk.HeaderSize + 8
	rangeSize      = 4 + 8 + 8
	runFixed       = 4 + 8 + 8 + 4
	spaceRunSize   = 8 + 4
	changePut      = 1
	changeDelete   = 2
	maxRecordBytes = 256 << 20
)

// encode returns the record, padded to whole blocks, sealed.
func (r *record) encode(pool block.PoolID) []byte {
	le := binary.LittleEndian
	b := make([]byte, recordFixed, roundUp(recordFixed+r.size()))
	le.PutUint32(b[ondisk.HeaderSize:], r.Prev)
	le.PutUint32(b[ondisk.HeaderSize+4:], uint32(r.Type))
	if r.Type == typeCommit {
		b = r.Commit.append(b)
	} else {
		b = le.AppendUint64(b, r.Fold.Fold)
		b = appendRuns(b, r.Fold.Taken)
		b = appendRuns(b, r.Fold.Freed)
	}
	n := len(b)
	b = b[:roundUp(n)]
	ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindJournal, Version: journalVersion, Length: n, Pool: pool,
		Epoch: r.Epoch, Generation: r.Number})
	return b
}

// size returns the length of what the record carries, encoded.
func (r *record) size() int {
	if r.Type == typeCommit {
		return r.Commit.size()
	}
	return 8 + 4 + 4 + (len(r.Fold.Taken)+len(r.Fold.Freed))*spaceRunSize
}

// size returns the length of what append appends.
func (c *commit) size() int {
	n := 8 + 8 + oplog.DiskPosSize + 4 + len(c.Holes)*rangeSize + 4 + len(c.Runs)*runFixed + 4
	for i := range c.Runs {
		n += 4 * len(c.Runs[i].Sums)
	}
	for _, ch := range c.Catalogue {
		if n++; ch.Put != nil {
			n += len(ch.Put.Append(nil))
		} else {
			n += 4
		}
	}
	return n
}

func (c *commit) append(b []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint64(b, uint64(c.CP))
	b = le.AppendUint64(b, uint64(c.Log))
	b = appendDiskPos(b, c.Flush)
	b = le.AppendUint32(b, uint32(len(c.Holes)))
	for _, h := range c.Holes {
		b = le.AppendUint32(b, uint32(h.Volume))
		b = le.AppendUint64(b, uint64(h.Start))
		b = le.AppendUint64(b, uint64(h.End))
	}
	b = le.AppendUint32(b, uint32(len(c.Runs)))
	for _, r := range c.Runs {
		b = le.AppendUint32(b, uint32(r.Volume))
		b = le.AppendUint64(b, uint64(r.LBA))
		b = le.AppendUint64(b, uint64(r.At))
		b = le.AppendUint32(b, uint32(len(r.Sums)))
		for _, s := range r.Sums {
			b = le.AppendUint32(b, s)
		}
	}
	b = le.AppendUint32(b, uint32(len(c.Catalogue)))
	for _, ch := range c.Catalogue {
		if ch.Put != nil {
			b = ch.Put.Append(append(b, changePut))
		} else {
			b = le.AppendUint32(append(b, changeDelete), uint32(ch.Delete))
		}
	}
	return b
}

func appendRuns(b []byte, runs []space.Run) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(b, uint32(len(runs)))
	for _, r := range runs {
		b = le.AppendUint64(b, uint64(r.At))
		b = le.AppendUint32(b, uint32(r.N))
	}
	return b
}

// decodeRecord checks and decodes a record of the given pool. It returns the
// number of bytes that the record takes on the device as well.
func decodeRecord(b []byte, pool block.PoolID) (*record, int, error) {
	h, err := ondisk.Open(b, ondisk.KindJournal, journalVersion)
	if err != nil {
		return nil, 0, err
	}
	if h.Pool != pool {
		return nil, 0, fmt.Errorf("record of pool %v: %w", h.Pool, ondisk.ErrMagic)
	}
	d := ondisk.NewDecoder(b[ondisk.HeaderSize:h.Length])
	r := &record{Number: h.Generation, Epoch: h.Epoch, Prev: d.U32(), Type: recordType(d.U32())}
	switch r.Type {
	case typeCommit:
		r.Commit.decode(d)
	case typeFold:
		r.Fold = foldPages{Fold: d.U64(), Taken: decodeRuns(d), Freed: decodeRuns(d)}
	default:
		d.Fail("record type %d", r.Type)
	}
	if err := d.Err(); err != nil {
		return nil, 0, fmt.Errorf("journal record %d: %w", r.Number, err)
	}
	return r, roundUp(h.Length), nil
}

func (c *commit) decode(d *ondisk.Decoder) {
	c.CP, c.Log = block.CP(d.U64()), block.Seq(d.U64())
	c.Flush = decodeDiskPos(d)
	for range d.Count(rangeSize) {
		h := volumeRange{block.VolumeID(d.U32()), block.Range{Start: block.Logical(d.U64()), End: block.Logical(d.U64())}}
		if h.Start >= h.End || h.End > catalogue.MaxSize/block.Size {
			d.Fail("hole [%d, %d) of volume %d", h.Start, h.End, h.Volume)
		}
		c.Holes = append(c.Holes, h)
	}
	runs := d.Count(runFixed)
	c.Runs = make([]mapRun, 0, runs)
	sums := make([]uint32, 0, d.Len()/4) // of all runs
	for range runs {
		r := mapRun{Volume: block.VolumeID(d.U32()), LBA: block.Logical(d.U64()), At: block.Physical(d.U64())}
		n := d.Count(4)
		if n == 0 || r.LBA >= catalogue.MaxSize/block.Size || r.LBA+block.Logical(n) > catalogue.MaxSize/block.Size || r.At>>56 != 0 {
			d.Fail("mapping of %d blocks at %d of volume %d to %v", n, r.LBA, r.Volume, r.At)
			return
		}
		first := len(sums)
		for range n {
			sums = append(sums, d.U32())
		}
		r.Sums = sums[first:len(sums):len(sums)]
		c.Runs = append(c.Runs, r)
	}
	for range d.Count(5) {
		switch kind := d.Bytes(1); {
		case kind == nil:
		case kind[0] == changePut:
			v := catalogue.DecodeVolume(d)
			c.Catalogue = append(c.Catalogue, catalogue.Change{Put: &v})
		case kind[0] == changeDelete:
			c.Catalogue = append(c.Catalogue, catalogue.Change{Delete: block.VolumeID(d.U32())})
		default:
			d.Fail("catalogue change of kind %d", kind[0])
		}
	}
}

func decodeRuns(d *ondisk.Decoder) []space.Run {
	var runs []space.Run
	for range d.Count(spaceRunSize) {
		r := space.Run{At: block.Physical(d.U64()), N: int(d.U32())}
		if r.At>>56 != 0 || r.N < 1 || r.N > block.TrackBlocks {
			d.Fail("run of %d blocks at %v", r.N, r.At)
		}
		runs = append(runs, r)
	}
	return runs
}

func appendDiskPos(b []byte, pos oplog.DiskPos) []byte {
	var enc [oplog.DiskPosSize]byte
	pos.Encode(enc[:])
	return append(b, enc[:]...)
}

func decodeDiskPos(d *ondisk.Decoder) oplog.DiskPos {
	b := d.Bytes(oplog.DiskPosSize)
	if b == nil {
		return oplog.DiskPos{}
	}
	pos, err := oplog.DecodeDiskPos(b)
	if err != nil {
		d.Fail("position in the flush log: %v", err)
	}
	return pos
}

func roundUp(n int) int { return (n + block.Size - 1) &^ (block.Size - 1) }

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

	// The region that holds the pool's log, and the boot of the host in which
	// it was made; empty when the log was committed and the region removed.
	RegionID string
	BootID   string
}

// DeviceRoot describes a device of the pool in its superblock.
type DeviceRoot struct {
	ID     block.DeviceID
	Blocks uint64
	First  uint64        // blocks before it are never allocated
	Counts block.Pointer // root of the tree of reference counts
}

// JournalPos is a place between two journal records.
type JournalPos struct {
	Offset uint64 // virtual: it only rises; modulo the journal's size it is the place
	Number uint64 // of the next record
	Prev   uint32 // checksum of the record before
}

const deviceRootSize = 16 + 8 + 8 + block.PointerSize

// Encode returns the sealed superblock: one block.
func (s *Superblock) Encode() []byte {
	le := binary.LittleEndian
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
	}
	n := len(b)
	b = b[:block.Size]
	ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindSuperblock, Version: superblockVersion, Length: n, Pool: s.Pool,
		Epoch: s.Epoch, Generation: s.Generation})
	return b
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
	}
	n := d.Count(deviceRootSize)
	if n == 0 || n > MaxDevices {
		d.Fail("%d devices", n)
	}
	for range n {
		dev := DeviceRoot{}
		copy(dev.ID[:], d.Bytes(16))
		dev.Blocks, dev.First, dev.Counts = d.U64(), d.U64(), d.Pointer()
		if dev.Blocks > block.MaxDeviceBlocks || dev.First > dev.Blocks {
			d.Fail("device of %d blocks that begins at %d", dev.Blocks, dev.First)
		}
		s.Devices = append(s.Devices, dev)
	}
	if s.CatBytes > maxRecordBytes || s.CP > block.MaxCP {
		d.Fail("catalogue of %d bytes at consistency point %d", s.CatBytes, s.CP)
	}
	if err := d.Err(); err != nil {
		return nil, fmt.Errorf("superblock of generation %d: %w", h.Generation, err)
	}
	return s, nil
}

// recordLength returns the length on the device that the header in b claims,
// so that a whole record can be read and then be checked.
func recordLength(b []byte) (int, bool) {
	if string(b[:8]) != string(ondisk.KindJournal) {
		return 0, false
	}
	n := binary.LittleEndian.Uint32(b[12:])
	return roundUp(int(n)), n >= recordFixed && n <= maxRecordBytes
}
