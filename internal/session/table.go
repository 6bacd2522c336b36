package session

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
)

// Table is the table of one pool. Its methods may be called concurrently except where they
// say otherwise. It has no memory until the first session is opened, or Adopt gave it some.
type Table struct {
	provide func() ([]byte, block.PoolID, block.Epoch, error)

	making sync.Mutex // held while memory or a session is made; above mu

	mu      sync.Mutex // guards all below
	memory             // mem is nil as long as there is none
	live    map[block.SessionID]*live
	stamp   uint64 // the highest left
	closed  bool
	begun   uint64 // the cell that Begin has found
	damaged int
	evicted uint64
	adopted time.Time // when the sessions of a guest that died were found
}

// live is a session of the table.
type live struct {
	entry
	place   int
	holders int  // who have opened it and not left
	gone    bool // it is in the table no more
	rank    int  // among those that may be forgotten, while room is looked for
}

// New returns a table without memory. provide makes some when it is needed, of Size bytes,
// all zero, for a table of that pool that is made in that epoch; it may take long.
func New(provide func() ([]byte, block.PoolID, block.Epoch, error)) *Table {
	return &Table{provide: provide, live: map[block.SessionID]*live{}}
}

// ErrNone says that memory has no table yet, and so no sessions are lost: the guest that got
// the memory died before it made one.
var ErrNone = errors.New("nobody has begun a table of sessions here")

// Adopt takes over the table that a guest before has left in mem. It drops what is damaged of
// it, and the sessions of volumes that there are no more. After an error, which says why mem
// has no table of the pool, or is ErrNone, nothing was changed. It must come before all else.
func (t *Table) Adopt(mem []byte, pool block.PoolID, exists func(block.VolumeID) bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var m memory
	if err := m.open(mem); err != nil {
		if len(bytes.TrimLeft(mem[:min(len(mem), cellsAt)], "\x00")) == 0 {
			return ErrNone
		}
		return err
	}
	if m.hdr.pool != pool {
		return corrupt("header", "it is of pool %v and not of %v", m.hdr.pool, pool)
	}
	t.memory, t.adopted = m, time.Now()
	good, bad := m.entries()
	for _, b := range bad {
		t.damaged++
		t.dropEntry(b.place)
	}
	for _, e := range good {
		if !exists(e.volume) {
			t.dropEntry(e.place)
			continue
		}
		t.live[e.id] = &live{entry: e.entry, place: e.place}
		t.stamp = max(t.stamp, e.left)
	}
	return nil
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
	t.making.Lock()
	defer t.making.Unlock()
	if err := t.ready(ctx); err != nil {
		return nil, fmt.Errorf("session on volume %s: %w", v.Name, err)
	}
	e := entry{id: id, volume: v.ID, queues: uint16(queues), slots: uint16(slots)}
	s, err := t.find(&e)
	fresh := s == nil && err == nil
	if fresh {
		s, err = t.enter(e, head)
	}
	if err != nil {
		return nil, fmt.Errorf("session %016x on volume %s with %d queues of %d slots: %w", uint64(id), v.Name, queues, slots, err)
	}
	return &Session{t: t, s: s, fresh: fresh}, nil
}

// ready makes sure that the table has memory. Table.making is held. What is made is no larger
// than what a pool finds for a client that waits: see readyBytes of package pool.
func (t *Table) ready(ctx context.Context) error {
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

// find opens the session of that number, if there is one.
func (t *Table) find(e *entry) (*live, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.live[e.id]
	switch {
	case t.closed:
		return nil, block.ErrClosed
	case s == nil:
		return nil, nil
	case s.volume != e.volume || s.queues != e.queues || s.slots != e.slots:
		return nil, fmt.Errorf("it has %d of %d, on volume number %d: %w", s.queues, s.slots, s.volume, block.ErrInvalid)
	}
	s.holders++
	t.leftLocked(s, 0)
	return s, nil
}

// enter makes a session, and opens it. Table.making is held: nobody else gets the same room,
// and the memory stays. Cells may be many, and are cleared while changes are published.
func (t *Table) enter(e entry, head func() block.Seq) (*live, error) {
	t.mu.Lock()
	r, err := t.roomLocked(&e)
	for _, s := range r.gone {
		t.evicted++
		t.removeLocked(s)
	}
	t.mu.Unlock()
	if err != nil {
		return nil, err
	}
	e.first = uint32(r.first)
	clear(t.mem[cellsAt+int(r.first)*cellLen:][:int(e.cells())*cellLen])
	t.mu.Lock()
	defer t.mu.Unlock()
	e.since = head()
	words := t.entryWords(r.place, &e)
	t.apply(words[:])
	s := &live{entry: e, place: r.place, holders: 1}
	t.live[e.id] = s
	return s, nil
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
	t.making.Lock()
	defer t.making.Unlock()
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
