package estimate

import "github.com/pollux-storage/pollux/internal/block"

// Extent is what a device is asked for: N blocks from block At on.
type Extent struct{ At, N int64 }

// Read reads all that a stream has, volume by volume in the order of blocks, in aligned
// requests of n blocks, and calls request for each with what the disk is asked for. Holes
// and blocks in low-latency memory are not asked for, and do not part what is contiguous
// on the disk.
func (l *Layout) Read(n int, request func([]Extent)) {
	var extents []Extent
	present := block.Logical(0)
	volume := -1
	end := func() {
		if len(extents) > 0 {
			request(extents)
		}
		extents = extents[:0]
	}
	for i, p := range l.stream.points {
		k := 0
		for _, r := range p.runs {
			for j := range r.n {
				lba := r.lba + block.Logical(j)
				if p.volume != volume || lba/block.Logical(n) != present {
					end()
					volume, present = p.volume, lba/block.Logical(n)
				}
				at := int64(l.places[i][k])
				k++
				if l.inMemory(at) {
					continue
				}
				if last := len(extents) - 1; last >= 0 && extents[last].At+extents[last].N == at {
					extents[last].N++
				} else {
					extents = append(extents, Extent{at, 1})
				}
			}
		}
	}
	end()
}

// Extents returns how many extents the volumes have: series of blocks that are neighbours
// in their volume as on the disk. Blocks in low-latency memory are none.
func (l *Layout) Extents() (n int64) {
	for i, p := range l.stream.points {
		goesOn := i > 0 && l.stream.points[i-1].volume == p.volume
		k := 0
		for _, r := range p.runs {
			if goesOn {
				last := l.stream.points[i-1].runs
				goesOn = r.lba == last[len(last)-1].lba+block.Logical(last[len(last)-1].n)
			}
			at := int64(-1) // where an extent would go on
			if goesOn {
				at = l.after(l.places[i-1])
			}
			for range r.n {
				place := int64(l.places[i][k])
				k++
				if l.inMemory(place) {
					at = -1
					continue
				}
				if place != at {
					n++
				}
				at = place + 1
			}
			goesOn = false
		}
	}
	return n
}

// after returns the address behind the last of some places, -1 if that is in low-latency
// memory.
func (l *Layout) after(places []uint32) int64 {
	last := int64(places[len(places)-1])
	if l.inMemory(last) {
		return -1
	}
	return last + 1
}

// Whole returns the layout of a stream whose blocks all were stored, one behind the other.
func (s *Stream) Whole() *Layout {
	l := &Layout{Received: s.blocks, Disk: s.blocks, stream: s}
	at := uint32(block.TrackBlocks)
	for _, p := range s.points {
		places := make([]uint32, len(p.prints))
		for i := range places {
			places[i] = at
			at++
		}
		l.places = append(l.places, places)
	}
	return l
}
