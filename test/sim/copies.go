package sim

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/mirror"
	"github.com/pollux-storage/pollux/internal/ondisk"
	spool "github.com/pollux-storage/pollux/internal/pool"
)

// Pools that keep several copies of each block live with one bad disk in each
// mirror, whatever it does: so no fault of one may ever show. The script may ask
// for more; a second disk of a mirror is left alone until the first was mended.

// tidyEvery and resilverStep are those of guests.
const (
	tidyEvery    = 2 * time.Second
	resilverStep = 4
)

// errGone is what a disk returns that was pulled.
var errGone = errors.New("no such device")

// place returns which mirror a disk belongs to, and which copy of it it is.
func (pl *pool) place(d *disk) (m, i int) {
	at := slices.Index(pl.disks, d)
	return at / pl.copies, at % pl.copies
}

// groupOf returns a disk with the other copies of its mirror, if it is one.
func (pl *pool) groupOf(d *disk) []*disk {
	if at := slices.Index(pl.candidate, d); at >= 0 {
		return pl.candidate
	}
	return pl.mirrorOf(d)
}

// mirrorOf returns the disks of a disk's mirror.
func (pl *pool) mirrorOf(d *disk) []*disk {
	m, _ := pl.place(d)
	return pl.disks[m*pl.copies : (m+1)*pl.copies]
}

// ailing tells whether a copy is bad, or a flash device fails, of which nobody knows then what
// is stored: a check of the pool may say so.
func (pl *pool) ailing() bool {
	return slices.ContainsFunc(pl.disks, func(d *disk) bool { return d.bad || d.use == useFlash && d.faulty() })
}

// hurt tells whether a disk may be given a fault, and notes that it has one.
func (w *World) hurt(d *disk) bool {
	pl := w.pools[d.owner]
	for _, o := range pl.mirrorOf(d) {
		if o != d && o.bad {
			w.log("%s is left alone: %s is bad", d.name, o.name)
			return false
		}
	}
	d.bad = true
	return true
}

// gather makes mirrors of the disks of a pool that a guest has locked, of those that it wanted.
func (pl *pool) gather(devs []hpdi.Device, wanted []*disk) ([]hpdi.Device, error) {
	if pl.copies < 2 {
		return devs, nil
	}
	devs, err := mirror.Assemble(devs, mirror.Options{
		Degraded: true, Known: pl.known, Remember: pl.remember,
		LeftOut: func(d hpdi.Device, why error) {
			pl.w.post(nil, func() { pl.w.log("without %s: %v", d.Info().Name, why) })
		},
	})
	if err != nil {
		return nil, err
	}
	kept := devs[:0]
	for _, d := range devs {
		if _, ok := d.(*mirror.Mirror); ok {
			kept = append(kept, d)
		} else {
			_ = d.Close() // it lost its header
		}
	}
	// Of those that join, or leave, the pool knows whether it needs them.
	least := 0
	for _, d := range wanted {
		if !d.leaving && !pl.isCandidate(d) {
			least++
		}
	}
	if least /= pl.copies; len(kept) < least {
		for _, d := range kept {
			_ = d.Close()
		}
		return nil, fmt.Errorf("%d of %d mirrors are there: %w", len(kept), least, block.ErrNotFound)
	}
	return kept, nil
}

// known and remember are the pair's memory of mirrors, on the host's own disk.
func (pl *pool) known(id mirror.ID) (uint64, error) {
	pl.memoryMu.Lock()
	defer pl.memoryMu.Unlock()
	return pl.memory[id], nil
}

func (pl *pool) remember(id mirror.ID, generation uint64) {
	pl.memoryMu.Lock()
	defer pl.memoryMu.Unlock()
	pl.memory[id] = generation
}

// keep looks after a mirror as guests do, except that it does not spare the disks.
func keep(ctx context.Context, m *mirror.Mirror) {
	tidy := time.Now()
	for ctx.Err() == nil {
		done, err := m.Resync(resilverStep)
		if time.Since(tidy) >= tidyEvery {
			_ = m.Tidy() // what fails is tried again
			tidy = time.Now()
		}
		wait := 100 * time.Millisecond
		if done || err != nil {
			wait = tidyEvery
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// askMirror has the guest that serves a disk's pool do something to its mirror.
func (w *World) askMirror(d *disk, what string, run func(m *mirror.Mirror, i int) error) error {
	pl := w.pools[d.owner]
	_, i := pl.place(d)
	err := w.ask(d.owner, what, func(_ context.Context, p *spool.Pool) error {
		got := make(chan *mirror.Mirror, 1)
		w.post(nil, func() {
			var m *mirror.Mirror
			if _, t := w.serving(d.owner); t != nil && t.pool == p {
				if at := slices.IndexFunc(t.mirrors, func(m *mirror.Mirror) bool { return m.ID() == d.mirror }); at >= 0 {
					m = t.mirrors[at]
				}
			}
			got <- m
		})
		m := <-got
		if m == nil {
			return errNobody
		}
		return run(m, i)
	})
	w.log("%s: %v", what, err)
	return err
}

// attach opens a disk and hands it to fn, which closes it after an error.
func (d *disk) attach(fn func(hpdi.Device) error) error {
	got := make(chan *handle, 1)
	d.w.post(nil, func() {
		var h *handle
		if p, _ := d.w.serving(d.owner); p != nil && !d.gone {
			h = d.open(p)
		}
		got <- h
	})
	h := <-got
	if h == nil {
		return errNobody // it is away, or its last requests are still under way
	}
	return fn(h)
}

// doCopy: offline|online|replace DISK, as by command.
func (w *World) doCopy(l Line) error {
	d, err := w.disk(l.arg(1))
	if d == nil {
		return err
	}
	pl := w.pools[d.owner]
	if pl.copies < 2 || pl.isCandidate(d) || !w.hurt(d) {
		return nil
	}
	switch l.arg(0) {
	case "offline":
		err = w.askMirror(d, l.String(), func(m *mirror.Mirror, i int) error { return m.Detach(i) })
	case "online":
		err = w.online(d)
	case "replace":
		err = w.replace(d)
	}
	fault := errors.Is(err, errMedium) || errors.Is(err, errGone)
	if err != nil && !errors.Is(err, errNobody) && !d.faulty() && !fault && !errors.Is(err, block.ErrExists) {
		w.violate("%s: %v", l, err)
	}
	return nil
}

func (w *World) online(d *disk) error {
	err := w.askMirror(d, "online "+d.name, func(m *mirror.Mirror, i int) error {
		if m.Status().Copies[i].State != mirror.Absent {
			return block.ErrExists
		}
		return d.attach(m.Attach)
	})
	if errors.Is(err, block.ErrInvalid) || errors.Is(err, block.ErrCorrupt) || errors.Is(err, ondisk.ErrMagic) {
		return w.replace(d) // it went its own way, or lost its header
	}
	return err
}

// replace puts an empty disk in the place of one.
func (w *World) replace(d *disk) error {
	return w.askMirror(d, "replace "+d.name, func(m *mirror.Mirror, i int) error {
		if s := m.Status().Copies[i].State; s != mirror.Absent {
			if err := m.Detach(i); err != nil {
				return err
			}
		}
		emptied := make(chan bool, 1)
		d.w.post(nil, func() {
			free := d.holder == nil
			if free {
				info := d.medium.Info()
				d.medium = blocktest.NewCrashWith(blocktest.CrashOptions{Name: info.Name, Size: info.Size, Seed: d.w.rng.Uint64()})
				d.born++
				d.stale = slices.ContainsFunc(d.faults, (*fault).forgets) // what is wrong is not the disk alone
			}
			emptied <- free
		})
		if !<-emptied {
			return errNobody
		}
		return d.attach(func(h hpdi.Device) error { return m.Replace(i, h) })
	})
}

// faulty tells whether the disk may fail a request.
func (d *disk) faulty() bool { return d.gone || d.vanishIn > 0 || len(d.faults) > 0 }

// doMend: mend DISK. What is wrong with it ends, and its mirror is made whole.
func (w *World) doMend(l Line) error {
	d, err := w.disk(l.arg(1))
	if d == nil {
		return err
	}
	if pl := w.pools[d.owner]; pl.copies < 2 || !d.bad || pl.isCandidate(d) {
		return nil
	}
	w.mend(d, 20*time.Second)
	return nil
}

// mend makes a disk whole again, unless the guests do not let it for so long.
func (w *World) mend(d *disk, limit time.Duration) bool {
	d.slow, d.faults, d.gone, d.vanishIn = 1, nil, false, 0
	d.unstick()
	end := time.Now().Add(limit)
	w.pass(200 * time.Millisecond) // what has failed already is only being told
	for time.Now().Before(end) && w.fail == nil {
		state := mirror.Absent
		var err error
		if d.stale {
			// It has lost what it had taken, whatever its header says.
			err = w.replace(d)
		}
		if err == nil {
			err = w.askMirror(d, "look at "+d.name, func(m *mirror.Mirror, i int) error {
				state = m.Status().Copies[i].State
				return nil
			})
		}
		switch {
		case err != nil:
		case state == mirror.Absent:
			_ = w.online(d) // what comes of it is seen at the next look
		case state == mirror.InSync:
			if !d.rotten || w.scrub(d.owner) {
				d.bad, d.rotten = false, false
				w.log("%s is whole", d.name)
				return true
			}
		}
		w.pass(200 * time.Millisecond)
	}
	return false
}

// scrub commits and scrubs a pool, and reports whether that came to an end.
func (w *World) scrub(id string) bool {
	err := w.ask(id, "scrub "+id, func(ctx context.Context, p *spool.Pool) error {
		if err := p.Commit(ctx); err != nil {
			return err
		}
		if s := p.Stats().Scrub.State; s == spool.ScrubRunning || s == spool.ScrubPaused {
			// One that was begun under an earlier owner has passed by what has
			// rotted since.
			if err := p.Scrub(ctx, spool.ScrubStop); err != nil && !errors.Is(err, block.ErrInvalid) {
				return err
			}
		}
		if err := p.Scrub(ctx, spool.ScrubStart); err != nil {
			return err
		}
		for {
			switch s := p.Stats().Scrub; s.State {
			case spool.ScrubRunning:
			case spool.ScrubDone:
				if s.Now.Unreadable > 0 {
					return fmt.Errorf("a scrub found %d blocks of which no copy is sound: %w", s.Now.Unreadable, block.ErrCorrupt)
				}
				return nil
			default:
				return errNobody
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	if err != nil && !w.pools[id].tolerable(err) {
		w.violate("scrub of %s: %v", id, err)
	}
	return err == nil
}

// mendAll makes all mirrors whole, which must be possible when all faults have
// ended.
func (w *World) mendAll() error {
	for _, d := range w.disks {
		// Where memory has rotted nothing may be committed any more.
		damaged := w.pools[d.owner].damaged
		if w.fail == nil && d.bad && !damaged && !w.pools[d.owner].left(d) && !w.mend(d, patience) {
			w.violate("%s cannot be made whole: %s", d.name, w.waiting())
		}
	}
	for _, id := range sortedKeys(w.pools) {
		w.inSync(id)
	}
	return nil
}

// inSync holds the mirrors of a pool against what they must be at rest.
func (w *World) inSync(id string) {
	pl := w.pools[id]
	if pl.copies < 2 || pl.damaged {
		return
	}
	for _, d := range pl.disks {
		if pl.left(d) {
			continue
		}
		err := w.askMirror(d, "look at "+d.name, func(m *mirror.Mirror, i int) error {
			if s := m.Status().Copies[i].State; s != mirror.InSync {
				return fmt.Errorf("copy %d is %v: %w", i+1, s, block.ErrCorrupt)
			}
			return nil
		})
		if err != nil && !pl.tolerable(err) {
			w.violate("%s at rest: %v", d.name, err)
		}
	}
}

// survive pulls all disks but one of each mirror while the power is off, and looks
// whether what is left is everything.
func (w *World) survive() error {
	var pulled []*disk
	for _, id := range sortedKeys(w.pools) {
		pl := w.pools[id]
		if pl.copies < 2 || pl.damaged {
			continue
		}
		// What was acknowledged and not flushed is not what this is about.
		if err := w.ask(id, "commit", func(ctx context.Context, p *spool.Pool) error { return p.Commit(ctx) }); !pl.tolerable(err) {
			w.violate("commit of %s: %v", id, err)
		}
		for i := 0; i < len(pl.disks); i += pl.copies {
			if pl.left(pl.disks[i]) {
				continue
			}
			stays := w.rng.IntN(pl.copies)
			for k, d := range pl.disks[i:][:pl.copies] {
				if k != stays {
					d.gone, d.bad = true, true
					pulled = append(pulled, d)
				}
			}
		}
	}
	if len(pulled) == 0 {
		return nil
	}
	if err := w.powerCut(Line{Fields: []string{"power", "cut", "drop"}}); err != nil {
		return err
	}
	if !w.until(patience, w.protected) && w.fail == nil {
		w.violate("the pair does not recover with one copy: %s", w.waiting())
	}
	steps := []func() error{w.settle, w.verify, w.mendAll, w.settle, w.atRest}
	for _, step := range steps {
		if w.fail != nil {
			break
		}
		if err := step(); err != nil {
			return err
		}
	}
	return w.fail
}
