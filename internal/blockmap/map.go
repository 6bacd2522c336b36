package blockmap

import (
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/table"
)

// Tree is the tree of one volume.
type Tree struct {
	Root    block.Pointer
	Used    int64 // entries that are not holes
	Deleted bool  // the volume is gone; folds free the tree
	// Pending are ranges whose entries are dead up to a consistency point;
	// folds free them.
	Pending []catalogue.Pending
}

// Gone reports whether nothing is left of a deleted volume.
func (t Tree) Gone() bool { return t.Deleted && t.Root.IsHole() }

// Map is the block map of one pool: the trees of all its volumes and the
// overlays above them.
type Map struct {
	pages SharedPages

	mu      sync.RWMutex
	trees   map[block.VolumeID]Tree
	active  *Overlay
	folding *Overlay     // nil unless a fold is under way
	spare   *Overlay     // emptied, to become the next active one; nil if there is none
	order   table.Sorter // of the fold under way
	// generation counts the installations of new roots, so that a look-up
	// that failed can tell whether it lost a race. It rises with mu held.
	generation atomic.Uint64

	leaves leafCache
}

// NewMap returns a map without volumes that reads its pages from pages.
func NewMap(pages SharedPages) *Map {
	m := &Map{pages: pages, trees: map[block.VolumeID]Tree{}, active: NewOverlay()}
	m.generation.Store(1)
	return m
}

// Update runs fn with the active overlay, alone. It must be short: all look-ups
// wait.
func (m *Map) Update(fn func(active *Overlay)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fn(m.active)
}

// AddVolume makes a volume known, with its tree.
func (m *Map) AddVolume(id block.VolumeID, t Tree) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.trees[id] = t
}

// DeleteVolume makes a volume's tree one to be freed by folds, and calls
// dropped for each of its mappings in the active overlay.
func (m *Map) DeleteVolume(id block.VolumeID, dropped func(block.Pointer)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.active.DropVolume(id, dropped)
	if t, ok := m.trees[id]; ok {
		t.Deleted = true
		m.trees[id] = t
	}
}

// Overlays returns the sizes of both overlays, in mappings and in the pages
// that folding them needs.
func (m *Map) Overlays() (entries, pages int) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	entries, pages = m.active.Len(), m.active.Pages()
	if m.folding != nil {
		entries += m.folding.Len()
		pages += m.folding.Pages()
	}
	return entries, pages
}

// References returns how many references to blocks of data there are: one for each
// entry of a tree, of what was deleted and is not freed yet too, and one for each block
// that an overlay maps. While a fold is completed elsewhere it may be that before or
// after.
func (m *Map) References() (n int64) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, t := range m.trees {
		n += t.Used
	}
	for _, o := range []*Overlay{m.active, m.folding} {
		if o != nil {
			n += int64(o.mapped)
		}
	}
	return n
}

// Bytes returns how much memory outside the Go heap the overlays have.
func (m *Map) Bytes() (n int64) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, o := range []*Overlay{m.active, m.folding, m.spare} {
		if o != nil {
			n += o.Bytes()
		}
	}
	return n
}

// Lookup fills dst with the pointers of len(dst) consecutive blocks from lba
// on. It may read map pages from devices.
func (m *Map) Lookup(id block.VolumeID, lba block.Logical, dst []block.Pointer) error {
	for {
		_, gen, err := m.lookup(id, lba, dst, true)
		if err == nil || !errors.Is(err, block.ErrCorrupt) {
			return err
		}
		if !m.newer(gen) {
			return fmt.Errorf("map of volume %d: %w", id, err)
		}
	}
}

// LookupCached is Lookup for callers that cannot wait; it returns false when a
// page is not in memory.
func (m *Map) LookupCached(id block.VolumeID, lba block.Logical, dst []block.Pointer) bool {
	ok, _, err := m.lookup(id, lba, dst, false)
	return ok && err == nil
}

func (m *Map) lookup(id block.VolumeID, lba block.Logical, dst []block.Pointer, wait bool) (ok bool, gen uint64, err error) {
	// Blocks of one leaf at a time: their overlay entries under one lock,
	// the others from one view of the leaf.
	for len(dst) > 0 {
		leaf := uint64(lba) / LeafBlocks
		n := min(len(dst), int(LeafBlocks-uint64(lba)%LeafBlocks))
		var missing [Fanout / 64]uint64
		m.mu.RLock()
		tree := m.trees[id]
		gen = m.generation.Load()
		some := m.fromOverlays(id, lba, dst[:n], &missing)
		m.mu.RUnlock()
		if some && !tree.Root.IsHole() {
			if ok, err := m.fromTree(place{id, leaf, gen}, tree, lba, dst[:n], &missing, wait); err != nil || !ok {
				return false, gen, err
			}
		}
		lba += block.Logical(n)
		dst = dst[n:]
	}
	return true, gen, nil
}

// Hidden tells which mappings new ones of the given blocks will hide, as far as
// memory knows: those below the active overlay, whose own [Overlay.Set]
// returns. The blocks are of one leaf of volume id and ascending; the place of
// a block in dst is that in its leaf.
func (m *Map) Hidden(id block.VolumeID, lbas []block.Logical, dst *[LeafBlocks]block.Pointer) {
	m.inMemory(id, lbas, dst, false)
}

// Known tells where the given blocks are mapped, as far as memory knows, and says of
// others that they are holes. They are given as to [Map.Hidden].
func (m *Map) Known(id block.VolumeID, lbas []block.Logical, dst *[LeafBlocks]block.Pointer) {
	m.inMemory(id, lbas, dst, true)
}

// inMemory is Known, or Hidden where the active overlay does not count.
func (m *Map) inMemory(id block.VolumeID, lbas []block.Logical, dst *[LeafBlocks]block.Pointer, active bool) {
	var missing [Fanout / 64]uint64
	some := false
	m.mu.RLock()
	tree, gen := m.trees[id], m.generation.Load()
	for _, lba := range lbas {
		i := lba % LeafBlocks
		dst[i] = block.Pointer{}
		if p, ok := m.active.find(id, lba); ok {
			if active {
				dst[i] = p
			}
			continue
		}
		if m.folding != nil {
			if p, ok := m.folding.find(id, lba); ok {
				dst[i] = p
				continue
			}
		}
		missing[i/64] |= 1 << (i % 64)
		some = true
	}
	m.mu.RUnlock()
	if some && !tree.Root.IsHole() {
		leaf := uint64(lbas[0]) / LeafBlocks
		// It fails where a page is damaged; who reads it will say so.
		_, _ = m.fromTree(place{id, leaf, gen}, tree, block.Logical(leaf*LeafBlocks), dst[:], &missing, false)
	}
}

// fromOverlays fills in what the overlays know, makes the rest holes, and
// marks it as missing.
func (m *Map) fromOverlays(id block.VolumeID, lba block.Logical, dst []block.Pointer, missing *[Fanout / 64]uint64) (some bool) {
	for i := range dst {
		p, ok := m.active.find(id, lba+block.Logical(i))
		if planted.Has(planted.OverlayOrder) && m.folding != nil {
			if old, had := m.folding.find(id, lba+block.Logical(i)); had {
				p, ok = old, true
			}
		}
		if !ok && m.folding != nil {
			p, ok = m.folding.find(id, lba+block.Logical(i))
		}
		dst[i] = p
		if !ok {
			missing[i/64] |= 1 << (i % 64)
			some = true
		}
	}
	return some
}

// fromTree fills in what is missing from a leaf of the tree.
func (m *Map) fromTree(at place, tree Tree, lba block.Logical, dst []block.Pointer, missing *[Fanout / 64]uint64, wait bool) (bool, error) {
	p, known := m.leaves.find(at)
	if !known {
		var err error
		if wait {
			p, err = FindLeaf(asOf{m, at.generation}, tree.Root, at.leaf)
		} else if p, known = FindLeafCached(m.pages, tree.Root, at.leaf); !known {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		m.leaves.add(at, p)
	}
	if p.IsHole() {
		return true, nil
	}
	f := fillers.Get().(*filler)
	defer f.free()
	f.tree, f.lba, f.dst, f.missing = tree, lba, dst, *missing
	if !wait {
		return m.pages.ViewCached(p, f.fill), nil
	}
	if err := (asOf{m, at.generation}).View(p, f.fill); err != nil {
		return false, pageError(err, 0, at.leaf)
	}
	return true, nil
}

// filler takes entries out of a leaf. Fillers are used again, and so are their
// functions, because making one allocates.
type filler struct {
	tree    Tree
	lba     block.Logical // of dst
	dst     []block.Pointer
	missing [Fanout / 64]uint64
	fill    func(page []byte)
}

var fillers = sync.Pool{New: func() any {
	f := &filler{}
	f.fill = f.take
	return f
}}

func (f *filler) free() {
	f.tree, f.dst = Tree{}, nil
	fillers.Put(f)
}

func (f *filler) take(page []byte) {
	first := int(uint64(f.lba) % LeafBlocks)
	for w, word := range f.missing {
		for ; word != 0; word &= word - 1 {
			i := w*64 + bits.TrailingZeros64(word)
			p := block.DecodePointer(page[(first+i)*block.PointerSize:])
			if len(f.tree.Pending) > 0 && catalogue.Dead(f.tree.Pending, f.lba+block.Logical(i), p.Birth) {
				p = block.Pointer{}
			}
			f.dst[i] = p
		}
	}
}

// Frozen is what a fold works on: the overlay as it was when the fold began,
// and the trees below it. Neither changes until EndFold.
type Frozen struct {
	Overlay *Overlay
	Trees   map[block.VolumeID]Tree
	// Moves, if set, says of a page that it is to be rewritten: all volumes are
	// visited, and the pages above their leaves, for that.
	Moves func(p block.Pointer) bool
	// Twins gives leaves twins, too, and Renew those of volumes that have none, see
	// Update.
	Twins bool
	Renew map[block.VolumeID][]uint64
}

// BeginFold moves the active overlay below a new, empty one and returns it.
// Only one fold may be under way.
func (m *Map) BeginFold() Frozen {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.folding, m.active, m.spare = m.active, m.spare, nil
	m.folding.order = &m.order
	if m.active == nil {
		m.active = NewOverlay()
	}
	return Frozen{Overlay: m.folding, Trees: maps.Clone(m.trees)}
}

// EndFold installs the trees of a fold that is durable and drops its overlay.
// Trees that belong to a deleted volume and are empty are forgotten.
func (m *Map) EndFold(trees map[block.VolumeID]Tree) {
	old := m.endFold(trees)
	old.reset() // nobody finds it any more
	m.mu.Lock()
	defer m.mu.Unlock()
	m.spare = old
}

func (m *Map) endFold(trees map[block.VolumeID]Tree) (old *Overlay) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, t := range trees {
		if t.Gone() {
			delete(m.trees, id)
			continue
		}
		t.Deleted = m.trees[id].Deleted // it may have been deleted meanwhile
		m.trees[id] = t
	}
	old, m.folding = m.folding, nil
	m.generation.Add(1)
	return old
}

// Unfinished reports whether another fold would free something.
func (m *Map) Unfinished() bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, t := range m.trees {
		if t.Deleted || len(t.Pending) > 0 {
			return true
		}
	}
	return false
}

// HasHoles reports whether ranges were trimmed that no fold has begun to free.
func (m *Map) HasHoles() bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, h := range m.active.holes {
		if len(h) > 0 {
			return true
		}
	}
	return false
}

// asOf reads the pages of the trees of a generation beside folds.
type asOf struct {
	m          *Map
	generation uint64
}

// View implements Pages.
func (a asOf) View(p block.Pointer, fn func(page []byte)) error {
	return a.m.pages.ViewBeside(p, fn, func() bool { return !a.m.newer(a.generation) })
}

// ViewCached implements Pages.
func (a asOf) ViewCached(p block.Pointer, fn func(page []byte)) bool {
	return a.m.pages.ViewCached(p, fn)
}

// Prefetch implements Pages.
func (a asOf) Prefetch(ps []block.Pointer) { a.m.pages.Prefetch(ps) }

// newer reports whether a fold has installed new roots since generation gen.
func (m *Map) newer(gen uint64) bool { return gen != m.generation.Load() }

// OverlayPointers calls fn for each reference that the overlays hold.
func (m *Map) OverlayPointers(fn func(p block.Pointer) error) error {
	visit := func(_ block.VolumeID, _ block.Logical, p block.Pointer) error { return fn(p) }
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.folding != nil {
		if err := m.folding.each(visit); err != nil {
			return err
		}
	}
	return m.active.each(visit)
}
