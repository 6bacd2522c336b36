package pool

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// ScrubOptions say when and how fast a pool is scrubbed.
type ScrubOptions struct {
	Off bool // no scrub begins by itself
	// Every is the time from the end of a scrub to the next that begins by
	// itself; none does if 0.
	Every time.Duration
	// Rate is how many bytes a scrub reads in a second, from all copies
	// together. DefaultScrubRate if 0.
	Rate int64
	// Tell, if set, hears of begin, end and findings. It is called by Run and
	// must not block.
	Tell func(ScrubEvent)
}

// DefaultScrubRate is the Rate of pools that do not ask for another.
const DefaultScrubRate = 64 << 20

// ScrubEvent is something that a person may want to know of a scrub.
type ScrubEvent struct {
	Kind    string // "scrub-begin", "scrub-end", "scrub-repaired", "scrub-unreadable"
	Message string
}

// scrubTells is how many findings of each kind one scrub tells of by itself; its
// end tells how many there were.
const scrubTells = 16

// The things that can be asked of a scrub.
const (
	ScrubStart  = "start"
	ScrubPause  = "pause"
	ScrubResume = "resume"
	ScrubStop   = "stop"
)

// ScrubStateError says that a scrub cannot do what was asked for in its state. It is
// of kind block.ErrInvalid.
type ScrubStateError struct {
	Action, Pool string
	State        ScrubState
}

// Error implements error.
func (e *ScrubStateError) Error() string {
	return fmt.Sprintf("cannot %s the scrub of pool %s: its state is %q", e.Action, e.Pool, e.State)
}

// Unwrap returns the kind.
func (e *ScrubStateError) Unwrap() error { return block.ErrInvalid }

// scrubSave is the time between two records of a scrub that goes on.
const scrubSave = 5 * time.Second

// scrub is the machine that reads everything that is in use, from every copy, and
// mends what is bad. All but Stats belongs to Run's goroutine; steps are small, so
// that consistency points wait for one only a few milliseconds.
type scrub struct {
	p     *Pool
	o     ScrubOptions
	timer *time.Timer // wakes Run for the next step
	next  time.Time   // no step before

	known   bool // the record was looked for
	rec     scrubRecord
	saved   time.Time // when rec was written
	stepped time.Time // when the newest step began; zero when none was since it went on
	notable bool      // there is something in rec that must not be lost

	wait  foldWait // before it looks at trees
	renew uint64   // folds complete when the journal is whole again

	// Work space of a scrub that goes on, else nil.
	bulk   *bulk
	pages  *uncached
	frame  []byte
	proof  proof
	blocks []scrubbed

	mu    sync.Mutex // guards stats
	stats ScrubStats
}

func newScrub(p *Pool, o ScrubOptions) *scrub {
	if o.Rate <= 0 {
		o.Rate = DefaultScrubRate
	}
	s := &scrub{p: p, o: o, timer: time.NewTimer(0)}
	s.timer.Stop()
	s.wait.begin(p)
	return s
}

// Scrub begins, pauses, goes on with or ends a scrub: one of ScrubStart and so on.
func (p *Pool) Scrub(ctx context.Context, action string) error {
	return p.do(ctx, func() error {
		if err := p.machine.Claimed(); err != nil {
			return err
		}
		return p.scrub.command(action, time.Now())
	})
}

func (s *scrub) command(action string, now time.Time) error {
	if err := s.know(now); err != nil {
		return err
	}
	allowed := false
	state := s.rec.state
	switch action {
	case ScrubStart:
		if allowed = state != ScrubRunning && state != ScrubPaused; allowed {
			s.begin(now)
		}
	case ScrubPause:
		if allowed = state == ScrubRunning; allowed {
			s.rec.state = ScrubPaused
		}
	case ScrubResume:
		if allowed = state == ScrubPaused; allowed {
			s.rec.state, s.next = ScrubRunning, now
		}
	case ScrubStop:
		if allowed = state == ScrubRunning || state == ScrubPaused; allowed {
			s.rec.state, s.rec.now.ended = ScrubStopped, now
			s.tell("scrub-end", "scrub of pool %s was stopped", s.p.label.Name)
		}
	}
	if !allowed {
		return &ScrubStateError{action, s.p.label.Name, state}
	}
	s.stepped = time.Time{}
	s.keep(now)
	return nil
}

// know looks for the record, once, and takes memory.
func (s *scrub) know(now time.Time) error {
	if s.frame == nil {
		frame, err := hpdi.AllocPrivate(block.Size)
		if err != nil {
			return err
		}
		s.frame = frame
	}
	if s.known {
		return nil
	}
	if r, ok := recall(s.p, scrubBlocks, s.frame, decodeScrub); ok {
		s.rec = *r
	}
	s.known = true
	if s.publish(); s.rec.generation == 0 && s.scheduled() {
		s.rec.since = now
		s.keep(now)
	}
	return nil
}

func (s *scrub) scheduled() bool { return s.o.Every > 0 && !s.o.Off }

// due returns when a scrub begins by itself; zero for never.
func (s *scrub) due() time.Time {
	if !s.scheduled() || s.rec.state == ScrubRunning || s.rec.state == ScrubPaused {
		return time.Time{}
	}
	from := s.rec.since
	if s.rec.now.ended.After(from) {
		from = s.rec.now.ended
	}
	return from.Add(s.o.Every)
}

func (s *scrub) begin(now time.Time) {
	s.rec.state, s.rec.place = ScrubRunning, scrubPlace{}
	s.wait.begin(s.p)
	s.rec.now = scrubResult{begun: now}
	s.next = now
	s.tell("scrub-begin", "scrub of pool %s begins", s.p.label.Name)
}

// work does the next step if it is due.
func (s *scrub) work(now time.Time) {
	if s.know(now) != nil {
		return
	}
	if s.rec.state != ScrubRunning {
		s.release()
		due := s.due()
		if due.IsZero() || now.Before(due) {
			return
		}
		s.begin(now)
		s.keep(now)
	}
	if now.Before(s.next) {
		return
	}
	s.next = now.Add(s.p.soon())
	if s.ready() {
		s.goOn(now)
	}
}

// ready reports whether a step can be made: everything is in the trees, and
// clients do not need what it would take.
func (s *scrub) ready() bool {
	if s.rec.place.part == scrubFolds && !s.folded() {
		return false
	}
	if s.p.pressed() {
		return false
	}
	if n := s.p.machine.Renewing(); n > 0 && n >= s.p.machine.MayRenew() {
		return false // for a fold
	}
	if s.bulk == nil {
		b, err := newBulk(s.p.set)
		if err != nil {
			return false
		}
		s.bulk, s.pages = b, &uncached{s.p.reader, b}
	}
	return true
}

// folded waits until what is committed now is in the trees.
func (s *scrub) folded() bool {
	if !s.wait.over() {
		return false
	}
	s.rec.place = scrubPlace{part: scrubCopies}
	for _, v := range s.p.catalogue.List() {
		s.rec.now.total += uint64(v.Used)
	}
	return true
}

// wantsFold reports whether a fold is what the scrub waits for.
func (s *scrub) wantsFold() bool {
	if n := s.p.machine.Renewing(); n > 0 && (s.rec.state != ScrubRunning || n >= s.p.machine.MayRenew()) {
		return true
	}
	return s.rec.state == ScrubRunning && s.wait.wants() || s.p.machine.Stats().Folds < s.renew
}

// goOn makes a step.
func (s *scrub) goOn(now time.Time) {
	r := &s.rec.now
	if !s.stepped.IsZero() {
		r.took += max(0, now.Sub(s.stepped))
	}
	s.stepped = now
	before := r.bytes
	more := s.step()
	s.next = now.Add(pace(int64(r.bytes-before), s.o.Rate))
	if !more && r.repaired > 0 && s.p.set.Sync() != nil {
		// What a power cut can undo is not repaired. The next step is the end again.
		s.next = now.Add(time.Second)
		s.publish()
		return
	}
	if !more {
		s.rec.state, r.ended = ScrubDone, now
		s.rec.last = *r
		s.tell("scrub-end", "scrub of pool %s read %d blocks, repaired %d copies, and found %d blocks that no copy has",
			s.p.label.Name, r.blocks, r.repaired, r.unreadable)
	}
	if !more || s.notable || now.Sub(s.saved) >= scrubSave {
		s.keep(now)
	} else {
		s.publish()
	}
}

// keep writes the record.
func (s *scrub) keep(now time.Time) {
	s.saved, s.notable = now, false
	s.save()
	s.publish()
}

// count counts a block that was read from so many copies.
func (s *scrub) count(copies int) {
	if copies > 0 {
		s.rec.now.blocks++
		s.rec.now.bytes += uint64(copies) * block.Size
	}
}

func (s *scrub) repaired(f scrubFinding, copies int) {
	if copies == 0 {
		return // a client has met it in between
	}
	s.notable = true
	if s.rec.now.repaired += uint64(copies); s.rec.now.repaired <= scrubTells {
		s.tell("scrub-repaired", "%s of pool %s was bad on %d of its copies and is repaired", s.describe(f), s.p.label.Name, copies)
	}
}

func (s *scrub) found(f scrubFinding) {
	s.notable = true
	r := &s.rec.now
	if r.unreadable++; r.unreadable <= scrubTells {
		s.tell("scrub-unreadable", "%s of pool %s cannot be read from any copy", s.describe(f), s.p.label.Name)
	}
	if len(r.findings) < scrubFindings {
		r.findings = append(r.findings, f)
	}
}

func (s *scrub) tell(kind, format string, args ...any) {
	if s.o.Tell != nil {
		s.o.Tell(ScrubEvent{kind, fmt.Sprintf(format, args...)})
	}
}

// arm makes the timer wake Run when the next step is due, and not otherwise.
func (s *scrub) arm() {
	if s.rec.state != ScrubRunning {
		s.timer.Stop()
		return
	}
	s.p.wakeAt(s.timer, s.next)
}

// release gives back the memory of a scrub that does not go on.
func (s *scrub) release() {
	if s.bulk != nil {
		s.bulk.close()
	}
	s.bulk, s.pages, s.blocks, s.proof = nil, nil, nil, proof{}
}

// close ends the work. Where a scrub has come to is in its record.
func (s *scrub) close() {
	s.timer.Stop()
	s.release()
	if s.frame != nil {
		_ = hpdi.Free(s.frame)
		s.frame = nil
	}
}
