package oplog

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
)

// KindLog names the header of a log section in a region.
const KindLog ondisk.Kind = "PLXoplog"

const (
	// logVersion is the newest version. Version 1 is without tags, and what is written as
	// long as no client needs them.
	logVersion   = 2
	recordSize   = 64
	pageSize     = block.Size
	logHeaderLen = 128

	// Places within a header page. Each mutable position has a cache line of
	// its own, because one is stored at every publication.
	tailCellAt = 1024
	headCellAt = 2048
)

// MaxRecordBlocks is the largest number of blocks in one KindWrite record.
const MaxRecordBlocks = 8

// maxExtents bounds a log to 8 TiB of payload: far beyond any region, and
// small enough that no size computed from it overflows.
const maxExtents = 1 << 31

// Extent is the number of a payload block in the arena of a log.
type Extent uint32

// Kind says what a record does.
type Kind uint8

// The kinds of record.
const (
	// KindWrite stores Count blocks from LBA on; the payload is in Count
	// consecutive extents from First on.
	KindWrite Kind = iota + 1
	// KindZero makes Count blocks from LBA on read as zero: trim and
	// write-zeroes. It has no payload.
	KindZero
	// KindNop changes nothing. It is what a tag becomes in the flush log.
	KindNop
	// KindTag says that the next Count records are the change of a client's submission.
	// They are in the log with their tag, all of them, or none is; see TagRecord.
	KindTag
)

// String returns the lower-case name of the kind.
func (k Kind) String() string {
	switch k {
	case KindWrite:
		return "write"
	case KindZero:
		return "zero"
	case KindNop:
		return "nop"
	case KindTag:
		return "tag"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Record is one acknowledged change.
type Record struct {
	Seq    block.Seq // assigned by Publish
	Volume block.VolumeID
	LBA    block.Logical
	Kind   Kind
	Count  uint64 // blocks: 1 to MaxRecordBlocks of a write, any of a zero, 0 of a nop; records of a tag
	First  Extent // of a write
	// CRC holds the CRC32C of each payload block of a write, the same number
	// that the block map will keep for the block.
	CRC [MaxRecordBlocks]uint32
}

// check returns why a record is malformed in a log with that many extents.
func (r *Record) check(extents uint64) error {
	switch r.Kind {
	case KindWrite:
		if r.Count < 1 || r.Count > MaxRecordBlocks {
			return fmt.Errorf("write of %d blocks", r.Count)
		}
		if uint64(r.First)+r.Count > extents {
			return fmt.Errorf("extents %d+%d of %d", r.First, r.Count, extents)
		}
	case KindZero:
		if r.Count < 1 {
			return fmt.Errorf("zero of no blocks")
		}
	case KindNop:
		if r.Count != 0 {
			return fmt.Errorf("nop of %d blocks", r.Count)
		}
	case KindTag:
		return r.checkTag()
	default:
		return fmt.Errorf("unknown %s", r.Kind)
	}
	if uint64(r.LBA) > math.MaxUint64-r.Count {
		return fmt.Errorf("blocks %d+%d overflow", r.LBA, r.Count)
	}
	return nil
}

// encode fills p with the record. seed starts the checksum.
func (r *Record) encode(p *[recordSize]byte, seed uint32) {
	le := binary.LittleEndian
	le.PutUint64(p[0:], uint64(r.Seq))
	le.PutUint64(p[8:], uint64(r.LBA))
	le.PutUint32(p[16:], uint32(r.Volume))
	le.PutUint32(p[20:], 0)
	p[24] = uint8(r.Kind)
	p[25] = 0
	le.PutUint16(p[26:], 0)
	clear(p[32:])
	switch r.Kind {
	case KindWrite:
		le.PutUint32(p[20:], uint32(r.First))
		p[25] = uint8(r.Count)
		for i := range r.Count {
			le.PutUint32(p[32+4*i:], r.CRC[i])
		}
	case KindZero:
		le.PutUint64(p[32:], r.Count)
	case KindTag:
		le.PutUint32(p[20:], uint32(r.First))
		le.PutUint16(p[26:], uint16(r.Count))
		for i := range tagWords {
			le.PutUint32(p[32+4*i:], r.CRC[i])
		}
	}
	le.PutUint32(p[28:], recordSum(p, seed))
}

// recordSum covers all of a record but the checksum itself.
func recordSum(p *[recordSize]byte, seed uint32) uint32 {
	return crcUpdate(crcUpdate(seed, p[:28]), p[32:])
}

// decode reads a record and returns false unless its checksum holds and it
// carries the sequence that belongs in its place. It does not check more.
func (r *Record) decode(p *[recordSize]byte, seed uint32, want block.Seq) bool {
	le := binary.LittleEndian
	if le.Uint64(p[0:]) != uint64(want) || want == 0 {
		return false
	}
	if recordSum(p, seed) != le.Uint32(p[28:]) && !planted.Has(planted.TornRecordAccepted) {
		return false
	}
	r.fields(p)
	return true
}

// fields takes a record apart that is known to be whole.
func (r *Record) fields(p *[recordSize]byte) {
	le := binary.LittleEndian
	*r = Record{
		Seq:    block.Seq(le.Uint64(p[0:])),
		LBA:    block.Logical(le.Uint64(p[8:])),
		Volume: block.VolumeID(le.Uint32(p[16:])),
		Kind:   Kind(p[24]),
	}
	switch r.Kind {
	case KindWrite:
		r.First = Extent(le.Uint32(p[20:]))
		r.Count = uint64(p[25])
		for i := range r.CRC {
			r.CRC[i] = le.Uint32(p[32+4*i:])
		}
	case KindZero:
		r.Count = le.Uint64(p[32:])
	case KindTag:
		r.First = Extent(le.Uint32(p[20:]))
		r.Count = uint64(le.Uint16(p[26:]))
		for i := range tagWords {
			r.CRC[i] = le.Uint32(p[32+4*i:])
		}
	}
}

// geometry is where the parts of a section are. All are bytes from its start.
type geometry struct {
	extents uint64
	slots   uint64
	ring    [2]int // the two rings
	arena   int
	header  [2]int // the two header pages
	size    int
}

// geometryFor lays out a section of exactly size bytes for so many extents:
// header A, ring A, arena, ring B, room, header B. The copies are as far apart
// as they can be.
func geometryFor(extents uint64, size int) geometry {
	slots := slotsFor(extents)
	ring := int(slots) * recordSize
	g := geometry{extents: extents, slots: slots, size: size}
	g.header = [2]int{0, size - pageSize}
	g.arena = pageSize + ring
	g.ring = [2]int{pageSize, g.arena + int(extents)*block.Size}
	return g
}

// slotsFor returns the number of ring slots for so many extents: twice as
// many, so that trims never wait for room while there is payload room, in
// whole pages.
func slotsFor(extents uint64) uint64 {
	const perPage = pageSize / recordSize
	return (2*extents + perPage - 1) / perPage * perPage
}

// extentsIn returns the number of extents for that much payload, at least one.
func extentsIn(payloadBytes int64) uint64 {
	if payloadBytes < block.Size {
		return 1
	}
	return min(uint64(payloadBytes)/block.Size, maxExtents)
}

// SectionSize returns the number of bytes of memory that a log with that much
// payload needs: about 1.04 times the payload.
func SectionSize(payloadBytes int64) int64 {
	e := extentsIn(payloadBytes)
	return int64(2*pageSize + 2*slotsFor(e)*recordSize + e*block.Size)
}

// logHeader is the decoded header page, apart from its position cells.
type logHeader struct {
	pool       block.PoolID
	epoch      block.Epoch // of the guest that appends now
	generation uint64      // rises with each rewrite: the higher copy is newer
	version    uint16
	identity   [16]byte    // random, of this log
	birth      block.Epoch // epoch at Format
	extents    uint64
	slots      uint64
	size       uint64
	start      block.Seq // last sequence that was committed before Format
}

func (h *logHeader) encode(p *[logHeaderLen]byte) {
	le := binary.LittleEndian
	copy(p[64:80], h.identity[:])
	le.PutUint64(p[80:], uint64(h.birth))
	le.PutUint64(p[88:], h.extents)
	le.PutUint64(p[96:], h.slots)
	le.PutUint64(p[104:], h.size)
	le.PutUint64(p[112:], uint64(h.start))
	le.PutUint64(p[120:], 0)
	ondisk.Seal(p[:], ondisk.Header{
		Kind: KindLog, Version: h.version, Length: logHeaderLen,
		Pool: h.pool, Epoch: h.epoch, Generation: h.generation,
	})
}

func (h *logHeader) decode(p []byte) error {
	oh, err := ondisk.Open(p[:logHeaderLen], KindLog, logVersion)
	if err != nil {
		return err
	}
	if oh.Length != logHeaderLen {
		return fmt.Errorf("header of %d bytes instead of %d: %w", oh.Length, logHeaderLen, ondisk.ErrChecksum)
	}
	le := binary.LittleEndian
	*h = logHeader{
		pool: oh.Pool, epoch: oh.Epoch, generation: oh.Generation, version: oh.Version,
		identity: [16]byte(p[64:80]),
		birth:    block.Epoch(le.Uint64(p[80:])),
		extents:  le.Uint64(p[88:]),
		slots:    le.Uint64(p[96:]),
		size:     le.Uint64(p[104:]),
		start:    block.Seq(le.Uint64(p[112:])),
	}
	return nil
}

// seed starts the checksum of every record and position of this log, so that
// bytes of another log in the same memory never pass for its own.
func (h *logHeader) seed() uint32 {
	var b [24]byte
	copy(b[:], h.identity[:])
	binary.LittleEndian.PutUint64(b[16:], uint64(h.birth))
	return ondisk.CRC(b[:])
}

// cellCheck returns the second word of a position cell.
func cellCheck(seed uint32, at int, v block.Seq) uint64 {
	return ondisk.CellCheck(seed, uint64(at), uint64(v))
}

// cellDecode reads a position cell and says whether it is whole.
func cellDecode(p []byte, seed uint32, at int) (block.Seq, bool) {
	le := binary.LittleEndian
	v := block.Seq(le.Uint64(p))
	return v, le.Uint64(p[8:]) == cellCheck(seed, at, v)
}
