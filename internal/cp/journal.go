package cp

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
)

// errJournalFull says that a fold has to free journal space first.
var errJournalFull = errors.New("metadata journal is full")

// journal is a circular area of device 0. Positions are virtual and only rise;
// a record that would cross the end of the area starts at its beginning.
//
//	tail <= head <= tail + size
type journal struct {
	set   *devices.Set
	pool  block.PoolID
	start uint64 // first block of the area on device 0
	size  uint64 // bytes
	tail  uint64 // virtual; everything before it is folded
	next  JournalPos
}

// place returns where a record of n bytes goes that follows offset.
func (j *journal) place(offset uint64, n int) uint64 {
	if in := offset % j.size; in+uint64(n) > j.size {
		offset += j.size - in
	}
	return offset
}

func (j *journal) at(offset uint64) block.Physical {
	return block.At(0, j.start+offset%j.size/block.Size)
}

// roomForCommit reports whether a commit of n bytes may be appended. Commits
// take at most three eighths of the area, so that the record of the fold that
// frees them, which lists at most about as many pages as they have mappings,
// always fits, wherever the end of the area lies.
func (j *journal) roomForCommit(n int) bool {
	return j.place(j.next.Offset, n)+uint64(n)-j.tail <= j.size*3/8
}

// used returns how much of the area records take that are not folded.
func (j *journal) used() uint64 { return j.next.Offset - j.tail }

// prepare encodes r as the next record.
func (j *journal) prepare(r *record) (buf []byte, offset uint64, err error) {
	r.Number, r.Prev = j.next.Number, j.next.Prev
	enc := r.encode(j.pool)
	offset = j.place(j.next.Offset, len(enc))
	if offset+uint64(len(enc)) > j.tail+j.size {
		return nil, 0, errJournalFull
	}
	// Direct I/O wants aligned memory.
	if buf, err = hpdi.Alloc(len(enc)); err != nil {
		return nil, 0, err
	}
	copy(buf, enc)
	return buf, offset, nil
}

// append writes r as the next record and syncs all devices. After an error
// that is not errJournalFull it is unknown whether the record exists, and
// nothing may be appended any more.
func (j *journal) append(r *record) error {
	buf, offset, err := j.prepare(r)
	if err != nil {
		return err
	}
	defer func() { _ = hpdi.Free(buf) }()
	if err := j.set.Do([]*devices.IO{{Op: hpdi.OpWrite, At: j.at(offset), Vec: [][]byte{buf}}}); err != nil {
		return fmt.Errorf("write journal record %d: %w", r.Number, err)
	}
	if !planted.Has(planted.RecordSyncMissing) {
		if err := j.set.Sync(); err != nil {
			return fmt.Errorf("journal record %d: %w", r.Number, err)
		}
	}
	j.next = JournalPos{Offset: offset + uint64(len(buf)), Number: r.Number + 1, Prev: ondisk.CRC(buf)}
	return nil
}

// How much of the journal is read at once: little at first, twice as much each
// time that what follows is wanted, and at most so much. Most replays are short,
// and whoever takes over waits for them.
const (
	scanFirst = 256 << 10
	scanMost  = 4 << 20
)

// replay calls fn with every record from pos on, and leaves the journal ready
// to append after the last one. It ends at the first record that is not there
// or not whole, which a power cut explains, unless a later record proves that
// it had been: then the journal is damaged.
func (j *journal) replay(pos JournalPos, fn func(*record) error) error {
	j.tail, j.next = pos.Offset, pos
	w := &window{j: j}
	defer w.free()
	for {
		r, offset, n, sum, err := w.record(j.next)
		if err != nil {
			return err
		}
		if r == nil {
			break
		}
		if err := fn(r); err != nil {
			return err
		}
		j.next = JournalPos{Offset: offset + uint64(n), Number: r.Number + 1, Prev: sum}
	}
	return nil
}

// damaged looks for a record that follows the end that replay found, or that
// should be the next and does not continue the chain, and returns an error if
// one exists. No crash leaves one: a record is begun when the one before is
// durable. It reads the whole area.
func (j *journal) damaged() error {
	w := &window{j: j}
	defer w.free()
	for off := uint64(0); off < j.size; off += block.Size {
		b, err := w.bytes(off, block.Size)
		if err != nil {
			return err
		}
		if _, err := ondisk.Open(b, ondisk.KindJournal, journalVersion); errors.Is(err, ondisk.ErrMagic) {
			continue
		}
		r, _, _, err := w.decode(off)
		if err != nil {
			return err
		}
		switch where := fmt.Sprintf("device block %v, record %d", j.at(j.next.Offset), j.next.Number); {
		case r == nil || r.Number < j.next.Number:
		case r.Number == j.next.Number:
			return &block.CorruptError{What: "journal record", Where: where, Why: "it does not continue the record before it, which was changed since"}
		default:
			return &block.CorruptError{What: "journal record", Where: where, Why: fmt.Sprintf("it is unreadable although record %d exists", r.Number)}
		}
	}
	return nil
}

// window is a piece of the journal in memory.
type window struct {
	j    *journal
	buf  []byte
	from uint64 // offset in the area
	n    uint64
}

func (w *window) free() { _ = hpdi.Free(w.buf) }

// errBeyond says that bytes were asked for which the area does not have.
var errBeyond = errors.New("beyond the journal")

// bytes returns n bytes of the area from offset off on.
func (w *window) bytes(off uint64, n int) ([]byte, error) {
	if off+uint64(n) > w.j.size {
		return nil, errBeyond
	}
	if off < w.from || off+uint64(n) > w.from+w.n {
		chunk := scanFirst
		if off > w.from && off <= w.from+w.n {
			chunk = min(2*int(w.n), scanMost)
		}
		need := max(n, chunk)
		if len(w.buf) < need {
			w.free()
			var err error
			if w.buf, err = hpdi.Alloc(need); err != nil {
				w.buf, w.n = nil, 0
				return nil, err
			}
		}
		w.from, w.n = off, min(uint64(need), w.j.size-off)
		if err := w.j.set.Do([]*devices.IO{{Op: hpdi.OpRead, At: w.j.at(off), Vec: [][]byte{w.buf[:w.n]}}}); err != nil {
			w.n = 0
			return nil, err
		}
	}
	return w.buf[off-w.from:][:n], nil
}

// decode returns the record at offset off of the area, nil if no whole one is
// there. A device that cannot be read is an error: what it hides may exist.
func (w *window) decode(off uint64) (r *record, n int, sum uint32, err error) {
	b, err := w.bytes(off, block.Size)
	if err != nil {
		return nil, 0, 0, err
	}
	n, ok := recordLength(b)
	if !ok {
		return nil, 0, 0, nil
	}
	switch b, err = w.bytes(off, n); {
	case errors.Is(err, errBeyond):
		return nil, 0, 0, nil
	case err != nil:
		return nil, 0, 0, err
	}
	switch r, n, err = decodeRecord(b, w.j.pool); {
	case errors.Is(err, ondisk.ErrVersion):
		return nil, 0, 0, err
	case err != nil:
		return nil, 0, 0, nil
	}
	return r, n, ondisk.CRC(b[:n]), nil
}

// record returns the record that belongs at pos: right there, or at the start
// of the area when it did not fit before the end; nil if there is none.
func (w *window) record(pos JournalPos) (r *record, offset uint64, n int, sum uint32, err error) {
	for _, offset := range []uint64{pos.Offset, w.j.place(pos.Offset, int(w.j.size))} {
		r, n, sum, err := w.decode(offset % w.j.size)
		if err != nil {
			return nil, 0, 0, 0, err
		}
		if planted.Has(planted.JournalChainUnchecked) && r != nil && offset == pos.Offset && offset < w.j.tail+w.j.size {
			return r, offset, n, sum, nil
		}
		if r != nil && r.Number == pos.Number && r.Prev == pos.Prev {
			return r, offset, n, sum, nil
		}
	}
	return nil, 0, 0, 0, nil
}
