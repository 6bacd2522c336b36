package space

import (
	"errors"
	"fmt"
	"math/bits"

	"github.com/pollux-storage/pollux/internal/block"
)

// Ranges of a device are cheap where an access costs no seek, because a layer below keeps
// them on flash. They are part of the pool's free space like all others: what is free,
// reserved or owed does not depend on them. But AllocCheap alone takes blocks there as
// long as there are others, so that flash does not fill with what nobody looks at.

// PieceBlocks is of how many blocks, 64 KiB, a multiple is cheap or not.
const PieceBlocks = 16

// cheapSteps are how many free cheap blocks a track has that AllocCheap takes first, and
// next, and last: runs are long where that costs nothing to find.
var cheapSteps = [...]int{block.TrackBlocks / 2, PieceBlocks, 1}

// cheapTracks is how many tracks are made cheap under the lock at once: some tens of
// microseconds.
const cheapTracks = groupTracks

// cheap tells which pieces of a device are cheap. It is memory without pointers outside
// the Go heap, touched only where something is.
//
// Invariants, with the device's:
//
//	free of a track    = its cheap blocks that are not in use
//	free               = sum of these
//	sets[i]            = tracks with at least cheapSteps[i] of them
//	tracks of a group  = those of it with a cheap piece
//	all                = sum of these, never 0
type cheap struct {
	tracks []uint32 // a bit for each piece << cheapShift | free of the track
	groups []uint16 // tracks of each group
	all    int
	free   int64
	sets   [len(cheapSteps)]trackSet
	cursor int // track that was taken from last, whose rest small allocations get
}

const cheapShift = 16

func newCheap(tracks, groups int) (*cheap, error) {
	c := &cheap{groups: make([]uint16, groups)}
	var err error
	if c.tracks, err = allocWords[uint32](tracks); err != nil {
		return nil, err
	}
	for i := range c.sets {
		if c.sets[i], err = newTrackSet(tracks); err != nil {
			return nil, errors.Join(err, c.close())
		}
	}
	return c, nil
}

// close frees the memory; of nil there is none.
func (c *cheap) close() error {
	if c == nil {
		return nil
	}
	errs := []error{freeWords(c.tracks)}
	for i := range c.sets {
		errs = append(errs, c.sets[i].close())
	}
	return errors.Join(errs...)
}

// memory returns how many bytes it takes at most.
func (c *cheap) memory() (n int64) {
	if c == nil {
		return 0
	}
	for _, tracks := range c.groups {
		if tracks > 0 {
			n += groupTracks * 4
		}
	}
	for i := range c.sets {
		n += int64(len(c.sets[i].words)) * 8
	}
	return n + int64(len(c.groups))*2
}

// piecesOf returns the cheap pieces of a track, a bit each.
func (c *cheap) piecesOf(t int) uint32 { return c.tracks[t] >> cheapShift }

// freeOf returns how many cheap blocks of a track are free.
func (c *cheap) freeOf(t int) int { return int(c.tracks[t] & (1<<cheapShift - 1)) }

// set says which pieces of a track are cheap and how many blocks of these are free.
func (c *cheap) set(t int, pieces uint32, free int) {
	was := c.freeOf(t)
	c.tracks[t] = pieces<<cheapShift | uint32(free)
	c.free += int64(free - was)
	for i, least := range cheapSteps {
		if in := free >= least; in != (was >= least) {
			c.sets[i].put(t, in)
		}
	}
}

// next returns a track of a set, from the cursor on, that nobody empties.
func (c *cheap) next(set int, avoid []uint64) (int, bool) {
	from := c.cursor
	for wrapped := false; ; {
		t, ok := c.sets[set].next(from)
		switch {
		case ok && !bit(avoid, t):
			return t, true
		case ok:
			from = t + 1
		case wrapped:
			return 0, false
		default:
			from, wrapped = 0, true
		}
	}
}

// blocksOf returns the blocks of pieces of a track, a bit each.
func blocksOf(pieces uint32) (m blocks) {
	for w := range m {
		x := uint64(pieces >> (4 * w) & 15)
		m[w] = (x | x<<15 | x<<30 | x<<45) & 0x0001000100010001 * 0xffff
	}
	return m
}

// cheapOf returns the cheap blocks of a track.
func (d *Device) cheapOf(t int) (m blocks) {
	if d.cheap == nil || d.cheap.tracks[t] == 0 {
		return m
	}
	return blocksOf(d.cheap.piecesOf(t))
}

// dear returns how many blocks of a track are free and not cheap.
func (d *Device) dear(t int) int {
	n := int(d.trackFree[t])
	if d.cheap != nil {
		n -= d.cheap.freeOf(t)
	}
	return n
}

// freeCheap returns how many cheap blocks are free.
func (d *Device) freeCheap() int64 {
	if d.cheap == nil {
		return 0
	}
	return d.cheap.free
}

// recount counts the free cheap blocks of a track, of which some were taken or freed, and
// returns their number.
func (d *Device) recount(t int) (free int) {
	pieces := d.cheap.piecesOf(t)
	if pieces == 0 {
		return 0
	}
	free = d.countCheap(t, pieces)
	d.cheap.set(t, pieces, free)
	return free
}

func (d *Device) countCheap(t int, pieces uint32) (free int) {
	m := blocksOf(pieces)
	for w, used := range d.counts.track(t) {
		free += bits.OnesCount64(m[w] &^ used)
	}
	return free
}

// setCheap makes pieces of a track cheap, or not.
func (d *Device) setCheap(t int, pieces uint32, on bool) {
	c := d.cheap
	was := c.piecesOf(t)
	now := was | pieces
	if !on {
		now = was &^ pieces
	}
	if now == was {
		return
	}
	c.set(t, now, d.countCheap(t, now))
	g := t / groupTracks
	switch {
	case was == 0:
		c.groups[g]++
		c.all++
	case now == 0:
		c.all--
		if c.groups[g]--; c.groups[g] == 0 {
			discard(c.tracks[g*groupTracks : min((g+1)*groupTracks, len(c.tracks))])
		}
	}
	if !on {
		dear := d.dear(t)
		d.groups[g].most = max(d.groups[g].most, uint16(dear))
		d.want = max(d.want, dear)
	}
}

// takeCheap allocates up to n cheap blocks of one track of a set.
func (d *Device) takeCheap(dev, set, n int, runs []Run) (int, []Run) {
	c := d.cheap
	if c == nil || c.free == 0 {
		return 0, runs
	}
	t := c.cursor
	if n >= block.TrackBlocks || c.freeOf(t) == 0 || bit(d.avoid, t) {
		var ok bool
		if t, ok = c.next(set, d.avoid); !ok {
			return 0, runs
		}
	}
	c.cursor = t
	not := blocksOf(^c.piecesOf(t))
	return d.takeOf(dev, t, n, &not, runs)
}

// SetCheap makes n blocks of a device, from block first on, cheap, or makes them ones
// that are not. Both are multiples of PieceBlocks, unless the range ends where the device
// does; what lies beyond it is left out. It is about what is allocated from then on:
// nothing moves. Where there is no memory to note it blocks remain what they are, and
// what is allocated is as good.
func (s *Space) SetCheap(dev int, first, n uint64, cheap bool) {
	for end := first + n; first < end; {
		next := min(end, first-first%block.TrackBlocks+cheapTracks*block.TrackBlocks)
		if !s.setCheap(dev, first, next, cheap) {
			return
		}
		first = next
	}
}

// setCheap is SetCheap for blocks first to end-1. It returns false where there is nothing
// to be done, also for those behind.
func (s *Space) setCheap(dev int, first, end uint64, cheap bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if dev >= len(s.devs) || first >= s.devs[dev].blocks {
		return false
	}
	d := s.devs[dev]
	end = min(end, d.blocks)
	if first%PieceBlocks != 0 || end%PieceBlocks != 0 && end != d.blocks {
		panic(fmt.Sprintf("space: blocks %d to %d are no whole pieces", first, end))
	}
	if d.cheap == nil {
		if !cheap {
			return false
		}
		var err error
		if d.cheap, err = newCheap(len(d.trackFree), len(d.groups)); err != nil {
			return false
		}
	}
	for lo := first; lo < end; {
		t := int(lo / block.TrackBlocks)
		hi := min(end, uint64(t+1)*block.TrackBlocks)
		from := lo % block.TrackBlocks / PieceBlocks
		n := (hi - lo + PieceBlocks - 1) / PieceBlocks
		d.setCheap(t, (1<<n-1)<<from, cheap)
		lo = hi
	}
	if d.cheap.all == 0 {
		_ = d.cheap.close() // only fails for memory that is not ours
		d.cheap = nil
	}
	return true
}

// AllocCheap allocates up to n cheap blocks with count 1, as many as are free outside of
// tracks that are being emptied, and appends them to runs, which are long where that is
// easy. Reservations are not looked at; the caller holds one.
func (s *Space) AllocCheap(n int, runs []Run) []Run {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.shunned {
		_, runs = s.allocCheapLocked(n, runs)
	}
	return runs
}

// allocCheapLocked is AllocCheap, and returns how many of the blocks were not to be had.
func (s *Space) allocCheapLocked(n int, runs []Run) (left int, _ []Run) {
	for set := range cheapSteps {
		for misses := 0; n > 0 && misses < len(s.devs); {
			i := s.nextCheap % len(s.devs)
			s.nextCheap++
			got := 0
			if d := s.devs[i]; !d.closed() {
				got, runs = d.takeCheap(i, set, n, runs)
			}
			n -= got
			s.free -= int64(got)
			if misses++; got > 0 {
				misses = 0
			}
		}
	}
	return n, runs
}

// ShunCheap makes AllocCheap find nothing, because writes to cheap ranges fail, or something
// again. Whatever cannot do without goes on to take them when all else is in use.
func (s *Space) ShunCheap(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shunned = on
}

// CheapShunned reports whether AllocCheap finds nothing because of that.
func (s *Space) CheapShunned() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.shunned
}

// FreeCheap returns how many cheap blocks are free that AllocCheap may take.
func (s *Space) FreeCheap() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shunned {
		return 0
	}
	return s.freeCheapLocked()
}

func (s *Space) freeCheapLocked() (n int64) {
	for _, d := range s.devs {
		if !d.closed() {
			n += d.freeCheap()
		}
	}
	return n
}

// AreCheap sets the bits of those of the blocks that are cheap, by their places in the
// list, of which there are at most block.TrackBlocks.
func (s *Space) AreCheap(list []block.Physical) (cheap [trackWords]uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, p := range list {
		dev, t := p.Device(), int(p.Block()/block.TrackBlocks)
		if dev >= len(s.devs) || s.devs[dev].cheap == nil || p.Block() >= s.devs[dev].blocks {
			continue
		}
		piece := p.Block() % block.TrackBlocks / PieceBlocks
		cheap[i/64] |= uint64(s.devs[dev].cheap.piecesOf(t)>>piece&1) << (i % 64)
	}
	return cheap
}

// check proves what is known of cheap blocks against the counts, and says what is wrong.
func (c *cheap) check(d *Device) string {
	if c == nil {
		return ""
	}
	var free int64
	var members [len(cheapSteps)]int
	all := 0
	for g, tracks := range c.groups {
		if tracks == 0 {
			continue // what lies there takes no memory
		}
		some := 0
		for t := g * groupTracks; t < min((g+1)*groupTracks, len(c.tracks)); t++ {
			if c.tracks[t] == 0 {
				continue
			}
			n := d.countCheap(t, c.piecesOf(t))
			if n != c.freeOf(t) || c.piecesOf(t) == 0 {
				return fmt.Sprintf("%d free cheap blocks of track %d instead of %d", c.freeOf(t), t, n)
			}
			free += int64(n)
			some++
			for i, least := range cheapSteps {
				if n < least {
					continue
				}
				if members[i]++; !c.sets[i].has(t) {
					return fmt.Sprintf("track %d with %d free cheap blocks is not found among those with %d", t, n, least)
				}
			}
		}
		if some != int(tracks) {
			return fmt.Sprintf("%d tracks of group %d with cheap blocks instead of %d", tracks, g, some)
		}
		all += some
	}
	for i, least := range cheapSteps {
		if n, ok := c.sets[i].count(); !ok || n != members[i] {
			return fmt.Sprintf("%d tracks with %d free cheap blocks are found instead of %d", n, least, members[i])
		}
	}
	if free != c.free || all != c.all || all == 0 {
		return fmt.Sprintf("%d free cheap blocks on %d tracks instead of %d on %d", c.free, c.all, free, all)
	}
	return ""
}
