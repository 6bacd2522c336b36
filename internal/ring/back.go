package ring

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/planted"
)

// Back is the serving side of a queue, for one goroutine at a time. It believes
// nothing that it reads of the front-end's words.
type Back struct {
	tables
	queue int
	ring  Shape

	first   []pending // submitted to an earlier back-end and not completed, in order
	taken   uint64    // submissions taken
	ctail   uint64    // completions posted, published or not
	running []uint64  // counter of what each slot has running; 0: nothing
	cancels uint64    // what was seen of the front-end's word
	segs    []Segment // of all slots
	broken  error
}

type pending struct {
	counter uint64
	slot    int
}

// NewBack returns the serving side of queue q, for a back-end that has attached: no
// other one runs. The queue goes on where the last back-end has ended.
func NewBack(m *Memory, q int) (*Back, error) {
	n := m.shape.Entries
	b := &Back{tables: m.tables(q), queue: q, ring: m.shape, running: make([]uint64, n), segs: make([]Segment, n*Segments)}
	b.store(backArmed, 0)
	if err := b.recover(); err != nil {
		return nil, err
	}
	return b, nil
}

// recover finds what was submitted and not completed. The front-end may go on
// meanwhile; what it submits from now on is taken from the ring as ever. The order of
// the loads matters: see the package's comment.
func (b *Back) recover() error {
	b.ctail = b.load(ctailAt)
	b.taken = b.load(tailAt)
	head := b.load(headAt)
	n := uint64(b.n)
	if b.ctail > b.taken || head > b.ctail || b.taken-head > n {
		return fmt.Errorf("queue %d with %d submissions, %d completions and %d of them taken: %w", b.queue, b.taken, b.ctail, head, ErrBroken)
	}
	done := make(map[uint64]bool, b.ctail-head)
	for pos := head; pos != b.ctail && !planted.Has(planted.RingRunsCompleted); pos++ {
		done[b.load(b.cqAt(pos))] = true
	}
	for slot := range b.n {
		c := b.load(b.slotAt(slot) + slotCounter)
		if c != 0 && c <= b.taken && !done[c] {
			b.first = append(b.first, pending{c, slot})
		}
	}
	if !planted.Has(planted.RingUnordered) {
		slices.SortFunc(b.first, func(x, y pending) int { return cmp.Compare(x.counter, y.counter) })
	}
	for i, p := range b.first {
		if i > 0 && p.counter == b.first[i-1].counter {
			return fmt.Errorf("queue %d has request %d in slots %d and %d: %w", b.queue, p.counter, b.first[i-1].slot, p.slot, ErrBroken)
		}
	}
	if have, want := uint64(len(b.first)), b.taken-b.ctail; have != want {
		return fmt.Errorf("queue %d has %d requests to be done, and %d submissions without completion: %w", b.queue, have, want, ErrBroken)
	}
	return nil
}

// Recovered returns how many requests of an earlier back-end are still to be taken.
func (b *Back) Recovered() int { return len(b.first) }

// Ready says whether Take has something.
func (b *Back) Ready() bool {
	return len(b.first) > 0 || b.load(tailAt) != b.taken || b.broken != nil
}

// InFlight returns how many requests were taken and not posted.
func (b *Back) InFlight() int { return int(b.taken-b.ctail) - len(b.first) }

// Take reads the next entry into e, and says whether there was one. again says that
// an earlier back-end may have done it already. An error says that the front-end has
// written what it must not; then the queue is of no more use.
func (b *Back) Take(e *Entry) (ok, again bool, err error) {
	if b.broken != nil {
		return false, false, b.broken
	}
	if len(b.first) > 0 {
		p := b.first[0]
		b.first = b.first[1:]
		return true, true, b.read(e, p.slot, p.counter)
	}
	tail := b.load(tailAt)
	if tail == b.taken {
		return false, false, nil
	}
	if head := b.load(headAt); head > b.ctail || tail < b.taken || tail-head > uint64(b.n) {
		return false, false, b.fail("%d submissions with %d taken, %d completions with %d taken", tail, b.taken, b.ctail, head)
	}
	slot := b.load(b.sqAt(b.taken))
	if slot >= uint64(b.n) {
		return false, false, b.fail("a submission in slot %d of %d", slot, b.n)
	}
	if err := b.read(e, int(slot), b.taken+1); err != nil {
		return false, false, err
	}
	b.taken++
	return true, false, nil
}

// read reads a slot once, and checks what does not depend on the device.
func (b *Back) read(e *Entry, slot int, counter uint64) error {
	at := b.slotAt(slot)
	if have := b.load(at + slotCounter); have != counter {
		return b.fail("request %d in slot %d, which has request %d", counter, slot, have)
	}
	if b.running[slot] != 0 {
		return b.fail("request %d in slot %d, where request %d is still running", counter, slot, b.running[slot])
	}
	what := b.load(at + slotWhat)
	*e = Entry{
		Op: Op(what), Flags: uint8(what >> 8), Counter: counter, Slot: slot,
		Offset: int64(b.load(at + slotOffset)), Length: int64(b.load(at + slotLength)),
		Tag: Tag{Session: b.load(at + slotSession), Queue: uint16(what >> 32), Slot: uint16(what >> 48), Counter: b.load(at + slotTag)},
	}
	n := int(uint16(what >> 16))
	moves := e.Op == OpRead || e.Op == OpWrite
	if n > Segments || n > 0 && !moves {
		return b.fail("%s in slot %d with %d segments", e.Op, slot, n)
	}
	if e.Flags&^allFlags != 0 {
		return b.fail("%s in slot %d with flags %#x", e.Op, slot, e.Flags)
	}
	if e.Tag.Session == 0 {
		e.Tag = Tag{b.ring.Session, uint16(b.queue), uint16(slot), counter}
	}
	e.Segs = b.segs[slot*Segments : slot*Segments+n]
	var sum uint64
	for i := range e.Segs {
		where := at + slotAddr
		if n > 1 {
			where = b.segsAt(slot) + 16*i
		}
		s := Segment{b.load(where), b.load(where + 8)}
		if s.Len == 0 || s.Len > MaxLength {
			return b.fail("%s in slot %d with a segment of %d bytes", e.Op, slot, s.Len)
		}
		sum += s.Len
		e.Segs[i] = s
	}
	if moves && (sum != uint64(e.Length) || sum > MaxLength) {
		return b.fail("%s of %d bytes in slot %d with segments of %d bytes", e.Op, e.Length, slot, sum)
	}
	b.running[slot] = counter
	return nil
}

// Break makes the queue one of a front-end that has broken the rules, and returns
// the error that Take gives from now on.
func (b *Back) Break(format string, args ...any) error { return b.fail(format, args...) }

func (b *Back) fail(format string, args ...any) error {
	if b.broken == nil {
		b.broken = fmt.Errorf("queue %d: "+format+": %w", append(append([]any{b.queue}, args...), ErrBroken)...)
	}
	return b.broken
}

// Post writes the completion of a slot that was taken, with n extents or bytes of text
// that are in its table. Nobody sees it before Publish.
func (b *Back) Post(slot int, status Status, n int) {
	counter := b.running[slot]
	if counter == 0 {
		panic("ring: completion of a slot that has nothing running")
	}
	b.running[slot] = 0
	if planted.Has(planted.RingCompleteEarly) {
		b.store(ctailAt, b.ctail+1)
	}
	at := b.cqAt(b.ctail)
	b.store(at, counter)
	b.store(at+8, Completion{Slot: slot, Status: status, N: n}.encode())
	b.ctail++
}

// Publish completes what was posted, and says whether the front-end sleeps and is to be
// woken.
func (b *Back) Publish() (wake bool) {
	b.store(ctailAt, b.ctail)
	return b.load(frontArmed) != 0
}

// Arm says that this side is about to sleep. It must look once more then.
func (b *Back) Arm() { b.store(backArmed, 1) }

// Disarm says that it is awake.
func (b *Back) Disarm() { b.store(backArmed, 0) }

// CancelsAsked says whether the front-end has asked to cancel something since the last
// call.
func (b *Back) CancelsAsked() bool {
	n := b.load(cancelsAt)
	if n == b.cancels {
		return false
	}
	b.cancels = n
	return true
}

// Canceled says whether what a slot has running was asked to be cancelled.
func (b *Back) Canceled(slot int) bool {
	return b.running[slot] != 0 && b.load(b.cancel+8*slot) == b.running[slot]
}

// PutText writes the text of a failure into the table of a slot, and returns its length
// for Post.
func (b *Back) PutText(slot int, text string) int {
	n := min(len(text), TextMax)
	var own [TextMax]byte
	copy(own[:], text[:n])
	for i := 0; i < n; i += 8 {
		b.store(b.answerAt(slot)+i, word(own[:], i).Load())
	}
	return n
}

// PutExtent writes extent i of an answer, which is less than Segments.
func (b *Back) PutExtent(slot, i int, x Extent) {
	at := b.answerAt(slot) + 16*i
	b.store(at, x.Length)
	b.store(at+8, x.State)
}
