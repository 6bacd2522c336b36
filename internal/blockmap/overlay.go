package blockmap

import (
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/space"
	"github.com/pollux-storage/pollux/internal/table"
)

// LeafBlocks is the number of logical blocks that a leaf of a volume's tree
// maps: 1 MiB of the volume.
const LeafBlocks = Fanout

// Overlay holds the mappings committed since some fold, above the trees. It is
// guarded by the Map that it belongs to. What is large of it lies outside the
// Go heap and is used again by later folds.
type Overlay struct {
	// blocks are the mappings by block.Key; a hole hides the tree's entry.
	blocks table.Table[entry]
	// holes, by volume, are ranges that read as zero where blocks has no entry;
	// ascending and disjoint. Entries of blocks are newer than the holes around
	// them.
	holes map[block.VolumeID]block.Ranges
	pages space.Pages // of the trees that a fold writes for all this
	// mapped is how many of blocks are no holes: each has a reference.
	mapped int

	order   *table.Sorter // of the map: one overlay at a time is folded
	sorting bool          // a fold has begun to
	sorted  []uint64      // the keys of blocks in order, once it is done
}

// entry is an encoded pointer.
type entry [block.PointerSize]byte

func entryOf(p block.Pointer) (e entry) {
	p.Encode(e[:])
	return e
}

func (e entry) pointer() block.Pointer { return block.DecodePointer(e[:]) }

// NewOverlay returns an empty overlay.
func NewOverlay() *Overlay { return &Overlay{holes: map[block.VolumeID]block.Ranges{}} }

// Len returns the number of single mappings and ranges held.
func (o *Overlay) Len() int {
	n := o.blocks.Len()
	for _, h := range o.holes {
		n += len(h)
	}
	return n
}

// Pages returns how many pages a fold of this overlay writes at most. What it
// frees by doing so is free only afterwards.
func (o *Overlay) Pages() int { return o.pages.Len() }

// Bytes returns how much memory outside the Go heap the overlay has.
func (o *Overlay) Bytes() int64 { return o.blocks.Bytes() + o.pages.Bytes() }

// Grow gives an empty overlay the room for n mappings.
func (o *Overlay) Grow(n int) { o.blocks.Grow(n) }

// Touch prepares for setting blocks with these keys, see [block.Key], which are
// found faster together than one by one.
func (o *Overlay) Touch(keys []uint64) { o.blocks.Touch(keys) }

// Set maps one block and returns the mapping that it replaces in the overlay:
// that one's reference is gone.
func (o *Overlay) Set(id block.VolumeID, lba block.Logical, p block.Pointer) (old block.Pointer) {
	e, had := o.blocks.Put(block.Key(id, lba), entryOf(p))
	if !p.IsHole() {
		o.mapped++
	}
	if !had {
		o.pages.Add(uint32(id), uint64(lba)/LeafBlocks)
		return old
	}
	if old = e.pointer(); !old.IsHole() {
		o.mapped--
	}
	return old
}

// Punch makes a range a hole and calls dropped for each mapping in the overlay
// that it removes.
func (o *Overlay) Punch(id block.VolumeID, r block.Range, dropped func(block.Pointer)) {
	o.remove(block.Key(id, r.Start), block.Key(id, 0)+uint64(r.End), dropped)
	o.holes[id] = o.holes[id].Add(r)
	o.pages.Add(uint32(id), uint64(r.Start)/LeafBlocks)
	o.pages.Add(uint32(id), uint64(r.End-1)/LeafBlocks)
}

// remove removes the mappings of keys [from, to).
func (o *Overlay) remove(from, to uint64, dropped func(block.Pointer)) {
	o.blocks.DeleteRange(from, to, func(_ uint64, e entry) {
		if p := e.pointer(); !p.IsHole() {
			o.mapped--
			dropped(p)
		}
	})
}

// DropVolume forgets a volume's mappings and calls dropped for each.
func (o *Overlay) DropVolume(id block.VolumeID, dropped func(block.Pointer)) {
	o.remove(block.Key(id, 0), block.Key(id+1, 0), dropped)
	o.pages.Drop(uint32(id))
	delete(o.holes, id)
}

// find looks a block up; ok is false when the layers below decide.
func (o *Overlay) find(id block.VolumeID, lba block.Logical) (p block.Pointer, ok bool) {
	if e, ok := o.blocks.Get(block.Key(id, lba)); ok {
		return e.pointer(), true
	}
	if len(o.holes) == 0 {
		return p, false
	}
	return p, o.holes[id].Contains(lba)
}

// each calls fn for every block that the overlay maps somewhere.
func (o *Overlay) each(fn func(block.VolumeID, block.Logical, block.Pointer) error) error {
	for key, e := range o.blocks.All() {
		if p := e.pointer(); !p.IsHole() {
			id, lba := block.OfKey(key)
			if err := fn(id, lba, p); err != nil {
				return err
			}
		}
	}
	return nil
}

// sortStep is about how many keys a step of a fold sorts: a millisecond.
const sortStep = 128 << 10

// sort brings the keys of an overlay that does not change any more in order, a
// bounded step at a time.
func (o *Overlay) sort() (done bool) {
	if o.sorted != nil {
		return true
	}
	if !o.sorting {
		o.sorting = true
		table.Start(o.order, &o.blocks)
	}
	if o.sorted, done = o.order.Step(sortStep); done && o.sorted == nil {
		o.sorted = []uint64{}
	}
	return done
}

// keysOf returns the keys of a volume's blocks in order.
func (o *Overlay) keysOf(id block.VolumeID) []uint64 {
	return table.Between(o.sorted, block.Key(id, 0), block.Key(id+1, 0))
}

// reset empties the overlay and keeps its memory.
func (o *Overlay) reset() {
	o.blocks.Clear()
	o.pages.Clear()
	o.mapped = 0
	o.holes = map[block.VolumeID]block.Ranges{} // folds may still look at the old one
	o.sorted, o.sorting = nil, false
}
