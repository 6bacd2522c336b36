package vhost

import (
	"fmt"
	"math"
	"sync/atomic"
	"unsafe"

	"github.com/pollux-storage/pollux/internal/virtio"
)

// The in-flight area: a region for each queue, as the specification lays them out for
// split and packed queues, each rounded up to areaAlign; and behind them a trailer of
// Pollux with the session that the area's submissions belong to.
const (
	areaAlign    = 64
	splitHeader  = 16
	splitEntry   = 16
	packedHeader = 32
	packedEntry  = 32

	regionLayout = 1

	trailerHeader = 32
	// AreaVersion is the version of the trailer.
	AreaVersion = 1
	areaMagic   = 0x31464e4958554c50 // "PLUXINF1"
)

// Area is an in-flight area: shared memory that outlives the back-end. It is read when it
// is attached, checked then, and afterwards only written.
type Area struct {
	mem    []byte
	queues int
	size   int // descriptors of a queue
	packed bool
}

func regionSize(size int, packed bool) int {
	n := splitHeader + size*splitEntry
	if packed {
		n = packedHeader + size*packedEntry
	}
	return (n + areaAlign - 1) / areaAlign * areaAlign
}

// AreaBytes returns the size in bytes of the area for so many queues of so many
// descriptors.
func AreaBytes(queues, size int, packed bool) int {
	trailer := (trailerHeader + 8*queues + areaAlign - 1) / areaAlign * areaAlign
	return queues*regionSize(size, packed) + trailer
}

// OpenArea returns the area in mem, which is aligned to 64 bytes. It does not look at what
// is in it.
func OpenArea(mem []byte, queues, size int, packed bool) (*Area, error) {
	if queues < 1 || size < 1 || size > math.MaxInt16+1 || len(mem) < AreaBytes(queues, size, packed) {
		return nil, fmt.Errorf("an in-flight area of %d bytes for %d queues of %d descriptors, it has %d: %w",
			len(mem), queues, size, AreaBytes(queues, size, packed), ErrProtocol)
	}
	if uintptr(unsafe.Pointer(unsafe.SliceData(mem)))%areaAlign != 0 {
		return nil, fmt.Errorf("an in-flight area that is not aligned to %d bytes: %w", areaAlign, ErrProtocol)
	}
	return &Area{mem: mem, queues: queues, size: size, packed: packed}, nil
}

// Shape returns for how many queues of how many descriptors the area is.
func (a *Area) Shape() (queues, size int) { return a.queues, a.size }

func (a *Area) trailer() []byte { return a.mem[a.queues*regionSize(a.size, a.packed):] }

// Format writes the trailer of a new area, whose bytes are zero.
func (a *Area) Format(session uint64) {
	t := a.trailer()
	store(t, 8, uint64(AreaVersion)|uint64(a.queues)<<16|uint64(a.size)<<32|flag(a.packed)<<48)
	store(t, 16, session)
	store(t, 0, areaMagic)
}

// Session returns the session that Format has written, or an error if this is not such an
// area.
func (a *Area) Session() (uint64, error) {
	t := a.trailer()
	magic, shape, session := load(t, 0), load(t, 8), load(t, 16)
	want := uint64(AreaVersion) | uint64(a.queues)<<16 | uint64(a.size)<<32 | flag(a.packed)<<48
	switch {
	case magic != areaMagic:
		return 0, fmt.Errorf("the in-flight area was not made by Pollux: its trailer begins with %016x: %w", magic, ErrProtocol)
	case uint16(shape) != AreaVersion:
		return 0, fmt.Errorf("an in-flight area of version %d, this program knows version %d: %w", uint16(shape), AreaVersion, ErrProtocol)
	case shape != want:
		return 0, fmt.Errorf("an in-flight area for %d queues of %d descriptors, not for %d of %d, or for rings of the other layout: %w",
			uint16(shape>>16), uint16(shape>>32), a.queues, a.size, ErrProtocol)
	case session == 0:
		return 0, fmt.Errorf("an in-flight area without a session: %w", ErrProtocol)
	}
	return session, nil
}

// cacheAt is where the trailer says whether the driver has switched the write-back cache
// off.
const cacheAt = 24

// SetWritethrough says for those to come whether each write is to be flushed.
func (a *Area) SetWritethrough(on bool) { store(a.trailer(), cacheAt, flag(on)) }

// Writethrough reports what SetWritethrough has said, false in a new area, or an error if
// no back-end has written that.
func (a *Area) Writethrough() (bool, error) {
	v := load(a.trailer(), cacheAt)
	if v > 1 {
		return false, fmt.Errorf("an in-flight area whose write cache is %d, 0 or 1 is possible: %w", v, ErrProtocol)
	}
	return v == 1, nil
}

// counterAt is where the trailer keeps the counter of a queue.
func counterAt(queue int) int { return trailerHeader + 8*queue }

func (a *Area) region(queue int) []byte {
	n := regionSize(a.size, a.packed)
	return a.mem[queue*n:][:n:n]
}

// counterLimit is far from where counters end: whoever finds one beyond it has found bytes
// that no back-end has written.
const counterLimit = math.MaxUint64 / 2

// Submission is a request that a back-end had in flight when it ended.
type Submission struct {
	Slot    uint16 // number of its entry; of a split queue its head descriptor
	Counter uint64
	// Descs are the ring's descriptors of a request of a packed queue, from the area,
	// because the ring may have others by now.
	Descs []virtio.PackedDesc
}

func flag(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}

// load and store access an aligned word of 64 bits. What was written before a store is
// seen by whoever maps the memory after the writer's death, if it sees the store.
func load(mem []byte, off int) uint64 {
	return atomic.LoadUint64((*uint64)(unsafe.Pointer(unsafe.SliceData(mem[off : off+8 : off+8]))))
}

func store(mem []byte, off int, v uint64) {
	atomic.StoreUint64((*uint64)(unsafe.Pointer(unsafe.SliceData(mem[off:off+8:off+8]))), v)
}
