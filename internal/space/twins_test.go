package space

import (
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// Blocks with twins are free before, on devices that are alone, in use afterwards, and
// never what somebody was promised; those of two devices lie on different ones, and those
// of one far from each other.
func TestAllocTwins(t *testing.T) {
	const blocks, first = 40*block.TrackBlocks + 77, 300
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 5))
		devices := 1 + rng.IntN(4)
		s := New()
		used := map[block.Physical]bool{}
		for range devices {
			if err := s.AddDevice(blocks, first); err != nil {
				t.Fatal(err)
			}
		}
		alone := map[int]bool{}
		for dev := range devices {
			alone[dev] = rng.IntN(4) > 0
		}
		left := -1 // the device that leaves
		if devices > 2 && rng.IntN(2) == 0 {
			left = devices - 1
			s.SetLeaving(left, true)
		}
		partners := 0
		for dev, is := range alone {
			if is && dev != left {
				partners++
			}
		}
		take := func(r Run) {
			for p := r.At; p < r.At+block.Physical(r.N); p++ {
				if used[p] || p.Block() < first || p.Block() >= blocks || p.Device() == left {
					t.Fatalf("seed %d: block %v was given out", seed, p)
				}
				if used[p] = true; s.Count(p) != 1 {
					t.Fatalf("seed %d: block %v has count %d", seed, p, s.Count(p))
				}
			}
		}
		got := 0
		for range 200 {
			if rng.IntN(4) == 0 && s.Reserve(100) {
				runs, err := s.Alloc(100, nil)
				s.Unreserve(100)
				if err != nil {
					t.Fatal(err)
				}
				for _, r := range runs {
					take(r)
				}
			}
			for p := range used {
				if rng.IntN(10) == 0 {
					delete(used, p)
					if err := s.Dec(Run{p, 1}); err != nil {
						t.Fatal(err)
					}
				}
			}
			n := 1 + rng.IntN(40)
			pairs := s.AllocTwins(n, func(dev int) bool { return alone[dev] })
			have := 0
			for _, p := range pairs {
				have += p.N
				take(p.Run)
				take(p.Second())
				a, b := p.At, p.Second().At
				if !alone[a.Device()] || !alone[b.Device()] {
					t.Fatalf("seed %d: a twin at %v of %v", seed, b, a)
				}
				if a.Device() == b.Device() && b < a+blocks/16 {
					t.Fatalf("seed %d: the twin of %v is at %v", seed, a, b)
				}
			}
			if got += have; have > n {
				t.Fatalf("seed %d: %d blocks instead of %d", seed, have, n)
			}
			if u := s.Usage(); have > 0 && u.Spare() < 0 {
				t.Fatalf("seed %d: %+v", seed, u)
			}
		}
		if (got > 0) != (partners > 0) {
			t.Errorf("seed %d: %d blocks with twins on %d devices", seed, got, partners)
		}
		if err := s.CheckFree(); err != nil {
			t.Error(err)
		}
		s.Close()
	}
}

// With room the twins are on another device, and whole tracks stay whole as long as
// others have enough.
func TestTwinsElsewhere(t *testing.T) {
	s := New()
	defer s.Close()
	for range 2 {
		if err := s.AddDevice(64*block.TrackBlocks, block.TrackBlocks); err != nil {
			t.Fatal(err)
		}
	}
	whole := s.Tracks().Whole
	for range 8 {
		n := 0
		for _, p := range s.AllocTwins(16, func(int) bool { return true }) {
			if n += p.N; p.At.Device() == p.Second().At.Device() {
				t.Errorf("twins at %v and %v", p.At, p.Second().At)
			}
		}
		if n != 16 {
			t.Errorf("%d blocks", n)
		}
	}
	if now := s.Tracks().Whole; whole-now > 4 {
		t.Errorf("%d tracks were begun", whole-now)
	}
}

// What is full, reserved or kept back gives no twins.
func TestNoRoomForTwins(t *testing.T) {
	s := New()
	defer s.Close()
	if err := s.AddDevice(64*block.TrackBlocks, 0); err != nil {
		t.Fatal(err)
	}
	any := func(int) bool { return true }
	n := s.Usage().Spare()
	if !s.Reserve(n) {
		t.Fatal("nothing to be reserved")
	}
	if pairs := s.AllocTwins(4, any); len(pairs) != 0 {
		t.Errorf("%v of what is reserved", pairs)
	}
	s.Unreserve(5)
	if pairs := s.AllocTwins(4, any); len(pairs) != 1 || pairs[0].N != 2 {
		t.Errorf("%v of 5 blocks", pairs)
	}
}
