package session

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
)

// Table is the table of one pool. Its methods may be called concurrently except where they
// say otherwise. It has no memory until the first session is opened, or Adopt gave it some.
type Table struct {
	provide func() ([]byte, block.PoolID, block.Epoch, error)

	providing sync.Mutex // held while memory is made; above mu

	mu      sync.Mutex // guards all below
	memory             // mem is nil as long as there is none
	live    map[block.SessionID]*live
	stamp   uint64 // the highest left
	closed  bool
	begun   uint64 // the cell that Begin has found
	damaged int
	evicted uint64
}

// live is a session of the table.
type live struct {
	entry
	place   int
	holders int  // who have opened it and not left
	gone    bool // it is in the table no more
}

// New returns a table without memory. provide makes some when it is needed, of Size bytes,
// all zero, for a table of that pool that is made in that epoch; it may take long.
func New(provide func() ([]byte, block.PoolID, block.Epoch, error)) *Table {
	return &Table{provide: provide, live: map[block.SessionID]*live{}}
}

// Adopt takes over the table that a guest before has left in mem. It drops what is damaged of
// it, and the sessions of volumes that there are no more. After an error, which says why mem
// has no table of the pool, nothing was changed. It must come before all else.
func (t *Table) Adopt(mem []byte, pool block.PoolID, exists func(block.VolumeID) bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var m memory
	if err := m.open(mem); err != nil {
		return err
	}
	if m.hdr.pool != pool {
		return corrupt("header", "it is of pool %v and not of %v", m.hdr.pool, pool)
	}
	t.memory = m
	for place := range MaxSessions {
		e, err := t.entryAt(place)
		if err == nil && e.id == 0 {
			continue
		}
		if err == nil && (t.live[e.id] != nil || t.takenLocked(&e)) {
			err = errors.New("it is there twice, or its cells are another one's")
		}
		if err != nil {
			t.damaged++
		}
		if err != nil || !exists(e.volume) {
			t.dropEntry(place)
			continue
		}
		t.live[e.id] = &live{entry: e, place: place}
		t.stamp = max(t.stamp, e.left)
	}
	return nil
}

// takenLocked reports whether another session has some of its cells.
func (t *Table) takenLocked(e *entry) bool {
	for _, o := range t.live {
		if uint64(e.first) < uint64(o.first)+o.cells() && uint64(o.first) < uint64(e.first)+e.cells() {
			return true
		}
	}
	return false
}

// Begin begins the publication of a tagged change of a volume, which End must follow; or it
// returns an error, a block.ErrInvalid for a tag that cannot be and a block.ErrClosed for one
// of no session, and nothing was begun. A tag of the table is not forgotten between the two.
func (t *Table) Begin(id block.VolumeID, tag block.Tag) error {
	t.mu.Lock()
	s := t.live[tag.Session]
	var err error
	switch {
	case t.closed || s == nil:
		err = fmt.Errorf("session %016x: %w", uint64(tag.Session), block.ErrClosed)
	case s.volume != id || tag.Counter == 0 || tag.Queue >= s.queues || tag.Slot >= s.slots:
		err = fmt.Errorf("queue %d, slot %d, submission %d of session %016x, which has %d queues of %d slots, on volume %d: %w",
			tag.Queue, tag.Slot, tag.Counter, uint64(tag.Session), s.queues, s.slots, id, block.ErrInvalid)
	default:
		t.begun = s.cellOf(int(tag.Queue), int(tag.Slot))
		return nil
	}
	t.mu.Unlock()
	return err
}

// cellOf returns the cell of a slot.
func (s *live) cellOf(queue, slot int) uint64 {
	return uint64(s.first) + uint64(queue)*uint64(s.slots) + uint64(slot)
}

// End ends what Begin began; published says whether the change, with its tag, is in the log.
func (t *Table) End(tag block.Tag, published bool) {
	if published && !planted.Has(planted.TagForgotten) {
		t.putCell(t.begun, tag.Counter)
	}
	t.mu.Unlock()
}

// Restore enters a tag that is in the log at a position. It is called for all that are not
// released, in their order, by who has opened the pool.
func (t *Table) Restore(tag block.Tag, seq block.Seq) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.live[tag.Session]
	if s == nil || seq <= s.since || tag.Queue >= s.queues || tag.Slot >= s.slots {
		return
	}
	t.putCell(s.cellOf(int(tag.Queue), int(tag.Slot)), tag.Counter)
}

// Open is block.Sessions.OpenSession for a volume. head returns the position of the last
// record of the log.
func (t *Table) Open(ctx context.Context, v block.VolumeInfo, id block.SessionID, queues, slots int, head func() block.Seq) (*Session, error) {
	if id == 0 || queues < 1 || queues > MaxQueues || slots < 1 || slots > MaxSlots {
		return nil, fmt.Errorf("session %016x on volume %s with %d queues of %d slots; 1 to %d queues of 1 to %d slots are possible: %w",
			uint64(id), v.Name, queues, slots, MaxQueues, MaxSlots, block.ErrInvalid)
	}
	if err := t.ready(ctx); err != nil {
		return nil, fmt.Errorf("session on volume %s: %w", v.Name, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, fmt.Errorf("session on volume %s: %w", v.Name, block.ErrClosed)
	}
	s, fresh := t.live[id], false
	switch {
	case s == nil:
		e := entry{id: id, volume: v.ID, queues: uint16(queues), slots: uint16(slots), since: head()}
		var err error
		if s, err = t.makeLocked(e); err != nil {
			return nil, fmt.Errorf("session on volume %s: %w", v.Name, err)
		}
		fresh = true
	case s.volume != v.ID || int(s.queues) != queues || int(s.slots) != slots:
		return nil, fmt.Errorf("session %016x on volume %s with %d queues of %d slots: it has %d of %d, on volume number %d: %w",
			uint64(id), v.Name, queues, slots, s.queues, s.slots, s.volume, block.ErrInvalid)
	}
	s.holders++
	t.leftLocked(s, 0)
	return &Session{t: t, s: s, fresh: fresh}, nil
}

// ready makes sure that the table has memory.
func (t *Table) ready(ctx context.Context) error {
	t.providing.Lock()
	defer t.providing.Unlock()
	t.mu.Lock()
	have := t.mem != nil || t.closed
	t.mu.Unlock()
	if have {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	mem, pool, epoch, err := t.provide()
	if err != nil {
		return err
	}
	h := header{pool: pool, epoch: epoch, cells: uint64(len(mem)-cellsAt) / cellLen}
	_, _ = rand.Read(h.identity[:]) // documented never to fail
	h.encode(mem[:headerLen])
	h.encode(mem[headerTwin : headerTwin+headerLen])
	t.mu.Lock()
	defer t.mu.Unlock()
	t.memory = memory{mem, h, h.seed()}
	return nil
}

// makeLocked enters a new session, for which others that were left may have to go.
func (t *Table) makeLocked(e entry) (*live, error) {
	if e.cells() > t.hdr.cells {
		return nil, fmt.Errorf("%d queues of %d slots, at most %d slots together are possible: %w", e.queues, e.slots, t.hdr.cells, block.ErrInvalid)
	}
	for {
		place := t.freePlaceLocked()
		first, ok := t.freeCellsLocked(e.cells())
		if ok && place >= 0 {
			e.first = uint32(first)
			s := &live{entry: e, place: place}
			clear(t.mem[cellsAt+int(first)*cellLen:][:int(e.cells())*cellLen])
			words := t.entryWords(place, &e)
			t.apply(words[:])
			t.live[e.id] = s
			return s, nil
		}
		if !t.evictLocked() {
			return nil, fmt.Errorf("%d sessions are open, and no memory is left for %d slots more: %w", len(t.live), e.cells(), block.ErrNoSpace)
		}
	}
}

func (t *Table) freePlaceLocked() int {
	var used [MaxSessions]bool
	for _, s := range t.live {
		used[s.place] = true
	}
	return slices.Index(used[:], false)
}

// freeCellsLocked finds the first n cells in a row that are no session's.
func (t *Table) freeCellsLocked(n uint64) (first uint64, ok bool) {
	all := make([]*live, 0, len(t.live))
	for _, s := range t.live {
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b *live) int { return cmp.Compare(a.first, b.first) })
	for _, s := range all {
		if first+n <= uint64(s.first) {
			return first, true
		}
		first = uint64(s.first) + s.cells()
	}
	return first, first+n <= t.hdr.cells
}

// evictLocked forgets the session that was left first, if there is one. One that nobody has
// opened since its guest died counts as left last.
func (t *Table) evictLocked() bool {
	var oldest *live
	for _, s := range t.live {
		if s.holders == 0 && (oldest == nil || cmp.Compare(s.left-1, oldest.left-1) < 0 || s.left == oldest.left && s.place < oldest.place) {
			oldest = s
		}
	}
	if oldest == nil {
		return false
	}
	t.evicted++
	t.removeLocked(oldest)
	return true
}

func (t *Table) removeLocked(s *live) {
	t.dropEntry(s.place)
	s.gone = true
	delete(t.live, s.id)
}

func (t *Table) leftLocked(s *live, stamp uint64) {
	s.left = stamp
	t.store(entriesAt+s.place*entryLen+leftAt, stamp)
}

// Forget forgets the sessions of a volume that is deleted.
func (t *Table) Forget(id block.VolumeID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.live {
		if s.volume == id && !t.closed {
			t.removeLocked(s)
		}
	}
}

// Shut ends the use of the memory, which may be unmapped afterwards: sessions stay in it as
// they are, and answer with block.ErrClosed.
func (t *Table) Shut() {
	t.providing.Lock()
	defer t.providing.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed, t.mem = true, nil
}

// Stats is what monitoring sees of a table.
type Stats struct {
	Sessions int    // in the table
	Open     int    // of them that somebody has open
	Evicted  uint64 // forgotten for want of memory, by this guest
	Damaged  int    // entries that were damaged when this guest found them
	Bytes    int64  // of the region
}

// Stats returns the present figures.
func (t *Table) Stats() Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	st := Stats{Sessions: len(t.live), Evicted: t.evicted, Damaged: t.damaged, Bytes: int64(len(t.mem))}
	for _, s := range t.live {
		if s.holders > 0 {
			st.Open++
		}
	}
	return st
}
