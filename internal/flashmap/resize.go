package flashmap

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// number returns the number of the slot that has n others before it; none if there
// are no more.
func (l *label) number(n int) slotNumber {
	first := 0
	for _, s := range l.segments {
		if n < s.slots {
			return slotNumber(first + n)
		}
		n -= s.slots
		first += s.tablePages * pageWords
	}
	return none
}

// setLimit lets slots be filled whose numbers are less.
func (f *Flash) setLimit(limit slotNumber) {
	f.slotsMu.Lock()
	defer f.slotsMu.Unlock()
	f.limit, f.free = limit, 0
	for i := f.taken.Gap(0); i >= 0 && slotNumber(i) < limit; i = f.taken.Gap(i + 1) {
		f.free++
	}
}

// Evacuation moves data sets back to their primaries until only the first slots are
// filled, or none. It is a machine of steps that whoever calls Step drives.
type Evacuation struct {
	f     *Flash
	limit slotNumber
	next  int
	move  *Move
	total int
}

// Evacuate begins to move all data sets back but those in the first keep slots. From
// now on other slots are not filled; Cancel undoes that.
func (f *Flash) Evacuate(keep int) *Evacuation {
	f.tableLock.Lock()
	limit := f.label.number(max(0, keep))
	f.tableLock.Unlock()
	f.setLimit(limit)
	e := &Evacuation{f: f, limit: limit, next: int(limit)}
	e.total = e.Left()
	return e
}

// Total returns how many data sets were to be moved when it began.
func (e *Evacuation) Total() int { return e.total }

// Left returns how many data sets are left to be moved, those that are lost included.
func (e *Evacuation) Left() (n int) {
	e.f.tableLock.Lock()
	defer e.f.tableLock.Unlock()
	for i := int(e.limit); i < len(e.f.keys); i++ {
		if e.f.keys[i] != 0 {
			n++
		}
	}
	return n
}

// Step does a bounded part of the evacuation, as Move.Step does. When Done comes with
// an error, data sets are left that cannot be moved. A data set whose copies differ is
// an error each time its turn comes.
func (e *Evacuation) Step() (Progress, error) {
	if e.move == nil {
		slot, k := e.following()
		if slot < 0 {
			if n := e.Left(); n > 0 {
				return Done, fmt.Errorf("%d data sets remain on flash device %s: %w", n, e.f.name, ErrLost)
			}
			return Done, nil
		}
		m, err := e.f.MoveOut(k.primary(), k.set())
		if errors.Is(err, ErrBusy) || errors.Is(err, errNotThere) {
			return Waiting, nil // somebody else moves it
		}
		if err != nil {
			return Waiting, err
		}
		e.move = m
	}
	p, err := e.move.Step()
	if errors.Is(err, ErrCopiesDiffer) {
		// Others can be moved meanwhile; it has its turn again after them.
		if e.move.Cancel() == nil {
			e.move = nil
		}
		return Moving, err
	}
	if err == nil && p == Done {
		e.move, p = nil, Moving
	}
	return p, err
}

// following returns the next slot that is to be emptied, and what is in it; -1 if there
// is none. The last one is followed by the first, because some may be on the move.
func (e *Evacuation) following() (int, key) {
	f := e.f
	f.tableLock.Lock()
	defer f.tableLock.Unlock()
	n := len(f.keys) - int(e.limit)
	for range max(0, n) {
		if e.next++; e.next >= len(f.keys) {
			e.next = int(e.limit)
		}
		if k := f.keys[e.next]; k != 0 && f.lookup(k) == slotNumber(e.next) {
			return e.next, k
		}
	}
	return -1, 0
}

// Cancel ends the evacuation where it is. Slots are filled again.
func (e *Evacuation) Cancel() error {
	e.f.setLimit(none)
	if e.move == nil {
		return nil
	}
	return e.move.Cancel()
}

// Shrink makes the flash device one of its first slots, keep of them at least one,
// after an evacuation of the others has ended. What lies behind End can then be cut
// off the device.
func (f *Flash) Shrink(keep int) error {
	f.tableLock.Lock()
	defer f.tableLock.Unlock()
	limit := f.label.number(keep)
	l := f.label.clone()
	switch {
	case keep < 1 || limit == none:
		return fmt.Errorf("shrink flash device %s from %d to %d slots: %w", f.name, l.slots(), keep, block.ErrInvalid)
	case f.readOnly:
		return fmt.Errorf("shrink flash device %s: %w", f.name, hpdi.ErrReadOnly)
	case f.lostPages.Load() > 0:
		return fmt.Errorf("shrink flash device %s, of which pages of the table are lost: %w", f.name, ErrLost)
	}
	if !f.reserve(limit) {
		return fmt.Errorf("shrink flash device %s to %d slots: others are in use; evacuate them first: %w", f.name, keep, ErrBusy)
	}
	l.cut(keep)
	if err := f.moveSecondsLocked(&l); err != nil {
		return f.failedLocked(fmt.Errorf("shrink it: %w", err))
	}
	if err := f.storeLabelLocked(l); err != nil {
		return f.failedLocked(fmt.Errorf("shrink it: %w", err))
	}
	return nil
}

// reserve takes all slots from a number on for good, and returns false if one of them
// is in use.
func (f *Flash) reserve(from slotNumber) bool {
	f.slotsMu.Lock()
	defer f.slotsMu.Unlock()
	for i := int(from); i < len(f.keys); i++ {
		if f.label.valid(slotNumber(i)) && f.taken.Has(i) {
			return false
		}
	}
	for i := int(from); i < len(f.keys); i++ {
		if f.label.valid(slotNumber(i)) {
			f.taken.Set(i)
			if slotNumber(i) < f.limit {
				f.free--
			}
		}
	}
	return true
}

// cut leaves the first keep slots. Segments stay, because of their pages of the map,
// unless nothing uses those.
func (l *label) cut(keep int) {
	last := 0
	for i := range l.segments {
		s := &l.segments[i]
		s.slots = min(s.slots, keep)
		keep -= s.slots
		first := 0
		for _, before := range l.segments[:i] {
			first += before.mapPages
		}
		used := s.slots > 0
		for _, r := range l.runs {
			used = used || r.page < first+s.mapPages && first < r.page+r.count
		}
		if used {
			last = i
		}
	}
	l.segments = l.segments[:last+1]
}

// moveSecondsLocked writes the second copies of all pages to where a label that is to
// be written has them, and the first ones where only the second are the newest: then
// both labels are right.
func (f *Flash) moveSecondsLocked(l *label) error {
	mapPage, tablePage := 0, 0
	for i, s := range l.segments {
		from := f.label.segments[i]
		mapFirst, tableFirst := mapPage, tablePage
		mapPage, tablePage = mapPage+s.mapPages, tablePage+s.tablePages
		if from.slots == s.slots {
			continue
		}
		for n := range s.mapPages + s.tablePages {
			c := f.tableChange(tableFirst+max(0, n-s.mapPages), none, 0)
			if n < s.mapPages {
				c = f.mapPageChange(mapFirst + n)
			}
			if err := f.copySheetLocked(c, s.second(l.shift)+uint64(n)); err != nil {
				return err
			}
		}
	}
	return f.io.Flush()
}

// copySheetLocked writes a sheet as it is to another place.
func (f *Flash) copySheetLocked(c change, to uint64) error {
	buf := f.page[:block.Size]
	c.encode(buf, max(1, c.sheet.generation))
	if c.sheet.newest == 1 {
		if err := f.io.Do(&hpdi.Request{Op: hpdi.OpWrite, Offset: int64(c.at[0]) * block.Size, Vec: [][]byte{buf}}); err != nil {
			return err
		}
	}
	return f.io.Do(&hpdi.Request{Op: hpdi.OpWrite, Offset: int64(to) * block.Size, Vec: [][]byte{buf}})
}

// mapPageChange is the change of a page of the map to what it is.
func (f *Flash) mapPageChange(n int) change {
	for _, p := range f.primaries {
		for r := 0; p != nil && r < len(p.pages); r++ {
			if p.pages[r] == n {
				return f.mapChange(p, r, Set(len(p.bits)*64), false)
			}
		}
	}
	return f.emptyMapChange(n)
}

// End returns how many bytes of the device are in use, from its front.
func (f *Flash) End() int64 {
	f.tableLock.Lock()
	defer f.tableLock.Unlock()
	return int64(f.label.end()) * block.Size
}

// grown returns the segment that a device of so many bytes has room for which has
// grown.
func (l *label) grown(size int64) (segment, bool) {
	per := uint64(1) << (l.shift - block.Shift)
	start := (l.end() + per - 1) / per * per
	end := uint64(size) / block.Size
	if end <= start {
		return segment{}, false
	}
	s := fit(start, end, rangesOf(Set(64*(end-start)/per)), l.shift)
	return s, s.slots > 0 && len(l.segments) < maxSegments
}

// Grow makes use of what the device has grown by, since the flash device was created
// or has grown last. It returns how many slots there are more.
func (f *Flash) Grow() (slots int, err error) {
	f.tableLock.Lock()
	defer f.tableLock.Unlock()
	s, ok := f.label.grown(f.info.Size)
	switch {
	case !ok:
		return 0, nil
	case f.readOnly:
		return 0, fmt.Errorf("grow flash device %s: %w", f.name, hpdi.ErrReadOnly)
	case len(f.table) > f.label.tablePages() || len(f.maps) > f.label.mapPages():
		return 0, fmt.Errorf("grow flash device %s, which has shrunk or failed to grow: open it anew first: %w", f.name, block.ErrInvalid)
	}
	before, l := f.label, f.label.clone()
	l.segments = append(l.segments, s)
	maps, table := len(f.maps), len(f.table)
	f.lockAll()
	f.label = l
	f.extend()
	f.unlockAll()
	if err = f.storeNewLocked(f.segmentChanges(maps, table)); err == nil {
		err = f.storeLabelLocked(l)
	}
	if err != nil {
		// Its slots are taken, and are never asked for.
		f.lockAll()
		f.label = before
		f.unlockAll()
		return 0, f.failedLocked(fmt.Errorf("grow it: %w", err))
	}
	for i := table * pageWords; i < len(f.keys); i++ {
		if f.label.valid(slotNumber(i)) {
			f.release(slotNumber(i))
		}
	}
	return s.slots, nil
}
