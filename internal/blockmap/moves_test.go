package blockmap

import (
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// A fold rewrites the pages above leaves that are to be moved, and leaves below these,
// also where nothing has changed, and nothing else; what is mapped stays.
func TestFoldMovesPages(t *testing.T) {
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 41))
		s := &store{pages: map[block.Pointer][]byte{}, next: 1 << 30}
		m := NewMap(s)
		m.AddVolume(1, Tree{})
		model := map[block.Logical]block.Pointer{}
		set := func(cp block.CP, n int) {
			m.Update(func(o *Overlay) {
				for range n {
					lba := block.Logical(rng.IntN(600) * parentBlocks / 2)
					p := block.Pointer{Phys: block.Physical(1 + rng.IntN(1<<20)), Birth: cp, Sum: 1}
					model[lba] = p
					o.Set(1, lba, p)
				}
			})
		}
		run := func(cp block.CP, moves func(block.Pointer) bool) {
			t.Helper()
			s.birth, s.freed = cp, nil
			f := m.BeginFold()
			f.Moves = moves
			trees := map[block.VolumeID]Tree{}
			budget := 1000
			for _, id := range f.Volumes() {
				v, err := f.Fold(id, cp-1, &budget, s, s, refs{})
				for done := false; !done && err == nil; {
					done, err = v.Step()
				}
				if err == nil {
					trees[id], err = v.Finish()
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			for _, p := range s.freed {
				if _, ok := s.pages[p]; !ok {
					t.Fatalf("page %v was freed twice", p)
				}
				delete(s.pages, p)
			}
			m.EndFold(trees)
		}
		set(1, 200)
		run(1, nil)
		bad := map[block.Pointer]bool{}
		upper := 0
		root := m.Trees()[1].Root
		if err := Walk(s, root, func(p block.Pointer, level int, _ uint64) (bool, error) {
			if rng.IntN(4) == 0 {
				bad[p] = true
				if level > 0 {
					upper++
				}
			}
			return level > 0, nil
		}); err != nil {
			t.Fatal(err)
		}
		if seed%2 == 0 {
			set(2, 20)
		}
		before := len(s.pages)
		run(2, func(p block.Pointer) bool { return bad[p] })
		if upper > 0 && len(s.freed) == 0 {
			t.Error("nothing was moved")
		}
		if seed%2 == 1 && len(s.pages) != before {
			t.Errorf("%d pages became %d", before, len(s.pages))
		}
		found := 0
		if err := Walk(s, m.Trees()[1].Root, func(p block.Pointer, level int, leaf uint64) (bool, error) {
			if found++; level > 0 && bad[p] {
				t.Errorf("seed %d: page of level %d above leaf %d was not moved", seed, level, leaf)
			}
			return level > 0, nil
		}); err != nil {
			t.Fatal(err)
		}
		if found != len(s.pages) {
			t.Errorf("%d pages are in the tree, %d are stored", found, len(s.pages))
		}
		for lba, want := range model {
			var got [1]block.Pointer
			if err := m.Lookup(1, lba, got[:]); err != nil || got[0] != want {
				t.Fatalf("block %d: %v, %v instead of %v", lba, err, got[0], want)
			}
		}
		if bad[root] && m.Trees()[1].Root == root {
			t.Error("the root is where it was")
		}
		// With nothing to move it does nothing.
		if run(3, func(block.Pointer) bool { return false }); len(s.freed) != 0 {
			t.Errorf("%d pages were rewritten", len(s.freed))
		}
	}
}
