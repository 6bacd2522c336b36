package cp

import (
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/space"
)

// countsPerLeaf is the number of reference counts in a leaf of a count tree:
// one byte each.
const countsPerLeaf = block.Size

// countChange is a change, by one, of the counts of a run of blocks on one
// track, as a number: its leaf in the count tree of its device, whether it
// lowers them, the place in the leaf and the length. In this order, devices
// apart, what raises counts comes before what lowers them: a block may have
// gained and lost a reference. Runs do not cross leaves.
type countChange uint64

const (
	changeLower = 1 << 20
	changeAt    = 8  // the place in the leaf, of 12 bits; below it the length less 1
	changeLeaf  = 21 // the leaf
)

func changeOf(r space.Run, lower bool) countChange {
	c := countChange(r.At/countsPerLeaf)<<changeLeaf | countChange(r.At%countsPerLeaf)<<changeAt | countChange(r.N-1)
	if lower {
		c |= changeLower
	}
	return c
}

// leaf returns the place of the change's leaf among those of all devices.
func (c countChange) leaf() uint64 { return uint64(c >> changeLeaf) }

// run returns the blocks, and whether their counts become lower.
func (c countChange) run() (r space.Run, lower bool) {
	at := uint64(c)>>changeAt%countsPerLeaf + c.leaf()*countsPerLeaf
	return space.Run{At: block.Physical(at), N: int(c%256) + 1}, c&changeLower != 0
}

// prepareCounts sorts all changes of references, a step at a time, and then
// makes the steps that bring them into the count trees, device by device.
func (f *fold) prepareCounts() error {
	sorter := &f.m.changes
	if !f.sorting {
		lists := []struct {
			runs  []space.Run
			lower bool
		}{{f.refs.added, false}, {f.m.meta.Taken, false}, {f.refs.dropped, true}, {f.m.meta.Freed, true}}
		n := 0
		for _, l := range lists {
			n += len(l.runs)
		}
		keys := sorter.Keys(n)[:0]
		for _, l := range lists {
			for _, r := range l.runs {
				if dev := r.At.Device(); dev >= len(f.sb.Devices) || f.sb.Devices[dev].State == DeviceGone {
					return &block.CorruptError{What: "reference", Where: r.At.String(), Why: "the pool has no such device"}
				}
				keys = append(keys, uint64(changeOf(r, l.lower)))
			}
		}
		sorter.StartKeys()
		f.sorting = true
	}
	list, done := sorter.Step(sortStep)
	if !done {
		return nil
	}
	f.sorting = false
	f.changes, f.changesLeft = len(list), len(list)
	f.counts = []func() (bool, error){}
	for dev := range f.sb.Devices {
		n, _ := slices.BinarySearch(list, uint64(changeOf(space.Run{At: block.At(dev+1, 0), N: 1}, false)))
		if n > 0 || f.frozen.Moves != nil || len(f.renew.counts[dev]) > 0 {
			f.counts = append(f.counts, f.countSteps(dev, list[:n]))
		}
		list = list[n:]
	}
	return nil
}

// sortStep is about how many changes a step sorts.
const sortStep = 128 << 10

// countSteps returns a step function that applies changes, which are in order
// and all on device dev.
func (f *fold) countSteps(dev int, changes []uint64) func() (bool, error) {
	first := uint64(block.At(dev, 0)) / countsPerLeaf // the device's first leaf among those of all
	t := &treeSteps{f: f, root: &f.sb.Devices[dev].Counts}
	t.update = blockmap.NewUpdate(f.m.Reader, f.pages, *t.root)
	t.update.Twins, t.update.Renew = f.frozen.Twins, f.renew.counts[dev]
	t.next = func() (uint64, bool) {
		if len(changes) == 0 {
			return 0, false
		}
		return countChange(changes[0]).leaf() - first, true
	}
	t.has = func(leaf uint64) bool {
		i, _ := slices.BinarySearch(changes, (leaf+first)<<changeLeaf)
		return i < len(changes) && countChange(changes[i]).leaf() == leaf+first
	}
	t.edit = func(leaf uint64, page *[block.Size]byte) error {
		for len(changes) > 0 && countChange(changes[0]).leaf()-first == leaf {
			if err := f.applyChange(page, countChange(changes[0])); err != nil {
				return err
			}
			changes = changes[1:]
			f.changesLeft--
		}
		return nil
	}
	return t.step
}

// treeSteps brings changes into a tree of a device, a level-1 page a step. Then it
// comes by all others whose leaves, or which themselves, may have to be moved.
type treeSteps struct {
	f      *fold
	root   *block.Pointer
	update *blockmap.Update

	next func() (leaf uint64, ok bool) // the first leaf that is still to be changed
	has  func(leaf uint64) bool        // reports whether one is
	edit func(leaf uint64, page *[block.Size]byte) error

	begun, listed bool
	rest          []uint64 // level-1 pages still to be looked at
}

func (t *treeSteps) step() (done bool, err error) {
	u := t.update
	if !t.begun {
		t.begun = true
		u.Moves = t.f.frozen.Moves
		for _, leaf := range u.Renew {
			t.rest = append(t.rest, leaf/blockmap.Fanout)
		}
		t.rest = slices.Compact(t.rest)
		t.listed = u.Moves == nil
	}
	if !t.listed {
		t.listed = true
		t.rest, err = blockmap.ParentsThat(t.f.m.Reader, *t.root, func(block.Pointer) bool { return true })
		return false, err
	}
	leaf, ok := t.next()
	switch {
	case ok:
		parent := leaf / blockmap.Fanout
		if i, ok := slices.BinarySearch(t.rest, parent); ok {
			t.rest = slices.Delete(t.rest, i, i+1)
		}
		return false, u.Group(parent, func(leaf uint64, _ bool) bool { return t.has(leaf) }, t.edit)
	case len(t.rest) > 0 && (t.f.moving > 0 || len(u.Renew) > 0):
		// Those with changes were visited.
		parent := t.rest[0]
		t.rest = t.rest[1:]
		return false, u.Group(parent, func(uint64, bool) bool { return false }, nil)
	}
	*t.root, err = u.Finish()
	return true, err
}

func (f *fold) applyChange(page *[block.Size]byte, ch countChange) error {
	r, lower := ch.run()
	by := 1
	if lower {
		by = -1
	}
	first := r.At.Block() % countsPerLeaf
	for i := range page[first : first+uint64(r.N)] {
		c := &page[first+uint64(i)]
		if by > 0 && *c == 255 || by < 0 && *c == 0 {
			return &block.CorruptError{What: "reference count", Where: "block " + (r.At + block.Physical(i)).String(),
				Why: fmt.Sprintf("%d cannot change by %d; run `pollux check`", *c, by)}
		}
		if *c == 0 {
			f.sb.Used++
		}
		if *c += byte(by); *c == 0 {
			f.sb.Used--
		}
	}
	return nil
}
