package space

import (
	"errors"
	"fmt"
	"math/bits"
	"unsafe"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// Device is the free space of one device.
type Device struct {
	first  uint64 // blocks before it are never allocated
	blocks uint64
	// counts has blocks that are never allocated in use.
	counts    counts
	trackFree []uint16 // free blocks of each track, outside the Go heap
	free      int64    // their sum
	leaving   bool     // it is emptied, and nothing is allocated from it
	apart     bool     // only AllocApart takes something of it
	cheap     *cheap   // nil while nothing is cheap
	groups    []group
	cursor    int      // track to look at first
	want      int      // only tracks with at least so many free blocks that are not cheap, while there are any
	open      int      // track that was allocated from last, whose rest small allocations get
	avoid     []uint64 // a bit for each track that is being emptied, see Choose
	twins     twinPlace
}

// groupTracks is how many tracks, 1 GiB, are summed up together: the search for
// a free track passes 10,000 groups in a pool of 10 TiB and looks into few. It
// is a page of the kernel's of counts.refs.
const groupTracks = 1024

// group is a summary of groupTracks tracks.
type group struct {
	most uint16 // no track has more free blocks that are not cheap; some had so many lately
	busy uint16 // tracks with blocks in use
}

// NewDevice returns a device of the given number of blocks, all free, of which
// the ones before first are never allocated. Attach makes it part of a Space.
func NewDevice(blocks, first uint64) (*Device, error) {
	tracks := int((blocks + block.TrackBlocks - 1) / block.TrackBlocks)
	d := &Device{first: min(first, blocks), blocks: blocks, free: int64(tracks) * block.TrackBlocks, want: block.TrackBlocks, groups: make([]group, (tracks+groupTracks-1)/groupTracks)}
	var err error
	if d.counts, err = newCounts(tracks); err != nil {
		return nil, fmt.Errorf("reference counts of %d blocks: %w", blocks, err)
	}
	mem, err := hpdi.AllocPrivate(2 * tracks)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("free blocks of %d tracks: %w", tracks, err), d.counts.close())
	}
	d.trackFree = unsafe.Slice((*uint16)(unsafe.Pointer(unsafe.SliceData(mem))), tracks)
	d.trackFree[0] = block.TrackBlocks
	for n := 1; n < tracks; n *= 2 {
		copy(d.trackFree[n:], d.trackFree[:n])
	}
	for i := range d.groups {
		d.groups[i].most = block.TrackBlocks
	}
	for b := uint64(0); b < d.first; b += block.TrackBlocks {
		d.hide(int(b / block.TrackBlocks))
	}
	if d.blocks%block.TrackBlocks != 0 {
		d.hide(tracks - 1)
	}
	return d, nil
}

// hide marks the blocks of a track that are outside the data area.
func (d *Device) hide(t int) {
	lo, hi := d.trackRange(t)
	m := span(int(lo-uint64(t)*block.TrackBlocks), int(hi-uint64(t)*block.TrackBlocks))
	for w := range m {
		d.counts.track(t)[w] = ^m[w]
	}
	d.gained(t, int(hi-lo)-int(d.trackFree[t]))
}

// Close frees the memory of a device that was not attached.
func (d *Device) Close() error {
	return errors.Join(d.counts.close(), freeWords(d.trackFree), d.cheap.close())
}

// size returns the number of blocks that can be allocated.
func (d *Device) size() int64 { return int64(d.blocks - d.first) }

// inUse returns how many of them are in use.
func (d *Device) inUse() int64 { return d.size() - d.free }

// allocatable returns how many blocks Alloc can take now.
func (d *Device) allocatable() int64 {
	if d.closed() {
		return 0
	}
	return d.free
}

// trackRange returns the allocatable blocks of track t as [lo, hi).
func (d *Device) trackRange(t int) (lo, hi uint64) {
	lo = uint64(t) * block.TrackBlocks
	hi = min(lo+block.TrackBlocks, d.blocks)
	return min(max(lo, d.first), hi), hi
}

// gained keeps the totals of a track that has n more free blocks, or fewer.
func (d *Device) gained(t, n int) {
	if n == 0 {
		return
	}
	was := int(d.trackFree[t])
	now := was + n
	d.trackFree[t] = uint16(now)
	d.free += int64(n)
	i := t / groupTracks
	g := &d.groups[i]
	if was == block.TrackBlocks {
		g.busy++
	} else if now == block.TrackBlocks {
		if g.busy--; g.busy == 0 {
			lo, hi := i*groupTracks, min((i+1)*groupTracks, len(d.trackFree))
			discard(d.counts.used[lo*trackWords : hi*trackWords])
			discard(d.counts.refs[lo:hi])
		}
	}
	if d.cheap != nil {
		now -= d.recount(t)
	}
	if n > 0 {
		g.most = max(g.most, uint16(now))
		d.want = max(d.want, now)
	}
}

// take allocates up to n blocks of one track, none that are cheap.
func (d *Device) take(dev, n int, runs []Run) (int, []Run) {
	if d.free == d.freeCheap() {
		return 0, runs
	}
	t, ok := d.pickTrack(n)
	if !ok {
		return 0, runs
	}
	var not *blocks
	if d.cheap != nil {
		m := d.cheapOf(t)
		not = &m
	}
	got, runs := d.takeOf(dev, t, n, not, runs)
	if d.dear(t) > 0 {
		d.open = t
	}
	return got, runs
}

// takeOf allocates up to n blocks of a track, but for some, or nil for none.
func (d *Device) takeOf(dev, t, n int, not *blocks, runs []Run) (int, []Run) {
	used, got, next := d.counts.track(t), 0, -1 // next is the block after the last one taken
	for w := range used {
		free := ^used[w]
		if not != nil {
			free &^= not[w]
		}
		for got < n && free != 0 {
			i := bits.TrailingZeros64(free)
			k := min(bits.TrailingZeros64(^(free >> i)), n-got)
			taken := ^uint64(0) >> (64 - k) << i
			free &^= taken
			used[w] |= taken
			got += k
			if b := w*64 + i; b == next {
				runs[len(runs)-1].N += k
			} else {
				runs = append(runs, Run{At: block.At(dev, uint64(t*block.TrackBlocks+b)), N: k})
			}
			next = w*64 + i + k
		}
	}
	d.gained(t, -got)
	return got, runs
}

// pickTrack returns the track from which to take up to n blocks. Less than a
// track's worth comes from the track that was begun last, so that many small
// allocations do not begin a track each; otherwise it is the next track with
// enough free blocks that nobody empties. What counts as enough sinks while no
// track has it, down to a single block, and rises again when blocks are freed.
func (d *Device) pickTrack(n int) (int, bool) {
	if n < block.TrackBlocks && d.dear(d.open) > 0 && !bit(d.avoid, d.open) {
		return d.open, true
	}
	for {
		for range len(d.groups) + 1 { // the cursor's group has a part before the cursor
			if d.seek() {
				return d.cursor, true
			}
		}
		if d.want <= 1 {
			return 0, false
		}
		d.want /= 2
	}
}

// seek moves the cursor to the next track in its group with enough free
// blocks, or to the next group when there is none.
func (d *Device) seek() bool {
	if d.cursor >= len(d.trackFree) {
		d.cursor = 0
	}
	g := &d.groups[d.cursor/groupTracks]
	begin := d.cursor - d.cursor%groupTracks
	end := min(begin+groupTracks, len(d.trackFree))
	if int(g.most) >= d.want {
		whole, most := d.cursor == begin, uint16(0)
		want := uint16(d.want)
		for t := d.cursor; t < end; t++ {
			if t%4 == 0 && t+4 <= end && *(*uint64)(unsafe.Pointer(&d.trackFree[t])) == 0 {
				t += 3 // four tracks without a free block, as nearly all of a full pool are
				continue
			}
			f := d.trackFree[t]
			if f >= want {
				if f = uint16(d.dear(t)); f >= want && !bit(d.avoid, t) {
					d.cursor = t
					return true
				}
			}
			most = max(most, f)
		}
		if whole {
			g.most = most
		}
	}
	d.cursor = end
	return false
}

// inc adds a reference to each block of m on track t.
func (d *Device) inc(t int, m *blocks) (fresh int, err error) {
	if fresh, err = d.counts.inc(t, m); err == nil {
		d.gained(t, -fresh)
	}
	return fresh, err
}

// dec drops a reference of each block of m on track t, which all have one.
func (d *Device) dec(t int, m *blocks) (freed int) {
	freed = d.counts.dec(t, m)
	d.gained(t, freed)
	return freed
}

// load sets the counts of a track of which nothing is in use and returns how
// many are not 0.
func (d *Device) load(t int, from *[block.TrackBlocks]byte) (n int, err error) {
	if err := d.counts.load(t, from); err != nil {
		return 0, err
	}
	for _, w := range d.counts.track(t) {
		n += bits.OnesCount64(w)
	}
	d.gained(t, -n)
	return n, nil
}

// memory returns how many bytes the device's counts take at most.
func (d *Device) memory() int64 {
	n := int64(2*len(d.trackFree)) + int64(len(d.groups))*int64(unsafe.Sizeof(group{}))
	shared := int64(0)
	for i := range d.counts.slabs {
		n += d.counts.slabs[i].memory()
		shared += int64(d.counts.slabs[i].n)
	}
	for i := range d.groups {
		if d.groups[i].busy > 0 {
			n += groupTracks * trackWords * 8
		}
	}
	return n + min(int64(len(d.counts.refs)), shared*groupTracks)*4 + d.cheap.memory()
}
