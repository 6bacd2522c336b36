package cp

import (
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/catalogue"
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
	runs   []space.Run // allocated for blocks, in order
	sums   []uint32    // of blocks, in order; what those of commit.Runs are parts of

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
	p.gen, p.blocks, p.runs, p.sums = nil, p.blocks[:0], p.runs[:0], p.sums[:0]
	return p
}

type planned struct {
	volume block.VolumeID
	lba    block.Logical
	slot   dirty.Slot
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
	var err error
	if p.runs, err = m.Space.Alloc(len(p.blocks), p.runs); err != nil {
		return fmt.Errorf("consistency point %d: %w", p.CP, err)
	}
	p.mapBlocks()
	if err := m.write(p); err != nil {
		// No durable structure knows these blocks.
		for _, r := range p.runs {
			if e := m.Space.Dec(r); e != nil {
				m.broken = e
			}
		}
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
		if _, ok := m.Catalogue.Get(id); !ok || deleted[id] {
			continue // writes to a volume that is deleted need no place
		}
		for _, r := range p.gen.Holes(id) {
			if planted.Has(planted.TrimNotCommitted) {
				continue
			}
			p.Holes = append(p.Holes, volumeRange{id, r})
		}
		first := len(p.Holes)
		for lba, slot := range p.gen.Blocks(id) {
			if !slot.IsHole() && !m.isZero(slot) {
				p.blocks = append(p.blocks, planned{id, lba, slot})
				continue
			}
			if last := len(p.Holes) - 1; last >= first && p.Holes[last].End == lba {
				p.Holes[last].End++
			} else {
				p.Holes = append(p.Holes, volumeRange{id, block.Range{Start: lba, End: lba + 1}})
			}
		}
	}
}

var (
	zeroBlock [block.Size]byte
	zeroSum   = ondisk.CRC(zeroBlock[:])
)

func (m *Machine) isZero(s dirty.Slot) bool {
	return s.Sum == zeroSum && *(*[block.Size]byte)(m.log.Payload(s.Extent, 1)) == zeroBlock
}

// mapBlocks makes the mappings: blocks and allocated runs go side by side, and
// what is consecutive in both, on one track, is one mapping.
func (p *plan) mapBlocks() {
	p.sums = slices.Grow(p.sums, len(p.blocks))
	blocks := p.blocks
	for _, r := range p.runs {
		for i := range r.N {
			b := blocks[i]
			at := r.At + block.Physical(i)
			p.sums = append(p.sums, b.slot.Sum)
			if n := len(p.Runs) - 1; n >= 0 && p.Runs[n].Volume == b.volume &&
				p.Runs[n].LBA+block.Logical(len(p.Runs[n].Sums)) == b.lba &&
				p.Runs[n].At+block.Physical(len(p.Runs[n].Sums)) == at && at.Block()%block.TrackBlocks != 0 {
				p.Runs[n].Sums = p.sums[len(p.sums)-len(p.Runs[n].Sums)-1:]
				continue
			}
			p.Runs = append(p.Runs, mapRun{Volume: b.volume, LBA: b.lba, At: at, Sums: p.sums[len(p.sums)-1:]})
		}
		blocks = blocks[r.N:]
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
	blocks := p.blocks
	n := 0
	p.batch, p.vecs = p.batch[:0], p.vecs[:0]
	for _, r := range p.runs {
		m.gather(p, r, blocks[:r.N])
		blocks = blocks[r.N:]
		if n += r.N; n >= batchBlocks {
			if err := m.Devices.Do(p.batch); err != nil {
				return err
			}
			n, p.batch, p.vecs = 0, p.batch[:0], p.vecs[:0]
		}
	}
	if err := m.Devices.Do(p.batch); err != nil && !planted.Has(planted.IgnoredWriteError) {
		return err
	}
	if planted.Has(planted.DataSyncMissing) {
		return nil
	}
	return m.Devices.Sync()
}

// gather adds a device request for a run to the batch; consecutive extents are
// one vector.
func (m *Machine) gather(p *plan, r space.Run, blocks []planned) {
	first := len(p.vecs)
	for i := 0; i < len(blocks); {
		n := 1
		for i+n < len(blocks) && blocks[i+n].slot.Extent == blocks[i].slot.Extent+oplog.Extent(n) {
			n++
		}
		p.vecs = append(p.vecs, m.log.Payload(blocks[i].slot.Extent, n))
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
			if o := old[lba%blockmap.LeafBlocks]; !o.IsHole() {
				m.Reader.Forget(o.Phys, 1)
			}
		}
		blocks = blocks[n:]
	}
}

// finish makes the durable point visible and releases what it covers.
func (m *Machine) finish(p *plan) error {
	m.forgetReplaced(p.blocks)
	for i, b := 0, p.blocks; i < len(p.runs); i++ {
		for j := range p.runs[i].N {
			ptr := block.Pointer{Phys: p.runs[i].At + block.Physical(j), Birth: p.CP, Sum: b[j].slot.Sum}
			// It may have been damaged in memory since it was published.
			m.Reader.Offer(ptr, m.log.Payload(b[j].slot.Extent, 1))
		}
		b = b[p.runs[i].N:]
	}
	m.install(&p.commit, func(old block.Pointer) { m.drop(space.Run{At: old.Phys, N: 1}) })
	m.updateReservation()
	if p.gen != nil {
		m.dirty.Drop()
	}
	m.stats.commits.Add(1)
	m.stats.blocks.Add(uint64(len(p.blocks)))
	return m.broken
}
