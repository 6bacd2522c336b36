package dirty

import (
	"maps"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/space"
)

// LeafBlocks is the number of blocks that a leaf of a volume's tree maps.
const LeafBlocks = 256

// smallHole is the longest run of blocks that is recorded block by block when
// it becomes a hole; longer ones are kept as ranges.
const smallHole = 32

// Generation is a set of dirty blocks. A frozen one does not change.
type Generation struct {
	vols     map[block.VolumeID]*volume
	UpTo     block.Seq // of a frozen one: the last record it covers
	blocks   int       // mapped entries
	permits  int64
	reserved int64
}

type volume struct {
	blocks map[block.Logical]Slot
	// holes read as zero where blocks has no entry; entries of blocks are
	// newer than the holes around them.
	holes block.Ranges
	pages space.Pages // of the volume's tree that a fold of these changes writes
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

func newGeneration() *Generation { return &Generation{vols: map[block.VolumeID]*volume{}} }

func (g *Generation) volume(id block.VolumeID) *volume {
	v := g.vols[id]
	if v == nil {
		v = &volume{blocks: map[block.Logical]Slot{}}
		g.vols[id] = v
	}
	return v
}

// reset empties g for reuse and keeps the memory of its maps.
func (g *Generation) reset() {
	for id, v := range g.vols {
		if len(v.blocks) == 0 {
			delete(g.vols, id)
			continue
		}
		clear(v.blocks)
		v.pages.Clear()
		v.holes = v.holes[:0]
	}
	*g = Generation{vols: g.vols}
}

// leavesOf returns the first and the last leaf of the volume's tree that a
// record changes. A write has at most 8 blocks and touches no others; those
// between the ends of a hole are freed and need no room.
func leavesOf(r *oplog.Record) (first, last uint64) {
	return uint64(r.LBA) / LeafBlocks, (uint64(r.LBA) + r.Count - 1) / LeafBlocks
}

func (g *Generation) insert(r *oplog.Record) {
	v := g.volume(r.Volume)
	switch r.Kind {
	case oplog.KindWrite:
		g.permits += int64(r.Count)
		for i := range r.Count {
			g.set(v, r.LBA+block.Logical(i), Slot{r.First + oplog.Extent(i), r.CRC[i]})
		}
		v.addPages(r)
	case oplog.KindZero:
		g.permits++
		v.addPages(r)
		end := r.LBA + block.Logical(r.Count)
		if r.Count <= smallHole {
			for lba := r.LBA; lba < end; lba++ {
				g.set(v, lba, Slot{Extent: holeExtent})
			}
			return
		}
		if !planted.Has(planted.HoleOrder) {
			g.forget(v, r.LBA, end)
		}
		v.holes = v.holes.Add(block.Range{Start: r.LBA, End: end})
	default:
		g.permits++
	}
}

func (v *volume) addPages(r *oplog.Record) {
	first, last := leavesOf(r)
	if v.pages.Add(first); last != first {
		v.pages.Add(last)
	}
}

func (g *Generation) set(v *volume, lba block.Logical, slot Slot) {
	before := len(v.blocks)
	v.blocks[lba] = slot
	g.blocks += len(v.blocks) - before
}

// forget removes the entries of [from, to).
func (g *Generation) forget(v *volume, from, to block.Logical) {
	before := len(v.blocks)
	if uint64(to-from) > uint64(before) {
		maps.DeleteFunc(v.blocks, func(lba block.Logical, _ Slot) bool { return lba >= from && lba < to })
	} else {
		for lba := from; lba < to; lba++ {
			delete(v.blocks, lba)
		}
	}
	g.blocks += len(v.blocks) - before
}

func (g *Generation) find(id block.VolumeID, lba block.Logical) (Slot, bool) {
	v := g.vols[id]
	if v == nil {
		return Slot{}, false
	}
	if slot, ok := v.blocks[lba]; ok {
		return slot, true
	}
	return Slot{Extent: holeExtent}, v.holes.Contains(lba)
}

// Volumes returns the volumes that a frozen generation touches, ascending.
func (g *Generation) Volumes() []block.VolumeID {
	return slices.Sorted(maps.Keys(g.vols))
}

// Blocks returns the dirty blocks of a volume in a frozen generation in
// ascending order, and the ranges that became holes before them.
func (g *Generation) Blocks(id block.VolumeID) (lbas []block.Logical, slots map[block.Logical]Slot, holes block.Ranges) {
	v := g.vols[id]
	return slices.Sorted(maps.Keys(v.blocks)), v.blocks, v.holes
}
