package sim

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// errDead is what the devices of a dead guest return to what is left of it.
var errDead = errors.New("the guest is dead")

// errMedium is what a device returns that was told to fail.
var errMedium = errors.New("input/output error")

// disk is a simulated device, shared by both guests, with the lock that keeps
// them apart.
type disk struct {
	w      *World
	name   string
	owner  string // the identity whose pool it belongs to
	medium *blocktest.Crash
	holder *handle // who has the lock
	use    use     // what it is to its pool, or is to be
	// leaving says that somebody has asked for its removal from the pool.
	leaving bool
	slow    int    // factor of latencies, at least 1
	stuck   bool   // nothing completes
	missing bool   // nobody gives it to who opens the pool
	grows   int64  // by so many bytes when it is opened next
	born    uint64 // which one it is of those that were in its place
	held    []func()
	faults  []*fault

	// Of a disk that is a copy.
	mirror   mirror.ID
	gone     bool // it was pulled
	vanishIn int  // requests until it is
	bad      bool // something was or is wrong with it, and its mirror was not made whole since
	rotten   bool // bits of it have changed
	stale    bool // it has lost what it had taken
}

// fault is what a disk does wrong with some of the next requests.
type fault struct {
	op   hpdi.Op
	kind string // "fails", "fails-late", "flips", "loses", "misdirects", "gone"
	left int    // so many requests; -1 for all
}

// forgets tells whether a disk with the fault may have lost what it took.
func (f *fault) forgets() bool { return f.kind == "loses" || f.kind == "misdirects" }

// take returns what is wrong with a request, nil for nothing. A durable write
// is a sync as well.
func (d *disk) take(r *hpdi.Request) *fault {
	if d.vanishIn > 0 {
		d.vanishIn--
		d.gone = d.vanishIn == 0
	}
	if d.gone {
		return &fault{op: r.Op, kind: "gone"}
	}
	for i, f := range d.faults {
		if f.op != r.Op && !(f.op == hpdi.OpFlush && r.Durable) || f.left == 0 {
			continue
		}
		if f.left > 0 {
			if f.left--; f.left == 0 {
				d.faults = append(d.faults[:i:i], d.faults[i+1:]...)
			}
		}
		return f
	}
	return nil
}

// handle is a disk as one guest has it open, under its lock.
type handle struct {
	d      *disk
	p      *proc
	closed bool      // of the World
	orphan bool      // its guest is dead: the lock goes with its last request
	flying []*flight // in the order of submission
}

// flight is a request on its way.
type flight struct {
	q       *queue
	r       *hpdi.Request
	fault   *fault
	barrier blocktest.Barrier
	arrived bool
	over    bool // the guest was told, or never will be
	carried blocktest.Carried
}

// open returns a handle under the lock, or nil.
func (d *disk) open(p *proc) *handle {
	if d.holder != nil || p.dead.Load() {
		return nil
	}
	if d.grows > 0 {
		d.medium, d.grows = d.medium.Resize(d.medium.Info().Size+d.grows), 0
	}
	d.holder = &handle{d: d, p: p}
	p.handles = append(p.handles, d.holder)
	return d.holder
}

// Info describes a disk that demands aligned memory, as direct I/O does.
func (h *handle) Info() hpdi.Info {
	info := h.d.medium.Info()
	info.Direct = true
	return info
}

// Register does nothing.
func (h *handle) Register([]byte) error { return nil }

// Unregister does nothing.
func (h *handle) Unregister([]byte) error { return nil }

// Close gives the lock back.
func (h *handle) Close() error {
	h.d.w.post(nil, func() {
		if h.closed = true; len(h.flying) == 0 && !h.orphan {
			h.unlock()
		}
	})
	return nil
}

func (h *handle) unlock() {
	if h.d.holder == h {
		h.d.holder = nil
	}
}

func (h *handle) NewQueue(int) (hpdi.Queue, error) {
	if h.p.dead.Load() {
		return nil, errDead
	}
	return &queue{h: h, more: make(chan struct{}, 1)}, nil
}

// queue is one goroutine's path to a handle.
type queue struct {
	hpdi.Plain
	h    *handle
	more chan struct{} // holds a token when done has grown

	mu       sync.Mutex // guards all below
	inflight int
	done     []*hpdi.Request
}

// Submit leaves the requests with the World.
func (q *queue) Submit(reqs ...*hpdi.Request) error {
	q.mu.Lock()
	q.inflight += len(reqs)
	q.mu.Unlock()
	if q.h.p.dead.Load() {
		for _, r := range reqs {
			q.finish(r, errDead)
		}
		return nil
	}
	for _, r := range reqs {
		if r.Err = r.Check(q.h.Info()); r.Err != nil {
			q.h.d.w.post(nil, func() {
				q.h.d.w.violate("%s was asked for %s of %d bytes at %d: %v", q.h.d.name, r.Op, r.Bytes(), r.Offset, r.Err)
			})
		}
	}
	reqs = slices.Clone(reqs) // the slice is the caller's
	q.h.d.w.post(nil, func() {
		for _, r := range reqs {
			q.h.submit(&flight{q: q, r: r})
		}
	})
	return nil
}

// finish completes a request. Any goroutine may call it.
func (q *queue) finish(r *hpdi.Request, err error) {
	r.Err = err
	q.mu.Lock()
	q.inflight--
	q.done = append(q.done, r)
	q.mu.Unlock()
	select {
	case q.more <- struct{}{}:
	default:
	}
}

func (q *queue) Wait(least int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	for {
		q.mu.Lock()
		if len(q.done) >= min(least, len(q.done)+q.inflight) {
			done = append(done, q.done...)
			q.done = q.done[:0]
			q.mu.Unlock()
			return done, nil
		}
		q.mu.Unlock()
		<-q.more
	}
}

func (q *queue) Close() error {
	q.mu.Lock()
	n := q.inflight
	q.mu.Unlock()
	_, err := q.Wait(n, nil)
	return err
}

// latency draws how long a request takes: mostly like a fast disk, sometimes
// much longer.
func (d *disk) latency(r *hpdi.Request) time.Duration {
	l := d.w.between(20*time.Microsecond, 150*time.Microsecond) + time.Duration(r.Bytes())*time.Nanosecond
	if r.Op == hpdi.OpFlush || r.Durable {
		l *= 4
	}
	if d.w.chance(40) {
		l *= time.Duration(1 + d.w.rng.IntN(100))
	}
	return l * time.Duration(d.slow)
}

// submit takes a request in. It is one of the operations at which the guest
// may die: then it was the last that the device heard of.
func (h *handle) submit(f *flight) {
	w, d := h.d.w, h.d
	if h.p.dead.Load() {
		f.q.finish(f.r, errDead)
		return
	}
	if h.p.hung {
		h.p.freeze(func() { h.submit(f) })
		return
	}
	if h.closed || d.holder != h {
		w.violate("%s#%d uses %s, whose lock is not its own", h.p.name, h.p.inc, d.name)
	}
	h.flying = append(h.flying, f)
	f.fault = d.take(f.r)
	if f.r.Op == hpdi.OpFlush {
		f.barrier = d.medium.Barrier()
	}
	total := d.latency(f.r)
	arrival := time.Duration(float64(total) * (0.2 + 0.7*w.rng.Float64()))
	w.after(arrival, nil, "", func() { d.reach(f) })
	w.after(total, nil, "", func() { d.complete(f) })
	w.count(h.p, fmt.Sprintf("%s %d+%d of %s", f.r.Op, f.r.Offset/block.Size, f.r.Bytes()/block.Size, d.name))
}

// unless a disk is stuck, run happens now, otherwise when it no longer is.
func (d *disk) unless(run func()) {
	if d.stuck {
		d.held = append(d.held, run)
		return
	}
	run()
}

func (d *disk) unstick() {
	held := d.held
	d.stuck, d.held = false, nil
	for _, run := range held {
		d.w.after(d.w.between(0, time.Millisecond), nil, "", run)
	}
}

// reach lets a request act on the medium.
func (d *disk) reach(f *flight) {
	d.unless(func() {
		if f.over || f.arrived {
			return
		}
		f.arrived = true
		d.carry(f)
	})
}

func (d *disk) carry(f *flight) {
	r := *f.r // the driver's own result, not the application's
	if f.fault != nil {
		switch f.fault.kind {
		case "gone":
			return
		case "fails", "loses":
			if f.fault.op != hpdi.OpFlush || !r.Durable {
				return
			}
			r.Durable = false // written, and not synced
		case "misdirects":
			r.Offset = (r.Offset + block.Size*int64(1+d.w.rng.IntN(64))) % (d.medium.Info().Size - r.Bytes()) &^ (block.Size - 1)
		}
	}
	if f.r.Op == hpdi.OpFlush {
		_ = d.medium.FlushTo(f.barrier)
		return
	}
	f.carried = d.medium.Carry(&r)
	if f.fault != nil && f.fault.kind == "flips" && f.r.Op == hpdi.OpRead && len(f.r.Vec) > 0 {
		v := f.r.Vec[d.w.rng.IntN(len(f.r.Vec))]
		v[d.w.rng.IntN(len(v))] ^= 1 << d.w.rng.IntN(8)
	}
}

// complete tells the guest that its request has ended.
func (d *disk) complete(f *flight) {
	d.unless(func() {
		h := f.q.h
		if f.over {
			return
		}
		if h.p.hung {
			// Nobody is there to see it.
			h.p.freeze(func() { d.complete(f) })
			return
		}
		if !f.arrived {
			f.arrived = true
			d.carry(f)
		}
		h.land(f)
		f.carried.Complete()
		var err error
		if f.fault != nil && (f.fault.kind == "fails" || f.fault.kind == "fails-late") {
			err = errMedium
		}
		if f.fault != nil && f.fault.kind == "gone" {
			err = errGone
		}
		d.w.count(h.p, "completion by "+d.name)
		if h.p.dead.Load() {
			err = errDead
		}
		f.q.finish(f.r, err)
		if h.closed && len(h.flying) == 0 && !h.orphan {
			h.unlock()
		}
	})
}

// land takes a request out of those on their way.
func (h *handle) land(f *flight) {
	f.over = true
	h.flying = slices.DeleteFunc(h.flying, func(o *flight) bool { return o == f })
}

// desert lets what a dead guest had under way reach the disk late, in part or
// not at all; the lock goes when the last of it has.
func (h *handle) desert() {
	w, d := h.d.w, h.d
	h.closed, h.orphan = true, true
	last := time.Duration(0)
	for _, f := range slices.Clone(h.flying) {
		h.land(f)
		// Nobody will see the end of what has arrived, but a later sync covers it.
		f.carried.Complete()
		if !f.arrived && f.r.Op != hpdi.OpRead && f.fault == nil {
			// The memory it came from is the dead guest's and goes on changing.
			r := &hpdi.Request{Op: f.r.Op, Offset: f.r.Offset, Length: f.r.Length}
			for _, v := range f.r.Vec {
				r.Vec = append(r.Vec, append([]byte(nil), v...))
			}
			delay := w.between(0, 130*time.Millisecond)
			last = max(last, delay)
			fate, seed, boot := w.rng.IntN(3), w.rng.Uint64(), w.boot
			w.after(delay, nil, "", func() {
				if w.boot == boot { // power that is cut ends it
					d.unless(func() { d.late(r, fate, seed) })
				}
			})
		}
		f.q.finish(f.r, errDead)
	}
	w.after(last+time.Microsecond, nil, "", func() { d.unless(h.unlock) })
}

// late carries out a request of a dead guest.
func (d *disk) late(r *hpdi.Request, fate int, seed uint64) {
	switch fate {
	case 0: // never
	case 1:
		d.w.log("late %s %d+%d of %s", r.Op, r.Offset/block.Size, r.Bytes()/block.Size, d.name)
		d.medium.Carry(r).Complete()
	case 2:
		d.w.log("late torn %s %d+%d of %s", r.Op, r.Offset/block.Size, r.Bytes()/block.Size, d.name)
		d.medium.CarryTorn(r, seed).Complete()
	}
}
