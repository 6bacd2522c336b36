package blockmap

import (
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/space"
)

// LeafBlocks is the number of logical blocks that a leaf of a volume's tree
// maps: 1 MiB of the volume.
const LeafBlocks = Fanout

// Overlay holds the mappings committed since some fold, above the trees. It is
// guarded by the Map that it belongs to.
type Overlay struct {
	vols    map[block.VolumeID]*overlayVolume
	entries int
	pages   int
}

type overlayVolume struct {
	blocks map[block.Logical]block.Pointer // a hole pointer hides the tree's entry
	// holes are ranges that read as zero where blocks has no entry; ascending
	// and disjoint. Entries of blocks are newer than the holes around them.
	holes block.Ranges
	pages space.Pages // of the tree that a fold writes for all this
}

// NewOverlay returns an empty overlay.
func NewOverlay() *Overlay { return &Overlay{vols: map[block.VolumeID]*overlayVolume{}} }

// Len returns the number of single mappings and ranges held.
func (o *Overlay) Len() int {
	n := o.entries
	for _, v := range o.vols {
		n += len(v.holes)
	}
	return n
}

// Pages returns how many pages a fold of this overlay writes at most. What it
// frees by doing so is free only afterwards.
func (o *Overlay) Pages() int { return o.pages }

func (o *Overlay) volume(id block.VolumeID) *overlayVolume {
	v := o.vols[id]
	if v == nil {
		v = &overlayVolume{blocks: map[block.Logical]block.Pointer{}}
		o.vols[id] = v
	}
	return v
}

// Grow makes room for n mappings of a volume that has none yet.
func (o *Overlay) Grow(id block.VolumeID, n int) {
	if o.vols[id] == nil {
		o.volume(id).blocks = make(map[block.Logical]block.Pointer, n)
	}
}

// Set maps one block and returns the mapping that it replaces in the overlay:
// that one's reference is gone.
func (o *Overlay) Set(id block.VolumeID, lba block.Logical, p block.Pointer) (old block.Pointer) {
	v := o.volume(id)
	old, had := v.blocks[lba]
	v.blocks[lba] = p
	if !had {
		o.entries++
		o.pages += v.pages.Add(uint64(lba) / LeafBlocks)
	}
	return old
}

// Punch makes a range a hole and calls dropped for each mapping in the overlay
// that it removes.
func (o *Overlay) Punch(id block.VolumeID, r block.Range, dropped func(block.Pointer)) {
	v := o.volume(id)
	drop := func(lba block.Logical, p block.Pointer) {
		if !p.IsHole() {
			dropped(p)
		}
		delete(v.blocks, lba)
		o.entries--
	}
	if uint64(r.End-r.Start) > uint64(len(v.blocks)) {
		for lba, p := range v.blocks {
			if lba >= r.Start && lba < r.End {
				drop(lba, p)
			}
		}
	} else {
		for lba := r.Start; lba < r.End; lba++ {
			if p, ok := v.blocks[lba]; ok {
				drop(lba, p)
			}
		}
	}
	v.holes = v.holes.Add(r)
	o.pages += v.pages.Add(uint64(r.Start) / LeafBlocks)
	o.pages += v.pages.Add(uint64(r.End-1) / LeafBlocks)
}

// DropVolume forgets a volume's mappings and calls dropped for each.
func (o *Overlay) DropVolume(id block.VolumeID, dropped func(block.Pointer)) {
	v := o.vols[id]
	if v == nil {
		return
	}
	for _, p := range v.blocks {
		if !p.IsHole() {
			dropped(p)
		}
	}
	o.entries -= len(v.blocks)
	o.pages -= v.pages.Len()
	delete(o.vols, id)
}

// find looks a block up; ok is false when the layers below decide.
func (o *Overlay) find(id block.VolumeID, lba block.Logical) (p block.Pointer, ok bool) {
	v := o.vols[id]
	if v == nil {
		return p, false
	}
	if p, ok = v.blocks[lba]; ok {
		return p, true
	}
	return p, v.holes.Contains(lba)
}

// each calls fn for every block that the overlay maps somewhere.
func (o *Overlay) each(fn func(block.VolumeID, block.Logical, block.Pointer) error) error {
	for id, v := range o.vols {
		for lba, p := range v.blocks {
			if !p.IsHole() {
				if err := fn(id, lba, p); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
