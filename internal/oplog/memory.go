package oplog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// memory is a section of memory that holds a log, and what its header said when it was
// looked at. Its methods only read. Header and positions are taken out of
// memory by whole words first: another process may be storing there.
type memory struct {
	mem  []byte
	geo  geometry
	hdr  logHeader
	seed uint32
}

// copies is the finding about the two copies of a header, position or record:
// why each is not what it should be, nil for a good one.
type copies [2]error

func (c *copies) bad() bool { return c[0] != nil || c[1] != nil }

// errStale is the finding about a copy that is whole and older than its twin.
var errStale = errors.New("older than the other copy")

// errNotWhole is the finding about a copy whose checksum does not hold.
var errNotWhole = errors.New("checksum does not hold")

// load copies the len(p) bytes from off on out of memory, the first word
// first. off and len(p) are multiples of 8.
func (s *memory) load(p []byte, off int) {
	mem := s.mem[off : off+len(p)]
	for i := 0; i < len(p); i += 8 {
		w := atomic.LoadUint64((*uint64)(unsafe.Pointer(unsafe.SliceData(mem[i:]))))
		binary.NativeEndian.PutUint64(p[i:], w)
	}
}

// readHeader reads both header pages and settles on the newer whole one.
func (s *memory) readHeader() (copies, error) {
	var h [2]logHeader
	var c copies
	at := [2]int{0, len(s.mem) - pageSize}
	for i, off := range at {
		var p [logHeaderLen]byte
		s.load(p[:], off)
		c[i] = h[i].decode(p[:])
		if c[i] == nil {
			c[i] = s.checkGeometry(&h[i])
		}
	}
	switch {
	case c[0] != nil && c[1] != nil:
		if errors.Is(c[0], ondisk.ErrMagic) {
			return c, c[1]
		}
		return c, c[0]
	case c[0] == nil && c[1] == nil && h[0].identity != h[1].identity:
		return c, corrupt("header", "its two copies belong to different logs")
	}
	pick := 0
	if c[0] != nil || c[1] == nil && h[1].generation > h[0].generation {
		pick = 1
	}
	s.hdr = h[pick]
	if c[1-pick] == nil && h[0] != h[1] {
		c[1-pick] = errStale
	}
	s.geo = geometryFor(s.hdr.extents, len(s.mem))
	s.seed = s.hdr.seed()
	return c, nil
}

// checkGeometry refuses a header whose parts do not lie within the memory.
func (s *memory) checkGeometry(h *logHeader) error {
	if h.extents < 1 || h.extents > maxExtents || h.slots != slotsFor(h.extents) ||
		h.size != uint64(len(s.mem)) ||
		SectionSize(int64(h.extents)*block.Size) > int64(len(s.mem)) {
		return corrupt("header", fmt.Sprintf("%d extents, %d slots, %d bytes in memory of %d bytes",
			h.extents, h.slots, h.size, len(s.mem)))
	}
	return nil
}

// readCell reads a position. Positions only rise, so of two whole copies the
// higher one is newer.
func (s *memory) readCell(what string, at int) (v block.Seq, c copies, err error) {
	for i, page := range s.geo.header {
		var p [16]byte
		s.load(p[:], page+at)
		x, ok := cellDecode(p[:], s.seed, at)
		switch {
		case !ok:
			c[i] = errNotWhole
		case i == 1 && c[0] == nil && x < v:
			c[1] = errStale
		case i == 1 && c[0] == nil && x > v:
			c[0] = errStale
			v = x
		default:
			v = x
		}
	}
	if c[0] == errNotWhole && c[1] == errNotWhole {
		return 0, c, corrupt(what, "both copies are bad")
	}
	return v, c, nil
}

// checkPositions refuses positions that cannot be, without a sum that could
// overflow.
func (s *memory) checkPositions(tail, head block.Seq) error {
	if tail < s.hdr.start || head < tail || uint64(head-tail) > s.geo.slots ||
		uint64(tail) > ^uint64(0)-2*s.geo.slots {
		return corrupt("positions", fmt.Sprintf("start %d, released %d, published %d, slots %d",
			s.hdr.start, tail, head, s.geo.slots))
	}
	return nil
}

// slot returns the place of a record in a ring, in bytes.
func (s *memory) slot(seq block.Seq) int { return int(uint64(seq)%s.geo.slots) * recordSize }

// read decodes copy c of a record where it lies: only for memory in which
// nobody else stores records. It is on the way of every release.
func (s *memory) read(c int, seq block.Seq, rec *Record) bool {
	at := s.geo.ring[c] + s.slot(seq)
	return rec.decode((*[recordSize]byte)(s.mem[at:]), s.seed, seq)
}

// payload returns the memory of n consecutive extents, nil if the arena does
// not have them.
func (s *memory) payload(first Extent, n int) []byte {
	if n < 0 || uint64(first)+uint64(n) > s.geo.extents {
		return nil
	}
	from := s.geo.arena + int(first)*block.Size
	to := from + n*block.Size
	return s.mem[from:to:to]
}

// VerifyPayload returns the blocks of rec, counted from 0, whose payload is
// not what was published, or nil.
func (s *memory) VerifyPayload(rec *Record) (bad []int) {
	if rec.Kind != KindWrite {
		return nil
	}
	for i := range min(int(rec.Count), MaxRecordBlocks) {
		p := s.payload(rec.First+Extent(i), 1)
		if p == nil || ondisk.CRC(p) != rec.CRC[i] {
			bad = append(bad, i)
		}
	}
	return bad
}
