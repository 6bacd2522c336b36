// Package spin decides how long somebody who waits for another processor looks
// before sleeping.
//
// To sleep and be woken takes some microseconds, on both sides; an answer from
// memory comes sooner than that. But a look that is in vain takes a processor
// from others, from the one that is waited for among them. So a [Poller] keeps
// a window, the time that it looks for, and moves it by what it sees:
//
//   - What comes within the window leaves it as it is.
//   - What comes soon after it, within Max, would have been worth a longer
//     look: the window doubles.
//   - What comes later was not worth looking for: the window becomes a quarter,
//     and nothing after a long silence. So an idle poller costs one look at
//     each awakening.
//   - A look during which the processor was taken away shows that there are
//     more threads than processors, and perhaps that the other side waits for
//     this very one: the window ends, and does not grow for a while.
//
// All pollers of a process share one bound: one processor of those that the
// process may use is left to everybody else. Whoever finds the others busy
// looking looks once and sleeps.
package spin

import (
	"runtime"
	"sync/atomic"
	"time"
)

const (
	// first is the window that the first short sleep brings.
	first = 4 * time.Microsecond
	// silence, in multiples of Max, ends a window at once.
	silence = 64
	// taken, in multiples of Max, is how late a look may notice its end. Later
	// than that and somebody else had the processor.
	taken = 8
	// shy is for how many failed looks a window stays shut after that.
	shy = 64
	// patience is how many looks of the full length may be in vain in a row.
	patience = 4
	// looks is how often a poller looks for each time that it asks the clock.
	looks = 16
)

// Poller belongs to one goroutine at a time. Its zero value never polls; set
// Max before its first use and do not change it while a Poll runs.
type Poller struct {
	// Max is the longest look. About twice what sleeping and waking cost is
	// right; 50 µs is a good beginning.
	Max time.Duration
	// Clock gives the time since any fixed moment. Nil is the monotonic clock.
	Clock func() time.Duration

	window time.Duration
	slept  time.Duration // when the last look ended in vain
	asleep bool          // that was so, and nothing has come since
	shy    int           // failed looks during which the window stays shut
	vain   int           // looks of the full length in a row that were in vain
	budget *budget       // nil is that of the process
}

// Poll looks by ready until that returns true or the window is over, at least
// once, and returns what the last look returned. When it returns false the
// owner is to sleep and, once woken, to call [Poller.Woke], or to call Poll
// again as soon as it has done what it was woken for. It does not allocate;
// to make that true of the caller as well, keep ready in a field.
func (p *Poller) Poll(ready func() bool) bool {
	if ready() {
		p.asleep = false
		return true
	}
	if p.Max <= 0 {
		return false
	}
	now := p.now()
	p.learn(now)
	if p.window > 0 && p.poll(ready, now) {
		p.asleep, p.vain = false, 0
		return true
	}
	p.slept, p.asleep = p.now(), true
	return false
}

// Woke says that the sleep after a Poll in vain is over. It makes what the
// poller learns exact for owners that do something of their own before they
// poll again.
func (p *Poller) Woke() {
	if p.Max > 0 {
		p.learn(p.now())
	}
}

// poll looks from begin on for the length of the window, if the process has a
// processor for that.
func (p *Poller) poll(ready func() bool, begin time.Duration) bool {
	b := p.budget
	if b == nil {
		b = &process
	}
	if !b.enter() {
		return false
	}
	defer b.leave()
	for {
		for range looks {
			if ready() {
				return true
			}
		}
		d := p.now() - begin
		if d >= taken*p.Max {
			p.window, p.shy = 0, shy
			return false
		}
		if d >= p.window {
			return false
		}
	}
}

// learn moves the window by how long the sleep was that has ended now.
func (p *Poller) learn(now time.Duration) {
	if !p.asleep {
		return
	}
	p.asleep = false
	if p.shy > 0 {
		p.shy--
		return
	}
	switch d := now - p.slept; {
	case d <= p.Max && p.window == p.Max:
		if p.vain++; p.vain == patience {
			p.window, p.shy, p.vain = 0, shy, 0
		}
	case d <= p.Max:
		p.window = min(max(2*p.window, first), p.Max)
	case d > silence*p.Max:
		p.window = 0
	default:
		if p.window /= 4; p.window < first {
			p.window = 0
		}
	}
}

// epoch is what the clock counts from; any moment does.
var epoch = time.Now()

func (p *Poller) now() time.Duration {
	if p.Clock != nil {
		return p.Clock()
	}
	return time.Since(epoch)
}

// budget bounds how many look at the same time.
type budget struct {
	polling atomic.Int32
	entries atomic.Uint32
	limit   atomic.Int32 // processors; 0 is not known yet
}

// process is the budget of this process.
var process budget

// asks is after how many looks a budget asks again how many processors there
// are, which takes a lock of the runtime.
const asks = 1 << 12

// enter says whether one more may look, who must then leave.
func (b *budget) enter() bool {
	limit := b.limit.Load()
	if limit == 0 || b.entries.Add(1)%asks == 0 {
		limit = int32(runtime.GOMAXPROCS(0))
		b.limit.Store(limit)
	}
	if b.polling.Add(1) <= limit-1 {
		return true
	}
	b.leave()
	return false
}

func (b *budget) leave() { b.polling.Add(-1) }
