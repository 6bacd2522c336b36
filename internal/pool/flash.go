package pool

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/flashmap"
	"github.com/pollux-storage/pollux/internal/flashmap/collect"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
	"github.com/pollux-storage/pollux/internal/planted"
)

// FlashOptions say who hears of what happens to the flash of a pool.
type FlashOptions struct {
	// Tell, if set, hears of begin and end of failures and evacuations. It is called by Run
	// and by whoever opens the pool, and must not block.
	Tell func(FlashEvent)
}

// FlashEvent is something that a person may want to know of the flash of a pool.
type FlashEvent struct {
	Kind    string // "flash-failed", "flash-works", "flash-evacuated", "flash-grown", "flash-policy-lost", "flash-history-lost"
	Message string
}

// Times of the machine.
const (
	// flashTick is how often what was recorded is counted: a recorder has room for some
	// thousand accesses.
	flashTick = 100 * time.Millisecond
	// flashKeep is how often what was collected is written to the flash device, some MiB for
	// each disk: so much of it is lost with a guest. More often would wear flash.
	flashKeep = 5 * time.Minute
	// flashWait is how long a step that failed waits, and what waits for clients at most.
	flashWait = time.Second
	// pressedRest is how many times as long as a step took the next one waits while clients
	// need what it would take.
	pressedRest = 24
	// flashRetry is how long consistency points write nothing hot to flash after it has
	// failed, and how long it must have gone well then.
	flashRetry = time.Minute
	// pinLeast and pinMost are how long what is pinned is taken to lie where it was found:
	// whatever was written meanwhile is found by the next look.
	pinLeast, pinMost = time.Second, time.Minute
)

// flash is the flash layer of a pool: it has the engine decide which data sets move, and
// moves them. It is a machine of Run's goroutine, but for what mu guards.
type flash struct {
	p     *Pool
	o     FlashOptions
	timer *time.Timer

	// layer is nil as long as the pool has no flash. Run's goroutine changes it and dev, which
	// is the flash device, under mu.
	layer  *flashmap.Flash
	dev    int
	disks  []*flashDisk // the devices that the layer is over, in their order
	kept   flashKept
	engine *policy.Engine
	pace   policy.Pace
	ended  time.Time     // when the newest step did
	took   time.Duration // how long that took

	tickAt, decideAt, keepAt time.Time
	next                     time.Time // no step of a move before
	queue                    []policy.Move
	now                      *flashMove           // under way
	evacuation               *flashmap.Evacuation // keeps slots free while everything goes back
	evacuated                bool
	stuck                    error // why the newest move of an evacuation failed
	pins                     pinWalk
	note                     *flashmap.NoteWriter // what was collected is being written
	memory                   flashMemory          // what was collected, in the region
	usageComing              coming               // its section, until it is there
	recalled                 bool                 // what was collected before was looked for
	counted                  uint64               // accesses, when the note was written
	failed                   error                // why it fails, as somebody was told
	shunned                  time.Time            // since when nothing hot is written to flash, see shun

	mu    sync.Mutex // guards stats, and layer and dev where others look at them
	stats FlashStats // of the newest decision
}

// flashDisk is a device of the pool under the layer.
type flashDisk struct {
	dev       int
	id        block.DeviceID
	name      string
	rotates   bool
	fixed     int64       // bytes at its front that never move
	raw       hpdi.Device // that it is over
	device    flashmap.Device
	collector *collect.Collector
	use       []collect.Stat // memory for snapshots
}

// flashMove is a move under way.
type flashMove struct {
	policy.Move
	move    *flashmap.Move
	set     flashmap.Set
	disk    *flashDisk
	nothing bool // what is there is free: nothing is copied
}

func newFlash(p *Pool, o FlashOptions) *flash {
	f := &flash{p: p, o: o, timer: time.NewTimer(0)}
	f.timer.Stop()
	f.pins.f = f
	return f
}

func (f *flash) tell(kind, format string, args ...any) {
	if f.o.Tell != nil {
		f.o.Tell(FlashEvent{kind, fmt.Sprintf(format, args...)})
	}
}

func (f *flash) count(fn func(s *FlashStats)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn(&f.stats)
}

// is reports whether a device is the flash device.
func (f *flash) is(dev int) bool { return f.layer != nil && f.dev == dev }

// isNow is the same for who is not Run's goroutine.
func (f *flash) isNow(dev int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.is(dev)
}

// name returns the flash device's name.
func (f *flash) name() string { return f.p.set.Info(f.dev).Name }

// bytes returns how many bytes are on flash.
func (f *flash) bytes() int64 { return int64(f.layer.Status().Used) * f.layer.SetBytes() }

// disk returns the device of a number, nil if the layer is not over it.
func (f *flash) disk(number int) *flashDisk {
	for _, d := range f.disks {
		if d.dev == number {
			return d
		}
	}
	return nil
}

// woken tells when a move that waits for clients may go on.
func (f *flash) woken() <-chan struct{} {
	if f.now == nil {
		return nil
	}
	return f.layer.Woken()
}

// arm makes the timer wake Run when something is due.
func (f *flash) arm() {
	if f.layer == nil {
		f.timer.Stop()
		return
	}
	at := f.tickAt
	if f.moves() && f.next.Before(at) {
		at = f.next
	}
	f.p.wakeAt(f.timer, at)
}

// moves reports whether a move is to be stepped.
func (f *flash) moves() bool {
	return f.now != nil || len(f.queue) > 0
}

// leaves reports whether everything is to go back.
func (f *flash) leaves() bool {
	return f.kept.Evacuate || f.dev >= 0 && f.p.remover.dev == f.dev
}

// work does what is due.
func (f *flash) work(now time.Time) {
	if f.layer == nil {
		if f.memory.mem != nil {
			f.dropUsage()
		}
		return
	}
	if !now.Before(f.tickAt) {
		for _, d := range f.disks {
			d.collector.Tick(now)
		}
		f.tickAt = now.Add(flashTick)
	}
	if !f.recalled {
		f.recalled = true
		f.recall(now)
	}
	if f.leaves() != (f.evacuation != nil) {
		f.turn(now)
	}
	if !now.Before(f.decideAt) {
		f.decide(now)
	}
	if f.moves() && !now.Before(f.next) {
		// Clients that need room in the log need what moves take, and what they bring even
		// more: some are made in any case.
		if at := f.ended.Add(pressedRest * f.took); f.p.pressed() && now.Before(at) {
			f.next = at
		} else {
			f.step(now)
		}
	}
	f.pins.work(now)
	f.keep(now)
	f.keepUsage(now)
}

// turn begins or ends that everything goes back. What is queued is given up.
func (f *flash) turn(now time.Time) {
	f.withdraw()
	f.decideAt, f.evacuated, f.stuck = now, false, nil
	if f.evacuation == nil {
		f.evacuation = f.layer.Evacuate(0)
	} else {
		_ = f.evacuation.Cancel() // it has no move of its own
		f.evacuation = nil
	}
	f.count(func(s *FlashStats) { s.Left, s.Total = 0, 0 })
}

// refresh makes Stats tell at once of what somebody has asked for.
func (f *flash) refresh() {
	now := time.Now()
	if f.leaves() != (f.evacuation != nil) {
		f.turn(now)
	}
	f.decideAt = now
	f.look(f.input(now, false))
}

// withdraw gives up what was decided and not begun.
func (f *flash) withdraw() {
	for _, m := range f.queue {
		f.engine.Withdraw(m, f.layer.SetBytes())
	}
	f.queue = nil
}

// decide finds out what is to be moved next, and makes Stats tell of now. What was decided
// before and not begun yet is decided anew.
func (f *flash) decide(now time.Time) {
	f.decideAt = now.Add(f.kept.Policy.Interval)
	in := f.input(now, false)
	f.withdraw()
	switch {
	case !f.p.loaded.Load():
	case f.leaves():
		f.evacuate()
	default:
		f.queue = f.engine.Step(in)
	}
	f.tidy()
	f.shun(now)
	f.look(in)
}

// shun looks whether consistency points have given up to write to flash, and lets them try
// it again after a while.
func (f *flash) shun(now time.Time) {
	switch shunned := f.p.space.CheapShunned(); {
	case shunned && f.shunned.IsZero():
		f.shunned = now
		f.mishap(fmt.Errorf("what clients have written could not be written to it: %w", flashmap.ErrFailed))
	case shunned && now.Sub(f.shunned) >= flashRetry:
		f.p.space.ShunCheap(false)
		f.shunned = now
	case !shunned && !f.shunned.IsZero() && now.Sub(f.shunned) >= flashRetry:
		f.shunned = time.Time{}
		f.mishap(nil)
	}
}

// tidy lets the layer do what is left over.
func (f *flash) tidy() {
	const some = 64
	for range some {
		if done, err := f.layer.Tidy(); done || err != nil {
			return // it is tried again, and told by its status
		}
	}
}

// input is what the engine decides by, and with all also what makes no difference to it.
func (f *flash) input(now time.Time, all bool) policy.Input {
	in := policy.Input{Now: now, SetBytes: f.layer.SetBytes(), Slots: f.layer.Status().Slots, Pins: f.pins.found}
	for _, d := range f.disks {
		least := f.engine.Least(f.class(d))
		if all {
			least = 0
		}
		s := d.collector.SnapshotAbove(least, now, d.use)
		d.use = s.Stats
		in.Devices = append(in.Devices, policy.Device{
			Number: d.dev, Type: f.class(d), Snapshot: s, On: d.on(f.layer.SetBytes()), Attributes: func(set collect.Set) policy.Attributes { return f.attributes(d, set) },
		})
	}
	for _, u := range f.layer.Use() {
		in.Written += u.Flash.Writes.Bytes
	}
	return in
}

// ranges returns what is on flash, as [start, end) in bytes, in order.
func (d *flashDisk) ranges() iter.Seq2[int64, int64] {
	return func(yield func(start, end int64) bool) {
		size := d.device.Info().Size
		start, end := d.device.NextOnFlash(0)
		for start < size && yield(start, end) {
			start, end = d.device.NextOnFlash(end)
		}
	}
}

// on returns which data sets are on flash, in their order.
func (d *flashDisk) on(setBytes int64) (on []collect.Set) {
	for start, end := range d.ranges() {
		for off := start; off < end; off += setBytes {
			on = append(on, collect.Set(off/setBytes))
		}
	}
	return on
}

// blocks returns the first block of a data set and how many it has.
func (f *flash) blocks(set uint64) (first uint64, n int) {
	n = int(f.layer.SetBytes() / block.Size)
	return set * uint64(n), n
}

// attributes tells how often what lies in a data set is shared: the most references that a
// block of it has.
func (f *flash) attributes(d *flashDisk, set collect.Set) (a policy.Attributes) {
	first, n := f.blocks(uint64(set))
	for i := range n {
		a.References = max(a.References, f.p.space.Count(block.At(d.dev, first+uint64(i))))
	}
	return a
}

// free reports whether nothing of a data set is in use.
func (f *flash) free(d *flashDisk, set flashmap.Set) bool {
	first, n := f.blocks(uint64(set))
	if planted.Has(planted.FlashFreeByOne) {
		n = 1
	}
	return f.p.loaded.Load() && f.p.space.Unused(d.dev, first, n)
}

// step does a step of what moves.
func (f *flash) step(now time.Time) {
	if f.now == nil {
		if len(f.queue) == 0 {
			return
		}
		m := f.queue[0]
		f.queue = f.queue[1:]
		if f.begin(m, now); f.now == nil {
			f.next = now
			return
		}
	}
	if wait := f.pace.Wait(now, f.now.disk.device.Busy()); wait > 0 {
		f.next = now.Add(wait)
		return
	}
	begun, copied := time.Now(), f.now.move.Copied() // now may lie before other work of this round
	progress, err := f.now.move.Step()
	end := time.Now()
	f.ended, f.took = end, end.Sub(begun)
	f.pace.Stepped(end, f.took, f.now.move.Copied()-copied)
	f.next = now
	switch {
	case err != nil:
		if e := f.now.move.Cancel(); e != nil {
			// Nobody knows what the table says: this move alone can find out.
			f.next = now.Add(flashWait)
			f.mishap(err)
			return
		}
		f.done(err, now)
	case progress == flashmap.Waiting:
		f.next = now.Add(flashWait) // or when the layer wakes Run
	case progress == flashmap.Done:
		f.done(nil, now)
	}
}

// begin begins a move. Where it cannot be begun the engine hears why.
func (f *flash) begin(m policy.Move, now time.Time) {
	d := f.disk(m.Device)
	if d == nil {
		f.engine.Done(m, fmt.Errorf("device %d is no part of the pool any more: %w", m.Device, block.ErrNotFound), now)
		return
	}
	x := &flashMove{Move: m, set: flashmap.Set(m.Set), disk: d, nothing: f.free(d, flashmap.Set(m.Set))}
	f.now = x
	var err error
	switch {
	case m.Kind == policy.Demote:
		if x.nothing {
			f.discard(x)
		}
		x.move, err = f.layer.MoveOut(m.Device, x.set)
		if errors.Is(err, block.ErrNotFound) {
			err = nil
		}
	case x.nothing && !f.pins.has(d.dev, x.set):
		// Nothing that could be used is there any more.
	default:
		x.move, err = f.layer.MoveIn(m.Device, x.set)
		switch {
		case errors.Is(err, block.ErrExists), errors.Is(err, flashmap.ErrFixed): // a pin may ask for that
			err = nil
		case errors.Is(err, flashmap.ErrFull):
			err = fmt.Errorf("%w: %w", policy.ErrNoRoom, err)
		}
	}
	if x.move == nil {
		f.done(err, now)
	}
}

// discard tells the layer that nobody needs what a data set holds: then nothing is copied
// when it leaves. Whatever is allocated from it is allocated by Run's goroutine, later.
func (f *flash) discard(x *flashMove) {
	first, n := f.blocks(uint64(x.set))
	q, err := x.disk.device.NewQueue(1)
	if err == nil {
		err = errors.Join(hpdi.Do(q, &hpdi.Request{Op: hpdi.OpDiscard, Offset: int64(first) * block.Size, Length: int64(n) * block.Size}), q.Close())
	}
	if err != nil {
		x.nothing = false // then it is copied
	}
}

// done ends the move that is under way.
func (f *flash) done(err error, now time.Time) {
	x := f.now
	f.now = nil
	if f.evacuation != nil {
		if f.stuck = err; err == nil && len(f.queue) == 0 {
			f.decideAt = now
		}
	}
	f.engine.Done(x.Move, err, now)
	f.mishap(err)
	if errors.Is(err, policy.ErrNoRoom) {
		return
	}
	f.count(func(s *FlashStats) {
		switch {
		case err != nil:
			s.FailedMoves++
		case x.move == nil: // it was there already, or nothing was
		case x.Kind == policy.Promote:
			s.Promoted++
		case x.nothing:
			s.GivenUp++
		default:
			s.Demoted++
		}
		if f.evacuation != nil && err == nil && x.Kind == policy.Demote {
			s.Left = max(0, s.Left-1)
		}
	})
}

// check proves the table of what is on flash, and that nothing there is lost. The move that
// is under way begins anew, unless it has only readers to wait for: meanwhile the table is not
// what it seems. One of which nobody knows what the table says may find out first.
func (f *flash) check() []string {
	if f.layer == nil {
		return nil
	}
	if f.now != nil {
		m := f.now.move
		if m.Cancel() != nil {
			_, _ = m.Step()
		}
		if !m.Left() && m.Cancel() == nil {
			f.queue = slices.Insert(f.queue, 0, f.now.Move)
			f.now = nil
		}
	}
	_, _ = f.layer.Tidy() // what is left of others likewise
	return f.layer.Check()
}

// mishap tells of it once when the flash device fails, and when it works again.
func (f *flash) mishap(err error) {
	if failure := f.layer.Status().Failure; err == nil && failure != nil {
		err = failure
	}
	switch failed := errors.Is(err, flashmap.ErrFailed); {
	case failed && f.failed == nil:
		f.failed = err
		f.tell("flash-failed", "flash device %s of pool %s fails: %v", f.name(), f.p.label.Name, err)
	case err == nil && f.failed != nil && f.shunned.IsZero():
		f.failed = nil
		f.tell("flash-works", "flash device %s of pool %s works again", f.name(), f.p.label.Name)
	}
}

// evacuate queues some of what is to go back, or finds that nothing is left.
func (f *flash) evacuate() {
	left := 0
	for _, d := range f.disks {
		n := f.layer.SetBytes()
		for start, end := range d.ranges() {
			left += int((end - start) / n)
			for off := start; off < end && len(f.queue) < evacuateSome; off += n {
				f.queue = append(f.queue, policy.Move{Kind: policy.Demote, Device: d.dev, Set: collect.Set(off / n), Why: "flash is evacuated"})
			}
		}
	}
	f.count(func(s *FlashStats) { s.Left, s.Total = left, max(s.Total, left) })
	if left > 0 || f.now != nil || f.evacuated { // a move that was begun before may bring one more
		return
	}
	if f.evacuated = true; f.Stats().Total > 0 { // else nothing was there, as before
		f.tell("flash-evacuated", "flash device %s of pool %s is evacuated: nothing is on it", f.name(), f.p.label.Name)
	}
}

// evacuateSome is how many data sets are queued at a time that go back.
const evacuateSome = 1024

// moved is told by the layer where a data set is now, by whoever moves it.
func (f *flash) moved(number int, set flashmap.Set, on bool) {
	n := f.layer.SetBytes() / block.Size
	f.p.space.SetCheap(number, uint64(set)*uint64(n), uint64(n), on)
}

// observer tells a collector of the accesses of a queue. What never moves is left out.
type observer struct {
	*collect.Recorder
	from int64
}

// Record implements flashmap.Observer.
func (o *observer) Record(op hpdi.Op, off, n int64) {
	if off >= o.from {
		o.RecordBy(op, off, n, time.Now)
	}
}

// class returns the class of a device, which selects its pattern parameters.
func (f *flash) class(d *flashDisk) string {
	if c, ok := f.kept.Classes[d.id.String()]; ok {
		return c
	}
	if d.rotates {
		return ClassRotating
	}
	return ClassSolid
}

// belowDepth is how many requests a queue of queueBelow holds.
const belowDepth = 64

// queueBelow opens a queue of a device of the pool itself, not of the layer over it, which
// may leave the device before the queue is closed: for what never lies on flash.
func (f *flash) queueBelow(dev int) (hpdi.Queue, error) {
	if d := f.disk(dev); d != nil {
		return d.raw.NewQueue(belowDepth)
	}
	return f.p.set.Queue(dev)
}

// The classes of devices of which nobody has said another one.
const (
	ClassRotating = "disk"
	ClassSolid    = "ssd"
)
