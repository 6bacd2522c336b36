package guest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/mirror"
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

// A device is looked at every so often by a read of its first block. It is stuck when
// that, or any other request, takes longer than the settings allow. It is slow when half of the last slowLooks of
// these reads took longer than the settings allow, until half of them take less
// than half of that. Both are alerts and nothing else: the partner would meet the
// same device.
const (
	lookEvery = time.Second
	slowLooks = 30
)

// look is how a device is looked at, or a mirror's copy on a device.
type look struct {
	name string
	read func() error
}

// looks returns what is to be looked at of a device: of a mirror each copy.
func looks(d hpdi.Device) []look {
	m, ok := d.(*mirror.Mirror)
	if !ok {
		return []look{{d.Info().Name, func() error { return readFirst(d) }}}
	}
	var all []look
	for i, c := range m.Status().Copies {
		name := c.Info.Name
		if name == "" {
			name = fmt.Sprintf("copy %d of %s", i+1, d.Info().Name)
		}
		all = append(all, look{name, func() error { return readCopy(m, i) }})
	}
	return all
}

func (g *Guest) watchDevice(ctx context.Context, identity string, l look) {
	var reads sync.WaitGroup
	defer reads.Wait()
	done := make(chan error, 1)
	asked := time.Now()
	waiting, failed := false, false // the newest look
	stuck, slow := false, false     // alerts
	var took latencies
	ask := func() {
		waiting, asked = true, time.Now()
		reads.Go(func() { done <- l.read() })
	}
	report := func(state *bool, key, text string) {
		*state = text != ""
		g.step(partner.Message{Kind: partner.KindStuck, Identity: key, Reason: text})
	}
	late := func() string {
		if t := time.Since(asked); waiting && t > g.cfg.Alerts.StuckDevice {
			return fmt.Sprintf("device %s of %s has not answered for %s", l.name, identity, t.Round(time.Second))
		}
		if op, since, ok := g.under.oldest(l.name); ok && time.Since(since) > g.cfg.Alerts.StuckDevice {
			return fmt.Sprintf("device %s of %s has not completed a %s for %s", l.name, identity, op, time.Since(since).Round(time.Second))
		}
		return ""
	}
	tk := time.NewTicker(lookEvery)
	defer tk.Stop()
	for {
		select {
		case <-ctx.Done():
			if stuck {
				report(&stuck, l.name, "") // it is the next owner's now
			}
			if slow {
				report(&slow, "slow:"+l.name, "")
			}
			return
		case err := <-done:
			waiting = false
			if failed = err != nil; failed {
				report(&stuck, l.name, fmt.Sprintf("device %s of %s fails: %v", l.name, identity, err))
			}
			limit := g.cfg.Alerts.SlowDevice
			switch half := took.add(time.Since(asked)); {
			case !slow && half > limit:
				report(&slow, "slow:"+l.name, fmt.Sprintf("device %s of %s is slow: half of its reads of one block take longer than %v", l.name, identity, limit))
			case slow && half < limit/2:
				report(&slow, "slow:"+l.name, "")
			}
		case <-tk.C:
			if !waiting {
				ask()
			}
		}
		if text := late(); !failed && (text != "") != stuck {
			report(&stuck, l.name, text)
		}
	}
}

// latencies are the last few of a device.
type latencies struct {
	took [slowLooks]time.Duration
	n    int
}

// add takes in one and returns the median, 0 until there are enough.
func (l *latencies) add(d time.Duration) time.Duration {
	l.took[l.n%slowLooks] = d
	if l.n++; l.n < slowLooks {
		return 0
	}
	sorted := l.took
	slices.Sort(sorted[:])
	return sorted[slowLooks/2]
}

// readCopy reads the first block of a copy of a mirror. A copy that is away is
// the mirror's own alert.
func readCopy(m *mirror.Mirror, i int) error {
	buf, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		return err
	}
	defer func() { _ = hpdi.Free(buf) }()
	if err := m.ReadCopy(i, 0, buf); !errors.Is(err, hpdi.ErrNoCopy) {
		return err
	}
	return nil
}

func readFirst(d hpdi.Device) error {
	q, err := d.NewQueue(1)
	if err != nil {
		return err
	}
	buf, err := hpdi.AllocPrivate(max(d.Info().BlockSize, 4096))
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
