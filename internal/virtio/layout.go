package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync/atomic"
	"unsafe"

	"github.com/pollux-storage/pollux/internal/fenced"
)

// ErrBroken: the other side has broken a rule of the specification. The queue cannot be
// used any more.
var ErrBroken = errors.New("virtqueue is broken by the other side")

// Feature bits that are of no device type (section 6), as numbers of bits.
const (
	FNotifyOnEmpty  = 24 // legacy
	FAnyLayout      = 27 // legacy
	FIndirectDesc   = 28
	FEventIdx       = 29
	FVersion1       = 32
	FAccessPlatform = 33
	FRingPacked     = 34
	FInOrder        = 35
	FOrderPlatform  = 36
)

// Features is a set of feature bits.
type Features uint64

// Has reports whether the bit with that number is in the set.
func (f Features) Has(bit uint) bool { return f>>bit&1 != 0 }

// Set makes a set of the bits with these numbers.
func Set(numbers ...uint) Features {
	var f Features
	for _, bit := range numbers {
		f |= 1 << bit
	}
	return f
}

// Flags of descriptors (2.7.5, 2.8.1). DescAvail and DescUsed are of packed rings.
const (
	DescNext     uint16 = 1 << 0
	DescWrite    uint16 = 1 << 1 // the device writes to it
	DescIndirect uint16 = 1 << 2
	DescAvail    uint16 = 1 << 7
	DescUsed     uint16 = 1 << 15
)

// Flags of the two rings of a split virtqueue, without the event index.
const (
	AvailNoInterrupt uint16 = 1 << 0 // 2.7.7: the driver wants no notice of used buffers
	UsedNoNotify     uint16 = 1 << 0 // 2.7.10: the device wants no notice of available ones
)

// Flags of the event suppression structures of a packed virtqueue (2.8.10).
const (
	EventEnable  uint16 = 0
	EventDisable uint16 = 1
	EventDesc    uint16 = 2 // only with FEventIdx: at the descriptor that offset and wrap counter name
)

// MaxQueueSize is the largest number of descriptors that a queue can have (2.7, 2.8).
const MaxQueueSize = 32768

// DescBytes is the size of a descriptor in either layout, and in an indirect table.
const DescBytes = 16

// EventBytes is the size of an event suppression structure of a packed virtqueue.
const EventBytes = 4

// SplitBytes returns the sizes in bytes of the three parts of a split virtqueue of n
// descriptors, with its events and with the padding behind them that makes each of them a
// word. The parts must be aligned to 16, 4 and 4 bytes.
func SplitBytes(n int) (desc, avail, used int) {
	return DescBytes * n, 4 + 2*n + 4, 4 + 8*n + 4
}

// PackedBytes returns the sizes in bytes of the descriptor ring of n descriptors, aligned
// to 16, and of each of the two event structures, aligned to 4.
func PackedBytes(n int) (desc, event int) {
	return DescBytes * n, EventBytes
}

// CheckSize returns an error unless a queue of that layout may have n descriptors: from 2
// to MaxQueueSize, and for a split one a power of two.
func CheckSize(n int, packed bool) error {
	if n < 2 || n > MaxQueueSize {
		return fmt.Errorf("a queue of %d descriptors, it may have 2 to %d", n, MaxQueueSize)
	}
	if !packed && bits.OnesCount(uint(n)) != 1 {
		return fmt.Errorf("a split queue of %d descriptors, which is no power of two", n)
	}
	return nil
}

// Desc is a descriptor of a split ring or of an indirect table of one, in memory of one's
// own. In packed rings the fields lie differently: see ReadPackedBuffer and LoadPackedWord.
type Desc struct {
	Addr  uint64 // in the driver's address space
	Len   uint32 // bytes
	Flags uint16
	Next  uint16 // number of the one that follows, with DescNext
}

// ReadSplitDesc copies descriptor i out of a descriptor table or an indirect table of a
// split virtqueue.
func ReadSplitDesc(table []byte, i int) Desc {
	b := table[i*DescBytes:][:DescBytes:DescBytes]
	return Desc{
		Addr: binary.LittleEndian.Uint64(b), Len: binary.LittleEndian.Uint32(b[8:]),
		Flags: binary.LittleEndian.Uint16(b[12:]), Next: binary.LittleEndian.Uint16(b[14:]),
	}
}

// PutSplitDesc is the reverse of ReadSplitDesc.
func PutSplitDesc(table []byte, i int, d Desc) {
	b := table[i*DescBytes:][:DescBytes:DescBytes]
	binary.LittleEndian.PutUint64(b, d.Addr)
	binary.LittleEndian.PutUint32(b[8:], d.Len)
	binary.LittleEndian.PutUint16(b[12:], d.Flags)
	binary.LittleEndian.PutUint16(b[14:], d.Next)
}

// LoadPackedWord loads id and flags of descriptor i of a packed ring. What else is in the
// descriptor is valid when the flags say that it is available, or used.
func LoadPackedWord(ring []byte, i int) (id, flags uint16) {
	w := Load(ring, i*DescBytes+12)
	return uint16(w), uint16(w >> 16)
}

// StorePackedWord stores id and flags of descriptor i of a packed ring, after everything
// that was written before.
func StorePackedWord(ring []byte, i int, id, flags uint16) {
	Store(ring, i*DescBytes+12, uint32(id)|uint32(flags)<<16)
}

// ReadPackedBuffer copies address and length of descriptor i of a packed ring or of an
// indirect table of one.
func ReadPackedBuffer(ring []byte, i int) (addr uint64, n uint32) {
	b := ring[i*DescBytes:][:DescBytes:DescBytes]
	return binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint32(b[8:])
}

// PutPackedBuffer is the reverse of ReadPackedBuffer.
func PutPackedBuffer(ring []byte, i int, addr uint64, n uint32) {
	b := ring[i*DescBytes:][:DescBytes:DescBytes]
	binary.LittleEndian.PutUint64(b, addr)
	binary.LittleEndian.PutUint32(b[8:], n)
}

// PackedAvailable reports whether flags make a descriptor available to a device whose
// wrap counter is wrap (2.8.1).
func PackedAvailable(flags uint16, wrap bool) bool {
	return flags&DescAvail != 0 == wrap && flags&DescUsed != 0 != wrap
}

// PackedUsed reports whether flags mark a descriptor as used for a driver whose wrap
// counter for used descriptors is wrap.
func PackedUsed(flags uint16, wrap bool) bool {
	return flags&DescAvail != 0 == wrap && flags&DescUsed != 0 == wrap
}

// PackedAvailFlags are the flags with which a driver makes a descriptor available.
func PackedAvailFlags(wrap bool) uint16 {
	if wrap {
		return DescAvail
	}
	return DescUsed
}

// PackedUsedFlags are the flags with which a device marks a descriptor as used.
func PackedUsedFlags(wrap bool) uint16 {
	if wrap {
		return DescAvail | DescUsed
	}
	return 0
}

// PackedEvent is an event suppression structure (2.8.10).
type PackedEvent struct {
	Off   uint16 // 15 bits: number of a descriptor
	Wrap  bool
	Flags uint16
}

// LoadPackedEvent loads an event suppression structure.
func LoadPackedEvent(area []byte) PackedEvent {
	w := Load(area, 0)
	return PackedEvent{Off: uint16(w) & 0x7fff, Wrap: w>>15&1 != 0, Flags: uint16(w>>16) & 3}
}

// StorePackedEvent stores one. A load that follows is made after it.
func StorePackedEvent(area []byte, e PackedEvent) {
	w := uint32(e.Off) | uint32(e.Flags)<<16
	if e.Wrap {
		w |= 1 << 15
	}
	Store(area, 0, w)
}

// NeedEvent reports whether a step of an index from old to index passes event, so that
// who asked for that event is to be notified (2.7.7.2).
func NeedEvent(event, index, old uint16) bool {
	return index-event-1 < index-old
}

// PackedNeedEvent is NeedEvent for a packed ring of n descriptors: whoever has stepped over
// that many of them, up to n, is at index now, from 0 to n-1, with wrap its wrap counter.
func PackedNeedEvent(e PackedEvent, n int, index, steps uint16, wrap bool) bool {
	switch e.Flags {
	case EventDisable:
		return false
	case EventDesc:
	default:
		return true
	}
	event := e.Off
	if e.Wrap != wrap {
		event -= uint16(n)
	}
	return NeedEvent(event, index, index-steps)
}

// Load loads the aligned word at off of mem. What was written before it was stored is
// seen by all loads that follow.
func Load(mem []byte, off int) uint32 { return atomic.LoadUint32(word(mem, off)) }

// Store stores the aligned word at off of mem after everything that was written before,
// and before all loads that follow.
func Store(mem []byte, off int, w uint32) { fenced.Store32(word(mem, off), w) }

func word(mem []byte, off int) *uint32 {
	return (*uint32)(unsafe.Pointer(unsafe.SliceData(mem[off : off+4 : off+4])))
}

// aligned reports whether mem begins at a multiple of n bytes.
func aligned(mem []byte, n int) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(mem)))%uintptr(n) == 0
}
