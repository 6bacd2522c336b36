package guest

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/domain"
	"github.com/pollux-storage/pollux/internal/partner"
)

// heldDevice completes nothing before it is let go.
type heldDevice struct {
	hpdi.Device
	let     chan struct{}
	refuses error // of Submit
}

func (d *heldDevice) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	return &heldQueue{q, d}, err
}

type heldQueue struct {
	hpdi.Queue
	of *heldDevice
}

func (q *heldQueue) Submit(reqs ...*hpdi.Request) error {
	if q.of.refuses != nil {
		return q.of.refuses
	}
	return q.Queue.Submit(reqs...)
}

func (q *heldQueue) Wait(least int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	<-q.of.let
	return q.Queue.Wait(least, done)
}

func held(t *testing.T) *heldDevice {
	m, err := mem.New("disk", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	return &heldDevice{Device: m, let: make(chan struct{})}
}

// gauge is a store of which only its figures are asked.
type gauge struct {
	Store
	own, anything, beat atomic.Uint64
}

func (s *gauge) Progress() (own, anything uint64) { return s.own.Load(), s.anything.Load() }
func (s *gauge) Heartbeat() uint64                { return s.beat.Load() }

// TestStuckPool: a pool that does nothing any more ends its guest after the time of the
// settings, later if clients read, and never while a device is what it waits for.
func TestStuckPool(t *testing.T) {
	const limit = 20 * time.Second
	tests := map[string]struct {
		own, anything bool // they go on
		device        bool // has something under way, for a minute
		least, most   time.Duration
	}{
		"works":        {own: true, anything: true},
		"stuck":        {least: limit, most: limit + 3*guardEvery},
		"clients read": {anything: true, least: 10 * limit, most: 10*limit + 3*guardEvery},
		"device":       {device: true, least: time.Minute + limit/2, most: time.Minute + limit + 3*guardEvery},
	}
	for name, c := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				stuck := make(chan string, 1)
				g := &Guest{log: quiet(), cfg: &config.Config{Failover: config.Failover{StuckTimeout: limit}}}
				g.opt.Stuck = func(reason string) { stuck <- reason }
				h := held(t)
				d := g.under.watch(h)
				s := &gauge{}
				ctx, cancel := context.WithCancel(t.Context())
				tn := &tenancy{identity: "a", ctx: ctx, cancel: cancel, store: s, devices: []hpdi.Device{d}}
				began := time.Now()
				if c.device {
					tn.wg.Go(func() {
						if err := readFirst(d); err != nil {
							t.Error(err)
						}
					})
					time.AfterFunc(time.Minute, func() { close(h.let) })
				}
				tn.wg.Go(func() { g.guard(tn) })
				tn.wg.Go(func() {
					for ctx.Err() == nil {
						time.Sleep(3 * time.Second)
						if c.own {
							s.own.Add(1)
						}
						if c.anything {
							s.anything.Add(1)
						}
					}
				})
				select {
				case reason := <-stuck:
					took := time.Since(began)
					if c.most == 0 || took < c.least || took > c.most || !strings.Contains(reason, "the pool of a has done nothing since") {
						t.Errorf("after %v: %s", took, reason)
					}
				case <-time.After(time.Hour):
					if c.most != 0 {
						t.Error("nobody noticed")
					}
				}
				cancel()
				tn.wg.Wait()
			})
		})
	}
}

// TestLateWatcher: time in which the watcher did not run does not count.
func TestLateWatcher(t *testing.T) {
	now := time.Unix(1000, 0)
	s := stall{limit: 10 * time.Second}
	at := func(after time.Duration, number uint64) bool {
		now = now.Add(after)
		return s.look(now, number, false)
	}
	for i, want := range []bool{false, false, false, true} { // 0, 4, 8 and 12 s
		if i > 0 {
			now = now.Add(4 * time.Second)
		}
		if got := s.look(now, 7, false); got != want {
			t.Errorf("look %d: %t", i, got)
		}
	}
	if at(time.Hour, 7) || at(4*time.Second, 7) || at(4*time.Second, 7) || !at(4*time.Second, 7) {
		t.Error("it was stopped for an hour")
	}
	if at(time.Second, 8) {
		t.Error("it goes on")
	}
}

// TestHeartStandsStill: a guest leaves word before it is fenced, takes it back when its
// heart beats again, and does not do so all the time.
func TestHeartStandsStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		said := make(chan string, 1)
		g := &Guest{log: quiet(), cfg: &config.Config{Failover: config.Failover{HangTimeout: 2 * time.Second}}}
		g.opt.Stalled = func(reason string) { said <- reason }
		s := &gauge{}
		ctx, cancel := context.WithCancel(t.Context())
		tn := &tenancy{identity: "a", ctx: ctx, cancel: cancel, store: s}
		tn.wg.Go(func() { g.watchHeart(tn) })
		beats := func(d time.Duration) {
			for range d / (50 * time.Millisecond) {
				time.Sleep(50 * time.Millisecond)
				s.beat.Add(1)
			}
		}
		hear := func(what, want string, within time.Duration) {
			t.Helper()
			select {
			case got := <-said:
				if want == "nothing" || !strings.Contains(got, want) || (want == "") != (got == "") {
					t.Errorf("%s: %q", what, got)
				}
			case <-time.After(within):
				if want != "nothing" {
					t.Errorf("%s: nothing", what)
				}
			}
		}
		beats(10 * time.Second)
		hear("it beats", "nothing", time.Second)
		hear("it stands", "the heartbeat of a has stood still for 1.", time.Second)
		s.beat.Add(1)
		hear("it beats again", "", time.Second)
		hear("it stands again", "nothing", 20*time.Second)
		beats(time.Minute)
		hear("it stands after a long time", "has stood still", 2*time.Second)
		cancel()
		tn.wg.Wait()
		g.opt.Stalled = nil
		g.watchHeart(tn) // returns at once
	})
}

// TestStuckRequest: a request that a device does not complete is an alert that names the
// device and what it is, although the device answers others, and is over when it does.
func TestStuckRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &Guest{inputs: make(chan func(), 1), log: quiet(), m: partner.New(partner.Config{Self: "a", Partner: "b"}, time.Now()),
			cfg: &config.Config{Alerts: config.Alerts{SlowDevice: time.Hour, StuckDevice: 7 * time.Second}}}
		h := held(t)
		d := g.under.watch(h)
		ctx, cancel := context.WithCancel(t.Context())
		tn := &tenancy{identity: "a", ctx: ctx, cancel: cancel}
		q, err := d.NewQueue(4)
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		write := &hpdi.Request{Op: hpdi.OpWriteZeroes, Length: 4096}
		tn.wg.Go(func() {
			if err := hpdi.Do(q, write, &hpdi.Request{Op: hpdi.OpFlush}); err != nil {
				t.Error(err)
			}
		})
		tn.wg.Go(func() { g.watchDevice(ctx, "a", look{"disk", func() error { return nil }}) })
		alert := func() string {
			(<-g.inputs)()
			return g.m.View().Alerts["device:disk"]
		}
		if a := alert(); !strings.Contains(a, "device disk of a has not completed a write-zeroes for") || time.Since(began) < 7*time.Second || time.Since(began) > 9*time.Second {
			t.Errorf("after %v: %q", time.Since(began), a)
		}
		close(h.let)
		if a := alert(); a != "" {
			t.Errorf("it has completed: %q", a)
		}
		cancel()
		tn.wg.Wait()
		if err := errors.Join(q.Close(), d.Close()); err != nil {
			t.Error(err)
		}
	})
}

// TestUnderWay: what is under way is known until it has ended, whatever way it ends.
func TestUnderWay(t *testing.T) {
	var u underway
	known := func(want bool) {
		t.Helper()
		if _, _, ok := u.oldest("disk"); ok != want {
			t.Errorf("something is under way: %t", ok)
		}
	}
	known(false)
	h := held(t)
	d := u.watch(h)
	close(h.let)
	q, err := d.NewQueue(4)
	if err != nil {
		t.Fatal(err)
	}
	reqs := []*hpdi.Request{{Op: hpdi.OpFlush}, {Op: hpdi.OpFlush}, {Op: hpdi.OpFlush}}
	if err := q.Submit(reqs...); err != nil {
		t.Fatal(err)
	}
	known(true)
	var done []*hpdi.Request
	for len(done) < len(reqs) {
		if done, err = q.Wait(1, done); err != nil {
			t.Fatal(err)
		}
	}
	known(false)
	if err := q.Submit(reqs...); err != nil {
		t.Fatal(err)
	}
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	known(false)
	h.refuses = errors.New("broken")
	if q, err = d.NewQueue(4); err != nil {
		t.Fatal(err)
	}
	if err := q.Submit(reqs...); !errors.Is(err, h.refuses) {
		t.Error(err)
	}
	known(false)
	// It was opened again before the first is closed.
	h.refuses, h.let = nil, make(chan struct{})
	again := u.watch(held(t))
	if err := errors.Join(q.Close(), d.Close()); err != nil {
		t.Error(err)
	}
	if q, err = again.NewQueue(1); err != nil {
		t.Fatal(err)
	}
	if err := q.Submit(reqs[0]); err != nil {
		t.Fatal(err)
	}
	known(true)
	if err := errors.Join(q.Close(), again.Close()); err != nil {
		t.Error(err)
	}
	known(false)
}

// TestLastWords: they hold the reason and all goroutines, are replaced and taken back, and
// a disk that takes none does no harm.
func TestLastWords(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	path := config.LastWordsPath(filepath.Join(dir, "run"), "a", 7)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	w := &lastWords{log: quiet(), path: path}
	text := func() string {
		p, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(p)
	}
	w.stalled("it stands")
	w.stalled("it stands once more")
	if got := text(); !strings.Contains(got, ": it stands once more\n\ngoroutine ") || strings.Count(got, "it stands") != 1 || !strings.Contains(got, "TestLastWords") {
		t.Error(got)
	}
	w.stalled("")
	if got := text(); got != "" {
		t.Error(got)
	}
	status := 0
	endStuck(w, newLogWriter(io.Discard), func(s int) { status = s })("it is stuck")
	if status != domain.ExitStuck {
		t.Errorf("status %d", status)
	}
	if got := text(); !strings.Contains(got, ": it is stuck\n\ngoroutine ") {
		t.Error(got)
	}
	w.remove()
	if _, err := os.Stat(path); err == nil {
		t.Error("it is still there")
	}
	w.stalled("nobody made the file")
	w.stuck("nobody made the file")
	if _, err := os.Stat(path); err == nil {
		t.Error("a guest made the file")
	}
}

// BenchmarkWatchedQueue is what it costs to know the requests under way.
func BenchmarkWatchedQueue(b *testing.B) {
	for _, watched := range []bool{false, true} {
		b.Run(map[bool]string{false: "plain", true: "watched"}[watched], func(b *testing.B) {
			m, err := mem.New("disk", 1<<20)
			if err != nil {
				b.Fatal(err)
			}
			defer m.Close()
			var u underway
			d := hpdi.Device(m)
			if watched {
				d = u.watch(m)
			}
			q, err := d.NewQueue(8)
			if err != nil {
				b.Fatal(err)
			}
			defer q.Close()
			r := &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{make([]byte, 4096)}}
			done := make([]*hpdi.Request, 0, 1)
			b.ReportAllocs()
			for b.Loop() {
				if err := q.Submit(r); err != nil {
					b.Fatal(err)
				}
				if done, err = q.Wait(1, done[:0]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
