package space

import (
	"fmt"
	"math/bits"

	"github.com/pollux-storage/pollux/internal/block"
)

// Counts copies the reference counts of len(dst) blocks of a device, from
// block first on, into dst. Blocks that are never allocated have none.
func (s *Space) Counts(dev int, first uint64, dst []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.devs[dev]
	var page [block.TrackBlocks]byte
	for len(dst) > 0 && first < d.blocks {
		t, off := int(first/block.TrackBlocks), int(first%block.TrackBlocks)
		d.counts.store(t, &page)
		lo, hi := d.trackRange(t)
		clear(page[:int(lo)-t*block.TrackBlocks])
		n := copy(dst, page[off:min(block.TrackBlocks, int(hi)-t*block.TrackBlocks)])
		first, dst = first+uint64(n), dst[n:]
	}
	clear(dst)
}

// CheckFree proves the totals of free blocks against the counts.
func (s *Space) CheckFree() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var free int64
	for i, d := range s.devs {
		mine := int64(0)
		for t := range d.trackFree {
			n := block.TrackBlocks
			for _, w := range d.counts.track(t) {
				n -= bits.OnesCount64(w)
			}
			if n != int(d.trackFree[t]) || d.dear(t) > int(d.groups[t/groupTracks].most) {
				return &block.CorruptError{What: "free count", Where: fmt.Sprintf("track %d of device %d", t, i),
					Why: fmt.Sprintf("%d, and at most %d in its group, instead of %d", d.trackFree[t], d.groups[t/groupTracks].most, n)}
			}
			mine += int64(n)
		}
		if mine != d.free {
			return &block.CorruptError{What: "free count", Where: fmt.Sprintf("device %d", i), Why: fmt.Sprintf("%d instead of %d", d.free, mine)}
		}
		if why := d.cheap.check(d); why != "" {
			return &block.CorruptError{What: "free count", Where: fmt.Sprintf("device %d", i), Why: why}
		}
		free += d.allocatable()
	}
	if free != s.free {
		return &block.CorruptError{What: "free count", Where: "the pool", Why: fmt.Sprintf("%d instead of %d", s.free, free)}
	}
	return nil
}
