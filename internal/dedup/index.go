package dedup

import (
	"fmt"
	"math/bits"
	"unsafe"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// Index finds stored blocks by their fingerprints. It has one user at a time.
//
// An entry is a word: the block's address, and above it a tag, which is a part of the
// fingerprint. It lies in one of two buckets, each a line of the processor's cache:
// the first follows from the fingerprint, the second from the first and the tag, so
// that buckets fill evenly. A look-up that finds a wrong entry, one in some thousands,
// costs a look at the fingerprint that is stored with the track.
//
// Invariants:
//
//	an entry is in one of the two buckets of its fingerprint, and once
//	entries behind the sweep, and all when none is under way, are of blocks
//	whose place in the track is a multiple of Every
//	entries <= slots
type Index struct {
	buckets []bucket
	shift   uint // of a fingerprint's bits, so that a bucket's number is left
	n       int  // entries
	every   uint64
	swept   int // buckets looked at since every was last changed; len(buckets) when all are

	mem []byte
}

const (
	bucketSlots = 8
	bucketBytes = bucketSlots * 8
	addressBits = 46 // as in a block.Pointer
	tagMask     = 1<<(64-addressBits) - 1
)

type bucket [bucketSlots]uint64

// MinIndex is the size in bytes of the smallest index.
const MinIndex = 64 << 10

// fullNum of fullDen slots may be in use before the index is thinned out: beyond it
// both buckets of an entry are full too often.
const fullNum, fullDen = 15, 16

// NewIndex returns an empty index of the largest power of two of bytes that limit
// allows, MinIndex at least.
func NewIndex(limit int64) (*Index, error) {
	size := max(MinIndex, int64(1)<<(bits.Len64(uint64(limit))-1))
	mem, err := hpdi.Alloc(int(size))
	if err != nil {
		return nil, fmt.Errorf("index of fingerprints of %d bytes: %w", size, err)
	}
	n := int(size / bucketBytes)
	return &Index{
		buckets: unsafe.Slice((*bucket)(unsafe.Pointer(unsafe.SliceData(mem))), n),
		shift:   uint(64 - bits.Len(uint(n-1))), every: 1, swept: n, mem: mem,
	}, nil
}

// Close frees the memory. The index must not be used again.
func (x *Index) Close() error { return hpdi.Free(x.mem) }

// IndexStats describes an index.
type IndexStats struct {
	Bytes   int64
	Entries int
	Slots   int
	// Every says that one block of so many of a track is kept.
	Every int
}

// Stats returns the present numbers.
func (x *Index) Stats() IndexStats {
	return IndexStats{Bytes: int64(len(x.mem)), Entries: x.n, Slots: len(x.buckets) * bucketSlots, Every: int(x.every)}
}

// two returns the numbers of the buckets of a fingerprint.
func (x *Index) two(f Fingerprint) (a, b uint64) {
	a = uint64(f) >> x.shift
	return a, x.other(a, uint64(f)&tagMask)
}

// other returns, for an entry with a tag in one of its buckets, the other one.
func (x *Index) other(i, tag uint64) uint64 {
	// The tag is less than the word is wide, and is spread over all of it; what is
	// not 0 keeps the two apart.
	d := (tag*2 + 1) * 0x9e3779b97f4a7c15 >> x.shift
	return i ^ max(1, d)
}

func entryOf(f Fingerprint, p block.Physical) uint64 {
	return uint64(f)&tagMask<<addressBits | uint64(p)
}

func addressOf(entry uint64) block.Physical { return block.Physical(entry & (1<<addressBits - 1)) }

// find returns the slot of an entry, or -1.
func (b *bucket) find(entry uint64) int {
	for i, e := range b {
		if e == entry {
			return i
		}
	}
	return -1
}

// keeps reports whether the index has an entry for a block, if it has room.
func (x *Index) keeps(p block.Physical) bool { return uint64(p)%x.every == 0 }

// Put says that a block holds what has the fingerprint.
func (x *Index) Put(f Fingerprint, p block.Physical) {
	x.sweep()
	if f == None || !x.keeps(p) {
		return
	}
	e := entryOf(f, p)
	a, b := x.two(f)
	if x.buckets[a].find(e) >= 0 || x.buckets[b].find(e) >= 0 {
		return
	}
	if x.n >= len(x.buckets)*bucketSlots/fullDen*fullNum {
		x.thin()
		if !x.keeps(p) {
			return
		}
	}
	s := x.slot(a)
	if t := x.slot(b); s == nil || t != nil && x.buckets[a].used() > x.buckets[b].used() {
		s = t
	}
	if s == nil {
		s = x.makeRoom(a)
	}
	if s == nil {
		s = x.makeRoom(b)
	}
	if s == nil {
		// All are as good as this one. One gives way.
		s = &x.buckets[a][uint64(f)/bucketSlots%bucketSlots]
	}
	if *s == 0 {
		x.n++
	}
	*s = e
}

// slot returns one that is free, or that has an entry which is not to be kept, or nil.
func (x *Index) slot(bucket uint64) *uint64 {
	b := &x.buckets[bucket]
	var stale *uint64
	for i, e := range b {
		if e == 0 {
			return &b[i]
		}
		if !x.keeps(addressOf(e)) {
			stale = &b[i]
		}
	}
	return stale
}

// makeRoom moves an entry of a full bucket into its other one, if that has room, and
// returns the slot that it had.
func (x *Index) makeRoom(bucket uint64) *uint64 {
	b := &x.buckets[bucket]
	for i, e := range b {
		if s := x.slot(x.other(bucket, e>>addressBits)); s != nil {
			if *s != 0 {
				x.n--
			}
			*s, b[i] = e, 0
			return &b[i]
		}
	}
	return nil
}

func (b *bucket) used() (n int) {
	for _, e := range b {
		if e != 0 {
			n++
		}
	}
	return n
}

// thin makes the index keep half of the blocks that it has kept, unless that has
// been done and the others are not gone yet, or a block a track is what it keeps.
func (x *Index) thin() {
	if x.swept == len(x.buckets) && x.every < block.TrackBlocks {
		x.every *= 2
		x.swept = 0
	}
}

// sweepStep is how many buckets are looked at for each entry that is put: so a sweep
// is over long before the index is full again.
const sweepStep = 4

// sweep takes out entries that are not to be kept any more.
func (x *Index) sweep() {
	for end := min(x.swept+sweepStep, len(x.buckets)); x.swept < end; x.swept++ {
		b := &x.buckets[x.swept]
		for i, e := range b {
			if e != 0 && !x.keeps(addressOf(e)) {
				b[i] = 0
				x.n--
			}
		}
	}
}

// Delete takes an entry out, if there is one: the block holds something else.
func (x *Index) Delete(f Fingerprint, p block.Physical) {
	e := entryOf(f, p)
	a, b := x.two(f)
	for _, n := range [...]uint64{a, b} {
		b := &x.buckets[n]
		if i := b.find(e); i >= 0 {
			b[i] = 0
			x.n--
			return
		}
	}
}

// Candidates appends the addresses of blocks that may have the fingerprint.
func (x *Index) Candidates(f Fingerprint, to []block.Physical) []block.Physical {
	a, b := x.two(f)
	tag := uint64(f) & tagMask
	for _, n := range [...]uint64{a, b} {
		for _, e := range &x.buckets[n] {
			if e != 0 && e>>addressBits == tag {
				to = append(to, addressOf(e))
			}
		}
	}
	return to
}

// Thin makes the index keep at most one block of so many of a track, a power of two.
// What it has of others goes by and by.
func (x *Index) Thin(every int) {
	if n := uint64(every); n > x.every && n <= block.TrackBlocks && bits.OnesCount64(n) == 1 {
		x.every, x.swept = n, 0
	}
}
