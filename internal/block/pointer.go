package block

import (
	"encoding/binary"
	"fmt"
)

// Pointer is a reference to a stored block: where it is, the consistency point
// that wrote it, and the CRC32C of its 4096 bytes. The three together name one
// version of one block for ever, which is why a cache needs no invalidation
// and a misdirected, lost or stale read cannot go unnoticed.
type Pointer struct {
	Phys  Physical
	Birth CP
	Sum   uint32
}

// PointerSize is the size of an encoded Pointer in bytes.
const PointerSize = 16

// MaxCP is the largest consistency-point number that a Pointer can carry.
const MaxCP CP = 1<<40 - 1

// IsHole reports whether p refers to nothing: the block reads as zero.
func (p Pointer) IsHole() bool { return p.Phys == None }

// Encode writes p into the first PointerSize bytes of b: 56 bits of address
// and the upper 8 bits of birth, then 32 bits of birth, then the checksum, all
// little-endian. A hole is sixteen zero bytes.
func (p Pointer) Encode(b []byte) {
	if p.IsHole() {
		clear(b[:PointerSize])
		return
	}
	le := binary.LittleEndian
	le.PutUint64(b, uint64(p.Phys)|uint64(p.Birth>>32)<<56)
	le.PutUint32(b[8:], uint32(p.Birth))
	le.PutUint32(b[12:], p.Sum)
}

// DecodePointer reads what Encode wrote.
func DecodePointer(b []byte) Pointer {
	le := binary.LittleEndian
	w := le.Uint64(b)
	if w&(1<<56-1) == 0 {
		return Pointer{}
	}
	return Pointer{
		Phys:  Physical(w & (1<<56 - 1)),
		Birth: CP(w>>56)<<32 | CP(le.Uint32(b[8:])),
		Sum:   le.Uint32(b[12:]),
	}
}

// String shows address and birth, as messages do.
func (p Pointer) String() string {
	if p.IsHole() {
		return "hole"
	}
	return fmt.Sprintf("%v (written by consistency point %d)", p.Phys, p.Birth)
}
