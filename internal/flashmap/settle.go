package flashmap

import (
	"fmt"

	"github.com/pollux-storage/pollux/internal/planted"
)

// settleLocked makes table and map one after they were read: a data set is on flash
// when both say so. Where only one does, a move was interrupted, and the primary has
// what the slot has. It is part of opening the flash device: nobody uses it yet.
func (f *Flash) settleLocked() {
	dirtyTable, dirtyMap := map[int]bool{}, map[int]bool{}
	for n := range f.table {
		dirtyTable[n] = f.table[n].behind && !f.table[n].lost
	}
	for _, p := range f.primaries {
		for r := 0; p != nil && r < len(p.pages); r++ {
			dirtyMap[p.pages[r]] = f.maps[p.pages[r]].behind
		}
		for _, r := range p.unknownRanges() {
			dirtyMap[p.pages[r]] = true
		}
	}
	f.placeLocked(dirtyTable)
	for _, p := range f.primaries {
		if p != nil {
			f.loseLocked(p, dirtyMap)
		}
	}
	f.countLocked()
	if f.readOnly {
		return
	}
	f.sure = planted.Has(planted.FlashTableUnsure)
	f.owed.label, f.owed.table, f.owed.maps = f.labelSheet.behind, dirtyTable, dirtyMap
	if err := f.makeOneLocked(); err != nil && f.unsettled.CompareAndSwap(nil, &err) { // Status tells
		f.again = true // Tidy tries
	}
	f.label.generation = f.labelSheet.generation
}

// makeOneLocked writes what the device has to be told for its table to say no more than
// counts: that would be believed once a data set is moved again.
func (f *Flash) makeOneLocked() error {
	if err := f.sureLocked(); err != nil {
		return f.fail(fmt.Errorf("make its table durable: %w", err))
	}
	var changes []change
	if f.owed.label {
		l := f.label
		changes = append(changes, f.labelChange(&l))
	}
	for n := range f.table {
		if f.owed.table[n] {
			changes = append(changes, f.tableChange(n, none, 0))
		}
	}
	for _, p := range f.primaries {
		for r := 0; p != nil && r < len(p.pages); r++ {
			if f.owed.maps[p.pages[r]] {
				changes = append(changes, f.mapChange(p, r, Set(len(p.bits)*64), false))
			}
		}
	}
	if err := f.storeAllLocked(changes); err != nil {
		return f.fail(fmt.Errorf("make its table one: %w", err))
	}
	return nil
}

func (p *primary) unknownRanges() []int {
	if p == nil {
		return nil
	}
	return p.unknown
}

// placeLocked puts data sets into the index. Entries that the map does not confirm
// are dropped.
func (f *Flash) placeLocked(dirty map[int]bool) {
	twice := map[key]bool{}
	for slot, k := range f.keys {
		if k == 0 {
			continue
		}
		p := f.primaries[k.primary()]
		switch {
		case p.has(k.set()):
		case p.isUnknown(k.set()):
			p.put(k.set())
		default:
			f.keys[slot] = 0
			dirty[slot/pageWords] = true
			continue
		}
		s, h := f.stripeOf(hash(k)), hash(k)
		if twice[k] {
			continue
		}
		if other := s.findLocked(f.keys, k, h); other != none {
			// Nobody can tell which is right: the data set is lost, and both slots stay
			// as they are.
			s.removeLocked(f.keys, other)
			twice[k] = true
			continue
		}
		s.insertLocked(f.keys, slotNumber(slot))
	}
	f.twice = twice
}

// isUnknown reports whether the page of the map that would name a data set is lost.
func (p *primary) isUnknown(set Set) bool {
	for _, r := range p.unknown {
		if r == int(set/pageSets) {
			return true
		}
	}
	return false
}

// loseLocked finds the data sets of a primary that the map names and no entry does.
// Their entries are lost if a page of the table is, and were never made or are
// removed already if none is.
func (f *Flash) loseLocked(p *primary, dirty map[int]bool) {
	lost := f.lostPages.Load() > 0
	if lost {
		// Any data set of a range of which nothing is known may have had an entry.
		for _, r := range p.unknown {
			for set := Set(r * pageSets); set < min(p.sets, Set((r+1)*pageSets)); set++ {
				p.put(set)
			}
		}
		return
	}
	for i := p.bits.Next(0); i >= 0; i = p.bits.Next(i + 1) {
		k := keyOf(p.number, Set(i))
		if !f.twice[k] && f.lookup(k) == none {
			p.drop(Set(i))
			dirty[p.pages[i/pageSets]] = true
		}
	}
}

// countLocked finds the free slots.
func (f *Flash) countLocked() {
	f.slotsMu.Lock()
	defer f.slotsMu.Unlock()
	for slot := range f.keys {
		if f.keys[slot] == 0 && !f.table[slot/pageWords].lost && f.label.valid(slotNumber(slot)) {
			f.taken.Clear(int(slot))
			f.free++
		}
	}
}
