package policy

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/flashmap/collect"
)

// Explanation says why a data set is where it is.
type Explanation struct {
	Device  int
	Set     collect.Set
	Type    string // of the device
	Pattern string // the type whose pattern it is compared with
	State   string // "on flash", "on its device", "moves to flash" or "moves back"
	Pinned  bool
	// Limits are what it shows beside what it should.
	Limits []Limit
	// Rule is the rule of promotion, of a set on flash that of demotion, "" without one;
	// Holds whether it does, and RuleError why that cannot be told.
	Rule      string
	Holds     bool
	RuleError string
	// Benefit is the time in milliseconds that flash saves in a window, Rank its place
	// among all sets that are on flash or show the limits of their patterns, from 1; 0 if
	// it is none of these. Of and Slots are how many those are, and find room.
	Benefit float64
	Rank    int
	Of      int
	Slots   int
	// Missing is what keeps a set from flash, or would let one leave it.
	Missing []string
	// Retry is when a move that failed may be tried again, and Failure why it failed.
	Retry   time.Time
	Failure string
	// Summary is one sentence.
	Summary string
}

// Limit is one number beside its limit.
type Limit struct {
	Name  string // of the parameter
	Value string
	Limit string // with its comparison; of a set on flash what suffices to stay
	Holds bool
}

// Explain says why a set is where it is. It changes nothing.
func (e *Engine) Explain(in Input, device int, set collect.Set) (Explanation, error) {
	i := slices.IndexFunc(in.Devices, func(d Device) bool { return d.Number == device })
	if i < 0 {
		return Explanation{}, fmt.Errorf("there is no device %d", device)
	}
	d := &in.Devices[i]
	if uint64(set) >= d.Snapshot.Geometry.Sets() {
		return Explanation{}, fmt.Errorf("device %d has %d data sets, there is no set %d", device, d.Snapshot.Geometry.Sets(), set)
	}
	st, _ := d.Snapshot.Find(set)
	_, on := slices.BinarySearch(d.On, set)
	p, typ := e.p.pattern(d.Type)
	k := key{device, set}
	pinned := newPins(in)
	x := Explanation{
		Device: device, Set: set, Type: d.Type, Pattern: typ, State: "on its device", Pinned: pinned.has(k),
		Benefit: benefit(&p, &st), Slots: in.Slots,
	}
	if on {
		x.State = "on flash"
	}
	switch e.underWay[k] {
	case Promote:
		x.State = "moves to flash"
	case Demote:
		x.State = "moves back"
	}
	f := facts{stat: st, pinned: x.Pinned, onFlash: on}
	if d.Attributes != nil {
		f.attr = d.Attributes(set)
	}
	part := 1.0
	if on {
		part = e.p.Hysteresis.Keep
	}
	x.Limits = limits(&p, &f, part)
	for _, l := range x.Limits {
		if !l.Holds {
			x.Missing = append(x.Missing, l.Name)
		}
	}
	e.explainRule(&x, &f, typ, on)
	if !on && d.Snapshot.Windows < 1 {
		x.Missing = append(x.Missing, "a whole window")
	}
	x.Rank, x.Of = e.rank(in, k, x.Benefit)
	if w, waits := e.backoff.waits(k, in.Now); waits {
		x.Retry, x.Failure = w.until, w.err.Error()
	}
	x.Summary = e.summary(&x, on)
	return x, nil
}

// explainRule evaluates the rule that concerns a set.
func (e *Engine) explainRule(x *Explanation, f *facts, typ string, on bool) {
	r, name := e.rules[typ].promote, "the rule of promotion"
	if on {
		r = e.rules[typ].demote
	}
	if r == nil {
		return
	}
	ok, err := r.holds(f)
	x.Rule, x.Holds = r.text, ok
	if err != nil {
		x.RuleError = err.Error()
	}
	if !on && !ok {
		x.Missing = append(x.Missing, name)
	}
}

// limits compares what a set shows with its pattern, of whose limits a part suffices.
func limits(p *Pattern, f *facts, part float64) []Limit {
	st := &f.stat
	age := "never used"
	if st.Age < math.MaxInt64 {
		age = st.Age.String()
	}
	number := func(v float64) string { return fmt.Sprintf("%.4g", v) }
	all := []Limit{
		{"min_accesses", number(st.Accesses()), "at least " + number(p.MinAccesses*part), st.Accesses() >= p.MinAccesses*part},
	}
	if p.MinRandom > 0 {
		all = append(all, Limit{"min_random", number(st.Random()), "at least " + number(p.MinRandom*part), st.Random() >= p.MinRandom*part})
	}
	if p.MaxRequest > 0 {
		most := float64(p.MaxRequest) / part
		all = append(all, Limit{"max_request", number(float64(st.Size)), "at most " + config.Size(most).String(), float64(st.Size) <= most})
	}
	if p.MaxAge > 0 {
		all = append(all, Limit{"max_age", age, "at most " + time.Duration(float64(p.MaxAge)/part).String(), float64(st.Age)*part <= float64(p.MaxAge)})
	}
	if p.MinReferences > 0 {
		least := float64(p.MinReferences) * part
		all = append(all, Limit{"min_references", fmt.Sprint(f.attr.References), "at least " + number(least), float64(f.attr.References) >= least})
	}
	return all
}

// rank tells the place of a set by what flash saves, and of how many.
func (e *Engine) rank(in Input, k key, benefitOf float64) (rank, of int) {
	before, among := 0, false
	count := func(o key, b float64) {
		of++
		switch c := cmp.Compare(b, benefitOf); {
		case o == k:
			among = true
		case c > 0 || c == 0 && o.less(k):
			before++
		}
	}
	for i := range in.Devices {
		d := &in.Devices[i]
		p, _ := e.p.pattern(d.Type)
		for j := range d.Snapshot.Stats {
			st := &d.Snapshot.Stats[j]
			_, on := slices.BinarySearch(d.On, st.Set)
			if on || d.Snapshot.Windows >= 1 && fits(&p, st, 1) {
				count(key{d.Number, st.Set}, benefit(&p, st))
			}
		}
		for _, s := range d.On {
			if _, known := d.Snapshot.Find(s); !known {
				count(key{d.Number, s}, 0)
			}
		}
	}
	if !among {
		return 0, of
	}
	return before + 1, of
}

// summary says the same in a sentence.
func (e *Engine) summary(x *Explanation, on bool) string {
	switch {
	case x.State == "moves to flash" || x.State == "moves back":
		return "It " + x.State + "."
	case x.Failure != "":
		return fmt.Sprintf("It %s; moves wait until %s after a failure: %s.", is(on), x.Retry.UTC().Format(time.RFC3339), x.Failure)
	case x.Pinned && on:
		return "It is on flash because it is pinned."
	case x.Pinned:
		return "It is pinned, and waits for room or for a budget."
	case on && x.Rule != "" && x.Holds:
		return "It is on flash until its slot is wanted: the rule of demotion holds."
	case on && len(x.Missing) > 0:
		return fmt.Sprintf("It is on flash until its slot is wanted: it shows its pattern no more (%s).", list(x.Missing))
	case on:
		return fmt.Sprintf("It is on flash: it shows its pattern and is number %d of %d.", x.Rank, x.Of)
	case len(x.Missing) > 0:
		return fmt.Sprintf("It is on its device: it does not show the pattern (%s).", list(x.Missing))
	case e.stopped != "" && x.Rank <= x.Slots:
		return fmt.Sprintf("It shows the pattern and is number %d of %d; moves wait for %s.", x.Rank, x.Of, e.stopped)
	case x.Rank > x.Slots:
		return fmt.Sprintf("It shows the pattern, but is number %d of %d, and flash has room for %d.", x.Rank, x.Of, x.Slots)
	}
	return fmt.Sprintf("It shows the pattern and is number %d of %d; it waits for its turn, or does not save enough more than what is on flash.", x.Rank, x.Of)
}

func is(on bool) string {
	if on {
		return "is on flash"
	}
	return "is on its device"
}

func list(names []string) string {
	out := ""
	for i, n := range names {
		if i > 0 {
			out += ", "
		}
		out += n
	}
	return out
}

// Status is what an engine says of itself.
type Status struct {
	UnderWay int // moves
	// Stopped is what ended the newest step before all that should move did: a budget, the
	// limit of moves under way or that of evaluations of rules; "" for nothing.
	Stopped string
	// Worn is how many bytes were written to flash in the last 24 hours, as Budget.Wear
	// counts them.
	Worn int64
	// Failures are the sets whose moves failed and were not done since.
	Failures []Failure
	// Evaluated and Broken are how often rules were evaluated and could not be, RuleError
	// is why, of the newest one since the parameters were changed.
	Evaluated, Broken uint64
	RuleError         string
}

// Failure is a set whose moves fail.
type Failure struct {
	Device int
	Set    collect.Set
	Times  int
	Until  time.Time // when it is tried again
	Reason string
}

// Status returns what the engine says of itself.
func (e *Engine) Status() Status {
	s := Status{UnderWay: len(e.underWay), Stopped: e.stopped, Worn: e.budgets.worn(), Evaluated: e.evaluated, Broken: e.broken}
	if e.brokenBy != nil {
		s.RuleError = e.brokenBy.Error()
	}
	for k, f := range e.backoff.sets {
		s.Failures = append(s.Failures, Failure{k.device, k.set, f.times, f.until, f.err.Error()})
	}
	slices.SortFunc(s.Failures, func(a, b Failure) int {
		return cmp.Or(cmp.Compare(a.Device, b.Device), cmp.Compare(a.Set, b.Set))
	})
	return s
}
