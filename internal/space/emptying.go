package space

import (
	"math/bits"

	"github.com/pollux-storage/pollux/internal/block"
)

// Tracks tells how the free space of a pool lies.
type Tracks struct {
	All   int64 // tracks that Alloc takes blocks from
	Whole int64 // those of them without a used block
	// Parts is the number of free blocks in tracks that also have used ones.
	Parts int64
}

// scanTracks is how many tracks are looked at under one hold of the lock.
const scanTracks = 1 << 16

// eachTrack calls fn for every track with its number of allocatable blocks and
// of free ones, device by device, but for those that Alloc leaves alone. Others may
// allocate and free meanwhile.
func (s *Space) eachTrack(fn func(dev, track, size, free int)) {
	for dev := 0; ; dev++ {
		for from := 0; ; from += scanTracks {
			s.mu.Lock()
			if dev >= len(s.devs) {
				s.mu.Unlock()
				return
			}
			d := s.devs[dev]
			n := len(d.trackFree)
			if d.closed() {
				n = 0
			}
			for t := from; t < min(n, from+scanTracks); t++ {
				lo, hi := d.trackRange(t)
				if hi > lo {
					fn(dev, t, int(hi-lo), int(d.trackFree[t]))
				}
			}
			s.mu.Unlock()
			if from+scanTracks >= n {
				break
			}
		}
	}
}

// Tracks returns how the free space lies.
func (s *Space) Tracks() Tracks {
	var t Tracks
	s.eachTrack(func(_, _, size, free int) {
		t.All++
		if free == size {
			t.Whole++
		} else {
			t.Parts += int64(free)
		}
	})
	return t
}

// Choice says which tracks are worth emptying.
type Choice struct {
	MinFree int   // blocks of a track that must be free
	Tracks  int64 // at most so many tracks
	Used    int64 // with at most so many used blocks in all
}

// Emptying is a set of tracks that somebody empties: nothing is allocated from
// them while any other has a free block. It is not changed after Choose.
type Emptying struct {
	Tracks     int64
	Used, Free int64 // blocks in them when they were chosen

	devs [][]uint64 // a bit a track
}

// Has reports whether a block is in one of the tracks.
func (e *Emptying) Has(p block.Physical) bool {
	return p.Device() < len(e.devs) && bit(e.devs[p.Device()], int(p.Block()/block.TrackBlocks))
}

func bit(set []uint64, i int) bool { return i/64 < len(set) && set[i/64]&(1<<(i%64)) != 0 }

// Choose returns the tracks that c allows, those with the most free blocks
// first, and keeps allocations out of them until StopEmptying. A track with a
// block that several refer to is not among them: whoever moves blocks one
// reference at a time would make copies of it.
func (s *Space) Choose(c Choice) *Emptying {
	var have [block.TrackBlocks]int64 // tracks by free blocks
	s.eachTrack(func(_, _, size, free int) {
		if free >= c.MinFree && free < size {
			have[free]++
		}
	})
	// How many of each kind are taken.
	tracks, used := c.Tracks, c.Used
	for free := block.TrackBlocks - 1; free >= 0; free-- {
		n := min(have[free], tracks, used/int64(block.TrackBlocks-free))
		have[free] = n
		tracks -= n
		used -= n * int64(block.TrackBlocks-free)
	}
	e := &Emptying{}
	s.eachTrack(func(dev, t, size, free int) {
		if free == size || have[free] == 0 {
			return
		}
		have[free]--
		for dev >= len(e.devs) {
			e.devs = append(e.devs, make([]uint64, (len(s.devs[len(e.devs)].trackFree)+63)/64))
		}
		e.devs[dev][t/64] |= 1 << (t % 64)
		e.Tracks++
		e.Free += int64(free)
		e.Used += int64(size - free)
	})
	s.leaveShared(e)
	s.mu.Lock()
	defer s.mu.Unlock()
	for dev := range e.devs {
		s.devs[dev].avoid = e.devs[dev]
	}
	return e
}

// leaveShared takes tracks out that have a block with several references.
func (s *Space) leaveShared(e *Emptying) {
	var counts [block.TrackBlocks]byte
	for dev, set := range e.devs {
		for w := range set {
			for rest := set[w]; rest != 0; rest &= rest - 1 {
				i := bits.TrailingZeros64(rest)
				clear(counts[:])
				s.Counts(dev, uint64(w*64+i)*block.TrackBlocks, counts[:])
				used, shared := int64(0), false
				for _, c := range counts {
					shared = shared || c > 1
					used += int64(min(c, 1))
				}
				if shared {
					set[w] &^= 1 << i
					e.Tracks--
					e.Used -= used
					e.Free -= block.TrackBlocks - used
				}
			}
		}
	}
}

// Emptied returns how many of the tracks have no used block now.
func (s *Space) Emptied(e *Emptying) (n int64) {
	s.eachTrack(func(dev, t, size, free int) {
		if free == size && dev < len(e.devs) && bit(e.devs[dev], t) {
			n++
		}
	})
	return n
}

// StopEmptying lets blocks be allocated from all tracks again.
func (s *Space) StopEmptying() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopEmptyingLocked()
}

func (s *Space) stopEmptyingLocked() {
	for _, d := range s.devs {
		if d.avoid != nil {
			d.avoid, d.want = nil, block.TrackBlocks
		}
	}
}
