package main

import (
	"context"
	"time"

	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

// outcome is what a workload came to.
type outcome struct {
	Name     string
	Sets     int   // of the device
	SetBytes int64 // of a data set
	Slots    int   // sets that find room on flash

	// None, Policy, LRU and Oracle are the ways to serve the accesses after the policy has
	// had time, without what is set apart.
	None, Policy, LRU, Oracle tier
	Promoted, Demoted         int // sets, in all windows with flash
	Fetched                   int // sets, by the LRU cache

	// Predicted and Measured are the hit shares of the same number of windows, and the
	// mean times.
	Predicted, Measured         float64
	PredictedMean, MeasuredMean time.Duration

	// Of a workload with days: the hit shares of the day before a scan and of the hour
	// after it, of the policy, the LRU cache and the oracle.
	Before, After, LRUBefore, LRUAfter, OracleBefore, OracleAfter float64

	// Followed are the times from each move of a hot spot until nine tenths of the hit
	// share before were reached, and Limit is a window and the time that the sets need.
	Followed []time.Duration
	Limit    time.Duration

	steady, days bool
}

// unsettled is how many windows with flash do not count, because it is being filled.
const unsettled = 2

// measure has a workload happen: half of it is collected, then flash is there.
func measure(ctx context.Context, w *workload, s scale, seed uint64, p policy.Params) (*outcome, error) {
	x, err := newWorld(w, s, seed, p)
	if err != nil {
		return nil, err
	}
	o := &outcome{Name: w.name, Sets: s.sets, SetBytes: s.setBytes, Slots: x.slots, steady: w.steady, days: w.days}
	for i := range s.half {
		x.play(i)
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
	predicted, err := x.predict()
	if err != nil {
		return nil, err
	}
	o.Predicted, o.PredictedMean = predicted.Over(unsettled)
	x.start()
	hour := int(time.Hour / s.window)
	var all []window
	for i := range s.half + hour {
		all = append(all, x.play(s.half+i))
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
	o.Promoted, o.Demoted, o.Fetched = x.promoted, x.demoted, x.lru.taken
	var measured tier
	for i := range all {
		if i >= unsettled && i < s.half {
			measured.add(all[i].Policy)
		}
		if i >= unsettled && !x.apart(s.half+i) {
			o.None.add(all[i].None)
			o.Policy.add(all[i].Policy)
			o.LRU.add(all[i].LRU)
			o.Oracle.add(all[i].Oracle)
		}
	}
	o.Measured, o.MeasuredMean = measured.share(), measured.mean()
	if w.days {
		o.scan(all, s, x, hour)
	}
	if w.moves {
		o.follow(all, s, x)
	}
	return o, nil
}

// scan compares the hour after the last scan with the day before it.
func (o *outcome) scan(all []window, s scale, x *world, hour int) {
	var before, after, lruBefore, lruAfter, best, bestAfter tier
	for i := len(all) - hour; i < len(all); i++ {
		after.add(all[i].Policy)
		lruAfter.add(all[i].LRU)
		bestAfter.add(all[i].Oracle)
	}
	for i := unsettled; i < len(all)-hour; i++ {
		if !x.apart(s.half + i) {
			before.add(all[i].Policy)
			lruBefore.add(all[i].LRU)
			best.add(all[i].Oracle)
		}
	}
	o.Before, o.After, o.LRUBefore, o.LRUAfter = before.share(), after.share(), lruBefore.share(), lruAfter.share()
	o.OracleBefore, o.OracleAfter = best.share(), bestAfter.share()
}

// follow measures how soon the policy is where the hot spot is.
func (o *outcome) follow(all []window, s scale, x *world) {
	const together = 4 // intervals, because there is little in one
	interval := x.p.Interval
	// What was hot goes back and what is hot comes.
	o.Limit = s.window + time.Duration(2*int64(s.sets/20)*s.setBytes)*time.Second/time.Duration(x.p.Budget.Migrate)
	var parts []tier
	for i := range all {
		parts = append(parts, all[i].parts...)
	}
	per := int(s.window / interval)
	for i := range all {
		if (s.half+i)%s.stay != 0 || i < s.stay || i+s.stay > len(all) {
			continue
		}
		level := all[i-1].Policy
		took := time.Duration(s.stay) * s.window // not at all
		for k := i * per; k+together <= (i+s.stay)*per; k++ {
			var some tier
			for _, p := range parts[k : k+together] {
				some.add(p)
			}
			if some.Accesses > 0 && some.share() >= 0.9*level.share() {
				took = time.Duration(k-i*per) * interval
				break
			}
		}
		o.Followed = append(o.Followed, took)
	}
}

// verdict is something that is wanted of an outcome.
type verdict struct {
	Reached bool
	Text    string
}
