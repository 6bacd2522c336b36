package blocktest

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"

	"github.com/pollux-storage/pollux/hpdi"
)

// Rule says which requests a Fault spoils, and how. A request that several
// rules match is spoilt by the first of them.
type Rule struct {
	// Which requests.
	Op          hpdi.Op // 0: every operation
	Offset      int64   // first byte of the range; a request matches when it touches the range
	Length      int64   // bytes; 0: to the end of the device
	Skip        int     // let so many matching requests pass first
	Count       int     // then spoil so many; 0: all
	Probability float64 // of each; 0: certain

	// What happens to them.
	Err       error // complete with this error
	Late      bool  // with Err: carry the request out all the same
	FlipBits  int   // of a read: flip so many bits, by seed, of what was read
	Lose      bool  // complete without an error and without doing anything
	Misdirect int64 // go to this many bytes beside the right place
	// Hold is called before the request is passed on, on a goroutine of its
	// own, and keeps the request in flight for as long as it blocks.
	Hold func(*hpdi.Request)

	seen, hit int
}

// Fault is a device that misbehaves by rule. Without rules it is transparent.
type Fault struct {
	dev hpdi.Device

	mu    sync.Mutex // guards all below; never held while the device is called
	rng   *rand.Rand
	rules []*Rule
	size  int64 // shown instead of the device's own when smaller
}

// NewFault wraps dev. The seed decides probabilities and which bits flip.
func NewFault(dev hpdi.Device, seed uint64) *Fault {
	return &Fault{dev: dev, rng: newRand(seed, 3), size: dev.Info().Size}
}

// Add adds a rule behind those that are there and returns what removes it.
func (f *Fault) Add(r Rule) (remove func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	own := &r
	f.rules = append(f.rules, own)
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		for i, x := range f.rules {
			if x == own {
				f.rules = append(f.rules[:i:i], f.rules[i+1:]...)
				return
			}
		}
	}
}

// Clear removes all rules.
func (f *Fault) Clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = nil
}

// Hits returns how many requests the present rules have spoilt.
func (f *Fault) Hits() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, r := range f.rules {
		n += r.hit
	}
	return n
}

// Shorten makes the device appear to end after size bytes.
func (f *Fault) Shorten(size int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.size = size
}

// Info describes the wrapped device, shortened if so told.
func (f *Fault) Info() hpdi.Info {
	info := f.dev.Info().Plain()
	f.mu.Lock()
	defer f.mu.Unlock()
	info.Size = min(info.Size, f.size)
	return info
}

// Register passes through.
func (f *Fault) Register(mem []byte) error { return f.dev.Register(mem) }

// Unregister passes through.
func (f *Fault) Unregister(mem []byte) error { return f.dev.Unregister(mem) }

// Close passes through.
func (f *Fault) Close() error { return f.dev.Close() }

// NewQueue returns a queue over one of the device.
func (f *Fault) NewQueue(depth int) (hpdi.Queue, error) {
	in, err := f.dev.NewQueue(depth)
	if err != nil {
		return nil, err
	}
	q := &faultQueue{f: f, in: in, shadows: make(map[*hpdi.Request]shadow)}
	q.cond.L = &q.mu
	return q, nil
}

// pick returns a copy of the rule that spoils r, or nil.
func (f *Fault) pick(r *hpdi.Request) *Rule {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, rule := range f.rules {
		if !rule.matches(r) {
			continue
		}
		rule.seen++
		if rule.seen <= rule.Skip || rule.Count > 0 && rule.hit >= rule.Count {
			continue
		}
		if rule.Probability > 0 && f.rng.Float64() >= rule.Probability {
			continue
		}
		rule.hit++
		out := *rule
		return &out
	}
	return nil
}

func (rule *Rule) matches(r *hpdi.Request) bool {
	// A durable write is a sync as well.
	if rule.Op != 0 && rule.Op != r.Op && !(rule.Op == hpdi.OpFlush && r.Durable) {
		return false
	}
	if r.Op == hpdi.OpFlush {
		return rule.Op == hpdi.OpFlush || rule.Offset == 0 && rule.Length == 0
	}
	if r.Offset+r.Bytes() <= rule.Offset {
		return false
	}
	return rule.Length == 0 || r.Offset < rule.Offset+rule.Length
}

// spoil applies to a completed request what its rule says about results.
func (f *Fault) spoil(r *hpdi.Request, rule *Rule) {
	if rule.Err != nil {
		r.Err = fmt.Errorf("injected into %s at %d: %w", r.Op, r.Offset, rule.Err)
	}
	n := r.Bytes()
	if rule.FlipBits == 0 || r.Op != hpdi.OpRead || n == 0 || r.Err != nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for range rule.FlipBits {
		at := f.rng.Int64N(n)
		bit := byte(1) << f.rng.IntN(8)
		for _, v := range r.Vec {
			if at < int64(len(v)) {
				v[at] ^= bit
				break
			}
			at -= int64(len(v))
		}
	}
}

// shadow is what the device below is given in place of a request.
type shadow struct {
	orig *hpdi.Request
	rule *Rule
}

// faultQueue is used by one goroutine; only held requests bring others.
type faultQueue struct {
	hpdi.Plain
	f       *Fault
	in      hpdi.Queue
	flight  int // requests submitted to in and not returned by it
	shadows map[*hpdi.Request]shadow
	done    []*hpdi.Request // completed without the device
	closed  bool

	mu   sync.Mutex // guards what is below; cond tells of a change
	cond sync.Cond
	held int             // requests whose goroutine runs
	late []*hpdi.Request // requests that were held and are complete
}

func (q *faultQueue) Submit(reqs ...*hpdi.Request) error {
	if q.closed {
		return hpdi.ErrClosed
	}
	pass := make([]*hpdi.Request, 0, len(reqs))
	for _, r := range reqs {
		if r.Err = r.Check(q.f.Info()); r.Err != nil {
			q.done = append(q.done, r)
			continue
		}
		rule := q.f.pick(r)
		switch {
		case rule == nil:
			pass = append(pass, r)
		case rule.Hold != nil:
			q.hold(r, rule)
		case rule.Lose || rule.Err != nil && !rule.Late:
			q.f.spoil(r, rule)
			q.done = append(q.done, r)
		default:
			pass = append(pass, q.shadow(r, rule))
		}
	}
	q.flight += len(pass)
	return q.in.Submit(pass...)
}

// shadow returns the request that the device gets instead of r.
func (q *faultQueue) shadow(r *hpdi.Request, rule *Rule) *hpdi.Request {
	s := *r
	s.Offset += rule.Misdirect
	q.shadows[&s] = shadow{r, rule}
	return &s
}

// hold keeps r in flight until the rule's hook returns, and then runs it on a
// queue of its own, so that others overtake it.
func (q *faultQueue) hold(r *hpdi.Request, rule *Rule) {
	q.mu.Lock()
	q.held++
	q.mu.Unlock()
	go func() {
		rule.Hold(r)
		if !rule.Lose && (rule.Err == nil || rule.Late) {
			s := *r
			s.Offset += rule.Misdirect
			r.Err = q.f.alone(&s)
		}
		q.f.spoil(r, rule)
		q.mu.Lock()
		defer q.mu.Unlock()
		q.held--
		q.late = append(q.late, r)
		q.cond.Broadcast()
	}()
}

// alone runs one request on a queue of its own.
func (f *Fault) alone(r *hpdi.Request) error {
	q, err := f.dev.NewQueue(1)
	if err != nil {
		return err
	}
	defer q.Close()
	if err := q.Submit(r); err != nil {
		return err
	}
	if _, err := q.Wait(1, nil); err != nil {
		return err
	}
	return r.Err
}

// Wait prefers requests that the device has over held ones: with both in
// flight it may wait for the former although the latter would satisfy min.
func (q *faultQueue) Wait(minimum int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	if q.closed {
		return done, hpdi.ErrClosed
	}
	start := len(done)
	done = append(done, q.done...)
	q.done = q.done[:0]
	done = q.takeLate(done, 0)
	below, err := q.in.Wait(max(0, min(q.flight, minimum-(len(done)-start))), nil)
	q.flight -= len(below)
	for _, r := range below {
		if s, ok := q.shadows[r]; ok {
			delete(q.shadows, r)
			s.orig.Err = r.Err
			r = s.orig
			q.f.spoil(r, s.rule)
		}
		done = append(done, r)
	}
	if err != nil {
		return done, err
	}
	return q.takeLate(done, minimum-(len(done)-start)), nil
}

// takeLate appends held requests that have completed; it waits until there
// are at least want of them, or as many as are held.
func (q *faultQueue) takeLate(done []*hpdi.Request, want int) []*hpdi.Request {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.late) < want && q.held > 0 {
		q.cond.Wait()
	}
	done = append(done, q.late...)
	q.late = q.late[:0]
	return done
}

// Close waits for held requests too.
func (q *faultQueue) Close() error {
	if q.closed {
		return hpdi.ErrClosed
	}
	q.takeLate(nil, math.MaxInt)
	_, err := q.Wait(q.flight, nil)
	q.closed = true
	return errors.Join(err, q.in.Close())
}

// Gate is a hook for Rule.Hold that holds requests until it is opened.
type Gate struct {
	arrived chan *hpdi.Request
	open    chan struct{}
	once    sync.Once
}

// NewGate returns a closed gate.
func NewGate() *Gate {
	return &Gate{arrived: make(chan *hpdi.Request, 1024), open: make(chan struct{})}
}

// Hold blocks until the gate is open.
func (g *Gate) Hold(r *hpdi.Request) {
	g.arrived <- r
	<-g.open
}

// Arrived returns a channel that yields each request as it comes to be held.
func (g *Gate) Arrived() <-chan *hpdi.Request { return g.arrived }

// Open lets all requests pass, now and later.
func (g *Gate) Open() { g.once.Do(func() { close(g.open) }) }
