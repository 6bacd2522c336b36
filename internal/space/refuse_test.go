package space

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

func TestCountLimit(t *testing.T) {
	s := newSpace(t, 1000)
	r := Run{block.At(0, 20), 3}
	for range 255 {
		if err := s.Inc(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Inc(r); !errors.Is(err, block.ErrUnsupported) {
		t.Errorf("a 256th reference: %v", err)
	}
	if n := s.Count(r.At); n != 255 {
		t.Errorf("count %d", n)
	}
	for range 255 {
		if err := s.Dec(r); err != nil {
			t.Fatal(err)
		}
	}
	if u := s.Usage(); u.Free != u.Total {
		t.Errorf("%+v", u)
	}
	if err := s.CheckFree(); err != nil {
		t.Error(err)
	}
}

// Counts that are loaded are those of a recount, totals included, and do not
// reach outside the data area.
func TestLoad(t *testing.T) {
	s := newSpace(t, 1000, 700)
	counts := make([]byte, 700)
	for _, b := range []int{10, 11, 300, 699} {
		counts[b] = byte(b)
	}
	if err := errors.Join(s.Load(1, 0, counts[:200]), s.Load(1, 200, counts[200:])); err != nil {
		t.Fatal(err)
	}
	var got [700]byte
	if s.Counts(1, 0, got[:]); !slices.Equal(got[:], counts) {
		t.Error("other counts")
	}
	if u := s.Usage(); u.Total-u.Free != 4 {
		t.Errorf("%+v", u)
	}
	if err := s.CheckFree(); err != nil {
		t.Error(err)
	}
	for _, test := range []struct {
		dev   int
		first uint64
	}{{0, 9}, {0, 1000}, {1, 700}, {2, 20}} {
		if err := s.Load(test.dev, test.first, []byte{1}); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("count of block %d of device %d: %v", test.first, test.dev, err)
		}
		if err := s.Load(test.dev, test.first, []byte{0}); err != nil {
			t.Errorf("no count of block %d of device %d: %v", test.first, test.dev, err)
		}
		if n := s.Count(block.At(test.dev, test.first)); n != 0 {
			t.Errorf("block %d of device %d has %d references", test.first, test.dev, n)
		}
	}
}

// A trim may take half of what is kept back from writes.
func TestReserveToFree(t *testing.T) {
	s := newSpace(t, 10_000)
	u := s.Usage()
	if !s.Reserve(u.Free-u.Slop) || s.Reserve(1) {
		t.Fatal("not full")
	}
	half := u.Slop - u.Slop/2
	if s.ReserveToFree(half + 1) {
		t.Error("more than half of the slop")
	}
	if !s.ReserveToFree(half) || s.ReserveToFree(1) {
		t.Error("not exactly half of the slop")
	}
	s.ForceReserve(100)
	if got := s.Usage().Reserved; got != u.Free-u.Slop+half+100 {
		t.Errorf("%d blocks reserved", got)
	}
	s.Unreserve(s.Usage().Reserved)
	defer func() {
		if recover() == nil {
			t.Error("less than nothing is reserved")
		}
	}()
	s.Unreserve(1)
}

// Totals that disagree with the counts do not stay unnoticed.
func TestCheckFreeFinds(t *testing.T) {
	for name, harm := range map[string]func(*Space){
		"a count": func(s *Space) { s.devs[0].counts.used[500/64] |= 1 << (500 % 64) },
		"a track": func(s *Space) { s.devs[0].trackFree[1]--; s.free-- },
		"the sum": func(s *Space) { s.free++ },
	} {
		s := newSpace(t, 1000)
		if err := s.CheckFree(); err != nil {
			t.Fatal(err)
		}
		if harm(s); !errors.Is(s.CheckFree(), block.ErrCorrupt) {
			t.Errorf("%s is wrong: %v", name, s.CheckFree())
		}
	}
}

func TestNoDevice(t *testing.T) {
	s := New()
	if _, err := s.Alloc(1, nil); !errors.Is(err, block.ErrNoSpace) {
		t.Errorf("%v", err)
	}
	if s.Reserve(1) || s.Count(block.At(0, 20)) != 0 {
		t.Error("a space without devices gives something")
	}
	if err := s.AddDevice(0, 0); err == nil {
		t.Error("a device without blocks")
	}
	if u := s.Usage(); u != (Usage{}) {
		t.Errorf("%+v", u)
	}
}

// Pages against a set of page numbers.
func TestPages(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 3))
		var p Pages
		type page struct {
			level int
			n     uint64
		}
		model := map[page]bool{}
		leaves := map[uint64]bool{}
		other := uint32(seed % 2) // of another tree's pages none counts
		rest := p.Add(other, 5)
		for range 200 {
			leaf := rng.Uint64N(1 << (1 + rng.IntN(24)))
			want := 0
			for level := range TreeTop + 1 {
				if at := (page{level, leaf >> (8 * level)}); !model[at] {
					model[at] = true
					want++
				}
			}
			leaves[leaf] = true
			if m := p.Missing(7, leaf); m != want {
				t.Fatalf("seed %d: %d pages are missing for leaf %d instead of %d", seed, m, leaf, want)
			}
			if n := p.Add(7, leaf); n != want || p.Len() != rest+len(model) || p.Missing(7, leaf) != 0 {
				t.Fatalf("seed %d: leaf %d added %d pages instead of %d; %d of %d", seed, leaf, n, want, p.Len(), len(model))
			}
		}
		n := 0
		for leaf := range p.Leaves(7) {
			if n++; !leaves[leaf] {
				t.Fatalf("seed %d: leaf %d was never added", seed, leaf)
			}
		}
		if n != len(leaves) {
			t.Fatalf("seed %d: %d leaves of %d", seed, n, len(leaves))
		}
		for range p.Leaves(7) {
			break
		}
		if p.Drop(other); p.Len() != len(model) || p.Missing(other, 5) != TreeTop+1 || p.Bytes() == 0 {
			t.Fatalf("seed %d: %d pages of %d are left after Drop", seed, p.Len(), len(model))
		}
		if p.Clear(); p.Len() != 0 || p.Missing(7, 0) != TreeTop+1 {
			t.Fatalf("seed %d: %d pages after Clear", seed, p.Len())
		}
		if p.Free(); p.Bytes() != 0 {
			t.Fatalf("seed %d: %d bytes after Free", seed, p.Bytes())
		}
	}
}
