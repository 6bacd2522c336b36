package space

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// The next member of a set of tracks is found from everywhere, whatever its size.
func TestTrackSet(t *testing.T) {
	for _, size := range []int{1, 63, 64, 65, 4096, 4097, 300_000} {
		rng := rand.New(rand.NewPCG(uint64(size), 7))
		s, err := newTrackSet(size)
		if err != nil {
			t.Fatal(err)
		}
		members := map[int]bool{}
		for range 400 {
			if i := rng.IntN(size); rng.IntN(5) > 0 {
				s.put(i, true)
				members[i] = true
			} else if rng.IntN(2) == 0 {
				for i := range members {
					s.put(i, false)
					delete(members, i)
				}
			}
			from := rng.IntN(size + 1)
			want, some := 0, false
			for i := range members {
				if i >= from && (!some || i < want) {
					want, some = i, true
				}
			}
			if got, ok := s.next(from); ok != some || got != want {
				t.Fatalf("of %d: %d, %v instead of %d, %v", size, got, ok, want, some)
			}
			if n, ok := s.count(); n != len(members) || !ok {
				t.Fatalf("of %d: %d members instead of %d", size, n, len(members))
			}
		}
		if err := s.close(); err != nil {
			t.Error(err)
		}
	}
}

// owner has blocks of a Space.
type owner struct {
	*Space
	held []block.Physical
}

func (o *owner) took(runs []Run) int {
	for _, r := range runs {
		for i := range r.N {
			o.held = append(o.held, r.At+block.Physical(i))
		}
	}
	return length(runs)
}

func length(runs []Run) (n int) {
	for _, r := range runs {
		n += r.N
	}
	return n
}

// drop frees n blocks drawn at random.
func (o *owner) drop(rng *rand.Rand, n int) error {
	for ; n > 0 && len(o.held) > 0; n-- {
		i, last := rng.IntN(len(o.held)), len(o.held)-1
		if err := o.Dec(Run{o.held[i], 1}); err != nil {
			return err
		}
		o.held[i] = o.held[last]
		o.held = o.held[:last]
	}
	return nil
}

// What is free, promised and owed is the same with cheap ranges as without, while devices
// leave and tracks are emptied, and cheap blocks come from devices that stay.
func TestCheapCountsNothing(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 9))
		var both [2]owner
		for i := range both {
			s := newSpace(t, 12*block.TrackBlocks, 9*block.TrackBlocks+77, 12*block.TrackBlocks)
			d, err := NewDevice(3*block.TrackBlocks, 10)
			if err != nil {
				t.Fatal(err)
			}
			d.SetApart()
			s.Attach(d)
			both[i].Space = s
		}
		with, without := &both[0], &both[1]
		leaving := false
		for step := range 400 {
			fail := func(format string, a ...any) {
				t.Helper()
				t.Fatalf("seed %d, step %d: %s", seed, step, fmt.Sprintf(format, a...))
			}
			n := 1 + rng.IntN(300)
			switch rng.IntN(9) {
			case 0, 1:
				with.SetCheap(rng.IntN(5), uint64(rng.IntN(12*16))*PieceBlocks, uint64(1+rng.IntN(30))*PieceBlocks, rng.IntN(3) > 0)
			case 2, 3:
				runs, err := with.Alloc(n, nil)
				plain, err2 := without.Alloc(n, nil)
				if (err == nil) != (err2 == nil) {
					fail("%v, without cheap ranges %v", err, err2)
				}
				with.took(runs)
				without.took(plain)
			case 4:
				var avoid *Emptying
				if rng.IntN(2) == 0 {
					avoid = with.Choose(Choice{MinFree: 1, Tracks: 5, Used: 1000})
				}
				before := with.Usage()
				runs := with.AllocCheap(n, nil)
				for _, r := range runs {
					var list []block.Physical
					for i := range r.N {
						list = append(list, r.At+block.Physical(i))
					}
					if set, all := with.AreCheap(list), span(0, r.N); set != all || r.At.Device() == 3 || leaving && r.At.Device() == 2 ||
						avoid != nil && avoid.Has(r.At) {
						fail("%v is handed out", r)
					}
				}
				got := with.took(runs)
				if free := with.FreeCheap(); got < n && free > 0 && avoid == nil {
					fail("%d of %d cheap blocks, and %d more are free", got, n, free)
				}
				if now := with.Usage(); now.Free != before.Free-int64(got) {
					fail("%d blocks were taken: %+v instead of %+v", got, now, before)
				}
				with.StopEmptying()
				plain, err := without.Alloc(got, nil)
				if err != nil {
					fail("%v", err)
				}
				without.took(plain)
			case 5, 6:
				for i := range both {
					if err := both[i].drop(rng, n); err != nil {
						fail("%v", err)
					}
				}
			case 7:
				if a, b := with.Reserve(int64(n)), without.Reserve(int64(n)); a != b {
					fail("promised: %v, without cheap ranges %v", a, b)
				} else if a {
					with.Unreserve(int64(n))
					without.Unreserve(int64(n))
				}
			case 8:
				a, b := with.AllocApart(n, nil), without.AllocApart(n, nil) // for good
				if length(a) != length(b) {
					fail("%d blocks of what is apart instead of %d", length(a), length(b))
				}
			}
			if step%50 == 25 { // with nothing in use there, or the two would owe differently
				leaving = !leaving
				for i := range both {
					if err := both[i].drop(rng, len(both[i].held)); err != nil {
						fail("%v", err)
					}
					both[i].SetLeaving(2, leaving)
				}
			}
			if a, b := with.Usage(), without.Usage(); a != b {
				fail("%+v instead of %+v", a, b)
			}
			if step%20 == 0 {
				if err := with.CheckFree(); err != nil {
					fail("%v", err)
				}
			}
		}
	}
}

// A device that is gone has nothing cheap, and one that takes its place has neither.
func TestCheapGone(t *testing.T) {
	s := newSpace(t, 8*block.TrackBlocks, 8*block.TrackBlocks)
	s.SetCheap(1, 0, 8*block.TrackBlocks, true)
	if n := s.FreeCheap(); n != 8*block.TrackBlocks-10 {
		t.Errorf("%d cheap blocks are free", n)
	}
	s.SetLeaving(1, true)
	if runs := s.AllocCheap(1, nil); len(runs) > 0 || s.FreeCheap() != 0 {
		t.Errorf("a device that leaves gives %v", runs)
	}
	if err := s.Gone(1); err != nil {
		t.Fatal(err)
	}
	s.SetCheap(1, 0, block.TrackBlocks, true)
	d, err := NewDevice(8*block.TrackBlocks, 0)
	if err != nil {
		t.Fatal(err)
	}
	s.Replace(1, d)
	if runs := s.AllocCheap(1, nil); len(runs) > 0 || s.FreeCheap() != 0 {
		t.Errorf("a new device gives %v", runs)
	}
	if err := s.CheckFree(); err != nil {
		t.Error(err)
	}
}

// Cheap runs are as long as there are any, and small allocations go on where the last
// one ended.
func TestCheapRunsAreLong(t *testing.T) {
	s := newSpace(t, 64*block.TrackBlocks)
	s.SetCheap(0, block.TrackBlocks, 40*block.TrackBlocks, true)
	// Of each track but the last a block in eight is free, and one whole piece.
	for track := 1; track < 40; track++ {
		for b := range block.TrackBlocks {
			if b%8 == 0 || b < 16 {
				continue
			}
			if err := s.Inc(Run{block.At(0, uint64(track*block.TrackBlocks+b)), 1}); err != nil {
				t.Fatal(err)
			}
		}
	}
	runs := s.AllocCheap(block.TrackBlocks, nil)
	if len(runs) != 1 || runs[0].At != block.At(0, 40*block.TrackBlocks) || runs[0].N != block.TrackBlocks {
		t.Errorf("a free track is there, and %v was taken", runs)
	}
	if runs = s.AllocCheap(10, nil); len(runs) != 1 || runs[0].N != 10 {
		t.Errorf("a free piece is there, and %v was taken", runs)
	}
	if again := s.AllocCheap(6, nil); len(again) != 1 || again[0].At != runs[0].At+10 {
		t.Errorf("%v after %v", again, runs)
	}
	if err := s.CheckFree(); err != nil {
		t.Error(err)
	}
}

// What cannot be a cheap range is refused loudly.
func TestCheapPieces(t *testing.T) {
	s := newSpace(t, 8*block.TrackBlocks+7)
	s.SetCheap(0, 8*block.TrackBlocks, 7, true) // all of the last one
	if n := s.FreeCheap(); n != 7 {
		t.Errorf("%d blocks are cheap", n)
	}
	for _, r := range [][2]uint64{{8, 8}, {16, 8}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%d blocks from %d on are cheap", r[1], r[0])
				}
			}()
			s.SetCheap(0, r[0], r[1], true)
		}()
	}
}

// Pages keep out of cheap ranges, and get their twins there when nothing else is left.
func TestCheapTwins(t *testing.T) {
	const tracks = 64
	for _, devices := range []int{1, 2} {
		s := New()
		defer s.Close()
		for dev := range devices {
			if err := s.AddDevice(tracks*block.TrackBlocks, 0); err != nil {
				t.Fatal(err)
			}
			s.SetCheap(dev, 0, tracks/2*block.TrackBlocks, true)
			s.SetCheap(dev, tracks/4*3*block.TrackBlocks, block.TrackBlocks, true)
		}
		alone := func(int) bool { return true }
		total, cheap := s.Usage().Free, s.FreeCheap()
		for {
			pairs := s.AllocTwins(16, alone)
			if s.FreeCheap() < cheap {
				break
			}
			if len(pairs) > 0 {
				continue
			}
			// What is left has no room at the distance of a twin.
			if _, err := s.Alloc(16, nil); err != nil {
				t.Fatal(err)
			}
			if s.FreeCheap() < cheap {
				t.Fatalf("%d devices: no twins of %d free blocks of %d", devices, s.Usage().Free, total)
			}
		}
		if u := s.Usage(); u.Free-s.FreeCheap() > u.Slop {
			t.Errorf("%d devices: twins are in cheap ranges, and %d blocks elsewhere are free", devices, u.Free-s.FreeCheap())
		}
		if err := s.CheckFree(); err != nil {
			t.Error(err)
		}
	}
}

// What is known of cheap ranges takes memory where they are, and gives it back.
func TestCheapMemory(t *testing.T) {
	const tracks = 1 << 20 // 1 TiB
	s := newSpace(t, tracks*block.TrackBlocks)
	empty := s.Memory()
	s.SetCheap(0, 5<<30/block.Size, 3<<30/block.Size, true)
	if n := s.Memory() - empty; n < 3*groupTracks*4 || n > 3*tracks/8*2 {
		t.Errorf("cheap ranges take %d bytes", n)
	}
	if n := s.FreeCheap(); n != 3<<30/block.Size {
		t.Errorf("%d blocks are cheap", n)
	}
	s.SetCheap(0, 0, tracks*block.TrackBlocks, false)
	if n := s.Memory(); n != empty || s.devs[0].cheap != nil {
		t.Errorf("%d bytes are left of %d", n, empty)
	}
}

// CheckFree finds each thing that may be wrong about cheap blocks.
func TestCheckFindsCheap(t *testing.T) {
	for name, spoil := range map[string]func(c *cheap){
		"sum":        func(c *cheap) { c.free++ },
		"tracks":     func(c *cheap) { c.all++ },
		"group":      func(c *cheap) { c.groups[0]++ },
		"free":       func(c *cheap) { c.tracks[2]-- },
		"pieces":     func(c *cheap) { c.tracks[2] &= 1<<cheapShift - 1 },
		"not found":  func(c *cheap) { c.sets[1].put(2, false) },
		"found":      func(c *cheap) { c.sets[0].put(7, true) },
		"not led to": func(c *cheap) { c.sets[2].levels[1][0] = 0 },
	} {
		s := newSpace(t, 100*block.TrackBlocks)
		s.SetCheap(0, 2*block.TrackBlocks, block.TrackBlocks, true)
		if err := s.CheckFree(); err != nil {
			t.Fatal(err)
		}
		spoil(s.devs[0].cheap)
		if s.CheckFree() == nil {
			t.Errorf("%s: nothing was found", name)
		}
	}
}
