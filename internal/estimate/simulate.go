package estimate

import (
	"fmt"
	"math"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/dedup"
)

// Policy says what is shared.
type Policy struct {
	// Run is THN. With 1 each duplicate is shared.
	Run int
	// Threshold is the number of references beyond the first at which a block of a match
	// that is too short is moved to low-latency memory, and shared from there; 0 for no
	// such memory.
	Threshold int
	// Every makes the index keep one block of so many of a track; 0 and 1 for all.
	Every int
}

// window is how many blocks of a series are matched at a time.
const window = 256

// Options are what a simulation may be given.
type Options struct {
	// Same compares the contents of two blocks of the stream, by their numbers in it;
	// fingerprints are believed where it is nil.
	Same func(received, stored int64) (bool, error)
	// Places keeps where each block went, for Layout.Read.
	Places bool
	// Step is called after each point, if it is not nil, and ends the simulation with an
	// error.
	Step func() error
}

// Layout is how a policy has stored a stream.
type Layout struct {
	Policy Policy
	// Received is how many blocks were received, zero ones apart.
	Received int64
	// Disk and Memory are how many are stored on the disk, and in low-latency memory.
	Disk, Memory int64
	// Matches is how many series were shared, Different how often only fingerprints
	// agreed.
	Matches, Different int64

	stream *Stream
	places [][]uint32 // of each point, the addresses of its blocks
	tracks []*track
}

// Saved is how many blocks are not stored.
func (l *Layout) Saved() int64 { return l.Received - l.Disk - l.Memory }

// track is what is known of the blocks of a track.
type track struct {
	prints [block.TrackBlocks]dedup.Fingerprint
	// sighted counts the short matches of a block, up to inMemory, which says that it
	// has moved.
	sighted [block.TrackBlocks]uint8
}

const inMemory = math.MaxUint8

// MaxThreshold is the largest Policy.Threshold.
const MaxThreshold = inMemory - 1

// inMemory tells whether what was at an address of the disk has moved.
func (l *Layout) inMemory(at int64) bool {
	return len(l.tracks) > 0 && l.tracks[at/block.TrackBlocks].sighted[at%block.TrackBlocks] == inMemory
}

// simulation is a Layout in the making, and what is stored as a Matcher sees it.
type simulation struct {
	Options
	*Layout
	index   *dedup.Index
	matcher dedup.Matcher

	end     uint64  // address of the next block that is written
	sources []int64 // of each stored block, from address block.TrackBlocks on, its number in the stream; with Same only

	// Of the present point: its first block's number in the stream, where each block went,
	// and the series of those that are not in low-latency memory, with their places in it.
	first  int64
	place  []uint32
	prints []dedup.Fingerprint
	slots  []int32

	// Only with an index that is thin: of blocks that no match has, where shorter ones
	// have them, and what is in low-latency memory, of which an index keeps all.
	short []block.Physical
	moved map[dedup.Fingerprint]block.Physical

	// The last blocks of the volume are mapped to tail addresses that end before tailEnd.
	tailEnd uint64
	tail    int

	matches    []dedup.Match
	candidates []block.Physical
}

// Simulate stores the stream by a policy.
func (s *Stream) Simulate(p Policy, o Options) (*Layout, error) {
	if p.Run < 1 || p.Run > dedup.MaxRun || p.Threshold < 0 || p.Threshold > MaxThreshold {
		return nil, fmt.Errorf("a policy of THN %d and threshold %d makes no sense", p.Run, p.Threshold)
	}
	if s.blocks >= math.MaxUint32-2*block.TrackBlocks {
		return nil, fmt.Errorf("%d blocks are too many to simulate", s.blocks)
	}
	index, err := dedup.NewIndex(indexBytes(s.blocks))
	if err != nil {
		return nil, err
	}
	defer index.Close()
	index.Thin(p.Every)
	// Address 0 is no block; the first track begins behind it.
	m := &simulation{
		Options: o, index: index, matcher: dedup.Matcher{Run: p.Run}, end: block.TrackBlocks,
		Layout: &Layout{Policy: p, Received: s.blocks, stream: s, tracks: []*track{nil}},
	}
	if p.Every > 1 && p.Threshold > 0 {
		m.moved = map[dedup.Fingerprint]block.Physical{}
	}
	for i := range s.points {
		if err := m.point(&s.points[i], i > 0 && s.points[i-1].volume == s.points[i].volume); err != nil {
			return nil, err
		}
		if o.Step != nil {
			if err := o.Step(); err != nil {
				return nil, err
			}
		}
	}
	return m.Layout, nil
}

// indexBytes is the size of an index with room for n blocks.
func indexBytes(n int64) int64 {
	size := int64(dedup.MinIndex)
	for size/8/16*15 <= n {
		size *= 2
	}
	return size
}

// Candidates implements dedup.Stored.
func (m *simulation) Candidates(f dedup.Fingerprint, to []block.Physical) []block.Physical {
	return m.index.Candidates(f, to)
}

// Fingerprint implements dedup.Stored.
func (m *simulation) Fingerprint(p block.Physical) dedup.Fingerprint {
	return m.tracks[p/block.TrackBlocks].prints[p%block.TrackBlocks]
}

// point stores what a point has received; goesOn says that the one before was of the same
// volume.
func (m *simulation) point(p *point, goesOn bool) error {
	if !goesOn {
		m.tail = 0
		m.matches = m.matches[:0]
	}
	m.first, m.place = p.first, make([]uint32, len(p.prints))
	if err := m.takeFromMemory(p); err != nil {
		return err
	}
	s := dedup.Series{Prints: m.prints, Before: m.before}
	size := window
	if m.Policy.Run == 1 {
		// Of a window only what is before it can be a target.
		size = 1
	}
	for lo := 0; lo < len(m.prints); {
		hi := min(lo+size, len(m.prints))
		// Of earlier matches the last two decide which ones can follow.
		m.matches = slices.Delete(m.matches, 0, max(0, len(m.matches)-2))
		known := len(m.matches)
		m.matches = m.matcher.Space(m.matcher.Matches(s, lo, hi, m, m.matches), known)
		for _, match := range m.matches[known:] {
			n, err := m.verify(match)
			if err != nil {
				return err
			}
			if n < match.N {
				m.Different++
				if match.N = n; n < m.Policy.Run {
					continue
				}
			}
			if err := m.write(lo, match.First); err != nil {
				return err
			}
			for i := range match.N {
				m.mapTo(match.First+i, uint64(match.At)+uint64(i))
			}
			m.Matches++
			lo = match.End()
		}
		if err := m.write(lo, hi); err != nil {
			return err
		}
		lo = max(lo, hi)
	}
	for i := range m.matches {
		m.matches[i].First -= len(m.prints)
	}
	if m.Places {
		m.places = append(m.places, m.place)
	}
	return nil
}

// takeFromMemory shares those blocks of a point that are in low-latency memory, and makes
// a series of all others: what costs no seek need not part what is contiguous on the disk.
func (m *simulation) takeFromMemory(p *point) error {
	m.prints, m.slots = m.prints[:0], m.slots[:0]
	for i, f := range p.prints {
		if m.Policy.Threshold > 0 {
			_, at, err := m.find(p.first+int64(i), f, block.None)
			if err != nil {
				return err
			}
			if at != 0 {
				m.place[i] = uint32(at)
				continue
			}
		}
		m.prints, m.slots = append(m.prints, f), append(m.slots, int32(i))
	}
	return nil
}

// before implements Series.Before.
func (m *simulation) before(p block.Physical) int {
	if uint64(p) != m.tailEnd {
		return 0
	}
	return m.tail
}

// mapTo says that block i of the series is the one at an address of the disk.
func (m *simulation) mapTo(i int, at uint64) {
	if at != m.tailEnd {
		m.tail = 0
	}
	m.tail = min(m.tail+1, dedup.MaxRun)
	m.tailEnd = at + 1
	m.place[m.slots[i]] = uint32(at)
}

// number returns the number of block i of the series in the stream.
func (m *simulation) number(i int) int64 { return m.first + int64(m.slots[i]) }

// verify compares the blocks of a match and returns how many are equal before one is not.
func (m *simulation) verify(match dedup.Match) (int, error) {
	for i := range match.N {
		if same, err := m.same(m.number(match.First+i), uint64(match.At)+uint64(i)); err != nil || !same {
			return i, err
		}
	}
	return match.N, nil
}

// same compares a block of the stream with a stored one.
func (m *simulation) same(received int64, at uint64) (bool, error) {
	if m.Same == nil {
		return true, nil
	}
	return m.Same(received, m.sources[at-block.TrackBlocks])
}

// write stores the blocks lo to hi-1 of the series, which no match has.
func (m *simulation) write(lo, hi int) error {
	if m.moved != nil && lo < hi {
		m.lookForShort(lo, hi)
	}
	for i := lo; i < hi; i++ {
		if m.Policy.Threshold > 0 {
			known := block.None
			if m.moved != nil {
				known = m.short[i-lo]
			}
			done, err := m.sight(i, known)
			if err != nil {
				return err
			}
			if done {
				continue
			}
		}
		at := m.end
		if at%block.TrackBlocks == 0 {
			m.tracks = append(m.tracks, new(track))
		}
		m.tracks[at/block.TrackBlocks].prints[at%block.TrackBlocks] = m.prints[i]
		m.index.Put(m.prints[i], block.Physical(at))
		if m.Same != nil {
			m.sources = append(m.sources, m.number(i))
		}
		m.end++
		m.Disk++
		m.mapTo(i, at)
	}
	return nil
}

// lookForShort finds the matches, however short, of the blocks lo to hi-1 of the series:
// the index may have one block of a match only, and the others are found by it.
func (m *simulation) lookForShort(lo, hi int) {
	m.short = append(m.short[:0], make([]block.Physical, hi-lo)...)
	shortest := dedup.Matcher{Run: 1}
	for _, match := range shortest.Matches(dedup.Series{Prints: m.prints[lo:hi]}, 0, hi-lo, m, nil) {
		for i := range match.N {
			m.short[match.First+i] = match.At + block.Physical(i)
		}
	}
}

// find returns the places on the disk that have the content of a block, or one whose
// content is in low-latency memory, 0 if there is none. One may be known already.
func (m *simulation) find(received int64, f dedup.Fingerprint, known block.Physical) (found []block.Physical, inMem block.Physical, err error) {
	m.candidates = m.index.Candidates(f, m.candidates[:0])
	if known != block.None && !slices.Contains(m.candidates, known) {
		m.candidates = append(m.candidates, known)
	}
	if at, ok := m.moved[f]; ok && !slices.Contains(m.candidates, at) {
		m.candidates = append(m.candidates, at)
	}
	found = m.candidates[:0]
	for _, p := range m.candidates {
		if m.Fingerprint(p) != f {
			continue
		}
		if same, err := m.same(received, uint64(p)); err != nil {
			return nil, 0, err
		} else if !same {
			continue
		}
		if *m.sightings(p) == inMemory {
			return nil, p, nil
		}
		found = append(found, p)
	}
	return found, 0, nil
}

// sight looks for stored blocks with the content of one that no match has, and shares one
// if it is in low-latency memory, or has been found so often that it moves there. All
// places of the content that the index knows lead there then.
func (m *simulation) sight(i int, known block.Physical) (shared bool, err error) {
	found, at, err := m.find(m.number(i), m.prints[i], known)
	switch {
	case err != nil:
		return false, err
	case at != 0: // and on the disk nothing is parted by it
		m.place[m.slots[i]] = uint32(at)
		return true, nil
	case len(found) == 0:
		return false, nil
	}
	most := 0
	for _, p := range found {
		most = max(most, int(*m.sightings(p)))
	}
	if most++; most < m.Policy.Threshold {
		*m.sightings(found[0]) = uint8(most)
		return false, nil
	}
	for _, p := range found {
		*m.sightings(p) = inMemory
	}
	m.Disk -= int64(len(found))
	m.Memory++
	if m.moved != nil {
		m.moved[m.prints[i]] = found[0]
	}
	m.place[m.slots[i]] = uint32(found[0])
	return true, nil
}

func (m *simulation) sightings(p block.Physical) *uint8 {
	return &m.tracks[p/block.TrackBlocks].sighted[p%block.TrackBlocks]
}
