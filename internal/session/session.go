package session

import (
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
)

// Session is a session as one that opened it has it. It implements [block.Session].
type Session struct {
	t     *Table
	s     *live
	fresh bool
	over  bool // Close or Leave was called; guarded by the table's lock
}

var _ block.Session = (*Session)(nil)

// Fresh implements block.Session.
func (x *Session) Fresh() bool { return x.fresh }

// Done implements block.Session.
func (x *Session) Done(queue, slot int, counter uint64) (bool, error) {
	x.t.mu.Lock()
	defer x.t.mu.Unlock()
	s := x.s
	switch {
	case x.t.closed || s.gone:
		return false, fmt.Errorf("session %016x: %w", uint64(s.id), block.ErrClosed)
	case queue < 0 || queue >= int(s.queues) || slot < 0 || slot >= int(s.slots):
		return false, fmt.Errorf("session %016x: queue %d, slot %d, of %d queues of %d slots: %w",
			uint64(s.id), queue, slot, s.queues, s.slots, block.ErrInvalid)
	}
	if planted.Has(planted.DoneWrongSlot) {
		slot = (slot + 1) % int(s.slots)
	}
	last, ok := x.t.cell(s.cellOf(queue, slot))
	if !ok {
		return false, corrupt(fmt.Sprintf("session %016x, queue %d, slot %d", uint64(s.id), queue, slot),
			"nobody can tell whether its request was carried out; the slot's next request is kept track of again")
	}
	return counter != 0 && last == counter, nil
}

// Close implements block.Session.
func (x *Session) Close() {
	x.t.mu.Lock()
	defer x.t.mu.Unlock()
	if !x.over && !x.s.gone && !x.t.closed {
		x.t.removeLocked(x.s)
	}
	x.over = true
}

// Leave implements block.Session.
func (x *Session) Leave() {
	x.t.mu.Lock()
	defer x.t.mu.Unlock()
	if !x.over && !x.s.gone && !x.t.closed {
		if x.s.holders--; x.s.holders == 0 {
			x.t.stamp++
			x.t.leftLocked(x.s, x.t.stamp)
		}
	}
	x.over = true
}
