package space

import "github.com/pollux-storage/pollux/internal/table"

// TreeTop is the level of the root of a metadata tree, whose leaves are at
// level 0. Each page has 1<<TreeBits entries.
const (
	TreeTop  = 3
	TreeBits = 8
)

// Pages is the set of the pages of trees that have to be written anew when some
// of their leaves change: these leaves and all pages above them. While the new
// ones are written the old ones are still in use, so that is what a change has
// to reserve. Trees are told apart by number. The zero Pages is an empty set.
type Pages struct {
	t table.Table[struct{}]
}

// A key is the number of the tree, the level, and the page's number within it.
const (
	treeShift  = 32
	levelShift = TreeTop * TreeBits
)

func pageKey(tree uint32, level int, leaf uint64) uint64 {
	return uint64(tree)<<treeShift | uint64(level)<<levelShift | leaf>>(level*TreeBits)
}

// Missing returns how many pages Add would add.
func (p *Pages) Missing(tree uint32, leaf uint64) (n int) {
	for n <= TreeTop && !p.t.Has(pageKey(tree, n, leaf)) {
		n++
	}
	return n
}

// Add adds a leaf and the pages above it, and returns how many it has added.
func (p *Pages) Add(tree uint32, leaf uint64) (n int) {
	for n <= TreeTop {
		if _, had := p.t.Put(pageKey(tree, n, leaf), struct{}{}); had {
			break
		}
		n++
	}
	return n
}

// Leaves calls yield with the numbers of a tree's leaves, in no order.
func (p *Pages) Leaves(tree uint32) func(yield func(leaf uint64) bool) {
	return func(yield func(leaf uint64) bool) {
		first := pageKey(tree, 0, 0)
		for key := range p.t.All() {
			if leaf := key - first; leaf < 1<<levelShift && !yield(leaf) {
				return
			}
		}
	}
}

// Len returns the number of pages.
func (p *Pages) Len() int { return p.t.Len() }

// Drop removes the pages of a tree.
func (p *Pages) Drop(tree uint32) {
	p.t.DeleteRange(uint64(tree)<<treeShift, (uint64(tree)+1)<<treeShift, func(uint64, struct{}) {})
}

// Bytes returns how much memory the set has, in bytes.
func (p *Pages) Bytes() int64 { return p.t.Bytes() }

// Clear empties the set and keeps its memory.
func (p *Pages) Clear() { p.t.Clear() }

// Free empties the set and gives its memory back.
func (p *Pages) Free() { p.t.Free() }
