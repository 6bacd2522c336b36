package sim

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/flashmap"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
	spool "github.com/pollux-storage/pollux/internal/pool"
)

// flashSet is the size of a data set: the smallest, so that many move.
const flashSet = flashmap.MinSetBytes

// soon is how often it is decided then what moves.
const soon = 100 * time.Millisecond

// decideSoon makes the policy of a pool's flash one that decides within a second, by a few
// accesses, and lets nothing stay for long: so data sets come and go while clients look on.
func decideSoon(ctx context.Context, p *spool.Pool) error {
	_, err := p.ChangeFlash(ctx, spool.FlashChange{Params: func(q policy.Params) (policy.Params, error) {
		q.Collect.Window, q.Collect.Pause, q.Collect.Decay = time.Second, time.Second, 0.1
		q.Interval = soon
		pattern := policy.DefaultPattern()
		pattern.MinAccesses, pattern.MinRandom, pattern.MaxAge = 2, 0, time.Second
		pattern.Demote = `age > duration("300ms")`
		q.Patterns = map[string]policy.Pattern{policy.AnyType: pattern}
		q.Hysteresis = policy.Hysteresis{Keep: 0.9, Margin: 1, Stay: 0}
		q.Budget.Migrate = 0
		return q, nil
	}})
	return err
}

// askFlash has whoever serves a pool do something to its flash. Whatever a person may be told
// of one that is not there, or does not have what was meant, is no fault.
func (w *World) askFlash(id string, l Line, run func(ctx context.Context, p *spool.Pool) error, usual ...error) error {
	err := w.ask(id, l.String(), run)
	if pl := w.pools[id]; !slices.ContainsFunc(usual, func(e error) bool { return errors.Is(err, e) }) && !pl.tolerable(err) {
		w.violate("%s: %v", l, err)
	}
	return err
}

// doPin: pin|unpin VOLUME [OFFSET LENGTH]. What is pinned shall be on flash, whatever its use.
func (w *World) doPin(l Line) error {
	id := w.identityOf(l.arg(1))
	if id == "" {
		return nil // not there (any more)
	}
	pin := spool.FlashPin{Volume: l.arg(1)}
	if l.arg(2) != "" {
		var err, err2 error
		pin.Offset, err = bytesOf(l.arg(2))
		if pin.Length, err2 = bytesOf(l.arg(3)); err != nil || err2 != nil {
			return errors.Join(err, err2)
		}
	}
	change := spool.FlashChange{Pin: []spool.FlashPin{pin}}
	if l.arg(0) == "unpin" {
		change = spool.FlashChange{Unpin: []spool.FlashPin{pin}}
	}
	pl := w.pools[id]
	key := pinned{pl.volumes[pin.Volume].id, pin.Offset, pin.Length}
	delete(pl.pins, key) // nobody knows until there is an answer
	err := w.askFlash(id, l, func(ctx context.Context, p *spool.Pool) error {
		_, err := p.ChangeFlash(ctx, change)
		return err
	}, block.ErrNotFound, block.ErrExists, block.ErrInvalid)
	if is := l.arg(0) == "pin"; err == nil || is && errors.Is(err, block.ErrExists) {
		pl.pins[key] = is
	}
	return nil
}

// pinned is a pin whose volume may get another name.
type pinned struct {
	volume         block.VolumeID
	offset, length int64
}

// doEvacuate: evacuate ID [stop]. All data sets are to go back to their disks.
func (w *World) doEvacuate(l Line) error {
	id := l.arg(1)
	if _, err := w.poolOf(id); err != nil {
		return err
	}
	action := spool.EvacuateStart
	if l.has("stop") {
		action = spool.EvacuateStop
	}
	_ = w.askFlash(id, l, func(ctx context.Context, p *spool.Pool) error { return p.EvacuateFlash(ctx, action) }, block.ErrNotFound)
	return nil
}

// flashOf returns what is known of the flash of a pool, nothing while nobody serves it.
func (w *World) flashOf(id string) (s spool.FlashStats, served bool) {
	if _, t := w.serving(id); t != nil {
		return t.pool.Flash(), true
	}
	return s, false
}

// flashIs tells whether the flash of a pool is what an expectation says: a state, "none",
// "holds N" or "holds-at-most N" data sets, "whole VOLUME" of a pin, or "promoted N",
// "demoted N" since the run began.
func (w *World) flashIs(l Line) (bool, error) {
	pl, err := w.poolOf(l.arg(2))
	if err != nil {
		return false, err
	}
	n, _ := l.countOf(l.arg(3), 0)
	s, served := w.flashOf(pl.identity)
	_, t := w.serving(pl.identity)
	pl.countMoves(t)
	switch l.arg(3) {
	case "promoted":
		return pl.flashed.Promoted >= uint64(n), nil
	case "demoted":
		return pl.flashed.Demoted >= uint64(n), nil
	case "none":
		return served && s.Device == "", nil
	case "holds":
		return int64(s.Used) >= n, nil
	case "holds-at-most":
		return served && s.Device != "" && int64(s.Used) <= n, nil
	case "whole":
		return slices.ContainsFunc(s.Pins, func(p spool.FlashPinned) bool { return p.Volume == l.arg(4) && p.State == "whole" }), nil
	case "evacuated":
		return s.State == spool.FlashEvacuated, nil
	case "failed":
		return s.State == spool.FlashFailed, nil
	case "in-use":
		return s.State == spool.FlashInUse, nil
	}
	return false, fmt.Errorf("flash cannot be %q", l.arg(3))
}

// tellFlash says what the flash of a pool is, for messages.
func (w *World) tellFlash(id string) string {
	s, _ := w.flashOf(id)
	f := &w.pools[id].flashed
	return fmt.Sprintf(": %s %s %s, %d of %d slots, %d to be moved back, %d promoted, %d demoted, %d given up, %d failed; pins %v",
		s.Device, s.State, s.Why, s.Used, s.Slots, s.Left, f.Promoted, f.Demoted, f.GivenUp, f.Failed, s.Pins)
}

// flashed are moves of data sets of all owners of a pool so far.
type flashed struct {
	of                                 *spool.Pool // whose moves are now
	now                                spool.FlashStats
	Promoted, Demoted, GivenUp, Failed uint64
}

// countMoves counts the moves of whoever serves the pool.
func (pl *pool) countMoves(t *tenant) {
	if t == nil || t.pool == nil {
		return
	}
	f, s := &pl.flashed, t.pool.Flash()
	if f.of != t.pool || s.Promoted < f.now.Promoted {
		f.of, f.now = t.pool, spool.FlashStats{}
	}
	f.Promoted += s.Promoted - f.now.Promoted
	f.Demoted += s.Demoted - f.now.Demoted
	f.GivenUp += s.GivenUp - f.now.GivenUp
	f.Failed += s.FailedMoves - f.now.FailedMoves
	f.now = s
}

// judgeFlash holds the flash layer of an open pool, which was found to be sound, against what
// it must be. It tells of now at every decision, 15 seconds apart at most.
func (pl *pool) judgeFlash(ctx context.Context, p *spool.Pool) (err error) {
	if err := pl.judgePins(ctx, p); err != nil {
		return err
	}
	for range 200 {
		if err = judgeFlashNow(p); err == nil || ctx.Err() != nil {
			return ctx.Err()
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

// judgePins compares what people have said about flash, and were told that it counts, with
// what does.
func (pl *pool) judgePins(ctx context.Context, p *spool.Pool) error {
	params, now, err := p.FlashPolicy(ctx)
	switch {
	case errors.Is(err, block.ErrNotFound) || !pl.decides:
		return nil // it has no flash, or one that is to leave, or that nobody knows to be there
	case err != nil:
		return err
	case params.Interval != soon:
		return fmt.Errorf("the policy of flash is not what was said, its interval is %v: %w", params.Interval, block.ErrCorrupt)
	}
	for key, is := range pl.pins {
		v := pl.ids[key.volume]
		if v == nil || v.gone || pl.unsure[v.name] {
			continue
		}
		pin := spool.FlashPin{Volume: v.name, Offset: key.offset, Length: key.length}
		if slices.Contains(now, pin) != is {
			return fmt.Errorf("pinned %v to flash: %v, which is not what was said: %w", pin, !is, block.ErrCorrupt)
		}
	}
	return nil
}

func judgeFlashNow(p *spool.Pool) error {
	s := p.Flash()
	if s.Device == "" {
		return nil
	}
	if s.Lost > 0 {
		return fmt.Errorf("%d data sets on flash are lost: %w", s.Lost, block.ErrCorrupt)
	}
	for _, d := range p.Stats().Devices {
		if d.Class == cp.ClassDisk && !slices.ContainsFunc(s.Primaries, func(x spool.FlashPrimary) bool { return x.Device == d.Name }) {
			return fmt.Errorf("flash is not over device %s: %w", d.Name, block.ErrCorrupt)
		}
	}
	return nil
}
