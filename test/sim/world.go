package sim

import (
	"container/heap"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"strings"
	"sync"
	"testing/synctest"
	"time"
)

// World is one simulated pair. All of it belongs to one goroutine, except for
// what says otherwise.
type World struct {
	opt   Options
	rng   *rand.Rand
	marks *rand.Rand // what happens to restart records, so that it changes nothing else that is drawn
	start time.Time
	queue events
	n     uint64 // events so far
	ops   int64  // counted operations of all guests

	inbox inbox
	trace trace

	dir   string // of regions
	boot  int    // of the host
	host  host
	procs map[string]*proc // the newest of each guest
	olds  []*proc          // all there ever were
	pools map[string]*pool // by identity
	disks []*disk
	cls   map[string]*client

	resubmits []string // clients that send requests again by number
	skipped   int      // requests that were not run again

	recalled int       // pools that were opened by their restart records
	requests int       // of clients, so far
	written  []written // what those may repeat that write it twice

	fail error // the first violation
}

// violate records what must not be; the run ends with it.
func (w *World) violate(format string, args ...any) {
	if w.fail == nil {
		w.fail = fmt.Errorf(format, args...)
		w.log("VIOLATION: %v", w.fail)
	}
}

// now returns the virtual time since the start of the run.
func (w *World) now() time.Duration { return time.Since(w.start) }

// between draws a duration.
func (w *World) between(lo, hi time.Duration) time.Duration {
	if hi <= lo {
		return lo
	}
	return lo + time.Duration(w.rng.Int64N(int64(hi-lo)))
}

// chance is true once in n.
func (w *World) chance(n int) bool { return w.rng.IntN(n) == 0 }

// event is something that will happen.
type event struct {
	at    time.Time
	n     uint64 // orders events of one instant
	what  string
	owner *proc // whose instructions it takes, nil for the surroundings
	run   func()
	// always says that it must run even if the owner dies while it hangs, for
	// product code waits for it.
	always bool
}

type events []*event

func (q events) Len() int { return len(q) }
func (q events) Less(i, j int) bool {
	if !q[i].at.Equal(q[j].at) {
		return q[i].at.Before(q[j].at)
	}
	return q[i].n < q[j].n
}
func (q events) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *events) Push(x any)   { *q = append(*q, x.(*event)) }
func (q *events) Pop() any {
	old := *q
	e := old[len(old)-1]
	*q = old[:len(old)-1]
	return e
}

// after lets run happen in d from now. An event with an owner waits while the
// owner hangs, and never happens once it is dead.
func (w *World) after(d time.Duration, owner *proc, what string, run func()) {
	w.n++
	heap.Push(&w.queue, &event{at: time.Now().Add(d), n: w.n, what: what, owner: owner, run: run})
}

// inbox is where goroutines of product code leave what the World shall do.
type inbox struct {
	mu    sync.Mutex
	notes []note
	poke  chan struct{} // holds a token when notes came while the World slept
}

type note struct {
	owner *proc
	run   func()
}

// post hands run to the World, in whose goroutine it happens as soon as
// product code rests. It may be called by any goroutine. Of a dead guest it is
// dropped.
func (w *World) post(owner *proc, run func()) {
	w.inbox.mu.Lock()
	w.inbox.notes = append(w.inbox.notes, note{owner, run})
	w.inbox.mu.Unlock()
	select {
	case w.inbox.poke <- struct{}{}:
	default:
	}
}

// rest lets product code run until all of it waits, and takes its notes.
func (w *World) rest() {
	for {
		synctest.Wait()
		w.inbox.mu.Lock()
		notes := w.inbox.notes
		w.inbox.notes = nil
		w.inbox.mu.Unlock()
		select {
		case <-w.inbox.poke:
		default:
		}
		if len(notes) == 0 {
			break
		}
		for _, n := range notes {
			if n.owner == nil || !n.owner.dead.Load() {
				n.run()
			}
		}
	}
	w.observe()
}

// sleep lets virtual time pass until at, or until product code, woken by a
// timer of its own, has left notes.
func (w *World) sleep(at time.Time) {
	d := time.Until(at)
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	select {
	case <-t.C:
	case <-w.inbox.poke:
		t.Stop()
	}
}

// step lets the next event happen, unless it lies beyond limit: then time
// passes up to there and it returns false.
func (w *World) step(limit time.Time) bool {
	for {
		w.rest()
		at := limit
		if len(w.queue) > 0 && !w.queue[0].at.After(limit) {
			at = w.queue[0].at
		}
		if now := time.Now(); now.Before(at) {
			w.sleep(at)
			continue // what woke meanwhile may have brought something earlier
		}
		if len(w.queue) == 0 || w.queue[0].at.After(limit) {
			return false
		}
		w.happen(heap.Pop(&w.queue).(*event))
		w.rest()
		return true
	}
}

// maxEvents bounds a run: more means that something goes in circles.
const maxEvents = 3 << 20

func (w *World) happen(e *event) {
	if w.n > maxEvents {
		w.violate("the run has had %d events and does not end: %s", w.n, w.waiting())
	}
	switch p := e.owner; {
	case p == nil:
	case p.dead.Load():
		return
	case p.hung:
		p.frozen = append(p.frozen, e)
		return
	}
	if e.what != "" {
		w.log("%s", e.what)
	}
	e.run()
}

// until runs events until done says so, for at most limit of virtual time.
func (w *World) until(limit time.Duration, done func() bool) bool {
	end := time.Now().Add(limit)
	w.rest()
	for w.fail == nil && !done() {
		if !w.step(end) {
			return done()
		}
	}
	return w.fail == nil
}

// pass lets d of virtual time go by.
func (w *World) pass(d time.Duration) { w.until(d, func() bool { return false }) }

// trace is what happened, as text; only its hash unless lines are wanted.
type trace struct {
	keep  int // so many of the last lines; 0 for none
	lines []string
	hash  uint64
	count int
}

func (w *World) log(format string, args ...any) {
	line := fmt.Sprintf("%12.6f %s", w.now().Seconds(), fmt.Sprintf(format, args...))
	h := fnv.New64a()
	fmt.Fprintf(h, "%x %s", w.trace.hash, line)
	w.trace.hash = h.Sum64()
	w.trace.count++
	if w.trace.keep > 0 {
		if len(w.trace.lines) >= 2*w.trace.keep {
			w.trace.lines = append(w.trace.lines[:0], w.trace.lines[len(w.trace.lines)-w.trace.keep:]...)
		}
		w.trace.lines = append(w.trace.lines, line)
	}
}

func (t *trace) String() string { return strings.Join(t.lines, "\n") }
