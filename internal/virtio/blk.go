package virtio

import (
	"encoding/binary"
	"fmt"
)

// Feature bits of a block device (section 5.2.3), as numbers of bits.
const (
	BlkSizeMax     = 1
	BlkSegMax      = 2
	BlkGeometry    = 4
	BlkReadOnly    = 5
	BlkBlockSize   = 6
	BlkFlush       = 9
	BlkTopology    = 10
	BlkConfigWCE   = 11
	BlkMultiQueue  = 12
	BlkDiscard     = 13
	BlkWriteZeroes = 14
)

// Types of requests (5.2.6).
const (
	BlkIn             uint32 = 0 // the device fills the buffer
	BlkOut            uint32 = 1
	BlkFlushCache     uint32 = 4
	BlkGetID          uint32 = 8
	BlkDiscardRange   uint32 = 11
	BlkWriteZeroRange uint32 = 13
)

// Status bytes of requests (5.2.6).
const (
	BlkOK          byte = 0
	BlkIOError     byte = 1
	BlkUnsupported byte = 2
)

const (
	// SectorBytes is the unit of offsets and of the capacity, whatever the block size.
	SectorBytes = 512
	// BlkHeaderBytes is the size of a request's header.
	BlkHeaderBytes = 16
	// BlkIDBytes is the size of the buffer of a BlkGetID request.
	BlkIDBytes = 20
	// BlkRangeBytes is the size of a BlkRange.
	BlkRangeBytes = 16
	// BlkConfigBytes is the size of the part of the configuration space that is used
	// here: up to the limits of secure erasure, which not every implementation knows.
	BlkConfigBytes = 60
)

// Places in the configuration space.
const (
	// BlkConfigWriteback is where the byte is that a driver may write with BlkConfigWCE.
	BlkConfigWriteback = 32
)

// BlkHeader is what a request begins with.
type BlkHeader struct {
	Type   uint32
	Sector uint64 // offset in SectorBytes; 0 where the type has none
}

// Put writes the header to the first BlkHeaderBytes of b.
func (h BlkHeader) Put(b []byte) {
	_ = b[BlkHeaderBytes-1]
	binary.LittleEndian.PutUint32(b, h.Type)
	binary.LittleEndian.PutUint32(b[4:], 0)
	binary.LittleEndian.PutUint64(b[8:], h.Sector)
}

// ReadBlkHeader reads a header from the first BlkHeaderBytes of b.
func ReadBlkHeader(b []byte) BlkHeader {
	_ = b[BlkHeaderBytes-1]
	return BlkHeader{Type: binary.LittleEndian.Uint32(b), Sector: binary.LittleEndian.Uint64(b[8:])}
}

// BlkRange is the payload of a discard or a write of zeroes: a range in SectorBytes.
type BlkRange struct {
	Sector  uint64
	Sectors uint32
	Flags   uint32 // BlkUnmap
}

// BlkUnmap, in a write of zeroes, allows the device to give the range's space up.
const BlkUnmap uint32 = 1

// Put writes the range to the first BlkRangeBytes of b.
func (r BlkRange) Put(b []byte) {
	_ = b[BlkRangeBytes-1]
	binary.LittleEndian.PutUint64(b, r.Sector)
	binary.LittleEndian.PutUint32(b[8:], r.Sectors)
	binary.LittleEndian.PutUint32(b[12:], r.Flags)
}

// ReadBlkRange reads a range from the first BlkRangeBytes of b.
func ReadBlkRange(b []byte) BlkRange {
	_ = b[BlkRangeBytes-1]
	return BlkRange{
		Sector: binary.LittleEndian.Uint64(b), Sectors: binary.LittleEndian.Uint32(b[8:]), Flags: binary.LittleEndian.Uint32(b[12:]),
	}
}

// BlkConfig is the configuration space of a block device (5.2.4). A field counts only
// with the feature that it belongs to.
type BlkConfig struct {
	Capacity            uint64 // sectors
	SizeMax             uint32 // bytes of a segment; BlkSizeMax
	SegMax              uint32 // segments of a request; BlkSegMax
	BlockSize           uint32 // bytes; BlkBlockSize
	PhysicalExp         uint8  // blocks of a physical block, as power of two; BlkTopology, as the next three
	AlignmentOffset     uint8  // blocks
	MinIO               uint16 // blocks
	OptIO               uint32 // blocks
	Writeback           bool   // BlkConfigWCE
	Queues              uint16 // BlkMultiQueue
	DiscardSectors      uint32 // of a range; BlkDiscard, as the next two
	DiscardSegments     uint32 // ranges of a request
	DiscardAlign        uint32 // sectors
	WriteZeroesSectors  uint32 // BlkWriteZeroes, as the next two
	WriteZeroesSegments uint32
	WriteZeroesMayUnmap bool
}

// Put writes the configuration to the first BlkConfigBytes of b.
func (c *BlkConfig) Put(b []byte) {
	le := binary.LittleEndian
	clear(b[:BlkConfigBytes])
	le.PutUint64(b, c.Capacity)
	le.PutUint32(b[8:], c.SizeMax)
	le.PutUint32(b[12:], c.SegMax)
	le.PutUint32(b[20:], c.BlockSize)
	b[24], b[25] = c.PhysicalExp, c.AlignmentOffset
	le.PutUint16(b[26:], c.MinIO)
	le.PutUint32(b[28:], c.OptIO)
	b[BlkConfigWriteback] = flag(c.Writeback)
	le.PutUint16(b[34:], c.Queues)
	le.PutUint32(b[36:], c.DiscardSectors)
	le.PutUint32(b[40:], c.DiscardSegments)
	le.PutUint32(b[44:], c.DiscardAlign)
	le.PutUint32(b[48:], c.WriteZeroesSectors)
	le.PutUint32(b[52:], c.WriteZeroesSegments)
	b[56] = flag(c.WriteZeroesMayUnmap)
}

func flag(b bool) byte {
	if b {
		return 1
	}
	return 0
}

// ReadBlkConfig reads a configuration space. It may be longer than BlkConfigBytes, whose
// rest says nothing here, but not shorter.
func ReadBlkConfig(b []byte) (BlkConfig, error) {
	if len(b) < BlkConfigBytes {
		return BlkConfig{}, fmt.Errorf("a configuration space of %d bytes, a block device has at least %d", len(b), BlkConfigBytes)
	}
	le := binary.LittleEndian
	return BlkConfig{
		Capacity: le.Uint64(b), SizeMax: le.Uint32(b[8:]), SegMax: le.Uint32(b[12:]), BlockSize: le.Uint32(b[20:]),
		PhysicalExp: b[24], AlignmentOffset: b[25], MinIO: le.Uint16(b[26:]), OptIO: le.Uint32(b[28:]),
		Writeback: b[BlkConfigWriteback] != 0, Queues: le.Uint16(b[34:]),
		DiscardSectors: le.Uint32(b[36:]), DiscardSegments: le.Uint32(b[40:]), DiscardAlign: le.Uint32(b[44:]),
		WriteZeroesSectors: le.Uint32(b[48:]), WriteZeroesSegments: le.Uint32(b[52:]), WriteZeroesMayUnmap: b[56] != 0,
	}, nil
}
