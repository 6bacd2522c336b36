package block

import (
	"encoding/binary"
	"fmt"
)

// Pointer is a reference to a stored block: where it is, the consistency point
// that made the reference, and the CRC32C of its 4096 bytes. Unless the block is
// shared that point has also written it; the three together then name one version of
// one block for ever, which is why a cache needs no invalidation and a misdirected,
// lost or stale read cannot go unnoticed.
type Pointer struct {
	Phys  Physical
	Birth CP
	Sum   uint32
	Twin  Twin // where the same bytes lie once more; of pages of metadata only
	// Shared says that the block was there already: another consistency point
	// than Birth has written it, or the same for another pointer. Of data only.
	Shared bool
}

// Twin says where a page's twin lies, from where the page itself does: so that a
// pointer has room for it, and whatever a device grows to the place stays. The zero
// Twin says that there is none.
type Twin uint16

// A twin lies on the same device, 1<<(twin-1) tracks behind its page, or from
// twinElsewhere on at the same place of device number twin-twinElsewhere.
const (
	twinElsewhere = 64
	twinBits      = 9
)

// MaxTwinDistance is the largest n of TwinBehind, and MaxTwinDevice the last device of
// TwinOn.
const (
	MaxTwinDistance = 32
	MaxTwinDevice   = 1<<twinBits - 1 - twinElsewhere
)

// TwinBehind is a twin 1<<n tracks behind its page.
func TwinBehind(n int) Twin { return Twin(n + 1) }

// TwinOn is a twin at the same place of another device.
func TwinOn(dev int) Twin { return Twin(twinElsewhere + dev) }

// Of returns where the twin of the page at p lies, None if there is none.
func (t Twin) Of(p Physical) Physical {
	switch {
	case t == 0:
		return None
	case t < twinElsewhere:
		return p + TrackBlocks<<(t-1)
	}
	return At(int(t-twinElsewhere), p.Block())
}

// Second returns a pointer to the twin alone, a hole if there is none.
func (p Pointer) Second() Pointer {
	if p.Twin == 0 {
		return Pointer{}
	}
	return Pointer{Phys: p.Twin.Of(p.Phys), Birth: p.Birth, Sum: p.Sum}
}

// First returns a pointer to the page alone, without its twin.
func (p Pointer) First() Pointer {
	p.Twin = 0
	return p
}

// PointerSize is the size of an encoded Pointer in bytes.
const PointerSize = 16

// MaxCP is the largest consistency-point number that a Pointer can carry.
const MaxCP CP = 1<<40 - 1

// IsHole reports whether p refers to nothing: the block reads as zero.
func (p Pointer) IsHole() bool { return p.Phys == None }

// addressBits is how many bits of a pointer are its address: the block's number, and 6
// of the device's.
const addressBits = 46

// sharedBit says of an encoded pointer that its block is shared.
const sharedBit = 1 << (addressBits + twinBits)

// Encode writes p into the first PointerSize bytes of b: 46 bits of address, 9 of
// twin, one that says that the block is shared, and the upper 8 bits of birth, then 32
// bits of birth, then the checksum, all little-endian. A hole is sixteen zero bytes.
func (p Pointer) Encode(b []byte) {
	if p.IsHole() {
		clear(b[:PointerSize])
		return
	}
	le := binary.LittleEndian
	w := uint64(p.Phys) | uint64(p.Twin)<<addressBits | uint64(p.Birth>>32)<<56
	if p.Shared {
		w |= sharedBit
	}
	le.PutUint64(b, w)
	le.PutUint32(b[8:], uint32(p.Birth))
	le.PutUint32(b[12:], p.Sum)
}

// DecodePointer reads what Encode wrote.
func DecodePointer(b []byte) Pointer {
	le := binary.LittleEndian
	w := le.Uint64(b)
	if w&(1<<addressBits-1) == 0 {
		return Pointer{}
	}
	return Pointer{
		Phys:   Physical(w & (1<<addressBits - 1)),
		Birth:  CP(w>>56)<<32 | CP(le.Uint32(b[8:])),
		Sum:    le.Uint32(b[12:]),
		Twin:   Twin(w >> addressBits & (1<<twinBits - 1)),
		Shared: w&sharedBit != 0,
	}
}

// String shows address and birth, as messages do.
func (p Pointer) String() string {
	if p.IsHole() {
		return "hole"
	}
	return fmt.Sprintf("%v (written by consistency point %d)", p.Phys, p.Birth)
}
