package policy

import "time"

// Pace says when the steps of moves may be taken, so that clients of the primary device do
// not wait much longer than without moves. It is for one goroutine, which steps one move at a
// time:
//
//	for wait := pace.Wait(now, device.Busy()); wait > 0; wait = pace.Wait(now, device.Busy()) {
//		// sleep for so long, or until parameters change
//	}
//	// take a step
//	pace.Stepped(now, took, bytes)
//
// Steps copy at most Budget.Migrate bytes a second, evenly: what was not copied in time is
// not made up for. They also leave time to clients, as far as there are some. A step waits
// until clients have nothing under way, for then it delays only those that come meanwhile.
// After it the device is left alone for up to six times as long as it took, more the more
// often clients were found. So moves have all of the time of a device that nobody uses, and
// up to a seventh of one that is used. Where clients always have something under way, a step is
// taken after 24 times the last one's time: a twenty-fifth goes to what may be what the device
// needs most.
//
// The zero Pace limits no bytes.
type Pace struct {
	rate int64 // bytes a second, 0 for no limit

	owed   bool // a step was taken that has to be waited for
	looked bool // whether clients were there since
	due    time.Time
	late   time.Time // when clients are waited for no more
	again  time.Duration
	even   time.Time // when the bytes copied so far are within the budget
	load   float64   // share of the times that clients had something under way, of late
}

// How long the device is left alone after a step, as multiples of the time that it took, and
// at most.
const (
	restTimes, restMost   = 6, 250 * time.Millisecond
	lateTimes, lateMost   = 24, time.Second
	loadTimes             = 24 // up to a load of a quarter the rest grows
	loadKept              = 0.9
	againLeast, againMost = 100 * time.Microsecond, 5 * time.Millisecond
)

// Use makes a budget count from now on.
func (p *Pace) Use(b Budget) { p.rate = int64(b.Migrate) }

// Wait returns how long to wait before it is asked again, 0 when a step may be taken now. busy
// is whether clients have requests under way at the primary device of the move that is next.
func (p *Pace) Wait(now time.Time, busy bool) time.Duration {
	if !p.owed {
		return 0
	}
	if wait := p.due.Sub(now); wait > 0 {
		return wait
	}
	if !p.looked {
		p.looked = true
		p.load *= loadKept
		if busy {
			p.load += 1 - loadKept
		}
	}
	if wait := p.late.Sub(now); busy && wait > 0 {
		return min(wait, p.again)
	}
	p.owed = false
	return 0
}

// Stepped says that a step has ended that took so long and has copied so many bytes. One that
// copied nothing is nobody's burden.
func (p *Pace) Stepped(now time.Time, took time.Duration, bytes int64) {
	if bytes <= 0 {
		return
	}
	took = max(took, 0)
	times := min(restTimes, loadTimes*p.load)
	p.due = now.Add(min(time.Duration(times*float64(took)), restMost))
	if p.rate > 0 {
		begun := now.Add(-took)
		if p.even.Before(begun) {
			p.even = begun
		}
		p.even = p.even.Add(time.Duration(float64(bytes) / float64(p.rate) * float64(time.Second)))
		if p.due.Before(p.even) {
			p.due = p.even
		}
	}
	p.late = now.Add(min(lateTimes*took, lateMost))
	p.again = max(againLeast, min(took/8, againMost))
	p.owed, p.looked = true, false
}
