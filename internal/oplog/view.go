package oplog

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/pollux-storage/pollux/internal/block"
)

// View is a log in memory as somebody sees it who only looks: a partner, a
// test, a person with a dead guest's region. It never stores to the memory,
// needs nobody's consent and shows what it finds, damage included; [Attach] is
// for who takes the log over.
//
// The memory may belong to a guest that is working: what a method returns was
// true at one instant during the call. Its methods may be called concurrently.
type View struct {
	memory
	// The highest positions seen; both only rise. They stand in when both
	// copies of a position are bad.
	tail, known atomic.Uint64
}

// viewTries is how often a view looks again at something of which both copies
// are bad. The owner stores one copy after the other, so a reader may be so
// unlucky to meet it at each of the two, but not time after time.
const viewTries = 64

// Header is what the header of a log says.
type Header struct {
	Pool       block.PoolID
	Epoch      block.Epoch // of the guest that appends now
	Birth      block.Epoch // of the guest that made the log
	Generation uint64      // how often the header was stored
	Extents    uint64      // blocks of payload
	Slots      uint64      // records
	Size       int64       // bytes of the section
	Start      block.Seq   // last sequence that was committed when it was made
}

// OpenView looks at the log section in mem, which is aligned to 4 KiB and may
// be read-only. It needs one good copy of the header and nothing else.
//
// Memory without a log is ondisk.ErrMagic; other errors are block.ErrCorrupt,
// block.ErrUnsupported or block.ErrInvalid.
func OpenView(mem []byte) (*View, error) {
	if err := checkMemory(mem); err != nil {
		return nil, err
	}
	v := &View{memory: memory{mem: mem}}
	err := v.retry(func() error {
		_, err := v.readHeader()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("operation log: %w", err)
	}
	v.tail.Store(uint64(v.hdr.start))
	v.known.Store(uint64(v.hdr.start))
	return v, nil
}

// retry calls look until it succeeds, or viewTries times.
func (v *View) retry(look func() error) (err error) {
	for range viewTries {
		if err = look(); err == nil {
			return nil
		}
	}
	return err
}

// Header returns what the header says now. It is an error if there is none
// any more, or that of another log.
func (v *View) Header() (Header, error) {
	now := memory{mem: v.mem}
	err := v.retry(func() error {
		_, err := now.readHeader()
		return err
	})
	if err != nil {
		return Header{}, fmt.Errorf("operation log: %w", err)
	}
	h := &now.hdr
	if h.identity != v.hdr.identity || now.geo != v.geo {
		return Header{}, corrupt("header", "another log was made in this memory since it was opened")
	}
	return Header{
		Pool: h.pool, Epoch: h.epoch, Birth: h.birth, Generation: h.generation,
		Extents: h.extents, Slots: h.slots, Size: int64(h.size), Start: h.start,
	}, nil
}

// position reads a position again. When both copies are bad it returns the
// error and the highest one that was seen before.
func (v *View) position(what string, at int, seen *atomic.Uint64) (block.Seq, error) {
	var now block.Seq
	err := v.retry(func() (err error) {
		now, _, err = v.readCell(what, at)
		return err
	})
	if err != nil {
		return block.Seq(seen.Load()), err
	}
	risen(seen, now)
	return now, nil
}

// risen keeps the highest of what was seen and returns it.
func risen(seen *atomic.Uint64, now block.Seq) block.Seq {
	for {
		old := seen.Load()
		if uint64(now) <= old {
			return block.Seq(old)
		}
		if seen.CompareAndSwap(old, uint64(now)) {
			return now
		}
	}
}

// Tail returns the position up to which records are released now. If both of
// its copies are bad, it is the lowest one that it can be; Damage says so.
func (v *View) Tail() block.Seq {
	tail, err := v.position("released position", tailCellAt, &v.tail)
	if err != nil {
		head, _ := v.position("published position", headCellAt, &v.known)
		if slots := block.Seq(v.geo.slots); head > slots {
			tail = max(tail, head-slots)
		}
	}
	return tail
}

// Head returns the position of the last published record: the stored position,
// and the records after it, which exist as soon as they are whole. It is never
// more than Slots after a tail. If the stored one is lost or impossible, it is
// where the whole records after the tail end.
func (v *View) Head() block.Seq {
	for range viewTries {
		head, err := v.position("published position", headCellAt, &v.known)
		tail := v.Tail() // second: then it is not behind the head
		if err == nil && v.checkPositions(tail, head) == nil {
			// A record that was seen beyond the stored position is there no
			// more when its slot was used again while we looked.
			return risen(&v.known, v.follow(head, tail))
		}
		if err == nil && head < tail {
			continue // published and released between the two looks
		}
		break
	}
	tail := v.Tail()
	return v.follow(tail, tail)
}

// follow goes from a record, which ends a change, to the last whole one after it that does.
func (v *View) follow(head, tail block.Seq) block.Seq {
	end := tail + block.Seq(v.geo.slots)
	var change groups
	for head < end {
		rec, c := v.copiesOf(head + 1)
		if c[0] != nil && c[1] != nil {
			break
		}
		head++
		change.next(&rec)
	}
	return change.whole(head)
}

// copiesOf reads both copies of a record. It looks at nothing else: the record
// may be released, or not published completely.
func (v *View) copiesOf(seq block.Seq) (rec Record, c copies) {
	p := new([recordSize]byte)
	for i := 1; i >= 0; i-- { // the first copy is the one that is returned
		var r Record
		// The sequence comes first, as it is stored last.
		v.load(p[:], v.geo.ring[i]+v.slot(seq))
		if !r.decode(p, v.seed, seq) {
			c[i] = errNotWhole
			continue
		}
		if i == 0 && c[1] == nil && r != rec {
			c[0] = errors.New("differs from the other copy")
		}
		rec = r
	}
	return rec, c
}

// where names the places of a record.
func (v *View) where(seq block.Seq) string {
	return fmt.Sprintf("log record %d (bytes %d and %d of the section)", seq,
		v.geo.ring[0]+v.slot(seq), v.geo.ring[1]+v.slot(seq))
}

// Get returns a record whose checksum holds. One that is released or not
// published is block.ErrNotFound, one that is lost a *DamageError.
func (v *View) Get(seq block.Seq) (Record, error) {
	rec, _, err := v.Look(seq)
	return rec, err
}

// Look is Get and also says which of the two copies is not the record: each
// names its place. Get needs only one of them.
func (v *View) Look(seq block.Seq) (rec Record, bad []error, err error) {
	var c copies
	err = v.retry(func() error {
		rec, c = v.copiesOf(seq)
		// The tail last: a slot is used again only after it has passed.
		if tail := v.Tail(); seq <= tail || uint64(seq-tail) > v.geo.slots {
			return nil
		}
		if c[0] != errNotWhole || c[1] != errNotWhole || seq > v.Head() {
			return nil
		}
		return errNotWhole // or published since we looked
	})
	if tail := v.Tail(); seq <= tail || uint64(seq-tail) > v.geo.slots {
		return Record{}, nil, fmt.Errorf("%s, released up to %d: %w", v.where(seq), tail, block.ErrNotFound)
	}
	for i, e := range c {
		if e != nil {
			bad = append(bad, fmt.Errorf("log record %d at byte %d of the section: %w",
				seq, v.geo.ring[i]+v.slot(seq), e))
		}
	}
	why := ""
	switch {
	case err == nil && seq > block.Seq(v.known.Load()) && seq > v.Head() && (c[0] == nil || c[1] == nil):
		return Record{}, nil, fmt.Errorf("%s, of a change that is not whole, published up to %d: %w", v.where(seq), v.Head(), block.ErrNotFound)
	case c[0] == errNotWhole && c[1] == errNotWhole:
		if head := v.Head(); err == nil && !v.wholeAfter(seq, head) {
			return Record{}, nil, fmt.Errorf("%s, published up to %d: %w", v.where(seq), head, block.ErrNotFound)
		}
		why = "both copies are bad"
	case c[0] != nil && c[0] != errNotWhole:
		why = "the two copies of the record differ"
	default:
		if err := rec.check(v.geo.extents); err != nil {
			why = err.Error()
		}
	}
	if why != "" {
		return Record{}, bad, &DamageError{First: seq, Last: max(seq, v.Head()), Why: v.where(seq) + ": " + why}
	}
	return rec, bad, nil
}

// wholeAfter says whether a whole record follows one that is not, after the
// head: then that one was published and is lost.
func (v *View) wholeAfter(seq, head block.Seq) bool {
	end := v.Tail() + block.Seq(v.geo.slots)
	for seq++; seq > head && seq <= end; seq++ {
		if _, c := v.copiesOf(seq); c[0] == nil || c[1] == nil {
			return v.Head() == head // else the owner went on while we looked
		}
	}
	return false
}

// Payload returns the memory of n consecutive extents, or nil if the arena
// does not have them. It must not be written to. The extents of a record are
// used again once the record is released.
func (v *View) Payload(first Extent, n int) []byte { return v.payload(first, n) }

// Damage returns what is wrong with header and positions now, each error with
// its place. A bad copy whose twin is good is what a guest leaves that dies, or
// is stopped, in the middle of a store; Attach repairs it. Only lost says that
// more than that is wrong. Records are not looked at: that is Look.
func (v *View) Damage() (bad []error, lost error) {
	var all []error
	_ = v.retry(func() error { // the owner may be storing a copy just now
		bad, all = v.damage()
		return errors.Join(errors.Join(bad...), errors.Join(all...))
	})
	return bad, errors.Join(all...)
}

func (v *View) damage() (bad, lost []error) {
	now := memory{mem: v.mem}
	note := func(what string, at int, c copies, err error) {
		for i, e := range c {
			if e != nil {
				bad = append(bad, fmt.Errorf("%s of the operation log, copy at byte %d of the section: %w",
					what, v.geo.header[i]+at, e))
			}
		}
		if err != nil {
			lost = append(lost, err)
		}
	}
	c, err := now.readHeader()
	note("header", 0, c, err)
	tail, c, err := v.readCell("released position", tailCellAt)
	note("released position", tailCellAt, c, err)
	head, c, err2 := v.readCell("published position", headCellAt)
	note("published position", headCellAt, c, err2)
	if err == nil && err2 == nil {
		if err := v.checkPositions(tail, head); err != nil {
			lost = append(lost, err)
		}
	}
	return bad, lost
}
