package cp

import (
	"encoding/binary"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/space"
	"github.com/pollux-storage/pollux/internal/table"
)

// The fingerprints of stored blocks are kept track by track, so that from one block
// that the index knows a sequence can be followed both ways, and the index can be
// made anew. Journal records carry those of new blocks; folds bring them into a tree
// for each device, whose leaves have eight bytes a block. What becomes free keeps its
// fingerprint until the block is taken for something else: then it is that of the new
// content, or none for a page of metadata and for what a volume writes that shares
// nothing. So a block in use has the fingerprint of what it holds or none, also before it
// is written, and a frame in the cache with that content is what the device has. Whatever
// cannot be read, or written because the pool is nearly full, costs savings and nothing
// else.

// printsPerLeaf is the number of fingerprints in a leaf: of two tracks.
const printsPerLeaf = block.Size / printSize

// prints are the fingerprints of a pool's blocks.
type prints struct {
	roots [MaxDevices]block.Pointer // of the trees, as of the last fold
	lost  bool                      // they could not be read
	tries int                       // folds in a row that have failed because of them
	// active are those since the last fold began, folding those that it brings into
	// the trees, both by physical block.
	active, folding table.Table[uint64]
	near            [nearLeaves]nearLeaf
}

// nearLeaf is a leaf, or a part of the unfolded ones, that was looked at lately.
type nearLeaf struct {
	of     uint64 // number among those of all devices, plus 1
	prints [printsPerLeaf]dedup.Fingerprint
}

const nearLeaves = 64

// decodePrint returns fingerprint i of those in b.
func decodePrint(b []byte, i int) dedup.Fingerprint {
	return dedup.Fingerprint(binary.LittleEndian.Uint64(b[i*printSize:]))
}

func leafOf(p block.Physical) uint64 { return uint64(p) / printsPerLeaf }

// devicePrints returns the device of a leaf among those of all, and its number there.
func devicePrints(leaf uint64) (dev int, n uint64) {
	p := block.Physical(leaf * printsPerLeaf)
	return p.Device(), p.Block() / printsPerLeaf
}

// readRoots reads the page of the roots. Without it no fingerprint is read or written
// until a repair has made an end of those that there are.
func (m *Machine) readRoots() {
	if m.sb.Prints.IsHole() {
		return
	}
	err := m.Reader.View(m.sb.Prints, func(page []byte) {
		for i := range m.prints.roots {
			m.prints.roots[i] = block.DecodePointer(page[i*block.PointerSize:])
		}
	})
	m.prints.lost = err != nil
}

// PrintRoots returns the roots of the trees of fingerprints, by device.
func (m *Machine) PrintRoots() []block.Pointer { return m.prints.roots[:len(m.sb.Devices)] }

// print returns the fingerprint of a block as far as it is known.
func (m *Machine) print(p block.Physical) dedup.Fingerprint {
	for _, t := range [...]*table.Table[uint64]{&m.prints.active, &m.prints.folding} {
		if f, ok := t.Get(uint64(p)); ok {
			return dedup.Fingerprint(f)
		}
	}
	leaf := leafOf(p)
	near := &m.prints.near[leaf%nearLeaves]
	if near.of != leaf+1 {
		m.readPrints(leaf, near)
	}
	return near.prints[p%printsPerLeaf]
}

// Print returns the fingerprint of a block with this content.
func (m *Machine) Print(data []byte) dedup.Fingerprint {
	if m.Hash != nil {
		return m.Hash(data)
	}
	return m.sb.Secret.Fingerprint(data)
}

// Printer returns what computes the fingerprints of blocks, for any goroutine, from the
// moment on when a volume shares.
func (m *Machine) Printer() func(data []byte) uint64 {
	hash, secret := m.Hash, m.sb.Secret
	if hash == nil {
		hash = secret.Fingerprint
	}
	return func(data []byte) uint64 { return uint64(hash(data)) }
}

// Candidates implements [dedup.Stored] for what the pool has.
func (m *Machine) Candidates(f dedup.Fingerprint, to []block.Physical) []block.Physical {
	return m.Index.Candidates(f, to)
}

// Fingerprint implements [dedup.Stored].
func (m *Machine) Fingerprint(p block.Physical) dedup.Fingerprint {
	if m.avoid != nil && m.avoid(p) || !m.Space.MayShare(p) {
		return dedup.None
	}
	return m.print(p)
}

// Avoid keeps blocks from being shared as long as which says so; nil ends that.
func (m *Machine) Avoid(which func(p block.Physical) bool) { m.avoid = which }

// Learn takes note of the fingerprint of a block that is stored, if it is not known. It
// is called between steps.
func (m *Machine) Learn(p block.Physical, f dedup.Fingerprint) {
	if m.print(p) != f {
		m.notePrint(p, f)
	}
}

// readPrints reads a leaf of the trees.
func (m *Machine) readPrints(leaf uint64, to *nearLeaf) {
	clear(to.prints[:])
	to.of = leaf + 1
	dev, n := devicePrints(leaf)
	if dev >= MaxDevices || n >= blockmap.MaxLeaves {
		return
	}
	p, err := blockmap.FindLeaf(m.Reader, m.prints.roots[dev], n)
	if err != nil || p.IsHole() {
		return
	}
	_ = m.Reader.View(p, func(page []byte) {
		for i := range to.prints {
			to.prints[i] = decodePrint(page, i)
		}
	})
}

// prefetchPrints reads leaves of the trees together that will be looked at.
func (m *Machine) prefetchPrints(leaves []uint64) {
	var ps []block.Pointer
	for _, leaf := range leaves {
		dev, n := devicePrints(leaf)
		if dev >= MaxDevices || n >= blockmap.MaxLeaves {
			continue
		}
		if p, err := blockmap.FindLeaf(m.Reader, m.prints.roots[dev], n); err == nil && !p.IsHole() {
			ps = append(ps, p)
		}
	}
	m.Reader.Prefetch(ps)
}

// LoadPrints makes the fingerprints that wait for a fold those of the journal, after
// Recover, which a takeover waits for, has left that out. It must be called before
// the first Commit.
func (m *Machine) LoadPrints() error {
	if !m.sb.Shares() {
		return nil
	}
	j := m.journal // chain moves its positions
	c, err := j.chain(m.sb.Journal)
	if err != nil {
		return err
	}
	defer c.free()
	defer m.saveIndexes()
	return c.each(func(r *record) error {
		for _, run := range r.Fold.Taken {
			m.unprint(run)
		}
		for i := range r.Commit.Runs {
			run := &r.Commit.Runs[i]
			for k := range len(run.Prints) / printSize {
				m.notePrint(run.At+block.Physical(k), decodePrint(run.Prints, k))
			}
			if len(run.Prints) == 0 && !run.Shared {
				m.unprint(space.Run{At: run.At, N: len(run.Sums)})
			}
		}
		return nil
	})
}

// notePrint remembers the fingerprint of a block that was written.
func (m *Machine) notePrint(p block.Physical, f dedup.Fingerprint) {
	m.prints.active.Put(uint64(p), uint64(f))
	for _, x := range [...]*dedup.Index{m.Index, m.Next} {
		if x != nil {
			x.Put(f, p)
		}
	}
}

// unprint takes the fingerprints from blocks that were taken for what has none.
func (m *Machine) unprint(r space.Run) {
	if !m.sb.Shares() {
		return
	}
	for i := range r.N {
		m.prints.active.Put(uint64(r.At)+uint64(i), uint64(dedup.None))
	}
}

// printFold is the part of a fold that brings fingerprints into their trees.
type printFold struct {
	begun bool
	keys  []uint64 // of the blocks still to be brought there, in order
	steps []func() (done bool, err error)
	roots [MaxDevices]block.Pointer
	done  bool
}

// beginPrints gives a fold the fingerprints that there are; those that a fold which
// failed could not bring into the trees are among them.
func (m *Machine) beginPrints() {
	if m.prints.lost {
		m.prints.active.Clear()
	}
	if m.prints.folding.Len() == 0 {
		m.prints.active, m.prints.folding = m.prints.folding, m.prints.active
	}
}

// forgetPrints drops what a fold has brought into the trees.
func (m *Machine) forgetPrints() {
	m.prints.folding.Clear()
	m.prints.tries = 0
	for i := range m.prints.near {
		m.prints.near[i].of = 0
	}
}

// printTries is how many folds may fail because of fingerprints before folds leave them
// alone: what cannot be read of their trees must not keep the rest from being folded.
const printTries = 3

// tryPrints carries out a step.
func (f *fold) tryPrints() error {
	p := &f.m.prints
	err := f.stepPrints()
	if err == nil {
		return nil
	}
	if p.tries++; p.tries == printTries {
		p.lost = true
		p.folding.Clear()
	}
	return fmt.Errorf("fingerprints: %w", err)
}

// stepPrints carries out a step. It sorts, writes a page above leaves with those that
// changed, or, once, the page of the roots.
func (f *fold) stepPrints() error {
	m, p := f.m, &f.prints
	switch {
	case !p.begun:
		p.begun = true
		p.roots = m.prints.roots
		table.Start(&m.changes, &m.prints.folding)
		return nil
	case p.steps == nil:
		keys, sorted := m.changes.Step(sortStep)
		if !sorted {
			return nil
		}
		p.keys = keys
		p.steps = f.printSteps()
		return nil
	case len(p.steps) > 0:
		done, err := p.steps[0]()
		if err == nil && done {
			p.steps = p.steps[1:]
		}
		return err
	}
	p.done = true
	return f.writeRoots()
}

// printSteps returns the steps of all devices whose trees change.
func (f *fold) printSteps() []func() (bool, error) {
	steps := []func() (bool, error){}
	if !f.roomForPrints() {
		f.prints.keys = nil
	}
	for dev := range f.sb.Devices {
		root := f.prints.roots[dev]
		n := table.Between(f.prints.keys, uint64(block.At(dev, 0)), uint64(block.At(dev+1, 0)))
		if f.sb.Devices[dev].State != DeviceUsed {
			if !root.IsHole() {
				steps = append(steps, f.dropPrints(dev))
			}
			continue
		}
		if len(n) > 0 || f.frozen.Moves != nil && !root.IsHole() {
			steps = append(steps, f.printTree(dev, n))
		}
	}
	return steps
}

// roomForPrints reports whether there is room for the leaves that the fold would write,
// beside what is left to data.
func (f *fold) roomForPrints() bool {
	pages, last := int64(0), ^uint64(0)
	for _, key := range f.prints.keys {
		if leaf := key / printsPerLeaf; leaf != last {
			pages, last = pages+1, leaf
		}
	}
	return pages == 0 || f.m.roomForLeafTwins() >= 2*pages
}

// printTree returns a step function that brings fingerprints into a device's tree.
func (f *fold) printTree(dev int, keys []uint64) func() (bool, error) {
	first := uint64(block.At(dev, 0)) / printsPerLeaf
	t := &treeSteps{f: f, root: &f.prints.roots[dev]}
	t.next = func() (uint64, bool) {
		if len(keys) == 0 {
			return 0, false
		}
		return keys[0]/printsPerLeaf - first, true
	}
	t.has = func(leaf uint64) bool {
		lo := (leaf + first) * printsPerLeaf
		return len(table.Between(keys, lo, lo+printsPerLeaf)) > 0
	}
	t.edit = func(leaf uint64, page *[block.Size]byte) error {
		for ; len(keys) > 0 && keys[0]/printsPerLeaf-first == leaf; keys = keys[1:] {
			print, _ := f.m.prints.folding.Get(keys[0])
			binary.LittleEndian.PutUint64(page[keys[0]%printsPerLeaf*printSize:], print)
		}
		return nil
	}
	t.update = blockmap.NewUpdate(f.m.Reader, f.pages, *t.root)
	t.update.Lossy = true
	return t.step
}

// dropPrints returns a step function that frees a part of the tree of a device that
// leaves the pool.
func (f *fold) dropPrints(dev int) func() (bool, error) {
	left := f.m.moveBudget() / blockmap.Fanout
	u := blockmap.NewUpdate(f.m.Reader, f.pages, f.prints.roots[dev])
	u.Lossy = true
	var parents []uint64
	listed := false
	return func() (done bool, err error) {
		if !listed {
			listed = true
			parents, err = blockmap.ParentsThat(f.m.Reader, f.prints.roots[dev], func(block.Pointer) bool { return true })
			return false, err
		}
		if len(parents) > 0 && left >= 0 {
			err := u.Group(parents[0], func(_ uint64, exists bool) bool { return exists },
				func(_ uint64, page *[block.Size]byte) error {
					clear(page[:])
					return nil
				})
			parents = parents[1:]
			left--
			return false, err
		}
		root, err := u.Finish()
		f.prints.roots[dev] = root
		return true, err
	}
}

// writeRoots writes the page of the roots where one of them has changed, or it has to
// move.
func (f *fold) writeRoots() error {
	old := f.sb.Prints
	if f.prints.roots == f.m.prints.roots && (old.IsHole() || f.frozen.Moves == nil || !f.frozen.Moves(old)) {
		return nil
	}
	var page [block.Size]byte
	for i, p := range f.prints.roots {
		p.Encode(page[i*block.PointerSize:])
	}
	p, err := f.pages.WritePage(page[:], true)
	if err == nil && !old.IsHole() {
		err = f.pages.FreePage(old)
	}
	f.sb.Prints = p
	return err
}

// AdoptIndex makes an index that outlived the guest before Index. It finds blocks at once.
// Where the pool has memory it wants a round all the same, which finds the copies on disks
// of what is there, see indexInMemory.
func (m *Machine) AdoptIndex(x *dedup.Index) {
	m.Index = x
	if m.memoryDevices(DeviceUsed) != 0 {
		x.Renew()
	}
}

// saveIndexes stores how far the indexes are, where they outlive the guest.
func (m *Machine) saveIndexes() {
	for _, x := range [...]*dedup.Index{m.Index, m.Next} {
		if x != nil {
			x.Save()
		}
	}
}

// IndexBegin begins a round of an index, Index or Next, with the fingerprints that wait
// for a fold, and IndexFrom goes on with those in the trees. A fold moves the former to
// the latter: none may be under way, and they are fewest when one has just ended.
func (m *Machine) IndexBegin(x *dedup.Index) {
	defer x.Save()
	x.Begin()
	x.Whole = m.memoryDevices(DeviceUsed)
	for _, t := range [...]*table.Table[uint64]{&m.prints.folding, &m.prints.active} {
		for p, f := range t.All() {
			m.indexStored(x, dedup.Fingerprint(f), block.Physical(p))
		}
	}
}

// UseNext makes Next the index, once its round is over, and frees the one before.
func (m *Machine) UseNext() {
	m.Index, m.Next = m.Next, m.Index
	m.Index.Successor = false
	m.Index.Save() // before the other goes: whoever adopts one of both takes the newer
	m.DropNext()
}

// DropNext gives up Next, if there is one.
func (m *Machine) DropNext() {
	if m.Next != nil {
		_ = m.Next.Drop() // what it leaves is given back when the pool is opened next
	}
	m.Next = nil
}

// IndexFrom puts what the trees of fingerprints have into an index, as many level-1
// pages as n from where its round is. It is called between steps, and whatever cannot be
// read is left out. When there is no more the round is over.
func (m *Machine) IndexFrom(x *dedup.Index, n int) {
	defer x.Save()
	at := &x.Round.Place
	for ; n > 0; n-- {
		if at.Device >= len(m.sb.Devices) {
			x.End()
			return
		}
		root := m.prints.roots[at.Device]
		parents, err := blockmap.Parents(m.Reader, root, at.Leaf, blockmap.MaxLeaves)
		if err != nil || len(parents) == 0 {
			*at = dedup.Place{Device: at.Device + 1}
			continue
		}
		m.indexBelow(x, at.Device, root, parents[0])
		at.Leaf = (parents[0] + 1) * blockmap.Fanout
	}
}

// IndexProgress returns how many level-1 pages of fingerprints lie before a place, and
// how many there can be. One is for 512 MiB of a device.
func (m *Machine) IndexProgress(at dedup.Place) (done, all int) {
	for i, d := range m.sb.Devices {
		if d.State == DeviceGone {
			continue
		}
		n := int((d.Blocks + blockmap.Fanout*printsPerLeaf - 1) / (blockmap.Fanout * printsPerLeaf))
		switch {
		case i < at.Device:
			done += n
		case i == at.Device:
			done += min(n, int(at.Leaf/blockmap.Fanout))
		}
		all += n
	}
	return done, all
}

// indexBelow puts the fingerprints below a level-1 page into an index.
func (m *Machine) indexBelow(x *dedup.Index, dev int, root block.Pointer, parent uint64) {
	lo, hi := parent*blockmap.Fanout, (parent+1)*blockmap.Fanout
	// What cannot be read is missing.
	_ = blockmap.Walk(m.Reader, root, func(p block.Pointer, level int, leaf uint64) (bool, error) {
		if leaf >= hi || leaf+blockmap.LeavesBelow(level) <= lo {
			return false, nil
		}
		if level > 0 {
			return true, nil
		}
		// Copied, because what is done with them may look at other pages.
		var prints [block.Size]byte
		if m.Reader.View(p, func(page []byte) { copy(prints[:], page) }) != nil {
			return false, nil
		}
		for i := range uint64(printsPerLeaf) {
			m.indexStored(x, decodePrint(prints[:], int(i)), block.At(dev, leaf*printsPerLeaf+i))
		}
		return false, nil
	})
}

// indexStored puts a block into an index, unless it was freed.
func (m *Machine) indexStored(x *dedup.Index, f dedup.Fingerprint, p block.Physical) {
	if f != dedup.None && m.Space.Count(p) > 0 {
		x.Put(f, p)
		if m.inMemory(p) {
			m.indexInMemory(x, f, p)
		}
	}
}

// EnableSharing makes the pool one whose volumes may share blocks, with a secret for
// its fingerprints. No fold may be under way.
func (m *Machine) EnableSharing(secret dedup.Secret) error {
	return m.Rewrite(func(sb *Superblock) { sb.Secret = secret })
}
