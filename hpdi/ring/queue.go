package ring

import (
	"errors"
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	core "github.com/pollux-storage/pollux/internal/ring"
	"github.com/pollux-storage/pollux/internal/spin"
)

// op is a request that is under way, as one entry of the ring or several.
type op struct {
	r       *hpdi.Request
	left    int // entries that have not completed
	more    bool
	wanted  bool // it was asked to be cancelled
	late    bool // because its deadline passed
	answers error
}

// queue is a path to the device for one goroutine at a time.
type queue struct {
	d          *device
	number     int
	limit      int // slots in use at once
	f          *core.Front
	kick, call *core.Bell
	spin       spin.Poller
	ready      func() bool

	ops    []op
	free   []int32 // of ops
	slots  []int32 // op of each slot; none: nobody waits for it
	flight int     // requests that are under way
	timed  int     // of these, how many have a deadline
	wanted int     // of these, how many were asked to be cancelled
	put    bool    // something waits to be published
	events bool    // the application has the descriptor
	broken bool    // nothing is taken from the ring any more
	closed bool
	done   []*hpdi.Request
	entry  core.Entry
	addrs  []core.Segment
	segs   [core.Segments]core.Segment
}

const none = -1

func newQueue(d *device, number, depth int) *queue {
	f := d.fronts[number]
	n := f.Free() + f.InFlight()
	q := &queue{d: d, number: number, limit: min(depth, n), f: f, kick: d.bells[2*number], call: d.bells[2*number+1], ops: make([]op, n+1)}
	q.spin.Max = d.o.Poll
	for i := range q.ops {
		q.free = append(q.free, int32(i))
	}
	for range n {
		q.slots = append(q.slots, none)
	}
	q.done = make([]*hpdi.Request, 0, n+1)
	q.ready = func() bool {
		return !q.broken && q.f.Ready() || q.d.dead.Load() || q.wanted > 0 && !q.d.attached.Load()
	}
	return q
}

func (q *queue) wrap(err error) error { return q.d.wrap(fmt.Errorf("queue %d: %w", q.number, err)) }

// Submit puts requests into the ring. While the queue is full it waits for completions.
func (q *queue) Submit(reqs ...*hpdi.Request) error {
	if q.closed {
		return q.wrap(hpdi.ErrClosed)
	}
	if q.d.dead.Load() {
		return q.d.err
	}
	k := q.d.known()
	for _, r := range reqs {
		q.start(k, r)
	}
	q.publish()
	if q.events && len(q.done) > 0 {
		q.call.Ring()
	}
	return nil
}

// start checks a request and puts it into the ring.
func (q *queue) start(k *facts, r *hpdi.Request) {
	err := r.Check(k.Info)
	if err == nil && !r.Deadline.IsZero() {
		err = r.Late(time.Now())
	}
	if err == nil {
		err = q.resolve(r)
	}
	r.Err = err
	if err != nil || r.Op != hpdi.OpFlush && r.Bytes() == 0 {
		q.done = append(q.done, r)
		return
	}
	last := len(q.free) - 1
	n := q.free[last]
	q.free = q.free[:last]
	o := &q.ops[n]
	*o = op{r: r, more: true}
	q.flight++
	if !r.Deadline.IsZero() {
		q.timed++
	}
	q.entry = core.Entry{Offset: r.Offset, Length: r.Length}
	switch r.Op {
	case hpdi.OpRead, hpdi.OpWrite:
		q.move(k, n)
	case hpdi.OpFlush:
		q.entry = core.Entry{Op: core.OpFlush}
		q.send(n)
	case hpdi.OpDiscard:
		q.entry.Op = core.OpDiscard
		q.send(n)
	case hpdi.OpWriteZeroes:
		q.entry.Op = core.OpWriteZeroes
		q.send(n)
	case hpdi.OpStatus:
		q.entry.Op = core.OpStatus
		q.send(n)
	}
	if o.more = false; o.left == 0 {
		q.finish(n)
	}
}

// resolve finds where the back-end has the memory of a request, in q.addrs.
func (q *queue) resolve(r *hpdi.Request) error {
	q.addrs = q.addrs[:0]
	if r.Op != hpdi.OpRead && r.Op != hpdi.OpWrite {
		return nil
	}
	for i, v := range r.Vec {
		if len(v) == 0 {
			continue
		}
		addr, err := q.d.addrOf(v)
		if err != nil {
			return q.wrap(fmt.Errorf("vector %d of %d bytes: %w", i, len(v), err))
		}
		if last := len(q.addrs) - 1; last >= 0 && q.addrs[last].Addr+q.addrs[last].Len == addr {
			q.addrs[last].Len += uint64(len(v))
			continue
		}
		q.addrs = append(q.addrs, core.Segment{Addr: addr, Len: uint64(len(v))})
	}
	return nil
}

// move puts a read or write into the ring, in as many entries as it needs.
func (q *queue) move(k *facts, n int32) {
	o := &q.ops[n]
	q.entry.Op, q.entry.Length = core.OpRead, 0
	if o.r.Op == hpdi.OpWrite {
		q.entry.Op = core.OpWrite
		if o.r.Durable {
			q.entry.Flags = core.FlagDurable
		}
	}
	q.entry.Segs = q.segs[:0]
	for _, s := range q.addrs {
		for s.Len > 0 {
			if len(q.entry.Segs) == core.Segments || q.entry.Length == k.most {
				if !q.send(n) {
					return
				}
				q.entry.Offset += q.entry.Length
				q.entry.Length, q.entry.Segs = 0, q.segs[:0]
			}
			take := min(s.Len, uint64(k.most-q.entry.Length))
			q.entry.Segs = append(q.entry.Segs, core.Segment{Addr: s.Addr, Len: take})
			q.entry.Length += int64(take)
			s.Addr += take
			s.Len -= take
		}
	}
	q.send(n)
}

// send puts q.entry into the ring for a request, once there is a slot. It returns false if
// the request has ended before.
func (q *queue) send(n int32) bool {
	o := &q.ops[n]
	for q.f.InFlight() >= q.limit || q.f.Free() == 0 {
		q.publish()
		q.pause()
		q.collect()
		if q.d.dead.Load() || o.wanted {
			if o.answers == nil {
				o.answers = q.lost(o)
			}
			return false
		}
	}
	slot := q.f.Put(&q.entry)
	q.slots[slot] = n
	o.left++
	q.put = true
	return true
}

// lost is the error of a request that will not be run any more.
func (q *queue) lost(o *op) error {
	switch {
	case o.late:
		return hpdi.ErrDeadline
	case o.wanted:
		return hpdi.ErrCanceled
	}
	return q.d.err
}

// publish shows the back-end what was put.
func (q *queue) publish() {
	if !q.put {
		return
	}
	q.put = false
	if q.f.Publish() {
		q.kick.Ring()
	}
}

// Wait returns requests that have completed.
func (q *queue) Wait(least int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	if q.closed {
		return done, q.wrap(hpdi.ErrClosed)
	}
	q.collect()
	for len(q.done) < least && q.flight > 0 {
		q.pause()
		q.collect()
	}
	done = append(done, q.done...)
	clear(q.done) // the application owns the requests again
	q.done = q.done[:0]
	if len(done) == 0 && least > 0 && q.d.dead.Load() {
		return done, q.d.err
	}
	return done, nil
}

// pause returns when there may be a completion, or something else to look at. It
// looks for a while before it sleeps.
func (q *queue) pause() {
	if q.spin.Poll(q.ready) {
		return
	}
	q.f.Arm()
	if !q.ready() {
		if err := q.call.Sleep(-1, q.sleep()); err != nil {
			q.d.broken(q.wrap(err))
		}
	}
	if !q.events {
		q.f.Disarm()
	}
	q.spin.Woke()
}

// sleep returns how long the queue may sleep before a deadline passes, -1 for ever.
func (q *queue) sleep() time.Duration {
	if q.timed == 0 {
		return -1
	}
	next := time.Duration(-1)
	now := time.Now()
	for i := range q.ops {
		o := &q.ops[i]
		if o.r == nil || o.r.Deadline.IsZero() || o.wanted {
			continue
		}
		if d := max(o.r.Deadline.Sub(now), 0); next < 0 || d < next {
			next = d
		}
	}
	return next
}

// collect takes completions from the ring, and looks at what else may end a request.
func (q *queue) collect() {
	if q.events {
		q.call.Quiet()
	}
	took := false
	for !q.broken {
		c, ok, err := q.f.Next()
		if err != nil {
			q.broken = true // the queue sleeps until the device is dead
			q.d.broken(q.wrap(err))
			break
		}
		if !ok {
			break
		}
		took = true
		q.complete(c)
	}
	if took {
		q.f.Release()
		q.call.Awake()
	}
	if q.timed > 0 {
		q.deadlines()
	}
	if q.d.dead.Load() {
		q.giveUp()
	} else if q.wanted > 0 && !q.d.attached.Load() {
		q.retract()
	}
}

// complete takes the answer to an entry.
func (q *queue) complete(c core.Completion) {
	n := q.slots[c.Slot]
	q.slots[c.Slot] = none
	if n == none {
		return // it was retracted
	}
	o := &q.ops[n]
	o.left--
	if c.Status != core.StatusOK {
		if o.answers == nil {
			o.answers = q.wrap(fmt.Errorf("back-end: %s: %w", q.f.Text(c), kindOf(c.Status)))
			if c.Status == core.StatusCanceled && o.late {
				o.answers = hpdi.ErrDeadline
			}
		}
	} else if o.r.Op == hpdi.OpStatus {
		if err := q.extents(o.r, c); err != nil {
			o.answers = q.wrap(err)
		}
	}
	if o.left == 0 && !o.more {
		q.finish(n)
	}
}

// extents copies the answer to a block status.
func (q *queue) extents(r *hpdi.Request, c core.Completion) error {
	bs := uint64(q.d.info.Load().BlockSize)
	more := true
	for i := 0; i < c.N && i < core.Segments && more; i++ {
		x := q.f.Extent(c, i)
		if x.Length == 0 || x.Length%bs != 0 || x.Length > 1<<62 || x.State > uint64(hpdi.Zero) {
			return fmt.Errorf("back-end: block status with %d bytes of state %d: %w", x.Length, x.State, hpdi.ErrIO)
		}
		more = r.AddExtent(int64(x.Length), hpdi.ExtentState(x.State))
	}
	if len(r.Extents) == 0 {
		return fmt.Errorf("back-end: block status without an answer: %w", hpdi.ErrIO)
	}
	return nil
}

// finish gives a request back.
func (q *queue) finish(n int32) {
	o := &q.ops[n]
	o.r.Err = o.answers
	q.done = append(q.done, o.r)
	if !o.r.Deadline.IsZero() {
		q.timed--
	}
	if o.wanted {
		q.wanted--
	}
	*o = op{}
	q.free = append(q.free, n)
	q.flight--
}

// deadlines cancels requests whose deadlines have passed.
func (q *queue) deadlines() {
	now := time.Now()
	for n := range q.ops {
		o := &q.ops[n]
		if o.r != nil && !o.wanted && o.r.Late(now) != nil {
			o.late = true
			q.cancel(int32(n))
		}
	}
}

// Cancel asks the back-end to end requests; where none is there, they end at once.
func (q *queue) Cancel(reqs ...*hpdi.Request) {
	if q.closed {
		return
	}
	for _, r := range reqs {
		for n := range q.ops {
			if o := &q.ops[n]; o.r == r && !o.wanted {
				q.cancel(int32(n))
			}
		}
	}
	if !q.d.attached.Load() && q.wanted > 0 {
		q.retract()
	}
	if q.events && len(q.done) > 0 {
		q.call.Ring()
	}
}

func (q *queue) cancel(n int32) {
	q.ops[n].wanted = true
	q.wanted++
	wake := false
	for slot, of := range q.slots {
		if of == n && q.f.Cancel(slot) {
			wake = true
		}
	}
	if wake {
		q.kick.Ring()
	}
}

// retract ends requests that were asked to be cancelled, if no back-end is there that
// could be running them.
func (q *queue) retract() {
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	if q.d.attached.Load() {
		return
	}
	for slot, n := range q.slots {
		if n == none || !q.ops[n].wanted {
			continue
		}
		q.f.Retract(slot)
		q.slots[slot] = none
		q.drop(n)
	}
}

// drop takes an entry of a request as one that nobody will run.
func (q *queue) drop(n int32) {
	o := &q.ops[n]
	if o.answers == nil {
		o.answers = q.lost(o)
	}
	if o.left--; o.left == 0 && !o.more {
		q.finish(n)
	}
}

// giveUp ends all requests: nobody will run them any more.
func (q *queue) giveUp() {
	for slot, n := range q.slots {
		if n != none {
			q.slots[slot] = none
			q.drop(n)
		}
	}
}

// Event returns a descriptor that is readable when Wait for none would return something.
func (q *queue) Event() int {
	if q.closed || q.call.FD() < 0 {
		return -1
	}
	if !q.events {
		q.events = true
		q.f.Arm()
		if q.ready() || len(q.done) > 0 {
			q.call.Ring()
		}
	}
	return q.call.FD()
}

// Close waits for requests in flight and frees the queue for the next one.
func (q *queue) Close() error {
	if q.closed {
		return nil
	}
	for q.flight > 0 {
		q.pause()
		q.collect()
	}
	q.closed = true
	q.f.Disarm()
	q.done = nil
	q.d.mu.Lock()
	q.d.used[q.number] = false
	q.d.mu.Unlock()
	return nil
}

// kindOf returns what kind of error a status is.
func kindOf(s core.Status) error {
	switch s {
	case core.StatusRange:
		return hpdi.ErrRange
	case core.StatusAlign:
		return hpdi.ErrAlign
	case core.StatusUnsupported:
		return hpdi.ErrUnsupported
	case core.StatusReadOnly:
		return hpdi.ErrReadOnly
	case core.StatusNoSpace:
		return hpdi.ErrNoSpace
	case core.StatusCanceled:
		return hpdi.ErrCanceled
	}
	return hpdi.ErrIO
}

// statusOf returns the status of a request that has ended with err.
func statusOf(err error) core.Status {
	for s := core.StatusRange; s <= core.StatusCanceled; s++ {
		if errors.Is(err, kindOf(s)) {
			return s
		}
	}
	return core.StatusIO
}
