package blockmap

import (
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/table"
)

// References is told how a fold changes the references that trees hold to
// data blocks.
type References interface {
	Added(p block.Pointer)
	Dropped(p block.Pointer)
}

// VolumeFold merges the frozen mappings of one volume into its tree, and frees
// what its holes cover, a bounded step at a time.
type VolumeFold struct {
	update  *Update
	refs    References
	overlay *Overlay     // nil when only the tree is freed
	keys    []uint64     // of the volume's blocks in the overlay, in order
	left    int          // of keys, not folded yet
	first   uint64       // the key of the volume's first block
	group   []uint64     // those of keys that are below the page of this step
	holes   block.Ranges // of the overlay; newer than everything in the tree
	pending []catalogue.Pending
	parents []uint64 // level-1 pages still to be rewritten, ascending
	after   Tree     // without its root
}

// parentBlocks is the number of blocks below a level-1 page.
const parentBlocks = LeafBlocks * Fanout

// everything is the pending range of a volume that is freed whole.
var everything = []catalogue.Pending{{Range: block.Range{Start: 0, End: MaxLeaves * LeafBlocks}, Limit: block.MaxCP}}

// Volumes returns the volumes that a fold has to visit, ascending.
func (f Frozen) Volumes() []block.VolumeID {
	var ids []block.VolumeID
	f.finishSort()
	for id, t := range f.Trees {
		if f.Moves != nil || len(f.Renew[id]) > 0 || len(f.Overlay.keysOf(id))+len(f.Overlay.holes[id]) > 0 || t.Deleted || len(t.Pending) > 0 {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// Sort brings the frozen mappings in order, a bounded step at a time, before
// anything else. Who does not call it until it returns true makes Volumes do
// it at once.
func (f Frozen) Sort() (done bool) { return f.Overlay.sort() }

func (f Frozen) finishSort() {
	for !f.Sort() {
	}
}

// Fold prepares the fold of volume id. Pages that have to be visited only in
// order to free something count against budget, which is lowered; what exceeds
// it stays pending for the next fold. limit is the consistency point of the
// fold before: entries of the tree are not younger, those of the overlay are,
// so that the latter do not die with the range in which they were written.
func (f Frozen) Fold(id block.VolumeID, limit block.CP, budget *int, pages Pages, w PageWriter, refs References) (*VolumeFold, error) {
	tree := f.Trees[id]
	f.finishSort()
	v := &VolumeFold{refs: refs, first: block.Key(id, 0), pending: tree.Pending, after: Tree{Deleted: tree.Deleted, Used: tree.Used}}
	v.update = NewUpdate(pages, w, tree.Root)
	v.update.Twins, v.update.Renew = f.Twins, f.Renew[id]
	if tree.Deleted {
		v.pending = everything
	} else {
		v.overlay, v.holes, v.keys = f.Overlay, f.Overlay.holes[id], f.Overlay.keysOf(id)
	}
	v.left = len(v.keys)
	for _, key := range v.keys {
		if p := (key - v.first) / parentBlocks; len(v.parents) == 0 || v.parents[len(v.parents)-1] != p {
			v.parents = append(v.parents, p)
		}
	}
	for _, leaf := range v.update.Renew {
		v.parents = append(v.parents, leaf/Fanout)
	}
	var freed []uint64
	dead := append(slices.Clone(v.pending), pendingOf(v.holes, limit)...)
	for _, r := range dead {
		// Only what exists has to be visited, however large the hole.
		found, err := Parents(pages, tree.Root, uint64(r.Start)/LeafBlocks, (uint64(r.End)+LeafBlocks-1)/LeafBlocks)
		if err != nil {
			return nil, err
		}
		freed = append(freed, found...)
	}
	if f.Moves != nil {
		v.update.Moves = f.Moves
		moved, err := ParentsThat(pages, tree.Root, f.Moves)
		if err != nil {
			return nil, err
		}
		v.parents = append(v.parents, moved...)
	}
	slices.Sort(freed)
	freed = slices.Compact(freed)
	if n := max(*budget, 0); len(freed) > n {
		if rest := beyond(dead, block.Logical(freed[n]*parentBlocks)); len(rest) <= catalogue.MaxPending {
			freed, v.after.Pending = freed[:n], rest
		}
	}
	*budget -= len(freed)
	v.parents = append(v.parents, freed...)
	slices.Sort(v.parents)
	v.parents = slices.Compact(v.parents)
	if tree.Deleted {
		v.after.Pending = nil // that it is deleted says it all
	}
	return v, nil
}

func pendingOf(holes block.Ranges, limit block.CP) []catalogue.Pending {
	var p []catalogue.Pending
	for _, r := range holes {
		p = append(p, catalogue.Pending{Range: r, Limit: limit})
	}
	return p
}

// beyond returns the parts of the ranges from a block on.
func beyond(ranges []catalogue.Pending, from block.Logical) []catalogue.Pending {
	var rest []catalogue.Pending
	for _, r := range ranges {
		if r.Start = max(r.Start, from); r.Start < r.End {
			rest = append(rest, r)
		}
	}
	return rest
}

// Step rewrites at most one level-1 page with its leaves. It returns true when
// nothing is left but Finish.
func (v *VolumeFold) Step() (done bool, err error) {
	if len(v.parents) == 0 {
		return true, nil
	}
	first := v.first + v.parents[0]*parentBlocks
	v.group = table.Between(v.keys, first, first+parentBlocks)
	if err := v.update.Group(v.parents[0], v.want, v.edit); err != nil {
		return false, err
	}
	v.parents = v.parents[1:]
	v.left -= len(v.group)
	return len(v.parents) == 0, nil
}

// Left returns how many of the volume's mappings are not folded yet.
func (v *VolumeFold) Left() int { return v.left }

// Finish returns the new tree.
func (v *VolumeFold) Finish() (Tree, error) {
	var err error
	v.after.Root, err = v.update.Finish()
	return v.after, err
}

// keysOf returns the keys of the mapped blocks of a leaf of the group.
func (v *VolumeFold) keysOf(leaf uint64) []uint64 {
	first := v.first + leaf*LeafBlocks
	return table.Between(v.group, first, first+LeafBlocks)
}

func (v *VolumeFold) want(leaf uint64, exists bool) bool {
	if len(v.keysOf(leaf)) > 0 {
		return true
	}
	lo, hi := block.Logical(leaf*LeafBlocks), block.Logical((leaf+1)*LeafBlocks)
	return exists && (v.holes.Intersects(lo, hi) ||
		slices.ContainsFunc(v.pending, func(p catalogue.Pending) bool { return p.Start < hi && p.End > lo }))
}

func (v *VolumeFold) edit(leaf uint64, page *[block.Size]byte) error {
	for i := 0; i < LeafBlocks && len(v.holes)+len(v.pending) > 0; i++ {
		lba := block.Logical(leaf*LeafBlocks + uint64(i))
		old := block.DecodePointer(page[i*block.PointerSize:])
		if !old.IsHole() && (v.holes.Contains(lba) || catalogue.Dead(v.pending, lba, old.Birth)) {
			if planted.Has(planted.DoubleFree) {
				if v.overlay != nil && v.overlay.blocks.Has(v.first+uint64(lba)) {
					v.refs.Dropped(old)
				}
			}
			v.set(page, lba, block.Pointer{})
		}
	}
	for _, key := range v.keysOf(leaf) {
		e, _ := v.overlay.blocks.Get(key)
		v.set(page, block.Logical(key-v.first), e.pointer())
	}
	return nil
}

func (v *VolumeFold) set(page *[block.Size]byte, lba block.Logical, p block.Pointer) {
	at := page[uint64(lba)%LeafBlocks*block.PointerSize:]
	if old := block.DecodePointer(at); !old.IsHole() {
		v.refs.Dropped(old)
		v.after.Used--
	}
	if !p.IsHole() {
		v.refs.Added(p)
		v.after.Used++
	}
	p.Encode(at)
}
