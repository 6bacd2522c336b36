package ring

import "fmt"

// Op is what an entry asks for.
type Op uint8

// The operations. OpNone does nothing: it takes the place of a request that
// was called off while no back-end was there.
const (
	OpNone Op = iota
	OpRead
	OpWrite
	OpFlush
	OpDiscard
	OpWriteZeroes
	OpStatus
	lastOp = OpStatus
)

// String returns the lower-case name of the operation.
func (o Op) String() string {
	if o > lastOp {
		return fmt.Sprintf("op(%d)", uint8(o))
	}
	return [...]string{"none", "read", "write", "flush", "discard", "write-zeroes", "block-status"}[o]
}

// Flags of an entry.
const (
	// FlagDurable: a write completes when it survives a power cut.
	FlagDurable = 1 << iota
	// FlagKeep: the space of zeroes that are written stays allocated.
	FlagKeep
	allFlags = FlagDurable | FlagKeep
)

// Segment is a piece of memory: where it is, by the number of the memory in the
// upper 16 bits and the offset there in bytes in the lower 48, and its length in
// bytes. Memory 0 is the data area of the ring.
type Segment struct{ Addr, Len uint64 }

// Addr returns the address of an offset in a memory.
func Addr(memory uint16, off uint64) uint64 { return uint64(memory)<<48 | off }

// Tag names a change to those who keep what was done (block.Tag).
type Tag struct {
	Session     uint64
	Queue, Slot uint16
	Counter     uint64
}

// Entry is a request as it lies in a slot.
type Entry struct {
	Op     Op
	Flags  uint8
	Offset int64 // bytes on the device
	Length int64 // bytes; of a read or write the sum of the segments
	// Tag is of a change. A front-end that passes requests of others on sets theirs; with
	// Session 0 the entry is known by its own place.
	Tag Tag
	// Segs is the memory of a read or write, up to Segments pieces. Who takes an entry
	// gets them in memory of the queue, valid until the slot is taken again.
	Segs []Segment

	Counter uint64 // the request's number in its queue, set by Put and Take
	Slot    int    // the same
}

// The words of a slot.
const (
	slotCounter = 8 * iota
	slotWhat    // op, flags, number of segments, queue and slot of the tag
	slotOffset
	slotLength
	slotSession
	slotTag
	slotAddr // the only segment, or the first
	slotLen
)

func (e *Entry) what() uint64 {
	return uint64(e.Op) | uint64(e.Flags)<<8 | uint64(len(e.Segs))<<16 | uint64(e.Tag.Queue)<<32 | uint64(e.Tag.Slot)<<48
}

// Status is how a request has ended.
type Status uint16

// The statuses. Those that are not known are StatusIO.
const (
	StatusOK Status = iota
	StatusIO
	StatusRange
	StatusAlign
	StatusUnsupported
	StatusReadOnly
	StatusNoSpace
	StatusCanceled
	StatusCorrupt
	StatusInvalid
)

// Abandon is no status of a completion: a Runner says by it that a request is not to be
// answered but left in the ring for the next back-end.
const Abandon Status = 1<<16 - 1

// Completion is the answer to an entry.
type Completion struct {
	Counter uint64
	Slot    int
	Status  Status
	N       int // extents of a status that was answered; bytes of text of a failure
}

func (c Completion) encode() uint64 {
	return uint64(c.Slot) | uint64(c.Status)<<16 | uint64(c.N)<<32
}

func decodeCompletion(counter, v uint64) Completion {
	return Completion{Counter: counter, Slot: int(v & 0xffff), Status: Status(v >> 16), N: int(v >> 32)}
}

// Extent is a part of the answer to a status, in the words of a table: a length in
// bytes and a state (0 data, 1 hole, 2 zero).
type Extent struct{ Length, State uint64 }
