package region

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/google/uuid"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

const (
	version   = 1
	pageSize  = block.Size
	headerLen = 512

	wordsAt  = 2 * pageSize // page of the words
	firstAt  = 4 * pageSize // where sections may begin
	ownerAt  = 104
	ownerMax = 64
	tableAt  = 256
	entryLen = 24
	// maxSections leaves room for what may become advisory sections later: cache
	// frames, restart record, history.
	maxSections = 8
	// maxSize bounds a region to 16 TiB, so that no sum overflows.
	maxSize = 1 << 44
)

// Words, each in a cache line of its own.
const (
	wordHeartbeat = wordsAt + 64*iota
	wordEpoch
	wordState
	wordAnnounced
	wordCommitted0 // position, then the number of its consistency point
	wordCommitted1 // the same: they alternate
)

// SectionKind says what a section holds.
type SectionKind uint32

// The kinds of section. The log is authoritative, and there for as long as the region is;
// all others are advisory, and come and go.
const (
	SectionLog   SectionKind = 1 // operation log of the pool
	SectionIndex SectionKind = 2 // index of fingerprints
	// SectionCache is that of clean blocks.
	SectionCache SectionKind = 3
	// SectionRestart is the restart record.
	SectionRestart SectionKind = 4
	// SectionJournal is a copy of the metadata journal's records that are not folded.
	SectionJournal SectionKind = 5
	// SectionHistory is what was collected of how disks are used.
	SectionHistory SectionKind = 6
	// SectionSessions is what is known of clients that send requests again.
	SectionSessions SectionKind = 7
)

// String returns the name of the kind.
func (k SectionKind) String() string {
	switch k {
	case SectionLog:
		return "operation log"
	case SectionIndex:
		return "index of fingerprints"
	case SectionCache:
		return "cache"
	case SectionRestart:
		return "restart record"
	case SectionJournal:
		return "unfolded journal"
	case SectionHistory:
		return "history of the use of disks"
	case SectionSessions:
		return "sessions"
	}
	return fmt.Sprintf("kind %d", uint32(k))
}

// Section is a part of a region.
type Section struct {
	Kind   SectionKind
	Offset int64 // bytes from the start of the region, a multiple of 4 KiB
	Length int64 // bytes, a multiple of 4 KiB
}

// State says what the owner of a region is doing.
type State uint64

// The states of a region.
const (
	StateNew      State = iota // created, nobody serves from it yet
	StateServing               // its owner acknowledges writes from it
	StateReleased              // its owner has stopped; the log stays for the next one
	StateClean                 // its log is committed; it may be removed
)

// String returns the lower-case name of the state.
func (s State) String() string {
	switch s {
	case StateNew:
		return "new"
	case StateServing:
		return "serving"
	case StateReleased:
		return "released"
	case StateClean:
		return "clean"
	}
	return fmt.Sprintf("state(%d)", uint64(s))
}

// Header describes a region.
type Header struct {
	ID       string // random, of this region
	Pool     block.PoolID
	Owner    string // identity of the guest that owns the pool
	Epoch    block.Epoch
	BootID   string // of the host, when the region was created
	Size     int64
	Sections []Section
	Medium   Medium // where the file lies; not stored

	generation uint64
}

// roundUp returns the next multiple of unit, a power of two.
func roundUp(n, unit int64) int64 { return (n + unit - 1) &^ (unit - 1) }

// baseEnd returns where the part of a region ends that is there for as long as the
// region is. With a log of 2 MiB or more that is in whole huge pages.
func baseEnd(log Section) int64 {
	end := log.Offset + log.Length
	if end >= hugePage {
		end = roundUp(end, hugePage)
	}
	return end
}

// Fixed returns how many bytes from the start of a region are header, words and log, which
// are there for as long as the region is, and mapped in one piece.
func (h *Header) Fixed() int64 {
	end := min(baseEnd(h.Sections[0]), h.Size)
	if len(h.Sections) > 1 {
		end = min(end, h.Sections[1].Offset)
	}
	return end
}

// hasLog reports whether the region has its log there.
func (h *Header) hasLog(log Section) bool { return len(h.Sections) > 0 && h.Sections[0] == log }

// encode fills p, a page of zeroes.
func (h *Header) encode(p []byte) error {
	id, err := uuid.Parse(h.ID)
	if err != nil {
		return fmt.Errorf("region id %q: %w", h.ID, block.ErrInvalid)
	}
	boot, err := uuid.Parse(h.BootID)
	if err != nil {
		return fmt.Errorf("boot id %q: %w", h.BootID, block.ErrInvalid)
	}
	if len(h.Owner) > ownerMax || bytes.IndexByte([]byte(h.Owner), 0) >= 0 {
		return fmt.Errorf("owner %q of a region, at most %d bytes without a zero: %w", h.Owner, ownerMax, block.ErrInvalid)
	}
	if len(h.Sections) > maxSections {
		return fmt.Errorf("%d sections in a region, at most %d: %w", len(h.Sections), maxSections, block.ErrInvalid)
	}
	le := binary.LittleEndian
	le.PutUint64(p[64:], uint64(h.Size))
	copy(p[72:], id[:])
	copy(p[88:], boot[:])
	clear(p[ownerAt : ownerAt+ownerMax])
	copy(p[ownerAt:], h.Owner)
	le.PutUint32(p[168:], uint32(len(h.Sections)))
	for i, s := range h.Sections {
		e := p[tableAt+i*entryLen:]
		le.PutUint64(e, uint64(s.Offset))
		le.PutUint64(e[8:], uint64(s.Length))
		le.PutUint32(e[16:], uint32(s.Kind))
	}
	ondisk.Seal(p, ondisk.Header{
		Kind: ondisk.KindRegion, Version: version, Length: headerLen,
		Pool: h.Pool, Epoch: h.Epoch, Generation: h.generation,
	})
	return nil
}

// decode reads one copy and checks everything that can be checked without
// the file: a header it accepts describes a possible region.
func (h *Header) decode(p []byte) error {
	oh, err := ondisk.Open(p, ondisk.KindRegion, version)
	if err != nil {
		return err
	}
	if oh.Length != headerLen {
		return corrupt("header", "length %d instead of %d", oh.Length, headerLen)
	}
	le := binary.LittleEndian
	*h = Header{
		ID:         uuid.UUID(p[72:88]).String(),
		Pool:       oh.Pool,
		Epoch:      oh.Epoch,
		BootID:     uuid.UUID(p[88:104]).String(),
		generation: oh.Generation,
		Owner:      string(bytes.TrimRight(p[ownerAt:ownerAt+ownerMax], "\x00")),
	}
	size, count := le.Uint64(p[64:]), le.Uint32(p[168:])
	if size < firstAt || size > maxSize || size%pageSize != 0 {
		return corrupt("header", "size %d", size)
	}
	h.Size = int64(size)
	if count > maxSections {
		return corrupt("section table", "%d sections, at most %d", count, maxSections)
	}
	end := uint64(firstAt) // sections are in the order of their offsets
	for i := range int(count) {
		e := p[tableAt+i*entryLen:]
		off, n := le.Uint64(e), le.Uint64(e[8:])
		if off < end || off > size || n == 0 || n > size-off || off%pageSize != 0 || n%pageSize != 0 {
			return corrupt("section table", "section %d at %d of %d bytes in a region of %d", i, off, n, size)
		}
		end = off + n
		h.Sections = append(h.Sections, Section{SectionKind(le.Uint32(e[16:])), int64(off), int64(n)})
	}
	return nil
}

// decodeTwice settles on the newer whole one of the two copies in p, the
// first two pages of a region.
func (h *Header) decodeTwice(p []byte) error {
	var a, b Header
	errA, errB := a.decode(p[:pageSize]), b.decode(p[pageSize:2*pageSize])
	second, err := ondisk.Newer(errA, a.generation, errB, b.generation)
	switch {
	case err != nil:
		return err
	case errA == nil && errB == nil && a.ID != b.ID:
		return corrupt("header", "its two copies are of regions %s and %s", a.ID, b.ID)
	case second:
		*h = b
	default:
		*h = a
	}
	return nil
}

func corrupt(where, why string, args ...any) error {
	return &block.CorruptError{What: "region", Where: where, Why: fmt.Sprintf(why, args...)}
}
