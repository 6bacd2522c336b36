package ring

// tables is a queue's part of a ring, by offset.
type tables struct {
	mem []byte // of the queue
	n   int    // entries

	sq, cq, cancel, slots, segs, answers int
}

func (m *Memory) tables(q int) tables {
	at, n := m.shape.queueAt(q), m.shape.Entries
	t := tables{mem: m.mem[at : at+m.shape.queueBytes() : at+m.shape.queueBytes()], n: n}
	t.sq = tablesAt
	t.cq = t.sq + 8*n
	t.cancel = t.cq + cqBytes*n
	t.slots = t.cancel + 8*n
	t.segs = t.slots + slotBytes*n
	t.answers = t.segs + tableBytes*n
	return t
}

// sqAt returns where the place of a position in the ring of submissions is.
func (t *tables) sqAt(pos uint64) int { return t.sq + 8*int(pos&uint64(t.n-1)) }

func (t *tables) cqAt(pos uint64) int { return t.cq + cqBytes*int(pos&uint64(t.n-1)) }

func (t *tables) slotAt(slot int) int { return t.slots + slotBytes*slot }

// segsAt returns where the table of a slot's segments is, answerAt that of its extents or
// text.
func (t *tables) segsAt(slot int) int { return t.segs + tableBytes*slot }

func (t *tables) answerAt(slot int) int { return t.answers + tableBytes*slot }

func (t *tables) load(off int) uint64 { return word(t.mem, off).Load() }

func (t *tables) store(off int, v uint64) { store(word(t.mem, off), v) }
