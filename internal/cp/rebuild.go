package cp

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/space"
)

// Rebuild makes new trees of reference counts of what Space counts, and makes them
// the pool's. Space has nothing but what its caller found: references of maps and of
// the catalogue, and held, which are those that these trees do not count and whose
// blocks must stay whole: of overlays, and of the pages of the trees that are
// replaced. used says of volumes how many entries their trees have, where the
// catalogue is wrong about that; then the catalogue is written anew, too, and its
// pages are among held. withoutPrints drops the fingerprints, whose pages are among held
// then.
//
// It does not follow the way of a fold, which begins with the counts that are wrong.
// The new trees count their own pages as well: where these lie is settled before the
// first is written. So no journal record is needed, and journal, consistency point
// and log position stay what they are. The number of the fold rises by two, so that
// neither the last fold's record in the journal belongs to the superblock nor that
// of one which never got its own.
//
// What a power cut leaves is the state before or the new one: pages go to blocks
// that nothing refers to, of which that is durable, and are durable before the
// superblock. It is for a machine that nobody has started; Space is of no use
// afterwards.
func (m *Machine) Rebuild(held []space.Run, used map[block.VolumeID]int64, withoutPrints bool) error {
	// The sync of this superblock makes durable what the last owner had written
	// and Recover found, as that of a claim does.
	if err := m.Rewrite(func(*Superblock) {}); err != nil {
		return err
	}
	r := rebuild{m: m, sb: m.Superblock()}
	if len(used) > 0 {
		if err := r.correct(used); err != nil {
			return err
		}
	}
	w := &pageWriter{m: m, birth: m.sb.CP, settled: true}
	pages, err := r.place(w, held)
	if err == nil {
		err = r.write(w)
	}
	if n := blocksOf(w.taken); err == nil && n != pages {
		err = fmt.Errorf("reference counts: %d pages were written instead of %d", n, pages)
	}
	if err = errors.Join(err, w.close()); err != nil {
		return err
	}
	if err := m.Devices.Sync(); err != nil {
		return err
	}
	if err := m.Rewrite(func(sb *Superblock) {
		sb.Fold, sb.Devices, sb.Used = m.sb.Fold+2, r.sb.Devices, r.sb.Used
		sb.Catalogue, sb.CatBytes = r.sb.Catalogue, r.sb.CatBytes
		sb.Twins = sb.Twins || len(w.twinsTaken) > 0
		if withoutPrints {
			sb.Prints = block.Pointer{}
		}
	}); err != nil {
		return err
	}
	m.meta, m.used = foldPages{}, int64(m.sb.Used)
	trees := m.Map.Trees()
	for id, n := range used {
		t := trees[id]
		t.Used = n
		m.Map.AddVolume(id, t)
		m.Catalogue.SetTree(id, t.Root, n, t.Pending)
	}
	return nil
}

// rebuild is a Rebuild under way.
type rebuild struct {
	m   *Machine
	sb  Superblock // the one to be written
	enc []byte     // the new catalogue, nil when it stays as it is
}

// correct makes the catalogue, as of the superblock, one with other figures.
func (r *rebuild) correct(used map[block.VolumeID]int64) error {
	list, err := r.m.readCatalogue()
	if err != nil {
		return err
	}
	for _, v := range list.All() {
		if n, ok := used[v.ID]; ok {
			list.SetTree(v.ID, v.Root, n, v.Pending)
		}
	}
	r.enc = catalogue.Encode(list.All(), list.NextID())
	return nil
}

// place allocates a block for each page that will be written, and one for its twin as
// long as there is room, gives up what is held, and returns how many pages there are. A
// page that lies where no other block is in use makes another leaf necessary; so more is
// allocated until it is enough, and given back when held no longer makes leaves
// necessary.
func (r *rebuild) place(w *pageWriter, held []space.Run) (pages int, err error) {
	m := r.m
	for need := r.pages(); pages < need; need = r.pages() {
		for _, p := range w.pairsOf(need - pages) {
			w.pairs = append(w.pairs, p)
			pages += p.N
		}
		if w.spare, err = m.Space.Alloc(need-pages, w.spare); err != nil {
			return 0, fmt.Errorf("new pages of reference counts: %w", err)
		}
		pages = need
	}
	for _, run := range held {
		if err := m.Space.Dec(run); err != nil {
			return 0, err
		}
	}
	for need := r.pages(); pages > need; need = r.pages() {
		for ; pages > need; pages-- {
			if err := r.giveBack(w); err != nil {
				return 0, err
			}
		}
	}
	return pages, nil
}

// giveBack frees the last place of a page.
func (r *rebuild) giveBack(w *pageWriter) error {
	last := func(run *space.Run) space.Run {
		run.N--
		return space.Run{At: run.At + block.Physical(run.N), N: 1}
	}
	if n := len(w.spare) - 1; n >= 0 {
		p := last(&w.spare[n])
		if w.spare[n].N == 0 {
			w.spare = w.spare[:n]
		}
		return r.m.Space.Dec(p)
	}
	n := len(w.pairs) - 1
	p := last(&w.pairs[n].Run)
	second := space.Run{At: w.pairs[n].Twin.Of(p.At), N: 1}
	if w.pairs[n].N == 0 {
		w.pairs = w.pairs[:n]
	}
	return errors.Join(r.m.Space.Dec(p), r.m.Space.Dec(second))
}

// pages returns how many pages trees of what Space counts now have.
func (r *rebuild) pages() (n int) {
	for dev := range r.sb.Devices {
		last, begun := uint64(0), false
		for leaf := range r.leaves(dev) {
			var page [block.Size]byte
			if r.m.Space.Counts(dev, leaf*countsPerLeaf, page[:]); page == [block.Size]byte{} {
				continue
			}
			n += pagesAbove(leaf, last, begun)
			last, begun = leaf, true
		}
	}
	for leaf := range r.catalogueLeaves() {
		n += pagesAbove(leaf, leaf-1, leaf > 0)
	}
	return n
}

// pagesAbove returns how many pages a leaf, and what is above it, adds to a tree whose
// last leaf is another, if it has any.
func pagesAbove(leaf, last uint64, begun bool) (n int) {
	for ; n <= blockmap.Top; n++ {
		if begun && leaf/blockmap.LeavesBelow(n) == last/blockmap.LeavesBelow(n) {
			break
		}
	}
	return n
}

// leaves returns how many leaves a device's counts have at most.
func (r *rebuild) leaves(dev int) uint64 {
	return (r.sb.Devices[dev].Blocks + countsPerLeaf - 1) / countsPerLeaf
}

func (r *rebuild) catalogueLeaves() uint64 {
	return uint64(len(r.enc)+block.Size-1) / block.Size
}

// write writes the trees.
func (r *rebuild) write(w *pageWriter) (err error) {
	r.sb.Used = 0
	for dev := range r.sb.Devices {
		r.sb.Devices[dev].Counts, err = r.tree(w, r.leaves(dev), func(leaf uint64, page []byte) {
			r.m.Space.Counts(dev, leaf*countsPerLeaf, page)
			for _, n := range page {
				if n > 0 {
					r.sb.Used++
				}
			}
		})
		if err != nil {
			return err
		}
	}
	if r.enc != nil {
		r.sb.CatBytes = uint32(len(r.enc))
		r.sb.Catalogue, err = r.tree(w, r.catalogueLeaves(), func(leaf uint64, page []byte) { copy(page, r.enc[leaf*block.Size:]) })
	}
	return errors.Join(err, w.flush())
}

// tree writes a tree of which fill gives the leaves.
func (r *rebuild) tree(w *pageWriter, leaves uint64, fill func(leaf uint64, page []byte)) (block.Pointer, error) {
	u := blockmap.NewUpdate(r.m.Reader, w, block.Pointer{})
	u.Twins = true
	for parent := uint64(0); parent*blockmap.Fanout < leaves; parent++ {
		err := u.Group(parent, func(leaf uint64, _ bool) bool { return leaf < leaves },
			func(leaf uint64, page *[block.Size]byte) error {
				fill(leaf, page[:])
				return nil
			})
		if err != nil {
			return block.Pointer{}, err
		}
	}
	return u.Finish()
}
