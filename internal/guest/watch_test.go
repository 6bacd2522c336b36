package guest

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/pool"
)

// gatedDevice answers when the test says so, and what it says.
type gatedDevice struct {
	hpdi.Device
	answer chan error
}

func (d *gatedDevice) NewQueue(depth int) (hpdi.Queue, error) {
	if err := <-d.answer; err != nil {
		return nil, err
	}
	return d.Device.NewQueue(depth)
}

// TestDeviceAlerts: a device that does not answer, or answers with errors, is
// an alert until it answers again or is somebody else's.
func TestDeviceAlerts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, err := mem.New("disk", 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		d := &gatedDevice{m, make(chan error)}
		g := &Guest{inputs: make(chan func(), 1), log: quiet(), m: partner.New(partner.Config{Self: "a", Partner: "b"}, time.Now())}
		ctx, cancel := context.WithCancel(t.Context())
		tn := &tenancy{identity: "a", ctx: ctx, cancel: cancel}
		g.cfg = &config.Config{Alerts: config.Alerts{SlowDevice: time.Hour, StuckDevice: 5 * time.Second}}
		tn.wg.Go(func() { g.watchDevice(tn.ctx, tn.identity, looks(d)[0]) })
		alert := func() string {
			(<-g.inputs)()
			return g.m.View().Alerts["device:disk"]
		}
		began := time.Now()
		if a := alert(); !strings.Contains(a, "device disk of a has not answered") || time.Since(began) < 5*time.Second {
			t.Errorf("after %v: %q", time.Since(began), a)
		}
		d.answer <- nil
		if a := alert(); a != "" {
			t.Errorf("it has answered: %q", a)
		}
		d.answer <- errors.New("broken")
		if a := alert(); !strings.Contains(a, "device disk of a fails: broken") {
			t.Errorf("it fails: %q", a)
		}
		cancel()
		if a := alert(); a != "" {
			t.Errorf("it is not ours any more: %q", a)
		}
		tn.wg.Wait()
	})
}

// TestSlowDevice: a device that answers late most times is an alert until it is
// much faster again; now and then it may.
func TestSlowDevice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var took atomic.Int64
		took.Store(int64(100 * time.Millisecond))
		n := 0
		g := &Guest{inputs: make(chan func(), 1), log: quiet(), m: partner.New(partner.Config{Self: "a", Partner: "b"}, time.Now()),
			cfg: &config.Config{Alerts: config.Alerts{SlowDevice: 50 * time.Millisecond, StuckDevice: time.Minute}}}
		ctx, cancel := context.WithCancel(t.Context())
		tn := &tenancy{identity: "a", ctx: ctx, cancel: cancel}
		tn.wg.Go(func() {
			g.watchDevice(tn.ctx, tn.identity, look{"disk", func() error {
				if n++; n%3 > 0 {
					time.Sleep(time.Duration(took.Load()))
				}
				return nil
			}})
		})
		alert := func(wait time.Duration) string {
			select {
			case f := <-g.inputs:
				f()
			case <-time.After(wait):
			}
			return g.m.View().Alerts["device:slow:disk"]
		}
		if a := alert(20 * time.Second); a != "" {
			t.Errorf("after 20 reads: %q", a)
		}
		if a := alert(time.Minute); !strings.Contains(a, "device disk of a is slow") {
			t.Errorf("late most times: %q", a)
		}
		took.Store(int64(40 * time.Millisecond))
		if a := alert(2 * time.Minute); a == "" {
			t.Error("over although it is hardly faster")
		}
		took.Store(int64(10 * time.Millisecond))
		if a := alert(time.Minute); a != "" {
			t.Errorf("fast again: %q", a)
		}
		took.Store(int64(100 * time.Millisecond))
		if a := alert(time.Minute); a == "" {
			t.Error("late again")
		}
		cancel()
		if a := alert(time.Minute); a != "" {
			t.Errorf("it is not ours any more: %q", a)
		}
		tn.wg.Wait()
	})
}

// TestBlankNeedsAnAnswer: a device that cannot be read is not taken for blank.
func TestBlankNeedsAnAnswer(t *testing.T) {
	m, err := mem.New("disk", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := blank(m); err != nil {
		t.Errorf("of zeros: %v", err)
	}
	broken := errors.New("broken")
	f := blocktest.NewFault(m, 1)
	f.Add(blocktest.Rule{Op: hpdi.OpRead, Err: broken})
	if err := blank(f); !errors.Is(err, broken) {
		t.Errorf("its read fails: %v", err)
	}
	g := &gatedDevice{m, make(chan error, 1)}
	g.answer <- broken
	if err := blank(g); !errors.Is(err, broken) {
		t.Errorf("it gives no queue: %v", err)
	}
}

// TestWatchProgress: progress is told at intervals, and not after stop.
func TestWatchProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		told := 0
		stop := watchProgress(&pool.CheckProgress{}, func(control.CheckProgress) { told++ })
		time.Sleep(3*progressEvery + progressEvery/2) // the bubble's time
		stop()
		if told != 3 {
			t.Errorf("told %d times", told)
		}
	})
}
