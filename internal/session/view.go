package session

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
)

// Info is what a table says of a session.
type Info struct {
	ID            block.SessionID
	Volume        block.VolumeID
	Queues, Slots int
	Since         block.Seq // position of the log at which it began
	Left          uint64    // rises from one that was left to the next; 0 of one that was not
	Used          int       // slots with a submission
	Last          uint64    // highest counter of a submission
	Damaged       int       // slots of which nobody can tell what they had
}

// View is a table as somebody sees it who only looks.
type View struct {
	Pool     block.PoolID
	Epoch    block.Epoch // of the guest that made the table
	Cells    uint64      // slots that it has room for
	Sessions []Info      // in the order of their cells
}

// Check says what is damaged of the table, or cannot be, nothing of one without memory.
func (t *Table) Check() (bad []error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mem == nil {
		return nil
	}
	v, bad, err := Look(t.mem)
	if err != nil {
		return []error{err}
	}
	if len(v.Sessions) != len(t.live) {
		bad = append(bad, fmt.Errorf("it has %d sessions, in use are %d", len(v.Sessions), len(t.live)))
	}
	return bad
}

// Look reads the table in mem, which its owner may be changing: a slot that is stored just
// now may look damaged. Nothing is changed. The error says why mem has no table; bad says
// what is damaged of one, or cannot be.
func Look(mem []byte) (v View, bad []error, err error) {
	var m memory
	if err := m.open(mem); err != nil {
		return View{}, nil, fmt.Errorf("table of sessions: %w", err)
	}
	for i, at := range [...]int{0, headerTwin} {
		var h header
		if err := h.decode(mem[at:at+headerLen], len(mem)); err != nil {
			bad = append(bad, fmt.Errorf("header, copy at byte %d: %w", at, err))
		} else if i == 1 && h != m.hdr {
			bad = append(bad, errors.New("header: its two copies differ"))
		}
	}
	v = View{Pool: m.hdr.pool, Epoch: m.hdr.epoch, Cells: m.hdr.cells}
	var entries []entry
	for place := range MaxSessions {
		switch e, err := m.entryAt(place); {
		case err != nil:
			bad = append(bad, fmt.Errorf("entry %d: %w", place, err))
		case e.id != 0:
			entries = append(entries, e)
		}
	}
	slices.SortFunc(entries, func(a, b entry) int { return cmp.Compare(a.first, b.first) })
	ids := map[block.SessionID]bool{}
	end := uint64(0)
	for i := range entries {
		e := &entries[i]
		if ids[e.id] || uint64(e.first) < end {
			bad = append(bad, fmt.Errorf("session %016x is there twice, or its cells are another one's", uint64(e.id)))
		}
		ids[e.id] = true
		end = max(end, uint64(e.first)+e.cells())
		info := Info{ID: e.id, Volume: e.volume, Queues: int(e.queues), Slots: int(e.slots), Since: e.since, Left: e.left}
		for n := range e.cells() {
			switch last, ok := m.cell(uint64(e.first) + n); {
			case !ok:
				info.Damaged++
			case last != 0:
				info.Used++
				info.Last = max(info.Last, last)
			}
		}
		if info.Damaged > 0 {
			bad = append(bad, fmt.Errorf("session %016x: %d of %d slots are damaged", uint64(e.id), info.Damaged, e.cells()))
		}
		v.Sessions = append(v.Sessions, info)
	}
	return v, bad, nil
}
