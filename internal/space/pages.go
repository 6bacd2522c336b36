package space

import (
	"math/bits"

	"github.com/pollux-storage/pollux/internal/table"
)

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
	t table.Table[uint64] // a bit for each of 64 neighbours
	n int
	// below is a tree and a page above leaves that are in the set with all that is
	// above it, as aboveOf has it: neighbours are added one after the other.
	below uint64
}

// A key is the number of the tree, the level, and which 64 pages of it.
const (
	treeShift  = 32
	levelShift = TreeTop * TreeBits
	wordBits   = 6
)

// placeOf returns the key of the page of a level above a leaf, or of the leaf
// itself, and its bit.
func placeOf(tree uint32, level int, leaf uint64) (key, bit uint64) {
	page := leaf >> (level * TreeBits)
	return uint64(tree)<<treeShift | uint64(level)<<levelShift | page>>wordBits, 1 << (page % (1 << wordBits))
}

// Missing returns how many pages Add would add.
func (p *Pages) Missing(tree uint32, leaf uint64) (n int) {
	for ; n <= TreeTop; n++ {
		key, bit := placeOf(tree, n, leaf)
		if word, _ := p.t.Get(key); word&bit != 0 {
			break
		}
	}
	return n
}

// Add adds a leaf and the pages above it, and returns how many it has added.
func (p *Pages) Add(tree uint32, leaf uint64) (n int) {
	above := aboveOf(tree, leaf)
	for ; n <= TreeTop && !(n == 1 && above == p.below); n++ {
		key, bit := placeOf(tree, n, leaf)
		word := p.t.At(key)
		if *word&bit != 0 {
			break
		}
		*word |= bit
	}
	p.n, p.below = p.n+n, above
	return n
}

// aboveOf returns the page above a leaf as a number, never 0.
func aboveOf(tree uint32, leaf uint64) uint64 { return uint64(tree)<<treeShift | leaf>>TreeBits + 1 }

// Leaves calls yield with the numbers of a tree's leaves, in no order.
func (p *Pages) Leaves(tree uint32) func(yield func(leaf uint64) bool) {
	return func(yield func(leaf uint64) bool) {
		first, _ := placeOf(tree, 0, 0)
		for key, word := range p.t.All() {
			if key-first >= 1<<(levelShift-wordBits) {
				continue
			}
			for ; word != 0; word &= word - 1 {
				if !yield((key-first)<<wordBits + uint64(bits.TrailingZeros64(word))) {
					return
				}
			}
		}
	}
}

// Len returns the number of pages.
func (p *Pages) Len() int { return p.n }

// Drop removes the pages of a tree.
func (p *Pages) Drop(tree uint32) {
	p.below = 0
	p.t.DeleteRange(uint64(tree)<<treeShift, (uint64(tree)+1)<<treeShift, func(_, word uint64) { p.n -= bits.OnesCount64(word) })
}

// Bytes returns how much memory the set has, in bytes.
func (p *Pages) Bytes() int64 { return p.t.Bytes() }

// Clear empties the set and keeps its memory.
func (p *Pages) Clear() {
	p.t.Clear()
	p.n, p.below = 0, 0
}

// Free empties the set and gives its memory back.
func (p *Pages) Free() {
	p.t.Free()
	p.n, p.below = 0, 0
}
