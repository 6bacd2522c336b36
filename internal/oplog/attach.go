package oplog

import (
	"fmt"
	"unsafe"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
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
	l := &Log{memory: memory{mem: mem}, out: mapped{unsafe.Pointer(unsafe.SliceData(mem))}}
	a := attach{Log: l}
	found, err := l.readHeader()
	if err != nil {
		return nil, fmt.Errorf("operation log: %w", err)
	}
	a.badHeader = found.bad()
	tail, err := a.cell("released position", tailCellAt)
	if err != nil {
		return nil, err
	}
	known, err := a.cell("published position", headCellAt)
	if err != nil {
		return nil, err
	}
	if err := l.checkPositions(tail, known); err != nil {
		return nil, err
	}
	l.tail.Store(uint64(tail))
	l.arena.init(l.geo.extents)
	head, err := a.walk(tail, known)
	if err != nil {
		return nil, err
	}
	l.head.Store(uint64(head))
	a.restore()
	erase(l.out, l, head, a.natural)
	l.attached = head
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
	natural   block.Seq   // the last whole record, also of a change that is not
}

// cell reads a position.
func (a *attach) cell(what string, at int) (block.Seq, error) {
	v, found, err := a.readCell(what, at)
	a.badHeader = a.badHeader || found.bad()
	return v, err
}

// walk follows the records from the tail to the first that is in neither
// ring, and makes sure that this is the end and not a hole. A tagged change that is not
// whole is behind the end.
func (a *attach) walk(tail, known block.Seq) (head block.Seq, err error) {
	end := tail + block.Seq(a.geo.slots)
	beyond := a.lastWhole(known, end)
	defer beyond() // nobody looks at the memory after Attach has returned
	var rec Record
	var change groups
	for head = tail; head < end; head++ {
		seq := head + 1
		okA, okB, same := a.both(seq, &rec)
		if !okA && !okB {
			break
		}
		if okA && okB && !same {
			return 0, damage(seq, known, "the two copies of the record differ")
		}
		if !okA || !okB {
			a.badRecord = append(a.badRecord, seq)
		}
		if err := rec.check(a.geo.extents); err != nil {
			return 0, damage(seq, known, err.Error())
		}
		if !change.next(&rec) {
			return 0, damage(seq, known, "a tag within the change of another one")
		}
		if rec.Kind == KindTag {
			a.tags++
		}
		if rec.Kind == KindWrite && !planted.Has(planted.TakeoverExtentsFree) && !a.arena.take(rec.First, int(rec.Count)) {
			return 0, damage(seq, known,
				fmt.Sprintf("extents %d+%d belong to an earlier record", rec.First, rec.Count))
		}
	}
	if head < known {
		return 0, damage(head+1, known, "both copies of the record are bad")
	}
	if last := beyond(); last > head {
		return 0, damage(head+1, last, "a whole record follows a bad one")
	}
	a.natural = head
	if head = change.whole(head); head < known {
		return 0, damage(head+1, known, "the change of a tag is not whole although it was published")
	}
	a.cut(head, a.natural)
	return head, nil
}

// both reads a record, which is whole in copy A, in B, in both or in none, and
// says whether two whole ones are the same. Nearly always the two have the same
// bytes, and then one checksum speaks for both.
func (a *attach) both(seq block.Seq, rec *Record) (okA, okB, same bool) {
	at := a.slot(seq)
	p := (*[recordSize]byte)(a.mem[a.geo.ring[0]+at:])
	q := (*[recordSize]byte)(a.mem[a.geo.ring[1]+at:])
	if okA = rec.decode(p, a.seed, seq); *p == *q {
		return okA, okA, true
	}
	var twin Record
	okB = twin.decode(q, a.seed, seq)
	same = *rec == twin
	if !okA {
		*rec = twin
	}
	return okA, okB, same
}

func damage(first, known block.Seq, why string) error {
	return &DamageError{First: first, Last: max(first, known), Why: why}
}

// restore makes both copies of everything equal again, so that the next
// death or flipped bit finds two good ones.
func (a *attach) restore() {
	for _, seq := range a.badRecord {
		if seq > a.Head() {
			continue // it is erased
		}
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
