package host

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/domain"
	"github.com/pollux-storage/pollux/internal/guest"
	"github.com/pollux-storage/pollux/internal/identity"
)

// inside runs guests in this process.
type inside struct {
	cfg    *config.Config
	refuse atomic.Bool // to start

	mu   sync.Mutex
	runs map[string]*insideRun // the newest, by guest
}

type insideRun struct {
	idle
	name   string
	inc    uint64
	cancel context.CancelFunc
}

func (r *insideRun) Name() string     { return r.name }
func (r *insideRun) Inc() uint64      { return r.inc }
func (r *insideRun) Kill() error      { r.cancel(); return nil }
func (r *insideRun) Terminate() error { r.cancel(); return nil }

func (d *inside) Start(s domain.Spec) (domain.Domain, error) {
	if d.refuse.Load() {
		return nil, errors.New("no process can be made")
	}
	var files []*os.File
	for _, f := range s.Files {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		files = append(files, os.NewFile(uintptr(fd), f.Name()))
	}
	line, err := listener(files[0])
	if err != nil {
		return nil, err
	}
	cfg, err := config.ReadEffective(d.cfg.Dir)
	if err != nil {
		return nil, err
	}
	sockets, err := identity.FromFiles([]string{"a", "b"}[:len(cfg.Guests)], files[1:])
	if err != nil {
		return nil, err
	}
	st := guest.NewPools(cfg, int64(cfg.Cache))
	ctx, cancel := context.WithCancel(context.Background())
	r := &insideRun{idle: idle{ended: make(chan struct{})}, name: s.Name, inc: s.Inc, cancel: cancel}
	d.mu.Lock()
	d.runs[s.Name] = r
	d.mu.Unlock()
	go func() {
		defer close(r.ended)
		_ = guest.Run(ctx, guest.Options{Config: cfg, Name: s.Name, Inc: s.Inc, Sockets: sockets, Line: line, Storage: st, Logger: quiet()})
	}()
	return r, nil
}

// Prepare refuses: guests in this process are started as they are needed.
func (d *inside) Prepare(domain.Spec) (domain.Spare, error) {
	return nil, errors.New("no process can be made")
}

func (d *inside) Find(string) (domain.Domain, error)                    { return nil, nil }
func (d *inside) Tidy(string) error                                     { return nil }
func (d *inside) Remains(domain.Domain, int64) (*domain.Remains, error) { return nil, nil }
func (d *inside) Forget(string) error                                   { return nil }

// run returns the newest run of a guest.
func (d *inside) run(name string) *insideRun {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.runs[name]
}

// insidePair is a pair whose agent and guests are in this process.
func insidePair(t *testing.T, text string) (*pair, *inside) {
	t.Helper()
	cfg := settingsIn(t, text)
	d := &inside{cfg: cfg, runs: map[string]*insideRun{}}
	p := &pair{t: t, dir: cfg.Dir, client: control.NewClient(cfg.Dir)}
	ended := make(chan error, 1)
	go func() { ended <- RunWith(t.Context(), cfg, Options{Driver: d, Logger: quiet()}) }()
	t.Cleanup(func() {
		if err := <-ended; err != nil { // by then its context has ended
			t.Error(err)
		}
		for _, r := range d.runs {
			r.cancel()
			<-r.ended
		}
		p.client.Close()
	})
	return p, d
}

// refused expects an error of a kind.
func refused(t *testing.T, what string, err error, want control.Kind) {
	t.Helper()
	if control.KindOf(err) != want {
		t.Errorf("%s: %v, not %s", what, err, want)
	}
}

// TestRefusedCommands: what makes no sense is refused with the reason.
func TestRefusedCommands(t *testing.T) {
	p, _ := insidePair(t, strings.Replace(pairConfig, "size: 256MiB}", "size: 256MiB, manual: true}", 1))
	p.until("start", func(st control.Status) bool {
		return len(st.Guests) == 2 && st.Guests[0].ServedBy == "a" && st.Guests[1].ServedBy == "b"
	})
	c, ctx := p.client, t.Context()
	for what, do := range map[string]func() error{
		"takeover": func() error { _, err := c.Takeover(ctx, "nobody"); return err },
		"giveback": func() error { _, err := c.Giveback(ctx, "nobody"); return err },
		"dry run":  func() error { _, err := c.CheckTakeover(ctx, "nobody"); return err },
		"kill":     func() error { return c.Drill(ctx, "nobody", control.DrillKill) },
		"restart":  func() error { return c.Drill(ctx, "nobody", control.DrillRestart) },
		"volume":   func() error { _, err := c.Volume(ctx, "nobody"); return err },
		"resize":   func() error { _, err := c.ResizeVolume(ctx, "nobody", 4096); return err },
		"delete":   func() error { return c.DeleteVolume(ctx, "nobody") },
		"pool":     func() error { _, err := c.Pool(ctx, "nobody"); return err },
		"add":      func() error { _, err := c.AddDevice(ctx, "nobody", control.PoolAdd{Device: "d"}); return err },
		"new pool": func() error { _, err := c.CreatePool(ctx, control.PoolCreate{Guest: "nobody"}); return err },
		"new volume": func() error {
			_, err := c.CreateVolume(ctx, control.VolumeCreate{Name: "v", Guest: "nobody"})
			return err
		},
	} {
		refused(t, what+" of nobody", do(), control.KindNotFound)
	}
	refused(t, "a drill that there is not", c.Drill(ctx, "a", "dance"), control.KindInvalid)
	_, err := c.Giveback(ctx, "a")
	refused(t, "giveback of what is at home", err, control.KindRefused)
	create := func(guest, name string, devices ...string) error {
		_, err := c.CreatePool(ctx, control.PoolCreate{Guest: guest, Name: name, Devices: devices})
		return err
	}
	refused(t, "a second pool", create("b", "tank", "d"), control.KindExists)
	refused(t, "a pool without a name", create("a", "", "d"), control.KindInvalid)
	refused(t, "a device in no folder", create("a", "tank", "d", "none/d"), control.KindInvalid)
	foreign := filepath.Join(p.dir, "foreign")
	p.ok(os.WriteFile(foreign, append([]byte("precious"), make([]byte, 256<<20)...), 0o600))
	refused(t, "somebody's device", create("a", "tank", "d", foreign), control.KindExists)
	if _, err := os.Stat(filepath.Join(p.dir, "d")); err == nil {
		t.Error("a file that was made for nothing is left")
	}
	if pools, err := c.Pools(ctx); err != nil || len(pools) != 1 || pools[0].Guest != "b" {
		t.Errorf("%+v, %v", pools, err)
	}
	p.ok(create("a", "tank", "d"))
	add := func(device string) error {
		_, err := c.AddDevice(ctx, "tank", control.PoolAdd{Device: device})
		return err
	}
	refused(t, "no device", add(""), control.KindInvalid)
	refused(t, "the same device", add("d"), control.KindExists)
	refused(t, "a device in no folder", add("none/d"), control.KindInvalid)
	if _, err := c.AddDevice(ctx, "tank", control.PoolAdd{Device: "tiny", Size: 4096}); err == nil {
		t.Error("a device without room for its label and a block is added")
	}
	if _, err := os.Stat(filepath.Join(p.dir, "tiny")); err == nil {
		t.Error("a file that was made for nothing is left")
	}
	p.ok(os.WriteFile(filepath.Join(p.dir, "state.json"), []byte("{"), 0o600))
	if err := add("e"); err == nil || !strings.Contains(err.Error(), "is damaged") {
		t.Errorf("a device that cannot be remembered: %v", err)
	}
}

// TestVolumesOfAPair: volumes are changed wherever they are served, and events
// tell of it.
func TestVolumesOfAPair(t *testing.T) {
	p, d := insidePair(t, pairConfig)
	p.until("start", servedBy("a", "b"))
	c, ctx := p.client, t.Context()
	_, err := c.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 1 << 20}) // on the first
	p.ok(err)
	_, err = c.CreateVolume(ctx, control.VolumeCreate{Name: "other", Size: 1 << 20, Guest: "b", Dedup: true, THN: 16})
	p.ok(err)
	var made []string
	p.ok(c.Events(ctx, control.EventQuery{Last: 2}, func(e control.Event) error { made = append(made, e.Message); return nil }))
	if len(made) != 2 || made[0] != "volume v of 1MiB is created, with deduplication off" || made[1] != "volume other of 1MiB is created, with deduplication on, THN 16" {
		t.Errorf("%q", made)
	}
	if v, err := c.ResizeVolume(ctx, "v", 2<<20); err != nil || v.Size != 2<<20 || v.Guest != "a" {
		t.Errorf("%+v, %v", v, err)
	}
	_, err = c.RenameVolume(ctx, "v", "other")
	refused(t, "a name that the other guest has", err, control.KindExists)
	if v, err := c.RenameVolume(ctx, "v", "w"); err != nil || v.Name != "w" {
		t.Errorf("%+v, %v", v, err)
	}
	var last []string
	p.ok(c.Events(ctx, control.EventQuery{Last: 2}, func(e control.Event) error { last = append(last, e.Message); return nil }))
	if len(last) != 2 || last[0] != "volume v has 2MiB now" || last[1] != "volume v is called w now" {
		t.Errorf("%q", last)
	}

	if v, err := c.ChangeVolume(ctx, "w", control.VolumeChange{Dedup: new(true), THN: 4}); err != nil || v.THN != 4 {
		t.Errorf("%+v, %v", v, err)
	}
	v, err := c.ChangeVolume(ctx, "w", control.VolumeChange{Dedup: new(true)}) // it does so already
	p.ok(err)
	if v.THN != 4 {
		t.Errorf("%+v", v)
	}
	_, err = c.ChangeVolume(ctx, "w", control.VolumeChange{THN: 8, Rename: "v"})
	p.ok(err)
	_, err = c.ChangeVolume(ctx, "v", control.VolumeChange{Dedup: new(false)})
	p.ok(err)
	var told []control.Event
	p.ok(c.Events(ctx, control.EventQuery{Last: 4}, func(e control.Event) error { told = append(told, e); return nil }))
	for i, want := range []string{
		"deduplication of volume w is on, THN 4 now; it was off", "volume w is called v now",
		"deduplication of volume v is on, THN 8 now; it was on, THN 4", "deduplication of volume v is off now; it was on, THN 8",
	} {
		if i >= len(told) || told[i].Message != want {
			t.Fatalf("%+v", told)
		}
	}
	if f := told[2].Fields; f["volume"] != "v" || f["was"] != "on, THN 4" || f["dedup"] != "on, THN 8" {
		t.Errorf("%+v", f)
	}

	pl, err := c.ChangePool(ctx, "pool-a", control.PoolChange{DedupIndex: new(int64(128 << 10)), LLRRMThreshold: new(4)})
	p.ok(err)
	if want := (control.PoolSettings{DedupIndex: 128 << 10, LLRRMThreshold: 4}); pl.Stats.Settings != want {
		t.Errorf("%+v", pl.Stats)
	}
	_, err = c.ChangePool(ctx, "pool-a", control.PoolChange{DedupIndex: new(int64(0)), LLRRMThreshold: new(4)}) // one is so already
	p.ok(err)
	_, err = c.ChangePool(ctx, "pool-a", control.PoolChange{LLRRMThreshold: new(9)})
	refused(t, "an impossible threshold", err, control.KindInvalid)
	_, err = c.ChangePool(ctx, "pool-x", control.PoolChange{LLRRMThreshold: new(1)})
	refused(t, "a pool that is not there", err, control.KindNotFound)
	told = nil
	p.ok(c.Events(ctx, control.EventQuery{Last: 3}, func(e control.Event) error { told = append(told, e); return nil }))
	for i, want := range []string{
		"dedup-index of pool pool-a is 128KiB now; it was default", "llrrm-threshold of pool pool-a is 4 now; it was default",
		"dedup-index of pool pool-a is default now; it was 128KiB",
	} {
		if i >= len(told) || told[i].Message != want || told[i].Kind != "pool-changed" {
			t.Fatalf("%+v", told)
		}
	}
	if f := told[2].Fields; f["pool"] != "pool-a" || f["setting"] != "dedup-index" || f["was"] != "128KiB" || f["now"] != "default" {
		t.Errorf("%+v", f)
	}

	// One guest takes over both, then all moves at once.
	tk, err := c.Takeover(ctx, "a")
	p.ok(err)
	if tk.By != "b" {
		t.Errorf("%+v", tk)
	}
	tk, err = c.Takeover(ctx, "b")
	p.ok(err)
	if tk.By != "a" || tk.Of != "b" {
		t.Errorf("%+v", tk)
	}
	p.until("a serves both", servedBy("a", "a"))
	pools, err := c.Dedup(ctx)
	if err != nil || len(pools) != 2 || pools[0].Guest != "a" || pools[1].Guest != "b" || len(pools[0].Volumes) != 1 || pools[0].Index == nil || pools[1].Index == nil || pools[1].Volumes[0].THN != 16 {
		t.Errorf("%+v, %v", pools, err)
	}
	_, err = c.SurveyPool(ctx, "pool-b", control.SurveyChange{Action: control.SurveyStart})
	p.ok(err)
	for done := false; !done; time.Sleep(time.Millisecond) {
		pools, err = c.Dedup(ctx)
		p.ok(err)
		done = pools[1].Survey.State == "done"
	}
	if v := pools[1].Volumes[0].Survey; pools[0].Survey.State != "never" || v == nil || !v.Exact || v.WouldFree != 0 {
		t.Errorf("%+v, %+v", pools, v)
	}
	_, err = c.SurveyPool(ctx, "pool-b", control.SurveyChange{Action: control.SurveyStop})
	refused(t, "to stop a survey that is through", err, control.KindInvalid)
	_, err = c.SurveyPool(ctx, "pool-x", control.SurveyChange{Action: control.SurveyStart})
	refused(t, "a survey of no pool", err, control.KindNotFound)
	pl, err = c.Pool(ctx, "pool-a")
	if err != nil || pl.Stats.Settings != (control.PoolSettings{LLRRMThreshold: 4}) {
		t.Errorf("after a takeover: %+v, %v", pl.Stats, err)
	}
	p.ok(c.DeleteVolume(ctx, "other"))

	// The partner is gone and cannot be started.
	d.refuse.Store(true)
	p.ok(c.Drill(ctx, "b", control.DrillKill))
	st := p.until("b is down", func(st control.Status) bool {
		return !st.Protected && st.Guests[1].State != control.StateServing && !strings.Contains(st.Guests[0].Why, "answer")
	})
	if len(st.Alerts) == 0 {
		t.Errorf("%+v", st)
	}
	<-d.run("b").ended
	if r, err := c.CheckTakeover(ctx, "a"); err != nil || r.OK || r.Checks[len(r.Checks)-1].Why != "guest b is not up" {
		t.Errorf("%+v, %v", r, err)
	}
	refused(t, "a drill of what does not run", c.Drill(ctx, "b", control.DrillHang), control.KindRefused)
	found := false
	for !found {
		p.ok(c.Events(ctx, control.EventQuery{}, func(e control.Event) error { found = found || e.Kind == "start-failed"; return nil }))
	}
	d.refuse.Store(false)
	p.ok(c.Drill(ctx, "b", control.DrillRestart))
	p.until("b is back", protected)
	p.ok(c.Down(ctx))
}

// TestAlone: a guest without a partner serves, and has nowhere to go.
func TestAlone(t *testing.T) {
	p, d := insidePair(t, "log: 16MiB\ncache: 16MiB\nfailover: {restart_delay: 20ms, restart_max: 20ms, crash_limit: 3}\nguests:\n  - {name: a, address: 127.0.0.1, port: 0, pool: {size: 256MiB}}\n")
	st := p.until("start", func(st control.Status) bool { return len(st.Guests) == 1 && st.Guests[0].ServedBy == "a" })
	if st.Protected || !strings.Contains(st.Guests[0].Why, "it is alone") {
		t.Errorf("%+v", st)
	}
	c, ctx := p.client, t.Context()
	_, err := c.Takeover(ctx, "a")
	refused(t, "takeover", err, control.KindRefused)
	_, err = c.Giveback(ctx, "a")
	refused(t, "giveback", err, control.KindRefused)
	inc := d.run("a").inc
	p.ok(c.Drill(ctx, "a", control.DrillRestart))
	if d.run("a").inc <= inc {
		t.Error("it was not started again")
	}
	p.until("it serves again", func(st control.Status) bool { return st.Guests[0].ServedBy == "a" })
	refused(t, "a second agent", RunWith(ctx, d.cfg, Options{Driver: d, Logger: quiet()}), control.KindRefused)

	// It cannot be started any more, and is given up.
	d.refuse.Store(true)
	p.ok(c.Drill(ctx, "a", control.DrillKill))
	st = p.until("it is stopped", func(st control.Status) bool { return st.Guests[0].State == control.StateStopped })
	if !strings.Contains(strings.Join(st.Alerts, "\n"), "nobody serves a") || len(st.Alerts) < 3 {
		t.Errorf("%q", st.Alerts)
	}
	_, err = c.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 1 << 20})
	refused(t, "a volume where nobody serves", err, control.KindUnavailable)
	if r, err := c.Check(ctx); err != nil || r.OK || len(r.Notes) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	d.refuse.Store(false)
	p.ok(c.Drill(ctx, "a", control.DrillRestart))
	p.until("a person has started it", func(st control.Status) bool { return st.Guests[0].ServedBy == "a" })
	var kinds []string
	p.ok(c.Events(ctx, control.EventQuery{}, func(e control.Event) error { kinds = append(kinds, e.Kind); return nil }))
	if all := strings.Join(kinds, " "); !strings.Contains(all, "alert ") || !strings.Contains(all, "alert-over") {
		t.Errorf("%s", all)
	}
}

// listener takes what the agent passes for the line.
func listener(f *os.File) (*net.UnixListener, error) {
	l, err := net.FileListener(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	return l.(*net.UnixListener), nil
}
