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
// and all on device dev, a level-1 page at a time. Then it comes by all others whose
// leaves, or which themselves, may have to be moved.
func (f *fold) countSteps(dev int, changes []uint64) func() (bool, error) {
	u := blockmap.NewUpdate(f.m.Reader, f.pages, f.sb.Devices[dev].Counts)
	first := uint64(block.At(dev, 0)) / countsPerLeaf // the device's first leaf among those of all
	next := func() uint64 { return countChange(changes[0]).leaf() - first }
	u.Moves, u.Twins, u.Renew = f.frozen.Moves, f.frozen.Twins, f.renew.counts[dev]
	var rest []uint64 // level-1 pages still to be looked at
	for _, leaf := range u.Renew {
		rest = append(rest, leaf/blockmap.Fanout)
	}
	rest = slices.Compact(rest)
	listed := u.Moves == nil
	return func() (done bool, err error) {
		if !listed {
			listed = true
			rest, err = blockmap.ParentsThat(f.m.Reader, f.sb.Devices[dev].Counts, func(block.Pointer) bool { return true })
			return false, err
		}
		if len(changes) == 0 && len(rest) > 0 && (f.moving > 0 || len(u.Renew) > 0) {
			// Those with changes were visited.
			parent := rest[0]
			rest = rest[1:]
			return false, u.Group(parent, func(uint64, bool) bool { return false }, nil)
		}
		if len(changes) == 0 {
			root, err := u.Finish()
			f.sb.Devices[dev].Counts = root
			return true, err
		}
		want := func(leaf uint64, _ bool) bool {
			i, _ := slices.BinarySearch(changes, (leaf+first)<<changeLeaf)
			return i < len(changes) && countChange(changes[i]).leaf() == leaf+first
		}
		edit := func(leaf uint64, page *[block.Size]byte) error {
			for len(changes) > 0 && next() == leaf {
				if err := f.applyChange(page, countChange(changes[0])); err != nil {
					return err
				}
				changes = changes[1:]
				f.changesLeft--
			}
			return nil
		}
		parent := next() / blockmap.Fanout
		if i, ok := slices.BinarySearch(rest, parent); ok {
			rest = slices.Delete(rest, i, i+1)
		}
		return false, u.Group(parent, want, edit)
	}
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
