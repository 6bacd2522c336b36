package dirty

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/planted"
)

// creditChunk is how many blocks are reserved at once ahead of use, so that
// not every write has to ask the allocator.
const creditChunk = 512

// Drops returns a number that changes whenever a generation is dropped. Who
// reads a block's old content first takes the number, and passes it on in
// Edge.
func (s *Set) Drops() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.drops
}

// Edge is a block of a write that the client's data fill only partly: bytes
// [From, To) of Extent's payload are the client's.
type Edge struct {
	LBA      block.Logical
	Extent   oplog.Extent
	From, To int
	// Filled says that the rest holds what the devices have for the block, as
	// read after Drops returned AsOf.
	Filled bool
	AsOf   uint64
}

// ErrEdge says that the rest of a partial block is not known: it has to be
// read (again), and the publication repeated.
var ErrEdge = errors.New("partial block must be read first")

// Publish makes records durable against the death of the guest and visible to
// readers. Their checksums must be filled in, except those of the edges. They are one
// change, of one volume: the first may be its tag. With
// an error nothing was published, and the extents still belong to the caller.
func (s *Set) Publish(recs []oplog.Record, edges []Edge) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.owned(); err != nil {
		return err
	}
	for i := range edges {
		if err := s.completeLocked(recs, &edges[i]); err != nil {
			return err
		}
	}
	return s.publishLocked(recs, false)
}

// publishLocked publishes complete records if the space for them can be
// reserved.
func (s *Set) publishLocked(recs []oplog.Record, owed bool) error {
	if recs[0].Kind == oplog.KindTag {
		return s.publishTaggedLocked(recs, owed)
	}
	if err := s.reserveLocked(recs, owed); err != nil {
		return err
	}
	s.storeLocked(recs)
	return nil
}

// publishTaggedLocked is publishLocked of a change with a tag.
func (s *Set) publishTaggedLocked(recs []oplog.Record, owed bool) error {
	if s.tags == nil {
		return fmt.Errorf("a change with a tag: %w", block.ErrUnsupported)
	}
	tag := recs[0].Tag()
	if err := s.tags.Begin(recs[0].Volume, tag); err != nil {
		return err
	}
	err := s.reserveLocked(recs, owed)
	if err == nil {
		s.storeLocked(recs)
	}
	s.tags.End(tag, err == nil)
	return err
}

// storeLocked publishes records for which there are space and permits.
func (s *Set) storeLocked(recs []oplog.Record) {
	if planted.Has(planted.TagAfterChange) && recs[0].Kind == oplog.KindTag {
		recs[0].Count = 0
		s.log.Publish(recs[1:])
		recs = recs[:1]
	}
	if _, ok := s.log.Publish(recs); !ok {
		panic("dirty: the ring is full although permits were held")
	}
	for i := range recs {
		s.active.insert(&recs[i])
	}
	if len(s.frozen) > 0 && s.active.permits >= int64(s.capacity/generations) {
		s.freezeLocked()
	}
}

// AllowTags must be called before the first change with a tag is published.
func (s *Set) AllowTags() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log.AllowTags()
}

// completeLocked fills the rest of a partial block from its newest version in the
// log, if there is one, and computes the block's checksum.
func (s *Set) completeLocked(recs []oplog.Record, e *Edge) error {
	id := recs[0].Volume
	slot, found := s.findLocked(id, e.LBA)
	page := s.log.Payload(e.Extent, 1)
	switch {
	case found && slot.IsHole():
		clear(page[:e.From])
		clear(page[e.To:])
	case found:
		old := s.log.Payload(slot.Extent, 1)
		if sum := ondisk.CRC(old); sum != slot.Sum {
			// The new block's checksum would make damage look sound.
			return &block.CorruptError{What: "block in the operation log", Where: fmt.Sprintf("block %d of volume %d", e.LBA, id),
				Why: fmt.Sprintf("checksum %08x instead of %08x", sum, slot.Sum)}
		}
		copy(page[:e.From], old[:e.From])
		copy(page[e.To:], old[e.To:])
	case !e.Filled || e.AsOf != s.drops && !planted.Has(planted.PartialBlockRace):
		return ErrEdge
	}
	for i := range recs {
		if r := &recs[i]; r.Kind == oplog.KindWrite && r.First <= e.Extent && e.Extent < r.First+oplog.Extent(r.Count) {
			if planted.Has(planted.PublishBeforeChecksum) && found {
				return nil
			}
			r.CRC[e.Extent-r.First] = ondisk.CRC(page)
			return nil
		}
	}
	panic("dirty: an edge outside its write")
}

// reserveLocked takes the space that recs need at most: one block for each
// block that was not dirty, and the pages of metadata that a fold will write
// for them and that were not reserved yet. Two records of one write may count
// the same page twice; that is settled with the generation.
func (s *Set) reserveLocked(recs []oplog.Record, owed bool) error {
	if planted.Has(planted.ReservationMissing) {
		return nil
	}
	var need int64
	trim := false
	for i := range recs {
		r := &recs[i]
		if r.Kind != oplog.KindWrite && r.Kind != oplog.KindZero {
			continue
		}
		if trim = trim || r.Kind == oplog.KindZero; r.Kind == oplog.KindWrite {
			for j := range r.Count {
				if old, ok := s.active.blocks.Get(block.Key(r.Volume, r.LBA) + j); !ok || old.IsHole() {
					need++
				}
			}
		}
		first, last := leavesOf(r)
		need += int64(s.active.pages.Missing(uint32(r.Volume), first))
		if last != first {
			need += int64(s.active.pages.Missing(uint32(r.Volume), last))
		}
	}
	if need > s.credit {
		switch want := need - s.credit; {
		case s.space.Reserve(want + creditChunk):
			s.credit += want + creditChunk
		case s.space.Reserve(want), trim && s.space.ReserveToFree(want), owed && s.space.ReserveOwed(want):
			s.credit += want
		default:
			return fmt.Errorf("reserve %d blocks: %w", need, block.ErrNoSpace)
		}
	}
	s.credit -= need
	s.active.reserved += need
	return nil
}

// ReturnCredit gives back what was reserved ahead of need. It is called before
// a write is refused for lack of space.
func (s *Set) ReturnCredit() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.space.Unreserve(s.credit)
	s.credit = 0
}
