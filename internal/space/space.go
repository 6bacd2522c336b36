// Package space keeps the free space of one pool: a reference count for every
// physical block, the free blocks of every track, and the reservations by
// which each acknowledged write is certain of a place.
//
// A block is free exactly when its count is 0. Counts live outside the Go
// heap, one byte a block, and memory is touched only where blocks are in use.
//
// Invariants, under mu:
//
//	free     = number of allocatable blocks with count 0
//	reserved = blocks promised to acknowledged writes and to metadata
//	reserved + slop <= free       when Reserve grants (half the slop for
//	                              ReserveToFree), and only allocation against
//	                              a reservation, or of the metadata that slop
//	                              is for, lowers free later
//
// The lock is a leaf: nothing else is taken while it is held.
package space

import (
	"fmt"
	"sync"

	"github.com/pollux-storage/pollux/hpdi"
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
	mu       sync.Mutex
	devs     []*Device
	free     int64
	reserved int64
	slop     int64
	next     int // device to allocate from next
}

// Device is the free space of one device.
type Device struct {
	first     uint64 // blocks before it are never allocated
	counts    []byte // one a block
	trackFree []uint16
	cursor    int // track to look at first
	want      int // only tracks with at least so many free blocks, while there are any
}

// New returns a Space without devices.
func New() *Space { return &Space{} }

// NewDevice returns a device of the given number of blocks, all free, of which
// the ones before first are never allocated. Attach makes it part of a Space.
func NewDevice(blocks, first uint64) (*Device, error) {
	counts, err := hpdi.Alloc(int(blocks))
	if err != nil {
		return nil, fmt.Errorf("reference counts of %d blocks: %w", blocks, err)
	}
	d := &Device{first: first, counts: counts, want: block.TrackBlocks}
	d.trackFree = make([]uint16, (blocks+block.TrackBlocks-1)/block.TrackBlocks)
	for t := range d.trackFree {
		lo, hi := d.trackRange(t)
		d.trackFree[t] = uint16(hi - lo)
	}
	return d, nil
}

// Close frees the memory of a device that was not attached.
func (d *Device) Close() error { return hpdi.Free(d.counts) }

// Attach appends a device to those that are allocated from.
func (s *Space) Attach(d *Device) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.devs = append(s.devs, d)
	s.free += int64(uint64(len(d.counts)) - d.first)
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
		n += int64(uint64(len(d.counts)) - d.first)
	}
	return n
}

// trackRange returns the allocatable blocks of track t as [lo, hi).
func (d *Device) trackRange(t int) (lo, hi uint64) {
	lo = uint64(t) * block.TrackBlocks
	hi = min(lo+block.TrackBlocks, uint64(len(d.counts)))
	return min(max(lo, d.first), hi), hi
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

// Usage tells how full a pool is, in blocks.
type Usage struct {
	Total, Free, Reserved, Slop int64
}

// Usage returns the current usage.
func (s *Space) Usage() Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Usage{Total: s.totalLocked(), Free: s.free, Reserved: s.reserved, Slop: s.slop}
}

// Reserve promises n blocks, or returns false when the pool lacks them.
func (s *Space) Reserve(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reserved+n+s.slop > s.free && !(planted.Has(planted.SlopMissing) && s.reserved+n <= s.free) {
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
	if s.reserved+n+s.slop/2 > s.free {
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
// and as long runs as it finds: whole free tracks first. Reservations are not
// looked at; the caller holds one. It allocates nothing when n are not free.
func (s *Space) Alloc(n int, runs []Run) ([]Run, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if int64(n) > s.free {
		return runs, fmt.Errorf("allocate %d blocks of %d free ones: %w", n, s.free, block.ErrNoSpace)
	}
	for n > 0 {
		// Each device gives a track at a time, so that all work in parallel.
		i := s.next % len(s.devs)
		s.next++
		var got int
		got, runs = s.devs[i].take(i, n, runs)
		n -= got
		s.free -= int64(got)
	}
	return runs, nil
}

// take allocates up to n blocks of one track.
func (d *Device) take(dev, n int, runs []Run) (int, []Run) {
	t, ok := d.pickTrack()
	if !ok {
		return 0, runs
	}
	lo, hi := d.trackRange(t)
	got := 0
	for b := lo; b < hi && got < n; {
		if d.counts[b] != 0 {
			b++
			continue
		}
		start := b
		for b < hi && got < n && d.counts[b] == 0 {
			d.counts[b] = 1
			b++
			got++
		}
		runs = append(runs, Run{At: block.At(dev, start), N: int(b - start)})
	}
	d.trackFree[t] -= uint16(got)
	return got, runs
}

// pickTrack returns the next track with enough free blocks. What counts as
// enough sinks while no track has it, down to a single block, and rises again
// when blocks are freed.
func (d *Device) pickTrack() (int, bool) {
	for {
		for range d.trackFree {
			if d.cursor >= len(d.trackFree) {
				d.cursor = 0
			}
			if f := d.trackFree[d.cursor]; f > 0 && int(f) >= d.want {
				return d.cursor, true
			}
			d.cursor++
		}
		if d.want <= 1 {
			return 0, false
		}
		d.want /= 2
	}
}

// Inc adds a reference to each block of a run.
func (s *Space) Inc(r Run) error { return s.adjust(r, true) }

// Dec drops a reference to each block of a run; blocks without references are
// free at once, so the commit that dropped them must be durable.
func (s *Space) Dec(r Run) error { return s.adjust(r, false) }

func (s *Space) adjust(r Run, up bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	d, err := s.deviceOf(r)
	if err != nil {
		return err
	}
	for b := r.At.Block(); b < r.At.Block()+uint64(r.N); b++ {
		c := &d.counts[b]
		t := b / block.TrackBlocks
		switch {
		case up && *c == 255:
			return fmt.Errorf("reference count of block %v is at its limit: %w", block.At(r.At.Device(), b), block.ErrUnsupported)
		case up:
			if *c == 0 {
				s.free--
				d.trackFree[t]--
			}
			*c++
		case *c == 0:
			return &block.CorruptError{What: "reference count", Where: "block " + block.At(r.At.Device(), b).String(),
				Why: "a free block was freed; run `pollux check`"}
		default:
			*c--
			if *c == 0 {
				s.free++
				d.trackFree[t]++
				d.want = max(d.want, int(d.trackFree[t]))
			}
		}
	}
	return nil
}

func (s *Space) deviceOf(r Run) (*Device, error) {
	dev, b := r.At.Device(), r.At.Block()
	if dev >= len(s.devs) || b < s.devs[dev].first || b+uint64(r.N) > uint64(len(s.devs[dev].counts)) {
		return nil, &block.CorruptError{What: "block address", Where: r.At.String(), Why: "outside the pool's data area"}
	}
	return s.devs[dev], nil
}

// Load sets the counts of a fresh device from block first on. Counts of
// blocks that are never allocated must be zero.
func (s *Space) Load(dev int, first uint64, counts []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, c := range counts {
		if c == 0 {
			continue
		}
		b := first + uint64(i)
		d, err := s.deviceOf(Run{block.At(dev, b), 1})
		if err != nil {
			return err
		}
		if d.counts[b] == 0 {
			s.free--
			d.trackFree[b/block.TrackBlocks]--
		}
		d.counts[b] = c
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
	return int(d.counts[p.Block()])
}
