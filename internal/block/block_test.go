package block

import (
	"math/rand/v2"
	"testing"
)

func TestRangesAgainstModel(t *testing.T) {
	const n = 200
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var s Ranges
		var model [n + 1]bool
		for range 30 {
			a := Logical(rng.IntN(n))
			b := a + Logical(rng.IntN(20))
			b = min(b, n)
			s = s.Add(Range{a, b})
			for i := a; i < b; i++ {
				model[i] = true
			}
			for i := 1; i < len(s); i++ {
				if s[i].Start <= s[i-1].End {
					t.Fatalf("seed %d: %v is not disjoint", seed, s)
				}
			}
			for i := range Logical(n) {
				if s.Contains(i) != model[i] {
					t.Fatalf("seed %d: %v: block %d: %v", seed, s, i, !model[i])
				}
			}
			lo, hi := Logical(rng.IntN(n)), Logical(rng.IntN(n))
			in, any := s.Within(lo, hi), false
			for i := range Logical(n) {
				want := model[i] && i >= lo && i < hi
				any = any || want
				if in.Contains(i) != want {
					t.Fatalf("seed %d: %v within [%d,%d) is %v", seed, s, lo, hi, in)
				}
			}
			if s.Intersects(lo, hi) != any {
				t.Fatalf("seed %d: %v intersects [%d,%d): %v", seed, s, lo, hi, !any)
			}
		}
	}
}

func TestPointerRoundTrip(t *testing.T) {
	for _, p := range []Pointer{
		{}, {Phys: At(0, 1), Birth: 1}, {At(63, MaxDeviceBlocks-1), MaxCP, 0xffffffff, TwinOn(MaxTwinDevice), false}, {At(3, 7), 1 << 33, 5, TwinBehind(3), false},
		{At(63, MaxDeviceBlocks-1), MaxCP, 0xffffffff, 0, true}, {Phys: At(0, 1), Birth: 7, Shared: true},
	} {
		var b [PointerSize]byte
		p.Encode(b[:])
		if got := DecodePointer(b[:]); got != p {
			t.Errorf("%+v became %+v", p, got)
		}
	}
}

func FuzzPointer(f *testing.F) {
	f.Add(make([]byte, 16))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < PointerSize {
			return
		}
		p := DecodePointer(b)
		var out [PointerSize]byte
		p.Encode(out[:])
		if DecodePointer(out[:]) != p {
			t.Fatalf("%x: %+v", b[:16], p)
		}
	})
}

func TestTwinPlaces(t *testing.T) {
	for _, c := range []struct {
		twin Twin
		want Physical
	}{
		{0, None}, {TwinBehind(0), At(2, 7+TrackBlocks)}, {TwinBehind(10), At(2, 7+1024*TrackBlocks)},
		{TwinBehind(MaxTwinDistance - 1), At(2, 7+TrackBlocks<<(MaxTwinDistance-1))}, {TwinOn(0), At(0, 7)}, {TwinOn(63), At(63, 7)},
	} {
		p := Pointer{Phys: At(2, 7), Birth: 5, Sum: 6, Twin: c.twin}
		second := p.Second()
		if second.Phys != c.want || !second.IsHole() && (second.Birth != 5 || second.Sum != 6 || second.Twin != 0) {
			t.Errorf("twin %d: %+v instead of a block at %v", c.twin, second, c.want)
		}
	}
}
