package mirror

import (
	"bytes"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/stack"
)

// ProveOwn reads what each copy keeps of the mirror itself, its newest header and the
// map, and writes anew what is not as it should be, see [hpdi.Copies]. It returns how
// many blocks were not.
func (m *Mirror) ProveOwn() (mended int, err error) {
	m.mark.Lock()
	defer m.mark.Unlock()
	var headers int
	var pages [mapPages]bool
	for i, c := range m.copies {
		d := c.present()
		if d == nil {
			continue
		}
		if !m.proveHeaderLocked(d, i) {
			headers++
		}
		for n := range mapPages {
			if n*pageBits < m.regions() && !m.provePageLocked(d, n) {
				pages[n] = true
				mended++
			}
		}
	}
	mended += headers
	if m.info.ReadOnly || mended == 0 {
		return mended, nil
	}
	if err := m.storeMapLocked(pages); err != nil {
		return mended, fmt.Errorf("write the map of %s anew: %w", m.info.Name, err)
	}
	if headers > 0 {
		err = m.changeLocked(nil, func([]member) {})
	}
	return mended, err
}

// proveHeaderLocked tells whether a disk has the newest header.
func (m *Mirror) proveHeaderLocked(d *disk, index int) bool {
	h := m.head
	h.index = index
	buf := m.page[:block.Size]
	err := d.do(&hpdi.Request{Op: hpdi.OpRead, Offset: int64(headerSlots[d.slot]) * block.Size, Vec: [][]byte{buf}})
	return err == nil && bytes.Equal(buf, h.encode())
}

// provePageLocked tells whether a disk's page of the map is whole and names all that
// it has to.
func (m *Mirror) provePageLocked(d *disk, n int) bool {
	found := stack.NewBits(m.regions())
	if err := m.readMapPageLocked(d, n, found); err != nil {
		return false
	}
	for i := m.stored.Next(n * pageBits); i >= 0 && i < (n+1)*pageBits; i = m.stored.Next(i + 1) {
		if !found.Has(i) {
			return false
		}
	}
	return true
}
