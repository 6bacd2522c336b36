package pool

import (
	"context"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockio"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/planted"
)

const (
	// scanLeaves is how many leaves of a map a step of the cleaner reads.
	scanLeaves = 64
	// moveBlocks is how many blocks a step moves at most.
	moveBlocks = 64
)

// walk is how far a pass has come: it goes through the leaves of all volumes.
type walk struct {
	pages   blockmap.Pages
	volumes []block.VolumeID // still to be visited; the first is being visited
	begun   bool             // parents and from are of volumes[0]
	parents []uint64         // level-1 pages still to be visited, ascending
	from    uint64           // the first leaf still to be visited
	root    block.Pointer    // of the tree that leaves was read from
	leaves  []node           // below parents[0], from from on
}

// uncached reads pages past the cache, for a walk that comes by each once.
type uncached struct {
	reader *blockio.Reader
	bulk   *bulk
}

// View implements blockmap.Pages.
func (u *uncached) View(p block.Pointer, fn func(page []byte)) error {
	if u.reader.ViewCached(p, fn) {
		return nil
	}
	var failed error
	u.bulk.readRun(anyCopy, []int32{0}, u.bulk.mem, func(int) block.Pointer { return p }, func(_ int, frame []byte, err error) {
		if failed = err; err == nil {
			fn(frame)
		}
	})
	return failed
}

// ViewCached implements blockmap.Pages.
func (u *uncached) ViewCached(p block.Pointer, fn func(page []byte)) bool {
	return u.reader.ViewCached(p, fn)
}

// Prefetch implements blockmap.Pages.
func (u *uncached) Prefetch([]block.Pointer) {}

// group returns the next leaves to look at, none when all volumes are through.
func (w *walk) group(trees map[block.VolumeID]blockmap.Tree) ([]node, error) {
	for len(w.volumes) > 0 {
		tree := trees[w.volumes[0]] // zero when it was deleted meanwhile
		if tree.Deleted {
			tree.Root = block.Pointer{}
		}
		if !w.begun {
			var err error
			if w.parents, err = blockmap.Parents(w.pages, tree.Root, 0, blockmap.MaxLeaves); err != nil {
				return nil, err
			}
			w.begun, w.from, w.leaves = true, 0, nil
		}
		if len(w.parents) == 0 {
			w.volumes, w.begun = w.volumes[1:], false
			continue
		}
		// A fold may have put other pages in the place of those that are known.
		if len(w.leaves) == 0 || w.root != tree.Root {
			if err := w.list(tree.Root); err != nil {
				return nil, err
			}
		}
		if len(w.leaves) > 0 {
			return w.leaves[:min(len(w.leaves), scanLeaves)], nil
		}
		w.parents = w.parents[1:]
	}
	return nil, nil
}

// list finds the leaves below the first parent.
func (w *walk) list(root block.Pointer) error {
	w.root, w.leaves = root, w.leaves[:0]
	lo, hi := w.parents[0]*blockmap.Fanout, (w.parents[0]+1)*blockmap.Fanout
	lo = max(lo, w.from)
	return blockmap.Walk(w.pages, root, func(p block.Pointer, level int, leaf uint64) (bool, error) {
		if leaf >= hi || leaf+blockmap.LeavesBelow(level) <= lo {
			return false, nil
		}
		if level == 0 {
			w.leaves = append(w.leaves, node{p, leaf})
		}
		return level > 0, nil
	})
}

// pass goes on behind a group.
func (w *walk) pass(group []node) {
	w.from = group[len(group)-1].leaf + 1
	w.leaves = w.leaves[len(group):]
	if len(w.leaves) == 0 {
		w.parents = w.parents[1:]
	}
}

// step moves blocks that were found, or looks for some. It returns how many
// blocks and pages it has read and written, and whether there is more to do.
func (c *cleaner) step() (blocks int, more bool, err error) {
	if len(c.queue) > 0 {
		blocks, err = c.moveSome()
		return blocks, true, err
	}
	group, err := c.walk.group(c.p.bmap.Trees())
	if err != nil || len(group) == 0 {
		return 0, false, err
	}
	if err := c.search(c.walk.volumes[0], group); err != nil {
		return 0, false, err
	}
	n := len(group)
	c.walk.pass(group)
	return n, true, nil
}

// search reads leaves and queues what is to be moved.
func (c *cleaner) search(id block.VolumeID, group []node) error {
	var wanted [scanLeaves]bool // of different workers: no two write the same
	var errs [scanLeaves]error
	err := c.bulk.read(context.Background(), len(group), func(i int) block.Pointer { return group[i].ptr }, func(i int, page []byte, err error) {
		if errs[i] = err; err != nil {
			return
		}
		wanted[i] = c.emptying.Has(group[i].ptr.Phys)
		for k := 0; k < blockmap.Fanout && !wanted[i]; k++ {
			p := block.DecodePointer(page[k*block.PointerSize:])
			wanted[i] = !p.IsHole() && c.emptying.Has(p.Phys)
		}
	})
	if err != nil {
		return err
	}
	c.queue = c.queue[:0]
	var ptrs [blockmap.LeafBlocks]block.Pointer
	for i, n := range group {
		if errs[i] != nil {
			c.count(func(s *CleanerStats) { s.Failed++ })
		}
		if !wanted[i] {
			continue
		}
		// What overlays say is newer than what the leaf says.
		first := block.Logical(n.leaf * blockmap.LeafBlocks)
		if err := c.p.bmap.Lookup(id, first, ptrs[:]); err != nil {
			return err
		}
		found, some := len(c.queue), -1
		for k, p := range ptrs {
			if p.IsHole() {
				continue
			}
			if c.emptying.Has(p.Phys) {
				c.queue = append(c.queue, mapped{p, first + block.Logical(k)})
			} else if some < 0 {
				some = k
			}
		}
		if len(c.queue) == found && some >= 0 && c.emptying.Has(n.ptr.Phys) {
			// Only the leaf itself lies there: any block of it takes it along.
			c.queue = append(c.queue, mapped{ptrs[some], first + block.Logical(some)})
		}
	}
	return nil
}

// moveSome moves blocks of the queue. It returns how many blocks it has read
// and written.
func (c *cleaner) moveSome() (blocks int, err error) {
	p, id := c.p, c.walk.volumes[0]
	if _, ok := p.catalogue.Get(id); !ok {
		c.queue = nil // it was deleted
		return 0, nil
	}
	n := min(len(c.queue), c.batch())
	asOf := p.dirty.Drops()
	batch, err := c.current(id, c.queue[:n])
	if err != nil {
		return 0, err
	}
	if len(batch) == 0 {
		c.queue = c.queue[n:]
		c.count(func(s *CleanerStats) { s.Raced += uint64(n) })
		return 0, nil
	}
	ext, ok, err := p.dirty.TryAcquire(len(batch), c.ext[:0])
	if c.ext = ext; err != nil || !ok {
		return n, err // without room a later step tries again, and not at once
	}
	c.queue = c.queue[n:]
	var good [moveBlocks]bool // of different workers: no two write the same
	err = c.bulk.read(context.Background(), len(batch), func(i int) block.Pointer { return batch[i].ptr }, func(i int, frame []byte, err error) {
		if good[i] = err == nil; good[i] {
			copy(p.dirty.Payload(ext[i], 1), frame)
		}
	})
	c.recs = c.recs[:0]
	unused := ext[:0:0]
	for i, m := range batch {
		if !good[i] {
			unused = append(unused, ext[i])
			continue
		}
		r := oplog.Record{Kind: oplog.KindWrite, Volume: id, LBA: m.lba, Count: 1, First: ext[i]}
		r.CRC[0] = m.ptr.Sum // which the content was compared with
		c.recs = append(c.recs, r)
	}
	failed, moved := len(unused), 0
	if err == nil {
		moved, err = p.dirty.Move(c.recs, asOf)
	}
	for _, r := range c.recs[moved:] {
		unused = append(unused, r.First)
	}
	if len(unused) > 0 {
		p.dirty.Give(unused)
	}
	c.count(func(s *CleanerStats) {
		s.Moved += uint64(moved)
		s.Raced += uint64(n - failed - moved)
		s.Failed += uint64(failed)
	})
	if err != nil {
		return 0, fmt.Errorf("move blocks: %w", err)
	}
	return len(batch) + moved, nil
}

// current returns those blocks that are still where they were when they were
// queued.
func (c *cleaner) current(id block.VolumeID, queued []mapped) ([]mapped, error) {
	if planted.Has(planted.MoveStalePointer) {
		return queued, nil
	}
	batch := make([]mapped, 0, len(queued))
	for _, m := range queued {
		var now [1]block.Pointer
		if err := c.p.bmap.Lookup(id, m.lba, now[:]); err != nil {
			return nil, err
		}
		if now[0] == m.ptr {
			batch = append(batch, m)
		}
	}
	return batch, nil
}
