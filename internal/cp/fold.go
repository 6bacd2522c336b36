package cp

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/space"
)

// fold is a fold under way.
type fold struct {
	m      *Machine
	frozen blockmap.Frozen
	sb     Superblock         // the one to be written
	list   []catalogue.Volume // as of the fold's consistency point
	next   block.VolumeID     // as of the fold's consistency point
	due    bool               // it had to begin
	sorted bool               // the mappings are in order
	todo   []block.VolumeID   // volumes still to be folded
	volume *blockmap.VolumeFold
	// What progress is measured by: mappings waiting when the fold began, of them
	// in memory and not folded yet, changes of counts and those not applied yet.
	begun, keys, keysLeft, changes, changesLeft int
	// covers is what of the journal need not be replayed any more, as
	// Machine.journalled counts it.
	covers int
	budget int // level-1 pages still to be visited only to free something
	trees  map[block.VolumeID]blockmap.Tree
	refs   refChanges
	pages  *pageWriter
	moving int // pages that may still be moved away from a device that leaves
	renew  renewals
	// sorting says that the changes of counts are being brought in order.
	sorting bool
	counts  []func() (done bool, err error) // steps of the count trees
	prints  printFold
	// lost are the blocks that are to be freed still, once durable, and losing how
	// many runs these were; gathered is how many mappings waited then for the next
	// fold.
	lost             []space.Run
	losing, gathered int
	durable          bool
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

// Fold carries out one bounded step of a fold and begins one if none is under
// way: it sorts some 100,000 mappings or changes of counts, rewrites a page
// above leaves with at most 256 of them, or frees some thousands of runs.
// Consistency points that are due are made between steps. It returns true when a fold has been completed and is durable. After
// an error the fold begins again, from the same point, unless Broken says
// otherwise. Consistency points may be made between the steps.
func (m *Machine) Fold() (done bool, err error) {
	if m.broken != nil {
		return false, m.broken
	}
	if err := m.Claimed(); err != nil {
		return false, err
	}
	if m.folding == nil {
		m.folding = m.beginFold()
	}
	if done, err = m.folding.step(); err != nil && m.folding.durable {
		return false, err
	} else if err != nil {
		m.foldFailed = true
		err = fmt.Errorf("fold %d: %w", m.sb.Fold+1, err)
		return false, errors.Join(err, m.folding.abandon())
	}
	if done {
		m.folding, m.foldFailed = nil, false
		m.stats.folds.Add(1)
	}
	return done, nil
}

// Folding reports whether a fold is under way.
func (m *Machine) Folding() bool { return m.folding != nil }

func (m *Machine) beginFold() *fold {
	m.beginPrints()
	f := &fold{m: m, due: m.FoldDue(), begun: m.Unfolded(), covers: m.journalled, frozen: m.Map.BeginFold(), sb: m.Superblock(), list: m.Catalogue.All(), next: m.Catalogue.NextID()}
	f.sb.Fold++
	f.sb.CP, f.sb.Log, f.sb.Flush = m.last.CP, m.last.Log, m.last.Flush
	f.sb.Journal = m.journal.next
	f.renew, m.renew = m.renew.sorted(), renewals{}
	f.frozen.Renew = f.renew.maps
	f.reset()
	if dev, ok := f.sb.Leaving(); ok && m.movePages {
		f.frozen.Moves = func(p block.Pointer) bool {
			return f.moving > 0 && (p.Phys.Device() == dev || p.Second().Phys.Device() == dev)
		}
	}
	return f
}

// moveBudget is how many pages a fold moves away from a device that leaves, but for
// the last ones: what its journal record says of them is a small part of the journal,
// and what they take beside their old places little of what is kept back.
func (m *Machine) moveBudget() int {
	return int(max(16, min(4096, m.journal.size/256, uint64(m.Space.Usage().Slop/8))))
}

// reset makes the fold begin at its beginning.
func (f *fold) reset() {
	f.todo, f.volume, f.sorted = nil, nil, false
	f.keys = f.frozen.Overlay.Len()
	f.keysLeft, f.changes, f.changesLeft = f.keys, 0, 0
	f.trees = map[block.VolumeID]blockmap.Tree{}
	f.budget = freeBudget
	f.refs = refChanges{added: f.m.refs.added[:0], dropped: f.m.refs.dropped[:0]}
	f.sb.Devices = f.m.Superblock().Devices
	f.sb.Catalogue, f.sb.CatBytes = f.m.sb.Catalogue, f.m.sb.CatBytes
	f.sb.Prints, f.prints = f.m.sb.Prints, printFold{}
	f.counts, f.sorting, f.moving = nil, false, f.m.moveBudget()
	f.sb.Used = uint64(f.m.used)
	f.pages = &pageWriter{m: f.m, birth: f.sb.CP, fold: f}
	f.frozen.Twins = f.leafTwins()
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

// A fold that writes few leaves writes twins of them, too: up to leafTwins, or a leaf
// for leafShare mappings. What is scattered would be written twice. A leafRoom of the
// pool is left to data: where blocks are scattered there are as many leaves as blocks.
const (
	leafTwins = 256
	leafShare = 16
	leafRoom  = 16
)

// leafTwins reports whether the fold writes twins of leaves. Pages above leaves have
// them in any case.
func (f *fold) leafTwins() bool {
	pages := f.frozen.Overlay.Pages()
	return pages <= max(leafTwins, f.keys/leafShare) && f.m.roomForLeafTwins() >= 2*int64(pages)
}

// roomForLeafTwins returns how many blocks leaves and their twins may take.
func (m *Machine) roomForLeafTwins() int64 {
	u := m.Space.Usage()
	return u.Spare() - u.Total/leafRoom
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
	case f.durable:
		return f.free()
	case f.sb.Shares() && !m.prints.lost && !f.prints.done:
		return false, f.tryPrints()
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
	return false, f.commit()
}

// volumesShare is the part of a fold's work that the volumes' trees are: they have
// ten times as many pages as the counts have when what is folded is scattered.
const volumesShare = 0.9

// progress returns which part of its work the fold has done, from 0 to 1.
func (f *fold) progress() float64 {
	switch {
	case f.durable || f.keys == 0:
		return 1
	case f.changes > 0:
		return 1 - (1-volumesShare)*float64(f.changesLeft)/float64(f.changes)
	}
	return volumesShare * (1 - float64(f.keysLeft)/float64(f.keys))
}

func (f *fold) stepVolume() error {
	left := f.volume.Left()
	done, err := f.volume.Step()
	f.keysLeft -= left - f.volume.Left()
	if err != nil || !done {
		return err
	}
	if f.trees[f.todo[0]], err = f.volume.Finish(); err != nil {
		return err
	}
	f.todo, f.volume = f.todo[1:], nil
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
	u.Twins = true
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
	pages := foldPages{Fold: f.sb.Fold, Taken: f.pages.allTaken(), Freed: f.pages.allFreed()}
	if err := m.journal.append(&record{Epoch: m.sb.Epoch, Type: typeFold, Fold: pages}); err != nil {
		if !errors.Is(err, errJournalFull) {
			m.broken = fmt.Errorf("%w; the pool must be opened again", err)
		}
		return err
	}
	// A superblock may have been written meanwhile for another reason.
	f.sb.Epoch, f.sb.RegionID, f.sb.BootID = m.sb.Epoch, m.sb.RegionID, m.sb.BootID
	f.sb.Generation = m.sb.Generation + 1
	f.sb.Twins = m.sb.Twins || len(f.pages.twinsTaken) > 0
	if err := WriteSuperblock(m.Devices, &f.sb); err != nil {
		// One of its copies may be there, so this fold may be what recovery
		// finds, and nothing it replaced may be touched.
		m.broken = fmt.Errorf("%w; the pool must be opened again", err)
		return m.broken
	}
	m.sb, m.meta, m.used = f.sb, pages, int64(f.sb.Used)
	if f.prints.done {
		m.prints.roots = f.prints.roots
		m.forgetPrints()
	}
	m.journal.tail = f.sb.Journal.Offset
	if m.journal.kept != nil {
		m.journal.kept.folded(f.sb.Journal)
	}
	m.journalled -= f.covers
	m.Map.EndFold(f.trees)
	for id, t := range f.trees {
		if t.Gone() {
			m.Catalogue.Forget(id)
		} else {
			m.Catalogue.SetTree(id, t.Root, t.Used, t.Pending)
		}
	}
	m.updateReservation()
	m.refs = f.refs
	f.lost, f.durable = append(f.refs.dropped, pages.Freed...), true
	f.losing, f.gathered = len(f.lost), m.Unfolded()
	return f.pages.close()
}

// freed returns which part of what a durable fold frees is free, from 0 to 1.
func (f *fold) freed() float64 {
	if f.losing == 0 {
		return 1
	}
	return 1 - float64(len(f.lost))/float64(f.losing)
}

// freeStep is how many runs of blocks a step frees.
const freeStep = 4096

// free frees what the durable fold replaced, a step at a time.
func (f *fold) free() (done bool, err error) {
	n := min(len(f.lost), freeStep)
	for _, r := range f.lost[:n] {
		f.m.drop(r)
	}
	f.lost = f.lost[n:]
	return len(f.lost) == 0, f.m.broken
}
