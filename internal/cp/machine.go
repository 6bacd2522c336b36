package cp

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockio"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/dirty"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/space"
	"github.com/pollux-storage/pollux/internal/table"
)

// Config says what a Machine works on. The objects are the pool's and outlive
// the machine.
type Config struct {
	Devices   *devices.Set
	Reader    *blockio.Reader
	Space     *space.Space
	Map       *blockmap.Map
	Catalogue *catalogue.Set

	JournalStart uint64 // first block of the journal on device 0
	JournalBlock uint64 // its length in blocks

	// FoldEntries is the number of mappings, in memory or in the journal, from
	// which on a fold is due that writes few pages for them, see FoldDue.
	// DefaultFoldEntries if 0.
	FoldEntries int
	// FoldLimit is the number at which a fold is due whatever it writes; at least
	// FoldEntries. DefaultFoldLimit if 0. While a fold runs, others may gather as
	// long as all together are no more than MostUnfolded.
	FoldLimit int

	// Index finds stored blocks by their fingerprints; nil shares nothing.
	Index *dedup.Index
	// Next takes the place of Index when it has what is stored, see UseNext; nil if
	// there is none. What is written meanwhile goes into both.
	Next *dedup.Index
	// Kept is what a guest before has left of the journal in memory, or nil. The machine
	// goes on with it.
	Kept *KeptJournal
	// Hash is what blocks are found by; nil for a fingerprint with the pool's secret.
	Hash func(data []byte) dedup.Fingerprint
}

// What begins a fold in pools that do not ask for something else. More would make
// folds cheaper for each mapping, and takeover slower, because the survivor replays
// them before it serves: a thousand that are scattered take 0.12 to 0.18 ms
// (BenchmarkOpen in internal/pool). A third more may come together while a fold runs,
// see MostUnfolded: half a second then.
const (
	DefaultFoldEntries = 48 << 10
	DefaultFoldLimit   = 2176 << 10
)

// A fold may write that many pages of volumes for so many mappings before the limit:
// a leaf has 256. Folds of small volumes reach that at once. Overwrites scattered
// over a terabyte, a leaf for nearly each, are left to gather.
const dueMappings, duePages = 5, 2

// recordEntries is for how many mappings a journal record counts beside those that
// it has: reading and verifying its first block takes about as long.
const recordEntries = 8

// Machine takes a pool from one consistency point to the next. It has no
// goroutines. One caller at a time may use it, except for the methods that say
// otherwise.
type Machine struct {
	Config
	dirty *dirty.Set
	log   *oplog.Log
	flush *Flusher

	sb      Superblock        // the newest durable one
	claim   func(*Superblock) // what must become durable before anything else is written, or nil
	journal journal
	last    commit // the newest durable consistency point, without its mappings
	meta    foldPages
	folding *fold
	// foldFailed says that a fold has failed, until one succeeds.
	foldFailed bool
	reserved   int   // pages reserved for the overlays
	used       int64 // blocks in use according to the count trees
	broken     error // set when the journal's end is unknown
	// journalled is how many entries the records have that are not folded, those that
	// later ones have replaced included: what a takeover has to replay.
	journalled int
	recalled   int // records that Recover found in memory
	// movePages makes folds rewrite pages that lie on a device that leaves.
	movePages bool
	renew     renewals // for the next fold
	prints    prints
	avoid     func(p block.Physical) bool // blocks that are not shared now, or nil
	// moved are copies on disks of what memory has, see memory.go.
	moved        table.Table[uint64]
	evacuated    table.Table[uint64] // new places of blocks that left memory
	memoryFailed atomic.Bool

	// Memory that is used again.
	plan     *plan
	shares   *sharing
	replaced []block.Pointer // by the mappings being installed
	freed    []space.Run     // by what is being dropped
	refs     refChanges      // of a fold
	changes  table.Sorter    // of counts, by a fold

	stats    statistics
	byVolume map[block.VolumeID]VolumeStats
}

type statistics struct {
	commits, folds, blocks, shared, zeros, unequal, transferred, hot atomic.Uint64
}

// Recover brings catalogue, map and journal to the last durable consistency
// point of the pool whose newest superblock is sb. Its work is proportional to
// what happened since the last fold. Counts are loaded later, by LoadCounts.
func Recover(c Config, sb *Superblock) (*Machine, error) {
	if c.FoldEntries == 0 {
		c.FoldEntries = DefaultFoldEntries
	}
	if c.FoldLimit == 0 {
		c.FoldLimit = DefaultFoldLimit
	}
	c.FoldLimit = max(c.FoldLimit, c.FoldEntries)
	m := &Machine{Config: c, sb: *sb, byVolume: map[block.VolumeID]VolumeStats{}}
	m.journal = journal{set: c.Devices, pool: sb.Pool, start: c.JournalStart, size: c.JournalBlock * block.Size, kept: c.Kept}
	m.last = commit{CP: sb.CP, Log: sb.Log, Flush: sb.Flush}
	m.used = int64(sb.Used)
	if err := m.loadCatalogue(); err != nil {
		return nil, err
	}
	if err := m.replayJournal(); err != nil {
		return nil, fmt.Errorf("replay the metadata journal: %w", err)
	}
	m.updateReservation()
	return m, nil
}

// replayJournal brings what the journal holds into the overlay, which has room for
// all of it from the beginning: that takes a third of the time of letting it grow.
func (m *Machine) replayJournal() error {
	c, err := m.journal.chain(m.sb.Journal)
	if err != nil {
		return err
	}
	defer c.free()
	m.recalled = c.recalled
	m.Map.Update(func(o *blockmap.Overlay) { o.Grow(c.mappings()) })
	return c.each(m.replay)
}

func (m *Machine) replay(r *record) error {
	if r.Type == typeFold {
		// Another fold's record is one that never got its superblock.
		if r.Fold.Fold == m.sb.Fold || planted.Has(planted.FoldWithoutSuperblock) {
			m.meta = r.Fold
		}
		return nil
	}
	c := &r.Commit
	if c.CP != m.last.CP+1 || c.Log < m.last.Log {
		return &block.CorruptError{What: "journal record", Where: fmt.Sprint(r.Number),
			Why: fmt.Sprintf("consistency point %d at log position %d after %d at %d", c.CP, c.Log, m.last.CP, m.last.Log)}
	}
	if planted.Has(planted.ResizeNotCommitted) {
		c.Catalogue = slices.DeleteFunc(c.Catalogue, func(ch catalogue.Change) bool { return ch.Put != nil && m.known(ch.Put.ID) })
	}
	m.install(c, func(block.Pointer) {})
	return nil
}

// CP returns the number of the last durable consistency point.
func (m *Machine) CP() block.CP { return m.last.CP }

// Committed returns the log position that the last durable consistency point
// covers.
func (m *Machine) Committed() block.Seq { return m.last.Log }

// FlushPos returns where the flush log has to be scanned from.
func (m *Machine) FlushPos() oplog.DiskPos { return m.last.Flush }

// CheckJournalEnd proves that nothing followed the end that Recover found. Where a
// region tells the last consistency point it need not be called.
//
// After a pool was closed that takes no more reading. Its last superblock says that
// everything is folded and no region is in use; whoever opens the pool writes another one
// before anything else. So where the place of that one still has the one before, nothing
// can follow. Otherwise, as after a power cut, the whole journal is read.
func (m *Machine) CheckJournalEnd() error {
	if m.sb.Last && m.sb.RegionID == "" && m.last.CP == m.sb.CP {
		return nil
	}
	return m.journal.damaged()
}

// Superblock returns a copy of the newest durable superblock.
func (m *Machine) Superblock() Superblock {
	sb := m.sb
	sb.Devices = append([]DeviceRoot(nil), sb.Devices...)
	return sb
}

// Claim makes change part of the superblock that is written, and durable, before
// anything else is: by Claimed, or else by the first Commit, Fold or Rewrite. Whoever
// takes a pool over need not wait, before it serves, for a device that is still busy
// with what a dead guest gave it.
func (m *Machine) Claim(change func(*Superblock)) { m.claim = change }

// Claimed writes the superblock that Claim asked for, if it is not there yet. Its
// sync covers what the owner before wrote and did not sync, too: the records that
// Recover found, and with them that what they freed is free. After an error it can
// be called again.
func (m *Machine) Claimed() error {
	if m.claim == nil {
		return nil
	}
	return m.Rewrite(func(*Superblock) {})
}

// Rewrite writes a superblock that change has altered: a new epoch, another
// region, one more device. No fold may be under way.
func (m *Machine) Rewrite(change func(*Superblock)) error {
	sb := m.Superblock()
	if m.claim != nil {
		m.claim(&sb)
	}
	change(&sb)
	sb.Generation++
	if err := WriteSuperblock(m.Devices, &sb); err != nil {
		return err
	}
	m.sb, m.claim = sb, nil
	return nil
}

// MovePages makes the folds that begin from now on rewrite pages of metadata which
// lie on a device that leaves the pool, some thousands each, or not.
func (m *Machine) MovePages(on bool) { m.movePages = on }

// Empty reports whether nothing that is durable, and nothing that is in memory,
// refers to a block of a device. No fold may be under way.
func (m *Machine) Empty(dev int) bool {
	on := func(r space.Run) bool { return r.At.Device() == dev }
	if m.folding != nil || m.Space.InUse(dev) != 0 || !m.prints.roots[dev].IsHole() || !m.sb.Devices[dev].Counts.IsHole() ||
		slices.ContainsFunc(m.meta.Taken, on) || slices.ContainsFunc(m.meta.Freed, on) {
		return false
	}
	err := m.Map.OverlayPointers(func(p block.Pointer) error {
		if p.Phys.Device() == dev {
			return errInUse
		}
		return nil
	})
	return err == nil
}

var errInUse = errors.New("a block is in use")

// Start gives the machine the log whose records it will commit.
func (m *Machine) Start(d *dirty.Set, log *oplog.Log, flush *Flusher) {
	m.dirty, m.log, m.flush = d, log, flush
}

// Close frees the memory of a fold that was not completed. The machine must
// not be used again.
func (m *Machine) Close() error {
	m.changes.Free()
	m.prints.active.Free()
	m.prints.folding.Free()
	m.moved.Free()
	m.evacuated.Free()
	for _, x := range [...]*dedup.Index{m.Index, m.Next} {
		if x != nil {
			_ = x.Close() // fails for memory that is not ours only
		}
	}
	if m.shares != nil {
		m.shares.places.Free()
		m.shares.memory.places.Free()
		_ = hpdi.Free(m.shares.buf) // it was allocated so, or is nil
	}
	if m.folding == nil {
		return nil
	}
	return m.folding.pages.close()
}

// Broken returns the error after which no consistency point can be made any
// more until the pool is opened anew, or nil.
func (m *Machine) Broken() error { return m.broken }

// Unfolded returns how many mappings wait for folds: those in memory, or what of
// the journal a takeover has to replay, whichever is more. Blocks that are written
// again and again are few in memory, and all of their history is in the journal.
func (m *Machine) Unfolded() int {
	entries, _ := m.Map.Overlays()
	return max(entries, m.journalled)
}

// MostUnfolded returns the most that Unfolded may be: a third more than begin a
// fold, so that clients need not wait for it. A single consistency point may be
// larger. It does not hold while folds fail: then clients go on as long as the
// journal has room.
func (m *Machine) MostUnfolded() int { return m.FoldLimit + m.FoldLimit/3 }

// FoldFirst reports whether the fold under way should make more steps before the
// next consistency point, of so many entries: clients are ahead of it. What may gather beyond
// FoldLimit is given to them in proportion to what the fold has done, so that they
// become slower instead of standing still in the end. So is, while a durable fold
// frees blocks, what is left up to FoldLimit: the next one shall not begin where
// nothing more may gather.
func (m *Machine) FoldFirst(entries int) bool {
	f := m.folding
	if f == nil || m.foldFailed {
		return false
	}
	n := m.Unfolded() + entries
	if f.durable {
		return float64(n-f.gathered) > f.freed()*float64(m.FoldLimit-f.gathered)
	}
	return n > m.FoldLimit && float64(n-f.begun) > f.progress()*float64(m.MostUnfolded()-f.begun)
}

// exceeds reports whether a consistency point has to wait for a fold because too
// much would have to be replayed with it.
func (m *Machine) exceeds(p *plan) bool {
	n := m.Unfolded()
	return n > 0 && !m.foldFailed && n+p.entries() > m.MostUnfolded()
}

// entries returns how many mappings and ranges an overlay gets at most, and a few
// for the record.
func (c *commit) entries() (n int) {
	n = recordEntries
	for i := range c.Runs {
		n += len(c.Runs[i].Sums)
	}
	for _, h := range c.Holes {
		if blocks := h.End - h.Start; blocks <= smallHole {
			n += int(blocks)
		} else {
			n++
		}
	}
	return n
}

// FoldDue reports whether a fold should be made soon: there is much to fold, and it
// writes few pages for it or can wait no longer. A fold that was due remains it.
func (m *Machine) FoldDue() bool {
	if m.folding != nil && m.folding.due {
		return true
	}
	n := m.Unfolded()
	switch {
	case n >= m.FoldLimit, m.journal.used() > m.journal.size/4:
		return true
	case n < m.FoldEntries:
		return false
	}
	_, pages := m.Map.Overlays()
	return pages*dueMappings <= n*duePages
}

// FoldUseful reports whether a fold would find anything to do: mappings that
// are only in memory and the journal, or ranges still to be freed.
func (m *Machine) FoldUseful() bool {
	entries, _ := m.Map.Overlays()
	return entries > 0 || m.Map.Unfinished()
}

// Stats describes a machine's work since it was started. Stats may be called
// concurrently with everything.
type Stats struct {
	Commits, Folds uint64
	Blocks         uint64 // data blocks written
	Shared         uint64 // data blocks that were stored already and are shared
	Zeros          uint64 // data blocks of zeroes that became holes
	Unequal        uint64 // series that seemed to be stored already and were not
	Transferred    uint64 // of Blocks, those written to memory because there were so many of them
	Hot            uint64 // of Blocks, those that took the place of one in a cheap range, and lie in one
}

// VolumeStats are those of Stats that are about one volume.
type VolumeStats struct{ Blocks, Shared, Zeros uint64 }

// VolumeStats returns the counters of a volume that there is.
func (m *Machine) VolumeStats(id block.VolumeID) VolumeStats { return m.byVolume[id] }

// Stats returns the counters.
func (m *Machine) Stats() Stats {
	return Stats{Commits: m.stats.commits.Load(), Folds: m.stats.folds.Load(), Blocks: m.stats.blocks.Load(),
		Shared: m.stats.shared.Load(), Zeros: m.stats.zeros.Load(), Unequal: m.stats.unequal.Load(), Transferred: m.stats.transferred.Load(), Hot: m.stats.hot.Load()}
}

// EstimatedUse returns how many blocks are in use, before LoadCounts knows
// exactly. It is never too low.
func (m *Machine) EstimatedUse() int64 {
	entries, _ := m.Map.Overlays()
	n := m.used + int64(entries)
	for _, r := range m.meta.Taken {
		n += int64(r.N)
	}
	return n
}

// updateReservation reserves the metadata pages that folding the overlays
// needs.
func (m *Machine) updateReservation() {
	_, pages := m.Map.Overlays()
	if pages > m.reserved {
		m.Space.ForceReserve(int64(pages - m.reserved))
	} else {
		m.Space.Unreserve(int64(m.reserved - pages))
	}
	m.reserved = pages
}

// drop gives up references that no durable structure holds any more. A count
// that does not allow it breaks the machine: the counts are wrong.
func (m *Machine) drop(r space.Run) {
	var err error
	if m.freed, err = m.Space.Drop(r, m.freed[:0]); err != nil {
		if m.broken == nil {
			m.broken = err
		}
		return
	}
	for _, free := range m.freed {
		m.Reader.Forget(free.At, free.N)
	}
}

// ReadLeaves reads pages of a tree, verifies them, and calls fn for each with
// its index and content, in any order and for several at the same time. It fails
// when something is wrong with one of them.
type ReadLeaves func(ps []block.Pointer, fn func(i int, page []byte) error) error

// leavesAtOnce is how many leaves of a count tree are read together at most,
// but for those of one parent.
const leavesAtOnce = 16 * blockmap.Fanout

// LoadCounts fills the allocator from the count trees, whose leaves read
// brings, the pages of the last fold and the overlays. It must succeed once,
// before the first Commit.
func (m *Machine) LoadCounts(read ReadLeaves) error {
	m.readRoots()
	for dev, d := range m.sb.Devices {
		if err := m.loadTree(dev, d.Counts, read); err != nil {
			return fmt.Errorf("reference counts of device %d: %w", dev, err)
		}
	}
	for _, r := range m.meta.Taken {
		if err := m.Space.Inc(r); err != nil {
			return fmt.Errorf("pages of fold %d: %w", m.meta.Fold, err)
		}
	}
	for _, r := range m.meta.Freed {
		if err := m.Space.Dec(r); err != nil {
			return fmt.Errorf("pages of fold %d: %w", m.meta.Fold, err)
		}
	}
	if planted.Has(planted.CountsWithoutJournal) {
		return nil
	}
	return m.Map.OverlayPointers(func(p block.Pointer) error { return m.Space.Inc(space.Run{At: p.Phys, N: 1}) })
}

// loadTree fills the allocator from one count tree.
func (m *Machine) loadTree(dev int, root block.Pointer, read ReadLeaves) error {
	var ps []block.Pointer
	var leaves []uint64
	load := func() error {
		err := read(ps, func(i int, page []byte) error { return m.Space.Load(dev, leaves[i]*countsPerLeaf, page) })
		ps, leaves = ps[:0], leaves[:0]
		return err
	}
	err := blockmap.Walk(m.Reader, root, func(p block.Pointer, level int, first uint64) (bool, error) {
		if level > 1 {
			return true, nil
		}
		err := m.Reader.View(p, func(page []byte) {
			for i := range uint64(blockmap.Fanout) {
				if p := block.DecodePointer(page[i*block.PointerSize:]); !p.IsHole() {
					ps, leaves = append(ps, p), append(leaves, first+i)
				}
			}
		})
		if err == nil && len(ps) >= leavesAtOnce {
			err = load()
		}
		return false, err
	})
	if err != nil || len(ps) == 0 {
		return err
	}
	return load()
}
