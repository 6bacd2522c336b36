package cp

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/space"
)

// countsPerLeaf is the number of reference counts in a leaf of a count tree:
// one byte each.
const countsPerLeaf = block.Size

// fold is a fold under way.
type fold struct {
	m      *Machine
	frozen blockmap.Frozen
	sb     Superblock         // the one to be written
	list   []catalogue.Volume // as of the fold's consistency point
	next   block.VolumeID     // as of the fold's consistency point
	sorted bool               // the mappings are in order
	todo   []block.VolumeID   // volumes still to be folded
	volume *blockmap.VolumeFold
	budget int // level-1 pages still to be visited only to free something
	trees  map[block.VolumeID]blockmap.Tree
	refs   refChanges
	pages  *pageWriter
	counts []func() (done bool, err error) // steps of the count trees
}

// freeBudget is how many level-1 pages a fold visits only in order to free what
// they map: up to 32 GiB of a volume. It bounds the memory and the journal
// record of a fold after large trims and deletes.
const freeBudget = 128

// refChanges collects the references that the volumes' trees gained and lost.
// The lost ones are freed when the fold is durable.
type refChanges struct {
	added, dropped []space.Run
}

// Added implements blockmap.References.
func (r *refChanges) Added(p block.Pointer) { r.added = addRun(r.added, p.Phys) }

// Dropped implements blockmap.References.
func (r *refChanges) Dropped(p block.Pointer) { r.dropped = addRun(r.dropped, p.Phys) }

// countChange is a change of the counts of a run of blocks on one track.
type countChange struct {
	space.Run
	by int
}

// Fold carries out one bounded step of a fold and begins one if none is under
// way. It returns true when a fold has been completed and is durable. After
// an error the fold begins again, from the same point, unless Broken says
// otherwise. Consistency points may be made between the steps.
func (m *Machine) Fold() (done bool, err error) {
	if m.broken != nil {
		return false, m.broken
	}
	if m.folding == nil {
		m.folding = m.beginFold()
	}
	if done, err = m.folding.step(); err != nil {
		err = fmt.Errorf("fold %d: %w", m.sb.Fold+1, err)
		return false, errors.Join(err, m.folding.abandon())
	}
	if done {
		m.folding = nil
		m.stats.folds.Add(1)
	}
	return done, nil
}

// Folding reports whether a fold is under way.
func (m *Machine) Folding() bool { return m.folding != nil }

func (m *Machine) beginFold() *fold {
	f := &fold{m: m, frozen: m.Map.BeginFold(), sb: m.Superblock(), list: m.Catalogue.All(), next: m.Catalogue.NextID()}
	f.sb.Fold++
	f.sb.CP, f.sb.Log, f.sb.Flush = m.last.CP, m.last.Log, m.last.Flush
	f.sb.Journal = m.journal.next
	f.reset()
	return f
}

// reset makes the fold begin at its beginning.
func (f *fold) reset() {
	f.todo, f.volume, f.sorted = nil, nil, false
	f.trees = map[block.VolumeID]blockmap.Tree{}
	f.budget = freeBudget
	f.refs = refChanges{}
	f.sb.Devices = f.m.Superblock().Devices
	f.sb.Catalogue, f.sb.CatBytes = f.m.sb.Catalogue, f.m.sb.CatBytes
	f.counts = nil
	f.sb.Used = uint64(f.m.used)
	f.pages = &pageWriter{m: f.m, birth: f.sb.CP}
}

// abandon gives back the pages that a failed fold took and makes it begin
// again.
func (f *fold) abandon() error {
	err := f.pages.discard()
	if err != nil {
		f.m.broken = err
	}
	f.reset()
	return err
}

func (f *fold) step() (done bool, err error) {
	m := f.m
	switch {
	case !f.sorted:
		if f.sorted = f.frozen.Sort(); f.sorted {
			f.todo = f.frozen.Volumes()
		}
		return false, nil
	case f.volume != nil:
		return false, f.stepVolume()
	case len(f.todo) > 0:
		// Whatever the trees hold is of the last fold's point or older, and all
		// that this fold brings into them is younger: the limit of the dead.
		f.volume, err = f.frozen.Fold(f.todo[0], m.sb.CP, &f.budget, m.Reader, f.pages, &f.refs)
		return false, err
	case f.counts == nil:
		return false, f.prepareCounts()
	case len(f.counts) > 0:
		done, err := f.counts[0]()
		if err == nil && done {
			f.counts = f.counts[1:]
		}
		return false, err
	}
	if err := f.writeCatalogue(); err != nil {
		return false, err
	}
	if err := f.pages.finish(); err != nil {
		return false, err
	}
	return true, f.commit()
}

func (f *fold) stepVolume() error {
	done, err := f.volume.Step()
	if err != nil || !done {
		return err
	}
	if f.trees[f.todo[0]], err = f.volume.Finish(); err != nil {
		return err
	}
	f.todo, f.volume = f.todo[1:], nil
	return nil
}

// prepareCounts sorts all changes of references and makes the steps that
// bring them into the count trees, device by device.
func (f *fold) prepareCounts() error {
	var list []countChange
	add := func(runs []space.Run, by int) {
		for _, r := range runs {
			list = append(list, countChange{r, by})
		}
	}
	add(f.refs.added, 1)
	add(f.m.meta.Taken, 1)
	add(f.refs.dropped, -1)
	add(f.m.meta.Freed, -1)
	// Increments first: a block may have gained and lost a reference.
	slices.SortStableFunc(list, func(a, b countChange) int { return cmp.Compare(leafOf(a), leafOf(b)) })
	f.counts = []func() (bool, error){}
	for len(list) > 0 {
		dev := list[0].At.Device()
		n, _ := slices.BinarySearchFunc(list, block.At(dev+1, 0)/countsPerLeaf, func(r countChange, leaf block.Physical) int { return cmp.Compare(leafOf(r), leaf) })
		if dev >= len(f.sb.Devices) {
			return &block.CorruptError{What: "reference", Where: list[0].At.String(), Why: "the pool has no such device"}
		}
		f.counts = append(f.counts, f.countSteps(dev, list[:n]))
		list = list[n:]
	}
	return nil
}

// leafOf returns the place of a change's leaf among those of all devices.
// A track never crosses leaves.
func leafOf(c countChange) block.Physical { return c.At / countsPerLeaf }

// countSteps returns a step function that applies changes, which are sorted
// by leaf and all on device dev, a level-1 page at a time.
func (f *fold) countSteps(dev int, changes []countChange) func() (bool, error) {
	u := blockmap.NewUpdate(f.m.Reader, f.pages, f.sb.Devices[dev].Counts)
	next := func() uint64 { return changes[0].At.Block() / countsPerLeaf }
	return func() (bool, error) {
		if len(changes) == 0 {
			root, err := u.Finish()
			f.sb.Devices[dev].Counts = root
			return true, err
		}
		want := func(leaf uint64, _ bool) bool {
			_, ok := slices.BinarySearchFunc(changes, leaf, func(c countChange, leaf uint64) int {
				return cmp.Compare(c.At.Block()/countsPerLeaf, leaf)
			})
			return ok
		}
		edit := func(leaf uint64, page *[block.Size]byte) error {
			for len(changes) > 0 && next() == leaf {
				if err := f.applyChange(page, changes[0]); err != nil {
					return err
				}
				changes = changes[1:]
			}
			return nil
		}
		return false, u.Group(next()/blockmap.Fanout, want, edit)
	}
}

func (f *fold) applyChange(page *[block.Size]byte, ch countChange) error {
	first := ch.At.Block() % countsPerLeaf
	for i := range page[first : first+uint64(ch.N)] {
		c := &page[first+uint64(i)]
		if ch.by > 0 && *c == 255 || ch.by < 0 && *c == 0 {
			return &block.CorruptError{What: "reference count", Where: "block " + (ch.At + block.Physical(i)).String(),
				Why: fmt.Sprintf("%d cannot change by %d; run `pollux check`", *c, ch.by)}
		}
		if *c == 0 {
			f.sb.Used++
		}
		if *c += byte(ch.by); *c == 0 {
			f.sb.Used--
		}
	}
	return nil
}

// writeCatalogue stores the list of volumes with their new roots.
func (f *fold) writeCatalogue() error {
	list := f.list[:0:0]
	for _, v := range f.list {
		t, ok := f.trees[v.ID]
		if !ok {
			t = f.frozen.Trees[v.ID]
		}
		if v.Root, v.Used, v.Pending = t.Root, t.Used, t.Pending; !t.Gone() {
			list = append(list, v)
		}
	}
	f.list = list
	enc := catalogue.Encode(f.list, f.next)
	pages := uint64(len(enc)+block.Size-1) / block.Size
	u := blockmap.NewUpdate(f.m.Reader, f.pages, f.sb.Catalogue)
	for parent := uint64(0); parent <= catalogue.MaxBytes/block.Size/blockmap.Fanout; parent++ {
		err := u.Group(parent, func(leaf uint64, exists bool) bool { return exists || leaf < pages },
			func(leaf uint64, page *[block.Size]byte) error {
				clear(page[:])
				if leaf < pages {
					copy(page[:], enc[leaf*block.Size:])
				}
				return nil
			})
		if err != nil {
			return err
		}
	}
	var err error
	f.sb.Catalogue, err = u.Finish()
	f.sb.CatBytes = uint32(len(enc))
	return err
}

// commit makes the fold durable and installs it.
func (f *fold) commit() error {
	m := f.m
	if planted.Has(planted.JournalTailEarly) {
		f.sb.Journal = m.journal.next
	}
	pages := foldPages{Fold: f.sb.Fold, Taken: f.pages.taken, Freed: f.pages.freed}
	if err := m.journal.append(&record{Epoch: m.sb.Epoch, Type: typeFold, Fold: pages}); err != nil {
		if !errors.Is(err, errJournalFull) {
			m.broken = fmt.Errorf("%w; the pool must be opened again", err)
		}
		return err
	}
	// A superblock may have been written meanwhile for another reason.
	f.sb.Epoch, f.sb.RegionID, f.sb.BootID = m.sb.Epoch, m.sb.RegionID, m.sb.BootID
	f.sb.Generation = m.sb.Generation + 1
	if err := WriteSuperblock(m.Devices, &f.sb); err != nil {
		// One of its copies may be there, so this fold may be what recovery
		// finds, and nothing it replaced may be touched.
		m.broken = fmt.Errorf("%w; the pool must be opened again", err)
		return m.broken
	}
	m.sb, m.meta, m.used = f.sb, pages, int64(f.sb.Used)
	m.journal.tail = f.sb.Journal.Offset
	m.Map.EndFold(f.trees)
	for id, t := range f.trees {
		if t.Gone() {
			m.Catalogue.Forget(id)
		} else {
			m.Catalogue.SetTree(id, t.Root, t.Used, t.Pending)
		}
	}
	m.updateReservation()
	for _, r := range append(f.refs.dropped, f.pages.freed...) {
		m.drop(r)
	}
	return errors.Join(m.broken, f.pages.close())
}

// Pages are written in batches of so many, and allocated as many at a time.
const pageBatch = 256

// pageWriter stores the new metadata pages of one fold.
type pageWriter struct {
	m     *Machine
	birth block.CP
	buf   []byte // of a batch, from the first page on
	ios   []*devices.IO
	spare []space.Run // allocated, not yet used
	taken []space.Run
	freed []space.Run
}

// WritePage implements blockmap.PageWriter.
func (w *pageWriter) WritePage(page []byte) (block.Pointer, error) {
	if w.buf == nil {
		buf, err := hpdi.Alloc(pageBatch * block.Size)
		if err != nil {
			return block.Pointer{}, fmt.Errorf("metadata page: %w", err)
		}
		w.buf = buf
	}
	at, err := w.allocate()
	if err != nil {
		return block.Pointer{}, err
	}
	p := block.Pointer{Phys: at, Birth: w.birth, Sum: ondisk.CRC(page)}
	frame := w.buf[len(w.ios)*block.Size:][:block.Size]
	copy(frame, page)
	w.m.Reader.Put(p, frame)
	w.ios = append(w.ios, &devices.IO{Op: hpdi.OpWrite, At: at, Vec: [][]byte{frame}})
	if len(w.ios) == pageBatch {
		return p, w.flush()
	}
	return p, nil
}

// allocate returns a free block. Pages lie together because they are allocated
// together; where the pool is nearly full it takes them one by one.
func (w *pageWriter) allocate() (block.Physical, error) {
	if n := len(w.freed) - 1; planted.Has(planted.ReuseBeforeCommit) && n >= 0 {
		r := &w.freed[n]
		if r.N--; r.N == 0 {
			w.freed = w.freed[:n]
		}
		return r.At + block.Physical(r.N), nil
	}
	if len(w.spare) == 0 {
		var err error
		if w.spare, err = w.m.Space.Alloc(pageBatch/4, nil); err != nil {
			if w.spare, err = w.m.Space.Alloc(1, nil); err != nil {
				return 0, fmt.Errorf("metadata page: %w", err)
			}
		}
	}
	r := &w.spare[0]
	at := r.At
	if r.At, r.N = r.At+1, r.N-1; r.N == 0 {
		w.spare = w.spare[1:]
	}
	w.taken = addRun(w.taken, at)
	return at, nil
}

// FreePage implements blockmap.PageWriter.
func (w *pageWriter) FreePage(p block.Pointer) error {
	if planted.Has(planted.FreedAtFoldBegin) {
		return w.m.Space.Dec(space.Run{At: p.Phys, N: 1})
	}
	w.freed = addRun(w.freed, p.Phys)
	return nil
}

// addRun adds a block to runs, joining it with the last one where that stays
// on one track.
func addRun(runs []space.Run, at block.Physical) []space.Run {
	if n := len(runs) - 1; n >= 0 && runs[n].At+block.Physical(runs[n].N) == at && at.Block()%block.TrackBlocks != 0 {
		runs[n].N++
		return runs
	}
	return append(runs, space.Run{At: at, N: 1})
}

func (w *pageWriter) flush() error {
	err := w.m.Devices.Do(w.ios)
	w.ios = w.ios[:0]
	if planted.Has(planted.IgnoredPageWriteError) {
		return nil
	}
	return err
}

// finish writes what is left and returns the unused blocks.
func (w *pageWriter) finish() error {
	spare := w.spare
	w.spare = nil
	for _, r := range spare {
		if err := w.m.Space.Dec(r); err != nil {
			return err
		}
	}
	return w.flush()
}

// discard frees everything that was taken.
func (w *pageWriter) discard() error {
	var err error
	for _, r := range append(w.taken, w.spare...) {
		err = errors.Join(err, w.m.Space.Dec(r))
	}
	w.taken, w.spare, w.ios = nil, nil, nil
	return errors.Join(err, w.close())
}

func (w *pageWriter) close() error {
	buf := w.buf
	w.buf = nil
	return hpdi.Free(buf)
}
