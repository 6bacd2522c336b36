package cp

import (
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
)

// renewals are leaves that have no twins and are to get them by the next fold.
type renewals struct {
	maps   map[block.VolumeID][]uint64
	counts map[int][]uint64 // by device
	n      int
}

// sorted returns r with all leaves in order, each once.
func (r renewals) sorted() renewals {
	for id, leaves := range r.maps {
		slices.Sort(leaves)
		r.maps[id] = slices.Compact(leaves)
	}
	for dev, leaves := range r.counts {
		slices.Sort(leaves)
		r.counts[dev] = slices.Compact(leaves)
	}
	return r
}

// RenewLeaf makes the next fold that begins rewrite a leaf of a volume's map, with a
// twin, if it has none then. RenewCounts is the same for one of a device's counts.
func (m *Machine) RenewLeaf(id block.VolumeID, leaf uint64) {
	if m.renew.maps == nil {
		m.renew.maps = map[block.VolumeID][]uint64{}
	}
	m.renew.maps[id] = append(m.renew.maps[id], leaf)
	m.renew.n++
}

// RenewCounts is RenewLeaf for a device's counts.
func (m *Machine) RenewCounts(dev int, leaf uint64) {
	if m.renew.counts == nil {
		m.renew.counts = map[int][]uint64{}
	}
	m.renew.counts[dev] = append(m.renew.counts[dev], leaf)
	m.renew.n++
}

// Renewing returns how many leaves wait for the next fold.
func (m *Machine) Renewing() int { return m.renew.n }

// MayRenew returns about how many leaves may wait for a fold: as many as are moved from
// a device that leaves, or none where one leaves just now, or the pool lacks room that
// nobody was promised.
func (m *Machine) MayRenew() int {
	most := m.moveBudget()
	if _, leaving := m.sb.Leaving(); leaving || m.roomForLeafTwins() < renewRoom*int64(most) {
		return 0
	}
	return most
}

// renewRoom is for how many blocks a leaf that gets a twin there must be room: for both,
// while the old one is not free yet, and for pages above them.
const renewRoom = 8
