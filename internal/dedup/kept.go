package dedup

import (
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// Memory is memory that outlives a guest, and the index in it with it.
type Memory struct {
	// Bytes begins at a page, and is the index's alone.
	Bytes []byte
	Pool  block.PoolID
	// Check is a fingerprint that depends on the pool's secret: an index made with
	// another one finds nothing.
	Check Fingerprint
	// Free gives the memory back, for Drop.
	Free func() error
}

// Round is how far whoever fills an index has come with it. It is kept with the index.
type Round struct {
	Begun, Done bool
	Place       Place
}

// Place is a place among the fingerprints of a pool.
type Place struct {
	Device int
	Leaf   uint64
}

// NewIndexIn returns an empty index of IndexSize in memory that is all zero and has as much.
func NewIndexIn(m Memory, limit int64) (*Index, error) {
	size := IndexSize(limit)
	if int64(len(m.Bytes)) < size {
		return nil, fmt.Errorf("index of fingerprints of %d bytes in %d bytes of memory: %w", size, len(m.Bytes), block.ErrInvalid)
	}
	x := indexOf(m.Bytes[:size])
	x.keep(m)
	x.Save()
	return x, nil
}

// AdoptIndex returns the index that somebody has left in memory, or an error that says why
// that is none of the pool's. It looks at none of the entries: whatever they are, they lead
// to blocks that are not what was looked for, as those of blocks that were freed do. How
// many there are is known when all have been counted, see Count.
func AdoptIndex(m Memory) (*Index, error) {
	s, err := stateOf(m.Bytes)
	if err != nil {
		return nil, err
	}
	if s.pool != m.Pool || s.check != uint64(m.Check) {
		return nil, corrupt("it is of pool %v, or was made with another secret", s.pool)
	}
	x := indexOf(m.Bytes[:s.size])
	x.keep(m)
	x.generation = s.generation
	x.Whole, x.Successor, x.Order, x.Round = s.whole, s.flags.has(flagSuccessor), s.order, s.round
	x.every = uint64(s.every)
	if s.flags.has(flagRound) {
		x.round = roundBit
	}
	x.going, x.again = s.flags.has(flagGoing), s.flags.has(flagAgain)
	slots := uint64(len(x.buckets) * bucketSlots)
	x.added, x.guess = int(min(s.added, slots)), int(min(s.entries, slots))
	x.counting, x.swept = true, x.first
	return x, nil
}

// stateOf returns the state of the index in memory.
func stateOf(mem []byte) (s state, err error) {
	if len(mem) < MinIndex {
		return s, corrupt("only %d bytes of memory", len(mem))
	}
	if err := s.newest(mem[:2*stateLen]); err != nil {
		return s, err
	}
	if s.size > int64(len(mem)) {
		return s, corrupt("%d bytes in %d bytes of memory", s.size, len(mem))
	}
	return s, nil
}

// keep makes an index one whose state is kept at its beginning.
func (x *Index) keep(m Memory) {
	x.kept = &m
	x.first, x.swept = headBuckets, len(x.buckets)
}

// Save stores what an index has beside its entries, where it outlives the guest. It is
// called when entries of a consistency point are put, and for each change of a round: what
// happens in between may be lost, and costs some savings.
func (x *Index) Save() {
	if x.kept == nil {
		return
	}
	x.generation++
	s := state{
		pool: x.kept.Pool, check: uint64(x.kept.Check), size: int64(len(x.mem)), generation: x.generation,
		order: x.Order, every: uint16(x.every), whole: x.Whole, added: uint64(max(0, x.added)), entries: uint64(x.Stats().Entries),
		round: x.Round,
	}
	s.flags.set(flagRound, x.round != 0)
	s.flags.set(flagGoing, x.going)
	s.flags.set(flagAgain, x.again)
	s.flags.set(flagSuccessor, x.Successor)
	s.flags.set(flagBegun, x.Round.Begun)
	s.flags.set(flagDone, x.Round.Done)
	var p [stateLen]byte
	s.encode(p[:])
	ondisk.StoreWords(x.mem[x.generation%2*stateLen:], p[:]) // the copy that is older, behind the entries
}

// Kept returns how many bytes of memory that outlives the guest the index takes, with what
// it does not use of them; 0 if it does not outlive it.
func (x *Index) Kept() int64 {
	if x.kept == nil {
		return 0
	}
	return int64(len(x.kept.Bytes))
}

// Counting reports whether the entries of an index that was adopted have to be counted.
func (x *Index) Counting() bool { return x.counting }

// Count counts the entries of some buckets, and takes out what is not to be there. Put
// does the same by the way, and a round waits for the rest.
func (x *Index) Count(buckets int) {
	for ; buckets > 0 && x.counting; buckets -= sweepStep {
		x.sweep()
	}
}

// Renew makes the index want another round, after the one under way.
func (x *Index) Renew() {
	if x.again = x.going; !x.going {
		x.Round = Round{}
	}
}

// Drop gives back the memory of an index that is not to be there any more. The index must
// not be used again.
func (x *Index) Drop() error {
	if x.kept == nil {
		return x.Close()
	}
	return x.kept.Free()
}

// Facts are what the state of an index in memory says of it.
type Facts struct {
	Pool       block.PoolID
	Generation uint64
	IndexStats
	Round     Round
	Successor bool
}

// FactsBytes is how much of the beginning of an index ReadFacts needs.
const FactsBytes = 2 * stateLen

// ReadFacts reads the state from the beginning of an index, for whoever only looks.
func ReadFacts(head []byte) (Facts, error) {
	if len(head) < FactsBytes {
		return Facts{}, corrupt("only %d bytes of memory", len(head))
	}
	var s state
	if err := s.newest(head[:FactsBytes]); err != nil {
		return Facts{}, err
	}
	slots := uint64(s.size / 8)
	return Facts{Pool: s.pool, Generation: s.generation, Round: s.round, Successor: s.flags.has(flagSuccessor),
		IndexStats: IndexStats{Bytes: s.size, Entries: int(min(s.entries, slots)), Slots: int(slots), Every: int(s.every)}}, nil
}
