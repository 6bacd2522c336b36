package pool

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/space"
)

const (
	// countWindow is how many of the pool's blocks are recounted at once, in
	// two bytes each: 256 MiB for 512 GiB, touched only where blocks are in
	// use. A larger pool takes one walk of its trees for each 512 GiB.
	countWindow = 128 << 20
	// walkGroup is how many pages a walk reads together. Their entries are
	// held at each level.
	walkGroup = 256
)

// window is the range [lo, hi) of the blocks of all devices, taken as one
// sequence, with two counts for each.
type window struct {
	lo, hi     uint64
	base       []uint64 // of each device in the sequence, and the end of the last
	mem        []byte
	want, have []byte // parts of mem: by the recount; in use
}

func newWindow(devs []uint64, size uint64) (*window, error) {
	w := &window{base: []uint64{0}}
	for _, n := range devs {
		w.base = append(w.base, w.end()+n)
	}
	size = min(size, w.end())
	mem, err := hpdi.AllocPrivate(int(2 * size))
	if err != nil {
		return nil, fmt.Errorf("recount of %d blocks: %w", size, err)
	}
	w.mem, w.want, w.have = mem, mem[:size:size], mem[size:]
	return w, nil
}

func (w *window) end() uint64 { return w.base[len(w.base)-1] }

// free frees the window's memory.
func (w *window) free() { _ = hpdi.Free(w.mem) }

// at returns the place of a block within the window.
func (w *window) at(p block.Physical) (i uint64, ok bool) {
	i, ok = w.place(p)
	return i - w.lo, ok && i >= w.lo && i < w.hi
}

// place returns the place of a block in the sequence of all; not ok is one on no device.
func (w *window) place(p block.Physical) (i uint64, ok bool) {
	dev := p.Device()
	if dev >= len(w.base)-1 || p.Block() >= w.base[dev+1]-w.base[dev] {
		return 0, false
	}
	return w.base[dev] + p.Block(), true
}

// block is the reverse of at.
func (w *window) block(i uint64) block.Physical {
	dev, exact := slices.BinarySearch(w.base, w.lo+i)
	if !exact {
		dev--
	}
	for w.base[dev+1] == w.base[dev] { // a device without blocks
		dev++
	}
	return block.At(dev, w.lo+i-w.base[dev])
}

// add changes the count of each block of a run that is in the window.
func (w *window) add(counts []byte, r space.Run, up bool) error {
	for b := r.At; b < r.At+block.Physical(r.N); b++ {
		i, ok := w.at(b)
		switch {
		case !ok:
		case up && counts[i] == 255:
			return fmt.Errorf("reference count of block %v is at its limit: %w", b, block.ErrCorrupt)
		case up:
			counts[i]++
		case counts[i] == 0:
			return &block.CorruptError{What: "reference count", Where: "block " + b.String(), Why: "a free block was freed"}
		default:
			counts[i]--
		}
	}
	return nil
}

// recount counts all references anew, a window at a time, and compares. With
// the first window it proves each metadata page.
func (c *checker) recount(ctx context.Context) error {
	sb := c.machine.Superblock()
	var devs []uint64
	for _, d := range sb.Devices {
		devs = append(devs, d.Blocks)
	}
	w, err := newWindow(devs, c.window)
	if err != nil {
		return err
	}
	defer w.free()
	for ; w.lo < w.end(); w.lo = w.hi {
		w.hi = min(w.lo+c.window, w.end())
		if err := c.references(ctx, w); err != nil {
			return err
		}
		c.copiesProved = true
		if c.lost != (lostPages{}) {
			return nil
		}
		if err := c.loadCounts(ctx, w); isDevice(err) {
			return err
		} else if err != nil {
			c.miscounted("%v", err)
			return nil
		}
		for i := range w.hi - w.lo {
			if w.have[i] != w.want[i] {
				c.miscounted("block %v has reference count %d, %d references were found", w.block(i), w.have[i], w.want[i])
			}
		}
		clear(w.want)
		clear(w.have)
	}
	return nil
}

// references counts what maps, catalogue, count trees and overlays refer to. With the
// first window it compares how many there are with the figures that are stored.
func (c *checker) references(ctx context.Context, w *window) error {
	first := w.lo == 0
	one := func(p block.Pointer) { // of those to metadata: mu is held
		if c.outside(p) {
			if first {
				c.problemLocked("reference to block %v: outside the pool's data area", p)
			}
			return
		}
		if err := w.add(w.want, space.Run{At: p.Phys, N: 1}, true); err != nil {
			c.problemLocked("reference to block %v: %v", p, err)
		}
	}
	page := func(p block.Pointer) {
		if one(p); first {
			c.report.Pages++
			c.o.Progress.done.Add(1)
		}
	}
	data := func(p block.Pointer) {
		if one(p); first {
			c.report.DataBlocks++
		}
	}
	if err := c.maps(ctx, page, data); err != nil {
		return err
	}
	if err := c.overlays(data); err != nil {
		return err
	}
	if err := c.list(ctx, page); err != nil {
		return err
	}
	if err := c.prints(ctx, page); err != nil {
		return err
	}
	used := uint64(0)
	if err := c.counts(ctx, page, func(_ int, _ uint64, counts []byte) {
		for _, n := range counts {
			if n > 0 {
				used++
			}
		}
	}); err != nil {
		return err
	}
	if sb := c.machine.Superblock(); first && !c.lost.counts && sb.Used != used {
		c.miscounted("the superblock has %d blocks in use, the trees of reference counts have %d", sb.Used, used)
	}
	return nil
}

// outside reports whether a pointer is to no block that the pool gives away.
func (c *checker) outside(p block.Pointer) bool {
	devs := c.machine.Superblock().Devices
	dev := p.Phys.Device()
	return dev >= len(devs) || p.Phys.Block() < devs[dev].First || p.Phys.Block() >= devs[dev].Blocks
}

// maps calls page for each page of the volumes' trees and data for each block that
// they refer to, with mu held.
func (c *checker) maps(ctx context.Context, page, data func(block.Pointer)) error {
	trees := c.bmap.Trees()
	for _, id := range slices.Sorted(maps.Keys(trees)) {
		t := treeWalk{of: c.nameOf(id), volume: true, lost: &c.lost.maps, page: page}
		used := int64(0)
		t.leaf = func(_ uint64, frame []byte) {
			for i := range blockmap.Fanout {
				if p := block.DecodePointer(frame[i*block.PointerSize:]); !p.IsHole() {
					used++
					data(p)
				}
			}
		}
		before := c.lost.maps
		if err := c.walk(ctx, trees[id].Root, &t); err != nil {
			return err
		}
		if c.lost.maps == before && used != trees[id].Used && !c.copiesProved {
			if c.wrong.used == nil {
				c.wrong.used = map[block.VolumeID]int64{}
			}
			c.wrong.used[id] = used
			c.miscounted("%s has %d blocks in use by the list of volumes, its map has %d", t.of, trees[id].Used, used)
		}
	}
	return nil
}

// nameOf says which volume it is.
func (c *checker) nameOf(id block.VolumeID) string {
	if v, ok := c.catalogue.Get(id); ok && !v.Deleted {
		return fmt.Sprintf("volume %q", v.Name)
	}
	return fmt.Sprintf("volume %d, which is deleted,", id)
}

// overlays calls data for each block that overlays refer to, with mu held.
func (c *checker) overlays(data func(block.Pointer)) error {
	return c.bmap.OverlayPointers(func(p block.Pointer) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		data(p)
		return nil
	})
}

// list calls page for each page of the list of volumes, with mu held.
func (c *checker) list(ctx context.Context, page func(block.Pointer)) error {
	return c.walk(ctx, c.machine.Superblock().Catalogue, &treeWalk{of: "list of volumes", lost: &c.lost.list, page: page, leaf: func(uint64, []byte) {}})
}

// counts calls page for each page of the trees of counts, and leaf for the content of
// each leaf of a device's, with mu held.
func (c *checker) counts(ctx context.Context, page func(block.Pointer), leaf func(dev int, leaf uint64, frame []byte)) error {
	for dev, d := range c.machine.Superblock().Devices {
		t := &treeWalk{of: fmt.Sprintf("reference counts of device %d", dev), lost: &c.lost.counts, page: page}
		t.leaf = func(n uint64, frame []byte) { leaf(dev, n, frame) }
		if err := c.walk(ctx, d.Counts, t); err != nil {
			return err
		}
	}
	return nil
}

// node is a page of a tree, and the first leaf below it.
type node struct {
	ptr  block.Pointer
	leaf uint64
}

// treeWalk is what a walk of a tree does.
type treeWalk struct {
	of     string // whose tree it is
	volume bool   // it is a volume's map
	lost   *bool  // becomes true when a page cannot be read
	// page is called for each page, and for its twin, and leaf for the content of each leaf, with mu held.
	page func(block.Pointer)
	leaf func(leaf uint64, frame []byte)
}

// where describes a page.
func (t *treeWalk) where(level int, leaf uint64) string {
	s := fmt.Sprintf("metadata page of level %d above leaf %d", level, leaf)
	if !t.volume {
		return t.of + ": " + s
	}
	from, n := int64(leaf)*blockmap.LeafBlocks*block.Size, int64(blockmap.LeavesBelow(level))*blockmap.LeafBlocks*block.Size
	return fmt.Sprintf("%s from byte %d on, %d bytes: %s", t.of, from, n, s)
}

// walk reads all pages of a tree, page by page proved by its parent. A page that
// cannot be read is a problem.
func (c *checker) walk(ctx context.Context, root block.Pointer, t *treeWalk) error {
	if root.IsHole() {
		return nil
	}
	return c.walkLevel(ctx, []node{{ptr: root}}, blockmap.Top, t)
}

func (c *checker) walkLevel(ctx context.Context, nodes []node, level int, t *treeWalk) error {
	for group := range slices.Chunk(nodes, walkGroup) {
		var children []node
		if err := c.pageCopies(ctx, group, level, t); err != nil {
			return err
		}
		err := c.bulk.read(ctx, len(group), func(i int) block.Pointer { return group[i].ptr }, func(i int, frame []byte, err error) {
			c.mu.Lock()
			defer c.mu.Unlock()
			n := group[i]
			if t.page(n.ptr); n.ptr.Twin != 0 {
				t.page(n.ptr.Second())
			}
			switch {
			case err != nil:
				problem := c.problemLocked
				if *t.lost = true; t.lost == &c.lost.counts || t.lost == &c.lost.prints {
					problem = c.miscountedLocked
				}
				problem("%s: %v", t.where(level, n.leaf), err)
			case level == 0:
				t.leaf(n.leaf, frame)
			default:
				for i := range uint64(blockmap.Fanout) {
					if p := block.DecodePointer(frame[i*block.PointerSize:]); !p.IsHole() {
						children = append(children, node{p, n.leaf + i<<((level-1)*space.TreeBits)})
					}
				}
			}
		})
		if err != nil {
			return err
		}
		if level > 0 {
			slices.SortFunc(children, func(a, b node) int { return int(a.leaf) - int(b.leaf) })
			if err := c.walkLevel(ctx, children, level-1, t); err != nil {
				return err
			}
		}
	}
	return nil
}

// pageCopies proves each copy of pages of a level, and their twins.
func (c *checker) pageCopies(ctx context.Context, pages []node, level int, t *treeWalk) error {
	if c.copiesProved {
		return nil
	}
	if err := c.pageTwins(ctx, pages, level, t); err != nil {
		return err
	}
	return c.proveCopies(ctx, len(pages), func(i int) block.Pointer { return pages[i].ptr }, func(i int) string { return t.where(level, pages[i].leaf) }, func(i int, err error) {
		c.problem("%s: %v", t.where(level, pages[i].leaf), err)
	})
}

// countsInMemory takes the counts of an open pool.
func (c *checker) countsInMemory(_ context.Context, w *window) error {
	for dev := range len(w.base) - 1 {
		lo, hi := max(w.lo, w.base[dev]), min(w.hi, w.base[dev+1])
		if lo < hi {
			c.space.Counts(dev, lo-w.base[dev], w.have[lo-w.lo:hi-w.lo])
		}
	}
	return nil
}

// countsStored puts the counts together from what is stored: the trees of
// counts, the pages of the last fold and the overlays.
func (c *checker) countsStored(ctx context.Context, w *window) error {
	devs := c.machine.Superblock().Devices
	if err := c.counts(ctx, func(block.Pointer) {}, func(dev int, leaf uint64, frame []byte) {
		for i, n := range frame {
			at := block.At(dev, leaf*block.Size+uint64(i))
			if n == 0 {
				continue
			}
			if at.Block() >= devs[dev].Blocks {
				c.miscountedLocked("block %v has reference count %d and is outside the device", at, n)
			} else if i, ok := w.at(at); ok {
				w.have[i] = n
			}
		}
	}); err != nil {
		return err
	}
	taken, freed := c.machine.FoldPages()
	for _, r := range taken {
		if err := w.add(w.have, r, true); err != nil {
			return err
		}
	}
	for _, r := range freed {
		if err := w.add(w.have, r, false); err != nil {
			return err
		}
	}
	return c.bmap.OverlayPointers(func(p block.Pointer) error {
		return w.add(w.have, space.Run{At: p.Phys, N: 1}, true)
	})
}
