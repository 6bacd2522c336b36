package dedup

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// KindIndex names the state of an index in memory that outlives its guest.
const KindIndex ondisk.Kind = "PLXindex"

const (
	stateVersion = 1
	stateLen     = 128 // of one copy; there are two

	// headBuckets is how many buckets the state takes the place of.
	headBuckets = 2 * stateLen / bucketBytes
)

// flags are what of a state is true or not.
type flags uint8

const (
	flagRound     flags = 1 << iota // the bit of the present round is set
	flagGoing                       // see Index
	flagAgain                       // see Index
	flagSuccessor                   // see Index
	flagBegun                       // see Round
	flagDone                        // see Round
	flagsKnown    = 1<<iota - 1
)

// set sets a flag, if it is to be set.
func (f *flags) set(flag flags, is bool) {
	if is {
		*f |= flag
	}
}

func (f flags) has(flag flags) bool { return f&flag != 0 }

// state is what an index keeps beside its entries.
type state struct {
	pool       block.PoolID
	check      uint64
	size       int64
	generation uint64
	order      uint32
	flags      flags
	every      uint16
	whole      uint64
	added      uint64
	entries    uint64
	round      Round
}

// encode fills p, which has stateLen bytes, all zero.
func (s *state) encode(p []byte) {
	le := binary.LittleEndian
	le.PutUint64(p[64:], s.check)
	le.PutUint64(p[72:], s.whole)
	le.PutUint64(p[80:], s.added)
	le.PutUint64(p[88:], s.entries)
	le.PutUint64(p[96:], s.round.Place.Leaf)
	le.PutUint32(p[104:], uint32(s.round.Place.Device))
	le.PutUint32(p[108:], s.order)
	le.PutUint16(p[112:], s.every)
	p[114], p[115] = uint8(bits.Len64(uint64(s.size))-1), uint8(s.flags)
	ondisk.Seal(p, ondisk.Header{Kind: KindIndex, Version: stateVersion, Length: stateLen, Pool: s.pool, Generation: s.generation})
}

// decode reads one copy. A state that it accepts is one that an index can be in, but for
// its numbers of entries, which nothing but savings depends on.
func (s *state) decode(p []byte) error {
	h, err := ondisk.Open(p, KindIndex, stateVersion)
	if err != nil {
		return err
	}
	if h.Length != stateLen {
		return corrupt("length %d instead of %d", h.Length, stateLen)
	}
	le := binary.LittleEndian
	*s = state{
		pool: h.Pool, generation: h.Generation, check: le.Uint64(p[64:]), whole: le.Uint64(p[72:]),
		added: le.Uint64(p[80:]), entries: le.Uint64(p[88:]), order: le.Uint32(p[108:]), every: le.Uint16(p[112:]),
		flags: flags(p[115]),
	}
	shift := int(p[114])
	if shift < bits.Len64(MinIndex)-1 || shift > maxShift {
		return corrupt("2 to the power of %d bytes", shift)
	}
	s.size = 1 << shift
	if n := s.every; n == 0 || n > block.TrackBlocks || n&(n-1) != 0 {
		return corrupt("one block in %d of a track", n)
	}
	if s.flags > flagsKnown {
		return corrupt("flags %#x", s.flags)
	}
	s.round = Round{Begun: s.flags.has(flagBegun), Done: s.flags.has(flagDone),
		Place: Place{int(le.Uint32(p[104:])), le.Uint64(p[96:])}}
	if going := s.flags.has(flagGoing); going != (s.round.Begun && !s.round.Done) {
		return corrupt("flags %#x", s.flags)
	}
	return nil
}

// maxShift bounds an index to 16 TiB, as a region is.
const maxShift = 44

// newest settles on the newer whole one of the two copies at the beginning of an index.
func (s *state) newest(head []byte) error {
	var a, b state
	errA, errB := a.decode(head[:stateLen]), b.decode(head[stateLen:2*stateLen])
	second, err := ondisk.Newer(errA, a.generation, errB, b.generation)
	if *s = a; second {
		*s = b
	}
	return err
}

func corrupt(why string, args ...any) error {
	return &block.CorruptError{What: "index of fingerprints", Where: "its state", Why: fmt.Sprintf(why, args...)}
}
