package ring

import (
	"cmp"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
)

// faulty is a device in front of another one, which is done with requests at once: it
// fails, delays and holds them as it is told.
type faulty struct {
	hpdi.Device

	mu    sync.Mutex // guards the following
	hold  bool
	delay time.Duration
	off   int64
	n     int64
	kind  error
	all   map[*faultyQueue]bool
}

func newFaulty(dev hpdi.Device) *faulty {
	return &faulty{Device: dev, all: map[*faultyQueue]bool{}}
}

func (f *faulty) Info() hpdi.Info {
	i := f.Device.Info()
	i.Event, i.Cancel = true, hpdi.CancelAll
	return i
}

func (f *faulty) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := f.Device.NewQueue(depth)
	if err != nil {
		return nil, err
	}
	w := &faultyQueue{Queue: q, f: f}
	f.mu.Lock()
	f.all[w] = true
	f.mu.Unlock()
	return w, nil
}

func (f *faulty) set(do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do()
	for q := range f.all {
		q.mu.Lock()
		if !f.hold {
			for i := range q.open {
				if q.open[i].held {
					q.open[i].held, q.open[i].at = false, time.Now()
				}
			}
		}
		q.signalLocked()
		q.mu.Unlock()
	}
}

// faultyQueue keeps requests until it is their time.
type faultyQueue struct {
	hpdi.Queue
	f  *faulty
	mu sync.Mutex // guards the following
	ev hpdi.Signal

	open []waiting
}

type waiting struct {
	r    *hpdi.Request
	at   time.Time
	held bool
	err  error
}

func (q *faultyQueue) Submit(reqs ...*hpdi.Request) error {
	q.f.mu.Lock()
	defer q.f.mu.Unlock()
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, r := range reqs {
		w := waiting{r: r, at: time.Now().Add(q.f.delay), held: q.f.hold}
		if q.f.n > 0 && r.Offset < q.f.off+q.f.n && q.f.off < r.Offset+r.Bytes() && (r.Op == hpdi.OpRead || r.Op == hpdi.OpWrite) {
			w.err = q.f.kind
		}
		q.open = append(q.open, w)
		if q.f.delay > 0 {
			time.AfterFunc(q.f.delay, func() { q.f.set(func() {}) })
		}
	}
	q.signalLocked()
	return nil
}

func (q *faultyQueue) signalLocked() {
	q.ev.Set(slices.ContainsFunc(q.open, func(w waiting) bool { return !w.held && !time.Now().Before(w.at) }))
}

func (q *faultyQueue) Wait(least int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	for {
		got, err := q.take(done)
		if err != nil || len(got) >= least+len(done) || len(q.open) == 0 {
			return got, err
		}
		done, least = got, least-(len(got)-len(done))
		time.Sleep(time.Millisecond)
	}
}

func (q *faultyQueue) take(done []*hpdi.Request) ([]*hpdi.Request, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	// Those that are due come in the order in which they were submitted.
	slices.SortStableFunc(q.open, func(a, b waiting) int { return cmp.Compare(btoi(a.held), btoi(b.held)) })
	for len(q.open) > 0 && !q.open[0].held && !time.Now().Before(q.open[0].at) {
		w := q.open[0]
		q.open = q.open[1:]
		if w.err != nil {
			w.r.Err = w.err
			done = append(done, w.r)
			continue
		}
		err := q.Queue.Submit(w.r)
		if err == nil {
			done, err = q.Queue.Wait(1, done)
		}
		if err != nil {
			return done, err
		}
	}
	q.signalLocked()
	return done, nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (q *faultyQueue) Cancel(reqs ...*hpdi.Request) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i := range q.open {
		if w := &q.open[i]; slices.Contains(reqs, w.r) {
			w.held, w.at, w.err = false, time.Now(), hpdi.ErrCanceled
		}
	}
	q.signalLocked()
}

func (q *faultyQueue) Event() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.ev.Event()
}

func (q *faultyQueue) Close() error {
	for len(q.open) > 0 {
		if _, err := q.Wait(1, nil); err != nil {
			return err
		}
	}
	q.f.mu.Lock()
	delete(q.f.all, q)
	q.f.mu.Unlock()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ev.Close()
	return errors.Join(q.Queue.Close())
}
