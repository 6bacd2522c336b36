package policy

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/flashmap/collect"
)

const (
	kib      = 1 << 10
	mib      = 1 << 20
	setBytes = 256 * kib
)

var start = time.Unix(1_800_000_000, 0)

func random(t *testing.T) *rand.Rand {
	t.Helper()
	s := rand.Uint64()
	if v := os.Getenv("POLLUX_SEED"); v != "" {
		var err error
		if s, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("POLLUX_SEED: %v", err)
		}
	}
	t.Logf("seed %d (POLLUX_SEED=%d repeats this run)", s, s)
	return rand.New(rand.NewPCG(s, s))
}

// testInput has device 1 with so many sets, each with reads in a window, and none on flash.
func testInput(slots, sets int, reads func(int) float64) Input {
	d := Device{Number: 1, Type: "disk", Snapshot: collect.Snapshot{
		At: start, Window: 10 * time.Minute, Windows: 3,
		Geometry: collect.Geometry{Size: int64(sets) * setBytes, SetBytes: setBytes},
	}}
	for i := range sets {
		d.Snapshot.Stats = append(d.Snapshot.Stats, collect.Stat{Set: collect.Set(i), Reads: float32(reads(i)), Size: 4 * kib, Age: time.Second})
	}
	return Input{Now: start, Devices: []Device{d}, SetBytes: setBytes, Slots: slots}
}

func newEngine(t *testing.T, text string) *Engine {
	t.Helper()
	p, err := Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(text, "budget") {
		p.Budget = Budget{}
	}
	e, err := New(p)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// apply makes moves on an input, and fails when there is no room for one.
func apply(t *testing.T, e *Engine, in *Input, moves []Move) {
	t.Helper()
	for _, m := range moves {
		d := &in.Devices[slices.IndexFunc(in.Devices, func(d Device) bool { return d.Number == m.Device })]
		i, on := slices.BinarySearch(d.On, m.Set)
		switch {
		case m.Kind == Promote && !on:
			d.On = slices.Insert(slices.Clone(d.On), i, m.Set)
		case m.Kind == Demote && on:
			d.On = slices.Delete(slices.Clone(d.On), i, i+1)
		default:
			t.Fatalf("%+v, on flash is %t", m, on)
		}
		n := 0
		for i := range in.Devices {
			n += len(in.Devices[i].On)
		}
		if n > in.Slots && m.Kind == Promote {
			t.Fatalf("%d sets on a flash of %d after %+v", n, in.Slots, m)
		}
		e.Done(m, nil, in.Now)
	}
}

// texts writes moves as short as tests compare them.
func texts(moves []Move) (out []string) {
	for _, m := range moves {
		out = append(out, fmt.Sprintf("%s %d:%d", m.Kind, m.Device, m.Set))
	}
	return out
}

func wantMoves(t *testing.T, moves []Move, want ...string) {
	t.Helper()
	if got := texts(moves); !slices.Equal(got, want) {
		t.Fatalf("moves %q, want %q", got, want)
	}
}

// What saves most comes first, whatever is too little used stays, and then nothing moves.
func TestFill(t *testing.T) {
	e := newEngine(t, "")
	in := testInput(3, 8, func(i int) float64 { return []float64{0, 30, 3, 90, 5, 60, 4, 8}[i] })
	moves := e.Step(in)
	wantMoves(t, moves, "promote 1:3", "promote 1:5", "promote 1:1")
	if moves[0].Benefit != 90*8 {
		t.Errorf("%+v", moves[0])
	}
	if again := e.Step(in); len(again) != 0 {
		t.Errorf("moves under way are told again: %q", texts(again))
	}
	apply(t, e, &in, moves)
	wantMoves(t, e.Step(in))
	in.Slots = 5
	wantMoves(t, e.Step(in), "promote 1:7", "promote 1:4")
}

// Hysteresis: a slot changes hands only for a good deal, and not at once; what shows its
// pattern no more goes first, and only when its slot is wanted.
func TestHysteresis(t *testing.T) {
	e := newEngine(t, "hysteresis: {keep: 0.5, margin: 1.5, gain: 10, stay: 5m}")
	reads := []float64{100, 50, 40, 0, 0, 0}
	in := testInput(3, 6, func(i int) float64 { return reads[i] })
	apply(t, e, &in, e.Step(in))
	set := func(i int, n float64) { in.Devices[0].Snapshot.Stats[i].Reads = float32(n) }

	set(3, 1000)
	in.Now = in.Now.Add(time.Minute)
	wantMoves(t, e.Step(in)) // all have come a moment ago
	set(3, 45)               // more than 40, but not by half
	in.Now = in.Now.Add(10 * time.Minute)
	wantMoves(t, e.Step(in))
	set(2, 10)
	set(3, 17) // more by half, but too few
	wantMoves(t, e.Step(in))
	set(3, 20)
	moves := e.Step(in)
	wantMoves(t, moves, "demote 1:2", "promote 1:3")
	apply(t, e, &in, moves)

	in.Now = in.Now.Add(10 * time.Minute)
	set(2, 0)
	set(1, 0.1) // shows its pattern no more
	wantMoves(t, e.Step(in))
	set(4, 4) // is just enough
	moves = e.Step(in)
	wantMoves(t, moves, "demote 1:1", "promote 1:4")
	if !strings.Contains(moves[0].Why, "pattern no more") {
		t.Errorf("%+v", moves[0])
	}
	apply(t, e, &in, moves)
	in.Now = in.Now.Add(10 * time.Minute)
	set(4, 2) // half of the limit suffices to stay
	set(5, 5)
	wantMoves(t, e.Step(in))
}

// A scan, which has accesses in runs alone, moves nothing; nor does what is read in large
// pieces, or was used long ago.
func TestPattern(t *testing.T) {
	e := newEngine(t, "")
	in := testInput(8, 5, func(int) float64 { return 50 })
	st := in.Devices[0].Snapshot.Stats
	st[0].Reads, st[0].Runs = 0, 5000
	st[1].Runs = 60
	st[2].Size = mib
	st[3].Age = 2 * time.Hour
	wantMoves(t, e.Step(in), "promote 1:4")
	in.Devices[0].Snapshot.Windows = 0.9
	if e := newEngine(t, ""); len(e.Step(in)) != 0 {
		t.Error("something moves before a whole window was seen")
	}
}

// Devices of different types have their own patterns and rules, and share the slots by what
// flash saves.
func TestTypes(t *testing.T) {
	e := newEngine(t, `
patterns:
  disk: {saves: 8ms, promote: "references >= 2 || reads > 100"}
  ssd: {saves: 100us, min_accesses: 1000, demote: "reads < 1500"}
hysteresis: {gain: 0, stay: 0s}
`)
	in := testInput(3, 4, func(i int) float64 { return float64(i) * 60 })
	in.Devices[0].Attributes = func(s collect.Set) Attributes { return Attributes{References: int(s) * 2 % 4} }
	ssd := testInput(0, 4, func(i int) float64 { return float64(i) * 700 }).Devices[0]
	ssd.Number, ssd.Type = 2, "ssd"
	in.Devices = append(in.Devices, ssd)
	moves := e.Step(in)
	wantMoves(t, moves, "promote 1:3", "promote 1:2", "promote 1:1")
	apply(t, e, &in, moves)

	in.Slots = 4
	moves = e.Step(in)
	wantMoves(t, moves, "promote 2:3")
	apply(t, e, &in, moves)
	in.Devices[1].Snapshot.Stats[3].Reads = 1400 // the rule of demotion holds
	in.Devices[0].Snapshot.Stats[0].Reads = 101
	wantMoves(t, e.Step(in), "demote 2:3", "promote 1:0")
	if s := e.Status(); s.Evaluated == 0 || s.Broken != 0 {
		t.Errorf("%+v", s)
	}
	// References are a limit, too.
	e = newEngine(t, "patterns: {disk: {min_references: 2}}")
	in = testInput(8, 4, func(int) float64 { return 50 })
	in.Devices[0].Attributes = func(s collect.Set) Attributes { return Attributes{References: int(s)} }
	wantMoves(t, e.Step(in), "promote 1:2", "promote 1:3")
	// A rule that breaks holds for nothing, and that is told.
	e = newEngine(t, "patterns: {disk: {promote: '1 / references > 0'}}")
	in.Devices[0].Attributes = nil
	if wantMoves(t, e.Step(in)); e.Status().Broken != 4 || !strings.Contains(e.Status().RuleError, "division by zero") {
		t.Errorf("%+v", e.Status())
	}
	// Of rules that were changed since it is not told any more.
	if _, err := e.Use(Defaults()); err != nil || e.Status().RuleError != "" || e.Status().Broken != 4 {
		t.Errorf("%v, %+v", err, e.Status())
	}
}

// Copying is within a rate, and what is written to flash within a day's amount.
func TestBudgets(t *testing.T) {
	rnd := random(t)
	e := newEngine(t, "interval: 10s\nbudget: {migrate: 64KiB, wear: 16MiB}\nhysteresis: {gain: 0, margin: 1, stay: 0s}")
	const sets, slots = 120, 20
	in := testInput(slots, sets, func(int) float64 { return 4 + rnd.Float64()*100 })
	type write struct {
		at time.Time
		n  int64
	}
	var writes []write
	copied := int64(0)
	why := map[string]int{}
	for range 1500 {
		in.Now = in.Now.Add(time.Duration(10+rnd.IntN(2)*rnd.IntN(300)) * time.Second)
		if rnd.IntN(3) == 0 {
			in.Devices[0].Snapshot.Stats[rnd.IntN(sets)].Reads = float32(4 + rnd.Float64()*100)
		}
		if rnd.IntN(50) == 0 {
			n := rnd.Int64N(mib / 2)
			in.Written += uint64(n)
			writes = append(writes, write{in.Now, n})
		}
		moves := e.Step(in)
		promoted := 0
		for _, m := range moves {
			copied += setBytes
			if m.Kind == Promote {
				promoted++
				writes = append(writes, write{in.Now, setBytes})
			}
		}
		apply(t, e, &in, moves)
		if most := int64(in.Now.Sub(start).Seconds()+20) * 64 * kib; copied > most {
			t.Fatalf("%v: %d bytes were copied, %d at most", in.Now.Sub(start), copied, most)
		}
		day := int64(0)
		for len(writes) > 0 && in.Now.Sub(writes[0].at) > 24*time.Hour {
			writes = writes[1:]
		}
		for _, w := range writes {
			day += w.n
		}
		if promoted > 0 && day > 16*mib {
			t.Fatalf("%v: %d bytes were written in a day", in.Now.Sub(start), day)
		}
		if got := e.Status().Worn; got < day {
			t.Fatalf("%v: %d bytes count, %d were written in a day", in.Now.Sub(start), got, day)
		}
		why[e.Status().Stopped]++
	}
	if why["budget.migrate"] == 0 || why["budget.wear"] == 0 || len(in.Devices[0].On) != slots {
		t.Errorf("%v, %d on flash", why, len(in.Devices[0].On))
	}
	// A clock that was set back gives nothing away.
	before := e.Status().Worn
	in.Now = in.Now.Add(-48 * time.Hour)
	e.Step(in)
	if e.Status().Worn < before {
		t.Errorf("%d bytes count after the clock was set back, %d before", e.Status().Worn, before)
	}
}

// What fails waits longer each time, alone and with its device, and everything goes on when
// it succeeds. A lack of room is no failure.
func TestFailures(t *testing.T) {
	e := newEngine(t, "")
	in := testInput(4, 2, func(int) float64 { return 50 })
	broken := errors.New("the flash is broken")
	tries := map[collect.Set][]time.Time{}
	for range 24 * 60 {
		in.Now = in.Now.Add(time.Minute)
		for _, m := range e.Step(in) {
			tries[m.Set] = append(tries[m.Set], in.Now)
			if m.Set == 0 {
				e.Done(m, fmt.Errorf("copy: %w", broken), in.Now)
				e.Done(m, broken, in.Now) // is not under way any more
				continue
			}
			apply(t, e, &in, []Move{m})
		}
	}
	for i := 2; i < len(tries[0]); i++ {
		before, now := tries[0][i-1].Sub(tries[0][i-2]), tries[0][i].Sub(tries[0][i-1])
		if now < before || now > 6*time.Hour+time.Minute {
			t.Errorf("after %v it was tried again in %v", before, now)
		}
	}
	if n := len(tries[0]); n < 8 || n > 14 || len(tries[1]) != 1 {
		t.Errorf("a day: %d and %d tries", n, len(tries[1]))
	}
	s := e.Status()
	if len(s.Failures) != 1 || s.Failures[0].Set != 0 || s.Failures[0].Times != len(tries[0]) || !strings.Contains(s.Failures[0].Reason, "broken") {
		t.Errorf("%+v", s.Failures)
	}
	x, err := e.Explain(in, 1, 0)
	if err != nil || x.Failure == "" || !strings.Contains(x.Summary, "after a failure") {
		t.Errorf("%+v, %v", x, err)
	}
	for in.Now = in.Now.Add(7 * time.Hour); ; {
		moves := e.Step(in)
		if wantMoves(t, moves, "promote 1:0"); len(in.Devices[0].On) == 1 {
			e.Done(moves[0], ErrNoRoom, in.Now)
			if moves = e.Step(in); len(moves) != 1 {
				t.Fatal("a set that found no room waits")
			}
			apply(t, e, &in, moves)
			break
		}
	}
	if s := e.Status(); len(s.Failures) != 0 || s.UnderWay != 0 {
		t.Errorf("%+v", s)
	}
	// Memory is bounded, however many fail.
	b := backoff{map[key]failure{}, map[int]failure{}}
	for i := range maxFailures + 100 {
		b.failed(key{1, collect.Set(i)}, broken, start.Add(time.Duration(i)))
	}
	if _, ok := b.sets[key{1, 99}]; ok || len(b.sets) != maxFailures {
		t.Errorf("%d failures are remembered", len(b.sets))
	}
}

// Pins come first and stay, as far as there is room, and their state is told.
func TestPins(t *testing.T) {
	e := newEngine(t, "hysteresis: {stay: 0s}")
	in := testInput(6, 20, func(i int) float64 { return float64(i) * 10 })
	moves := e.Step(in)
	wantMoves(t, moves, "promote 1:19", "promote 1:18", "promote 1:17", "promote 1:16", "promote 1:15", "promote 1:14")
	apply(t, e, &in, moves)
	in.Pins = []Pin{
		{"boot", 1, setBytes + 1, 2 * setBytes}, {"more", 1, 2 * setBytes, 2*setBytes + 1},
		{"late", 1, 10 * setBytes, 4 * setBytes}, {"out", 1, 100 * setBytes, setBytes}, {"away", 7, 0, setBytes},
		{"end", 1, 18 * setBytes, 1 << 62},
	}
	states := func() (out []string) {
		for _, p := range Pins(in) {
			out = append(out, fmt.Sprintf("%s %d/%d+%d %s", p.Name, p.On, p.Sets, p.Room, p.State))
		}
		return out
	}
	want := []string{"boot 0/3+3 waiting", "more 0/3+1 waiting", "late 0/4+0 no room", "out 0/0+0 nothing there", "away 0/0+0 nothing there", "end 2/2+0 whole"}
	if got := states(); !slices.Equal(got, want) {
		t.Errorf("%q\nwant %q", got, want)
	}
	moves = e.Step(in)
	wantMoves(t, moves, "demote 1:14", "promote 1:1", "demote 1:15", "promote 1:2", "demote 1:16", "promote 1:3", "demote 1:17", "promote 1:4")
	apply(t, e, &in, moves)
	in.Now = in.Now.Add(time.Minute)
	wantMoves(t, e.Step(in)) // nothing may leave
	want = []string{"boot 3/3+0 whole", "more 3/3+0 whole", "late 0/4+0 no room", "out 0/0+0 nothing there", "away 0/0+0 nothing there", "end 2/2+0 whole"}
	if got := states(); !slices.Equal(got, want) {
		t.Errorf("%q\nwant %q", got, want)
	}
	in.Slots = 8
	moves = e.Step(in)
	wantMoves(t, moves, "promote 1:10", "promote 1:11")
	apply(t, e, &in, moves)
	if got := states()[2]; got != "late 2/4+0 partly" {
		t.Error(got)
	}
	x, err := e.Explain(in, 1, 1)
	if err != nil || !x.Pinned || !strings.Contains(x.Summary, "because it is pinned") {
		t.Errorf("%+v, %v", x, err)
	}
	if x, err := e.Explain(in, 1, 13); err != nil || !strings.Contains(x.Summary, "waits for room") {
		t.Errorf("%+v, %v", x, err)
	}
	// Flash that becomes smaller gives up what is not pinned.
	in.Pins = in.Pins[:1]
	in.Slots = 4
	in.Now = in.Now.Add(time.Minute)
	wantMoves(t, e.Step(in), "demote 1:4", "demote 1:10", "demote 1:11", "demote 1:18")
}

// With random inputs, changes, failures and slow moves nothing is ever moved twice or without
// room, and the same inputs give the same moves.
func TestRandom(t *testing.T) {
	rnd := random(t)
	s := rnd.Uint64()
	first, second := play(t, rand.New(rand.NewPCG(s, 1))), play(t, rand.New(rand.NewPCG(s, 1)))
	if !reflect.DeepEqual(first, second) {
		t.Errorf("the same inputs gave\n%q\nand\n%q", first, second)
	}
	if len(first) < 50 {
		t.Errorf("only %d moves", len(first))
	}
}

func play(t *testing.T, rnd *rand.Rand) (told []string) {
	e := newEngine(t, "budget: {migrate: 2MiB}\nhysteresis: {gain: 1, stay: 1m}")
	const sets = 60
	in := testInput(12, sets, func(int) float64 { return rnd.Float64() * 20 })
	other := testInput(0, sets, func(int) float64 { return rnd.Float64() * 20 }).Devices[0]
	other.Number, other.Type = 4, "ssd"
	in.Devices = append(in.Devices, other)
	var queue []Move
	for range 400 {
		in.Now = in.Now.Add(15 * time.Second)
		for range 5 {
			in.Devices[rnd.IntN(2)].Snapshot.Stats[rnd.IntN(sets)].Reads = float32(rnd.ExpFloat64() * 10)
		}
		switch rnd.IntN(40) {
		case 0:
			in.Pins = []Pin{{"p", 1 + 3*rnd.IntN(2), rnd.Int64N(sets) * setBytes, rnd.Int64N(6) * setBytes}}
		case 1:
			p := e.Params()
			p.Hysteresis.Gain = float64(rnd.IntN(4))
			if _, err := e.Use(p); err != nil {
				t.Fatal(err)
			}
		case 2:
			in.Slots = 8 + rnd.IntN(8)
		}
		moves := e.Step(in)
		told = append(told, texts(moves)...)
		queue = append(queue, moves...)
		for range min(len(queue), rnd.IntN(6)) {
			m := queue[0]
			queue = queue[1:]
			on := len(in.Devices[0].On) + len(in.Devices[1].On)
			switch {
			case m.Kind == Promote && on >= in.Slots:
				e.Done(m, ErrNoRoom, in.Now) // a demotion before it failed, or flash became smaller
			case rnd.IntN(10) == 0:
				e.Done(m, errors.New("it failed"), in.Now)
			default:
				apply(t, e, &in, []Move{m})
			}
		}
		if n := e.Status().UnderWay; n != len(queue) {
			t.Fatalf("%d moves are under way, %d are queued", n, len(queue))
		}
	}
	return told
}

// Explain tells numbers beside limits, rank, rules and what is missing.
func TestExplain(t *testing.T) {
	e := newEngine(t, "patterns: {disk: {min_accesses: 10, promote: references > 1, demote: reads < 15.0}}")
	in := testInput(2, 6, func(i int) float64 { return float64(i) * 10 })
	in.Devices[0].Attributes = func(s collect.Set) Attributes { return Attributes{References: int(s)} }
	apply(t, e, &in, e.Step(in))
	explain := func(set collect.Set) Explanation {
		t.Helper()
		x, err := e.Explain(in, 1, set)
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	if x := explain(5); x.State != "on flash" || x.Rank != 1 || x.Of != 5 || x.Slots != 2 || x.Benefit != 400 || x.Rule != "reads < 15.0" || x.Holds ||
		x.Limits[0] != (Limit{"min_accesses", "50", "at least 2.5", true}) || x.Summary != "It is on flash: it shows its pattern and is number 1 of 5." {
		t.Errorf("%+v", x)
	}
	if x := explain(3); x.State != "on its device" || x.Rank != 3 || !x.Holds || x.Rule != "references > 1" ||
		x.Summary != "It shows the pattern, but is number 3 of 5, and flash has room for 2." {
		t.Errorf("%+v", x)
	}
	if x := explain(1); !slices.Equal(x.Missing, []string{"the rule of promotion"}) || x.Holds {
		t.Errorf("%+v", x)
	}
	if x := explain(0); x.Rank != 0 || !slices.Equal(x.Missing, []string{"min_accesses", "min_random", "the rule of promotion"}) ||
		x.Limits[0] != (Limit{"min_accesses", "0", "at least 10", false}) {
		t.Errorf("%+v", x)
	}
	in.Devices[0].Snapshot.Stats[5].Reads = 2
	if x := explain(5); x.Summary != "It is on flash until its slot is wanted: the rule of demotion holds." || !slices.Equal(x.Missing, []string{"min_accesses"}) {
		t.Errorf("%+v", x)
	}
	in.Devices[0].Snapshot.Stats = in.Devices[0].Snapshot.Stats[:5]
	if x := explain(5); x.Limits[3].Value != "never used" || x.Limits[3].Holds {
		t.Errorf("%+v", x)
	}
	if _, err := e.Explain(in, 2, 0); err == nil {
		t.Error("a device that is not there")
	}
	if _, err := e.Explain(in, 1, 6); err == nil {
		t.Error("a set that is not there")
	}
	// A budget that is used up is named.
	e = newEngine(t, "budget: {wear: 512KiB}")
	in = testInput(4, 6, func(i int) float64 { return float64(i) * 10 })
	moves := e.Step(in)
	if x := explain(5); x.State != "moves to flash" {
		t.Errorf("%+v", x)
	}
	apply(t, e, &in, moves)
	if x := explain(3); !strings.Contains(x.Summary, "moves wait for budget.wear") {
		t.Errorf("%+v", x)
	}
}

// Parameters change while the engine works, and are told with old and new values.
// Sets that are used less than Least says make no difference to what moves to flash, and for
// those on flash only to which of them leaves first.
func TestLeast(t *testing.T) {
	e := newEngine(t, "patterns: {disk: {min_accesses: 8}, tape: {min_accesses: 0}, drum: {demote: 'reads < 1.0'}}")
	for typ, want := range map[string]float64{"disk": 2, "tape": 0, "drum": 0, "other": 1} {
		if got := e.Least(typ); got != want {
			t.Errorf("%s: %v, want %v", typ, got, want)
		}
	}
	rnd := random(t)
	in := testInput(30, 400, func(int) float64 { return rnd.ExpFloat64() * 5 })
	for set := collect.Set(0); set < 400; set += 16 {
		in.Devices[0].On = append(in.Devices[0].On, set)
	}
	some := in
	some.Devices = slices.Clone(in.Devices)
	d := &some.Devices[0]
	d.Snapshot.Stats = slices.DeleteFunc(slices.Clone(d.Snapshot.Stats), func(s collect.Stat) bool { return s.Accesses() < e.Least("disk") })
	if len(d.Snapshot.Stats) > 300 {
		t.Fatalf("%d sets are left", len(d.Snapshot.Stats))
	}
	kinds := func(in Input) (promoted []collect.Set, demoted int) {
		for _, m := range newEngine(t, "patterns: {disk: {min_accesses: 8}}").Step(in) {
			if m.Kind == Promote {
				promoted = append(promoted, m.Set)
			} else {
				demoted++
			}
		}
		return promoted, demoted
	}
	all, out := kinds(in)
	if less, n := kinds(some); !slices.Equal(all, less) || n != out || len(all) < 10 || out < 5 {
		t.Errorf("moved %v to flash for %d, with less %v for %d", all, out, less, n)
	}
}

func TestUse(t *testing.T) {
	e := newEngine(t, "")
	in := testInput(8, 4, func(i int) float64 { return float64(i) })
	wantMoves(t, e.Step(in))
	p := e.Params()
	q := DefaultPattern()
	q.MinAccesses = 2
	p.Patterns = map[string]Pattern{AnyType: q}
	changes, err := e.Use(p)
	if err != nil || !slices.Equal(changes, []Change{{"patterns.default.min_accesses", "4", "2"}}) {
		t.Errorf("%+v, %v", changes, err)
	}
	wantMoves(t, e.Step(in), "promote 1:3", "promote 1:2")
	p.Hysteresis.Keep = 0
	if _, err := e.Use(p); err == nil || e.Params().Hysteresis.Keep == 0 {
		t.Error("wrong parameters count")
	}
}

func BenchmarkStep(b *testing.B) {
	for name, text := range map[string]string{"numbers": "", "rule": "patterns: {default: {promote: 'reads + writes > 5.0 && references < 100'}}"} {
		b.Run(name, func(b *testing.B) {
			p, err := Parse([]byte(text))
			if err != nil {
				b.Fatal(err)
			}
			rnd := rand.New(rand.NewPCG(1, 1))
			in := testInput(20_000, 200_000, func(int) float64 { return rnd.ExpFloat64() * 10 })
			for set := range collect.Set(20_000) {
				in.Devices[0].On = append(in.Devices[0].On, set*10)
			}
			b.ReportAllocs()
			for b.Loop() {
				e, err := New(p)
				if err != nil {
					b.Fatal(err)
				}
				e.Step(in)
			}
		})
	}
}

// What was written to flash counts on after a restart, for 24 hours, and a move that is
// withdrawn costs nothing.
func TestWear(t *testing.T) {
	const policy = "interval: 10s\nbudget: {wear: 1MiB}\nhysteresis: {gain: 0, margin: 1, stay: 0s}"
	e := newEngine(t, policy)
	in := testInput(20, 20, func(int) float64 { return 50 })
	moves := e.Step(in)
	if n := int64(len(moves)); n == 0 || n*setBytes > mib || e.Status().Worn != n*setBytes {
		t.Fatalf("%d moves, %d bytes worn", n, e.Status().Worn)
	}
	e.Withdraw(moves[0], setBytes)
	e.Withdraw(moves[0], setBytes)
	if want := int64(len(moves)-1) * setBytes; e.Status().Worn != want || e.Status().UnderWay != len(moves)-1 {
		t.Fatalf("%d bytes worn after one move was withdrawn, %d under way", e.Status().Worn, e.Status().UnderWay)
	}
	worn := e.Status().Worn
	for hours, want := range map[int]int64{0: worn, 1: worn, 24: worn, 25: 0, 1000: 0} {
		f := newEngine(t, policy)
		f.AddWear(e.Wear(), in.Now.Add(time.Duration(hours)*time.Hour))
		if got := f.Status().Worn; got != want {
			t.Errorf("after %d hours %d bytes are worn, want %d", hours, got, want)
		}
	}
	for _, bad := range []Wear{{Hour: math.MaxInt64}, {Hour: math.MinInt64}, {Hour: -1}, {Hour: in.Now.Unix()/3600 + 100, Bytes: e.Wear().Bytes}} {
		for i := range bad.Bytes {
			bad.Bytes[i] = math.MaxInt64
		}
		f := newEngine(t, policy)
		f.AddWear(bad, in.Now)
		if got := f.Status().Worn; got != 0 {
			t.Errorf("%+v: %d bytes are worn", bad, got)
		}
	}
}
