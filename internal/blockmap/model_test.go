package blockmap

import (
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// store keeps pages in memory. It is Pages and PageWriter.
type store struct {
	pages map[block.Pointer][]byte
	next  block.Physical
	birth block.CP
	freed []block.Pointer
}

var errNoPage = errors.New("no such page")

func (s *store) View(p block.Pointer, fn func([]byte)) error {
	page, ok := s.pages[p]
	if !ok {
		return errNoPage
	}
	fn(page)
	return nil
}

func (s *store) ViewCached(p block.Pointer, fn func([]byte)) bool { return s.View(p, fn) == nil }

func (s *store) ViewBeside(p block.Pointer, fn func([]byte), _ func() bool) error {
	return s.View(p, fn)
}

func (s *store) Prefetch([]block.Pointer) {}

func (s *store) WritePage(page []byte, _ bool) (block.Pointer, error) {
	s.next++
	p := block.Pointer{Phys: s.next, Birth: s.birth, Sum: ondisk.CRC(page)}
	s.pages[p] = append([]byte(nil), page...)
	return p, nil
}

func (s *store) FreePage(p block.Pointer) error {
	if _, ok := s.pages[p]; !ok {
		return errNoPage
	}
	s.freed = append(s.freed, p)
	return nil
}

// refs counts references to data blocks.
type refs map[block.Physical]int

func (r refs) Added(p block.Pointer)   { r[p.Phys]++ }
func (r refs) Dropped(p block.Pointer) { r[p.Phys]-- }

// Overlays, trees, pending ranges and folds against a map of blocks: what is
// looked up, which references exist, and that freed pages are exactly those
// that no tree has.
func TestMapAgainstModel(t *testing.T) {
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 31))
		s := &store{pages: map[block.Pointer][]byte{}, next: 1 << 30}
		m := NewMap(s)
		m.AddVolume(1, Tree{})
		const span = 3 * parentBlocks
		model := map[block.Logical]block.Pointer{}
		tree := refs{}    // references of the tree
		overlay := refs{} // and of the overlays
		var data block.Physical
		limit := block.CP(0)
		drop := func(p block.Pointer) { overlay.Dropped(p) }
		lba := func() block.Logical {
			if rng.IntN(2) == 0 {
				return block.Logical(rng.IntN(700))
			}
			return block.Logical(rng.IntN(span))
		}
		for cp := block.CP(1); cp < 60; cp++ {
			for range rng.IntN(40) {
				at := lba()
				if rng.IntN(6) > 0 {
					data++
					p := block.Pointer{Phys: data, Birth: cp, Sum: uint32(data)}
					m.Update(func(o *Overlay) {
						if old := o.Set(1, at, p); !old.IsHole() {
							drop(old)
						}
					})
					overlay.Added(p)
					model[at] = p
					continue
				}
				r := block.Range{Start: at, End: at + 1 + block.Logical(rng.IntN(span))}
				m.Update(func(o *Overlay) { o.Punch(1, r, drop) })
				for b := range model {
					if b >= r.Start && b < r.End {
						delete(model, b)
					}
				}
			}
			if rng.IntN(4) == 0 {
				s.birth = cp
				fold(t, m, s, limit, rng.IntN(4), tree, overlay)
				limit = cp
			}
			compare(t, seed, m, model, rng, span)
		}
		// At last everything is folded and nothing but the model is left.
		for first := true; first || m.Unfinished(); first = false {
			fold(t, m, s, limit, 1000, tree, overlay)
			limit = 60
		}
		compare(t, seed, m, model, rng, span)
		want := map[block.Physical]int{}
		for _, p := range model {
			want[p.Phys]++
		}
		for p, n := range tree {
			if n != want[p] {
				t.Fatalf("seed %d: block %v has %d references instead of %d", seed, p, n, want[p])
			}
		}
		for p, n := range overlay {
			if n != 0 {
				t.Fatalf("seed %d: overlays still refer to block %v %d times", seed, p, n)
			}
		}
		live := 0
		err := Walk(s, m.trees[1].Root, func(block.Pointer, int, uint64) (bool, error) { live++; return true, nil })
		if err != nil || live != len(s.pages) {
			t.Fatalf("seed %d: %d pages in the tree, %d kept: %v", seed, live, len(s.pages), err)
		}
	}
}

func fold(t *testing.T, m *Map, s *store, limit block.CP, budget int, tree, overlay refs) {
	t.Helper()
	s.freed = nil
	f := m.BeginFold()
	trees := map[block.VolumeID]Tree{}
	for _, id := range f.Volumes() {
		v, err := f.Fold(id, limit, &budget, s, s, tree)
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
	_ = f.Overlay.each(func(_ block.VolumeID, _ block.Logical, p block.Pointer) error { overlay.Dropped(p); return nil })
	m.EndFold(trees)
	for _, p := range s.freed {
		delete(s.pages, p) // a page freed twice, or too early, will be missed
	}
}

func compare(t *testing.T, seed uint64, m *Map, model map[block.Logical]block.Pointer, rng *rand.Rand, span int) {
	t.Helper()
	check := func(at block.Logical, n int) {
		got := make([]block.Pointer, n)
		if err := m.Lookup(1, at, got); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		for i, p := range got {
			if p != model[at+block.Logical(i)] {
				t.Fatalf("seed %d: block %d is at %v instead of %v", seed, int(at)+i, p, model[at+block.Logical(i)])
			}
		}
	}
	check(0, 720)
	for range 10 {
		check(block.Logical(rng.IntN(span)), 1+rng.IntN(600))
	}
	for b := range model {
		check(b, 1)
	}
	// All pages are in memory, so that it knows as much.
	var known [LeafBlocks]block.Pointer
	first := block.Logical(rng.IntN(3) * LeafBlocks)
	var lbas []block.Logical
	for i := range block.Logical(LeafBlocks) {
		if rng.IntN(2) == 0 {
			lbas = append(lbas, first+i)
		}
	}
	m.Known(1, lbas, &known)
	for _, lba := range lbas {
		if p := known[lba%LeafBlocks]; p != model[lba] {
			t.Fatalf("seed %d: block %d is known to be at %v instead of %v", seed, lba, p, model[lba])
		}
	}
}
