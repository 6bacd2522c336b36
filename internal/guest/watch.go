package guest

import (
	"context"
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/partner"
)

// beat probes a pool and advances its heartbeat for as long as both the probe
// passes and the loop turns. A pool that is being given up serves nobody and is
// not probed any more.
func (g *Guest) beat(t *tenancy) {
	every := g.cfg.Failover.Heartbeat
	tk := time.NewTicker(every)
	defer tk.Stop()
	for {
		leaving := t.ctx.Err() != nil
		if (leaving || t.store.Probe(t.ctx) == nil) && g.loopTurns() {
			t.store.Beat()
		}
		select {
		case <-t.still:
			return
		case <-tk.C:
		}
	}
}

// loopTurns tells whether the loop did anything within half the hang timeout.
func (g *Guest) loopTurns() bool {
	return time.Now().UnixNano()-g.awake.Load() < int64(g.cfg.Failover.HangTimeout/2)
}

// A device is looked at every so often by a read of its first block, and is
// stuck when that takes too long. That is an alert and nothing else: the
// partner would meet the same device.
const (
	lookEvery  = time.Second
	stuckAfter = 5 * time.Second
)

func (g *Guest) watchDevice(t *tenancy, d hpdi.Device) {
	done := make(chan error, 1)
	asked := time.Now()
	waiting, stuck := false, false
	look := func() {
		waiting, asked = true, time.Now()
		t.wg.Go(func() { done <- readFirst(d) })
	}
	report := func(now bool, text string) {
		stuck = now
		g.step(partner.Message{Kind: partner.KindStuck, Identity: d.Info().Name, Reason: text})
	}
	tk := time.NewTicker(lookEvery)
	defer tk.Stop()
	for {
		select {
		case <-t.ctx.Done():
			if stuck {
				report(false, "") // it is the next owner's now
			}
			return
		case err := <-done:
			waiting = false
			if err != nil {
				report(true, fmt.Sprintf("device %s of %s fails: %v", d.Info().Name, t.identity, err))
			} else if stuck {
				report(false, "")
			}
		case <-tk.C:
			if !waiting {
				look()
			} else if took := time.Since(asked); took > stuckAfter && !stuck {
				report(true, fmt.Sprintf("device %s of %s has not answered for %s", d.Info().Name, t.identity, took.Round(time.Second)))
			}
		}
	}
}

func readFirst(d hpdi.Device) error {
	q, err := d.NewQueue(1)
	if err != nil {
		return err
	}
	buf, err := hpdi.Alloc(max(d.Info().BlockSize, 4096))
	if err == nil {
		err = hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{buf}})
		_ = hpdi.Free(buf) // cannot fail for what Alloc returned
	}
	if cerr := q.Close(); err == nil {
		err = cerr
	}
	return err
}

// ask runs f in the loop and waits for it, or for the end of ctx or the guest.
func (g *Guest) ask(ctx context.Context, f func()) error {
	done := make(chan struct{})
	select {
	case g.inputs <- func() { f(); close(done) }:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
