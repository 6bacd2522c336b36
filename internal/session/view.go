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

// checkedAtOnce is how many slots are read in a row while changes wait.
const checkedAtOnce = 4096

// Check says what is damaged of the table, or cannot be, nothing of one without memory.
func (t *Table) Check() []error {
	m, entries, bad := t.outline()
	for i := range entries {
		info := infoOf(&entries[i].entry)
		for from := uint64(0); t.survey(&m, &entries[i].entry, &info, from); from += checkedAtOnce {
		}
		bad = append(bad, info.bad()...)
	}
	return bad
}

// outline reads all but the cells.
func (t *Table) outline() (m memory, entries []placed, bad []error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mem == nil {
		return m, nil, nil
	}
	if err := m.open(t.mem); err != nil {
		return m, nil, []error{fmt.Errorf("table of sessions: %w", err)}
	}
	entries, bad = m.outline()
	if len(entries) != len(t.live) {
		bad = append(bad, fmt.Errorf("it has %d sessions, in use are %d", len(entries), len(t.live)))
	}
	return m, entries, bad
}

// survey counts some cells of a session, and reports whether there are more. One that has
// ended meanwhile has none.
func (t *Table) survey(m *memory, e *entry, info *Info, from uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.live[e.id]; t.mem == nil || s == nil || s.first != e.first || from >= e.cells() {
		return false
	}
	m.survey(e, info, from, min(from+checkedAtOnce, e.cells()))
	return true
}

// Look reads the table in mem, which its owner may be changing: a slot that is stored just
// now may look damaged. Nothing is changed. The error says why mem has no table; bad says
// what is damaged of one, or cannot be.
func Look(mem []byte) (v View, bad []error, err error) {
	var m memory
	if err := m.open(mem); err != nil {
		return View{}, nil, fmt.Errorf("table of sessions: %w", err)
	}
	v = View{Pool: m.hdr.pool, Epoch: m.hdr.epoch, Cells: m.hdr.cells}
	entries, bad := m.outline()
	for i := range entries {
		e := &entries[i].entry
		info := infoOf(e)
		m.survey(e, &info, 0, e.cells())
		bad = append(bad, info.bad()...)
		v.Sessions = append(v.Sessions, info)
	}
	return v, bad, nil
}

// outline reads the headers and the entries.
func (m *memory) outline() (entries []placed, bad []error) {
	for i, at := range [...]int{0, headerTwin} {
		var h header
		if err := h.decode(m.mem[at:at+headerLen], len(m.mem)); err != nil {
			bad = append(bad, fmt.Errorf("header, copy at byte %d: %w", at, err))
		} else if i == 1 && h != m.hdr {
			bad = append(bad, errors.New("header: its two copies differ"))
		}
	}
	entries, misfits := m.entries()
	for _, x := range misfits {
		bad = append(bad, fmt.Errorf("entry %d: %w", x.place, x.err))
	}
	return entries, bad
}

// placed is an entry in its place, misfit one that is damaged, or cannot be beside others.
type (
	placed struct {
		entry
		place int
	}
	misfit struct {
		place int
		err   error
	}
)

// entries reads all entries: those that are right, in the order of their cells, and the
// others. Of two that exclude each other the first one is right.
func (m *memory) entries() (right []placed, wrong []misfit) {
	ids := map[block.SessionID]bool{}
	for place := range MaxSessions {
		e, err := m.entryAt(place)
		if err == nil && e.id == 0 {
			continue
		}
		at, _ := slices.BinarySearchFunc(right, e.first, func(p placed, first uint32) int { return cmp.Compare(p.first, first) })
		if err == nil && (ids[e.id] || at < len(right) && uint64(right[at].first) < uint64(e.first)+e.cells() ||
			at > 0 && uint64(e.first) < uint64(right[at-1].first)+right[at-1].cells()) {
			err = fmt.Errorf("session %016x is there twice, or its cells are another one's", uint64(e.id))
		}
		if err != nil {
			wrong = append(wrong, misfit{place, err})
			continue
		}
		ids[e.id] = true
		right = slices.Insert(right, at, placed{e, place})
	}
	return right, wrong
}

func infoOf(e *entry) Info {
	return Info{ID: e.id, Volume: e.volume, Queues: int(e.queues), Slots: int(e.slots), Since: e.since, Left: e.left}
}

// survey counts cells of a session.
func (m *memory) survey(e *entry, info *Info, from, to uint64) {
	for n := from; n < to; n++ {
		switch last, ok := m.cell(uint64(e.first) + n); {
		case !ok:
			info.Damaged++
		case last != 0:
			info.Used++
			info.Last = max(info.Last, last)
		}
	}
}

// bad says what is damaged of the session.
func (i *Info) bad() []error {
	if i.Damaged == 0 {
		return nil
	}
	return []error{fmt.Errorf("session %016x: %d of %d slots are damaged", uint64(i.ID), i.Damaged, i.Queues*i.Slots)}
}
