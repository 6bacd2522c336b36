package dirty

import (
	"iter"
	"maps"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/space"
	"github.com/pollux-storage/pollux/internal/table"
)

// LeafBlocks is the number of blocks that a leaf of a volume's tree maps.
const LeafBlocks = 256

// smallHole is the longest run of blocks that is recorded block by block when
// it becomes a hole; longer ones are kept as ranges.
const smallHole = 32

// Generation is a set of dirty blocks. A frozen one does not change. What is
// large of it lies outside the Go heap and is used again.
type Generation struct {
	blocks table.Table[Slot] // by block.Key
	// holes, by volume, read as zero where blocks has no entry; entries of
	// blocks are newer than the holes around them.
	holes    map[block.VolumeID]block.Ranges
	pages    space.Pages // of the volumes' trees that a fold of these changes writes
	UpTo     block.Seq   // of a frozen one: the last record it covers
	permits  int64
	records  int // also those that need no permit
	reserved int64
	order    *table.Sorter // of the set: one generation at a time is committed
	sorted   []uint64      // keys of blocks in order, once somebody asked
}

// Slot is the newest version of a block: an extent of the log and its
// checksum, or a hole.
type Slot struct {
	Extent oplog.Extent
	Sum    uint32
}

const holeExtent = ^oplog.Extent(0)

// IsHole reports whether the block reads as zero.
func (s Slot) IsHole() bool { return s.Extent == holeExtent }

func newGeneration(order *table.Sorter) *Generation {
	return &Generation{holes: map[block.VolumeID]block.Ranges{}, order: order}
}

// reset empties g for reuse and keeps its memory.
func (g *Generation) reset() {
	g.blocks.Clear()
	g.pages.Clear()
	clear(g.holes)
	g.UpTo, g.permits, g.records, g.reserved, g.sorted = 0, 0, 0, 0, nil
}

// free gives back the memory of a generation that nobody looks at any more.
func (g *Generation) free() {
	g.blocks.Free()
	g.pages.Free()
}

// bytes returns how much memory outside the Go heap g has.
func (g *Generation) bytes() int64 { return g.blocks.Bytes() + g.pages.Bytes() }

// leavesOf returns the first and the last leaf of the volume's tree that a
// record changes. A write has at most 8 blocks and touches no others; those
// between the ends of a hole are freed and need no room.
func leavesOf(r *oplog.Record) (first, last uint64) {
	return uint64(r.LBA) / LeafBlocks, (uint64(r.LBA) + r.Count - 1) / LeafBlocks
}

func (g *Generation) insert(r *oplog.Record) {
	key := block.Key(r.Volume, r.LBA)
	g.records++
	switch r.Kind {
	case oplog.KindWrite:
		g.permits += int64(r.Count)
		for i := range r.Count {
			g.blocks.Put(key+i, Slot{r.First + oplog.Extent(i), r.CRC[i]})
		}
		g.addPages(r)
	case oplog.KindZero:
		g.permits++
		g.addPages(r)
		if r.Count <= smallHole {
			for i := range r.Count {
				g.blocks.Put(key+i, Slot{Extent: holeExtent})
			}
			return
		}
		if !planted.Has(planted.HoleOrder) {
			g.blocks.DeleteRange(key, key+r.Count, func(uint64, Slot) {})
		}
		g.holes[r.Volume] = g.holes[r.Volume].Add(block.Range{Start: r.LBA, End: r.LBA + block.Logical(r.Count)})
	}
}

func (g *Generation) addPages(r *oplog.Record) {
	first, last := leavesOf(r)
	if g.pages.Add(uint32(r.Volume), first); last != first {
		g.pages.Add(uint32(r.Volume), last)
	}
}

func (g *Generation) find(id block.VolumeID, lba block.Logical) (Slot, bool) {
	if slot, ok := g.blocks.Get(block.Key(id, lba)); ok {
		return slot, true
	}
	if len(g.holes) == 0 {
		return Slot{}, false
	}
	return Slot{Extent: holeExtent}, g.holes[id].Contains(lba)
}

// keys returns the keys of a frozen generation's blocks in order. Only who
// commits it may ask.
func (g *Generation) keys() []uint64 {
	if g.sorted == nil {
		table.Start(g.order, &g.blocks)
		g.sorted = g.order.Sort()
	}
	return g.sorted
}

// keysOf returns those of a volume.
func (g *Generation) keysOf(id block.VolumeID) []uint64 {
	return table.Between(g.keys(), block.Key(id, 0), block.Key(id+1, 0))
}

// Len returns the number of blocks of a frozen generation that are not in Holes.
func (g *Generation) Len() int { return g.blocks.Len() }

// Volumes returns the volumes that a frozen generation touches, ascending. Like
// Blocks it must be called only by who commits the generation.
func (g *Generation) Volumes() []block.VolumeID {
	ids := slices.Collect(maps.Keys(g.holes))
	for keys := g.keys(); len(keys) > 0; {
		id, _ := block.OfKey(keys[0])
		ids = append(ids, id)
		next, _ := slices.BinarySearch(keys, block.Key(id+1, 0))
		keys = keys[next:]
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// Blocks returns the dirty blocks of a volume in a frozen generation, ascending.
func (g *Generation) Blocks(id block.VolumeID) iter.Seq2[block.Logical, Slot] {
	return func(yield func(block.Logical, Slot) bool) {
		for _, key := range g.keysOf(id) {
			slot, _ := g.blocks.Get(key)
			if _, lba := block.OfKey(key); !yield(lba, slot) {
				return
			}
		}
	}
}

// Holes returns the ranges of a volume that became holes before its Blocks
// changed.
func (g *Generation) Holes(id block.VolumeID) block.Ranges { return g.holes[id] }
