package estimate

import (
	"fmt"
	"slices"
	"sort"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/dedup"
)

// PointBlocks is how many received blocks a consistency point has at most: 64 MiB.
const PointBlocks = 64 << 20 / block.Size

// Stream is what volumes receive, one volume after the other, each in the order of its
// blocks. The zero Stream is empty and ready for use.
type Stream struct {
	points  []point
	blocks  int64 // that are not zero
	zero    int64
	volumes int
	runs    int64 // of all points

	open point // the last one, while it grows
}

// point is what a consistency point has of a volume, zero blocks apart.
type point struct {
	volume int
	first  int64 // number of its first block in the stream
	prints []dedup.Fingerprint
	runs   []run
}

// run is a series of blocks that are neighbours in their volume.
type run struct {
	lba block.Logical
	n   int
}

// pointOverhead is what a point and a run take beside the fingerprints of blocks, or more.
const pointOverhead, runBytes = 128, 16

// Volume begins another volume.
func (s *Stream) Volume() {
	s.Flush()
	s.open.volume = s.volumes
	s.volumes++
}

// Add adds a block of the present volume that is behind all that were added.
func (s *Stream) Add(lba block.Logical, f dedup.Fingerprint) {
	p := &s.open
	if n := len(p.runs); n > 0 && p.runs[n-1].lba+block.Logical(p.runs[n-1].n) == lba {
		p.runs[n-1].n++
	} else {
		p.runs = append(p.runs, run{lba, 1})
		s.runs++
	}
	p.prints = append(p.prints, f)
	s.blocks++
	if len(p.prints) == PointBlocks {
		s.Flush()
	}
}

// Zero says that there are n blocks of zeroes.
func (s *Stream) Zero(n int64) { s.zero += n }

// Flush ends the present point. What was added before it can be simulated.
func (s *Stream) Flush() {
	p := &s.open
	if len(p.prints) > 0 {
		s.points = append(s.points, point{p.volume, p.first, slices.Clone(p.prints), slices.Clone(p.runs)})
	}
	p.first, p.prints, p.runs = s.blocks, p.prints[:0], p.runs[:0]
}

// Blocks returns how many blocks were added, and how many were zero.
func (s *Stream) Blocks() (blocks, zero int64) { return s.blocks, s.zero }

// Where returns which block of which volume one of the stream is.
func (s *Stream) Where(number int64) (volume int, lba block.Logical) {
	i := sort.Search(len(s.points), func(i int) bool { return s.points[i].first > number }) - 1
	p := &s.points[i]
	k := int(number - p.first)
	for _, r := range p.runs {
		if k < r.n {
			return p.volume, r.lba + block.Logical(k)
		}
		k -= r.n
	}
	panic(fmt.Sprintf("estimate: block %d of a stream of %d", number, s.blocks))
}

// Distinct returns how many different contents there are: what a store keeps that
// shares each duplicate.
func (s *Stream) Distinct() int64 {
	all := make([]dedup.Fingerprint, 0, s.blocks)
	for _, p := range s.points {
		all = append(all, p.prints...)
	}
	slices.Sort(all)
	return int64(len(slices.Compact(all)))
}

// memory returns how many bytes the stream and one simulation of it take at most.
func (s *Stream) memory() int64 {
	const (
		print     = 8
		simulated = print + 1 // as in track
	)
	return int64(len(s.points))*pointOverhead + s.runs*runBytes + PointBlocks*2*(print+runBytes) +
		s.blocks*(print+simulated) + indexBytes(s.blocks)
}
