package flashmap

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
)

// sheet is a block that lies at two places of the flash device: the label, a page of
// the table or of the map. The place that does not hold the newest is written first,
// and made durable: that is the change. Then the other one gets the same, so that at
// rest it does not matter which of the two decays.
type sheet struct {
	generation uint64 // of the newest; guarded by Flash.table, as all that follows
	tried      uint64 // the highest that was written, whether or not that went well
	newest     uint8  // place that holds it
	lost       bool   // neither place could be read
	behind     bool   // the other place does not hold the newest
}

// change is a sheet that is to be written anew.
type change struct {
	sheet  *sheet
	at     [2]uint64 // blocks
	encode func(p []byte, generation uint64)
}

// storeLocked makes changes durable, all in one sync: after an error any of them may
// have been made or not. At most changesAtOnce are possible.
func (f *Flash) storeLocked(flush bool, changes ...change) error {
	if err := f.sureLocked(); err != nil {
		return err
	}
	reqs := make([]*hpdi.Request, 0, len(changes)+1)
	for i, c := range changes {
		c.sheet.tried = max(c.sheet.tried, c.sheet.generation) + 1
		buf := f.page[i*block.Size:][:block.Size]
		c.encode(buf, c.sheet.tried)
		reqs = append(reqs, &hpdi.Request{Op: hpdi.OpWrite, Offset: int64(c.at[1-c.sheet.newest]) * block.Size, Vec: [][]byte{buf}})
	}
	if err := f.io.Do(reqs...); err != nil {
		return err
	}
	if flush {
		if err := f.io.Flush(); err != nil {
			return err
		}
	}
	for i, c := range changes {
		s := c.sheet
		reqs[i].Offset = int64(c.at[s.newest]) * block.Size
		s.generation, s.newest, s.behind, s.lost = s.tried, 1-s.newest, false, false
	}
	// The change is made. A place that does not take it now will be written first
	// when it changes next, or by Tidy.
	if err := f.io.Do(reqs...); err != nil {
		for _, c := range changes {
			c.sheet.behind = true
		}
		f.behind = true
		return nil
	}
	f.failure.Store(nil)
	return nil
}

// sureLocked makes durable what was read when the device was opened, unless it is. What a
// guest has left that died may be in the memory of the device only: of two places that are
// alike nobody knows which one would survive, and one is written next.
func (f *Flash) sureLocked() error {
	if f.sure {
		return nil
	}
	if err := f.io.Flush(); err != nil {
		return err
	}
	f.sure = true
	return nil
}

// changesAtOnce is how many sheets one call of storeLocked takes.
const changesAtOnce = 64

// storeAllLocked is storeLocked for any number of changes that need not be made at once.
func (f *Flash) storeAllLocked(changes []change) error {
	for len(changes) > 0 {
		n := min(len(changes), changesAtOnce)
		if err := f.storeLocked(true, changes[:n]...); err != nil {
			return err
		}
		changes = changes[n:]
	}
	return nil
}

// storeNewLocked is storeAllLocked for sheets whose places may hold what was there in
// an earlier life of theirs: both have to take what is written, durably, before
// something makes them count.
func (f *Flash) storeNewLocked(changes []change) error {
	if err := f.storeAllLocked(changes); err != nil {
		return err
	}
	for _, c := range changes {
		if c.sheet.behind {
			return fmt.Errorf("block %d or %d of device %s did not take a new page: %w", c.at[0], c.at[1], f.name, block.ErrInvalid)
		}
	}
	return f.io.Flush()
}

// tableChange is the change of a page of the table in which a slot holds k.
func (f *Flash) tableChange(n int, slot slotNumber, k key) change {
	return change{&f.table[n], f.tableAt(n), func(p []byte, generation uint64) {
		first := slotNumber(n * pageWords)
		for i := range pageWords {
			w := f.keys[first+slotNumber(i)]
			if first+slotNumber(i) == slot {
				w = k
			}
			putWord(p, i, uint64(w))
		}
		encodePage(p, ondisk.KindFlashTable, f.id, n, generation)
	}}
}

// mapChange is the change of the page of the map of a range of a primary in which a
// data set is on flash or not.
func (f *Flash) mapChange(p *primary, r int, set Set, on bool) change {
	n := p.pages[r]
	return change{&f.maps[n], f.mapAt(n), func(buf []byte, generation uint64) {
		for i := range pageWords {
			var w uint64
			if at := r*pageWords + i; at < len(p.bits) {
				w = p.bits[at].Load()
				if at == int(set/64) {
					w &^= 1 << (set % 64)
					if on {
						w |= 1 << (set % 64)
					}
				}
			}
			putWord(buf, i, w)
		}
		encodePage(buf, ondisk.KindFlashMap, f.id, n, generation)
	}}
}

// emptyMapChange is the change of a page of the map to one that nothing is in.
func (f *Flash) emptyMapChange(n int) change {
	return change{&f.maps[n], f.mapAt(n), func(p []byte, generation uint64) {
		clear(p)
		encodePage(p, ondisk.KindFlashMap, f.id, n, generation)
	}}
}

// labelChange is the change of the label to l, whose generation it sets.
func (f *Flash) labelChange(l *label) change {
	return change{&f.labelSheet, labelBlocks, func(p []byte, generation uint64) {
		l.generation = generation
		copy(p, l.encode())
	}}
}

// tableAt returns the two places of a page of the table.
func (f *Flash) tableAt(n int) [2]uint64 {
	for _, s := range f.label.segments {
		if n < s.tablePages {
			at := uint64(s.mapPages + n)
			return [2]uint64{s.start + at, s.second(f.shift) + at}
		}
		n -= s.tablePages
	}
	panic(fmt.Sprintf("flashmap: page %d of the table", n))
}

// mapAt returns the two places of a page of the map.
func (f *Flash) mapAt(n int) [2]uint64 {
	for _, s := range f.label.segments {
		if n < s.mapPages {
			return [2]uint64{s.start + uint64(n), s.second(f.shift) + uint64(n)}
		}
		n -= s.mapPages
	}
	panic(fmt.Sprintf("flashmap: page %d of the map", n))
}

// readSheets reads sheets of one kind, both places of each, and calls each with what
// the newer one holds, or with why neither is whole. Only a format that is newer than
// this program is an error.
func (f *Flash) readSheets(sheets []sheet, at func(n int) [2]uint64, decode func(n int, p []byte) (uint64, error), each func(n int, p []byte, why error)) error {
	const half = changesAtOnce / 2
	for n := 0; n < len(sheets); {
		first, k := at(n), 1
		for k < half && n+k < len(sheets) && at(n + k)[0] == first[0]+uint64(k) {
			k++
		}
		var errs [2][half]error
		for i := range 2 {
			err := f.readBlocks(first[i], f.page[i*half*block.Size:][:k*block.Size], errs[i][:k], func(i int, p []byte) (uint64, error) { return decode(n+i, p) })
			if err != nil {
				err = f.fail(err)
				f.unsettled.Store(&err) // Status tells
			}
		}
		for i := range k {
			p, why, err := choose(&sheets[n+i], first, i, f.page, errs[0][i], errs[1][i], func(p []byte) (uint64, error) { return decode(n+i, p) })
			if err != nil {
				return fmt.Errorf("flash device %s: %w", f.name, err)
			}
			each(n+i, p, why)
		}
		n += k
	}
	return nil
}

// choose decides which of the two places of a sheet holds the newest. They are the
// blocks i in the two halves of mem.
func choose(s *sheet, first [2]uint64, i int, mem []byte, err0, err1 error, decode func(p []byte) (uint64, error)) (page []byte, why, err error) {
	errs := [2]error{err0, err1}
	var pages [2][]byte
	var generations [2]uint64
	for j := range 2 {
		pages[j] = mem[(j*changesAtOnce/2+i)*block.Size:][:block.Size]
		if errs[j] == nil {
			generations[j], errs[j] = decode(pages[j])
		}
		if errs[j] != nil {
			errs[j] = fmt.Errorf("block %d: %w", first[j]+uint64(i), errs[j])
		}
		if errors.Is(errs[j], ondisk.ErrVersion) {
			return nil, nil, errs[j]
		}
	}
	*s = sheet{tried: max(generations[0], generations[1])}
	if s.generation = s.tried; s.generation == 0 {
		s.lost = true
		return nil, errors.Join(errs[:]...), nil
	}
	if generations[1] > generations[0] {
		s.newest = 1
	}
	s.behind = generations[0] != generations[1]
	return pages[s.newest], nil, nil
}

// commitLocked writes the entry of a slot and the mark of a data set durably: the slot
// holds it, or nothing when on is false. After an error it may have been done or not.
func (f *Flash) commitLocked(p *primary, set Set, slot slotNumber, on bool) error {
	var k key
	flush := !planted.Has(planted.FlashSlotReusedEarly)
	if on {
		k = keyOf(p.number, set)
		flush = !planted.Has(planted.FlashRedirectEarly)
	}
	if err := f.certainLocked(); err != nil {
		return f.failedLocked(fmt.Errorf("write the label: %w", err))
	}
	if err := f.storeLocked(flush, f.tableChange(int(slot)/pageWords, slot, k), f.mapChange(p, int(set/pageSets), set, on)); err != nil {
		return f.failedLocked(fmt.Errorf("write the table: %w", err))
	}
	return nil
}
