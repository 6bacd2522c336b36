package ring

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/internal/spin"
)

// Request is an entry that a back-end is to run. It belongs to its Queue again once
// it is done.
type Request struct {
	Entry
	// Vec is the memory of a read or write. It is the front-end's, who may write
	// to it at any time.
	Vec [][]byte
	// Again says that an earlier back-end may have run it.
	Again bool
	// User is for the Runner, who finds there what it has left.
	User any

	extents int
	vecs    [Segments][]byte
}

// AddExtent adds to the answer to a status, and says whether there is room for more. It
// is for whoever has the request, on any goroutine.
func (q *Queue) AddExtent(r *Request, x Extent) (more bool) {
	if r.extents < Segments {
		q.back.PutExtent(r.Slot, r.extents, x)
		r.extents++
	}
	return r.extents < Segments
}

// finished is a request that has ended on another goroutine.
type finished struct {
	r      *Request
	status Status
	text   string
}

// Queue is a queue of a ring as the Runner of a back-end sees it. Its methods are for
// the goroutine that runs it, except Later.
type Queue struct {
	Number int // of the queue in its ring, from 0
	back   *Back
	facts  func() *Facts
	memory func(number uint16) []byte
	kick   *Bell // the front-end rings
	call   *Bell // this side rings
	spin   spin.Poller
	ready  func() bool
	also   func() bool

	first   bool      // no back-end was there before
	reqs    []Request // of each slot
	running int
	posted  bool // something waits for Flush
	left    bool // a request was abandoned
	paused  bool // see Pause

	stop atomic.Bool
	// drop is a memory that is to be no more, one more than its number; 0: none.
	drop    atomic.Int64
	dropped chan error
	sleep   atomic.Bool // Later is to ring

	mu    sync.Mutex // guards ended
	ended []finished
	spare []finished // the other memory of ended
	some  atomic.Bool
}

// newQueue returns a queue that serves back.
func newQueue(number int, back *Back, kick, call *Bell, poll time.Duration) *Queue {
	q := &Queue{Number: number, back: back, kick: kick, call: call, reqs: make([]Request, back.n), dropped: make(chan error, 1)}
	q.spin.Max = poll
	q.ended, q.spare = make([]finished, 0, back.n), make([]finished, 0, back.n)
	q.ready = func() bool {
		return !q.paused && !q.left && q.back.Ready() || q.some.Load() || q.stop.Load() || q.also != nil && q.also() || q.back.load(cancelsAt) != q.back.cancels || q.drop.Load() != 0
	}
	return q
}

// Stopping says that nothing new is to be begun: Next gives nothing any more. The
// runner ends what is running and returns.
func (q *Queue) Stopping() bool { return q.stop.Load() }

// Abandoned says that a request was left in the ring: Next gives nothing any more, and the
// runner ends the connection by an error, once all its requests are done.
func (q *Queue) Abandoned() bool { return q.left }

// Pause says whether Next is to give nothing, and Idle to wait for nothing of it, for now.
func (q *Queue) Pause(on bool) { q.paused = on }

// Running returns how many requests Next has given that are not done.
func (q *Queue) Running() int { return q.running }

// Depth returns how many requests there can be at once.
func (q *Queue) Depth() int { return q.back.n }

// Next returns the next request to be run, or nil when there is none, or an error when
// the front-end has broken the rules. What no device could do it answers by itself.
func (q *Queue) Next() (*Request, error) {
	if n := q.drop.Load(); n != 0 {
		if err := q.forget(uint64(n - 1)); err != nil {
			return nil, err
		}
	}
	for !q.stop.Load() && !q.left && !q.paused {
		slot, ok, err := q.take()
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, nil
		}
		r := &q.reqs[slot]
		q.running++
		if q.back.Canceled(slot) || r.Op == OpNone {
			q.Done(r, StatusCanceled, "it was called off before it began")
			continue
		}
		if status, why := q.check(r); status != StatusOK {
			q.Done(r, status, why)
			continue
		}
		return r, nil
	}
	return nil, nil
}

// forget answers whether a memory that is no longer there for new requests is in a
// running one.
func (q *Queue) forget(number uint64) (err error) {
	for slot := range q.reqs {
		if q.back.running[slot] == 0 {
			continue
		}
		for _, s := range q.reqs[slot].Segs {
			if s.Addr>>48 == number {
				err = q.back.Break("memory %d is to be forgotten while request %d in slot %d uses it", number, q.back.running[slot], slot)
			}
		}
	}
	q.drop.Store(0)
	q.dropped <- err
	return err
}

// take reads the next entry into the request of its slot.
func (q *Queue) take() (int, bool, error) {
	var e Entry
	ok, again, err := q.back.Take(&e)
	if err != nil || !ok {
		return 0, false, err
	}
	r := &q.reqs[e.Slot]
	r.Entry, r.Again, r.extents = e, again && !q.first, 0
	r.Vec = r.vecs[:0]
	for _, s := range e.Segs {
		mem, off := q.memory(uint16(s.Addr>>48)), s.Addr&(1<<48-1)
		if off > uint64(len(mem)) || s.Len > uint64(len(mem))-off {
			return 0, false, q.back.Break("%s in slot %d with %d bytes at %d of memory %d, which has %d", e.Op, e.Slot, s.Len, off, s.Addr>>48, len(mem))
		}
		r.Vec = append(r.Vec, mem[off:off+s.Len:off+s.Len])
	}
	return e.Slot, true, nil
}

// check returns why no device of these facts can run a request.
func (q *Queue) check(r *Request) (Status, string) {
	f := q.facts()
	if r.Flags&FlagDurable != 0 && (r.Op != OpWrite || !f.Durable) || r.Flags&FlagKeep != 0 && r.Op != OpWriteZeroes {
		return StatusUnsupported, "flags that do not fit"
	}
	changes := true
	switch r.Op {
	case OpFlush:
		return StatusOK, ""
	case OpRead:
		changes = false
	case OpWrite:
	case OpDiscard:
		if !f.Discard {
			return StatusUnsupported, "the device does not discard"
		}
	case OpWriteZeroes:
		if !f.Zeroes {
			return StatusUnsupported, "the device does not write zeroes by itself"
		}
	case OpStatus:
		changes = false
		if !f.Status {
			return StatusUnsupported, "the device does not tell what is allocated"
		}
	default:
		return StatusUnsupported, "an operation that is not known"
	}
	bs := int64(f.BlockSize)
	switch {
	case changes && f.ReadOnly:
		return StatusReadOnly, "the device is read-only"
	case r.Offset < 0 || r.Length < 0 || r.Offset > f.Size-r.Length:
		return StatusRange, "beyond the end of the device"
	case r.Offset%bs != 0 || r.Length%bs != 0:
		return StatusAlign, "not in whole blocks of the device"
	case len(r.Vec) > 0 && r.Length > f.MaxLength:
		return StatusInvalid, "longer than the device takes"
	}
	for _, s := range r.Segs {
		if s.Len%uint64(bs) != 0 || f.Direct && s.Addr%uint64(bs) != 0 {
			return StatusAlign, "memory that is not in whole blocks of the device"
		}
	}
	return StatusOK, ""
}

// Done completes a request; text is for a failure, and says what has failed. The front-end
// sees it at the next Flush. A request with status Abandon is not completed.
func (q *Queue) Done(r *Request, status Status, text string) {
	if status == Abandon {
		q.running--
		q.left = true
		return
	}
	n := r.extents
	if status != StatusOK {
		n = q.back.PutText(r.Slot, text)
	} else if r.Op != OpStatus {
		n = 0
	}
	q.running--
	q.posted = true
	q.back.Post(r.Slot, status, n)
}

// Later is Done for other goroutines. The request is completed by the goroutine of the
// queue in Reap, which is woken if it sleeps.
func (q *Queue) Later(r *Request, status Status, text string) {
	q.mu.Lock()
	q.ended = append(q.ended, finished{r, status, text})
	q.mu.Unlock()
	q.some.Store(true)
	if q.sleep.Load() {
		q.kick.Ring()
	}
}

// Reap completes what Later was told, and returns how many that were.
func (q *Queue) Reap() int {
	if !q.some.Load() {
		return 0
	}
	q.mu.Lock()
	q.some.Store(false)
	q.ended, q.spare = q.spare[:0], q.ended
	q.mu.Unlock()
	for _, f := range q.spare {
		q.Done(f.r, f.status, f.text)
	}
	n := len(q.spare)
	clear(q.spare)
	return n
}

// Flush shows the front-end what is done.
func (q *Queue) Flush() {
	if !q.posted {
		return
	}
	q.posted = false
	q.kick.Awake()
	if q.back.Publish() {
		q.call.Ring()
	}
}

// Cancels calls cancel for each running request that the front-end wants to end, if it
// has asked for any since the last call.
func (q *Queue) Cancels(cancel func(*Request)) {
	if !q.back.CancelsAsked() {
		return
	}
	for slot := range q.reqs {
		if q.back.Canceled(slot) {
			cancel(&q.reqs[slot])
		}
	}
}

// Canceled says whether the front-end has asked to end a request. It is for whoever has the
// request, on any goroutine.
func (q *Queue) Canceled(r *Request) bool { return q.back.Canceled(r.Slot) }

// Idle returns when there may be something to do: an entry, something of Later, a
// request to cancel, also says so, event, unless it is -1, is readable, or the queue is to stop.
// It looks for a while before it sleeps. d, unless it is negative, is the longest sleep.
func (q *Queue) Idle(event int, d time.Duration, also func() bool) error {
	q.Flush()
	q.also = also
	if q.spin.Poll(q.ready) {
		return nil
	}
	q.back.Arm()
	q.sleep.Store(true)
	var err error
	if !q.ready() {
		err = q.kick.Sleep(event, d)
	}
	q.sleep.Store(false)
	q.back.Disarm()
	q.spin.Woke()
	if err != nil {
		return fmt.Errorf("queue %d: %w", q.Number, err)
	}
	return nil
}

// halt makes the queue stop.
func (q *Queue) halt() {
	q.stop.Store(true)
	q.kick.Ring()
}

// end is called when the goroutine of the queue has ended: it answers for it that no
// memory is in use, whatever is asked.
func (q *Queue) end() { close(q.dropped) }
