package blocktest

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"github.com/pollux-storage/pollux/internal/block"
)

// Content describes itself, so that a failure names what was found. It is
// made of 32-byte cells:
//
//	0  mark (8)  8  change (8)  16  offset of the cell in the volume (8)  24  check (8)
//
// The check is a hash of the seed, the change and the offset.
const (
	cellSize = 32
	cellMark = "\x89PLXcell"
)

// fill writes the content of a change at off of the volume into p. It is
// defined for each byte of the volume, so that any range can be filled.
func (m *Model) fill(p []byte, id int, off int64) {
	var cell [cellSize]byte
	copy(cell[:], cellMark)
	le := binary.LittleEndian
	for len(p) > 0 {
		at := off &^ (cellSize - 1)
		le.PutUint64(cell[8:], uint64(id))
		le.PutUint64(cell[16:], uint64(at))
		le.PutUint64(cell[24:], mix(m.seed, mix(uint64(id), uint64(at))))
		n := copy(p, cell[off-at:])
		p, off = p[n:], off+int64(n)
	}
}

// Describe says what a block of a Model's volume holds, for messages:
// "change 7 of block 3", with the sectors when they differ.
func Describe(data []byte) string {
	var parts []string
	var last string
	var first int
	flush := func(end int) {
		if last != "" {
			parts = append(parts, fmt.Sprintf("bytes %d-%d: %s", first, end-1, last))
		}
	}
	for at := 0; at+cellSize <= len(data); at += cellSize {
		if is := describeCell(data[at:at+cellSize], at); is != last {
			flush(at)
			last, first = is, at
		}
	}
	if len(parts) == 0 {
		return last
	}
	flush(len(data))
	if len(parts) > 16 {
		parts = append(parts[:16], fmt.Sprintf("and %d more pieces", len(parts)-16))
	}
	return strings.Join(parts, ", ")
}

func describeCell(c []byte, at int) string {
	le := binary.LittleEndian
	if string(c[:8]) == cellMark {
		off := le.Uint64(c[16:])
		if int(off%block.Size) != at%block.Size {
			return fmt.Sprintf("change %d of volume offset %d, shifted", le.Uint64(c[8:]), off)
		}
		return fmt.Sprintf("change %d of block %d", le.Uint64(c[8:]), off/block.Size)
	}
	if strings.Trim(string(c), "\x00") == "" {
		return "zeroes"
	}
	return "unknown bytes"
}

// touchedLocked returns the blocks that were ever touched, in order.
func (m *Model) touchedLocked() []block.Logical {
	out := make([]block.Logical, 0, len(m.byBlock))
	for b := range m.byBlock {
		out = append(out, b)
	}
	slices.Sort(out)
	return out
}

// historyLocked lists the changes of a block.
func (m *Model) historyLocked(b block.Logical) string {
	var s strings.Builder
	fmt.Fprintf(&s, "history of block %d:", b)
	list := m.byBlock[b]
	if len(list) > 12 {
		fmt.Fprintf(&s, " ... %d older,", len(list)-12)
		list = list[len(list)-12:]
	}
	for _, pos := range list {
		fmt.Fprintf(&s, " %s", m.changes[pos])
	}
	if len(list) == 0 {
		s.WriteString(" none left")
	}
	return s.String()
}

// String is "[#4: change 5, write 0+4096, acked]": position, number, what.
func (c *modelChange) String() string {
	kind, state := "write", "unacknowledged"
	if c.zero {
		kind = "zero"
	}
	switch {
	case c.void:
		state = "void"
	case c.acked:
		state = "acked"
	}
	return fmt.Sprintf("[#%d: change %d, %s %d+%d, %s]", c.pos+1, c.id, kind, c.off, c.n, state)
}

// contradictionLocked explains why no prefix fits: it names two blocks that
// no prefix satisfies together, or says that it takes more of them.
func (m *Model) contradictionLocked(found []blockState) error {
	// The newest and the oldest block disagree in nearly every case.
	newest, oldest := found[0], found[0]
	for _, st := range found {
		if st.spans[0].from > newest.spans[0].from {
			newest = st
		}
		if st.spans[len(st.spans)-1].to < oldest.spans[len(oldest.spans)-1].to {
			oldest = st
		}
	}
	if !overlap(newest.spans, oldest.spans) {
		return m.pairLocked(oldest, newest)
	}
	few := found[:min(len(found), 2000)] // the search is quadratic
	for i, x := range few {
		for _, y := range few[i+1:] {
			if !overlap(x.spans, y.spans) {
				return m.pairLocked(x, y)
			}
		}
	}
	return fmt.Errorf("%w: no prefix of %d changes (seed %d) fits all of %d blocks, though any two of the first %d agree",
		ErrModel, len(m.changes), m.seed, len(found), len(few))
}

func (m *Model) pairLocked(x, y blockState) error {
	return fmt.Errorf("%w: no prefix of %d changes (seed %d): block %d is as after %s, block %d as after %s; %s; %s",
		ErrModel, len(m.changes), m.seed, x.b, text(x.spans), y.b, text(y.spans),
		m.historyLocked(x.b), m.historyLocked(y.b))
}

// lostLocked names the first block that is older than promised.
func (m *Model) lostLocked(found []blockState, least int) string {
	for _, st := range found {
		if st.spans[len(st.spans)-1].to <= least {
			return fmt.Sprintf("block %d is as after %s; %s", st.b, text(st.spans), m.historyLocked(st.b))
		}
	}
	return "no single block shows it"
}

func overlap(x, y []span) bool {
	for _, a := range x {
		for _, b := range y {
			if a.from < b.to && b.from < a.to {
				return true
			}
		}
	}
	return false
}

func text(spans []span) string {
	var s []string
	for _, sp := range spans {
		if sp.from == sp.to-1 {
			s = append(s, fmt.Sprintf("#%d", sp.from))
		} else {
			s = append(s, fmt.Sprintf("#%d..%d", sp.from, sp.to-1))
		}
	}
	return strings.Join(s, " or ")
}
