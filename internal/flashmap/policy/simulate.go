package policy

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/internal/flashmap/collect"
)

// Latencies are the mean times of accesses, as they were measured in the time of the history.
type Latencies struct {
	Primary time.Duration // of one outside of runs
	Run     time.Duration // of one in a run
	Flash   time.Duration
	// Stream is the time of one in a run before which nothing else moves the arm of the
	// primary device away. Where others are served by flash, runs come to it; with 0 they
	// stay as they were.
	Stream time.Duration
}

// Past is how a device was used.
type Past struct {
	Number     int
	Type       string
	Geometry   collect.Geometry
	Windows    []collect.Window // of one length, one after the other
	On         []collect.Set    // on flash at the beginning, in order
	Attributes func(collect.Set) Attributes
}

// of returns the time of what happens in a window on one device. apart is the share of the
// primary's accesses that were outside of runs when the times were measured.
func (l *Latencies) of(w *PredictedWindow, apart float64) time.Duration {
	run := float64(l.Run)
	if now := share(w.Accesses-w.Hits, w.Runs-w.RunHits); l.Stream > 0 && apart > 0 {
		// What comes before an access in a run is one outside of runs as often as these are
		// of all.
		run = float64(l.Stream) + (run-float64(l.Stream))*now/apart
	}
	return time.Duration((w.Accesses-w.Hits)*float64(l.Primary) + (w.Runs-w.RunHits)*run + (w.Hits+w.RunHits)*float64(l.Flash))
}

// share returns the part of a in both.
func share(a, b float64) float64 {
	if a+b <= 0 {
		return 0
	}
	return a / (a + b)
}

// Trial is what Simulate plays.
type Trial struct {
	Params    Params
	Slots     int
	SetBytes  int64
	Pins      []Pin
	Devices   []Past
	Latencies Latencies
}

// Predicted is what a policy would have come to.
type Predicted struct {
	Windows []PredictedWindow
	Moves   Moves
}

// PredictedWindow is a window of the history, replayed.
type PredictedWindow struct {
	Start time.Time
	// Accesses are those outside of runs, as collectors count them, and Hits how many of
	// them flash serves; Runs and RunHits are the same of those in runs.
	Accesses, Hits float64
	Runs, RunHits  float64
	Time           time.Duration // that all of them take
}

// add adds another window's numbers.
func (w *PredictedWindow) add(o PredictedWindow) {
	w.Accesses, w.Hits = w.Accesses+o.Accesses, w.Hits+o.Hits
	w.Runs, w.RunHits = w.Runs+o.Runs, w.RunHits+o.RunHits
	w.Time += o.Time
}

// Moves counts moves of data sets.
type Moves struct{ Promoted, Demoted int }

// Over returns the share of accesses outside of runs that flash serves in the windows from
// first on, and the mean time of all accesses; 0 where there are none.
func (p *Predicted) Over(first int) (hits float64, mean time.Duration) {
	var all PredictedWindow
	for _, w := range p.Windows[min(first, len(p.Windows)):] {
		all.add(w)
	}
	if all.Accesses > 0 {
		hits = all.Hits / all.Accesses
	}
	if n := all.Accesses + all.Runs; n > 0 {
		mean = time.Duration(float64(all.Time) / n)
	}
	return hits, mean
}

// maxSteps is into how many steps a window is cut at most.
const maxSteps = 40

// Simulate replays a history against a policy. What happened in a window is spread over it at
// random, the same way each time, so that the policy cannot know of an access before it comes.
// Moves take as long as Budget.Migrate lets them, and nothing fails. Sets that the history
// left out are never hit. Windows in which a device has no history count none of its accesses.
func Simulate(t Trial) (Predicted, error) {
	engine, err := New(t.Params)
	if err != nil {
		return Predicted{}, err
	}
	if t.SetBytes < collect.MinSetBytes || t.Slots < 0 {
		return Predicted{}, fmt.Errorf("a flash of %d sets of %d bytes cannot be simulated", t.Slots, t.SetBytes)
	}
	windows, length := 0, time.Duration(0)
	var start time.Time
	for i := range t.Devices {
		d := &t.Devices[i]
		if d.Geometry.SetBytes != t.SetBytes {
			return Predicted{}, fmt.Errorf("device %d has data sets of %d bytes, flash of %d", d.Number, d.Geometry.SetBytes, t.SetBytes)
		}
		for _, w := range d.Windows {
			if w.Length <= 0 || length != 0 && w.Length != length {
				return Predicted{}, fmt.Errorf("device %d: windows of %v and %v cannot be replayed together", d.Number, length, w.Length)
			}
			length = w.Length
		}
		if len(d.Windows) > windows {
			windows, start = len(d.Windows), d.Windows[0].Start
		}
	}
	r := &replay{Trial: t, engine: engine, length: length}
	for i := range t.Devices {
		// Devices whose history is shorter join in when it begins.
		r.devices = append(r.devices, newReplayed(&t.Devices[i], windows-len(t.Devices[i].Windows)))
	}
	var out Predicted
	for w := range windows {
		out.Windows = append(out.Windows, r.window(w, start.Add(time.Duration(w)*length)))
	}
	out.Moves = r.moves
	return out, nil
}

// replay is a simulation in the making.
type replay struct {
	Trial
	engine  *Engine
	length  time.Duration
	devices []*replayed
	moves   Moves
}

// window replays one window of all devices.
func (r *replay) window(w int, start time.Time) PredictedWindow {
	out := PredictedWindow{Start: start}
	steps := int(min(max((r.length+r.Params.Interval-1)/r.Params.Interval, 1), maxSteps))
	for _, d := range r.devices {
		d.begin(w, steps)
	}
	each := make([]PredictedWindow, len(r.devices))
	for s := range steps {
		for i, d := range r.devices {
			each[i].add(d.play(s))
		}
		f := float64(s+1) / float64(steps)
		r.step(start.Add(time.Duration(f*float64(r.length))), f)
	}
	for i, d := range r.devices {
		each[i].add(d.rest())
		each[i].Time = r.Latencies.of(&each[i], d.apart)
		out.add(each[i])
		d.end(r.Params.Collect.Decay)
	}
	return out
}

// step asks the engine for moves and makes them. They count from the next step on.
func (r *replay) step(now time.Time, f float64) {
	in := Input{Now: now, SetBytes: r.SetBytes, Slots: r.Slots, Pins: r.Pins}
	for _, d := range r.devices {
		in.Devices = append(in.Devices, Device{
			Number: d.past.Number, Type: d.past.Type, On: d.on, Attributes: d.past.Attributes,
			Snapshot: d.snapshot(now, r.length, r.Params.Collect.Decay, f),
		})
	}
	for _, m := range r.engine.Step(in) {
		for _, d := range r.devices {
			if d.past.Number != m.Device {
				continue
			}
			i, _ := slices.BinarySearch(d.on, m.Set)
			if m.Kind == Promote {
				d.on = slices.Insert(d.on, i, m.Set)
				r.moves.Promoted++
			} else {
				d.on = slices.Delete(d.on, i, i+1)
				r.moves.Demoted++
			}
		}
		r.engine.Done(m, nil, now)
	}
}

// replayed is a device in a simulation.
type replayed struct {
	past    *Past
	skip    int // windows before its first
	index   int // the present one of its own, below 0 before
	window  *collect.Window
	on      []collect.Set
	sets    collect.Means
	arrives []arrival // of each set of the window
	apart   float64   // share of the primary's accesses in the history that are outside of runs
}

// arrival is how the accesses of a set come, step by step.
type arrival struct {
	used *collect.Used
	part []float32 // share of the accesses in each step
}

func newReplayed(p *Past, skip int) *replayed {
	accesses, runs := 0.0, 0.0
	for i := range p.Windows {
		w := &p.Windows[i]
		accesses, runs = accesses+w.Reads+w.Writes, runs+w.Runs
		for k := range w.Sets {
			u := &w.Sets[k]
			if _, on := slices.BinarySearch(p.On, u.Set); on {
				accesses, runs = accesses-float64(u.Reads+u.Writes), runs-float64(u.Runs)
			}
		}
	}
	return &replayed{past: p, skip: skip, on: slices.Clone(p.On), apart: share(max(0, accesses), max(0, runs))}
}

// begin spreads the accesses of a window over its steps.
func (d *replayed) begin(w, steps int) {
	d.window, d.arrives = nil, d.arrives[:0]
	if d.index = w - d.skip; d.index < 0 {
		return
	}
	d.window = &d.past.Windows[d.index]
	for i := range d.window.Sets {
		u := &d.window.Sets[i]
		a := arrival{u, make([]float32, steps)}
		rnd := rand.New(rand.NewPCG(uint64(u.Set), uint64(w)))
		// Beyond so many they come evenly enough.
		n := min(max(1, int(u.Accesses()+0.5)), 8*steps)
		for range n {
			a.part[rnd.IntN(steps)] += 1 / float32(n)
		}
		d.arrives = append(d.arrives, a)
	}
}

// play has the accesses of a step happen.
func (d *replayed) play(step int) (out PredictedWindow) {
	if d.window == nil {
		return out
	}
	on := d.on
	for i := range d.arrives {
		a := &d.arrives[i]
		part := float64(a.part[step])
		if part == 0 {
			continue
		}
		d.sets.Add(*a.used, a.part[step])
		for len(on) > 0 && on[0] < a.used.Set {
			on = on[1:]
		}
		w := PredictedWindow{Accesses: part * (float64(a.used.Reads) + float64(a.used.Writes)), Runs: part * float64(a.used.Runs)}
		if len(on) > 0 && on[0] == a.used.Set {
			w.Hits, w.RunHits = w.Accesses, w.Runs
		}
		out.add(w)
	}
	return out
}

// rest returns the accesses of the window to sets that the history left out.
func (d *replayed) rest() (out PredictedWindow) {
	if d.window == nil {
		return out
	}
	out.Accesses, out.Runs = d.window.Reads+d.window.Writes, d.window.Runs
	for i := range d.window.Sets {
		u := &d.window.Sets[i]
		out.Accesses -= float64(u.Reads) + float64(u.Writes)
		out.Runs -= float64(u.Runs)
	}
	out.Accesses, out.Runs = max(0, out.Accesses), max(0, out.Runs)
	return out
}

// snapshot returns what a collector would tell when the share f of the window has passed.
func (d *replayed) snapshot(now time.Time, window time.Duration, decay, f float64) collect.Snapshot {
	return d.sets.Snapshot(d.past.Geometry, now, window, decay, f, max(0, d.index))
}

// end ends the window.
func (d *replayed) end(decay float64) {
	if d.window != nil {
		d.sets.End(decay)
	}
}
