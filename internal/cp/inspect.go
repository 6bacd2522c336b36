package cp

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/space"
)

// SuperblockCopy is what a place for a copy of a superblock holds.
type SuperblockCopy struct {
	At         block.Physical
	Superblock *Superblock // nil when there is no valid one
	// Err says why nothing was decoded, or why it cannot be the pool's.
	Err error
	// Wins says that a pool which is opened now starts from it.
	Wins bool
}

// InspectSuperblocks reads all places of superblocks on device 0, whatever
// they hold, and says which of them counts: of those of the given pool, or of
// any if that is zero. It changes nothing.
func InspectSuperblocks(set *devices.Set, pool block.PoolID) ([]SuperblockCopy, error) {
	buf, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		return nil, err
	}
	defer func() { _ = hpdi.Free(buf) }()
	var copies []SuperblockCopy
	var newest uint64
	for generation := range uint64(2) {
		for _, b := range SuperblockAt(generation) {
			c := SuperblockCopy{At: block.At(0, b)}
			c.Err = set.Read(c.At, buf)
			if c.Err == nil {
				c.Superblock, c.Err = DecodeSuperblock(buf)
			}
			if c.Err == nil && pool != (block.PoolID{}) && c.Superblock.Pool != pool {
				c.Err = fmt.Errorf("it is of pool %v: %w", c.Superblock.Pool, block.ErrCorrupt)
			}
			if c.Err == nil {
				newest = max(newest, c.Superblock.Generation)
			}
			copies = append(copies, c)
		}
	}
	for i := range copies {
		c := &copies[i]
		c.Wins = c.Err == nil && c.Superblock.Generation == newest
	}
	return copies, nil
}

// JournalRecord describes a record of the metadata journal.
type JournalRecord struct {
	At     block.Physical
	Offset uint64 // virtual
	Bytes  int
	Number uint64
	Epoch  block.Epoch
	Prev   uint32 // checksum of the record before
	Sum    uint32 // of this one

	Fold bool // a fold's record, else a consistency point's
	// Of a consistency point.
	CP        block.CP
	Log       block.Seq
	Flush     oplog.DiskPos // where the flush log has to be scanned from
	Mappings  int           // blocks that were mapped, in Runs pieces
	Runs      int
	Holes     int // ranges
	Catalogue int // changes of the list of volumes
	// Of a fold.
	FoldNumber   uint64
	Taken, Freed int  // metadata blocks
	Used         bool // it belongs to the superblock that replay starts from
}

// JournalEnd says where a chain of records ends, and why.
type JournalEnd struct {
	At     block.Physical
	Offset uint64
	Number uint64 // of the record that would be next
	Why    string
	// Damage says that this is not where it ought to end: a record that
	// follows exists.
	Damage error
}

// InspectJournal follows the chain of journal records from the place that sb
// names, in a journal of so many blocks from start on, and calls fn for each.
// It changes nothing and needs nothing else of the pool. The error is of a
// device, or of fn.
func InspectJournal(set *devices.Set, sb *Superblock, start, blocks uint64, fn func(JournalRecord) error) (JournalEnd, error) {
	j := journal{set: set, pool: sb.Pool, start: start, size: blocks * block.Size}
	w := &window{j: &j}
	defer w.free()
	r := &record{}
	for j.next = sb.Journal; ; {
		f, ok, err := w.next(j.next)
		if err != nil {
			return JournalEnd{}, err
		}
		if !ok || f.decode(r) != nil {
			break
		}
		d := describe(r, sb.Fold)
		d.At, d.Offset, d.Bytes, d.Sum = j.at(f.offset), f.offset, f.n, f.sum
		if err := fn(d); err != nil {
			return JournalEnd{}, err
		}
		j.next = f.after()
	}
	end := JournalEnd{At: j.at(j.next.Offset), Offset: j.next.Offset, Number: j.next.Number}
	var err error
	if end.Why, end.Damage, err = w.whyNot(j.next); err != nil || end.Damage != nil {
		return end, err
	}
	if end.Damage = j.damaged(); end.Damage != nil && !errors.Is(end.Damage, block.ErrCorrupt) {
		return end, end.Damage
	}
	return end, nil
}

func describe(r *record, fold uint64) JournalRecord {
	d := JournalRecord{Number: r.Number, Epoch: r.Epoch, Prev: r.Prev}
	if r.Type == typeFold {
		d.Fold, d.FoldNumber, d.Used = true, r.Fold.Fold, r.Fold.Fold == fold
		d.Taken, d.Freed = blocksOf(r.Fold.Taken), blocksOf(r.Fold.Freed)
		return d
	}
	c := &r.Commit
	d.CP, d.Log, d.Flush, d.Holes, d.Runs, d.Catalogue = c.CP, c.Log, c.Flush, len(c.Holes), len(c.Runs), len(c.Catalogue)
	for i := range c.Runs {
		d.Mappings += len(c.Runs[i].Sums)
	}
	return d
}

func blocksOf(runs []space.Run) (n int) {
	for _, r := range runs {
		n += r.N
	}
	return n
}

// whyNot says why no record of the chain is at pos, and whether one ought to
// be.
func (w *window) whyNot(pos JournalPos) (why string, damage, err error) {
	off := pos.Offset % w.j.size
	b, err := w.bytes(off, block.Size)
	if err != nil {
		return "", nil, err
	}
	if _, err := ondisk.Open(b, ondisk.KindJournal, journalVersion); errors.Is(err, ondisk.ErrMagic) {
		return "no record begins there", nil, nil
	}
	n, ok := recordLength(b)
	if !ok {
		return fmt.Sprintf("what begins there claims a length of %d bytes", binary.LittleEndian.Uint32(b[12:])), nil, nil
	}
	if b, err = w.bytes(off, n); errors.Is(err, errBeyond) {
		return "what begins there claims to reach beyond the end of the journal", nil, nil
	} else if err != nil {
		return "", nil, err
	}
	f, err := openFrame(b, w.j.pool)
	if err == nil {
		err = f.decode(&record{})
	}
	switch {
	case err != nil:
		return fmt.Sprintf("the record there is not whole: %v", err), nil, nil
	case f.number() != pos.Number:
		return fmt.Sprintf("record %d is there, of an earlier lap", f.number()), nil, nil
	}
	// Records are synced one after the other: this one was made after a whole
	// predecessor.
	why = fmt.Sprintf("it follows a record with checksum %08x, and the one before it has %08x", f.prev, pos.Prev)
	return why, &block.CorruptError{What: "journal record", Where: fmt.Sprintf("device block %v, record %d", w.j.at(pos.Offset), pos.Number), Why: why}, nil
}

// FoldPages returns the metadata blocks that the last fold took and freed:
// the trees of counts do not know of them yet.
func (m *Machine) FoldPages() (taken, freed []space.Run) { return m.meta.Taken, m.meta.Freed }

// KeptFacts are what a copy of the unfolded journal in memory says of itself.
type KeptFacts struct {
	Pool       block.PoolID
	Generation uint64
	Bytes      int64  // of records that it has room for
	From, End  uint64 // virtual offsets of what it has
	Whole      bool   // the records reach to End
}

// InspectKept reads a copy of the unfolded journal, for whoever only looks, and calls fn for
// each record in it with its bytes, which are valid during the call. The error says why there is none, or is fn's.
func InspectKept(mem []byte, fn func(r JournalRecord, raw []byte) error) (KeptFacts, error) {
	var s keptState
	if err := s.newest(mem); err != nil {
		return KeptFacts{}, err
	}
	k := s.journal(mem)
	j := &journal{start: s.start, size: s.size}
	facts := KeptFacts{Pool: s.pool, Generation: s.generation, Bytes: int64(s.ring), From: s.from, End: s.end}
	pos := JournalPos{Offset: s.from}
	// Which record is the first is told by the superblock alone.
	for _, at := range [...]uint64{s.from, j.place(s.from, int(s.size))} {
		if f, ok := k.frame(at); ok {
			pos.Number, pos.Prev = f.number(), f.prev
			break
		}
	}
	r := &record{}
	for _, f := range k.frames(j, pos) {
		if f.decode(r) != nil {
			break
		}
		d := describe(r, 0)
		d.At, d.Offset, d.Bytes, d.Sum = j.at(f.offset), f.offset, f.n, f.sum
		if err := fn(d, f.raw); err != nil {
			return facts, err
		}
		pos = f.after()
	}
	facts.Whole = pos.Offset == s.end
	return facts, nil
}
