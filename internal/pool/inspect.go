package pool

import (
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockio"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/oplog"
)

// LabelCopy is what the place of one copy of a label holds.
type LabelCopy struct {
	Block uint64
	Label Label
	Err   error // why there is no valid label
}

// InspectLabels reads both places of a device's label, whatever they hold.
func InspectLabels(dev hpdi.Device) (copies [2]LabelCopy, err error) {
	q, err := dev.NewQueue(1)
	if err != nil {
		return copies, err
	}
	defer func() { _ = q.Close() }()
	buf, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		return copies, err
	}
	defer func() { _ = hpdi.Free(buf) }()
	for i, b := range labelBlocks {
		c := &copies[i]
		c.Block = b
		c.Err = hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: int64(b) * block.Size, Vec: [][]byte{buf}})
		if c.Err == nil {
			c.Label, c.Err = decodeLabel(buf)
		}
	}
	return copies, nil
}

// FlushArea returns where on device 0 the flush log is.
func (l Label) FlushArea() oplog.Area {
	return oplog.Area{Start: int64(l.Layout.Flush) * block.Size, Length: int64(l.Layout.FlushBlocks) * block.Size, Pool: l.Pool}
}

// flushArea is FlushArea on the device that the label is of.
func (l Label) flushArea(dev hpdi.Device) oplog.Area {
	a := l.FlushArea()
	a.Copies, _ = dev.(hpdi.Copies)
	return a
}

// TreePage is a page of a metadata tree.
type TreePage struct {
	Ptr     block.Pointer
	Level   int    // 0 is a leaf
	Leaf    uint64 // the first one below it
	Entries int    // that are not holes, or counts that are not zero
	Err     error  // why it cannot be read
	// Of a page that has a twin, why one of the two cannot be read.
	FirstErr, TwinErr error
}

// read calls fn with the page, of whichever place has it.
func (p *TreePage) read(reader *blockio.Reader, fn func(page []byte)) {
	p.FirstErr = reader.View(p.Ptr.First(), fn)
	if p.Err = p.FirstErr; p.Ptr.Twin == 0 {
		p.FirstErr = nil
		return
	}
	p.TwinErr = reader.View(p.Ptr.Second(), func(page []byte) {
		if p.Err != nil {
			fn(page)
			p.Err = nil
		}
	})
}

// pages calls fn for each page of a tree, parents first, and for leaves with
// their content. What is below a page that cannot be read is left out.
func (v *View) pages(root block.Pointer, fn func(p TreePage, leaf []byte) error) error {
	return v.pagesBelow(TreePage{Ptr: root, Level: blockmap.Top}, fn)
}

func (v *View) pagesBelow(p TreePage, fn func(TreePage, []byte) error) error {
	if p.Ptr.IsHole() {
		return nil
	}
	page := make([]byte, block.Size)
	if p.read(v.p.reader, func(b []byte) { copy(page, b) }); p.Err != nil {
		return fn(p, nil)
	}
	if p.Level == 0 {
		return fn(p, page)
	}
	var below []TreePage
	for i := range uint64(blockmap.Fanout) {
		if ptr := block.DecodePointer(page[i*block.PointerSize:]); !ptr.IsHole() {
			below = append(below, TreePage{Ptr: ptr, Level: p.Level - 1, Leaf: p.Leaf + i*blockmap.LeavesBelow(p.Level-1)})
		}
	}
	p.Entries = len(below)
	if err := fn(p, nil); err != nil {
		return err
	}
	for _, c := range below {
		if err := v.pagesBelow(c, fn); err != nil {
			return err
		}
	}
	return nil
}

// Volume returns the volume of a name.
func (v *View) Volume(name string) (catalogue.Volume, error) {
	for _, c := range v.p.catalogue.List() {
		if c.Name == name {
			return c, nil
		}
	}
	return catalogue.Volume{}, fmt.Errorf("volume %q in pool %s: %w", name, v.p.label.Name, block.ErrNotFound)
}

// MapPages calls fn for each page of a volume's map, parents first.
func (v *View) MapPages(id block.VolumeID, fn func(TreePage) error) error {
	return v.pages(v.p.bmap.Trees()[id].Root, func(p TreePage, leaf []byte) error {
		if leaf != nil {
			for i := range blockmap.Fanout {
				if !block.DecodePointer(leaf[i*block.PointerSize:]).IsHole() {
					p.Entries++
				}
			}
		}
		return fn(p)
	})
}

// Unfolded returns how many mappings of all volumes only the journal has.
func (v *View) Unfolded() int {
	n, _ := v.p.bmap.Overlays()
	return n
}

// Location is where a block of a volume is stored.
type Location struct {
	Path    []TreePage // from the root to the leaf, as far as it can be read
	InTree  block.Pointer
	Dead    bool          // the entry in the tree was trimmed; a fold will free it
	Now     block.Pointer // what reads get: the journal may be newer
	Journal bool          // Now is from the journal
	Err     error         // why the block's content cannot be read
}

// Locate finds a block of a volume.
func (v *View) Locate(id block.VolumeID, lba block.Logical) (l Location) {
	tree := v.p.bmap.Trees()[id]
	leaf := uint64(lba) / blockmap.LeafBlocks
	at := tree.Root
	for level := blockmap.Top; level >= 0 && !at.IsHole(); level-- {
		p := TreePage{Ptr: at, Level: level, Leaf: leaf / blockmap.LeavesBelow(level) * blockmap.LeavesBelow(level)}
		i := leaf / blockmap.LeavesBelow(max(level-1, 0)) % blockmap.Fanout
		if level == 0 {
			i = uint64(lba) % blockmap.LeafBlocks
		}
		at = block.Pointer{}
		p.read(v.p.reader, func(b []byte) {
			at = block.DecodePointer(b[i*block.PointerSize:])
			for k := range blockmap.Fanout {
				if !block.DecodePointer(b[k*block.PointerSize:]).IsHole() {
					p.Entries++
				}
			}
		})
		if l.Path = append(l.Path, p); level == 0 {
			l.InTree = at
		}
	}
	l.Dead = !l.InTree.IsHole() && catalogue.Dead(tree.Pending, lba, l.InTree.Birth)
	var now [1]block.Pointer
	if err := v.p.bmap.Lookup(id, lba, now[:]); err != nil {
		l.Err = err
		return l
	}
	l.Now = now[0]
	l.Journal = l.Now != l.InTree && !(l.Dead && l.Now.IsHole())
	if !l.Now.IsHole() {
		l.Err = v.p.reader.View(l.Now, func([]byte) {})
	}
	return l
}

// CountPages calls fn for each page of a device's tree of reference counts,
// and for leaves with the counts of the block.Size blocks from first on.
func (v *View) CountPages(dev int, fn func(p TreePage, first uint64, counts []byte) error) error {
	return v.pages(v.p.machine.Superblock().Devices[dev].Counts, func(p TreePage, leaf []byte) error {
		for _, n := range leaf {
			if n != 0 {
				p.Entries++
			}
		}
		return fn(p, p.Leaf*block.Size, leaf)
	})
}
