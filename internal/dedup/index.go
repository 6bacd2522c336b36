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
// Nobody says when a block is freed or gets other content: its entry stays, leads to
// another fingerprint, and does no harm. So an index fills up with what is not true any
// more. Then its user goes once through all that is stored, between Begin and End, and
// puts it again; what was not put goes. Only if what is left nearly fills the index does
// it keep fewer blocks of each track.
//
// Invariants:
//
//	an entry is in one of the two buckets of its fingerprint, and once
//	entries behind the sweep, and all when none is under way, are of blocks
//	whose place in the track is a multiple of every, or that lie on one of the
//	devices that are kept whole, and of the present round
//	fresh <= entries <= slots
//
// In memory that outlives the guest the first buckets are taken by what has to be known
// beside the entries, see Save. Who adopts it trusts no entry and no number of them: both
// are put right by one look at all buckets, which is a sweep.
type Index struct {
	// Whole has a bit for each device of which all blocks are kept, however thin the
	// index is.
	Whole uint64
	// Round is how far the index is with what is stored.
	Round Round
	// Successor says that it takes the place of another when it is complete; Order is
	// higher than that of the other. Only who adopts one of several asks.
	Successor bool
	Order     uint32

	buckets []bucket
	first   int  // bucket that has entries
	shift   uint // of a fingerprint's bits, so that a bucket's number is left
	n       int  // entries
	fresh   int  // those of the present round
	round   uint64
	going   bool // a round is under way: entries of the one before may be as true
	again   bool // another round would find blocks that were left out
	every   uint64
	added   int // entries that were put and not there before, since the last round
	swept   int // buckets looked at since something had to go; len(buckets) when all are
	// counting says that n and fresh are only of the buckets that were swept, and guess
	// is how many entries there may be in all.
	counting bool
	guess    int

	mem        []byte
	kept       *Memory // nil for memory that goes with the guest
	generation uint64  // of the stored state
}

// An entry is, from the lowest bit on, an address, the round in which it was put last, and
// a tag.
const (
	bucketSlots = 8
	bucketBytes = bucketSlots * 8
	addressBits = 46 // as in a block.Pointer
	roundBit    = 1 << addressBits
	tagShift    = addressBits + 1
	tagMask     = 1<<(64-tagShift) - 1
)

type bucket [bucketSlots]uint64

// MinIndex is the size in bytes of the smallest index.
const MinIndex = 64 << 10

// Of so many sixteenths of the slots: with full in use a round should be made, if as many
// as renew were put anew since the last one: the same round once more would change nothing,
// and what the last one has left out is gone by then, because of sweepStep. With thin
// in use that are of the present round the index is thinned out: beyond that both buckets
// of an entry are full too often. So it is when a round leaves it with many, and when one
// leaves few it keeps more blocks again.
const full, renew, thin, many, few = 14, 1, 15, 12, 4

// IndexSize returns how many bytes an index has that may have limit: the largest power
// of two, MinIndex at least.
func IndexSize(limit int64) int64 {
	return max(MinIndex, int64(1)<<bits.Len64(uint64(max(limit, 1)))>>1)
}

// NewIndex returns an empty index of IndexSize.
func NewIndex(limit int64) (*Index, error) {
	size := IndexSize(limit)
	mem, err := hpdi.AllocPrivate(int(size))
	if err != nil {
		return nil, fmt.Errorf("index of fingerprints of %d bytes: %w", size, err)
	}
	return indexOf(mem), nil
}

// indexOf returns an index in memory of its size.
func indexOf(mem []byte) *Index {
	n := len(mem) / bucketBytes
	return &Index{
		buckets: unsafe.Slice((*bucket)(unsafe.Pointer(unsafe.SliceData(mem))), n),
		shift:   uint(64 - bits.Len(uint(n-1))), every: 1, swept: n, mem: mem,
	}
}

// Close frees the memory, but for what outlives the guest, which is left as it is. The
// index must not be used again.
func (x *Index) Close() error {
	if x.kept != nil {
		return nil
	}
	return hpdi.Free(x.mem)
}

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
	n := x.n
	if x.counting {
		n = max(n, x.guess)
	}
	return IndexStats{Bytes: int64(len(x.mem)), Entries: n, Slots: len(x.buckets) * bucketSlots, Every: int(x.every)}
}

// Full reports whether the index should be told what is stored, see Begin.
func (x *Index) Full() bool {
	return !x.going && (x.again || x.n >= x.part(full) && x.added >= x.part(renew))
}

// part returns how many slots so many sixteenths are.
func (x *Index) part(num int) int { return len(x.buckets) * bucketSlots / 16 * num }

// Begin begins a round: what is not put until End is taken out then. Meanwhile everything
// is found as before.
func (x *Index) Begin() {
	for x.swept < len(x.buckets) { // entries of two rounds ago would look like new ones
		x.sweep()
	}
	x.round ^= roundBit
	x.going, x.again, x.fresh = true, false, 0
	x.Round = Round{Begun: true}
}

// End ends a round.
func (x *Index) End() {
	x.Count(len(x.buckets))
	switch {
	case x.fresh > x.part(many) && x.every < block.TrackBlocks:
		x.every *= 2
	case x.fresh < x.part(few) && x.every > 1:
		x.every /= 2
		x.again = true
	}
	x.going, x.swept, x.added = false, x.first, 0
	x.Round.Done = true
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

func (x *Index) entryOf(f Fingerprint, p block.Physical) uint64 {
	return uint64(f)&tagMask<<tagShift | x.round | uint64(p)
}

func addressOf(entry uint64) block.Physical { return block.Physical(entry & (roundBit - 1)) }

// entries returns a bucket's entries, none for one that has other things.
func (x *Index) entries(bucket uint64) []uint64 {
	if bucket < uint64(x.first) {
		return nil
	}
	return x.buckets[bucket][:]
}

// find returns the slot of an entry, of whatever round, or nil.
func (x *Index) find(bucket, entry uint64) *uint64 {
	b := x.entries(bucket)
	for i, e := range b {
		if e&^roundBit == entry&^roundBit {
			return &b[i]
		}
	}
	return nil
}

// keeps reports whether the index has an entry for a block, if it has room.
func (x *Index) keeps(p block.Physical) bool {
	return uint64(p)%x.every == 0 || x.Whole>>p.Device()&1 != 0
}

// stays reports whether an entry is to be there.
func (x *Index) stays(e uint64) bool {
	return x.keeps(addressOf(e)) && (x.going || e&roundBit == x.round)
}

// set puts an entry, or none, in a slot.
func (x *Index) set(slot *uint64, e uint64) {
	counted := !x.counting || x.bucketOf(slot) < x.swept
	count := func(e uint64, by int) {
		if e != 0 && counted {
			x.n += by
			if e&roundBit == x.round {
				x.fresh += by
			}
		}
	}
	count(*slot, -1)
	count(e, 1)
	*slot = e
}

// bucketOf returns the number of a slot's bucket.
func (x *Index) bucketOf(slot *uint64) int {
	return int((uintptr(unsafe.Pointer(slot)) - uintptr(unsafe.Pointer(unsafe.SliceData(x.buckets)))) / bucketBytes)
}

// Put says that a block holds what has the fingerprint.
func (x *Index) Put(f Fingerprint, p block.Physical) {
	x.sweep()
	if f == None || !x.keeps(p) {
		return
	}
	e := x.entryOf(f, p)
	a, b := x.two(f)
	s := x.find(a, e)
	if s == nil {
		s = x.find(b, e)
	}
	if s == nil {
		// What goes because of that is not gone until the sweep is through.
		if x.fresh >= x.part(thin) && x.swept == len(x.buckets) && x.every < block.TrackBlocks {
			if x.Thin(2 * int(x.every)); !x.keeps(p) {
				return
			}
		}
		if s = x.room(a, b, f); s == nil {
			return
		}
		x.added++
	}
	x.set(s, e)
}

// room returns a slot for an entry in one of two buckets, or nil.
func (x *Index) room(a, b uint64, f Fingerprint) *uint64 {
	s := x.slot(a)
	if t := x.slot(b); s == nil || t != nil && used(x.entries(a)) > used(x.entries(b)) {
		s = t
	}
	if s == nil {
		s = x.makeRoom(a)
	}
	if s == nil {
		s = x.makeRoom(b)
	}
	if s == nil {
		// All are as good as this one. One gives way: an old one, if there is any.
		have := x.entries(a)
		if have == nil {
			return nil // it is not worth more
		}
		s = &have[uint64(f)/bucketSlots%bucketSlots]
		for i, e := range have {
			if e&roundBit != x.round {
				s = &have[i]
			}
		}
	}
	return s
}

// slot returns one that is free, or that has an entry which is not to be kept, or nil.
func (x *Index) slot(bucket uint64) *uint64 {
	b := x.entries(bucket)
	var stale *uint64
	for i, e := range b {
		if e == 0 {
			return &b[i]
		}
		if !x.stays(e) {
			stale = &b[i]
		}
	}
	return stale
}

// makeRoom moves an entry of a full bucket into its other one, if that has room, and
// returns the slot that it had.
func (x *Index) makeRoom(bucket uint64) *uint64 {
	b := x.entries(bucket)
	for i, e := range b {
		if s := x.slot(x.other(bucket, e>>tagShift)); s != nil {
			x.set(s, e)
			x.set(&b[i], 0)
			return &b[i]
		}
	}
	return nil
}

func used(entries []uint64) (n int) {
	for _, e := range entries {
		if e != 0 {
			n++
		}
	}
	return n
}

// sweepStep is how many buckets are looked at for each entry that is put: so a sweep
// is over long before the index is full again.
const sweepStep = 4

// sweep takes out entries that are not to be there any more.
func (x *Index) sweep() {
	for end := min(x.swept+sweepStep, len(x.buckets)); x.swept < end; x.swept++ {
		b := &x.buckets[x.swept]
		for i, e := range b {
			if e != 0 && !x.stays(e) {
				x.set(&b[i], 0)
				e = 0
			}
			if x.counting && e != 0 {
				x.n++
				if e&roundBit == x.round {
					x.fresh++
				}
			}
		}
	}
	x.counting = x.counting && x.swept < len(x.buckets)
}

// Delete takes an entry out, if there is one: the block holds something else.
func (x *Index) Delete(f Fingerprint, p block.Physical) {
	e := x.entryOf(f, p)
	a, b := x.two(f)
	for _, n := range [...]uint64{a, b} {
		if s := x.find(n, e); s != nil {
			x.set(s, 0)
			return
		}
	}
}

// Touch brings what Candidates and Put of these fingerprints will look at into the
// processor's cache, for all of them at once: one by one they are found as fast as memory
// answers. Inlined where nobody wants the sum it would touch nothing.
//
//go:noinline
func (x *Index) Touch(prints []Fingerprint) (sum uint64) {
	for _, f := range prints {
		a, b := x.two(f)
		sum += x.buckets[a][0] + x.buckets[b][0]
	}
	return sum
}

// Candidates appends the addresses of blocks that may have the fingerprint.
func (x *Index) Candidates(f Fingerprint, to []block.Physical) []block.Physical {
	a, b := x.two(f)
	tag := uint64(f) & tagMask
	for _, n := range [...]uint64{a, b} {
		for _, e := range x.entries(n) {
			if e != 0 && e>>tagShift == tag {
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
		x.Count(len(x.buckets))
		x.every, x.swept = n, x.first
	}
}
