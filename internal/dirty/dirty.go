// Package dirty is the index of what the operation log holds and the devices
// do not have yet: which extent of the log is the newest version of which
// block. It is rebuilt from the log after a crash and never stored.
//
// Writes go into the active generation. A consistency point freezes it: from
// then on it does not change, a new active one takes the writes, and when
// everything of the frozen one is on the devices it is dropped and its part of
// the log released. A look-up takes the answer of the youngest generation that
// has one.
//
// While a consistency point is under way the active generation is frozen
// whenever it has grown to a sixteenth of the log. Writers that have filled the
// log wait for the oldest generation only, and what is waiting to be dropped is
// of even size: without that a point that took long let the next one grow to
// the rest of the log, which then took longer still while all writers stood.
//
// Room in the log is handed out by permits, one for each extent and one for
// each hole, in the order in which it was asked for, so that
// large writes are not starved by small ones. The ring has at least twice as
// many slots as there are permits and can not overflow: what needs no permit is
// at most one tag for each change, which has at least one.
//
//	permits held = staged, unpublished extents + extents and holes of all generations
//
// # Locks
//
// mu guards the generations and serialises publication. A reader copies
// payload while it holds it shared, which is what makes releasing the extents
// of a dropped generation safe: after Drop has had the lock, nobody can still
// look at them. Below mu come only leaf locks (space, oplog's arena).
package dirty

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/semaphore"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/session"
	"github.com/pollux-storage/pollux/internal/space"
	"github.com/pollux-storage/pollux/internal/table"
)

// generations is into how many the log is divided while consistency points
// cannot keep up.
const generations = 16

// Set is the dirty index of one pool. Its methods may be called concurrently
// except where they say otherwise.
type Set struct {
	log      *oplog.Log
	space    *space.Space
	owned    func() error // nil while this guest owns the pool
	permits  *semaphore.Weighted
	capacity int          // of permits
	used     atomic.Int64 // permits in use
	waiting  atomic.Int64 // requests that wait for permits
	due      int64        // so many in use make a consistency point due
	prints   []uint64     // of what extents hold, see SetPrint
	tags     *session.Table
	full     func() // called, without locks, when somebody has to wait for room

	mu     sync.RWMutex
	active *Generation
	frozen []*Generation // oldest first
	spare  []*Generation // emptied, to become active
	credit int64         // reserved blocks not yet needed by a write
	drops  uint64        // generations dropped so far

	order table.Sorter // of who commits the oldest frozen generation
}

// Options says what a Set works with.
type Options struct {
	Log   *oplog.Log
	Space *space.Space
	// Permits is how many extents and records may be in use at once; the
	// log's capacity if 0. A log that came back from its devices is larger
	// than the pool's log was: more must not be published into it, or it would
	// not fit the next time.
	Permits int
	// Owned returns an error, of kind block.ErrStale, once another guest has
	// taken the pool. It is called for each publication and must be fast.
	Owned func() error
	// Tags is told of tagged changes; nil where there are none.
	Tags *session.Table
	// Due is how many permits in use make a consistency point due; a quarter
	// of all if 0, and at most three quarters.
	Due int
	// Full is called, often, while Due permits or more are in use: a
	// consistency point would help. It must not block.
	Full func()
}

// New returns an empty index over an empty or just replayed log.
func New(o Options) *Set {
	n := o.Log.Capacity()
	if o.Permits > 0 {
		n = min(n, o.Permits)
	}
	if o.Due == 0 {
		o.Due = n / 4
	}
	s := &Set{log: o.Log, space: o.Space, owned: o.Owned, tags: o.Tags, full: o.Full, due: int64(min(o.Due, n/4*3)), capacity: n,
		permits: semaphore.NewWeighted(int64(n)), prints: make([]uint64, o.Log.Capacity())}
	s.active = newGeneration(&s.order)
	return s
}

func (s *Set) findLocked(id block.VolumeID, lba block.Logical) (Slot, bool) {
	if planted.Has(planted.DirtyReadOrder) && len(s.frozen) > 0 {
		if slot, ok := s.frozen[0].find(id, lba); ok {
			return slot, true
		}
	}
	slot, ok := s.active.find(id, lba)
	for i := len(s.frozen) - 1; i >= 0 && !ok; i-- {
		slot, ok = s.frozen[i].find(id, lba)
	}
	return slot, ok
}

// Read calls found for each of n blocks from lba on that is dirty, with the
// block's index, its payload (nil for a hole) and checksum. The payload may be
// used only during the call. It returns how many blocks were found.
func (s *Set) Read(id block.VolumeID, lba block.Logical, n int, found func(i int, payload []byte, sum uint32)) int {
	count := 0
	s.mu.RLock()
	defer s.mu.RUnlock()
	for i := range n {
		slot, ok := s.findLocked(id, lba+block.Logical(i))
		if !ok {
			continue
		}
		count++
		if slot.IsHole() {
			found(i, nil, 0)
		} else {
			found(i, s.log.Payload(slot.Extent, 1), slot.Sum)
		}
	}
	return count
}

// Probe passes the way of a write up to the publication, without publishing.
func (s *Set) Probe() error {
	if ext, ok, err := s.TryAcquire(1, nil); err != nil {
		return err
	} else if ok {
		defer s.Give(ext)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.owned()
}

// Restore fills an empty index with the records of a log that was attached,
// after committed. Their space was reserved by whoever acknowledged them.
func (s *Set) Restore(committed block.Seq) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if head := s.log.Head(); committed > head {
		return &block.CorruptError{What: "operation log", Where: "memory",
			Why: fmt.Sprintf("it ends at position %d although %d is committed", head, committed)}
	}
	if tail := s.log.Tail(); committed < tail {
		return &block.CorruptError{What: "metadata journal", Where: fmt.Sprintf("log position %d", committed),
			Why: fmt.Sprintf("its last consistency points are missing: the operation log was released up to %d", tail)}
	}
	s.active.blocks.Grow(int(min(uint64(s.log.Head()-committed), uint64(s.capacity))))
	err := s.log.Replay(committed, s.log.Head(), func(r *oplog.Record) error {
		if planted.Has(planted.ReplaySkipsFirst) && s.active.permits == 0 {
			r.Kind = oplog.KindNop
		}
		if planted.Has(planted.ReplaySkipsLast) && r.Seq == s.log.Head() {
			r.Kind = oplog.KindNop
		}
		s.active.insert(r)
		if r.Kind == oplog.KindTag && s.tags != nil {
			s.tags.Restore(r.Tag(), r.Seq)
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.log.Release(committed)
	if !s.permits.TryAcquire(s.active.permits) {
		return &block.CorruptError{What: "operation log", Where: "memory", Why: "it holds more than fits"}
	}
	s.used.Add(s.active.permits)
	s.active.reserved = int64(s.active.blocks.Len() + s.active.pages.Len())
	s.space.ForceReserve(s.active.reserved)
	return nil
}

// Freeze returns the oldest frozen generation. When none is frozen it freezes
// the active one; nil says that nothing is dirty.
func (s *Set) Freeze() *Generation {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.frozen) == 0 {
		if s.active.records == 0 {
			return nil
		}
		s.freezeLocked()
	}
	return s.frozen[0]
}

func (s *Set) freezeLocked() {
	s.active.UpTo = s.log.Head()
	s.frozen = append(s.frozen, s.active)
	if n := len(s.spare); n > 0 {
		s.active, s.spare = s.spare[n-1], s.spare[:n-1]
	} else {
		s.active = newGeneration(&s.order)
	}
}

// Drop forgets the oldest frozen generation, which is on the devices and in the map,
// and releases its part of the log and its reservations.
func (s *Set) Drop() {
	s.mu.Lock()
	g := s.frozen[0]
	s.frozen = slices.Delete(s.frozen, 0, 1)
	s.drops++
	s.mu.Unlock()
	s.log.Release(g.UpTo)
	if !planted.Has(planted.ReservationLeak) {
		s.space.Unreserve(g.reserved)
	}
	permits := g.permits
	if planted.Has(planted.PermitLeak) {
		permits = min(permits, int64(g.blocks.Len()))
	}
	g.reset()
	s.mu.Lock()
	if len(s.spare) < generations/2 {
		s.spare = append(s.spare, g)
		g = nil
	}
	s.mu.Unlock()
	if g != nil {
		g.free()
	}
	s.givePermits(permits)
}

// Usage tells how much of the log is in use.
type Usage struct {
	Permits, Active, Frozen int64
	Due                     int64 // so many make a consistency point due
	Blocks                  int
	Bytes                   int64 // memory of the index
	Waiting                 int64 // requests that wait for room
}

// Usage returns the current usage.
func (s *Set) Usage() Usage {
	s.mu.RLock()
	defer s.mu.RUnlock()
	u := Usage{Permits: int64(s.Capacity()), Due: s.due, Active: s.active.permits, Blocks: s.active.blocks.Len(), Bytes: s.active.bytes(), Waiting: s.waiting.Load()}
	for _, g := range s.frozen {
		u.Frozen += g.permits
		u.Blocks += g.blocks.Len()
		u.Bytes += g.bytes()
	}
	for _, g := range s.spare {
		u.Bytes += g.bytes()
	}
	return u
}

// Head returns the position up to which everything acknowledged so far is
// published.
func (s *Set) Head() block.Seq { return s.log.Head() }
