package pool

import (
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockio"
	"github.com/pollux-storage/pollux/internal/blockmap"
)

// scanLeaves is how many leaves of a map a step of a walk reads.
const scanLeaves = 64

// walk is how far a pass has come: it goes through the leaves of all volumes.
type walk struct {
	pages   blockmap.Pages
	volumes []block.VolumeID // still to be visited; the first is being visited
	begun   bool             // parents and from are of volumes[0]
	parents []uint64         // level-1 pages still to be visited, ascending
	from    uint64           // the first leaf still to be visited
	first   uint64           // the first leaf of volumes[0] to be visited at all
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
			if w.parents, err = blockmap.Parents(w.pages, tree.Root, w.first, blockmap.MaxLeaves); err != nil {
				return nil, err
			}
			w.begun, w.from, w.first, w.leaves = true, w.first, 0, nil
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
