package space

import (
	"math/bits"

	"github.com/pollux-storage/pollux/internal/block"
)

// Pair is a range of consecutive physical blocks on one track, and where the twin of
// each of them lies.
type Pair struct {
	Run
	Twin block.Twin
}

// Second returns the twins.
func (p Pair) Second() Run { return Run{p.Twin.Of(p.At), p.N} }

const (
	// twinTracks is how many tracks are looked at, to find one for blocks with twins:
	// some 30 µs.
	twinTracks = 1 << 15
	// twinEnough is how many blocks a track and that of the twins have free in common
	// to be taken without a look at others, if one of them has blocks in use: pages of
	// metadata shall leave whole tracks to data.
	twinEnough = 16
	// twinDistances is how many distances are tried on a device: the largest power of
	// two that half of its tracks have room for, and smaller ones.
	twinDistances = 3
)

// twinPlace is where blocks with twins were allocated last on a device.
type twinPlace struct {
	track int
	twin  block.Twin // 0 for nowhere
}

// AllocTwins allocates up to n blocks, and a twin for each: on another device, or else
// far away on the same. It takes only devices for which alone returns true, and only what
// nobody was promised; where that is not to be had it allocates fewer, or none. Cheap
// blocks are among them when of others there are no more than what is kept back.
func (s *Space) AllocTwins(n int, alone func(dev int) bool) (pairs []Pair) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var devs []int
	for i, d := range s.devs {
		if !d.closed() && alone(i) {
			devs = append(devs, i)
		}
	}
	n = int(max(0, min(int64(n), (s.free-s.reserved-s.slop-s.owedLocked())/2)))
	pairs, n = s.allocTwinsLocked(n, devs, false, nil)
	if cheap := s.freeCheapLocked(); n > 0 && cheap > 0 && s.free-cheap <= s.slop {
		pairs, _ = s.allocTwinsLocked(n, devs, true, pairs)
	}
	return pairs
}

// allocTwinsLocked allocates up to n blocks with twins on some devices, cheap ones or
// none of them, and returns how many it did not find.
func (s *Space) allocTwinsLocked(n int, devs []int, cheap bool, pairs []Pair) (_ []Pair, left int) {
	for misses := 0; n > 0 && misses < len(devs); {
		dev := devs[s.nextTwin%len(devs)]
		s.nextTwin++
		at, both := s.twinPlaceLocked(dev, devs, cheap)
		if at.twin == 0 {
			misses++
			continue
		}
		got := 0
		got, pairs = s.takeTwinsLocked(dev, at, both, n, pairs)
		n, misses = n-got, 0
	}
	return pairs, n
}

// twinPlaceLocked returns a track of a device, of which it returns the free blocks whose
// twins are free, too.
func (s *Space) twinPlaceLocked(dev int, devs []int, cheap bool) (at twinPlace, free blocks) {
	d := s.devs[dev]
	if free = s.bothFreeLocked(dev, d.twins, cheap); free != (blocks{}) {
		return d.twins, free
	}
	var elsewhere, behind []block.Twin
	for _, other := range devs {
		if other != dev {
			elsewhere = append(elsewhere, block.TwinOn(other))
		}
	}
	half := (len(d.trackFree) - int(d.first/block.TrackBlocks)) / 2
	for i, n := 0, bits.Len(uint(half))-1; i < twinDistances && n >= 0; i, n = i+1, n-1 {
		behind = append(behind, block.TwinBehind(n))
	}
	if at, free = s.seekTwinsLocked(dev, elsewhere, cheap); at.twin == 0 {
		at, free = s.seekTwinsLocked(dev, behind, cheap)
	}
	return at, free
}

// seekTwinsLocked looks for a track whose twins lie in one of some places.
func (s *Space) seekTwinsLocked(dev int, choice []block.Twin, cheap bool) (best twinPlace, free blocks) {
	if len(choice) == 0 {
		return best, free
	}
	d := s.devs[dev]
	most, whole := 0, twinPlace{}
	for range min(twinTracks, len(d.trackFree)) {
		if d.twins.track++; d.twins.track >= len(d.trackFree) {
			d.twins.track = 0
		}
		if int(d.trackFree[d.twins.track]) <= most || !cheap && d.dear(d.twins.track) <= most {
			continue
		}
		for _, twin := range choice {
			at := twinPlace{d.twins.track, twin}
			both := s.bothFreeLocked(dev, at, cheap)
			n := both.count()
			if n == block.TrackBlocks {
				if whole.twin == 0 {
					whole = at
				}
				continue
			}
			if n > most {
				most, best, free = n, at, both
			}
			if most >= twinEnough {
				d.twins = best
				return best, free
			}
		}
	}
	if whole.twin != 0 {
		d.twins = whole
		return whole, s.bothFreeLocked(dev, whole, cheap)
	}
	d.twins.twin = 0
	return best, free
}

// bothFreeLocked returns the free blocks of a track whose twins are free, and without
// cheap ones if these are not wanted. Tracks that are being emptied have none.
func (s *Space) bothFreeLocked(dev int, at twinPlace, cheap bool) (free blocks) {
	other, t := s.twinTrackLocked(dev, at)
	if d := s.devs[dev]; other != nil && !other.leaving && t < len(other.trackFree) && !bit(d.avoid, at.track) && !bit(other.avoid, t) {
		var not, notTwin blocks
		if !cheap {
			not, notTwin = d.cheapOf(at.track), other.cheapOf(t)
		}
		for w, used := range d.counts.track(at.track) {
			free[w] = ^(used | other.counts.track(t)[w] | not[w] | notTwin[w])
		}
	}
	return free
}

// twinTrackLocked returns where the twins of a track's blocks lie; nil for nowhere.
func (s *Space) twinTrackLocked(dev int, at twinPlace) (d *Device, track int) {
	p := at.twin.Of(block.At(dev, uint64(at.track)*block.TrackBlocks))
	if at.twin == 0 || p.Device() >= len(s.devs) {
		return nil, 0
	}
	return s.devs[p.Device()], int(p.Block() / block.TrackBlocks)
}

// takeTwinsLocked takes up to n of the blocks that twinPlaceLocked has found.
func (s *Space) takeTwinsLocked(dev int, at twinPlace, free blocks, n int, pairs []Pair) (int, []Pair) {
	d := s.devs[dev]
	other, t := s.twinTrackLocked(dev, at)
	got, next := 0, -1 // next is the block after the last one taken
	for w := range free {
		for ; got < n && free[w] != 0; got++ {
			i := bits.TrailingZeros64(free[w])
			free[w] &^= 1 << i
			d.counts.track(at.track)[w] |= 1 << i
			other.counts.track(t)[w] |= 1 << i
			if b := w*64 + i; b == next {
				pairs[len(pairs)-1].N++
			} else {
				pairs = append(pairs, Pair{Run{block.At(dev, uint64(at.track*block.TrackBlocks+b)), 1}, at.twin})
			}
			next = w*64 + i + 1
		}
	}
	d.gained(at.track, -got)
	other.gained(t, -got)
	s.free -= 2 * int64(got)
	return got, pairs
}

func (m *blocks) count() (n int) {
	for _, w := range m {
		n += bits.OnesCount64(w)
	}
	return n
}
