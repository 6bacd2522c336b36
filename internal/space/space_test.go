package space

import (
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

func newSpace(t *testing.T, sizes ...uint64) *Space {
	t.Helper()
	s := New()
	t.Cleanup(s.Close)
	for _, n := range sizes {
		if err := s.AddDevice(n, 10); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// An allocator against a model that knows every block's count.
func TestAgainstModel(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		s := newSpace(t, 1000, 700)
		model := map[block.Physical]int{}
		var held []block.Physical
		for range 3000 {
			switch rng.IntN(4) {
			case 0, 1:
				n := 1 + rng.IntN(40)
				runs, err := s.Alloc(n, nil)
				if len(model)+n > 990+690 {
					if !errors.Is(err, block.ErrNoSpace) {
						t.Fatalf("seed %d: overfull: %v", seed, err)
					}
					continue
				}
				if err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
				for _, r := range runs {
					if r.At.Block()/256 != (r.At.Block()+uint64(r.N)-1)/256 {
						t.Fatalf("seed %d: run %v crosses a track", seed, r)
					}
					for i := range r.N {
						p := r.At + block.Physical(i)
						if model[p] != 0 || p.Block() < 10 {
							t.Fatalf("seed %d: %v handed out twice", seed, p)
						}
						model[p] = 1
						held = append(held, p)
						n--
					}
				}
				if n != 0 {
					t.Fatalf("seed %d: %d blocks missing", seed, n)
				}
			case 2:
				if len(held) > 0 {
					p := held[rng.IntN(len(held))]
					if model[p] < 255 {
						if err := s.Inc(Run{p, 1}); err != nil {
							t.Fatal(err)
						}
						model[p]++
						held = append(held, p)
					}
				}
			case 3:
				for range rng.IntN(30) {
					if len(held) == 0 {
						break
					}
					i := rng.IntN(len(held))
					p := held[i]
					held[i] = held[len(held)-1]
					held = held[:len(held)-1]
					if err := s.Dec(Run{p, 1}); err != nil {
						t.Fatal(err)
					}
					if model[p]--; model[p] == 0 {
						delete(model, p)
					}
				}
			}
		}
		recount := newSpace(t, 1000, 700)
		for p, n := range model {
			for range n {
				if err := recount.Inc(Run{p, 1}); err != nil {
					t.Fatal(err)
				}
			}
		}
		var have, want [1000]byte
		for dev, n := range []int{1000, 700} {
			s.Counts(dev, 0, have[:n])
			recount.Counts(dev, 0, want[:n])
			if have != want {
				t.Fatalf("seed %d: counts of device %d are %v, want %v", seed, dev, have, want)
			}
		}
		if err := s.CheckFree(); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

func TestFreeingAFreeBlockIsCorruption(t *testing.T) {
	s := newSpace(t, 1000)
	for _, r := range []Run{{block.At(0, 20), 1}, {block.At(0, 5), 1}, {block.At(1, 20), 1}, {block.At(0, 999), 2}} {
		if err := s.Dec(r); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("%v: %v", r, err)
		}
	}
}

func TestReservationsKeepTheSlop(t *testing.T) {
	s := newSpace(t, 10_000)
	u := s.Usage()
	if !s.Reserve(u.Free - u.Slop) {
		t.Fatal("refused what is free")
	}
	if s.Reserve(1) {
		t.Fatal("granted out of the slop")
	}
	s.Unreserve(1)
	if !s.Reserve(1) {
		t.Fatal("refused what was given back")
	}
}

// What is allocated together lies together while whole tracks are free.
func TestWholeTracksFirst(t *testing.T) {
	s := newSpace(t, 256*8)
	if _, err := s.Alloc(100, nil); err != nil {
		t.Fatal(err)
	}
	runs, err := s.Alloc(256, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(runs) != 1 || runs[0].At.Block()%256 != 0 {
		t.Errorf("a track's worth came as %v", runs)
	}
}

// Small allocations fill a track before they begin another.
func TestSmallAllocationsShareATrack(t *testing.T) {
	s := newSpace(t, 256*8)
	for range 20 {
		if _, err := s.Alloc(12, nil); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.Tracks(); got.Whole != 7 {
		t.Errorf("240 blocks left %d of 8 tracks whole", got.Whole)
	}
}

// Unused is about whole ranges of the data area, and of nothing beyond it.
func TestUnused(t *testing.T) {
	s := New()
	defer s.Close()
	if err := s.AddDevice(4*block.TrackBlocks, 2*block.TrackBlocks); err != nil {
		t.Fatal(err)
	}
	at := block.At(0, 2*block.TrackBlocks+70)
	if err := s.Inc(Run{At: at, N: 2}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		first uint64
		n     int
		want  bool
	}{
		{2 * block.TrackBlocks, block.TrackBlocks, false},
		{2 * block.TrackBlocks, 70, true},
		{2 * block.TrackBlocks, 71, false},
		{2*block.TrackBlocks + 71, 1, false},
		{2*block.TrackBlocks + 72, block.TrackBlocks - 72, true},
		{3 * block.TrackBlocks, block.TrackBlocks, true},
		{4 * block.TrackBlocks, 1, false},
		{block.TrackBlocks, block.TrackBlocks, false},
	} {
		if got := s.Unused(0, c.first, c.n); got != c.want {
			t.Errorf("%d blocks from %d on: %v", c.n, c.first, got)
		}
	}
	if s.Unused(1, 2*block.TrackBlocks, 1) {
		t.Error("a device that is not there has unused blocks")
	}
	if err := s.Dec(Run{At: at, N: 2}); err != nil || !s.Unused(0, 2*block.TrackBlocks, block.TrackBlocks) {
		t.Error("freed blocks are in use", err)
	}
}
