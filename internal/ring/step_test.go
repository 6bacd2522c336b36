package ring

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"
)

func shape(queues, entries int) Shape {
	return Shape{ID: [16]byte{1, 2, 3}, Session: 77, Queues: queues, Entries: entries, Data: 2 * page, Bells: true}
}

// world is a ring whose two sides are taken step by step. A back-end may die between
// any two stores, also within a step; whoever comes then finds memory as it was left.
type world struct {
	rng  *rand.Rand
	mem  []byte
	m    *Memory
	f    *Front
	b    *Back
	most int // requests

	put, answered int
	taken         bool // the front-end has taken completions and not said so
	asked         map[uint64]bool
	got           map[uint64]bool

	// What the device has done: the tags of its log.
	log   map[uint64]bool
	order []uint64

	// What the back-end that lives knows.
	running []Entry // taken
	run     []int   // slots that the device is done with
	again   map[uint64]bool
	posted  bool
	deaths  int
}

func newWorld(seed uint64, entries, most int) (*world, error) {
	s := shape(1, entries)
	w := &world{
		rng: rand.New(rand.NewPCG(seed, 1)), mem: make([]byte, s.Size()), most: most,
		asked: map[uint64]bool{}, got: map[uint64]bool{}, log: map[uint64]bool{},
	}
	var err error
	if w.m, err = Format(w.mem, s); err != nil {
		return nil, err
	}
	w.f = NewFront(w.m, 0)
	return w, w.attach()
}

// attach lets a new back-end come.
func (w *world) attach() (err error) {
	w.running, w.run, w.again, w.posted = nil, nil, map[uint64]bool{}, false
	w.b, err = NewBack(w.m, 0)
	return err
}

// dying runs a step of the back-end during which it may die: of what the step has
// stored any part is there then, in whatever order it was stored. A step whose last store
// is what counts leaves nothing to see in either case.
func (w *world) dying(step func()) error {
	if w.rng.IntN(6) > 0 {
		step()
		return nil
	}
	return w.tear(step)
}

func (w *world) tear(step func()) error {
	before := w.copy()
	step()
	for _, i := range w.changed(before) {
		if w.rng.IntN(2) == 0 {
			put(w.mem, i, before[i/8])
		}
	}
	w.deaths++
	return w.attach()
}

// words returns all words up to the data area.
func (w *world) words() []uint64 {
	return unsafe.Slice((*uint64)(unsafe.Pointer(&w.mem[0])), w.m.shape.dataAt()/8)
}

func (w *world) copy() []uint64 { return slices.Clone(w.words()) }

// changed returns where words are not what they were.
func (w *world) changed(before []uint64) (at []int) {
	for i, v := range w.words() {
		if v != before[i] {
			at = append(at, 8*i)
		}
	}
	return at
}

// step takes one step of one side.
func (w *world) step() error {
	switch w.rng.IntN(9) {
	case 0, 1: // the front-end puts one
		if w.f.Free() == 0 || w.put == w.most || w.taken {
			return nil
		}
		w.put++
		e := Entry{Op: OpWrite, Offset: int64(w.put) * 4096, Length: 4096, Segs: []Segment{{Addr: 0, Len: 4096}}}
		if w.rng.IntN(4) == 0 {
			e.Segs = []Segment{{Addr: 0, Len: 1024}, {Addr: 4096, Len: 3072}}
		}
		// The front-end is at this for a while: a back-end may come in the middle.
		if w.rng.IntN(6) > 0 {
			w.f.Put(&e)
		} else if err := w.tearFront(func() { w.f.Put(&e) }); err != nil {
			return err
		}
		w.asked[e.Counter] = true
		if e.Counter != uint64(w.put) {
			return fmt.Errorf("request %d has counter %d", w.put, e.Counter)
		}
	case 2:
		w.f.Publish()
	case 3, 4: // it takes a completion
		var c Completion
		var ok bool
		var err error
		if w.rng.IntN(6) > 0 {
			c, ok, err = w.f.Next()
		} else if e := w.tearFront(func() { c, ok, err = w.f.Next() }); e != nil {
			return e
		}
		if err != nil {
			return err
		}
		if ok {
			if !w.asked[c.Counter] || w.got[c.Counter] {
				return fmt.Errorf("request %d is answered twice, or was never asked", c.Counter)
			}
			w.got[c.Counter], w.taken = true, true
			w.answered++
		}
	case 5:
		w.f.Release()
		w.taken = false
	case 6:
		return w.take()
	case 7:
		return w.runOne()
	default:
		return w.complete()
	}
	return nil
}

// tearFront runs a step of the front-end, and lets a back-end come that sees any part of
// its stores. Then the front-end goes on.
func (w *world) tearFront(step func()) error {
	before := w.copy()
	step()
	after, changed := w.copy(), w.changed(before)
	for _, i := range changed {
		if w.rng.IntN(2) == 0 {
			put(w.mem, i, before[i/8])
		}
	}
	w.deaths++
	if err := w.attach(); err != nil {
		return err
	}
	// It takes what the last one has left before the front-end's next store.
	for w.b.Recovered() > 0 {
		if err := w.take(); err != nil {
			return err
		}
	}
	for _, i := range changed {
		put(w.mem, i, after[i/8])
	}
	return nil
}

// take lets the back-end take a request.
func (w *world) take() error {
	var e Entry
	left := w.b.Recovered()
	ok, again, err := w.b.Take(&e)
	if err != nil || !ok {
		return err
	}
	if again != (left > 0) {
		return fmt.Errorf("request %d comes again: %t, with %d left by the last back-end", e.Counter, again, left)
	}
	if e.Op != OpWrite || e.Offset != int64(e.Counter)*4096 || e.Length != 4096 || len(e.Segs) < 1 || len(e.Segs) > 2 {
		return fmt.Errorf("request %d was taken as %+v", e.Counter, e)
	}
	if e.Tag != (Tag{Session: 77, Slot: uint16(e.Slot), Counter: e.Counter}) {
		return fmt.Errorf("request %d has tag %+v", e.Counter, e.Tag)
	}
	if w.got[e.Counter] {
		return fmt.Errorf("request %d is to be run after its answer was taken", e.Counter)
	}
	if n := len(w.running); n > 0 && w.running[n-1].Counter >= e.Counter {
		return fmt.Errorf("request %d is taken after %d", e.Counter, w.running[n-1].Counter)
	}
	w.again[e.Counter] = again
	w.running = append(w.running, e)
	return nil
}

// runOne lets the device do one of the requests that were taken: those that may have been
// done already in order, others in any order.
func (w *world) runOne() error {
	if len(w.running) == 0 {
		return nil
	}
	i := w.rng.IntN(len(w.running))
	if w.again[w.running[0].Counter] {
		i = 0
	}
	e := w.running[i]
	w.running = append(w.running[:i:i], w.running[i+1:]...)
	if w.log[e.Counter] && !w.again[e.Counter] {
		return fmt.Errorf("request %d is run for the second time, and nobody knows", e.Counter)
	}
	if !w.log[e.Counter] {
		w.log[e.Counter] = true
		w.order = append(w.order, e.Counter)
	}
	w.run = append(w.run, e.Slot)
	return nil
}

// complete lets the back-end say what is done: the entry, or that it is there.
func (w *world) complete() error {
	switch {
	case w.posted && w.rng.IntN(2) == 0:
		w.posted = false
		return w.dying(func() { w.b.Publish() })
	case len(w.run) > 0:
		i := w.rng.IntN(len(w.run))
		slot := w.run[i]
		w.run = append(w.run[:i:i], w.run[i+1:]...)
		w.posted = true
		n := 0
		return w.dying(func() {
			if w.rng.IntN(4) == 0 {
				n = w.b.PutText(slot, "something has failed here")
				w.b.Post(slot, StatusIO, n)
				return
			}
			w.b.Post(slot, StatusOK, 0)
		})
	case w.rng.IntN(20) == 0:
		return w.tear(func() {})
	}
	return nil
}

// steps takes a world through most requests, and returns what was wrong.
func steps(seed uint64, entries, most int) (deaths int, err error) {
	w, err := newWorld(seed, entries, most)
	if err != nil {
		return 0, err
	}
	for n := 0; w.answered < most; n++ {
		if n > 2000*most {
			return w.deaths, fmt.Errorf("%d of %d requests are answered after %d steps", w.answered, most, n)
		}
		if err := w.step(); err != nil {
			return w.deaths, fmt.Errorf("step %d: %w", n, err)
		}
	}
	if len(w.order) != most {
		return w.deaths, fmt.Errorf("%d of %d requests were run", len(w.order), most)
	}
	return w.deaths, nil
}

// A back-end dies between any two stores: each request is run once, those that were left in
// their order, and is answered once.
func TestEveryDeath(t *testing.T) {
	deaths := 0
	for seed := uint64(1); seed <= 25; seed++ {
		for _, entries := range []int{2, 4, 8} {
			n, err := steps(seed, entries, 60)
			if err != nil {
				t.Fatalf("seed %d, %d entries: %v", seed, entries, err)
			}
			deaths += n
		}
	}
	if deaths < 2000 {
		t.Errorf("only %d back-ends have died", deaths)
	}
}
