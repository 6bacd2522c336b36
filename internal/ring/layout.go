package ring

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
)

// magic begins each ring, formatVersion is that of everything in it.
const (
	magic         = "PLXring."
	formatVersion = 1
)

// Bounds of a ring.
const (
	MaxQueues  = 64      // queues of a ring
	MinEntries = 2       // entries of a queue, a power of two
	MaxEntries = 1 << 12 // the same
	// Segments is how many pieces of memory an entry carries.
	Segments = 32
	// MaxLength is the largest length of a read or write in bytes.
	MaxLength = 32 << 20
	// MaxRing is the largest ring in bytes, its data area included.
	MaxRing = 1 << 42
)

// Places in the file, in bytes.
const (
	page      = 4096
	headerLen = 96
	frontPage = 1 * page // written by the front-end
	backPage  = 2 * page // written by the back-end
	queuesAt  = 3 * page

	// In the front page.
	frontState = 0
	frontBeat  = 64
	// In the back page.
	backState  = 0
	backAttach = 8
	backBeat   = 64
	factsSeq   = 128
	factsAt    = 136 // factWords words

	// In each queue: a page of words of each side, then the tables.
	tailAt     = 0   // front: submissions so far
	headAt     = 64  // front: completions that it has taken
	frontArmed = 128 // front: it sleeps, and is to be woken
	cancelsAt  = 192 // front: how often it has asked to cancel
	ctailAt    = page + 0
	backArmed  = page + 64
	tablesAt   = 2 * page

	slotBytes  = 64
	cqBytes    = 16
	tableBytes = Segments * 16
)

// TextMax is the longest error text of a completion in bytes.
const TextMax = tableBytes

// Shape is how many of everything a ring has.
type Shape struct {
	ID      [16]byte // random, of this ring
	Session uint64   // random, never 0: what the tags of its changes begin with
	Queues  int
	Entries int   // of each queue: requests in flight
	Data    int64 // bytes of the data area, whole pages
	// Bells says that both sides have descriptors to wake each other; without
	// them they look from time to time.
	Bells bool
}

// Size returns the bytes of a whole ring.
func (s Shape) Size() int64 { return s.dataAt() + s.Data }

// Check returns an error that names what of the shape no ring may have.
func (s Shape) Check() error {
	switch {
	case s.Queues < 1 || s.Queues > MaxQueues:
		return fmt.Errorf("%d queues: 1 to %d are possible", s.Queues, MaxQueues)
	case s.Entries < MinEntries || s.Entries > MaxEntries || bits.OnesCount(uint(s.Entries)) != 1:
		return fmt.Errorf("%d entries a queue: a power of two from %d to %d is needed", s.Entries, MinEntries, MaxEntries)
	case s.Data < 0 || s.Data%page != 0 || s.Data > MaxRing/2:
		return fmt.Errorf("data area of %d bytes: whole pages of %d bytes, up to %d, are needed", s.Data, page, int64(MaxRing)/2)
	case s.Session == 0:
		return errors.New("session 0: a session has a number")
	}
	return nil
}

func (s Shape) queueBytes() int64 {
	n := int64(tablesAt + s.Entries*(8+cqBytes+8+slotBytes+2*tableBytes))
	return (n + page - 1) / page * page
}

func (s Shape) queueAt(q int) int64 { return queuesAt + int64(q)*s.queueBytes() }

func (s Shape) dataAt() int64 { return s.queueAt(s.Queues) }

// The errors of a ring.
var (
	// ErrNoRing: the memory does not begin with a ring's header.
	ErrNoRing = errors.New("not a ring")
	// ErrVersion: the ring is of a version that this program does not know.
	ErrVersion = errors.New("version of the ring is not known")
	// ErrBroken: the other side has broken the rules of the ring.
	ErrBroken = errors.New("the other side of the ring has broken its rules")
	// ErrGone: the other side has ended.
	ErrGone = errors.New("the other side of the ring is gone")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// encode writes the header of a ring of this shape into its first page, the magic
// last.
func (s Shape) encode(p []byte) {
	le := binary.LittleEndian
	clear(p[:headerLen])
	le.PutUint32(p[8:], formatVersion)
	le.PutUint64(p[16:], uint64(s.Size()))
	copy(p[24:40], s.ID[:])
	le.PutUint64(p[40:], s.Session)
	le.PutUint32(p[48:], uint32(s.Queues))
	le.PutUint32(p[52:], uint32(s.Entries))
	le.PutUint64(p[56:], uint64(s.dataAt()))
	le.PutUint64(p[64:], uint64(s.Data))
	if s.Bells {
		le.PutUint32(p[72:], 1)
	}
	le.PutUint32(p[12:], crc32.Checksum(p[16:headerLen], castagnoli))
	store(word(p, 0), le.Uint64([]byte(magic)))
}

// decode returns the shape that a header describes, of which p is a copy that
// nobody else changes. size is that of the memory.
func decode(p []byte, size int64) (Shape, error) {
	le := binary.LittleEndian
	var s Shape
	if len(p) < headerLen || string(p[:8]) != magic {
		return s, ErrNoRing
	}
	if v := le.Uint32(p[8:]); v != formatVersion {
		return s, fmt.Errorf("version %d instead of %d: %w", v, formatVersion, ErrVersion)
	}
	if have, want := le.Uint32(p[12:]), crc32.Checksum(p[16:headerLen], castagnoli); have != want {
		return s, fmt.Errorf("header with checksum %#x instead of %#x: %w", have, want, ErrBroken)
	}
	copy(s.ID[:], p[24:40])
	s.Session = le.Uint64(p[40:])
	queues, entries := le.Uint32(p[48:]), le.Uint32(p[52:])
	if queues > MaxQueues || entries > MaxEntries || le.Uint64(p[64:]) > MaxRing/2 {
		return s, fmt.Errorf("header with %d queues of %d entries and %d bytes of data: %w", queues, entries, le.Uint64(p[64:]), ErrBroken)
	}
	s.Queues, s.Entries, s.Data = int(queues), int(entries), int64(le.Uint64(p[64:]))
	s.Bells = le.Uint32(p[72:]) == 1
	if err := s.Check(); err != nil {
		return s, fmt.Errorf("header: %w: %w", err, ErrBroken)
	}
	if int64(le.Uint64(p[16:])) != s.Size() || int64(le.Uint64(p[56:])) != s.dataAt() {
		return s, fmt.Errorf("header with data at %d and an end at %d instead of %d and %d: %w", le.Uint64(p[56:]), le.Uint64(p[16:]), s.dataAt(), s.Size(), ErrBroken)
	}
	if s.Size() > size {
		return s, fmt.Errorf("ring of %d bytes in %d bytes of memory: %w", s.Size(), size, ErrBroken)
	}
	return s, nil
}
