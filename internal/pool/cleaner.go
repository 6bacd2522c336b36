package pool

import (
	"fmt"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/space"
)

// CleanerOptions say when and how fast a pool is cleaned. Zero values stand for
// the defaults.
type CleanerOptions struct {
	Off bool // never clean
	// Rate is how many bytes of maps and data the cleaner reads and writes in
	// a second. DefaultCleanerRate if 0.
	Rate int64
	// LowWater is the share of tracks, in percent, that should be wholly free:
	// a pass begins when fewer are, and aims at half as many again.
	// DefaultLowWater if 0.
	LowWater int
	// MinFree is the share of a track's blocks, in percent, that must be free
	// for the track to be emptied. DefaultMinFree if 0.
	MinFree int
	// Pause is the time between two looks whether a pass is due. After a pass
	// that gained nothing it is longer. DefaultCleanerPause if 0.
	Pause time.Duration
}

// Defaults of CleanerOptions.
const (
	DefaultCleanerRate  = 16 << 20
	DefaultLowWater     = 10
	DefaultMinFree      = 25
	DefaultCleanerPause = 10 * time.Second
)

func (o *CleanerOptions) setDefaults() {
	if o.Rate <= 0 {
		o.Rate = DefaultCleanerRate
	}
	if o.LowWater <= 0 {
		o.LowWater = DefaultLowWater
	}
	if o.MinFree <= 0 {
		o.MinFree = DefaultMinFree
	}
	if o.Pause <= 0 {
		o.Pause = DefaultCleanerPause
	}
}

const (
	// longestPause is how many pauses there are at most between two looks.
	longestPause = 32
	// payBlocks is how many free blocks a pass must be able to join for each
	// page of a map that it has to read.
	payBlocks = 2
)

// CleanerStats tells what the cleaner does and did since the pool was opened.
type CleanerStats struct {
	State  string // what it does, or why it does nothing
	Tracks int64  // of the pool
	Whole  int64  // tracks that were wholly free at the last look
	Passes uint64
	Freed  uint64 // tracks that passes have emptied
	Moved  uint64 // blocks
	Raced  uint64 // blocks left alone because clients changed them meanwhile
	Failed uint64 // blocks and pages that could not be read
}

type cleanerPhase int

const (
	cleanerIdle    cleanerPhase = iota
	cleanerFolds                // waits for the fold before a pass
	cleanerMoves                // walks the maps and moves blocks
	cleanerCommits              // waits until all moved blocks are committed
	cleanerSettles              // waits for the fold that frees their old places
)

// cleaner is the machine. All but Stats belongs to Run's goroutine.
type cleaner struct {
	p     *Pool
	o     CleanerOptions
	phase cleanerPhase
	timer *time.Timer // wakes Run for the next step
	next  time.Time   // no step before
	pause time.Duration
	since time.Time // since when clients have hindered a pass; zero when they do not

	// stuck says that the last pass gained nothing; stuckAt is where the log
	// ended then.
	stuck   bool
	stuckAt block.Seq
	folds   uint64    // folds complete when a wait for them ends
	target  block.Seq // of the wait for a commit
	before  int64     // whole tracks when the pass began

	emptying *space.Emptying
	mover    mover

	mu    sync.Mutex // guards stats
	stats CleanerStats
}

func newCleaner(p *Pool, o CleanerOptions) *cleaner {
	o.setDefaults()
	c := &cleaner{p: p, o: o, pause: o.Pause, timer: time.NewTimer(0)}
	c.timer.Stop()
	c.mover = mover{p: p, has: func(at block.Physical) bool { return c.emptying.Has(at) }, note: func(moved, raced, failed int) {
		c.count(func(s *CleanerStats) {
			s.Moved += uint64(moved)
			s.Raced += uint64(raced)
			s.Failed += uint64(failed)
		})
	}}
	if c.say("has not looked yet"); o.Off {
		c.say("off")
	}
	return c
}

// Stats may be called at any time.
func (c *cleaner) Stats() CleanerStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stats
}

func (c *cleaner) count(fn func(s *CleanerStats)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fn(&c.stats)
}

func (c *cleaner) say(state string) { c.count(func(s *CleanerStats) { s.State = state }) }

// wantsFold reports whether a fold is what the cleaner waits for.
func (c *cleaner) wantsFold() bool {
	return (c.phase == cleanerFolds || c.phase == cleanerSettles) && c.p.machine.Stats().Folds < c.folds
}

// close ends a pass under way; what was moved so far is a write like others.
func (c *cleaner) close() {
	c.timer.Stop()
	c.endPass()
	c.mover.close()
	c.phase = cleanerIdle
}

// work does the next step if it is due.
func (c *cleaner) work(now time.Time) {
	if now.Before(c.next) || c.p.machine.Folding() {
		return
	}
	if c.o.Off {
		c.look()
		c.next = now.Add(c.o.Pause)
		return
	}
	switch c.phase {
	case cleanerIdle:
		c.consider(now)
	case cleanerFolds:
		if c.p.machine.Stats().Folds >= c.folds {
			c.begin(now)
		}
	case cleanerMoves:
		c.move(now)
	case cleanerCommits:
		if c.p.machine.Committed() >= c.target {
			c.awaitFold(cleanerSettles)
		}
	case cleanerSettles:
		if c.p.machine.Stats().Folds >= c.folds {
			c.finish(now)
		}
	}
}

// arm makes the timer wake Run when the next step of a pass is due, and not
// otherwise: whatever else the cleaner waits for, Run looks often enough.
func (c *cleaner) arm() {
	if c.phase == cleanerMoves {
		c.p.wakeAt(c.timer, c.next)
	} else {
		c.timer.Stop()
	}
}

// awaitFold waits in the given phase until a fold of everything that is
// committed now is complete.
func (c *cleaner) awaitFold(phase cleanerPhase) {
	c.phase, c.folds = phase, c.p.foldsNeeded()
}

// rest goes back to idle for a pause.
func (c *cleaner) rest(now time.Time, why string) {
	c.phase, c.next = cleanerIdle, now.Add(c.pause)
	c.say(why)
}

// low returns how many tracks should be wholly free.
func (c *cleaner) low(t space.Tracks) int64 {
	return max(1, t.All*int64(c.o.LowWater)/100)
}

func (c *cleaner) look() space.Tracks {
	t := c.p.space.Tracks()
	c.count(func(s *CleanerStats) { s.Tracks, s.Whole = t.All, t.Whole })
	return t
}

// consider decides whether a pass is due.
func (c *cleaner) consider(now time.Time) {
	p := c.p
	switch t := c.look(); {
	case t.Whole >= c.low(t):
		c.stuck, c.pause = false, c.o.Pause
		c.rest(now, "enough tracks are wholly free")
	case c.stuck && p.dirty.Head() == c.stuckAt:
		c.rest(now, "the last pass gained nothing and nothing was written since")
	case p.remover.active():
		c.rest(now, "a device is being removed")
	case p.bmap.Unfinished():
		c.rest(now, "what was deleted and trimmed is still being freed")
	default:
		c.say("waits for a fold before a pass")
		c.awaitFold(cleanerFolds)
	}
}

// begin chooses the tracks of a pass and begins it.
func (c *cleaner) begin(now time.Time) {
	p := c.p
	t, u := c.look(), p.space.Usage()
	low := c.low(t)
	e := p.space.Choose(space.Choice{
		MinFree: block.TrackBlocks * c.o.MinFree / 100,
		Tracks:  max(1, low+low/2-t.Whole),
		Used:    max(0, u.Spare()) / 4, // both places of a block are in use until the fold
	})
	why := ""
	switch pages := (u.Total - u.Free) / blockmap.LeafBlocks; {
	case e.Tracks == 0:
		why = fmt.Sprintf("no track is %d %% free, or the pool lacks the room to move blocks", c.o.MinFree)
	case e.Free < payBlocks*pages:
		why = "too little would be gained for a walk of all maps"
	default:
		if err := c.mover.begin(); err != nil {
			why = err.Error()
		}
	}
	if why != "" {
		p.space.StopEmptying()
		c.rest(now, why)
		return
	}
	c.emptying, c.before, c.since = e, t.Whole, time.Time{}
	c.phase = cleanerMoves
}

// move does one step of a pass, if clients leave room for it.
func (c *cleaner) move(now time.Time) {
	if c.hindered() {
		if c.since.IsZero() {
			c.since = now
		}
		c.say("waits for room in the log or the pool")
		if c.next = now.Add(c.p.soon()); now.Sub(c.since) >= c.o.Pause {
			// Nor shall the tracks be kept from them any longer.
			c.moved(now, c.stats.State)
		}
		return
	}
	c.since = time.Time{}
	c.say("moves blocks")
	blocks, more, err := c.mover.step()
	c.next = now.Add(pace(int64(blocks)*block.Size, c.o.Rate))
	if err != nil {
		c.moved(now, err.Error())
	} else if !more {
		c.moved(now, "waits until what it moved is committed")
	}
}

// moved ends the walk, complete or not.
func (c *cleaner) moved(now time.Time, state string) {
	c.say(state)
	c.phase, c.next, c.target = cleanerCommits, now, c.p.dirty.Head()
	c.mover.queue = nil
}

// hindered reports whether clients need what the cleaner would take.
func (c *cleaner) hindered() bool {
	s := c.p.space.Usage()
	return c.p.pressed() || s.Spare() < 4*int64(c.mover.batch())
}

// finish judges a pass whose outcome is in the counts.
func (c *cleaner) finish(now time.Time) {
	freed := c.p.space.Emptied(c.emptying)
	c.endPass()
	t := c.look()
	c.count(func(s *CleanerStats) {
		s.Passes++
		s.Freed += uint64(freed)
	})
	if t.Whole > c.before {
		c.stuck, c.pause = false, c.o.Pause
		c.phase, c.next = cleanerIdle, now
		return
	}
	c.stuck, c.stuckAt = true, c.p.dirty.Head()
	c.pause = min(2*c.pause, longestPause*c.o.Pause)
	c.rest(now, "the last pass gained nothing")
}

// endPass gives back what a pass holds.
func (c *cleaner) endPass() {
	c.p.space.StopEmptying()
	c.emptying = nil
	c.mover.end()
}
