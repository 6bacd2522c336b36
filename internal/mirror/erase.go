package mirror

import (
	"errors"

	"github.com/pollux-storage/pollux/internal/block"
)

// Erase makes the copies that are there blank at their front: the mirror is given up.
// Nothing but Close may be called afterwards, and nothing else be under way.
func (m *Mirror) Erase() error {
	m.mark.Lock()
	defer m.mark.Unlock()
	clear(m.page[:block.Size])
	var errs []error
	for _, c := range m.copies {
		d := c.present()
		if d == nil {
			continue
		}
		for n := uint64(0); n < mapStart+mapPages; n++ {
			errs = append(errs, writeBlock(d, n, m.page[:block.Size]))
		}
		errs = append(errs, writeBlock(d, headerSlots[1], m.page[:block.Size]))
	}
	return errors.Join(errs...)
}
