package space

// TreeTop is the level of the root of a metadata tree, whose leaves are at
// level 0. Each page has 1<<TreeBits entries.
const (
	TreeTop  = 3
	TreeBits = 8
)

// Pages is the set of the pages of one tree that have to be written anew when
// some of its leaves change: these leaves and all pages above them. While the
// new ones are written the old ones are still in use, so that is what a change
// has to reserve. The zero Pages is an empty set.
type Pages struct {
	m map[uint64]struct{} // level in the upper byte, the page's number within it below
}

func pageKey(level int, leaf uint64) uint64 { return uint64(level)<<56 | leaf>>(level*TreeBits) }

// Missing returns how many pages Add would add.
func (p *Pages) Missing(leaf uint64) (n int) {
	for level := range TreeTop + 1 {
		if _, ok := p.m[pageKey(level, leaf)]; ok {
			break
		}
		n++
	}
	return n
}

// Add adds a leaf and the pages above it, and returns how many it has added.
func (p *Pages) Add(leaf uint64) (n int) {
	if p.m == nil {
		p.m = map[uint64]struct{}{}
	}
	for level := range TreeTop + 1 {
		key := pageKey(level, leaf)
		if _, ok := p.m[key]; ok {
			break
		}
		p.m[key] = struct{}{}
		n++
	}
	return n
}

// Leaves calls yield with the numbers of the leaves, in no order.
func (p *Pages) Leaves(yield func(leaf uint64) bool) {
	for key := range p.m {
		if key>>56 == 0 && !yield(key) {
			return
		}
	}
}

// Len returns the number of pages.
func (p *Pages) Len() int { return len(p.m) }

// Clear empties the set and keeps its memory.
func (p *Pages) Clear() { clear(p.m) }
