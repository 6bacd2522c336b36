package estimate

import (
	"errors"
	"fmt"
	"math"
	"reflect"
	"runtime"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/dedup"
)

// print spreads small numbers over the index.
func print(n int) dedup.Fingerprint { return dedup.Fingerprint(n+1) * 0x9e3779b97f4a7c15 }

// streamOf makes a stream of volumes with a block for each letter; a dot is a block of
// zeroes, and a digit so many hundreds of blocks that are nowhere else.
func streamOf(volumes ...string) *Stream {
	s := new(Stream)
	other := 1000
	for _, v := range volumes {
		s.Volume()
		lba := block.Logical(0)
		for _, r := range v {
			switch {
			case r == '.':
				s.Zero(1)
				lba++
			case '0' <= r && r <= '9':
				for range 100 * int(r-'0') {
					s.Add(lba, print(other))
					lba++
					other++
				}
			default:
				s.Add(lba, print(int(r)))
				lba++
			}
		}
	}
	s.Flush()
	return s
}

func TestSimulate(t *testing.T) {
	const track = "2abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" // but for four blocks
	for _, c := range []struct {
		what           string
		volumes        []string
		policy         Policy
		saved, matches int64
		disk, memory   int64
	}{
		{"a whole volume", []string{"abcdefgh", "abcdefgh"}, Policy{Run: 4}, 8, 1, 8, 0},
		{"long enough", []string{"abcdefgh", "xcdefy"}, Policy{Run: 4}, 4, 1, 10, 0},
		{"too short", []string{"abcdefgh", "xcdey"}, Policy{Run: 4}, 0, 0, 13, 0},
		{"each duplicate", []string{"abcdefgh", "xcyae"}, Policy{Run: 1}, 3, 3, 10, 0},
		{"each duplicate, side by side too", []string{"aabab"}, Policy{Run: 1}, 3, 2, 2, 0},
		{"zeroes part nothing", []string{"abcd", ".ab..cd."}, Policy{Run: 4}, 4, 1, 4, 0},
		{"nor those in between what is stored", []string{"ab..cd", "abcd"}, Policy{Run: 4}, 4, 1, 4, 0},
		{"the end of a track does", []string{track + "αβγδεζηθ", "αβγδεζηθ"}, Policy{Run: 8}, 0, 0, 268, 0},
		{"of both sides there is enough", []string{track + "αβγδεζηθ", "αβγδεζηθ"}, Policy{Run: 4}, 8, 2, 260, 0},
		{"what is in a point is a target", []string{"abcd3abcd"}, Policy{Run: 4}, 4, 1, 304, 0},

		{"memory at the first", []string{"abcd", "xbyd", "zb"}, Policy{Run: 4, Threshold: 1}, 3, 0, 5, 2},
		{"memory at the second, for both copies", []string{"abcd", "xbyd", "zb"}, Policy{Run: 4, Threshold: 2}, 2, 0, 7, 1},
		{"memory at the third, which is none", []string{"abcd", "xbyd", "zb"}, Policy{Run: 4, Threshold: 3}, 0, 0, 10, 0},
		{"long matches need no memory", []string{"abcd", "abcd"}, Policy{Run: 4, Threshold: 1}, 4, 1, 4, 0},
		{"a block in memory parts no series", []string{"c", "xc", "abcdefghi", "abcdefghi"}, Policy{Run: 8, Threshold: 1}, 11, 1, 9, 1},
		{"but what was stored before it moved", []string{"abcdefgh", "xc", "abcdefgh"}, Policy{Run: 5, Threshold: 1}, 9, 1, 6, 3},

		{"low-latency memory finds short matches by one block", []string{"abcdefgh", "xabcy", "zb"}, Policy{Run: 4, Threshold: 1, Every: 8}, 4, 0, 8, 3},
		{"and not those without", []string{"abcdefgh", "xbcy", "zb"}, Policy{Run: 4, Threshold: 1, Every: 8}, 0, 0, 14, 0},
		{"an index without the block", []string{"abcdefgh", "b"}, Policy{Run: 1, Every: 8}, 0, 0, 9, 0},
		{"and with it", []string{"abcdefgh", "a"}, Policy{Run: 1, Every: 8}, 1, 1, 8, 0},
	} {
		s := streamOf(c.volumes...)
		l, err := s.Simulate(c.policy, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if l.Saved() != c.saved || l.Matches != c.matches || l.Disk != c.disk || l.Memory != c.memory {
			t.Errorf("%s: %d saved in %d matches, %d on the disk and %d in memory instead of %d, %d, %d and %d",
				c.what, l.Saved(), l.Matches, l.Disk, l.Memory, c.saved, c.matches, c.disk, c.memory)
		}
	}
}

// A series goes on over the end of a track, and of a point, where it is long enough.
func TestSimulateCuts(t *testing.T) {
	const n = PointBlocks + 1000
	s := new(Stream)
	for volume := range 2 {
		s.Volume()
		for i := range 10 * volume {
			s.Add(block.Logical(i), print(1<<20+i))
		}
		for i := range n {
			s.Add(block.Logical(10*volume+i), print(i))
		}
	}
	s.Flush()
	// The second volume is ten blocks off: its first point ends ten blocks before a track
	// does, and only what the point before has shared makes these ten enough.
	for _, run := range []int{1, 8, 32, 256} {
		want := int64(n)
		if run == 256 {
			// Neither is the last track whole nor either part of the one that is cut.
			want = n/256*256 - 256
		}
		l, err := s.Simulate(Policy{Run: run}, Options{Places: true})
		if err != nil {
			t.Fatal(err)
		}
		if l.Saved() != want {
			t.Errorf("THN %d saves %d blocks of %d", run, l.Saved(), want)
		}
		// The first volume, the ten blocks, and the rest.
		if n := l.Extents(); run < 256 && n != 3 {
			t.Errorf("THN %d makes %d extents", run, n)
		}
	}
}

// Blocks whose fingerprints alone agree are not shared.
func TestSimulateCompares(t *testing.T) {
	s := streamOf("abcdefgh", "abcdefghc")
	for _, c := range []struct {
		policy           Policy
		saved, different int64
	}{
		{Policy{Run: 4}, 0, 1},               // two blocks in front of it are too few
		{Policy{Run: 1}, 8, 2},               // all but that one; it is looked up again
		{Policy{Run: 4, Threshold: 1}, 9, 1}, // one by one, and the last c has both as equals
	} {
		l, err := s.Simulate(c.policy, Options{Same: func(received, stored int64) (bool, error) {
			return received%8 != 2 || stored != 2, nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		if l.Saved() != c.saved || l.Different != c.different {
			t.Errorf("%+v: %d saved, %d different", c.policy, l.Saved(), l.Different)
		}
	}
	failed := errors.New("failed")
	if _, err := s.Simulate(Policy{Run: 4}, Options{Same: func(int64, int64) (bool, error) { return false, failed }}); !errors.Is(err, failed) {
		t.Errorf("a comparison that fails: %v", err)
	}
	if _, err := s.Simulate(Policy{Run: 4}, Options{Step: func() error { return failed }}); !errors.Is(err, failed) {
		t.Errorf("a simulation that is ended: %v", err)
	}
	for _, p := range []Policy{{}, {Run: 257}, {Run: 4, Threshold: -1}, {Run: 4, Threshold: 255}} {
		if _, err := s.Simulate(p, Options{}); err == nil {
			t.Errorf("%+v is a policy", p)
		}
	}
}

func TestRead(t *testing.T) {
	read := func(l *Layout) string {
		var requests [][]Extent
		l.Read(4, func(e []Extent) { requests = append(requests, append([]Extent{}, e...)) })
		return fmt.Sprint(requests)
	}
	s := streamOf("abcdefgh", "xcdef.yc....z")
	for _, c := range []struct {
		policy  Policy
		want    string
		extents int64
	}{
		// x is written to 264, y, c and z behind it; "cdef" is at 258.
		{Policy{Run: 4}, "[[{256 4}] [{260 4}] [{264 1} {258 3}] [{261 1} {265 2}] [{267 1}]]", 5},
		{Policy{Run: 1}, "[[{256 4}] [{260 4}] [{264 1} {258 3}] [{261 1} {265 1} {258 1}] [{266 1}]]", 6},
		// Now c is in memory, wherever it was.
		{Policy{Run: 4, Threshold: 1}, "[[{256 2} {259 1}] [{260 4}] [{264 1} {259 2}] [{261 1} {265 1}] [{266 1}]]", 6},
	} {
		l, err := s.Simulate(c.policy, Options{Places: true})
		if err != nil {
			t.Fatal(err)
		}
		if got := read(l); got != c.want {
			t.Errorf("%+v:\n%s instead of\n%s", c.policy, got, c.want)
		}
		if n := l.Extents(); n != c.extents {
			t.Errorf("%+v: %d extents instead of %d", c.policy, n, c.extents)
		}
	}
	if got, want := read(s.Whole()), "[[{256 4}] [{260 4}] [{264 4}] [{268 3}] [{271 1}]]"; got != want {
		t.Errorf("in one piece %s instead of %s", got, want)
	}
	if n := s.Whole().Extents(); n != 4 {
		t.Errorf("in one piece %d extents", n)
	}
}

func TestStream(t *testing.T) {
	s := streamOf("ab.c", "", "..a")
	if n, zero := s.Blocks(); n != 4 || zero != 3 || s.Distinct() != 3 {
		t.Errorf("%d blocks, %d zero, %d distinct", n, zero, s.Distinct())
	}
	type place struct {
		volume int
		lba    block.Logical
	}
	var got []place
	for i := range int64(4) {
		volume, lba := s.Where(i)
		got = append(got, place{volume, lba})
	}
	if want := []place{{0, 0}, {0, 1}, {0, 3}, {2, 2}}; !reflect.DeepEqual(got, want) {
		t.Errorf("blocks are at %v instead of %v", got, want)
	}
}

// What is reckoned for a stream and a simulation is enough, and not far too much.
func TestStreamMemory(t *testing.T) {
	for _, scattered := range []bool{false, true} {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		s := new(Stream)
		s.Volume()
		for i := range 40 * PointBlocks {
			lba := block.Logical(i)
			if scattered {
				lba *= 2
			}
			s.Add(lba, print(i))
		}
		s.Flush()
		l, err := s.Simulate(Policy{Run: 8, Threshold: 2}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		took := int64(after.HeapAlloc-before.HeapAlloc) + indexBytes(s.blocks) // which is not on the heap
		if reckoned := s.memory(); took > reckoned || took < reckoned*3/4 {
			t.Errorf("%d bytes are reckoned, and %d taken (scattered: %t)", reckoned, took, scattered)
		}
		runtime.KeepAlive(l)
	}
}

// A comparison that fails, whichever it is, ends the simulation with its error.
func TestSimulateFails(t *testing.T) {
	s := streamOf("abcdefghijkl", "abcdefgh", "kefgh", "xcdy", "zcw", "vabcdu", "c", "dxc")
	failed := errors.New("failed")
	for _, p := range []Policy{{Run: 1}, {Run: 4}, {Run: 4, Threshold: 1}, {Run: 4, Threshold: 2}, {Run: 4, Threshold: 1, Every: 8}} {
		calls := 0
		if _, err := s.Simulate(p, Options{Same: func(int64, int64) (bool, error) { calls++; return true, nil }}); err != nil {
			t.Fatal(err)
		}
		for n := range calls {
			left := n
			_, err := s.Simulate(p, Options{Same: func(int64, int64) (bool, error) {
				if left--; left < 0 {
					return false, failed
				}
				return true, nil
			}})
			if !errors.Is(err, failed) {
				t.Errorf("%+v: comparison %d of %d: %v", p, n, calls, err)
			}
		}
		if calls < 8 {
			t.Errorf("%+v: %d comparisons", p, calls)
		}
	}
	if _, err := (&Stream{blocks: math.MaxUint32}).Simulate(Policy{Run: 4}, Options{}); err == nil {
		t.Error("a stream with more blocks than there are addresses")
	}
}

// An extent goes on from one point to the next, unless what is in between is in
// low-latency memory.
func TestExtentsOverPoints(t *testing.T) {
	for _, c := range []struct {
		first, second string // points of the second volume
		policy        Policy
		want          int64 // and of the first one's extents, which is 1 or 3
	}{
		{"abcd", "efgh", Policy{Run: 4}, 2},
		{"abcx", "efgh", Policy{Run: 4}, 3},
		{"xyzc", "pqrs", Policy{Run: 4, Threshold: 1}, 2 + 1 + 1}, // c has moved: it parts both volumes
	} {
		s := streamOf("abcdefgh")
		s.Volume()
		lba := block.Logical(0)
		for _, part := range []string{c.first, c.second} {
			for _, r := range part {
				s.Add(lba, print(int(r)))
				lba++
			}
			s.Flush()
		}
		l, err := s.Simulate(c.policy, Options{Places: true})
		if err != nil {
			t.Fatal(err)
		}
		if n := l.Extents(); n != c.want {
			t.Errorf("%s and %s: %d extents instead of %d", c.first, c.second, n, c.want)
		}
	}
}
