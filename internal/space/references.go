package space

import "github.com/pollux-storage/pollux/internal/block"

// walkTracks is how many tracks are looked at under the lock at once: some tens of
// microseconds where all of them share blocks.
const walkTracks = 64

// References returns how many blocks have how many references, up to MaxCount. Nobody
// is kept waiting while it looks at everything, so what changes meanwhile may be counted
// as it was or as it is.
func (s *Space) References() (blocks [MaxCount + 1]int64) {
	for dev := 0; ; dev++ {
		for t := 0; ; t += walkTracks {
			devs, more := s.countReferences(dev, t, &blocks)
			if dev >= devs {
				return blocks
			}
			if !more {
				break
			}
		}
	}
}

// countReferences counts those of walkTracks tracks of a device, from one on. It
// returns how many devices there are, and whether this one has tracks after these.
func (s *Space) countReferences(dev, from int, blocks *[MaxCount + 1]int64) (devs int, more bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if dev >= len(s.devs) {
		return len(s.devs), false
	}
	d := s.devs[dev]
	end := min(from+walkTracks, len(d.trackFree))
	for t := from; t < end; t++ {
		d.countReferences(t, blocks)
	}
	return len(s.devs), end < len(d.trackFree)
}

// countReferences counts those of a track's blocks.
func (d *Device) countReferences(t int, blocks *[MaxCount + 1]int64) {
	lo, hi := d.trackRange(t)
	if d.counts.refs[t] == 0 {
		used := int64(hi-lo) - int64(d.trackFree[t])
		blocks[1] += used
		blocks[0] += int64(d.trackFree[t])
		return
	}
	var of [block.TrackBlocks]byte
	d.counts.store(t, &of)
	first := uint64(t) * block.TrackBlocks
	for _, n := range of[lo-first : hi-first] {
		blocks[n]++
	}
}
