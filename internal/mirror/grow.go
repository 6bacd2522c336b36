package mirror

import (
	"fmt"

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
	if shiftFor(blocks) != m.shift && m.stored.Next(0) >= 0 {
		blocks = mapPages * pageBits << m.shift
	}
	if blocks <= m.head.blocks {
		return nil
	}
	m.head.blocks, m.head.shift = blocks, shiftFor(blocks)
	m.fit()
	if err := m.storeMapLocked(allPages); err != nil {
		return fmt.Errorf("%s: map of its new size: %w", m.info.Name, err)
	}
	return m.changeLocked(nil, func([]member) {})
}
