package pool

import (
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/cp"
)

const (
	// scrubLeaves is how many leaves of a volume's map a step reads with their
	// data, 4 MiB, and scrubPages how many of a tree that has none.
	scrubLeaves = 4
	scrubPages  = 64
)

// scrubbed is a block to be proved.
type scrubbed struct {
	scrubFinding
	ptr block.Pointer
}

// proof is the work space of prove. Workers touch it at different places.
type proof struct {
	bad    []bool  // some copy is not right
	twins  []bool  // the twin is not right
	copies []uint8 // that were read
	leaves [][block.Size]byte
}

// step reads the next few MiB, and reports whether there is more to read. It runs
// between two steps of everything else that changes a pool: nothing is freed or
// written while it reads.
func (s *scrub) step() (more bool) {
	r := &s.rec
	sb := s.p.machine.Superblock()
	switch at := &r.place; at.part {
	case scrubCopies:
		s.structures(&sb)
		*at = scrubPlace{part: scrubCounts}
	case scrubCounts:
		if at.id >= uint64(len(sb.Devices)) {
			*at = scrubPlace{part: scrubCatalogue}
		} else if !s.window(sb.Devices[at.id].Counts, ScrubCounts, scrubPages) {
			*at = scrubPlace{part: scrubCounts, id: at.id + 1}
		}
	case scrubCatalogue:
		if !s.window(sb.Catalogue, ScrubCatalogue, scrubPages) {
			*at = scrubPlace{part: scrubPrints}
		}
	case scrubPrints:
		if at.id == 0 && at.leaf == 0 && !sb.Prints.IsHole() {
			s.prove([]scrubbed{{scrubFinding{kind: ScrubPrints, at: sb.Prints.Phys}, sb.Prints}}, false)
		}
		if roots := s.p.machine.PrintRoots(); at.id >= uint64(len(roots)) {
			*at = scrubPlace{part: scrubVolumes}
		} else if !s.window(roots[at.id], ScrubPrints, scrubPages) {
			*at = scrubPlace{part: scrubPrints, id: at.id + 1}
		}
	case scrubVolumes:
		trees := s.p.bmap.Trees()
		ids := slices.Sorted(maps.Keys(trees))
		i, found := slices.BinarySearch(ids, block.VolumeID(at.id))
		if i == len(ids) {
			return false
		}
		if !found {
			*at = scrubPlace{part: scrubVolumes, id: uint64(ids[i])}
		}
		if tree := trees[ids[i]]; tree.Deleted || !s.window(tree.Root, ScrubMap, scrubLeaves) {
			*at = scrubPlace{part: scrubVolumes, id: at.id + 1}
		}
	}
	return true
}

// window reads up to n leaves of a tree from the place of the scrub on, the pages
// above whose first leaf is among them, and what the leaves of a map refer to.
// Every page has one first leaf and so is in one window. It moves the place behind
// it, or returns false when the tree ends.
func (s *scrub) window(root block.Pointer, kind ScrubKind, n int) (more bool) {
	at := &s.rec.place
	w := &treeWindow{s: s, kind: kind, from: at.leaf, n: n}
	more = w.visit(root, blockmap.Top, 0)
	s.prove(w.leaves, kind == ScrubMap)
	if kind == ScrubMap {
		s.data(w.leaves)
	}
	if s.renewLeaves(w); more {
		at.leaf = w.next
	}
	return more
}

// renewLeaves gives leaves that have no twins some, by the next fold, where devices keep
// no copies and there is room.
func (s *scrub) renewLeaves(w *treeWindow) {
	m := s.p.machine
	if m.MayRenew() == 0 {
		return
	}
	for i, b := range w.leaves {
		switch {
		case b.ptr.Twin != 0 || s.p.set.Copies(b.at.Device()) > 1:
		case w.kind == ScrubMap:
			m.RenewLeaf(b.volume, w.numbers[i])
		case w.kind == ScrubCounts:
			m.RenewCounts(int(s.rec.place.id), w.numbers[i])
		}
	}
}

// treeWindow collects the leaves of a window.
type treeWindow struct {
	s      *scrub
	kind   ScrubKind
	from   uint64
	n      int
	leaves []scrubbed
	// numbers are those of the leaves, next that behind the last one.
	numbers []uint64
	next    uint64
}

// visit proves the pages of a subtree above its leaves and collects those. It
// returns true when it has enough. A page that cannot be read hides what is below.
func (w *treeWindow) visit(p block.Pointer, level int, leaf uint64) (enough bool) {
	if p.IsHole() || leaf+blockmap.LeavesBelow(level) <= w.from {
		return false
	}
	b := scrubbed{scrubFinding{kind: w.kind, at: p.Phys}, p}
	if w.kind == ScrubMap {
		b.volume, b.lba = block.VolumeID(w.s.rec.place.id), block.Logical(leaf*blockmap.LeafBlocks)
	}
	if level == 0 {
		w.leaves, w.numbers, w.next = append(w.leaves, b), append(w.numbers, leaf), leaf+1
		return len(w.leaves) == w.n
	}
	if leaf >= w.from {
		w.s.prove([]scrubbed{b}, false)
	}
	var entries [blockmap.Fanout]block.Pointer
	if w.s.pages.View(p, func(page []byte) {
		for i := range entries {
			entries[i] = block.DecodePointer(page[i*block.PointerSize:])
		}
	}) != nil {
		return false // it was reported when it was proved
	}
	for i, e := range entries {
		if w.visit(e, level-1, leaf+uint64(i)*blockmap.LeavesBelow(level-1)) {
			return true
		}
	}
	return false
}

// data proves the blocks that leaves refer to, whose content prove has kept.
func (s *scrub) data(leaves []scrubbed) {
	blocks := s.blocks[:0]
	for i, leaf := range leaves {
		for k := range blockmap.LeafBlocks {
			p := block.DecodePointer(s.proof.leaves[i][k*block.PointerSize:])
			if !p.IsHole() {
				blocks = append(blocks, scrubbed{scrubFinding{ScrubData, leaf.volume, leaf.lba + block.Logical(k), p.Phys}, p})
			}
		}
	}
	s.blocks = blocks
	s.prove(blocks, false)
}

// prove reads blocks from all copies and mends those that are bad. With keep, the
// content of block i is in proof.leaves[i] afterwards, zero if it is lost.
func (s *scrub) prove(blocks []scrubbed, keep bool) {
	w := &s.proof
	w.bad = append(w.bad[:0], make([]bool, len(blocks))...)
	w.twins = append(w.twins[:0], make([]bool, len(blocks))...)
	w.copies = append(w.copies[:0], make([]uint8, len(blocks))...)
	if keep {
		w.leaves = append(w.leaves[:0], make([][block.Size]byte, len(blocks))...)
	}
	for c := range s.bulk.copies() {
		_ = s.bulk.readFrom(context.Background(), c, len(blocks), func(i int) block.Pointer { return blocks[i].ptr }, func(i int, frame []byte, err error) {
			if errors.Is(err, hpdi.ErrNoCopy) {
				return
			}
			w.copies[i]++
			if err != nil {
				w.bad[i] = true
			} else if keep {
				copy(w.leaves[i][:], frame)
			}
		})
	}
	s.readTwins(blocks)
	for i, b := range blocks {
		s.count(int(w.copies[i]))
		if !w.bad[i] && !w.twins[i] {
			continue
		}
		good := func(frame []byte) bool { return prove(b.ptr, frame) == nil }
		if s.mendEither(b, w.bad[i], w.twins[i], good) && keep {
			copy(w.leaves[i][:], s.frame)
		}
	}
}

// readTwins proves the twins of blocks.
func (s *scrub) readTwins(blocks []scrubbed) {
	var have []int
	for i, b := range blocks {
		if b.ptr.Twin != 0 {
			have = append(have, i)
		}
	}
	_ = s.bulk.readFrom(context.Background(), 0, len(have), func(k int) block.Pointer { return blocks[have[k]].ptr.Second() }, func(k int, _ []byte, err error) {
		s.proof.copies[have[k]]++
		s.proof.twins[have[k]] = err != nil
	})
}

// mendEither repairs a block of which a copy, or the twin, is bad. It is in frame then.
func (s *scrub) mendEither(b scrubbed, copies, twin bool, good func([]byte) bool) bool {
	first, second := b.ptr.Phys, b.ptr.Second().Phys
	switch {
	case b.ptr.Twin == 0 || copies && (twin || s.p.set.Copies(first.Device()) > 1):
		return s.mend(b, good)
	case copies:
		first, second = second, first
	}
	// Now first is right, and second is not.
	mended, err := s.p.set.FromTwin(second, first, s.frame, good)
	if !mended {
		s.found(b.scrubFinding) // it remains bad in one of its places
		return err == nil
	}
	s.repaired(b.scrubFinding, 1)
	return true
}

// mend repairs the bad copies of a block by a good one, which is in frame then. A
// block that no copy has is a finding, unless nobody refers to it any more.
func (s *scrub) mend(b scrubbed, good func([]byte) bool) bool {
	repaired, err := s.p.set.Repair(b.at, s.frame, good)
	if err == nil {
		s.repaired(b.scrubFinding, repaired)
		return true
	}
	if b.kind == ScrubData {
		// The tree holds on to a block until the fold after it was overwritten.
		var now [1]block.Pointer
		if s.p.bmap.Lookup(b.volume, b.lba, now[:]) == nil && now[0] != b.ptr {
			return false
		}
	}
	s.found(b.scrubFinding)
	return false
}

// structures proves the labels of all devices, the superblock and the journal.
func (s *scrub) structures(sb *cp.Superblock) {
	for i, d := range sb.Devices {
		if d.State == cp.DeviceGone {
			continue
		}
		// What cannot be written anew has made the mirror lose that copy.
		mended, _ := s.p.set.ProveOwn(i)
		if s.p.flash.is(i) {
			n, _ := s.p.flash.layer.Prove() // what cannot be written is told by its state
			s.repaired(scrubFinding{kind: ScrubFlash, at: block.At(i, 0)}, n)
		}
		s.repaired(scrubFinding{kind: ScrubMirror, at: block.At(i, 0)}, mended)
		for _, b := range labelBlocks {
			s.structure(scrubFinding{kind: ScrubLabel, at: block.At(i, b)}, func(frame []byte) bool {
				l, err := decodeLabel(frame)
				return err == nil && l.Pool == sb.Pool && l.Device == d.ID && l.Index == i
			})
		}
	}
	for _, b := range cp.SuperblockAt(sb.Generation) {
		s.structure(scrubFinding{kind: ScrubSuperblock, at: block.At(0, b)}, func(frame []byte) bool {
			x, err := cp.DecodeSuperblock(frame)
			return err == nil && x.Pool == sb.Pool && x.Generation == sb.Generation
		})
	}
	s.journal()
}

// journal proves what a recovery would read of it. A journal that no copy has whole
// costs nothing while the pool is open: everything in it is in memory, too, and a
// fold begins a new one.
func (s *scrub) journal() {
	f := scrubFinding{kind: ScrubJournal, at: block.At(0, s.p.label.Layout.Journal)}
	mended, whole, err := s.p.machine.ProveJournal()
	s.repaired(f, mended)
	if err != nil || !whole {
		s.repaired(f, s.p.set.Copies(0))
		s.renew = s.p.machine.Stats().Folds + 1
	}
}

// structure proves a block that no pointer names.
func (s *scrub) structure(f scrubFinding, good func([]byte) bool) {
	bad, copies := false, 0
	for c := range s.p.set.Copies(f.at.Device()) {
		err := s.p.set.ReadCopy(c, f.at, s.frame)
		if errors.Is(err, hpdi.ErrNoCopy) {
			continue
		}
		copies++
		bad = bad || err != nil || !good(s.frame)
	}
	if s.count(copies); bad {
		s.mend(scrubbed{scrubFinding: f}, good)
	}
}

// save writes the record.
func (s *scrub) save() {
	s.rec.generation++
	s.p.advise(scrubBlocks, s.frame, &s.rec)
}
