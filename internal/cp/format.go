package cp

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/space"
)

// journalVersion is the version of journal records; docs/format/journal.md describes it.
const journalVersion = 2

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

	sums []uint32 // what Commit.Runs are parts of, when it was decoded
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

// mapRun maps consecutive logical blocks to consecutive physical ones.
type mapRun struct {
	Volume block.VolumeID
	LBA    block.Logical
	At     block.Physical
	Sums   []uint32 // one a block; its length is the run's
	Shared bool     // the blocks were there before
	Prints []byte   // their fingerprints, printSize bytes each, or none
}

// printSize is the size in bytes of an encoded fingerprint.
const printSize = 8

// What else an encoded run's number of blocks tells.
const (
	runShared = 1 << 31
	runPrints = 1 << 30
	runBlocks = runPrints - 1
)

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
	ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindJournal, Version: r.version(), Length: n, Pool: pool,
		Epoch: r.Epoch, Generation: r.Number})
	return b
}

// version returns the version that r is written in: 1 as long as it has nothing to do
// with deduplication, so that the programs that know no other can read it.
func (r *record) version() uint16 {
	for i := range r.Commit.Runs {
		if c := &r.Commit.Runs[i]; c.Shared || len(c.Prints) > 0 {
			return journalVersion
		}
	}
	return 1
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
		n += 4*len(c.Runs[i].Sums) + len(c.Runs[i].Prints)
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
		n := uint32(len(r.Sums))
		if r.Shared {
			n |= runShared
		}
		if len(r.Prints) > 0 {
			n |= runPrints
		}
		b = le.AppendUint32(b, n)
		for _, s := range r.Sums {
			b = le.AppendUint32(b, s)
		}
		b = append(b, r.Prints...)
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

// openFrame checks the header and the checksum of a stored record of the given
// pool.
func openFrame(b []byte, pool block.PoolID) (f frame, err error) {
	if f.head, err = ondisk.Open(b, ondisk.KindJournal, journalVersion); err != nil {
		return f, err
	}
	if f.head.Pool != pool {
		return f, fmt.Errorf("record of pool %v: %w", f.head.Pool, ondisk.ErrMagic)
	}
	f.body, f.n = b[ondisk.HeaderSize:f.head.Length], roundUp(f.head.Length)
	if len(f.body) >= 4 {
		f.prev = binary.LittleEndian.Uint32(f.body)
	}
	return f, nil
}

// mappings returns how many blocks the record maps, without decoding it: no fewer,
// and more only by what changes of the catalogue, and fingerprints, take.
func (f *frame) mappings() int {
	d := ondisk.NewDecoder(f.body)
	if d.U32(); recordType(d.U32()) != typeCommit {
		return 0
	}
	d.Bytes(8 + 8 + oplog.DiskPosSize)
	d.Bytes(d.Count(rangeSize) * rangeSize)
	runs := d.Count(runFixed)
	if f.head.Version > 1 {
		return exactly(d, runs)
	}
	return max(0, d.Len()-runs*runFixed-4) / 4 // the last four bytes count changes of the catalogue
}

// exactly counts the blocks of runs.
func exactly(d *ondisk.Decoder, runs int) (blocks int) {
	for range runs {
		b := d.Bytes(runFixed)
		if b == nil {
			break
		}
		n, size := runLength(b)
		if d.Bytes(n*size) == nil {
			break
		}
		blocks += n
	}
	return blocks
}

// runLength returns how many blocks an encoded run has, and how many bytes follow its
// fixed part for each.
func runLength(b []byte) (n, size int) {
	w := binary.LittleEndian.Uint32(b[runFixed-4:])
	if size = 4; w&runPrints != 0 {
		size += printSize
	}
	return int(w & runBlocks), size
}

// decode decodes the record into r, whose memory it uses again.
func (f *frame) decode(r *record) error {
	d := ondisk.NewDecoder(f.body)
	c := commit{Holes: r.Commit.Holes[:0], Runs: r.Commit.Runs[:0]}
	sums := r.sums[:0]
	*r = record{Number: f.head.Generation, Epoch: f.head.Epoch, Prev: d.U32(), Type: recordType(d.U32()), sums: sums}
	switch r.Type {
	case typeCommit:
		r.sums = c.decode(d, sums)
		r.Commit = c
	case typeFold:
		r.Fold = foldPages{Fold: d.U64(), Taken: decodeRuns(d), Freed: decodeRuns(d)}
		r.Commit.Holes, r.Commit.Runs = c.Holes, c.Runs
	default:
		d.Fail("record type %d", r.Type)
	}
	if err := d.Err(); err != nil {
		return fmt.Errorf("journal record %d: %w", r.Number, err)
	}
	return nil
}

// decode decodes a commit, with the memory that it has and that of sums, which is
// what its runs refer to.
func (c *commit) decode(d *ondisk.Decoder, sums []uint32) []uint32 {
	le := binary.LittleEndian
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
	c.Runs = slices.Grow(c.Runs, runs)
	sums = slices.Grow(sums, d.Len()/4) // for all runs: they must not move
	for range runs {
		b := d.Bytes(runFixed)
		if b == nil {
			return sums
		}
		r := mapRun{Volume: block.VolumeID(le.Uint32(b)), LBA: block.Logical(le.Uint64(b[4:])), At: block.Physical(le.Uint64(b[12:]))}
		n, size := runLength(b)
		if n*size > d.Len() {
			d.Fail("%d checksums with %d bytes left", n, d.Len())
			return sums
		}
		r.Shared = le.Uint32(b[20:])&runShared != 0
		if n == 0 || r.LBA >= catalogue.MaxSize/block.Size || r.LBA+block.Logical(n) > catalogue.MaxSize/block.Size || r.At>>56 != 0 {
			d.Fail("mapping of %d blocks at %d of volume %d to %v", n, r.LBA, r.Volume, r.At)
			return sums
		}
		first := len(sums)
		for b := d.Bytes(n * 4); len(b) > 0; b = b[4:] {
			sums = append(sums, le.Uint32(b))
		}
		r.Sums = sums[first:len(sums):len(sums)]
		if size > 4 {
			r.Prints = d.Bytes(n * printSize)
		}
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
	return sums
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

// recordLength returns the length on the device that the header in b claims,
// so that a whole record can be read and then be checked.
func recordLength(b []byte) (int, bool) {
	if string(b[:8]) != string(ondisk.KindJournal) {
		return 0, false
	}
	n := binary.LittleEndian.Uint32(b[12:])
	return roundUp(int(n)), n >= recordFixed && n <= maxRecordBytes
}
