package cp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/dirty"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/space"
)

// batchBlocks bounds what a consistency point has outstanding at the devices:
// 8 MiB, some 20 ms of a disk of 400 MB/s.
const batchBlocks = 2048

// smallHole is the longest range that is made a hole block by block.
const smallHole = 32

// plan is a consistency point being made. Its memory is used again by the next.
type plan struct {
	commit
	gen    *dirty.Generation // nil when only the catalogue changes
	blocks []planned
	fresh  []int32     // which of blocks are to be written
	runs   []space.Run // allocated for fresh, in order
	single []int32     // which of blocks are to be written to memory, see memory.go
	shared []space.Run // got references because blocks share them
	sums   []uint32    // of blocks, in order; what those of commit.Runs are parts of
	marks  []byte      // their fingerprints, the same
	zeros  []zeros     // of volumes, in their order
	// sharing says that some volume shares blocks; prints are of one series.
	sharing bool
	prints  []dedup.Fingerprint
	keys    []uint64
	// moved are places on disks of what is written to memory.
	moved []block.Physical
	again []int32 // and blocks of the plan that are such copies
	// evacuated are those that leave memory.
	evacuated []evacuation
	hot       []int32 // which of blocks are written to cheap ranges

	batch []*devices.IO // under way at once
	vecs  [][]byte      // what they write
}

// newPlan returns an empty plan.
func (m *Machine) newPlan() *plan {
	if m.plan == nil {
		m.plan = new(plan)
	}
	p := m.plan
	p.commit = commit{Holes: p.Holes[:0], Runs: p.Runs[:0]}
	p.single, p.moved, p.again, p.evacuated, p.hot = p.single[:0], p.moved[:0], p.again[:0], p.evacuated[:0], p.hot[:0]
	p.gen, p.blocks, p.runs, p.shared, p.sums, p.marks, p.zeros, p.sharing = nil, p.blocks[:0], p.runs[:0], p.shared[:0], p.sums[:0], p.marks[:0], p.zeros[:0], false
	return p
}

// zeros is how many blocks of a volume hold zeroes and become holes.
type zeros struct {
	volume block.VolumeID
	n      uint64
}

type planned struct {
	volume block.VolumeID
	lba    block.Logical
	slot   dirty.Slot
	run    int // THN of the volume
	print  dedup.Fingerprint
	at     block.Physical // where it is, or will be
	memory block.Physical // where memory may have it, or None
	of     int32          // the block of the plan that it shares, while at is inPlan, or see alike
	shared bool
	known  bool // the index has candidates
	single bool // it is written to memory
	hot    bool // its old place is cheap, see hot.go
	taken  bool // it belongs to no series: memory has it, or had it
}

// Commit makes one consistency point of everything that is dirty and of
// changes to the catalogue. With nothing to commit it returns nil at once. After
// an error nothing has changed and it can be called again, unless Broken says
// otherwise. ErrFoldFirst asks for a fold.
func (m *Machine) Commit(changes []catalogue.Change) error {
	if m.broken != nil {
		return m.broken
	}
	p := m.newPlan()
	p.gen = m.dirty.Freeze()
	if p.gen == nil && len(changes) == 0 {
		return nil
	}
	if err := m.Claimed(); err != nil {
		return err
	}
	p.CP, p.Log, p.Catalogue = m.last.CP+1, m.last.Log, changes
	if p.gen != nil {
		p.Log = p.gen.UpTo
		m.collect(p)
	}
	m.share(p)
	err := m.allocate(p)
	if err == nil {
		p.mapBlocks()
		err = m.write(p)
	}
	if err != nil {
		m.giveBack(p)
		return fmt.Errorf("consistency point %d: %w", p.CP, err)
	}
	if err := m.record(p); err != nil {
		return fmt.Errorf("consistency point %d: %w", p.CP, err)
	}
	return m.finish(p)
}

// ErrFoldFirst says that a fold has to be made first: the journal has no room, or a
// takeover would have too much to replay.
var ErrFoldFirst = errors.New("a fold has to be made first")

// collect sorts the dirty blocks into holes and blocks to be written, in the
// order of volumes and logical addresses.
func (m *Machine) collect(p *plan) {
	deleted := map[block.VolumeID]bool{}
	for _, c := range p.Catalogue {
		if c.Put == nil {
			deleted[c.Delete] = true
		}
	}
	for _, id := range p.gen.Volumes() {
		v, ok := m.Catalogue.Get(id)
		if !ok || deleted[id] {
			continue // writes to a volume that is deleted need no place
		}
		p.sharing = p.sharing || v.Run > 0
		for _, r := range p.gen.Holes(id) {
			if planted.Has(planted.TrimNotCommitted) {
				continue
			}
			p.Holes = append(p.Holes, volumeRange{id, r})
		}
		first, n := len(p.Holes), uint64(0)
		for lba, slot := range p.gen.Blocks(id) {
			if !slot.IsHole() {
				if !m.isZero(slot) {
					p.blocks = append(p.blocks, planned{volume: id, lba: lba, slot: slot, run: v.Run})
					continue
				}
				n++
			}
			if last := len(p.Holes) - 1; last >= first && p.Holes[last].End == lba {
				p.Holes[last].End++
			} else {
				p.Holes = append(p.Holes, volumeRange{id, block.Range{Start: lba, End: lba + 1}})
			}
		}
		if n > 0 {
			p.zeros = append(p.zeros, zeros{id, n})
		}
	}
}

var zeroBlock [block.Size]byte

func (m *Machine) isZero(s dirty.Slot) bool {
	return s.Sum == ondisk.ZeroSum && *(*[block.Size]byte)(m.log.Payload(s.Extent, 1)) == zeroBlock
}

// allocate gives the blocks that are to be written their places.
func (m *Machine) allocate(p *plan) error {
	fresh := p.fresh
	p.fresh = nil
	fresh = append(fresh, m.placeApart(p)...)
	if err := m.place(p, fresh); err != nil {
		return err
	}
	return m.settle(p)
}

// mapBlocks makes the mappings: what is consecutive in its volume and on one track is
// one mapping, unless some of it is shared and some is new.
func (p *plan) mapBlocks() {
	p.sums = slices.Grow(p.sums, len(p.blocks))
	if p.sharing {
		p.marks = slices.Grow(p.marks, printSize*len(p.blocks))
	}
	for i := range p.blocks {
		b := &p.blocks[i]
		p.sums = append(p.sums, b.slot.Sum)
		marked := !b.shared && b.print != dedup.None
		if marked {
			p.marks = binary.LittleEndian.AppendUint64(p.marks, uint64(b.print))
		}
		if n := len(p.Runs) - 1; n >= 0 {
			r := &p.Runs[n]
			k := len(r.Sums)
			if r.Volume == b.volume && r.LBA+block.Logical(k) == b.lba && r.At+block.Physical(k) == b.at && b.at.Block()%block.TrackBlocks != 0 &&
				r.Shared == b.shared && len(r.Prints) > 0 == marked {
				r.Sums = p.sums[len(p.sums)-k-1:]
				if marked {
					r.Prints = p.marks[len(p.marks)-printSize*(k+1):]
				}
				continue
			}
		}
		r := mapRun{Volume: b.volume, LBA: b.lba, At: b.at, Sums: p.sums[len(p.sums)-1:], Shared: b.shared}
		if marked {
			r.Prints = p.marks[len(p.marks)-printSize:]
		}
		p.Runs = append(p.Runs, r)
	}
}

// write brings the data to the devices, straight from the log, and makes it
// durable.
func (m *Machine) write(p *plan) error {
	if !m.journal.roomForCommit(roundUp(recordFixed+p.size())) || m.exceeds(p) {
		return ErrFoldFirst
	}
	if planted.Has(planted.ReleaseBeforeCommit) && p.gen != nil {
		m.log.Release(p.gen.UpTo)
	}
	fresh := p.fresh
	n := 0
	p.batch, p.vecs = p.batch[:0], p.vecs[:0]
	for _, r := range p.runs {
		m.gather(p, r, fresh[:r.N])
		fresh = fresh[r.N:]
		if n += r.N; n >= batchBlocks {
			if err := m.Devices.Do(p.batch); err != nil {
				m.writeFailed(p.batch)
				return err
			}
			n, p.batch, p.vecs = 0, p.batch[:0], p.vecs[:0]
		}
	}
	if err := m.Devices.Do(p.batch); err != nil && !planted.Has(planted.IgnoredWriteError) {
		m.writeFailed(p.batch)
		return err
	}
	if planted.Has(planted.DataSyncMissing) {
		return nil
	}
	return m.Devices.Sync()
}

// gather adds a device request for a run to the batch; consecutive extents are
// one vector.
func (m *Machine) gather(p *plan, r space.Run, fresh []int32) {
	first := len(p.vecs)
	for i := 0; i < len(fresh); {
		extent, n := p.blocks[fresh[i]].slot.Extent, 1
		for i+n < len(fresh) && p.blocks[fresh[i+n]].slot.Extent == extent+oplog.Extent(n) {
			n++
		}
		p.vecs = append(p.vecs, m.log.Payload(extent, n))
		i += n
	}
	n := len(p.batch)
	if p.batch = slices.Grow(p.batch, 1)[:n+1]; p.batch[n] == nil {
		p.batch[n] = new(devices.IO)
	}
	*p.batch[n] = devices.IO{Op: hpdi.OpWrite, At: r.At, Vec: p.vecs[first:len(p.vecs):len(p.vecs)]}
}

// record appends the journal record. When that fails the journal's end is
// unknown, and with it whether the point exists: only recovery can tell.
func (m *Machine) record(p *plan) error {
	// No flush may append to the flush log between the choice of the position
	// from which it must be scanned and the commit that carries it.
	m.flush.lock()
	defer m.flush.unlock()
	if planted.Has(planted.ReplayStartsLate) {
		p.Log = m.log.Head()
	}
	pos := m.flush.positionLocked(p.Log, m.sb.Epoch, p.CP)
	p.Flush = pos
	if planted.Has(planted.FlushPositionKept) && m.last.Flush.Nonce == pos.Nonce {
		p.Flush = m.last.Flush
	}
	r := &record{Epoch: m.sb.Epoch, Type: typeCommit, Commit: p.commit}
	if planted.Has(planted.DeletedResurrected) {
		r.Commit.Catalogue = slices.DeleteFunc(slices.Clone(p.Catalogue), func(ch catalogue.Change) bool { return ch.Put == nil })
	}
	if err := m.journal.append(r); err != nil {
		m.broken = fmt.Errorf("%w; the pool must be opened again", err)
		m.flush.invalidateLocked()
		return m.broken
	}
	m.flush.committedLocked(p.Log, pos)
	return nil
}

// forgetReplaced drops the cached versions that the point hides in trees and
// the overlay being folded, as far as memory knows them, leaf by leaf. Their
// blocks are freed only by a fold; until then nobody would ask for the frames,
// which could be a good part of the cache. What it replaces in the active
// overlay is freed, and forgotten, when it is installed.
func (m *Machine) forgetReplaced(blocks []planned) {
	var lbas [blockmap.LeafBlocks]block.Logical
	var old [blockmap.LeafBlocks]block.Pointer
	for len(blocks) > 0 {
		first, n := blocks[0], 0
		for n < len(blocks) && blocks[n].volume == first.volume && blocks[n].lba/blockmap.LeafBlocks == first.lba/blockmap.LeafBlocks {
			lbas[n] = blocks[n].lba
			n++
		}
		m.Map.Hidden(first.volume, lbas[:n], &old)
		for _, lba := range lbas[:n] {
			if o := old[lba%blockmap.LeafBlocks]; !o.IsHole() && (!m.sb.Shares() || m.Space.Count(o.Phys) == 1) {
				m.Reader.Forget(o.Phys, 1)
			}
		}
		blocks = blocks[n:]
	}
}

// finish makes the durable point visible and releases what it covers.
func (m *Machine) finish(p *plan) error {
	m.forgetReplaced(p.blocks)
	for k, i := range p.fresh {
		if p.sharing && k%printsAtOnce == 0 {
			m.touch(p, p.fresh[k:min(k+printsAtOnce, len(p.fresh))])
		}
		b := &p.blocks[i]
		ptr := block.Pointer{Phys: b.at, Birth: p.CP, Sum: b.slot.Sum}
		// It may have been damaged in memory since it was published.
		m.Reader.Offer(ptr, m.log.Payload(b.slot.Extent, 1))
		if b.print != dedup.None {
			m.notePrint(b.at, b.print)
		} else {
			m.unprint(space.Run{At: b.at, N: 1})
		}
	}
	m.install(&p.commit, func(old block.Pointer) { m.drop(space.Run{At: old.Phys, N: 1}) })
	m.updateReservation()
	if p.gen != nil {
		m.dirty.Drop()
	}
	m.noteMoved(p)
	m.saveIndexes()
	m.stats.commits.Add(1)
	m.stats.hot.Add(uint64(len(p.hot)))
	m.count(p)
	return m.broken
}

// touch brings what notePrint looks at for blocks of a plan into the processor's cache,
// together.
func (m *Machine) touch(p *plan, blocks []int32) {
	p.prints, p.keys = p.prints[:0], p.keys[:0]
	for _, i := range blocks {
		p.prints = append(p.prints, p.blocks[i].print)
		p.keys = append(p.keys, uint64(p.blocks[i].at))
	}
	m.prints.active.Touch(p.keys)
	if m.Index != nil {
		m.Index.Touch(p.prints)
	}
}

// count adds what the plan has done to the statistics.
func (m *Machine) count(p *plan) {
	m.stats.blocks.Add(uint64(len(p.fresh)))
	m.stats.shared.Add(uint64(len(p.blocks) - len(p.fresh)))
	for blocks := p.blocks; len(blocks) > 0; {
		id, n := blocks[0].volume, 0
		v := m.byVolume[id]
		for ; n < len(blocks) && blocks[n].volume == id; n++ {
			if blocks[n].shared {
				v.Shared++
			} else {
				v.Blocks++
			}
		}
		m.byVolume[id], blocks = v, blocks[n:]
	}
	for _, z := range p.zeros {
		v := m.byVolume[z.volume]
		v.Zeros += z.n
		m.byVolume[z.volume] = v
		m.stats.zeros.Add(z.n)
	}
	for _, ch := range p.Catalogue {
		if ch.Put == nil {
			delete(m.byVolume, ch.Delete)
		}
	}
}
