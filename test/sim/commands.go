package sim

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	spool "github.com/pollux-storage/pollux/internal/pool"
)

// errNobody says that a command has to be given again.
var errNobody = errors.New("nobody serves it now")

// ask has a serving guest do something to a pool, until it is done or nothing
// served it for too long.
func (w *World) ask(id string, what string, run func(ctx context.Context, p *spool.Pool) error) error {
	var err error
	w.until(5*time.Second, func() bool {
		err = w.askOnce(id, run)
		if errors.Is(err, errNobody) {
			w.step(time.Now().Add(10 * time.Millisecond))
			return false
		}
		return true
	})
	if errors.Is(err, errNobody) {
		w.log("%s: nobody serves %s", what, id)
	}
	return err
}

// sure ends the doubt about volumes that a command has brought, unless it had no
// answer or one that leaves it open.
func (pl *pool) sure(err error, names ...string) {
	for _, n := range names {
		if err == nil || errors.Is(err, block.ErrNoSpace) {
			delete(pl.unsure, n)
		}
	}
}

// tolerable tells whether a command may fail so: nobody was there, a device
// did it, or the pool is full.
func (pl *pool) tolerable(err error) bool {
	switch {
	case err == nil, errors.Is(err, errNobody), pl.damaged:
		return true
	case pl.hindered && strings.Contains(err.Error(), errMedium.Error()):
		return true
	}
	return errors.Is(err, block.ErrNoSpace) && pl.crowded(0)
}

func (w *World) askOnce(id string, run func(ctx context.Context, p *spool.Pool) error) error {
	p, t := w.serving(id)
	if p == nil || p.hung {
		return errNobody
	}
	done, err := false, error(nil)
	t.wg.Go(func() {
		e := run(t.ctx, t.pool)
		p.keepRecord(t.ctx, w.pools[id], t.pool, t.devs)
		w.post(p, func() { done, err = true, e })
	})
	w.until(patience, func() bool { return done || p.dead.Load() || t.gone })
	if !done || errors.Is(err, block.ErrClosed) || errors.Is(err, context.Canceled) || errors.Is(err, block.ErrStale) {
		return errNobody
	}
	return err
}

func (w *World) doPool(l Line) error {
	id := l.arg(1)
	pl, err := w.poolOf(id)
	if err != nil {
		return err
	}
	err = w.ask(id, l.arg(0), func(ctx context.Context, p *spool.Pool) error {
		switch l.arg(0) {
		case "commit":
			return p.Commit(ctx)
		case "fold":
			return p.Fold(ctx)
		}
		return pl.check(ctx, p)
	})
	if !pl.tolerable(err) {
		w.violate("%s: %v", l, err)
	}
	return nil
}

// doScan switches deduplication of a volume on or off and begins a scan of it.
func (w *World) doScan(l Line) error {
	name, undo := l.arg(1), l.has("undo")
	id := w.identityOf(name)
	if id == "" {
		return nil // not there (any more)
	}
	run, action := max(1, w.opt.Run), spool.ScanStart
	if undo {
		run, action = 0, spool.ScanUndo
	}
	err := w.ask(id, l.String(), func(ctx context.Context, p *spool.Pool) error {
		if err := p.SetSharing(ctx, name, run); err != nil {
			return err
		}
		return p.Scan(ctx, name, action)
	})
	if errors.Is(err, block.ErrInvalid) || errors.Is(err, block.ErrNotFound) {
		err = nil // another one goes on, or the volume was deleted or renamed
	}
	if !w.pools[id].tolerable(err) {
		w.violate("%s: %v", l, err)
	}
	return nil
}

// check runs the pool's own check. Damage that devices did may show.
func (pl *pool) check(ctx context.Context, p *spool.Pool) error {
	ailed := pl.ailing()
	r, err := p.Check(ctx, spool.CheckOptions{Data: true})
	if err == nil && len(r.Problems) > 0 && !ailed && !pl.ailing() {
		err = fmt.Errorf("check of %s: %s", pl.identity, strings.Join(r.Problems, "; "))
	}
	if err == nil && !pl.damaged {
		err = pl.judgeFlash(ctx, p)
	}
	return err
}

// doVolume: create NAME on ID SIZE | delete NAME | resize NAME SIZE | rename
// NAME NAME.
func (w *World) doVolume(l Line) error {
	name := l.arg(1)
	if l.arg(0) == "create" {
		size, err := bytesOf(l.arg(4))
		if err != nil {
			return err
		}
		return w.create(name, l.arg(3), size)
	}
	id := w.identityOf(name)
	if id == "" {
		return nil // not there (any more)
	}
	pl := w.pools[id]
	v := pl.volumes[name]
	pl.unsure[name] = true
	var err error
	switch l.arg(0) {
	case "delete":
		w.forget(pl, v)
		v.freed = block.Seq(1<<64 - 1) // as long as there is no answer
		err = w.ask(id, l.String(), func(ctx context.Context, p *spool.Pool) error { return p.DeleteVolume(ctx, name) })
		if errors.Is(err, block.ErrNotFound) {
			err = nil
		}
		if err == nil {
			v.freed = pl.shadow.seq
		}
	case "resize":
		size, perr := bytesOf(l.arg(2))
		if perr != nil {
			return perr
		}
		v.wanted = size
		err = w.ask(id, l.String(), func(ctx context.Context, p *spool.Pool) error { return p.ResizeVolume(ctx, name, size) })
		if err == nil {
			v.size = size
		} else if errors.Is(err, block.ErrInvalid) && size < v.size {
			err = nil
		}
	case "rename":
		to := l.arg(2)
		pl.unsure[to] = true
		err = w.ask(id, l.String(), func(ctx context.Context, p *spool.Pool) error { return p.RenameVolume(ctx, name, to) })
		if err == nil || errors.Is(err, block.ErrNotFound) {
			err = nil
			w.renamed(pl, v, to)
		}
		pl.sure(err, to)
	}
	if pl.sure(err, name); !pl.tolerable(err) {
		w.violate("%s: %v", l, err)
	}
	return nil
}

func (w *World) create(name, id string, size int64) error {
	pl, err := w.poolOf(id)
	if err != nil {
		return err
	}
	if pl.volumes[name] != nil {
		return nil
	}
	pl.unsure[name] = true
	var vid block.VolumeID
	err = w.ask(id, "create "+name, func(ctx context.Context, p *spool.Pool) error {
		_, err := p.CreateVolume(ctx, name, size)
		if err != nil && !errors.Is(err, block.ErrExists) {
			return err
		}
		v, err := p.Volume(name)
		if err == nil {
			vid = v.Info().ID
		}
		if err == nil && w.opt.Run > 0 {
			err = p.SetSharing(ctx, name, w.opt.Run)
		}
		return err
	})
	if pl.sure(err, name); err != nil {
		if !pl.tolerable(err) {
			w.violate("create %s: %v", name, err)
		}
		return nil
	}
	v := &volume{name: name, id: vid, size: size, blocks: map[block.Logical][]version{}}
	pl.volumes[name], pl.ids[vid] = v, v
	return nil
}

// forget takes a volume out of what must be there, and its clients with it.
func (w *World) forget(pl *pool, v *volume) {
	v.gone = true
	delete(pl.volumes, v.name)
	w.dropSessions(v.name)
}

// renamed gives a volume, and its sessions, a new name.
func (w *World) renamed(pl *pool, v *volume, to string) {
	name := v.name
	delete(pl.volumes, name)
	v.name = to
	pl.volumes[to] = v
	for _, s := range w.sessions() {
		if s.volume == name {
			s.volume = to
			delete(w.cls[s.name].sessions, name)
			w.cls[s.name].sessions[to] = s
		}
	}
}

func (w *World) dropSessions(volume string) {
	for _, s := range w.sessions() {
		if s.volume == volume {
			s.todo, s.flying = nil, nil
			s.cut()
			delete(w.cls[s.name].sessions, volume)
		}
	}
}
