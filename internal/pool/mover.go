package pool

import (
	"context"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/planted"
)

// moveBlocks is how many blocks a step moves at most.
const moveBlocks = 64

// mover walks the maps of all volumes, and writes blocks again that lie where they
// should not: for the cleaner, and for what empties a device. A block that several
// references share is moved once for each.
type mover struct {
	p    *Pool
	has  func(block.Physical) bool // whether a block is to be moved
	owed bool                      // room was kept for what is moved
	// note is told how many blocks were moved, were left alone because clients changed
	// them meanwhile, and could not be read.
	note func(moved, raced, failed int)

	bulk  *bulk // nil before the first pass
	walk  walk
	queue []mapped // blocks of walk.volume to be moved
	ext   []oplog.Extent
	recs  []oplog.Record
}

// begin begins a walk of all maps.
func (m *mover) begin() error {
	if m.bulk == nil {
		b, err := newBulk(m.p.set)
		if err != nil {
			return err
		}
		m.bulk = b
	}
	m.walk = walk{pages: &uncached{m.p.reader, m.bulk}}
	for id, tree := range m.p.bmap.Trees() {
		if !tree.Deleted {
			m.walk.volumes = append(m.walk.volumes, id)
		}
	}
	slices.Sort(m.walk.volumes)
	return nil
}

// end forgets a walk; what was moved so far is a write like others.
func (m *mover) end() { m.queue, m.walk = nil, walk{} }

// close frees memory.
func (m *mover) close() {
	m.end()
	if m.bulk != nil {
		m.bulk.close()
	}
	m.bulk = nil
}

// batch returns how many blocks are moved in one step.
func (m *mover) batch() int { return max(1, min(moveBlocks, m.p.dirty.Capacity()/16)) }

// step moves blocks that were found, or looks for some. It returns how many
// blocks and pages it has read and written, and whether there is more to do.
func (m *mover) step() (blocks int, more bool, err error) {
	if len(m.queue) > 0 {
		blocks, err = m.moveSome()
		return blocks, true, err
	}
	group, err := m.walk.group(m.p.bmap.Trees())
	if err != nil || len(group) == 0 {
		return 0, false, err
	}
	if err := m.search(m.walk.volumes[0], group); err != nil {
		return 0, false, err
	}
	n := len(group)
	m.walk.pass(group)
	return n, true, nil
}

// search reads leaves and queues what is to be moved.
func (m *mover) search(id block.VolumeID, group []node) error {
	var wanted [scanLeaves]bool // of different workers: no two write the same
	var errs [scanLeaves]error
	err := m.bulk.read(context.Background(), len(group), func(i int) block.Pointer { return group[i].ptr }, func(i int, page []byte, err error) {
		if errs[i] = err; err != nil {
			return
		}
		wanted[i] = m.hasPage(group[i].ptr)
		for k := 0; k < blockmap.Fanout && !wanted[i]; k++ {
			p := block.DecodePointer(page[k*block.PointerSize:])
			wanted[i] = !p.IsHole() && m.has(p.Phys)
		}
	})
	if err != nil {
		return err
	}
	m.queue = m.queue[:0]
	var ptrs [blockmap.LeafBlocks]block.Pointer
	for i, n := range group {
		if errs[i] != nil {
			m.note(0, 0, 1)
		}
		if !wanted[i] {
			continue
		}
		// What overlays say is newer than what the leaf says.
		first := block.Logical(n.leaf * blockmap.LeafBlocks)
		if err := m.p.bmap.Lookup(id, first, ptrs[:]); err != nil {
			return err
		}
		found, some := len(m.queue), -1
		for k, p := range ptrs {
			if p.IsHole() {
				continue
			}
			if m.has(p.Phys) {
				m.queue = append(m.queue, mapped{p, first + block.Logical(k)})
			} else if some < 0 {
				some = k
			}
		}
		if len(m.queue) == found && some >= 0 && m.hasPage(n.ptr) {
			// Only the leaf itself lies there: any block of it takes it along.
			m.queue = append(m.queue, mapped{ptrs[some], first + block.Logical(some)})
		}
	}
	return nil
}

// hasPage reports whether a page or its twin is to be moved.
func (m *mover) hasPage(p block.Pointer) bool {
	return m.has(p.Phys) || p.Twin != 0 && m.has(p.Second().Phys)
}

// moveSome moves blocks of the queue. It returns how many blocks it has read
// and written.
func (m *mover) moveSome() (blocks int, err error) {
	p, id := m.p, m.walk.volumes[0]
	if _, ok := p.catalogue.Get(id); !ok {
		m.queue = nil // it was deleted
		return 0, nil
	}
	n := min(len(m.queue), m.batch())
	asOf := p.dirty.Drops()
	batch, err := m.current(id, m.queue[:n])
	if err != nil {
		return 0, err
	}
	if len(batch) == 0 {
		m.queue = m.queue[n:]
		m.note(0, n, 0)
		return 0, nil
	}
	ext, ok, err := p.dirty.TryAcquire(len(batch), m.ext[:0])
	if m.ext = ext; err != nil || !ok {
		return n, err // without room a later step tries again, and not at once
	}
	m.queue = m.queue[n:]
	var good [moveBlocks]bool // of different workers: no two write the same
	err = m.bulk.read(context.Background(), len(batch), func(i int) block.Pointer { return batch[i].ptr }, func(i int, frame []byte, err error) {
		if good[i] = err == nil; good[i] {
			copy(p.dirty.Payload(ext[i], 1), frame)
		}
	})
	m.recs = m.recs[:0]
	unused := ext[:0:0]
	for i, b := range batch {
		if !good[i] {
			unused = append(unused, ext[i])
			continue
		}
		r := oplog.Record{Kind: oplog.KindWrite, Volume: id, LBA: b.lba, Count: 1, First: ext[i]}
		r.CRC[0] = b.ptr.Sum // which the content was compared with
		m.recs = append(m.recs, r)
	}
	failed, moved := len(unused), 0
	if err == nil {
		moved, err = p.dirty.Move(m.recs, asOf, m.owed)
	}
	for _, r := range m.recs[moved:] {
		unused = append(unused, r.First)
	}
	if len(unused) > 0 {
		p.dirty.Give(unused)
	}
	m.note(moved, n-failed-moved, failed)
	if err != nil {
		return 0, fmt.Errorf("move blocks: %w", err)
	}
	return len(batch) + moved, nil
}

// current returns those blocks that are still where they were when they were
// queued.
func (m *mover) current(id block.VolumeID, queued []mapped) ([]mapped, error) {
	if planted.Has(planted.MoveStalePointer) {
		return queued, nil
	}
	batch := make([]mapped, 0, len(queued))
	for _, b := range queued {
		var now [1]block.Pointer
		if err := m.p.bmap.Lookup(id, b.lba, now[:]); err != nil {
			return nil, err
		}
		if now[0] == b.ptr {
			batch = append(batch, b)
		}
	}
	return batch, nil
}
