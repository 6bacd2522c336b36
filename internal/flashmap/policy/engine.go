package policy

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/internal/flashmap/collect"
)

// Device is a primary device as the engine is shown it.
type Device struct {
	Number   int    // that of the device; Input has devices in its order
	Type     string // selects the pattern
	Snapshot collect.Snapshot
	// On are the sets that are on flash, in the order of their numbers.
	On []collect.Set
	// Attributes tells of a set what is not in the snapshot; nil for nothing.
	Attributes func(collect.Set) Attributes
}

// Input is what the engine decides by.
type Input struct {
	Now      time.Time
	Devices  []Device
	SetBytes int64  // of a data set, the same for all devices
	Slots    int    // sets that find room on flash
	Written  uint64 // bytes that clients have ever written to flash
	Pins     []Pin
}

// Kind is what a move does.
type Kind string

// The kinds of moves.
const (
	Promote Kind = "promote" // to flash
	Demote  Kind = "demote"  // back to the primary device
)

// Move is a data set that is to be moved.
type Move struct {
	Kind   Kind
	Device int // its number
	Set    collect.Set
	// Benefit is the time in milliseconds that flash saves or saved in a window.
	Benefit float64
	Why     string
}

// key names a data set.
type key struct {
	device int
	set    collect.Set
}

func (k key) less(o key) bool { return k.compare(o) < 0 }

func (k key) compare(o key) int {
	return cmp.Or(cmp.Compare(k.device, o.device), cmp.Compare(k.set, o.set))
}

// Limits of one step: moves that may be under way, and rules that are evaluated.
const (
	maxUnderWay    = 4096
	maxEvaluations = 1 << 15
)

// Engine decides which sets move. It is for one goroutine at a time.
type Engine struct {
	p        Params
	rules    map[string]rules
	budgets  budgets
	backoff  backoff
	underWay map[key]Kind
	young    map[key]time.Time // when sets came to flash that must stay for now
	stopped  string            // the budget for which the newest step ended

	evaluated, broken uint64
	brokenBy          error
}

// New returns an engine. The error is that of Params.Validate.
func New(p Params) (*Engine, error) {
	e := &Engine{
		backoff:  backoff{map[key]failure{}, map[int]failure{}},
		underWay: map[key]Kind{}, young: map[key]time.Time{},
	}
	if _, err := e.Use(p); err != nil {
		return nil, err
	}
	return e, nil
}

// Use makes other parameters count from the next step on, and returns what they change. What
// is under way, failures, and what was spent of the budgets stay. Wrong parameters change
// nothing; the error is that of Params.Validate. Collection parameters are the collectors' to
// use.
func (e *Engine) Use(p Params) ([]Change, error) {
	r, err := p.compile()
	if err != nil {
		return nil, err
	}
	changes := Diff(e.p, p)
	e.p, e.rules = p, r
	e.brokenBy = nil // it was of rules that may not count any more
	e.budgets.b, e.budgets.interval = p.Budget, p.Interval
	return changes, nil
}

// Params returns the parameters that count.
func (e *Engine) Params() Params { return e.p }

// Least returns how many accesses in a window, those in runs apart, a data set of a type of
// device has at least that makes a difference to Step, on flash or not: snapshots need no sets
// with fewer.
func (e *Engine) Least(typ string) float64 {
	p, typ := e.p.pattern(typ)
	if e.rules[typ].demote != nil {
		return 0 // it may ask for anything
	}
	return p.MinAccesses * e.p.Hysteresis.Keep
}

// Step returns the next moves. They are to be done in their order: a set may get the slot of
// one that is demoted before it. Done is to be called once for each.
func (e *Engine) Step(in Input) []Move {
	e.budgets.advance(in.Now, in.Written, in.SetBytes)
	for k, at := range e.young {
		if in.Now.Sub(at) >= e.p.Hysteresis.Stay {
			delete(e.young, k)
		}
	}
	e.stopped = ""
	b := e.look(in)
	b.shrink()
	b.pinned()
	b.fill()
	for _, m := range b.moves {
		e.underWay[key{m.Device, m.Set}] = m.Kind
	}
	return b.moves
}

// Done says how a move ended. An error that wraps ErrNoRoom is no failure; after any other
// the set, and for a shorter time its device, are left alone.
func (e *Engine) Done(m Move, err error, now time.Time) {
	k := key{m.Device, m.Set}
	if e.underWay[k] != m.Kind {
		return
	}
	delete(e.underWay, k)
	switch {
	case err != nil:
		e.backoff.failed(k, err, now)
		return
	case m.Kind == Promote:
		e.young[k] = now
	default:
		delete(e.young, k)
	}
	e.backoff.moved(k)
}

// Withdraw says that a move was not begun, and will not be: what it would have cost can be
// spent on others. It takes the place of Done.
func (e *Engine) Withdraw(m Move, setBytes int64) {
	k := key{m.Device, m.Set}
	if e.underWay[k] != m.Kind {
		return
	}
	delete(e.underWay, k)
	toFlash := int64(0)
	if m.Kind == Promote {
		toFlash = setBytes
	}
	e.budgets.spend(-setBytes, -toFlash)
}

// Wear is what was written to flash of late, for Budget.Wear to count on after a restart.
type Wear struct {
	Hour  int64     // the newest one, since 1970
	Bytes [25]int64 // of that and the 24 before it; the place is the hour modulo 25
}

// Wear returns what was written to flash of late.
func (e *Engine) Wear() Wear { return Wear{e.budgets.hour, e.budgets.hours} }

// AddWear adds what an engine before has known of. What lies in the future is left out, for
// it could never have been.
func (e *Engine) AddWear(w Wear, now time.Time) {
	s := &e.budgets
	s.forward(now.Unix() / 3600)
	for h := max(s.hour, w.Hour) - int64(len(w.Bytes)) + 1; h <= min(s.hour, w.Hour); h++ {
		if n := w.Bytes[h%int64(len(w.Bytes))]; n > 0 && n < math.MaxInt64/(2*int64(len(w.Bytes))) {
			s.hours[h%int64(len(s.hours))] += n
		}
	}
}

// item is a data set that the engine looks at.
type item struct {
	device  int // index in Input.Devices
	stat    collect.Stat
	benefit float64
	leaves  string // why it goes before others, if it does
	first   bool   // its slot is free for whoever wants it, whatever it saves
}

// board is one step in the making.
type board struct {
	e     *Engine
	in    Input
	pins  pins
	moves []Move

	free       int // slots, when all that is under way is done; below 0 when there are too few
	candidates []item
	residents  []item // that may leave
	sorted     bool   // residents are in the order in which they leave
	leaving    map[key]bool
	left       int // evaluations of rules
}

// look sorts the sets into candidates and residents.
func (e *Engine) look(in Input) *board {
	b := &board{e: e, in: in, pins: newPins(in), free: in.Slots, leaving: map[key]bool{}, left: maxEvaluations}
	coming := map[key]bool{}
	for k, kind := range e.underWay {
		if kind == Promote {
			coming[k] = true
		}
	}
	for i := range in.Devices {
		d := &in.Devices[i]
		b.free -= len(d.On)
		on := d.On
		p, _ := e.p.pattern(d.Type)
		for _, s := range d.On {
			k := key{d.Number, s}
			delete(coming, k)
			if e.underWay[k] == Demote {
				b.free++
			}
		}
		for k := range d.Snapshot.Stats {
			st := &d.Snapshot.Stats[k]
			for len(on) > 0 && on[0] < st.Set {
				b.resident(i, collect.Stat{Set: on[0], Age: math.MaxInt64}, &p)
				on = on[1:]
			}
			if len(on) > 0 && on[0] == st.Set {
				b.resident(i, *st, &p)
				on = on[1:]
				continue
			}
			if d.Snapshot.Windows >= 1 && fits(&p, st, 1) {
				b.candidate(i, st, &p)
			}
		}
		for ; len(on) > 0; on = on[1:] {
			b.resident(i, collect.Stat{Set: on[0], Age: math.MaxInt64}, &p)
		}
	}
	b.free -= len(coming)
	slices.SortFunc(b.candidates, func(x, y item) int {
		return cmp.Or(cmp.Compare(y.benefit, x.benefit), b.key(&x).compare(b.key(&y)))
	})
	return b
}

func (b *board) key(it *item) key { return key{b.in.Devices[it.device].Number, it.stat.Set} }

// candidate takes a set that shows the limits of its pattern, unless it cannot move.
func (b *board) candidate(device int, st *collect.Stat, p *Pattern) {
	it := item{device: device, stat: *st, benefit: benefit(p, st)}
	k := b.key(&it)
	if _, moves := b.e.underWay[k]; moves || b.pins.has(k) {
		return
	}
	if _, waits := b.e.backoff.waits(k, b.in.Now); waits {
		return
	}
	b.candidates = append(b.candidates, it)
}

// resident takes a set that is on flash, unless it has to stay there.
func (b *board) resident(device int, st collect.Stat, p *Pattern) {
	it := item{device: device, stat: st, benefit: benefit(p, &st)}
	k := b.key(&it)
	_, moves := b.e.underWay[k]
	_, young := b.e.young[k]
	if moves || young || b.pins.has(k) {
		return
	}
	if _, waits := b.e.backoff.waits(k, b.in.Now); waits {
		return
	}
	switch {
	case b.in.Devices[device].Snapshot.Windows < 1:
		it.benefit = math.MaxFloat64 // too little is known of it to give it up
	case !fits(p, &st, b.e.p.Hysteresis.Keep):
		it.leaves = "it shows its pattern no more"
	}
	b.residents = append(b.residents, it)
}

// benefit is the time in milliseconds that flash saves in a window.
func benefit(p *Pattern, st *collect.Stat) float64 {
	return (float64(st.Reads) + p.WriteWeight*float64(st.Writes)) * float64(p.Saves) / float64(time.Millisecond)
}

// Benefit returns the time in milliseconds that flash saves in a window where a set of a type
// of device is used so.
func (p *Params) Benefit(typ string, st *collect.Stat) float64 {
	q, _ := p.pattern(typ)
	return benefit(&q, st)
}

// fits reports whether a set is within the limits of a pattern, of each of which a part
// suffices.
func fits(p *Pattern, st *collect.Stat, part float64) bool {
	return st.Accesses() >= p.MinAccesses*part &&
		(p.MinRandom == 0 || st.Random() >= p.MinRandom*part) &&
		(p.MaxRequest == 0 || float64(st.Size)*part <= float64(p.MaxRequest)) &&
		(p.MaxAge == 0 || float64(st.Age)*part <= float64(p.MaxAge))
}

// sortResidents brings residents into the order in which they leave, when a slot is wanted.
func (b *board) sortResidents() {
	if b.sorted {
		return
	}
	b.sorted = true
	byBenefit := func(x, y item) int {
		return cmp.Or(cmp.Compare(x.benefit, y.benefit), b.key(&x).compare(b.key(&y)))
	}
	slices.SortFunc(b.residents, byBenefit)
	for i := range b.residents {
		it := &b.residents[i]
		d := &b.in.Devices[it.device]
		p, typ := b.e.p.pattern(d.Type)
		r := b.e.rules[typ].demote
		if p.MinReferences > 0 && float64(b.attributes(it).References) < float64(p.MinReferences)*b.e.p.Hysteresis.Keep {
			it.leaves = "it shows its pattern no more"
		}
		if r != nil && b.evaluate(r, it, true) {
			it.leaves, it.first = "the rule of demotion holds", true
		}
	}
	rank := func(it *item) int {
		switch {
		case it.first:
			return 0
		case it.leaves != "":
			return 1
		}
		return 2
	}
	slices.SortStableFunc(b.residents, func(x, y item) int { return cmp.Compare(rank(&x), rank(&y)) })
}

func (b *board) attributes(it *item) (a Attributes) {
	if f := b.in.Devices[it.device].Attributes; f != nil {
		a = f(it.stat.Set)
	}
	return a
}

// evaluate tells whether a rule holds for a set; not when there were too many evaluations.
func (b *board) evaluate(r *rule, it *item, onFlash bool) bool {
	if b.left == 0 {
		return false
	}
	b.left--
	ok, err := r.holds(&facts{it.stat, b.attributes(it), b.pins.has(b.key(it)), onFlash})
	b.e.evaluated++
	if err != nil {
		b.e.broken++
		b.e.brokenBy = err
	}
	return ok
}

// admits reports whether a candidate shows what is looked at last, because it costs most.
func (b *board) admits(it *item) bool {
	p, typ := b.e.p.pattern(b.in.Devices[it.device].Type)
	if p.MinReferences > 0 && b.attributes(it).References < p.MinReferences {
		return false
	}
	r := b.e.rules[typ].promote
	return r == nil || b.evaluate(r, it, false)
}

// move adds a move if budgets allow it. A promotion may bring a demotion along, for its slot.
func (b *board) move(promote *Move, demote *Move) bool {
	n, toFlash := int64(0), int64(0)
	if promote != nil {
		n, toFlash = b.in.SetBytes, b.in.SetBytes
	}
	if demote != nil {
		n += b.in.SetBytes
	}
	if len(b.e.underWay)+len(b.moves)+2 > maxUnderWay {
		b.e.stopped = "moves under way"
		return false
	}
	ok, why := b.e.budgets.may(n, toFlash)
	if !ok {
		b.e.stopped = why
		return false
	}
	b.e.budgets.spend(n, toFlash)
	if demote != nil {
		b.moves = append(b.moves, *demote)
		b.leaving[key{demote.Device, demote.Set}] = true
		b.free++
	}
	if promote != nil {
		b.moves = append(b.moves, *promote)
		b.free--
	}
	return true
}

func (b *board) demotion(it *item, why string) *Move {
	return &Move{Demote, b.in.Devices[it.device].Number, it.stat.Set, it.benefit, why}
}

// next returns the resident that leaves first for one that saves so much more, or nil. gain is
// what Hysteresis.Gain accesses save.
func (b *board) next(benefit, gain float64) *item {
	b.sortResidents()
	for len(b.residents) > 0 && b.leaving[b.key(&b.residents[0])] {
		b.residents = b.residents[1:]
	}
	if len(b.residents) == 0 {
		return nil
	}
	it := &b.residents[0]
	switch h := &b.e.p.Hysteresis; {
	case it.first || it.leaves != "" && it.benefit < benefit:
		return it
	case it.leaves == "" && benefit >= it.benefit*h.Margin && benefit >= it.benefit+gain:
		return it
	case it.leaves == "":
		return nil
	}
	// It saves more, although it shows its pattern no more. Those that do may save less.
	for i := range b.residents {
		if o := &b.residents[i]; o.leaves == "" && !b.leaving[b.key(o)] {
			if benefit >= o.benefit*b.e.p.Hysteresis.Margin && benefit >= o.benefit+gain {
				return o
			}
			return nil
		}
	}
	return nil
}

// shrink demotes what there are no slots for.
func (b *board) shrink() {
	for b.free < 0 {
		it := b.next(math.Inf(1), 0)
		if it == nil || !b.move(nil, b.demotion(it, "flash has fewer slots")) {
			return
		}
	}
}

// pinned promotes what is pinned.
func (b *board) pinned() {
	skip := func(device int) bool { return b.in.Now.Before(b.e.backoff.devices[device].until) }
	coming := map[key]bool{}
	b.pins.missing(skip, func(k key) bool {
		if _, moves := b.e.underWay[k]; moves || coming[k] {
			return true
		}
		coming[k] = true
		if _, waits := b.e.backoff.waits(k, b.in.Now); waits {
			return true
		}
		var demote *Move
		if b.free <= 0 {
			it := b.next(math.Inf(1), 0)
			if it == nil {
				return false
			}
			demote = b.demotion(it, "a pinned set gets its slot")
		}
		return b.move(&Move{Promote, k.device, k.set, 0, "it is pinned"}, demote)
	})
}

// fill promotes candidates, the one that saves most first.
func (b *board) fill() {
	for i := range b.candidates {
		it := &b.candidates[i]
		d := &b.in.Devices[it.device]
		p, _ := b.e.p.pattern(d.Type)
		var victim *item
		if b.free <= 0 {
			gain := b.e.p.Hysteresis.Gain * float64(p.Saves) / float64(time.Millisecond)
			if victim = b.next(it.benefit, gain); victim == nil {
				return // those that follow save less
			}
		}
		if b.left == 0 {
			b.e.stopped = "evaluations of rules"
			return
		}
		if !b.admits(it) {
			continue
		}
		var demote *Move
		if victim != nil {
			why := victim.leaves
			if why == "" {
				why = fmt.Sprintf("set %d of device %d saves more", it.stat.Set, d.Number)
			}
			demote = b.demotion(victim, why)
		}
		if !b.move(&Move{Promote, d.Number, it.stat.Set, it.benefit, "it shows its pattern"}, demote) {
			return
		}
	}
}
