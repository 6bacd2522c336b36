package policy

import (
	"testing"
	"time"
)

// paced is a mover on a device of which a step takes so long.
type paced struct {
	Pace
	now   time.Time
	took  time.Duration
	bytes int64
	moved int64
	steps int
}

// run takes steps for a time. busy tells whether clients have something under way.
func (p *paced) run(d time.Duration, busy func() bool) {
	for end := p.now.Add(d); p.now.Before(end); {
		if wait := p.Wait(p.now, busy()); wait > 0 {
			p.now = p.now.Add(wait)
			continue
		}
		p.now = p.now.Add(p.took)
		p.Stepped(p.now, p.took, p.bytes)
		p.moved += p.bytes
		p.steps++
	}
}

func idle() bool { return false }
func busy() bool { return true }

// On a device that nobody uses moves have what the budget allows, evenly, and what was not
// used is not made up for.
func TestPaceBytes(t *testing.T) {
	p := paced{now: time.Unix(1_800_000_000, 0), took: time.Millisecond, bytes: 256 << 10}
	p.Use(Budget{Migrate: 32 << 20})
	for range 3 {
		p.moved, p.steps = 0, 0
		p.run(10*time.Second, idle)
		if p.moved > 320<<20+2*p.bytes || p.moved < 318<<20 {
			t.Errorf("%d bytes in ten seconds", p.moved)
		}
		p.now = p.now.Add(time.Hour) // nothing was to be moved
		p.steps = 0
		p.run(100*time.Millisecond, idle)
		if p.steps < 11 || p.steps > 14 {
			t.Errorf("%d steps in 100 ms after an hour of rest", p.steps)
		}
	}
	p.took, p.moved = 20*time.Millisecond, 0 // the device is slower than the budget
	p.run(10*time.Second, idle)
	if p.moved < 500*p.bytes {
		t.Errorf("%d bytes of a slow device", p.moved)
	}
	p.Use(Budget{})
	p.took, p.moved = time.Millisecond, 0
	p.run(time.Second, idle)
	if p.moved < 1000*p.bytes {
		t.Errorf("%d bytes without a limit", p.moved)
	}
}

// The more clients use a device the less of its time moves take, and some in any case.
func TestPaceShare(t *testing.T) {
	rnd := random(t)
	for _, tt := range []struct {
		load     float64
		from, to float64 // of the time
	}{{0, 1, 1}, {0.05, 0.3, 0.75}, {0.3, 0.10, 0.16}, {0.6, 0.08, 0.15}, {1, 0.038, 0.042}} {
		p := paced{now: time.Unix(1_800_000_000, 0), took: 15 * time.Millisecond, bytes: 256 << 10}
		under := func() bool { return rnd.Float64() < tt.load }
		p.run(10*time.Second, under)
		p.steps = 0
		const d = 300 * time.Second
		p.run(d, under)
		if share := (time.Duration(p.steps) * p.took).Seconds() / d.Seconds(); share < tt.from || share > tt.to*1.001 {
			t.Errorf("load %v: moves take %.3f of the time, %v to %v is meant", tt.load, share, tt.from, tt.to)
		}
	}
	// However long steps take because a device is overloaded, they come again soon.
	p := paced{now: time.Unix(1_800_000_000, 0), took: 2 * time.Second, bytes: 256 << 10}
	p.run(60*time.Second, busy)
	if p.steps < 20 {
		t.Errorf("%d steps in a minute", p.steps)
	}
}

// A step is taken at once when clients have nothing more under way, and after one that has
// copied nothing.
func TestPaceWait(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	var p Pace
	for range 100 { // until clients are known to be there
		p.Stepped(now, 10*time.Millisecond, 1)
		for range 1000 {
			if wait := p.Wait(now, true); wait > 0 {
				now = now.Add(wait)
			}
		}
	}
	p.Stepped(now, 10*time.Millisecond, 1)
	if wait := p.Wait(now, false); wait != 60*time.Millisecond {
		t.Errorf("rest of %v after 10 ms", wait)
	}
	now = now.Add(60 * time.Millisecond)
	if wait := p.Wait(now, true); wait <= 0 || wait > 5*time.Millisecond {
		t.Errorf("it is asked again after %v", wait)
	}
	if wait := p.Wait(now, false); wait != 0 {
		t.Errorf("with nothing under way it waits for %v", wait)
	}
	p.Stepped(now, 10*time.Millisecond, 0)
	if wait := p.Wait(now, true); wait != 0 {
		t.Errorf("a step that copied nothing is waited for, %v", wait)
	}
	p.Stepped(now, -time.Second, 1) // of a clock that was set back
	if wait := p.Wait(now, false); wait != 0 {
		t.Errorf("%v after a step that took less than nothing", wait)
	}
}
