package spin

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// world is a clock that moves by step at each question, and something that is
// ready from a moment on.
type world struct {
	now, step time.Duration
	at        time.Duration
	looked    int
}

func (w *world) clock() time.Duration {
	w.now += w.step
	return w.now
}

func (w *world) ready() bool {
	w.looked++
	return w.now >= w.at
}

// newPoller returns a poller of up to 64 µs in a world whose clock moves by a
// microsecond at each question, with room for one poller.
func newPoller() (*Poller, *world) {
	w := &world{step: time.Microsecond}
	b := &budget{}
	b.limit.Store(2)
	return &Poller{Max: 64 * time.Microsecond, Clock: w.clock, budget: b}, w
}

// round polls for something that comes after d, and sleeps until then where
// polling is in vain. It returns whether polling found it.
func round(p *Poller, w *world, d time.Duration) bool {
	w.at = w.now + d
	if p.Poll(w.ready) {
		return true
	}
	w.now = max(w.now, w.at)
	p.Woke()
	return false
}

func TestWindowGrowsWhenSleepsAreShort(t *testing.T) {
	p, w := newPoller()
	n := 0
	for ; !round(p, w, 30*time.Microsecond); n++ {
		if n > 10 {
			t.Fatalf("after %d sleeps of 30 µs the window is %v", n, p.window)
		}
	}
	if n < 2 {
		t.Errorf("polled for 30 µs after %d short sleeps", n)
	}
	for range 100 {
		if !round(p, w, 30*time.Microsecond) {
			t.Fatal("slept although the last wait of this length was polled")
		}
	}
	if p.window > p.Max {
		t.Errorf("window %v is longer than the %v allowed", p.window, p.Max)
	}
}

func TestWindowShrinksWhenItIsInVain(t *testing.T) {
	p, w := newPoller()
	for range 10 {
		round(p, w, 50*time.Microsecond)
	}
	full := p.window
	if full != p.Max {
		t.Fatalf("window %v after ten short waits, want %v", full, p.Max)
	}
	if round(p, w, 300*time.Microsecond); p.window != full/4 {
		t.Errorf("window %v after one long wait, want %v", p.window, full/4)
	}
	round(p, w, 300*time.Microsecond)
	if round(p, w, 300*time.Microsecond); p.window != 0 {
		t.Errorf("window %v after three long waits, want none", p.window)
	}
}

// An idle poller looks once each time that it is woken.
func TestIdleLooksOnce(t *testing.T) {
	p, w := newPoller()
	for range 10 {
		round(p, w, 50*time.Microsecond)
	}
	if round(p, w, time.Second); p.window != 0 {
		t.Fatalf("window %v after a second of silence", p.window)
	}
	w.looked = 0
	for range 20 {
		round(p, w, time.Second)
	}
	if w.looked != 20 {
		t.Errorf("looked %d times at 20 awakenings", w.looked)
	}
}

// Whoever loses its processor while looking stops that for a while, also when
// sleeps are short.
func TestProcessorTaken(t *testing.T) {
	p, w := newPoller()
	for range 10 {
		round(p, w, 50*time.Microsecond)
	}
	w.step = 10 * time.Millisecond // each question of the clock finds it so much later
	w.at = w.now + time.Hour
	if p.Poll(w.ready) || p.window != 0 {
		t.Fatalf("window %v after a look that took 10 ms", p.window)
	}
	w.step = time.Microsecond
	quiet := 0
	for !round(p, w, 30*time.Microsecond) {
		if quiet++; quiet > 2*shy {
			t.Fatal("never polls again")
		}
	}
	if quiet < shy {
		t.Errorf("polls again after %d waits, want %d at least", quiet, shy)
	}
}

// What never comes within a look of the full length, but always soon after it, waits for the
// look to end.
func TestLooksInTheWay(t *testing.T) {
	p, w := newPoller()
	looked, slept := 0, 0
	for range 1000 {
		w.at, w.looked = w.now+time.Hour, 0
		if p.Poll(w.ready) {
			t.Fatal("found what is not there")
		}
		if w.looked > 1 {
			looked++
		} else {
			slept++
		}
		w.now += 10 * time.Microsecond // it comes as soon as the poller sleeps
		p.Woke()
	}
	if looked*5 > slept {
		t.Errorf("looked %d times in vain, and slept at once %d times", looked, slept)
	}
}

func TestNeverWithoutMax(t *testing.T) {
	w := &world{step: time.Microsecond, at: time.Hour}
	p := &Poller{Clock: w.clock}
	for range 100 {
		if p.Poll(w.ready) {
			t.Fatal("found what is not there")
		}
		p.Woke()
	}
	if w.looked != 100 || w.now != 0 {
		t.Errorf("looked %d times and asked the clock until %v, want once each and never", w.looked, w.now)
	}
}

// Without Woke the time until the next Poll counts.
func TestPollAgainEndsSleep(t *testing.T) {
	p, w := newPoller()
	for range 10 {
		w.at = w.now + 20*time.Microsecond
		if !p.Poll(w.ready) {
			w.now = max(w.now, w.at)
		}
	}
	if p.window < 16*time.Microsecond {
		t.Errorf("window %v after ten waits of 20 µs", p.window)
	}
}

// Of many who wait at once one fewer look than there are processors.
func TestBoundOfProcess(t *testing.T) {
	const processors, pollers = 4, 12
	b := &budget{}
	b.limit.Store(processors)
	for i := range processors - 1 {
		if !b.enter() {
			t.Fatalf("poller %d of %d on %d processors may not look", i, processors-1, processors)
		}
	}
	if b.enter() {
		t.Fatalf("%d look on as many processors", processors)
	}
	for range processors - 1 {
		b.leave()
	}
	var looking, most atomic.Int32
	var wg sync.WaitGroup
	for range pollers {
		wg.Go(func() {
			for range 20000 {
				if !b.enter() {
					continue
				}
				now := looking.Add(1)
				for old := most.Load(); now > old && !most.CompareAndSwap(old, now); old = most.Load() {
				}
				looking.Add(-1)
				b.leave()
			}
		})
	}
	wg.Wait()
	if n := most.Load(); n < 1 || n >= processors {
		t.Errorf("%d looked at the same time on %d processors", n, processors)
	}
	if n := b.polling.Load(); n != 0 {
		t.Errorf("%d pollers are left in the budget", n)
	}
}

// With one processor nobody looks twice: what is waited for needs it.
func TestOneProcessor(t *testing.T) {
	p, w := newPoller()
	p.budget.limit.Store(1)
	for range 20 {
		w.at, w.looked = w.now+20*time.Microsecond, 0
		if p.Poll(w.ready) || w.looked != 1 {
			t.Fatalf("looked %d times", w.looked)
		}
		w.now = w.at
		p.Woke()
	}
}

func TestNoAllocation(t *testing.T) {
	p := &Poller{Max: 20 * time.Microsecond}
	n := 0
	ready := func() bool { n++; return n%100 == 0 }
	if got := testing.AllocsPerRun(200, func() { p.Poll(ready); p.Woke() }); got != 0 {
		t.Errorf("%v allocations a look", got)
	}
}

func BenchmarkPollReady(b *testing.B) {
	p := &Poller{Max: 20 * time.Microsecond}
	ready := func() bool { return true }
	b.ReportAllocs()
	for b.Loop() {
		p.Poll(ready)
	}
}
