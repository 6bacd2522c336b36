package flashmap

import "fmt"

// Drop is Forget for a primary whose data nobody needs any more, wherever they are: its data
// sets on flash are given up, without being read. After an error, or a power cut, it may be
// known still, with some of its data sets, and can be dropped again when the flash device has
// been opened anew.
func (f *Flash) Drop(number int) error {
	f.tableLock.Lock()
	defer f.tableLock.Unlock()
	p, err := f.absentLocked("drop", number)
	if err != nil {
		return err
	}
	if err := f.certainLocked(); err != nil {
		return f.failedLocked(fmt.Errorf("write the label: %w", err))
	}
	var slots []slotNumber
	var changes []change
	for slot, k := range f.keys {
		if k == 0 || k.primary() != number {
			continue
		}
		n := slotNumber(slot)
		s := f.lock(k)
		if s.findLocked(f.keys, k, hash(k)) == n {
			s.removeLocked(f.keys, n)
		}
		f.keys[slot] = 0
		f.unwanted.Clear(slot)
		s.mu.Unlock()
		slots = append(slots, n)
		if page := slot / pageWords; len(changes) == 0 || changes[len(changes)-1].sheet != &f.table[page] {
			changes = append(changes, f.tableChange(page, none, 0))
		}
	}
	for i := p.bits.Next(0); i >= 0; i = p.bits.Next(i + 1) {
		p.drop(Set(i))
	}
	// An entry that is there still must not meet one of another device of this number.
	if err := f.storeAllLocked(changes); err != nil {
		return f.failedLocked(fmt.Errorf("drop primary device %d: %w", number, err))
	}
	for _, n := range slots {
		f.release(n)
	}
	return f.forgetLocked(number)
}
