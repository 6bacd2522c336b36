package ring

import (
	"fmt"

	"github.com/pollux-storage/pollux/internal/planted"
)

// Front is the submitting side of a queue, for one goroutine at a time. It believes
// nothing that it reads of the back-end's words.
type Front struct {
	tables
	free    []uint16 // slots
	counter []uint64 // of each slot in use; 0: free
	tail    uint64   // submissions put, published or not
	head    uint64   // completions taken
	cancels uint64
	broken  error
}

// NewFront returns the submitting side of queue q of a ring that was just made.
func NewFront(m *Memory, q int) *Front {
	f := &Front{tables: m.tables(q), counter: make([]uint64, m.shape.Entries)}
	for i := m.shape.Entries - 1; i >= 0; i-- {
		f.free = append(f.free, uint16(i))
	}
	return f
}

// Free returns how many entries can be put.
func (f *Front) Free() int { return len(f.free) }

// InFlight returns how many slots are in use.
func (f *Front) InFlight() int { return f.n - len(f.free) }

// Put writes an entry to a slot, sets its Counter and Slot, and returns the slot.
// There must be a free one, and not more than Segments segments. Nobody sees the
// entry before Publish.
func (f *Front) Put(e *Entry) int {
	last := len(f.free) - 1
	slot := int(f.free[last])
	f.free = f.free[:last]
	f.tail++
	e.Counter, e.Slot = f.tail, slot
	f.counter[slot] = f.tail
	if planted.Has(planted.RingSubmitEarly) {
		f.store(tailAt, f.tail)
	}
	at := f.slotAt(slot)
	var one Segment
	if len(e.Segs) > 0 {
		one = e.Segs[0]
	}
	if len(e.Segs) > 1 {
		for i, s := range e.Segs {
			put(f.mem, f.segsAt(slot)+16*i, s.Addr)
			put(f.mem, f.segsAt(slot)+16*i+8, s.Len)
		}
	}
	f.store(at+slotWhat, e.what())
	put(f.mem, at+slotOffset, uint64(e.Offset))
	put(f.mem, at+slotLength, uint64(e.Length))
	put(f.mem, at+slotSession, e.Tag.Session)
	put(f.mem, at+slotTag, e.Tag.Counter)
	put(f.mem, at+slotAddr, one.Addr)
	put(f.mem, at+slotLen, one.Len)
	f.store(at+slotCounter, f.tail)
	put(f.mem, f.sqAt(f.tail-1), uint64(slot))
	return slot
}

// Publish submits what was put, and says whether the back-end sleeps and is to be
// woken.
func (f *Front) Publish() (wake bool) {
	f.store(tailAt, f.tail)
	return f.load(backArmed) != 0
}

// Ready says whether Next has something.
func (f *Front) Ready() bool { return f.load(ctailAt) != f.head || f.broken != nil }

// Next takes a completion: its slot is free afterwards. The answer of the slot is valid
// until the next Put. It returns false when there is none, or an error when the
// back-end has written what it must not; then the queue is of no more use. Release
// must follow before the next Publish.
func (f *Front) Next() (Completion, bool, error) {
	if f.broken != nil {
		return Completion{}, false, f.broken
	}
	ctail := f.load(ctailAt)
	if ctail == f.head {
		return Completion{}, false, nil
	}
	if ctail-f.head > uint64(f.InFlight()) {
		return f.fail("%d completions of %d requests", ctail-f.head, f.InFlight())
	}
	at := f.cqAt(f.head)
	c := decodeCompletion(f.load(at), f.load(at+8))
	if c.Slot >= f.n {
		return f.fail("a completion of slot %d of %d", c.Slot, f.n)
	}
	if f.counter[c.Slot] == 0 || f.counter[c.Slot] != c.Counter {
		return f.fail("a completion of request %d in slot %d, which has request %d", c.Counter, c.Slot, f.counter[c.Slot])
	}
	if c.N > tableBytes {
		return f.fail("a completion of request %d with %d bytes of text or extents", c.Counter, c.N)
	}
	if planted.Has(planted.RingTakenEarly) {
		f.store(headAt, f.head+1)
	}
	f.store(f.slotAt(c.Slot)+slotCounter, 0)
	f.counter[c.Slot] = 0
	f.free = append(f.free, uint16(c.Slot))
	f.head++
	return c, true, nil
}

// Release says that all completions that Next has returned were taken.
func (f *Front) Release() { f.store(headAt, f.head) }

func (f *Front) fail(format string, args ...any) (Completion, bool, error) {
	f.broken = fmt.Errorf(format+": %w", append(args, ErrBroken)...)
	return Completion{}, false, f.broken
}

// Arm says that this side is about to sleep. It must look once more then.
func (f *Front) Arm() { f.store(frontArmed, 1) }

// Disarm says that it is awake.
func (f *Front) Disarm() { f.store(frontArmed, 0) }

// Cancel asks the back-end to end the request in a slot soon, and says whether it
// must be woken for that.
func (f *Front) Cancel(slot int) (wake bool) {
	if f.counter[slot] == 0 {
		return false
	}
	f.store(f.cancel+8*slot, f.counter[slot])
	f.cancels++
	f.store(cancelsAt, f.cancels)
	return f.load(backArmed) != 0
}

// Retract makes the entry in a slot one that does nothing. No back-end may be
// attached, nor attach meanwhile. The slot stays in use until the next one completes it.
func (f *Front) Retract(slot int) {
	f.store(f.slotAt(slot)+slotWhat, (&Entry{Op: OpNone}).what())
}

// Text returns what the back-end says of a failure.
func (f *Front) Text(c Completion) string {
	n := min(c.N, TextMax)
	var own [TextMax]byte
	for i := 0; i < n; i += 8 {
		put(own[:], i, f.load(f.answerAt(c.Slot)+i))
	}
	for i, b := range own[:n] {
		if b < ' ' || b > '~' { // a hostile back-end does not write to our terminals
			own[i] = '?'
		}
	}
	return string(own[:n])
}

// Extent returns extent i of the answer to a status, of the c.N that there are.
func (f *Front) Extent(c Completion, i int) Extent {
	at := f.answerAt(c.Slot) + 16*i
	return Extent{Length: f.load(at), State: f.load(at + 8)}
}
