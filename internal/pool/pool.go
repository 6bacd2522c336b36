package pool

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockio"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/dirty"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/region"
	"github.com/pollux-storage/pollux/internal/session"
	"github.com/pollux-storage/pollux/internal/space"
	"github.com/pollux-storage/pollux/internal/volume"
)

// Pool is an open pool. Its methods may be called concurrently unless they
// say otherwise.
type Pool struct {
	opts  OpenOptions
	label Label
	epoch block.Epoch
	kept  kept
	steps []Step

	set        *devices.Set
	reader     *blockio.Reader
	cache      keeper
	space      *space.Space
	bmap       *blockmap.Map
	catalogue  *catalogue.Set
	region     *region.Region
	log        *oplog.Log
	dirty      *dirty.Set
	flusher    *cp.Flusher
	flushQueue hpdi.Queue
	store      *volume.Store
	sessions   *session.Table
	gate       volume.Gate

	// Of Run's goroutine, or of Open and Close when it does not run.
	machine    *cp.Machine
	labels     []Label     // of the devices, as they are on them as far as is known
	loaded     atomic.Bool // the counts are in memory
	estimate   int64       // blocks reserved until then
	retryAt    time.Time
	cleaner    *cleaner
	scrub      *scrub
	remover    *remover
	indexer    *indexer
	scan       *scan
	transfer   *transfer
	survey     *survey
	flash      *flash
	index      indexFigures   // that others may see
	regionKept atomic.Int64   // see countKept
	journal    region.Section // of the unfolded journal; zero without one
	// journalComing is the section of the unfolded journal until it is there.
	journalComing coming
	indexOwn      string // why the newest index has memory that does not outlive the guest

	kick    chan struct{}
	jobs    chan job
	stopped chan struct{} // closed when Run has returned
	turns   atomic.Uint64 // of Run's loop
	long    atomic.Int32  // above 0 while Run is in what may read for a long time

	settings  atomic.Pointer[cp.Settings] // those that are durable
	lastError atomic.Pointer[error]       // of the newest consistency point or fold, nil when it went well

	mu      sync.Mutex // guards volumes
	volumes map[string]*volume.Volume
}

type job struct {
	ctx  context.Context
	run  func() error
	done chan error
}

// owned is called for each publication.
func (p *Pool) owned() error {
	if planted.Has(planted.EpochUnchecked) {
		return nil
	}
	if e := p.region.Epoch(); e != p.epoch {
		return fmt.Errorf("pool %s at epoch %d is now at %d: %w", p.label.Name, p.epoch, e, block.ErrStale)
	}
	return nil
}

// wake makes Run look whether a consistency point is due.
func (p *Pool) wake() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// OpenSteps tells how long the steps of Open took.
func (p *Pool) OpenSteps() []Step { return p.steps }

// ID returns the pool's identity.
func (p *Pool) ID() block.PoolID { return p.label.Pool }

// Name returns the pool's name.
func (p *Pool) Name() string { return p.label.Name }

// Identity returns the name of the guest that the pool belongs to, whoever
// owns it now.
func (p *Pool) Identity() string { return p.label.Identity }

// Epoch returns the epoch of this ownership.
func (p *Pool) Epoch() block.Epoch { return p.epoch }

// Region returns the pool's region.
func (p *Pool) Region() *region.Region { return p.region }

// Probe passes the way of a write up to its publication. It waits for no
// device, so it fails only when the guest itself is stuck or not the owner.
func (p *Pool) Probe(context.Context) error {
	if !p.gate.Enter() {
		return fmt.Errorf("pool %s: %w", p.label.Name, block.ErrClosed)
	}
	defer p.gate.Exit()
	return p.dirty.Probe()
}

// retryDelay is the pause after a consistency point that failed.
const retryDelay = 200 * time.Millisecond

// restBeforeFold is how long a pool must have been at rest for a fold that is
// not due: it frees what trims and deletes have left, brings figures up to date
// and makes the next takeover short.
const restBeforeFold = 5 * time.Second

const (
	// freePause is the time between two folds that only free what was deleted
	// or trimmed.
	freePause = 500 * time.Millisecond
	// trimPause is the time without a fold after which large trims are one's
	// reason.
	trimPause = 5 * time.Second
	// longestUnfolded is the longest time without a fold in a pool that is
	// never at rest and whose clients write too little for one to be due: what
	// they trim shall come back all the same.
	longestUnfolded = 2 * time.Minute
)

// timing is what Run remembers between two rounds.
type timing struct {
	dirty  time.Time // since when something is dirty; zero when nothing is
	busy   time.Time // when something was dirty last
	folded time.Time // when the last fold was complete
	pause  time.Time // until then a fold that nobody waits for rests
}

// A fold that nobody waits for rests after each step for foldRest times as long as
// the step took, so that freeing much at once takes a quarter of one processor from
// clients; longestRest is the most, for a step that takes longer waits for a device.
const (
	foldRest    = 3
	longestRest = 10 * time.Millisecond
)

// Run makes consistency points and folds until ctx ends. It returns an error
// when the pool must be closed: its ownership is lost, or the state of its
// journal unknown. Failures of devices are retried for ever, and shown by
// Stats. It must be called once.
func (p *Pool) Run(ctx context.Context) error {
	defer close(p.stopped)
	tick := time.NewTicker(p.soon()) // failures and rest are looked at, too
	defer tick.Stop()
	defer p.cleaner.close()
	defer p.scan.close()
	defer p.transfer.close()
	defer p.survey.close()
	defer p.flash.timer.Stop()
	defer p.indexer.timer.Stop()
	rested := time.NewTimer(0)
	defer rested.Stop()
	if err := p.provedSoon(ctx); err != nil {
		p.dropRecord()
		return err
	}
	t := timing{busy: time.Now(), folded: time.Now()}
	for {
		p.turns.Add(1)
		if err := p.owned(); err != nil {
			return err
		}
		if p.machine.Broken() != nil {
			return p.machine.Broken()
		}
		if err := p.work(ctx, &t); err != nil && ctx.Err() == nil {
			p.failed(err)
		}
		// In a fixed order and not by the lot of one select, so that the same
		// events make the same run: the end, then jobs.
		select {
		case <-ctx.Done():
			return nil
		default:
		}
		select {
		case j := <-p.jobs:
			j.done <- p.runJob(j)
			continue
		default:
		}
		rest := time.Duration(0)
		if p.machine.Folding() {
			rest = time.Until(t.pause)
		}
		if p.loaded.Load() && (p.machine.Folding() && rest <= 0 || p.dirty.Usage().Frozen > 0) && !time.Now().Before(p.retryAt) {
			continue // folds and points that wait go on unless something else is to be done
		}
		if rested.Stop(); rest > 0 {
			rested.Reset(rest)
			p.cleaner.timer.Stop() // they wait for the fold, too
			p.remover.timer.Stop()
		} else {
			p.cleaner.arm()
			p.remover.arm()
		}
		p.scrub.arm()
		p.scan.arm()
		p.transfer.arm()
		p.survey.arm()
		p.flash.arm()
		p.indexer.arm()
		select {
		case <-ctx.Done():
			return nil
		case j := <-p.jobs:
			j.done <- p.runJob(j)
		case <-p.kick:
			drain(tick.C) // one look serves all
		case <-tick.C:
			drain(p.kick)
		case <-rested.C:
		case <-p.cleaner.timer.C:
			drain(p.kick)
			drain(tick.C)
		case <-p.scrub.timer.C:
		case <-p.remover.timer.C:
		case <-p.scan.timer.C:
		case <-p.transfer.timer.C:
		case <-p.survey.timer.C:
		case <-p.flash.timer.C:
		case <-p.flash.woken():
			p.flash.next = time.Time{}
		case <-p.indexer.timer.C:
		}
	}
}

// Progress returns two numbers that change as long as Run gets on: its loop turns several
// times a second, also when nothing is to be done, and while a turn takes long requests to
// devices end. Own counts what nobody but Run does. Any counts reads, too, which clients
// make as well; a long consistency point or a fold may make nothing else for a while. It
// takes no lock that is held while a device is called.
func (p *Pool) Progress() (own, anything uint64) {
	reads, others := p.set.Ended()
	own = p.turns.Load() + others
	if p.long.Load() > 0 {
		own += reads
	}
	return own, p.turns.Load() + others + reads
}

// soon is when to look again at what cannot go on now, however seldom consistency points
// are.
func (p *Pool) soon() time.Duration { return min(p.opts.Interval, DefaultInterval) / 4 }

// wakeAt makes a timer wake Run at a time, or when Run does something again.
func (p *Pool) wakeAt(t *time.Timer, at time.Time) {
	if at.Before(p.retryAt) {
		at = p.retryAt
	}
	t.Reset(time.Until(at))
}

// foldsNeeded returns how many folds will be complete when the trees have all that is
// committed now. None may be under way.
func (p *Pool) foldsNeeded() uint64 {
	n := p.machine.Stats().Folds
	if p.machine.FoldUseful() {
		n++
	}
	return n
}

// foldWait waits until the trees have what is committed when it is asked first.
type foldWait struct {
	p     *Pool
	asked bool
	folds uint64 // complete when the wait is over; set once asked
}

// begin begins a wait.
func (w *foldWait) begin(p *Pool) { *w = foldWait{p: p} }

// over reports whether the wait is over. A fold under way when it is asked first may lack
// something, and is waited for before.
func (w *foldWait) over() bool {
	if !w.asked {
		if w.p.machine.Folding() {
			return false
		}
		w.asked, w.folds = true, w.p.foldsNeeded()
	}
	return w.p.machine.Stats().Folds >= w.folds
}

// wants reports whether a fold is what is waited for.
func (w *foldWait) wants() bool { return w.asked && w.p.machine.Stats().Folds < w.folds }

// pace returns how long to rest after so many bytes in order to do no more than rate bytes
// in a second.
func pace(bytes, rate int64) time.Duration {
	return time.Duration(float64(bytes) / float64(rate) * float64(time.Second))
}

// drain takes what is in c, if anything is.
func drain[T any](c <-chan T) {
	select {
	case <-c:
	default:
	}
}

func (p *Pool) failed(err error) {
	p.lastError.Store(&err)
	p.retryAt = time.Now().Add(retryDelay)
}

func (p *Pool) runJob(j job) error {
	p.long.Add(1)
	defer p.long.Add(-1)
	if err := j.ctx.Err(); err != nil {
		return err // nobody waits for it any more
	}
	if err := p.load(j.ctx); err != nil {
		return err
	}
	return j.run()
}

// work does what is due: the superblock that Open left to write, loading the
// counts, a consistency point, a step of a fold, a step of the cleaner, one of the
// scrub.
func (p *Pool) work(ctx context.Context, t *timing) error {
	now := time.Now()
	if now.Before(p.retryAt) {
		return nil
	}
	if err := p.machine.Claimed(); err != nil {
		return err
	}
	if err := p.load(ctx); err != nil {
		return err
	}
	u := p.dirty.Usage()
	if u.Active+u.Frozen == 0 {
		t.dirty = time.Time{}
	} else if t.busy = now; t.dirty.IsZero() {
		t.dirty = now
	}
	due := u.Frozen > 0 || u.Active >= u.Due || u.Active > 0 && u.Waiting > 0 || !t.dirty.IsZero() && now.Sub(t.dirty) >= p.opts.Interval
	// What waits for a fold is frozen, so that it goes to the devices in small points.
	held := due && p.machine.Folding() && p.machine.FoldFirst(p.dirty.Freeze().Len())
	if due && !held {
		t.dirty = time.Time{}
		if err := p.commit(nil); err != nil {
			return err
		}
	}
	if held || p.wantsFold(t, now) {
		begun := time.Now()
		done, err := p.machine.Fold()
		if err != nil {
			return err
		}
		now := time.Now()
		if done {
			t.folded = now
		}
		if t.pause = now; !p.machine.FoldDue() && now.Sub(t.busy) < restBeforeFold {
			t.pause = now.Add(min(foldRest*now.Sub(begun), longestRest))
		}
	}
	p.reader.Mend()
	p.fillJournal()
	p.cleaner.work(now)
	p.scrub.work(now)
	p.indexer.work(now)
	p.scan.work(now)
	p.transfer.work(now)
	p.survey.work(now)
	p.flash.work(now)
	if p.remover.work(now); now.Before(p.retryAt) {
		return nil // it has failed
	}
	p.lastError.Store(nil)
	return nil
}

// wantsFold reports whether a step of a fold should be made now.
func (p *Pool) wantsFold(t *timing, now time.Time) bool {
	switch {
	case p.machine.FoldDue():
		return true
	case p.machine.Folding():
		return !now.Before(t.pause)
	case p.cleaner.wantsFold() || p.scrub.wantsFold() || p.remover.wantsFold() || p.scan.wantsFold() || p.transfer.wantsFold() || p.survey.wantsFold():
		return true
	}
	since := now.Sub(t.folded)
	return p.bmap.Unfinished() && since >= freePause || p.bmap.HasHoles() && since >= trimPause ||
		p.machine.FoldUseful() && (now.Sub(t.busy) >= restBeforeFold || since >= longestUnfolded)
}

// pressed reports whether clients need what cleaner and scrub would take: somebody
// waits for room in the log, or a quarter of it is in use.
func (p *Pool) pressed() bool {
	u := p.dirty.Usage()
	return u.Waiting > 0 || u.Active+u.Frozen >= u.Permits/4
}

// commit makes one consistency point, and the folds that it needs first: the
// one under way may not give back enough of the journal, and holds blocks that
// a nearly full pool needs. Where folds fail the point may be possible all the same.
func (p *Pool) commit(changes []catalogue.Change) error {
	err := p.machine.Commit(changes)
	for try := 0; try < 3 && (errors.Is(err, cp.ErrFoldFirst) || errors.Is(err, block.ErrNoSpace) && p.machine.Folding()); try++ {
		folded := p.foldAll()
		if err = p.machine.Commit(changes); err != nil && folded != nil {
			return folded
		}
	}
	if err == nil {
		p.region.SetCommitted(p.machine.CP(), p.machine.Committed())
		p.index.set(p.machine)
	}
	return err
}

// foldAll completes the fold under way, or a new one.
func (p *Pool) foldAll() error {
	for {
		if done, err := p.machine.Fold(); done || err != nil {
			return err
		}
	}
}

// foldEverything folds all that is committed.
func (p *Pool) foldEverything() error {
	if p.machine.Folding() {
		// It began before the newest consistency points.
		if err := p.foldAll(); err != nil {
			return err
		}
	}
	return p.foldAll()
}

// commitAll makes consistency points until everything published before the
// call is on the devices.
func (p *Pool) commitAll() error {
	for target := p.dirty.Head(); p.machine.Committed() < target; {
		if err := p.commit(nil); err != nil {
			return err
		}
	}
	return nil
}

// do hands fn to Run's goroutine and waits for its result.
func (p *Pool) do(ctx context.Context, fn func() error) error {
	j := job{ctx, fn, make(chan error, 1)}
	select {
	case p.jobs <- j:
	case <-ctx.Done():
		return ctx.Err()
	case <-p.stopped:
		return fmt.Errorf("pool %s: %w", p.label.Name, block.ErrClosed)
	}
	return <-j.done
}

// Commit makes everything published before the call part of a consistency
// point.
func (p *Pool) Commit(ctx context.Context) error { return p.do(ctx, p.commitAll) }

// Fold commits, and merges all of it into the trees.
func (p *Pool) Fold(ctx context.Context) error {
	return p.do(ctx, func() error {
		if err := p.commitAll(); err != nil {
			return err
		}
		return p.foldEverything()
	})
}

// relieve frees all space that trims, deletes and overwrites have given up.
func (p *Pool) relieve(ctx context.Context) error {
	return p.do(ctx, p.freeEverything)
}

func (p *Pool) freeEverything() error {
	if err := p.commitAll(); err != nil {
		return err
	}
	for first := true; first || p.bmap.Unfinished(); first = false {
		if err := p.foldEverything(); err != nil {
			return err
		}
	}
	return nil
}
