package flashmap

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
)

// abandon notes that nobody needs what a data set held whose place is lost.
func (f *Flash) abandon(k key) {
	f.tidyMu.Lock()
	defer f.tidyMu.Unlock()
	f.abandoned[k] = struct{}{}
}

// Tidy gives up the slot of one data set that was discarded whole and not written to
// since, and makes one usable again that was lost and is not needed any more; without
// either it writes pages anew that have one place left. It returns true when there is
// nothing more to do. What was discarded before the flash device was opened stays on it
// until it is discarded once more. Nothing of what is given up is read or copied.
func (f *Flash) Tidy() (done bool, err error) {
	if f.readOnly {
		return true, nil
	}
	if some, err := f.stepLingering(); some {
		return false, err
	}
	if k, ok := f.anyAbandoned(); ok {
		went, err := f.recover(k)
		if went {
			f.tell(k, false)
		}
		return false, err
	}
	for slot, from := -1, 0; ; from = slot + 1 {
		var k key
		if slot, k = f.nextUnwanted(from); slot < 0 {
			return true, f.mend()
		}
		if k == 0 {
			continue
		}
		if went, err := f.giveUp(slotNumber(slot), k); went || err != nil {
			return false, err
		}
	}
}

// mend writes what has one place alone to the other one, which did not take it, and
// tries whether a flash device that failed takes something again, also what it did not take
// when it was opened.
func (f *Flash) mend() error {
	f.tableLock.Lock()
	defer f.tableLock.Unlock()
	if f.again {
		if err := f.makeOneLocked(); err != nil {
			return err
		}
		f.again = false
		f.unsettled.Store(nil)
	}
	if f.failure.Load() != nil {
		if err := f.storeLabelLocked(f.label); err != nil {
			return f.failedLocked(fmt.Errorf("write the label: %w", err))
		}
	}
	if !f.behind {
		return nil
	}
	f.behind = false
	for _, c := range f.sheetsLocked() {
		if !c.sheet.behind || c.sheet.lost {
			continue
		}
		if err := f.storeLocked(true, c); err != nil {
			f.behind = true
			return f.failedLocked(fmt.Errorf("write block %d or %d anew: %w", c.at[0], c.at[1], err))
		}
	}
	return nil
}

// nextUnwanted returns the first slot from one on that holds what was discarded.
func (f *Flash) nextUnwanted(from int) (int, key) {
	f.tableLock.Lock()
	defer f.tableLock.Unlock()
	slot := f.unwanted.Next(from)
	if slot < 0 {
		return slot, 0
	}
	return slot, f.keys[slot]
}

// giveUp gives up a slot, unless the data set in it is in use. The primary is told
// that it need not keep what it has of it either.
func (f *Flash) giveUp(slot slotNumber, k key) (went bool, err error) {
	m, err := f.MoveOut(k.primary(), k.set())
	if err != nil {
		return false, nil // it is on the move, or its primary is not there
	}
	if m.d.primary.Info().Discard {
		// It may fail: nobody relies on it.
		_ = m.d.io.Do(&hpdi.Request{Op: hpdi.OpDiscard, Offset: int64(m.set) << f.shift, Length: f.SetBytes()})
	}
	s := f.lock(k)
	if m.slot != slot || !f.unwanted.Has(int(slot)) || s.activeLocked(k, true).writes > 0 {
		// Somebody has written to it.
		s.mu.Unlock()
		return false, m.Cancel()
	}
	m.marks, m.held, m.stage = 0, make(chan struct{}), storing
	s.mu.Unlock()
	for {
		p, err := m.Step()
		if err != nil || p == Waiting {
			f.linger(m)
		}
		if err != nil || p != Moving {
			return true, err
		}
	}
}

// linger keeps a move that cannot be ended yet for later calls of Tidy.
func (f *Flash) linger(m *Move) {
	f.tidyMu.Lock()
	defer f.tidyMu.Unlock()
	f.lingering = append(f.lingering, m)
}

// stepLingering ends moves that could not be before. It returns whether there are some.
func (f *Flash) stepLingering() (some bool, err error) {
	f.tidyMu.Lock()
	moves := f.lingering
	f.lingering = nil
	f.tidyMu.Unlock()
	for _, m := range moves {
		p, e := m.Step()
		for e == nil && p == Moving {
			p, e = m.Step()
		}
		if err = errors.Join(err, e); p != Done {
			f.linger(m)
			some = true
		}
	}
	return some, err
}

func (f *Flash) anyAbandoned() (key, bool) {
	f.tidyMu.Lock()
	defer f.tidyMu.Unlock()
	for k := range f.abandoned {
		delete(f.abandoned, k)
		return k, true
	}
	return 0, false
}

// recover makes a data set one of the primary whose place on flash is lost, and which
// nobody needs. What it reads as is undefined. When the last one is, the pages of the
// table that are lost are written anew. It returns whether the data set was lost.
func (f *Flash) recover(k key) (went bool, err error) {
	f.tableLock.Lock()
	defer f.tableLock.Unlock()
	p := f.primaries[k.primary()]
	if f.lookup(k) != none || !p.has(k.set()) {
		return false, nil
	}
	err = f.certainLocked()
	if err == nil {
		err = f.storeLocked(true, f.mapChange(p, int(k.set()/pageSets), k.set(), false))
	}
	for slot, other := range f.keys {
		if other != k || err != nil {
			continue
		}
		// One of two entries for it, whose slots nobody finds.
		n := slotNumber(slot)
		if err = f.storeLocked(true, f.tableChange(slot/pageWords, n, 0)); err == nil {
			f.keys[slot] = 0
			f.release(n)
		}
	}
	if err != nil {
		f.abandon(k)
		return false, f.failedLocked(fmt.Errorf("give up %v: %w", k, err))
	}
	s := f.lock(k)
	p.drop(k.set())
	s.mu.Unlock()
	return true, f.restoreLocked()
}

// restoreLocked writes lost pages of the table anew if no data set is lost any more.
func (f *Flash) restoreLocked() error {
	for _, p := range f.primaries {
		if p == nil {
			continue
		}
		for i := p.bits.Next(0); i >= 0; i = p.bits.Next(i + 1) {
			if f.lookup(keyOf(p.number, Set(i))) == none {
				return nil
			}
		}
	}
	for n := range f.table {
		if !f.table[n].lost {
			continue
		}
		if err := f.storeLocked(true, f.tableChange(n, none, 0)); err != nil {
			return f.failedLocked(fmt.Errorf("write page %d of the table anew: %w", n, err))
		}
		f.lostPages.Add(-1)
		for i := range pageWords {
			if slot := slotNumber(n*pageWords + i); f.label.valid(slot) {
				f.release(slot)
			}
		}
	}
	return nil
}
