package oplog

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// Attach opens the log that a guest left in mem: it finds the end of the log
// and rebuilds the allocator. It trusts nothing in mem. It writes only when
// the log is whole, and then only to restore a copy from its twin; so mem must
// be writable and its former owner fenced.
//
// Memory without a log is ondisk.ErrMagic; a log that has lost records is a
// *DamageError; a log that cannot be read at all another block.ErrCorrupt.
func Attach(mem []byte) (*Log, error) {
	if err := checkMemory(mem); err != nil {
		return nil, err
	}
	l := &Log{mem: mem, out: mapped{unsafe.Pointer(unsafe.SliceData(mem))}}
	a := attach{Log: l}
	if err := a.header(); err != nil {
		return nil, fmt.Errorf("operation log: %w", err)
	}
	tail, err := a.cell("released position", tailCellAt)
	if err != nil {
		return nil, err
	}
	known, err := a.cell("published position", headCellAt)
	if err != nil {
		return nil, err
	}
	// Computed without a sum that could overflow.
	if tail < l.hdr.start || known < tail || uint64(known-tail) > l.geo.slots ||
		uint64(tail) > ^uint64(0)-2*l.geo.slots {
		return nil, corrupt("positions", fmt.Sprintf("start %d, released %d, published %d, slots %d",
			l.hdr.start, tail, known, l.geo.slots))
	}
	l.tail.Store(uint64(tail))
	l.arena.init(l.geo.extents)
	head, err := a.walk(tail, known)
	if err != nil {
		return nil, err
	}
	l.head.Store(uint64(head))
	a.restore()
	return l, nil
}

func corrupt(where, why string) error {
	return &block.CorruptError{What: "operation log", Where: where, Why: why}
}

// attach is the state of one Attach.
type attach struct {
	*Log
	badHeader bool        // a copy of header or positions is to be restored
	badRecord []block.Seq // one copy of each is to be restored
}

// header reads both header pages and settles on the newer whole one.
func (a *attach) header() error {
	var h [2]logHeader
	var errs [2]error
	at := [2]int{0, len(a.mem) - pageSize}
	for c, p := range at {
		errs[c] = h[c].decode(a.mem[p : p+pageSize])
		if errs[c] == nil {
			errs[c] = a.checkGeometry(&h[c])
		}
	}
	switch {
	case errs[0] != nil && errs[1] != nil:
		if errors.Is(errs[0], ondisk.ErrMagic) {
			return errs[1]
		}
		return errs[0]
	case errs[0] != nil:
		a.hdr = h[1]
	case errs[1] != nil || h[0].generation >= h[1].generation:
		a.hdr = h[0]
	default:
		a.hdr = h[1]
	}
	if errs[0] == nil && errs[1] == nil && h[0].identity != h[1].identity {
		return corrupt("header", "its two copies belong to different logs")
	}
	a.badHeader = errs[0] != nil || errs[1] != nil || h[0] != h[1]
	a.geo = geometryFor(a.hdr.extents, len(a.mem))
	a.seed = a.hdr.seed()
	return nil
}

// checkGeometry refuses a header whose parts do not lie within the memory.
func (a *attach) checkGeometry(h *logHeader) error {
	if h.extents < 1 || h.extents > maxExtents || h.slots != slotsFor(h.extents) ||
		h.size != uint64(len(a.mem)) ||
		SectionSize(int64(h.extents)*block.Size) > int64(len(a.mem)) {
		return corrupt("header", fmt.Sprintf("%d extents, %d slots, %d bytes in memory of %d bytes",
			h.extents, h.slots, h.size, len(a.mem)))
	}
	return nil
}

// cell reads a position. Positions only rise, so of two whole copies the
// higher one is newer.
func (a *attach) cell(what string, at int) (block.Seq, error) {
	x, okX := cellDecode(a.mem[a.geo.header[0]+at:], a.seed, at)
	y, okY := cellDecode(a.mem[a.geo.header[1]+at:], a.seed, at)
	if !okX && !okY {
		return 0, corrupt(what, "both copies are bad")
	}
	a.badHeader = a.badHeader || !okX || !okY || x != y
	if okX && (!okY || x >= y) {
		return x, nil
	}
	return y, nil
}

// walk follows the records from the tail to the first that is in neither
// ring, and makes sure that this is the end and not a hole.
func (a *attach) walk(tail, known block.Seq) (head block.Seq, err error) {
	end := tail + block.Seq(a.geo.slots)
	for head = tail; head < end; head++ {
		seq := head + 1
		var rec, twin Record
		okA, okB := a.read(0, seq, &rec), a.read(1, seq, &twin)
		if !okA && !okB {
			break
		}
		if okA && okB && rec != twin {
			return 0, damage(seq, known, "the two copies of the record differ")
		}
		if !okA {
			rec = twin
		}
		if !okA || !okB {
			a.badRecord = append(a.badRecord, seq)
		}
		if err := rec.check(a.geo.extents); err != nil {
			return 0, damage(seq, known, err.Error())
		}
		if rec.Kind == KindWrite && !a.arena.take(rec.First, int(rec.Count)) {
			return 0, damage(seq, known,
				fmt.Sprintf("extents %d+%d belong to an earlier record", rec.First, rec.Count))
		}
	}
	if head < known {
		return 0, damage(head+1, known, "both copies of the record are bad")
	}
	var rec Record
	for seq := head + 2; seq <= end; seq++ {
		if a.read(0, seq, &rec) || a.read(1, seq, &rec) {
			return 0, damage(head+1, seq, "a whole record follows a bad one")
		}
	}
	return head, nil
}

func damage(first, known block.Seq, why string) error {
	return &DamageError{First: first, Last: max(first, known), Why: why}
}

// restore makes both copies of everything equal again, so that the next
// death or flipped bit finds two good ones.
func (a *attach) restore() {
	for _, seq := range a.badRecord {
		var rec Record
		var p [recordSize]byte
		good := 0
		if !a.read(0, seq, &rec) {
			good = 1
		}
		copy(p[:], a.mem[a.geo.ring[good]+a.slot(seq):])
		storeRecord(a.out, a.geo.ring[1-good]+a.slot(seq), &p)
		a.repaired++
	}
	if a.badHeader {
		storeHeader(a.out, &a.geo, &a.hdr)
		a.repaired++
	}
	storeCell(a.out, &a.geo, tailCellAt, a.Tail(), a.seed)
	storeCell(a.out, &a.geo, headCellAt, a.Head(), a.seed)
}
