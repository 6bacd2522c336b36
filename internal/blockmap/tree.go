package blockmap

import (
	"fmt"
	"maps"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/space"
)

// The shape of every tree: leaves are at level 0, the root at level Top.
const (
	// Fanout is the number of entries in a page.
	Fanout  = block.Size / block.PointerSize
	fanBits = space.TreeBits
	// Top is the level of the root page.
	Top = space.TreeTop
	// MaxLeaves is the number of leaves that a tree can have.
	MaxLeaves = 1 << (Top * fanBits)
)

// Pages reads the pages of trees, for who keeps folds from freeing them meanwhile.
// *blockio.Reader is one.
type Pages interface {
	// View calls fn with the page at p, which it must not keep.
	View(p block.Pointer, fn func(page []byte)) error
	// ViewCached does so only if no device is needed.
	ViewCached(p block.Pointer, fn func(page []byte)) bool
	// Prefetch says which pages will be viewed next.
	Prefetch(ps []block.Pointer)
}

// SharedPages reads pages beside folds, too.
type SharedPages interface {
	Pages
	// ViewBeside is View of a page that a fold may free, and somebody else use again,
	// at any time: it was not free if current returns true afterwards.
	ViewBeside(p block.Pointer, fn func(page []byte), current func() bool) error
}

// FindLeaf returns the pointer to a leaf of the tree under root; a hole when
// there is none.
func FindLeaf(pages Pages, root block.Pointer, leaf uint64) (block.Pointer, error) {
	p := root
	for level := Top; level > 0 && !p.IsHole(); level-- {
		at := p
		if err := pages.View(at, func(page []byte) { p = child(page, leaf, level) }); err != nil {
			return block.Pointer{}, pageError(err, level, leaf)
		}
	}
	return p, nil
}

// FindLeafCached is FindLeaf for callers that cannot wait; ok is false when a
// page is not in memory.
func FindLeafCached(pages Pages, root block.Pointer, leaf uint64) (p block.Pointer, ok bool) {
	p = root
	for level := Top; level > 0 && !p.IsHole(); level-- {
		at := p
		if !pages.ViewCached(at, func(page []byte) { p = child(page, leaf, level) }) {
			return block.Pointer{}, false
		}
	}
	return p, true
}

// child returns the entry of a page at the given level on the way to leaf.
func child(page []byte, leaf uint64, level int) block.Pointer {
	i := leaf >> ((level - 1) * fanBits) % Fanout
	return block.DecodePointer(page[i*block.PointerSize:])
}

func pageError(err error, level int, leaf uint64) error {
	return fmt.Errorf("metadata page of level %d above leaf %d: %w", level, leaf, err)
}

// Walk calls visit for every page of the tree under root, parents first, with
// its level and the number of the first leaf below it. Pages at level 0 are
// not read. Subtrees for which visit returns false are skipped.
func Walk(pages Pages, root block.Pointer, visit func(p block.Pointer, level int, leaf uint64) (bool, error)) error {
	return walk(pages, root, Top, 0, visit)
}

func walk(pages Pages, p block.Pointer, level int, leaf uint64, visit func(block.Pointer, int, uint64) (bool, error)) error {
	if p.IsHole() {
		return nil
	}
	down, err := visit(p, level, leaf)
	if err != nil || !down || level == 0 {
		return err
	}
	var entries [Fanout]block.Pointer
	if err := pages.View(p, func(page []byte) { decodePage(page, &entries) }); err != nil {
		return pageError(err, level, leaf)
	}
	pages.Prefetch(entries[:])
	for i, e := range entries {
		if err := walk(pages, e, level-1, leaf+uint64(i)<<((level-1)*fanBits), visit); err != nil {
			return err
		}
	}
	return nil
}

func decodePage(page []byte, entries *[Fanout]block.Pointer) {
	for i := range entries {
		entries[i] = block.DecodePointer(page[i*block.PointerSize:])
	}
}

// PageWriter gives an Update its new pages.
type PageWriter interface {
	// WritePage stores a new page and returns the pointer to it; the page's
	// bytes are copied. A page that others cannot be found without, or that is to
	// be as safe as such a one, is to have a twin if there is room for it.
	WritePage(page []byte, twin bool) (block.Pointer, error)
	// FreePage says that the page is no longer part of the tree.
	FreePage(p block.Pointer) error
}

// Update rewrites a tree copy-on-write, in bounded steps: first the changed
// leaves, by groups that share a parent, then the levels above. Until Root is
// asked for and made durable the old tree remains whole.
type Update struct {
	Pages  Pages
	Writer PageWriter
	// Moves, if set, says of a page that it is to be rewritten although nothing below
	// it has changed. It is asked of the pages that Group and Finish come by, once each.
	Moves func(p block.Pointer) bool
	// Twins gives leaves twins, too, and Renew, ascending, those that have none and
	// need not be rewritten for another reason. It is asked of the leaves that Group
	// comes by.
	Twins bool
	Renew []uint64
	// Lossy makes a leaf that cannot be read one without content, and not an error.
	Lossy bool
	root  block.Pointer
	// changed holds the new pointers of pages whose parents are not yet
	// rewritten, by level and by index within the level.
	changed [Top + 1]map[uint64]block.Pointer
}

// NewUpdate begins an update of the tree under root.
func NewUpdate(pages Pages, w PageWriter, root block.Pointer) *Update {
	u := &Update{Pages: pages, Writer: w, root: root}
	for i := range u.changed {
		u.changed[i] = map[uint64]block.Pointer{}
	}
	return u
}

// Group rewrites leaves below the level-1 page number parent: those for which
// want returns true. For each, edit is called with the content, zero where
// there was no leaf, and changes it; a page left as zero becomes a hole.
func (u *Update) Group(parent uint64, want func(leaf uint64, exists bool) bool, edit func(leaf uint64, page *[block.Size]byte) error) error {
	old, err := u.page(parent, 1)
	if err != nil {
		return err
	}
	var entries [Fanout]block.Pointer
	if err := u.read(old, 1, parent<<fanBits, &entries); err != nil {
		return err
	}
	var wanted, moved, renewed [Fanout]bool
	var present []block.Pointer
	for i := range entries {
		wanted[i] = want(parent<<fanBits+uint64(i), !entries[i].IsHole())
		renewed[i] = u.renews(entries[i], parent<<fanBits+uint64(i))
		moved[i] = !wanted[i] && (renewed[i] || u.moves(entries[i]))
		if wanted[i] = wanted[i] || moved[i]; wanted[i] {
			present = append(present, entries[i])
		}
	}
	u.Pages.Prefetch(present)
	var page [block.Size]byte
	changed := false
	for i := range entries {
		leaf := parent<<fanBits + uint64(i)
		if !wanted[i] {
			continue
		}
		if entries[i].IsHole() {
			clear(page[:])
		} else if err := u.Pages.View(entries[i], func(b []byte) { copy(page[:], b) }); err != nil {
			if !u.Lossy {
				return pageError(err, 0, leaf)
			}
			clear(page[:])
		}
		if !moved[i] {
			if err := edit(leaf, &page); err != nil {
				return err
			}
		}
		if entries[i], err = u.replace(entries[i], page[:], u.Twins || renewed[i] || moved[i] && entries[i].Twin != 0); err != nil {
			return err
		}
		changed = true
	}
	if !changed && !u.moves(old) {
		return nil
	}
	return u.setPage(parent, 1, old, &entries)
}

// renews reports whether a leaf is to be rewritten because it has no twin.
func (u *Update) renews(p block.Pointer, leaf uint64) bool {
	if p.IsHole() || p.Twin != 0 {
		return false
	}
	_, ok := slices.BinarySearch(u.Renew, leaf)
	return ok
}

func (u *Update) moves(p block.Pointer) bool { return u.Moves != nil && !p.IsHole() && u.Moves(p) }

// moving returns the numbers of the pages at level 2 and above that Moves wants to be
// rewritten, by level.
func (u *Update) moving() (pages [Top + 1][]uint64, err error) {
	if u.Moves == nil {
		return pages, nil
	}
	err = Walk(u.Pages, u.root, func(p block.Pointer, level int, leaf uint64) (bool, error) {
		if u.Moves(p) {
			pages[level] = append(pages[level], leaf>>(level*fanBits))
		}
		return level > 2, nil
	})
	return pages, err
}

// page finds the current pointer of page number index at the given level.
func (u *Update) page(index uint64, level int) (block.Pointer, error) {
	p := u.root
	leaf := index << (level * fanBits)
	for l := Top; l > level && !p.IsHole(); l-- {
		at := p
		if err := u.Pages.View(at, func(page []byte) { p = child(page, leaf, l) }); err != nil {
			return block.Pointer{}, pageError(err, l, leaf)
		}
	}
	return p, nil
}

func (u *Update) read(p block.Pointer, level int, leaf uint64, entries *[Fanout]block.Pointer) error {
	if p.IsHole() {
		return nil
	}
	if err := u.Pages.View(p, func(page []byte) { decodePage(page, entries) }); err != nil {
		return pageError(err, level, leaf)
	}
	return nil
}

// replace stores page in place of old and returns its pointer.
func (u *Update) replace(old block.Pointer, page []byte, twin bool) (block.Pointer, error) {
	var p block.Pointer
	var err error
	if !isZero(page) {
		if p, err = u.Writer.WritePage(page, twin); err != nil {
			return block.Pointer{}, err
		}
	}
	if !old.IsHole() {
		err = u.Writer.FreePage(old)
	}
	return p, err
}

func (u *Update) setPage(index uint64, level int, old block.Pointer, entries *[Fanout]block.Pointer) error {
	var page [block.Size]byte
	for i, e := range entries {
		e.Encode(page[i*block.PointerSize:])
	}
	p, err := u.replace(old, page[:], true)
	if err != nil {
		return err
	}
	u.changed[level][index] = p
	return nil
}

// Finish rewrites the levels above the changed leaves and returns the new root.
func (u *Update) Finish() (block.Pointer, error) {
	moving, err := u.moving()
	if err != nil {
		return block.Pointer{}, err
	}
	for level := 2; level <= Top; level++ {
		parents := map[uint64][]uint64{}
		for _, index := range moving[level] {
			parents[index] = nil
		}
		for index := range u.changed[level-1] {
			parents[index>>fanBits] = append(parents[index>>fanBits], index)
		}
		// In order, so that equal updates write equal pages to equal places.
		for _, parent := range slices.Sorted(maps.Keys(parents)) {
			old, err := u.page(parent, level)
			if err != nil {
				return block.Pointer{}, err
			}
			var entries [Fanout]block.Pointer
			if err := u.read(old, level, parent<<(level*fanBits), &entries); err != nil {
				return block.Pointer{}, err
			}
			for _, c := range parents[parent] {
				entries[c%Fanout] = u.changed[level-1][c]
			}
			if err := u.setPage(parent, level, old, &entries); err != nil {
				return block.Pointer{}, err
			}
		}
	}
	if root, ok := u.changed[Top][0]; ok {
		return root, nil
	}
	return u.root, nil
}

// ParentsThat returns the numbers of the level-1 pages of a tree for which want
// returns true, ascending. It reads only the pages above them.
func ParentsThat(pages Pages, root block.Pointer, want func(p block.Pointer) bool) ([]uint64, error) {
	var found []uint64
	err := Walk(pages, root, func(p block.Pointer, level int, leaf uint64) (bool, error) {
		if level == 1 && want(p) {
			found = append(found, leaf>>fanBits)
		}
		return level > 1, nil
	})
	return found, err
}

// Parents returns the numbers of the level-1 pages that exist above the leaves
// [lo, hi), ascending.
func Parents(pages Pages, root block.Pointer, lo, hi uint64) ([]uint64, error) {
	var found []uint64
	err := Walk(pages, root, func(_ block.Pointer, level int, leaf uint64) (bool, error) {
		if end := leaf + 1<<(level*fanBits); leaf >= hi || end <= lo {
			return false, nil
		}
		if level == 1 {
			found = append(found, leaf>>fanBits)
		}
		return level > 1, nil
	})
	return found, err
}

func isZero(p []byte) bool { return *(*[block.Size]byte)(p) == [block.Size]byte{} }
