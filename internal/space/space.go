// Package space keeps the free space of one pool: a reference count for every
// physical block, the free blocks of every track, and the reservations by
// which each acknowledged write is certain of a place.
//
// A block is free exactly when its count is 0. Counts lie in memory outside the
// Go heap: a bit for each block that tells whether it is in use, 32 bytes a
// track, and what counts are above 1 in binary, as many sets of 32 bytes as the
// largest count of a track needs. A pool of 10 TiB that is full takes 340 MiB,
// 320 more for each doubling of counts where everything is shared. What becomes
// free gives its memory back.
//
// All counts are in memory from the first consistency point on, rather than
// paged: the allocator does no I/O under its lock, and what it is told by a
// commit that is durable already cannot fail.
//
// Invariants, under mu:
//
//	free     = number of allocatable blocks with count 0, not on devices
//	           that are leaving or apart
//	reserved = blocks promised to acknowledged writes and to metadata
//	owed     = blocks in use on devices that are leaving
//	more     = sum of all counts that are above 1, less 1 each
//	reserved + slop + owed <= free  when Reserve grants (half the slop for
//	                              ReserveToFree), and only allocation against
//	                              a reservation, or of the metadata that slop
//	                              is for, lowers free later
//
// A device that is leaving the pool is emptied: nothing is allocated from it, its
// free blocks are not counted anywhere, and for what it has in use there is room
// on the others, which only ReserveOwed gives away. One that is apart is for
// AllocApart alone, see there. Ranges that are cheap count like others, and are for
// AllocCheap while there are others, see SetCheap.
//
// The lock is a leaf: nothing else is taken while it is held.
package space

import (
	"fmt"
	"math/bits"
	"sync"
	"unsafe"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
)

// Run is a range of consecutive physical blocks on one track.
type Run struct {
	At block.Physical
	N  int
}

// Space is the allocator of one pool. Its methods may be called concurrently.
type Space struct {
	mu        sync.Mutex
	devs      []*Device
	free      int64
	reserved  int64
	slop      int64
	more      int64
	next      int  // device to allocate from next
	nextTwin  int  // and to allocate blocks with twins from
	nextCheap int  // and to allocate cheap blocks from
	shunned   bool // see ShunCheap
}

// New returns a Space without devices.
func New() *Space { return &Space{} }

// Attach appends a device to those that are allocated from.
func (s *Space) Attach(d *Device) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.devs = append(s.devs, d)
	s.free += d.allocatable()
	s.setSlopLocked()
}

// AddDevice appends a new device, see NewDevice.
func (s *Space) AddDevice(blocks, first uint64) error {
	d, err := NewDevice(blocks, first)
	if err == nil {
		s.Attach(d)
	}
	return err
}

// setSlopLocked keeps max(64 MiB, 1/64) back for trims, deletes and metadata, or an
// eighth of a pool that is too small for that.
func (s *Space) setSlopLocked() {
	total := s.totalLocked()
	s.slop = min(max(64<<20/block.Size, total/64), total/8)
}

func (s *Space) totalLocked() int64 {
	var n int64
	for _, d := range s.devs {
		if !d.closed() {
			n += d.size()
		}
	}
	return n
}

// Close frees the counts. The Space must not be used again.
func (s *Space) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.devs {
		_ = d.Close() // only fails for memory that is not ours
	}
	s.devs = nil
}

// Usage tells how full a pool is, in blocks. Owed are those in use on devices that
// are leaving, which count nowhere else. More are the references to blocks beyond each
// one's first, wherever they lie: what the pool would need if nothing were shared. For
// devices that are apart see Apart.
type Usage struct {
	Total, Free, Reserved, Slop, Owed, More int64
}

// InUse returns how many blocks are in use.
func (u Usage) InUse() int64 { return u.Total - u.Free + u.Owed }

// Spare returns how many blocks can still be promised; less than 0 when more are
// kept back than there are.
func (u Usage) Spare() int64 { return u.Free - u.Reserved - u.Slop - u.Owed }

// Usage returns the current usage.
func (s *Space) Usage() Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Usage{Total: s.totalLocked(), Free: s.free, Reserved: s.reserved, Slop: s.slop, Owed: s.owedLocked(), More: s.more}
}

// Reserve promises n blocks, or returns false when the pool lacks them.
func (s *Space) Reserve(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reserved+n+s.slop+s.owedLocked() > s.free && !(planted.Has(planted.SlopMissing) && s.reserved+n <= s.free) {
		return false
	}
	s.reserved += n
	return true
}

// ReserveToFree is Reserve for what a trim needs in order to free more: it may
// use up half of what is kept back.
func (s *Space) ReserveToFree(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reserved+n+s.slop/2+s.owedLocked() > s.free {
		return false
	}
	s.reserved += n
	return true
}

// ForceReserve promises n blocks of which it is known that they were promised
// before: by the guest that acknowledged the writes found in a log.
func (s *Space) ForceReserve(n int64) {
	s.mu.Lock()
	s.reserved += n
	s.mu.Unlock()
}

// Unreserve takes a promise of n blocks back.
func (s *Space) Unreserve(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reserved -= n; s.reserved < 0 {
		panic("space: more unreserved than was reserved")
	}
}

// Alloc allocates n blocks with count 1 and appends them to runs, in as few
// and as long runs as it finds: whole free tracks first, and cheap blocks when nothing
// else is free. Reservations are not looked at; the caller holds one. It allocates
// nothing when n are not free.
func (s *Space) Alloc(n int, runs []Run) ([]Run, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if int64(n) > s.free {
		return runs, fmt.Errorf("allocate %d blocks of %d free ones: %w", n, s.free, block.ErrNoSpace)
	}
	for misses := 0; n > 0; {
		// Each device gives a track at a time, so that all work in parallel.
		i := s.next % len(s.devs)
		s.next++
		var got int
		if d := s.devs[i]; !d.closed() {
			got, runs = d.take(i, n, runs)
		}
		n -= got
		s.free -= int64(got)
		if misses++; got > 0 {
			misses = 0
		} else if misses == len(s.devs) {
			s.stopEmptyingLocked() // the only free blocks are there, or cheap
		} else if misses == 2*len(s.devs) {
			n, runs = s.allocCheapLocked(n, runs)
		}
	}
	return runs, nil
}

// Inc adds a reference to each block of a run, or to none when one of them is at
// the limit.
func (s *Space) Inc(r Run) error { return s.adjust(r, true, nil) }

// Dec drops a reference to each block of a run; blocks without references are
// free at once, so the commit that dropped them must be durable. When one of
// them is free already, it drops none.
func (s *Space) Dec(r Run) error { return s.adjust(r, false, nil) }

// Drop is Dec, and appends what has become free by it to freed.
func (s *Space) Drop(r Run, freed []Run) ([]Run, error) {
	err := s.adjust(r, false, &freed)
	return freed, err
}

// adjust adds or drops a reference to each block of a run. What has become free is
// appended to freed, unless that is nil.
func (s *Space) adjust(r Run, up bool, freed *[]Run) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	d, err := s.deviceOf(r)
	if err != nil {
		return err
	}
	t, off := int(r.At.Block()/block.TrackBlocks), int(r.At.Block()%block.TrackBlocks)
	if off+r.N > block.TrackBlocks {
		return &block.CorruptError{What: "block address", Where: r.At.String(), Why: fmt.Sprintf("%d blocks from it on are not on one track", r.N)}
	}
	m := span(off, off+r.N)
	if up {
		fresh, err := d.inc(t, &m)
		if err != nil {
			return fmt.Errorf("reference count of block %v or one of %d after it: %w", r.At, r.N-1, err)
		}
		s.tookLocked(d, fresh)
		s.more += int64(r.N - fresh)
		return nil
	}
	for w, used := range d.counts.track(t) {
		if free := m[w] &^ used; free != 0 {
			b := block.At(r.At.Device(), uint64(t*block.TrackBlocks+w*64+bits.TrailingZeros64(free)))
			return &block.CorruptError{What: "reference count", Where: "block " + b.String(), Why: "a free block was freed; run `pollux check`"}
		}
	}
	n := d.dec(t, &m)
	s.tookLocked(d, -n)
	s.more -= int64(r.N - n)
	if freed != nil && n > 0 {
		for w, used := range d.counts.track(t) {
			m[w] &^= used
		}
		*freed = m.runs(block.At(r.At.Device(), uint64(t)*block.TrackBlocks), *freed)
	}
	return nil
}

// runs appends the blocks of a track that begins at a block, as runs.
func (m *blocks) runs(track block.Physical, to []Run) []Run {
	next := -1
	for w := range m {
		for rest := m[w]; rest != 0; {
			i := bits.TrailingZeros64(rest)
			n := bits.TrailingZeros64(^(rest >> i))
			rest &^= (^uint64(0) >> (64 - n)) << i
			if b := w*64 + i; b == next {
				to[len(to)-1].N += n
			} else {
				to = append(to, Run{track + block.Physical(b), n})
			}
			next = w*64 + i + n
		}
	}
	return to
}

// tookLocked keeps the number of free blocks when n of a device came into use, or
// became free.
func (s *Space) tookLocked(d *Device, n int) {
	if !d.closed() {
		s.free -= int64(n)
	}
}

func (s *Space) deviceOf(r Run) (*Device, error) {
	dev, b := r.At.Device(), r.At.Block()
	if dev >= len(s.devs) || b < s.devs[dev].first || b+uint64(r.N) > s.devs[dev].blocks {
		return nil, &block.CorruptError{What: "block address", Where: r.At.String(), Why: "outside the pool's data area"}
	}
	return s.devs[dev], nil
}

// Load sets the counts of a device that are not zero, from block first on, on
// which nothing else has been done: after a failure it may be called again.
// Counts of blocks that are never allocated must be zero.
func (s *Space) Load(dev int, first uint64, counts []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(counts) > 0 {
		n := min(len(counts), int(block.TrackBlocks-first%block.TrackBlocks))
		if err := s.loadTrackLocked(dev, first, counts[:n]); err != nil {
			return err
		}
		first, counts = first+uint64(n), counts[n:]
	}
	return nil
}

// loadTrackLocked is Load for blocks of one track.
func (s *Space) loadTrackLocked(dev int, first uint64, counts []byte) error {
	t := int(first / block.TrackBlocks)
	if len(counts) == block.TrackBlocks && dev < len(s.devs) && t < len(s.devs[dev].trackFree) && s.devs[dev].trackFree[t] == block.TrackBlocks {
		// The whole of a fresh track, as nearly all are.
		n, err := s.devs[dev].load(t, (*[block.TrackBlocks]byte)(counts))
		if err != nil {
			return err
		}
		s.tookLocked(s.devs[dev], n)
		for _, c := range counts {
			s.more += int64(c)
		}
		s.more -= int64(n)
		return nil
	}
	for i, c := range counts {
		if c == 0 {
			continue
		}
		d, err := s.deviceOf(Run{block.At(dev, first+uint64(i)), 1})
		if err != nil {
			return err
		}
		b := int(first%block.TrackBlocks) + i
		m := span(b, b+1)
		for range int(c) - d.counts.get(first+uint64(i)) {
			n, err := d.inc(t, &m)
			if err != nil {
				return err
			}
			s.tookLocked(d, n)
			s.more += int64(1 - n)
		}
	}
	return nil
}

// Count returns the reference count of p, 0 for addresses outside the pool.
func (s *Space) Count(p block.Physical) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	d, err := s.deviceOf(Run{p, 1})
	if err != nil {
		return 0
	}
	return d.counts.get(p.Block())
}

// MayShare reports whether a block may get another reference: it is in use, its count
// is not at its limit, and neither its track nor its device is being emptied.
func (s *Space) MayShare(p block.Physical) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	d, err := s.deviceOf(Run{p, 1})
	if err != nil || d.leaving || bit(d.avoid, int(p.Block()/block.TrackBlocks)) {
		return false
	}
	n := d.counts.get(p.Block())
	return n > 0 && n < MaxCount
}

// Unused reports whether n blocks of a device, from the given one on and all on one
// track, are free. What is freed or allocated meanwhile may or may not be seen.
func (s *Space) Unused(dev int, first uint64, n int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	d, err := s.deviceOf(Run{block.At(dev, first), n})
	if err != nil {
		return false
	}
	off := int(first % block.TrackBlocks)
	m := span(off, off+n)
	for w, used := range d.counts.track(int(first / block.TrackBlocks)) {
		if used&m[w] != 0 {
			return false
		}
	}
	return true
}

// Memory returns how many bytes the counts take at most.
func (s *Space) Memory() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var n int64
	for _, d := range s.devs {
		n += d.memory()
	}
	return n
}

// MemoryFor returns how many bytes the counts of a device take at most while no
// block is shared.
func MemoryFor(blocks uint64) int64 {
	tracks := int64((blocks + block.TrackBlocks - 1) / block.TrackBlocks)
	groups := (tracks + groupTracks - 1) / groupTracks
	return tracks*2 + groups*(groupTracks*trackWords*8+int64(unsafe.Sizeof(group{})))
}
