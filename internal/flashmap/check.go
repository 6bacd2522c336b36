package flashmap

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
)

// Prove reads label, table and map from both of their places, writes anew what is not
// as it should be, and returns how many blocks were not.
func (f *Flash) Prove() (mended int, err error) {
	f.tableLock.Lock()
	defer f.tableLock.Unlock()
	var errs []error
	for _, c := range f.sheetsLocked() {
		n := f.differsLocked(c)
		if n == 0 {
			continue
		}
		mended += n
		if f.readOnly || c.sheet.lost {
			continue
		}
		if err := f.storeLocked(true, c); err != nil {
			errs = append(errs, f.failedLocked(err))
		}
	}
	return mended, errors.Join(errs...)
}

// sheetsLocked returns all sheets that count as changes to what they are.
func (f *Flash) sheetsLocked() []change {
	l := f.label
	out := []change{f.labelChange(&l)}
	for n := range f.label.tablePages() {
		out = append(out, f.tableChange(n, none, 0))
	}
	for _, p := range f.primaries {
		for r := 0; p != nil && r < len(p.pages); r++ {
			out = append(out, f.mapChange(p, r, Set(len(p.bits)*64), false))
		}
	}
	return out
}

// differsLocked returns at how many of its places a sheet is not what it should be.
func (f *Flash) differsLocked(c change) (n int) {
	want, got := f.page[:block.Size], f.page[block.Size:][:block.Size]
	c.encode(want, c.sheet.generation)
	for _, at := range c.at {
		wrong := false
		f.eachCopy(int64(at)*block.Size, got, func(err error) {
			wrong = wrong || err != nil || !bytes.Equal(want, got)
		})
		if wrong {
			n++
		}
	}
	return n
}

// Check proves that everything the flash device knows agrees: the table in memory with
// itself and with what is stored, which it reads. It returns a problem a line, of which
// there are none on a sound flash device that nothing is moved on meanwhile, but for what
// has come back and has readers at its slot still. Of one that is open for reading only it
// does not compare what a crash may have left.
func (f *Flash) Check() (problems []string) {
	f.tableLock.Lock()
	defer f.tableLock.Unlock()
	say := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	f.checkMemory(say)
	// Without the stripes, for which clients would have to wait: who changes what is stored
	// has tableLock.
	for _, c := range f.sheetsLocked() {
		// A place that a crash has left behind is written when the device is opened, but for
		// one that is open for reading only.
		if c.sheet.lost || !f.readOnly && f.differsLocked(c) > 0 {
			say("what is stored at block %d or %d is not what it should be", c.at[0], c.at[1])
		}
	}
	return problems
}

// checkMemory proves that the table in memory agrees with itself. The caller has tableLock.
func (f *Flash) checkMemory(say func(string, ...any)) {
	f.lockAll()
	defer f.unlockAll()
	if why := f.label.wrong(); why != "" {
		say("the label has %s", why)
	}
	in := map[key]slotNumber{}
	for i, k := range f.keys {
		slot := slotNumber(i)
		if k == 0 {
			continue
		}
		if other, twice := in[k]; twice {
			say("%v is in slots %d and %d", k, other, slot)
		}
		in[k] = slot
		p := f.primaries[k.primary()]
		switch {
		case p == nil || k.set() >= p.sets || !f.label.valid(slot):
			say("slot %d holds %v, which is not possible", slot, k)
			continue
		case !p.has(k.set()):
			say("slot %d holds %v, which the map does not name", slot, k)
		}
		if d := p.dev.Load(); d != nil && d.isFixed(k.set()) {
			say("slot %d holds %v, which is not to be moved", slot, k)
		}
		h := hash(k)
		if got := f.stripeOf(h).findLocked(f.keys, k, h); got != slot {
			say("%v is in slot %d, and is looked for in %d", k, slot, got)
		}
		if !f.taken.Has(int(slot)) {
			say("slot %d is free, and holds %v", slot, k)
		}
	}
	for _, p := range f.primaries {
		for i := 0; p != nil; i++ {
			if i = p.bits.Next(i); i < 0 {
				break
			}
			if _, there := in[keyOf(p.number, Set(i))]; !there {
				say("%v is lost", keyOf(p.number, Set(i)))
			}
		}
	}
	f.checkSlots(say, len(in))
}

// checkSlots proves that slots are taken that hold something, that were reserved or
// that a move has, and no others. The caller has all stripes.
func (f *Flash) checkSlots(say func(string, ...any), held int) {
	used, free := 0, 0
	left := map[slotNumber]bool{}
	for i := range f.stripes {
		used += f.stripes[i].used
		for _, a := range f.stripes[i].active {
			if a.move != nil && a.move.left {
				left[a.move.slot] = true
			} else if a.move != nil {
				say("%v is on the move", a.key)
			}
			if a.writes < 0 || a.flash < 0 {
				say("%v has %d writes and %d requests at its slot under way", a.key, a.writes, a.flash)
			}
		}
	}
	if used != held {
		say("the index has %d data sets, the table %d", used, held)
	}
	f.slotsMu.Lock()
	defer f.slotsMu.Unlock()
	for i := range f.keys {
		slot := slotNumber(i)
		switch taken := f.taken.Has(int(slot)); {
		case !taken && slot < f.limit:
			free++
		case taken && f.keys[slot] == 0 && !left[slot] && f.label.valid(slot) && !f.table[i/pageWords].lost:
			say("slot %d is taken and holds nothing", slot)
		}
	}
	if free != f.free {
		say("%d slots are free, and %d are said to be", free, f.free)
	}
}
