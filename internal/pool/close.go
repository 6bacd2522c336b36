package pool

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/region"
)

// drain lets no new request in and waits until all are out. Whoever closes a
// pool ends its clients first, so that this is soon.
func (p *Pool) drain(ctx context.Context) error {
	p.mu.Lock()
	for _, v := range p.volumes {
		v.Close()
	}
	p.mu.Unlock()
	select {
	case <-p.gate.Close():
		_ = p.endComing() // or the next owner removes it
		return nil
	case <-ctx.Done():
		return fmt.Errorf("close pool %s: requests are still under way: %w", p.label.Name, ctx.Err())
	}
}

// endComing ends that sections come to the region, of which nobody has use any more.
func (p *Pool) endComing() error {
	return errors.Join(p.journalComing.end(p.region), p.flash.usageComing.end(p.region))
}

// Close makes everything part of the devices, removes the region and closes
// the devices. Run must have returned, or never been called. It must be called
// once, and not after Release.
func (p *Pool) Close(ctx context.Context) error {
	if err := p.drain(ctx); err != nil {
		return err
	}
	err := p.settleWhole(ctx)
	if err != nil {
		err = fmt.Errorf("close pool %s: %w; nothing is lost, its log stays in %s", p.label.Name, err, p.opts.RegionPath)
	}
	return errors.Join(err, p.free())
}

// settleWhole settles the pool and removes its region, in which nothing is done any more.
func (p *Pool) settleWhole(ctx context.Context) error {
	err := p.settle(ctx)
	if err = errors.Join(err, p.cache.close()); err == nil {
		err = p.region.Remove()
	}
	return err
}

// settle commits and folds everything and writes a superblock that needs no
// region.
func (p *Pool) settle(ctx context.Context) error {
	if err := p.owned(); err != nil {
		return err
	}
	if err := p.proved(); err != nil {
		return err
	}
	if err := p.load(ctx); err != nil {
		return err
	}
	if err := p.commitAll(); err != nil {
		return err
	}
	if err := p.foldEverything(); err != nil {
		return err
	}
	if p.machine.Folding() {
		return errors.New("a fold is still under way")
	}
	p.flash.keepAll(time.Now())
	return p.machine.Rewrite(func(sb *cp.Superblock) { sb.RegionID, sb.BootID = "", "" })
}

// Release closes the pool for the partner to open: at once, with the log in
// the region. Run must have returned, or never been called.
func (p *Pool) Release(ctx context.Context) error {
	if err := p.drain(ctx); err != nil {
		return err
	}
	p.region.SetState(region.StateReleased)
	return p.free()
}

func (p *Pool) free() error {
	_ = p.endComing() // or the next owner removes it
	p.sessions.Shut() // its memory is unmapped
	errs := []error{p.remover.close(), p.flusher.Close(), p.machine.Close(), p.flushQueue.Close(), p.flash.close(), p.set.Close(), p.reader.Close(), p.cache.close(), p.region.Close()}
	p.scrub.close()
	p.space.Close()
	return errors.Join(errs...)
}
