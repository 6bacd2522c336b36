package blockmap

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/catalogue"
)

// flaky is a store whose n-th use of a kind fails.
type flaky struct {
	*store
	views, writes, frees int // fails when it comes to 1; 0 never
	err                  error
	uncached             map[block.Pointer]bool
	onView               func(p block.Pointer)
}

var errBroken = errors.New("broken")

func (f *flaky) due(n *int) error {
	if *n > 0 {
		if *n--; *n == 0 {
			return f.err
		}
	}
	return nil
}

func (f *flaky) View(p block.Pointer, fn func([]byte)) error {
	if f.onView != nil {
		f.onView(p)
	}
	if err := f.due(&f.views); err != nil {
		return err
	}
	return f.store.View(p, fn)
}

func (f *flaky) ViewBeside(p block.Pointer, fn func([]byte), _ func() bool) error {
	return f.View(p, fn)
}

func (f *flaky) ViewCached(p block.Pointer, fn func([]byte)) bool {
	return !f.uncached[p] && f.store.ViewCached(p, fn)
}

func (f *flaky) WritePage(page []byte, twin bool) (block.Pointer, error) {
	if err := f.due(&f.writes); err != nil {
		return block.Pointer{}, err
	}
	return f.store.WritePage(page, twin)
}

func (f *flaky) FreePage(p block.Pointer) error {
	if err := f.due(&f.frees); err != nil {
		return err
	}
	return f.store.FreePage(p)
}

// blocksOf a map with leaves below several pages of each level.
var spread = []block.Logical{0, 1, 300, parentBlocks, 5 * parentBlocks, parentBlocks * Fanout, MaxLeaves*LeafBlocks - 1}

func at(lba block.Logical, cp block.CP) block.Pointer {
	return block.Pointer{Phys: block.At(3, uint64(lba)%1e9+1), Birth: cp, Sum: uint32(cp)}
}

func set(m *Map, cp block.CP, lbas ...block.Logical) {
	m.Update(func(o *Overlay) {
		for _, lba := range lbas {
			o.Set(1, lba, at(lba, cp))
		}
	})
}

// newMap returns a map of one volume whose blocks of spread are in the tree.
func newMap(t *testing.T) (*Map, *flaky) {
	t.Helper()
	f := &flaky{store: &store{pages: map[block.Pointer][]byte{}, next: 1 << 30}, err: errBroken, uncached: map[block.Pointer]bool{}}
	m := NewMap(f)
	m.AddVolume(1, Tree{})
	set(m, 1, spread...)
	fold(t, m, f.store, 0, 1000, refs{}, refs{})
	return m, f
}

func want(t *testing.T, m *Map, lba block.Logical, p block.Pointer) {
	t.Helper()
	var got [1]block.Pointer
	if err := m.Lookup(1, lba, got[:]); err != nil || got[0] != p {
		t.Errorf("block %d is at %v instead of %v: %v", lba, got[0], p, err)
	}
	if !m.LookupCached(1, lba, got[:]) || got[0] != p {
		t.Errorf("block %d from memory: %v instead of %v", lba, got[0], p)
	}
}

// tryFold runs a fold up to its end or first error. The map keeps its old
// trees, as when a fold was not committed.
func tryFold(f Frozen, s *flaky) error {
	budget := 1000
	for _, id := range f.Volumes() {
		v, err := f.Fold(id, 1, &budget, s, s, refs{})
		for done := false; err == nil && !done; {
			done, err = v.Step()
		}
		if err == nil {
			_, err = v.Finish()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Whichever read, write or free of a page fails, the fold says so, and the map
// answers as before: the old tree is whole.
func TestFoldErrors(t *testing.T) {
	for _, use := range []struct {
		name string
		on   func(*flaky) *int
	}{
		{"view", func(f *flaky) *int { return &f.views }},
		{"write", func(f *flaky) *int { return &f.writes }},
		{"free", func(f *flaky) *int { return &f.frees }},
	} {
		failed := 0
		for n := 1; ; n++ {
			m, f := newMap(t)
			set(m, 2, spread[1], spread[4], spread[4]+LeafBlocks, 9*parentBlocks)
			m.Update(func(o *Overlay) { o.Punch(1, block.Range{Start: 200, End: 2 * parentBlocks}, func(block.Pointer) {}) })
			set(m, 3, 350)
			frozen := m.BeginFold()
			*use.on(f) = n
			err := tryFold(frozen, f)
			if err == nil {
				if *use.on(f) == 0 {
					t.Errorf("%s %d failed and nobody noticed", use.name, n)
				}
				break
			}
			if failed++; !errors.Is(err, errBroken) {
				t.Errorf("%s %d: %v", use.name, n, err)
			}
			if use.name == "view" && !strings.Contains(err.Error(), "metadata page of level") {
				t.Errorf("%v does not say where", err)
			}
			*use.on(f) = 0
			want(t, m, 0, at(0, 1))
			want(t, m, spread[1], at(spread[1], 2))
			want(t, m, 300, block.Pointer{})
			want(t, m, 350, at(350, 3))
			want(t, m, spread[6], at(spread[6], 1))
			if err := tryFold(frozen, f); err != nil {
				t.Errorf("once more: %v", err)
			}
		}
		if failed < 4 {
			t.Errorf("only %d uses of %s", failed, use.name)
		}
	}
}

func TestLookupErrors(t *testing.T) {
	m, f := newMap(t)
	root := m.Trees()[1].Root
	got := make([]block.Pointer, 700)
	forget := func() { clear(m.leaves.slots[:]) } // or the pages above leaves are not asked for
	for level := range Top + 1 {
		forget()
		f.views = Top + 1 - level
		err := m.Lookup(1, 0, got[:1])
		if !errors.Is(err, errBroken) || !strings.Contains(err.Error(), fmt.Sprintf("metadata page of level %d above leaf 0", level)) {
			t.Errorf("a page of level %d: %v", level, err)
		}
	}
	// Over the border of leaves, the second of which is damaged.
	forget()
	f.err = &block.CorruptError{What: "block"}
	f.views = 2*(Top+1) - 1
	if err := m.Lookup(1, 0, got); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "map of volume 1") {
		t.Errorf("%v", err)
	}
	f.views = 0

	// From memory: each page that is missing is an answer of its own.
	p := root
	for level := Top; ; level-- {
		forget()
		f.uncached[p] = true
		if m.LookupCached(1, 0, got[:1]) {
			t.Errorf("a page of level %d is not in memory", level)
		}
		f.uncached[p] = false
		if level == 0 {
			break
		}
		if err := f.store.View(p, func(page []byte) { p = child(page, 0, level) }); err != nil {
			t.Fatal(err)
		}
	}
	// What overlays know needs no page.
	f.uncached[root] = true
	set(m, 5, 0)
	if !m.LookupCached(1, 0, got[:1]) || got[0] != at(0, 5) {
		t.Errorf("from the overlay: %v", got[0])
	}
	if !m.LookupCached(7, 0, got) || slices.ContainsFunc(got, func(p block.Pointer) bool { return !p.IsHole() }) {
		t.Error("a volume that is not there is not empty")
	}
}

// A reader that meets a reused page starts again from the new root, and only
// when there is one.
func TestLookupRace(t *testing.T) {
	for _, leaves := range []bool{false, true} {
		m, f := newMap(t)
		set(m, 2, 0)
		rounds := 0
		old := m.Trees()[1].Root
		f.onView = func(p block.Pointer) {
			if p != old || rounds > 0 {
				return
			}
			rounds++
			f.onView = nil
			fold(t, m, f.store, 1, 1000, refs{}, refs{})
			f.err, f.views = &block.CorruptError{What: "block"}, 1 // the page that is looked at
		}
		if leaves {
			got, err := m.LeavesFrom(1, 0, 3)
			if err != nil || !slices.Equal(got, []uint64{0, 1, Fanout}) {
				t.Errorf("%v %v", got, err)
			}
		} else {
			want(t, m, 1, at(1, 1))
		}
		if rounds != 1 {
			t.Error("there was no race")
		}
	}
}

func TestLeavesFrom(t *testing.T) {
	m, f := newMap(t)
	set(m, 2, 700*LeafBlocks)
	m.Update(func(o *Overlay) {
		o.Punch(1, block.Range{Start: 3 * LeafBlocks, End: 5 * LeafBlocks}, func(block.Pointer) {})
	})
	m.BeginFold()
	set(m, 3, 800*LeafBlocks, 0)
	all := []uint64{0, 1, 3, 4, 256, 700, 800, 1280, 65536, MaxLeaves - 1}
	for _, test := range []struct {
		from uint64
		n    int
	}{{0, 99}, {0, 10}, {0, 9}, {0, 1}, {1, 3}, {2, 99}, {257, 2}, {1281, 99}, {MaxLeaves - 1, 5}} {
		i, _ := slices.BinarySearch(all, test.from)
		end := min(len(all), i+test.n)
		if got, err := m.LeavesFrom(1, test.from, test.n); err != nil || !slices.Equal(got, all[i:end]) {
			t.Errorf("%d from %d on: %v instead of %v: %v", test.n, test.from, got, all[i:end], err)
		}
	}
	if got, err := m.LeavesFrom(9, 0, 5); err != nil || len(got) != 0 {
		t.Errorf("no volume: %v %v", got, err)
	}
	f.views = 1
	if _, err := m.LeavesFrom(1, 0, 99); !errors.Is(err, errBroken) {
		t.Errorf("%v", err)
	}
	if n := LeavesBelow(0); n != 1 || LeavesBelow(Top) != MaxLeaves {
		t.Errorf("%d leaves below a leaf", n)
	}
}

// The overlay of a deleted volume is gone at once, its tree by folds, and it
// does not come back when a fold was under way meanwhile.
func TestDeleteVolume(t *testing.T) {
	m, f := newMap(t)
	m.AddVolume(2, Tree{})
	m.Update(func(o *Overlay) { o.Grow(10); o.Set(2, 0, at(0, 2)); o.Grow(10) })
	set(m, 2, 7)
	m.Update(func(o *Overlay) { o.Set(1, 8, block.Pointer{}) })
	frozen := m.BeginFold()
	set(m, 3, 9, 10)
	m.Update(func(o *Overlay) { o.Set(1, 11, block.Pointer{}) })
	entries, pages := m.Overlays()
	if entries != 3+3 || pages == 0 {
		t.Errorf("%d entries, %d pages", entries, pages)
	}
	var dropped []block.Physical
	m.DeleteVolume(1, func(p block.Pointer) { dropped = append(dropped, p.Phys) })
	slices.Sort(dropped)
	if !slices.Equal(dropped, []block.Physical{at(9, 3).Phys, at(10, 3).Phys}) {
		t.Errorf("dropped %v", dropped)
	}
	if now, _ := m.Overlays(); now != 3 {
		t.Errorf("%d entries", now)
	}
	m.DeleteVolume(1, func(block.Pointer) { t.Error("dropped twice") })
	m.DeleteVolume(99, func(block.Pointer) { t.Error("of a volume that never was") })
	trees := map[block.VolumeID]Tree{}
	budget := 1000
	for _, id := range frozen.Volumes() {
		v, err := frozen.Fold(id, 1, &budget, f, f, refs{})
		for done := false; err == nil && !done; {
			done, err = v.Step()
		}
		if err == nil {
			trees[id], err = v.Finish()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	m.EndFold(trees)
	if !m.Trees()[1].Deleted || !m.Unfinished() {
		t.Error("a fold brought the volume back")
	}
	for range 20 {
		fold(t, m, f.store, 1, 1, refs{}, refs{})
	}
	if _, there := m.Trees()[1]; there || m.Unfinished() {
		t.Error("the volume's tree is still there")
	}
	want(t, m, 0, block.Pointer{})
	var left []block.Pointer
	if err := m.OverlayPointers(func(p block.Pointer) error { left = append(left, p); return nil }); err != nil || len(left) != 0 {
		t.Errorf("%v %v", left, err)
	}
	var got [1]block.Pointer
	if err := m.Lookup(2, 0, got[:]); err != nil || got[0] != at(0, 2) {
		t.Errorf("another volume lost its block: %v %v", got, err)
	}
}

// References of both overlays are shown, and an error ends it.
func TestOverlayPointers(t *testing.T) {
	m, _ := newMap(t)
	set(m, 2, 7)
	m.BeginFold()
	set(m, 3, 7, 9)
	m.Update(func(o *Overlay) { o.Set(1, 10, block.Pointer{}) })
	count := func(end int) (n int, err error) {
		err = m.OverlayPointers(func(block.Pointer) error {
			if n++; n == end {
				return errBroken
			}
			return nil
		})
		return n, err
	}
	if n, err := count(0); n != 3 || err != nil {
		t.Errorf("%d references: %v", n, err)
	}
	for end := 1; end <= 3; end++ {
		if n, err := count(end); n != end || !errors.Is(err, errBroken) {
			t.Errorf("%d references: %v", n, err)
		}
	}
}

// A volume with more pending ranges than the catalogue has room for is freed
// whole instead, whatever the budget.
func TestTooManyPendingRanges(t *testing.T) {
	m, f := newMap(t)
	var lbas []block.Logical
	for i := range block.Logical(catalogue.MaxPending + 2) {
		lbas = append(lbas, i*2*parentBlocks)
	}
	set(m, 2, lbas...)
	fold(t, m, f.store, 1, 1000, refs{}, refs{})
	m.Update(func(o *Overlay) {
		for _, lba := range lbas {
			o.Punch(1, block.Range{Start: lba, End: lba + 100}, func(block.Pointer) {})
		}
	})
	fold(t, m, f.store, 2, 0, refs{}, refs{})
	if p := m.Trees()[1].Pending; len(p) != 0 {
		t.Errorf("%d ranges are pending", len(p))
	}
	for _, lba := range lbas {
		want(t, m, lba, block.Pointer{})
	}
	want(t, m, 300, at(300, 1))
}

// While a fold is under way the newer overlay answers before the one that is
// folded, that one before the tree, and holes are answers too.
func TestLookupOrder(t *testing.T) {
	m, _ := newMap(t)
	set(m, 2, 0, 1, 300)
	m.Update(func(o *Overlay) {
		o.Punch(1, block.Range{Start: parentBlocks, End: parentBlocks + 9}, func(block.Pointer) {})
	})
	m.BeginFold()
	set(m, 3, 1, parentBlocks+1)
	m.Update(func(o *Overlay) { o.Punch(1, block.Range{Start: 290, End: 310}, func(block.Pointer) {}) })
	want(t, m, 0, at(0, 2))
	want(t, m, 1, at(1, 3))
	want(t, m, 300, block.Pointer{})
	want(t, m, parentBlocks, block.Pointer{})
	want(t, m, parentBlocks+1, at(parentBlocks+1, 3))
	want(t, m, 5*parentBlocks, at(5*parentBlocks, 1))
}

// Hidden tells what lies below the active overlay, and only of what is asked. Known has
// what lies in it, too.
func TestHidden(t *testing.T) {
	m, f := newMap(t)
	set(m, 2, 1, 2)
	m.Update(func(o *Overlay) { o.Punch(1, block.Range{Start: 5, End: 90}, func(block.Pointer) {}) })
	m.BeginFold()
	set(m, 3, 2, 7)
	var got [LeafBlocks]block.Pointer
	rest := at(77, 77)
	got[100] = rest
	m.Hidden(1, []block.Logical{0, 1, 2, 6, 7, 200}, &got)
	for lba, p := range map[block.Logical]block.Pointer{0: at(0, 1), 1: at(1, 2), 100: rest} {
		if got[lba] != p {
			t.Errorf("block %d: %v instead of %v", lba, got[lba], p)
		}
	}
	for _, lba := range []block.Logical{2, 6, 7, 200} {
		if !got[lba].IsHole() {
			t.Errorf("block %d: %v", lba, got[lba])
		}
	}
	m.Known(1, []block.Logical{0, 1, 2, 6, 7, 200}, &got)
	for lba, p := range map[block.Logical]block.Pointer{0: at(0, 1), 1: at(1, 2), 2: at(2, 3), 7: at(7, 3), 100: rest} {
		if got[lba] != p {
			t.Errorf("block %d is known to be at %v instead of %v", lba, got[lba], p)
		}
	}
	// What is not in memory stays unknown, as does what no volume has.
	leaf, err := FindLeaf(f, m.Trees()[1].Root, 1)
	if err != nil {
		t.Fatal(err)
	}
	f.uncached[leaf] = true
	for _, id := range []block.VolumeID{1, 9} {
		if m.Hidden(id, []block.Logical{300}, &got); !got[300%LeafBlocks].IsHole() {
			t.Errorf("volume %d: block 300: %v", id, got[300%LeafBlocks])
		}
		if m.Known(id, []block.Logical{300}, &got); !got[300%LeafBlocks].IsHole() {
			t.Errorf("volume %d: block 300 is known to be at %v", id, got[300%LeafBlocks])
		}
	}
	delete(f.uncached, leaf)
	if m.Hidden(1, []block.Logical{300}, &got); got[300%LeafBlocks] != at(300, 1) {
		t.Errorf("block 300: %v", got[300%LeafBlocks])
	}
}

// The memory of an overlay that was folded serves the next, and what it held
// is gone.
func TestOverlayMemory(t *testing.T) {
	m := NewMap(&flaky{store: &store{pages: map[block.Pointer][]byte{}, next: 1 << 30}})
	m.AddVolume(1, Tree{})
	var before int64
	for round := range 4 {
		for lba := range block.Logical(5000) {
			set(m, block.CP(round+1), lba*3)
		}
		m.Update(func(o *Overlay) { o.Punch(1, block.Range{Start: 1 << 20, End: 1<<20 + 500}, func(block.Pointer) {}) })
		m.BeginFold()
		m.EndFold(nil)
		if n, pages := m.Overlays(); n+pages > 0 {
			t.Errorf("round %d: %d entries, %d pages", round, n, pages)
		}
		want(t, m, 0, block.Pointer{})
		if round > 1 && m.Bytes() != before {
			t.Errorf("round %d: %d bytes instead of %d", round, m.Bytes(), before)
		}
		before = m.Bytes()
	}
	if before == 0 {
		t.Error("no memory")
	}
}

// An edit that is refused ends an update, and nothing was written or freed.
func TestEditRefused(t *testing.T) {
	m, f := newMap(t)
	u := NewUpdate(f, f, m.Trees()[1].Root)
	pages := len(f.pages)
	err := u.Group(0, func(leaf uint64, _ bool) bool { return leaf == 1 }, func(uint64, *[block.Size]byte) error { return errBroken })
	if !errors.Is(err, errBroken) || len(f.pages) != pages {
		t.Errorf("%v, %d pages instead of %d", err, len(f.pages), pages)
	}
	want(t, m, 300, at(300, 1))
}
