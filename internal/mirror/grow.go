package mirror

import (
	"fmt"
	"sync/atomic"

	"github.com/pollux-storage/pollux/internal/block"
)

// growLocked makes the mirror as large as its copies allow when all of them are
// there. It is part of opening it: nobody uses it yet. Where a larger map would
// need larger regions, and what its bits mean would change while some are set, the
// mirror grows as far as it can with those that it has.
//
// The pages that the map gets are written before the header that makes them count.
func (m *Mirror) growLocked() error {
	blocks := uint64(block.MaxDeviceBlocks)
	for i, c := range m.copies {
		d := c.present()
		if d == nil || m.head.copies[i].state == Absent {
			return nil
		}
		blocks = min(blocks, uint64(d.dev.Info().Size)/block.Size)
	}
	blocks -= reserved
	if shiftFor(blocks) != m.shift && m.stored.next(0) >= 0 {
		blocks = mapPages * pageBits << m.shift
	}
	if blocks <= m.head.blocks {
		return nil
	}
	m.head.blocks, m.head.shift = blocks, shiftFor(blocks)
	m.shift, m.info.Size = m.head.shift, int64(blocks)*block.Size
	m.verified.Store(m.info.Size)
	n := int((blocks-1)>>m.shift) + 1
	m.live, m.old, m.stored, m.touched = m.live.resized(n), m.old.resized(n), m.stored.resized(n), newBits(n)
	m.writers = make([]atomic.Int32, n)
	if err := m.storeMapLocked(allPages); err != nil {
		return fmt.Errorf("%s: map of its new size: %w", m.info.Name, err)
	}
	return m.changeLocked(nil, func([]member) {})
}
