package blockmap

import (
	"errors"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
)

// errEnough ends a walk that has found what was asked for.
var errEnough = errors.New("enough")

// LeavesFrom returns the numbers of the first n leaves of a volume that map
// anything, in tree or overlays, ascending, from leaf from on. Fewer mean that
// there are no more. With an error it returns what comes before the page that
// cannot be read.
func (m *Map) LeavesFrom(id block.VolumeID, from uint64, n int) ([]uint64, error) {
	for {
		leaves, gen, err := m.leavesFrom(id, from, n)
		if err == nil || !errors.Is(err, block.ErrCorrupt) || !m.newer(gen) {
			return leaves, err
		}
	}
}

func (m *Map) leavesFrom(id block.VolumeID, from uint64, n int) (leaves []uint64, gen uint64, err error) {
	m.mu.RLock()
	root := m.trees[id].Root
	gen = m.generation.Load()
	for _, o := range []*Overlay{m.active, m.folding} {
		if o == nil {
			continue
		}
		for leaf := range o.pages.Leaves(uint32(id)) {
			if leaf >= from {
				leaves = append(leaves, leaf)
			}
		}
	}
	m.mu.RUnlock()
	found := 0
	err = Walk(asOf{m, gen}, root, func(_ block.Pointer, level int, leaf uint64) (bool, error) {
		if leaf+1<<(level*fanBits) <= from {
			return false, nil
		}
		if level == 0 {
			if found++; found > n {
				return false, errEnough
			}
			leaves = append(leaves, leaf)
		}
		return true, nil
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	slices.Sort(leaves)
	leaves = slices.Compact(leaves)
	return leaves[:min(len(leaves), n)], gen, err
}

// Trees returns the trees of all volumes, those of deleted ones included.
func (m *Map) Trees() map[block.VolumeID]Tree {
	m.mu.RLock()
	defer m.mu.RUnlock()
	all := make(map[block.VolumeID]Tree, len(m.trees))
	for id, t := range m.trees {
		all[id] = t
	}
	return all
}

// LeavesBelow returns how many leaves are below a page of a level, 1 for a
// leaf itself.
func LeavesBelow(level int) uint64 { return 1 << (level * fanBits) }
