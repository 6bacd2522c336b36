package pool

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
)

// RemovalOptions say how fast a device is emptied that leaves the pool, and who hears
// of it.
type RemovalOptions struct {
	// Rate is how many bytes of maps and data are read and written in a second.
	// DefaultRemovalRate if 0.
	Rate int64
	// Tell, if set, hears of begin and end. It is called by Run and by whoever asks
	// for a removal, and must not block.
	Tell func(RemovalEvent)
	// Removed, if set, gets a device that is no part of the pool any more, and closes
	// it. It is called by Run. Without it the pool closes the device.
	Removed func(hpdi.Device)
}

// DefaultRemovalRate is the Rate of pools that do not ask for another.
const DefaultRemovalRate = 64 << 20

// RemovalEvent is something that a person may want to know of a removal.
type RemovalEvent struct {
	Kind    string // "device-removing", "device-stays", "device-removed", "device-stuck"
	Message string
}

// RemovalStats tells how far the removal of a device is.
type RemovalStats struct {
	Device string // its name; empty when none is being removed
	State  string // what is done
	Stuck  string // why it does not go on, if that is so
	// Total is how many bytes were in use on the device when its removal began, and
	// Left how many are now.
	Total, Left int64
	Moved       uint64 // blocks since the pool was opened
}

// Times of a remover.
const (
	removerPause  = 2 * time.Second // after a pass that did not help
	removerLonger = time.Minute     // and at most, when several have not
)

type removerPhase int

const (
	removerFolds     removerPhase = iota // waits for the fold that brings everything into the trees
	removerMoves                         // walks the maps and moves blocks
	removerCommits                       // waits until all moved blocks are committed
	removerSettles                       // waits for folds, which also move pages
	removerRests                         // the last pass did not help
	removerEvacuates                     // waits until nothing is on flash any more
)

// remover is the machine. All but Stats belongs to Run's goroutine, and so to jobs.
type remover struct {
	p     *Pool
	o     RemovalOptions
	timer *time.Timer // wakes Run for the next step
	next  time.Time   // no step before

	dev    int // the device that is leaving, or -1
	phase  removerPhase
	folds  uint64    // folds complete when a wait for them ends
	target block.Seq // of the wait for a commit
	began  int64     // blocks in use when the pass began
	last   int64     // and at the last look
	failed int       // blocks and pages of the pass that could not be read
	pause  time.Duration
	mover  mover
	gone   []goneDevice

	mu    sync.Mutex // guards stats
	stats RemovalStats
}

// goneDevice is a device that a durable superblock says is removed, but whose label is
// there still.
type goneDevice struct {
	dev hpdi.Device
	// since is the generation of that superblock. The label may go when the next is
	// durable, too: until then the other slot wants the device.
	since uint64
}

func newRemover(p *Pool, o RemovalOptions) *remover {
	if o.Rate <= 0 {
		o.Rate = DefaultRemovalRate
	}
	r := &remover{p: p, o: o, dev: -1, timer: time.NewTimer(0)}
	r.timer.Stop()
	r.mover = mover{p: p, owed: true,
		has: func(at block.Physical) bool { return at.Device() == r.dev },
		note: func(moved, _, failed int) {
			r.failed += failed
			r.count(func(s *RemovalStats) { s.Moved += uint64(moved) })
		}}
	sb := p.machine.Superblock()
	if dev, ok := sb.Leaving(); ok {
		r.begin(dev)
	}
	return r
}

// Stats may be called at any time.
func (r *remover) Stats() RemovalStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stats
}

func (r *remover) count(fn func(s *RemovalStats)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fn(&r.stats)
}

func (r *remover) say(state string) { r.count(func(s *RemovalStats) { s.State = state }) }

func (r *remover) tell(kind, format string, args ...any) {
	if r.o.Tell != nil {
		r.o.Tell(RemovalEvent{kind, fmt.Sprintf(format, args...)})
	}
}

// active reports whether a device is being removed.
func (r *remover) active() bool { return r.dev >= 0 }

// begin begins, or after the pool was opened goes on, to empty a device.
func (r *remover) begin(dev int) {
	was := r.p.machine.Superblock().Devices[dev].Was
	r.dev, r.pause, r.next = dev, removerPause, time.Time{}
	r.count(func(s *RemovalStats) {
		*s = RemovalStats{Device: r.p.set.Info(dev).Name, Moved: s.Moved, Total: int64(was) * block.Size, Left: int64(was) * block.Size}
	})
	if r.p.flash.is(dev) {
		r.phase = removerEvacuates
		n := r.p.flash.bytes()
		r.count(func(s *RemovalStats) { s.Total, s.Left = n, n })
		return
	}
	r.await(removerFolds, "waits for a fold")
}

// forget ends the work on a device that stays, or is gone.
func (r *remover) forget() {
	r.dev = -1
	r.mover.end()
	r.p.machine.MovePages(false)
	r.publish()
}

// publish makes Stats tell of the device that is leaving, or is gone and has its label
// still, or of none.
func (r *remover) publish() {
	r.count(func(s *RemovalStats) {
		if *s = (RemovalStats{Moved: s.Moved}); len(r.gone) > 0 {
			s.Device, s.State = r.gone[0].dev.Info().Name, "erases its label"
		}
	})
}

// add takes a device over that is gone.
func (r *remover) add(dev hpdi.Device, since uint64) {
	r.gone = append(r.gone, goneDevice{dev, since})
	if !r.active() {
		r.publish()
	}
}

// await waits, in a phase, for a fold that begins from now on.
func (r *remover) await(phase removerPhase, state string) {
	r.phase, r.folds = phase, r.p.machine.Stats().Folds+1
	r.say(state)
}

// wantsFold reports whether a fold is what the remover waits for.
func (r *remover) wantsFold() bool {
	return r.active() && (r.phase == removerFolds || r.phase == removerSettles) && r.p.machine.Stats().Folds < r.folds
}

// work does the next step if it is due.
func (r *remover) work(now time.Time) {
	if now.Before(r.next) || r.p.machine.Folding() {
		return
	}
	if len(r.gone) > 0 {
		r.wipe(now)
		return
	}
	if !r.active() {
		return
	}
	if r.phase == removerEvacuates {
		r.evacuate(now)
		return
	}
	used := r.p.space.InUse(r.dev)
	r.count(func(s *RemovalStats) { s.Left = used * block.Size })
	switch m := r.p.machine; r.phase {
	case removerFolds:
		if m.Stats().Folds >= r.folds {
			r.pass(now, used)
		}
	case removerMoves:
		r.move(now)
	case removerCommits:
		if m.Committed() >= r.target {
			m.MovePages(true)
			r.last = used
			r.await(removerSettles, "waits for folds")
		}
	case removerSettles:
		if m.Stats().Folds >= r.folds {
			r.settle(now, used)
		}
	case removerRests:
		r.await(removerFolds, "waits for a fold")
	}
}

// evacuate removes the flash device when nothing is on it any more.
func (r *remover) evacuate(now time.Time) {
	f := r.p.flash
	s := f.Stats()
	r.count(func(x *RemovalStats) {
		x.State, x.Stuck = "moves data sets back", s.Why
		x.Total, x.Left = int64(s.Total)*s.SetBytes, int64(s.Left)*s.SetBytes
	})
	if (!f.evacuated || f.bytes() > 0) && !planted.Has(planted.FlashGoneEarly) {
		return
	}
	if err := r.remove(now); err != nil {
		r.p.failed(fmt.Errorf("remove a device: %w", err))
		r.say(err.Error())
	}
}

// pass begins a walk of all maps.
func (r *remover) pass(now time.Time, used int64) {
	if err := r.mover.begin(); err != nil {
		r.rest(now, err.Error())
		return
	}
	r.p.machine.MovePages(false)
	r.began, r.failed, r.phase = used, 0, removerMoves
}

// move does one step of a pass, if clients leave room for it.
func (r *remover) move(now time.Time) {
	if r.p.pressed() {
		r.say("waits for room in the log")
		r.next = now.Add(r.p.soon())
		return
	}
	if u := r.p.space.Usage(); u.Free-u.Reserved-u.Slop/2 < 4*int64(r.mover.batch()) {
		// What was moved holds pages of metadata until it is folded.
		r.moved(now, "waits for room in the pool")
		return
	}
	r.say("moves blocks")
	blocks, more, err := r.mover.step()
	r.next = now.Add(pace(int64(blocks)*block.Size, r.o.Rate))
	switch {
	case err != nil:
		if !errors.Is(err, block.ErrNoSpace) {
			r.failed++
		}
		r.moved(now, err.Error())
	case !more:
		r.moved(now, "waits until what was moved is committed")
	}
}

// moved ends the walk, complete or not.
func (r *remover) moved(now time.Time, state string) {
	r.say(state)
	r.mover.end()
	r.phase, r.next, r.target = removerCommits, now, r.p.dirty.Head()
}

// settle looks at what folds have left on the device. The last ones move pages of
// metadata, and count what the one before has freed.
func (r *remover) settle(now time.Time, used int64) {
	p := r.p
	switch {
	case p.machine.Empty(r.dev):
		if err := r.remove(now); err != nil {
			p.failed(fmt.Errorf("remove a device: %w", err))
			r.say(err.Error())
		}
		return
	case used == 0, used < r.last, p.bmap.Unfinished():
		r.last = used
		r.await(removerSettles, "waits for folds")
	case used < r.began:
		r.pause = removerPause
		r.next = now
		r.unstick()
		r.await(removerFolds, "waits for a fold")
	case r.failed > 0:
		r.rest(now, fmt.Sprintf("%d blocks or pages on it cannot be read; a scrub names the blocks: write or delete them, or cancel the removal", r.failed))
	default:
		r.rest(now, fmt.Sprintf("%d blocks on it could not be moved", used))
	}
}

// rest waits after a pass that did not help.
func (r *remover) rest(now time.Time, why string) {
	r.p.machine.MovePages(false)
	r.phase, r.next = removerRests, now.Add(r.pause)
	r.pause = min(2*r.pause, removerLonger)
	r.say("rests")
	told := r.Stats().Stuck != ""
	r.count(func(s *RemovalStats) { s.Stuck = why })
	if !told {
		r.tell("device-stuck", "device %s of pool %s cannot be emptied: %s", r.Stats().Device, r.p.label.Name, why)
	}
}

func (r *remover) unstick() { r.count(func(s *RemovalStats) { s.Stuck = "" }) }

// remove makes the device that is empty no part of the pool. After an error the
// superblock may say so or not; as nothing is on the device and nothing comes onto
// it, both are right.
func (r *remover) remove(now time.Time) error {
	p, dev := r.p, r.dev
	if err := p.flash.settle(dev); err != nil {
		return err
	}
	err := p.machine.Rewrite(func(sb *cp.Superblock) {
		sb.Devices[dev] = cp.DeviceRoot{ID: sb.Devices[dev].ID, State: cp.DeviceGone}
	})
	if err != nil {
		return err
	}
	if p.flash.is(dev) {
		err = p.flash.uncover()
	}
	d, e := p.set.Remove(dev)
	d, e2 := p.flash.part(d, dev)
	r.next = now
	r.add(d, p.machine.Superblock().Generation)
	r.forget()
	return errors.Join(err, e, e2, p.space.Gone(dev))
}

// wipe takes the label from a device that is gone, once no superblock wants it.
func (r *remover) wipe(now time.Time) {
	g, p := r.gone[0], r.p
	if p.machine.Superblock().Generation <= g.since {
		if err := p.machine.Rewrite(func(*cp.Superblock) {}); err != nil {
			p.failed(fmt.Errorf("remove device %s: %w", g.dev.Info().Name, err))
			r.next = now.Add(retryDelay)
			return
		}
	}
	r.gone = r.gone[1:]
	name := g.dev.Info().Name
	note := ""
	if err := wipeLabel(g.dev); err != nil {
		// Then Open leaves it out, by what the superblock says of its identity.
		note = fmt.Sprintf("; its label could not be erased: %v", err)
	}
	r.tell("device-removed", "device %s is no part of pool %s any more%s", name, p.label.Name, note)
	if r.o.Removed != nil {
		r.o.Removed(g.dev)
	} else {
		_ = g.dev.Close() // everything written to it was synced
	}
	if !r.active() {
		r.publish()
	}
}

// Wiped reports whether an error of ReadLabel is what a removal leaves of a label,
// whether it came to its end or not.
func Wiped(err error) bool {
	return errors.Is(err, ondisk.ErrMagic) || errors.Is(err, block.ErrCorrupt)
}

// arm makes the timer wake Run when the next step of a pass is due, and not
// otherwise: for whatever else the remover waits, Run looks often enough.
func (r *remover) arm() {
	if !r.active() || r.phase != removerMoves {
		r.timer.Stop()
		return
	}
	r.p.wakeAt(r.timer, r.next)
}

// close ends the work. The superblock says what there is left to do.
func (r *remover) close() error {
	r.timer.Stop()
	r.mover.close()
	var errs []error
	for _, g := range r.gone {
		errs = append(errs, g.dev.Close())
	}
	r.gone = nil
	return errors.Join(errs...)
}
