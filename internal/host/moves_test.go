package host

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/guest"
)

// state returns what the pair remembers of a guest.
func (p *pair) state(guest string) config.GuestState {
	p.t.Helper()
	st, err := config.ReadState(p.dir)
	p.ok(err)
	return st.Guests[guest]
}

// has tells whether a pool is open, and of whom, with volume v in it.
func (p *pair) has(pool, guest string) {
	p.t.Helper()
	got, err := p.client.Pool(p.t.Context(), pool)
	p.ok(err)
	v, err := p.client.Volume(p.t.Context(), "v")
	p.ok(err)
	if got.State != "open" || got.Guest != guest || v.Guest != guest || v.Pool != pool {
		p.t.Errorf("%+v, %+v", got, v)
	}
}

func (p *pair) checked() {
	p.t.Helper()
	if r, err := p.client.Check(p.t.Context()); err != nil || !r.OK {
		p.t.Errorf("check %+v, %v", r, err)
	}
}

// gone moves the file of a guest's first device out of the pair's directory.
func (p *pair) gone(name string) (path string) {
	p.t.Helper()
	path = filepath.Join(p.t.TempDir(), name)
	p.ok(os.Rename(filepath.Join(p.dir, name), path))
	return path
}

// without tells that a guest has no pool, and is well.
func without(guest string) func(control.Status) bool {
	return func(st control.Status) bool {
		i := slices.IndexFunc(st.Guests, func(g control.GuestStatus) bool { return g.Name == guest })
		return protected(st) && len(st.Guests[i].Pools) == 0 && len(st.Guests[i].Exports) == 0
	}
}

// dropped waits until no process has the devices of a pool of the pair any more.
func (p *pair) dropped(pool string) {
	p.t.Helper()
	for {
		found, err := guest.FindPools([]string{p.dir}, "")
		p.ok(err)
		i := slices.IndexFunc(found.Pools, func(f control.FoundPool) bool { return f.Name == pool })
		if i < 0 {
			p.t.Fatalf("no pool %s: %+v", pool, found)
		}
		if found.Pools[i].State != control.FoundInUse {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestMoves drives exports and imports of a pair through the deaths of those who
// take part.
func TestMoves(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	p := newPair(t, pairConfig)
	ctx := t.Context()
	st := p.until("start", servedBy("a", "b"))
	_, err := p.client.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 64 << 20, Guest: "a"})
	p.ok(err)

	// The agent dies after the guest has closed the pool: it is not exported yet.
	// A new agent knows it, and takes it neither for hung nor for lost.
	direct := control.NewSocketClient(control.GuestSocket(p.dir, "a"))
	defer direct.Close()
	p.killAgent()
	_, err = direct.ExportPool(ctx, "pool-a", control.PoolExport{})
	p.ok(err)
	p.startAgent()
	p.until("the new agent", func(st control.Status) bool {
		return len(st.Guests) == 2 && st.Guests[0].ServedBy == "a" && st.Agent.Running
	})
	if q, err := p.client.Pool(ctx, "pool-a"); err != nil || q.State != "closed" {
		t.Errorf("%+v, %v", q, err)
	}
	// The guest dies, too: whoever takes over opens it as if nothing had been.
	p.ok(p.client.Drill(ctx, "a", control.DrillKill))
	now := p.until("b takes over", servedBy("b", "b"))
	if now.Guests[1].PID != st.Guests[1].PID {
		t.Error("b was started again")
	}
	p.has("pool-a", "a")
	p.checked()

	// Once more; this time the export is asked for again.
	direct = control.NewSocketClient(control.GuestSocket(p.dir, "b"))
	defer direct.Close()
	_, err = direct.ExportPool(ctx, "pool-a", control.PoolExport{})
	p.ok(err)
	_, err = p.client.ExportPool(ctx, "pool-a", control.PoolExport{})
	p.ok(err)
	_, err = p.client.ExportPool(ctx, "pool-a", control.PoolExport{}) // and again
	p.ok(err)
	p.until("it is exported", without("a"))
	if _, err := p.client.Pool(ctx, "pool-a"); control.KindOf(err) != control.KindNotFound {
		t.Errorf("%v", err)
	}
	if s := p.state("a"); s.Exported != "pool-a" || s.Port == 0 || s.Created || len(s.Devices) != 0 {
		t.Errorf("%+v", s)
	}
	// Guests come and go without it.
	_, err = p.client.Giveback(ctx, "a")
	p.ok(err)
	p.until("a is back", servedBy("a", "b"))
	if c, err := p.client.CheckTakeover(ctx, "a"); err != nil || !c.OK {
		t.Errorf("%+v, %v", c, err)
	}
	p.ok(p.client.Drill(ctx, "a", control.DrillKill))
	p.until("a without a pool is taken over", servedBy("b", "b"))
	path := p.gone("pool-a.img")

	// The agent dies after it has recorded an import, and both guests: whoever
	// opens the identity goes on with it, and the next agent sees it through.
	found, err := guest.FindPools([]string{path}, "")
	p.ok(err)
	f := found.Pools[0]
	if f.State != control.FoundExported {
		t.Errorf("%+v", f)
	}
	p.until("before", servedBy("b", "b"))
	p.killAll()
	state, err := config.ReadState(p.dir)
	p.ok(err)
	gs := state.Guests["a"]
	gs.Pool, gs.Devices, gs.Copies, gs.Created = "tank", []string{path}, 1, true
	gs.Import = &config.Import{ID: f.ID, Epoch: f.Epoch}
	state.Guests["a"] = gs
	p.ok(state.Write(p.dir))
	p.startAgent()
	p.until("it is imported", func(st control.Status) bool { return protected(st) && len(st.Guests[0].Exports) == 1 })
	p.has("tank", "a")
	if s := p.state("a"); s.Import != nil || !s.Created {
		t.Errorf("%+v", s)
	}
	p.checked()

	// And away, for good, to the other guest.
	_, err = p.client.ExportPool(ctx, "tank", control.PoolExport{})
	p.ok(err)
	_, err = p.client.ExportPool(ctx, "pool-b", control.PoolExport{})
	p.ok(err)
	p.until("no pools", func(st control.Status) bool { return without("a")(st) && without("b")(st) })
	got, err := p.client.ImportPool(ctx, control.PoolImport{Pool: f.ID, Paths: []string{path}, Guest: "b"})
	p.ok(err)
	again, err := p.client.ImportPool(ctx, control.PoolImport{Pool: "tank", Paths: []string{path}})
	if err != nil || again.ID != got.ID || again.Name != "tank" {
		t.Errorf("again: %+v, %v", again, err)
	}
	p.has("tank", "b")
	_, err = p.client.ImportPool(ctx, control.PoolImport{Pool: "pool-b"}) // from the pair's directory
	p.ok(err)
	p.until("both have pools", protected)
	p.checked()
	p.ok(p.client.Down(ctx))
	_ = p.agent.Wait()
	p.startAgent()
	p.until("second start", protected)
	p.has("tank", "b")
	if q, err := p.client.Pool(ctx, "pool-b"); err != nil || q.Guest != "a" {
		t.Errorf("%+v, %v", q, err)
	}
	var kinds []string
	p.ok(p.client.Events(ctx, control.EventQuery{}, func(e control.Event) error { kinds = append(kinds, e.Kind); return nil }))
	if all := strings.Join(kinds, " "); strings.Count(all, "pool-exported") != 3 || strings.Count(all, "pool-imported") != 2 {
		t.Errorf("%s", all)
	}
}

// TestMoveRefused: what was not exported is refused, for its reasons, and taken
// when the person says so.
func TestMoveRefused(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	p, q := newPair(t, pairConfig), newPair(t, pairConfig)
	ctx := t.Context()
	p.until("start", servedBy("a", "b"))
	q.until("start", servedBy("a", "b"))
	_, err := p.client.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 64 << 20, Guest: "a"})
	p.ok(err)
	_, err = q.client.ImportPool(ctx, control.PoolImport{Pool: "pool-a", Paths: []string{p.dir}, As: "x"})
	refused(t, "where both guests have pools", err, control.KindRefused)
	_, err = q.client.ExportPool(ctx, "pool-b", control.PoolExport{})
	q.ok(err)
	take := func(what string, kind control.Kind, words string, c control.PoolImport) {
		t.Helper()
		c.Pool, c.As = "pool-a", "x"
		if c.Paths == nil {
			c.Paths = []string{p.dir}
		}
		_, err := q.client.ImportPool(ctx, c)
		if control.KindOf(err) != kind || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v", what, err)
		}
		if s := q.state("b"); s.Import != nil || s.Pool != "" || s.Exported != "pool-b" {
			t.Fatalf("%s: it is remembered: %+v", what, s)
		}
	}
	both := control.PoolImport{Force: true, AcceptLoss: true}
	take("in use", control.KindRefused, "is in use", both)
	take("no such guest", control.KindNotFound, "no guest", control.PoolImport{Guest: "z"})
	take("nothing there", control.KindNotFound, "no pool", control.PoolImport{Paths: []string{t.TempDir()}})
	_, err = q.client.ImportPool(ctx, control.PoolImport{Pool: "pool-a", Paths: []string{p.dir}})
	refused(t, "a name that is taken", err, control.KindExists)

	// The other pair ends without closing anything; its region is there.
	p.killAll()
	p.dropped("pool-a")
	take("in the memory of this host", control.KindRefused, "memory of this host", control.PoolImport{Force: true})
	take("the same", control.KindRefused, "--force --accept-loss", control.PoolImport{AcceptLoss: true})
	p.startAgent()
	p.until("the other pair goes on", protected)
	p.has("pool-a", "a") // nothing was changed by what was refused
	p.ok(p.client.Down(ctx))
	_ = p.agent.Wait()
	take("closed", control.KindRefused, "closed, but not exported", control.PoolImport{AcceptLoss: true})
	got, err := q.client.ImportPool(ctx, control.PoolImport{Pool: "pool-a", Paths: []string{p.dir}, As: "x", Force: true})
	if err != nil || got.State != "open" || got.Guest != "b" {
		t.Fatalf("%+v, %v", got, err)
	}
	q.has("x", "b")
	q.until("protected with it", protected)

	// It dies, and its memory with it: taken by force, it has what was committed.
	_, err = q.client.ExportPool(ctx, "pool-a", control.PoolExport{})
	q.ok(err)
	q.until("well", protected)
	q.killAll()
	p.dropped("x")
	r := newPair(t, strings.ReplaceAll(pairConfig, "size: 256MiB}", "size: 256MiB, manual: true}"))
	r.until("start", func(st control.Status) bool {
		return len(st.Guests) == 2 && st.Guests[0].ServedBy == "a" && st.Guests[1].ServedBy == "b"
	})
	_, err = r.client.ImportPool(ctx, control.PoolImport{Pool: "x", Paths: []string{p.dir}, Force: true, AcceptLoss: true})
	r.ok(err)
	r.has("x", "b") // the guest of that name, as it was
	r.checked()
	// Who had it does not get it while it is used, and says why.
	q.startAgent()
	q.until("it is refused", func(st control.Status) bool {
		return strings.Contains(strings.Join(st.Alerts, "\n"), "another process")
	})
	_, err = r.client.ExportPool(ctx, "x", control.PoolExport{})
	r.ok(err)
}

// TestMoveWithoutAnswer: what is not known to have happened is remembered as it
// was before an export, and as it will be after an import; what was refused is
// forgotten.
func TestMoveWithoutAnswer(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var giveUp atomic.Bool
	var refusal atomic.Pointer[control.Error]
	answer := func() error {
		if e := refusal.Load(); e != nil {
			return e
		}
		return nil
	}
	h := control.Handlers{
		ExportPool: func(ctx context.Context, _ string, _ control.PoolExport) (control.Pool, error) {
			if giveUp.Load() {
				cancel()
				<-ctx.Done()
			}
			return control.Pool{State: control.FoundExported}, answer()
		},
		ImportPool: func(context.Context, control.PoolImport) (control.Pool, error) { return control.Pool{}, answer() },
		Volumes:    func(context.Context) ([]control.Volume, error) { return nil, nil },
	}
	a := answering(t, h)
	before := next(t, a, "b")
	giveUp.Store(true)
	if _, err := a.exportPool(ctx, before.Name, control.PoolExport{}); err == nil || !strings.Contains(err.Error(), "export it again") {
		t.Errorf("%v", err)
	}
	if now := next(t, a, "b"); !now.Exists() || now.Name != before.Name {
		t.Errorf("%+v", now)
	}
	giveUp.Store(false)
	ctx = t.Context()
	refusal.Store(control.NewError(control.KindRefused, "volume \"v\" has 2 connections", ""))
	if _, err := a.exportPool(ctx, before.Name, control.PoolExport{}); control.KindOf(err) != control.KindRefused {
		t.Errorf("%v", err)
	}
	if now := next(t, a, "b"); !now.Exists() {
		t.Errorf("%+v", now)
	}
	// It is closed, and that cannot be recorded.
	refusal.Store(nil)
	way := filepath.Join(config.EffectivePath(a.cfg.Dir), "in the way")
	if err := os.MkdirAll(way, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := a.exportPool(ctx, before.Name, control.PoolExport{}); err == nil || !strings.Contains(err.Error(), "export it again") {
		t.Errorf("%v", err)
	}
	if err := os.RemoveAll(config.EffectivePath(a.cfg.Dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.exportPool(ctx, before.Name, control.PoolExport{}); err != nil {
		t.Error(err)
	}
	if now := next(t, a, "b"); now.Exists() || a.settings().Guest("b").Pool.Exists() {
		t.Errorf("%+v", now)
	}

	f := control.FoundPool{ID: strings.Repeat("07", 16), Name: "theirs", Epoch: 5, Devices: []control.FoundDevice{
		{Number: 1, Copies: []control.FoundCopy{{Path: "/d/0"}}},
		{Number: 2, Copies: []control.FoundCopy{{Path: "/d/1"}, {}}},
	}}
	if err := a.rememberImport("b", f, control.PoolImport{As: "tank", AcceptLoss: true}); err != nil {
		t.Fatal(err)
	}
	for _, p := range []config.Pool{next(t, a, "b"), a.settings().Guest("b").Pool} {
		if p.Name != "tank" || p.Manual || p.Create || p.Import == nil || *p.Import != (config.Import{ID: f.ID, Epoch: 5, AcceptLoss: true}) ||
			len(p.Devices) != 3 || !strings.HasSuffix(p.Devices[2], "missing/tank-device2-copy2") || len(p.Groups()) != 2 || len(p.Groups()[1]) != 2 {
			t.Errorf("%+v", p)
		}
	}
	// Nobody may open it, so it can be given up only when nobody holds b.
	if _, err := a.exportPool(ctx, "tank", control.PoolExport{}); control.KindOf(err) != control.KindRefused || !strings.Contains(err.Error(), "is being imported") {
		t.Errorf("%v", err)
	}
	a.poolSeen("b")
	if p := next(t, a, "b"); p.Import != nil || p.Name != "tank" {
		t.Errorf("%+v", p)
	}
}

// TestImportGivenUp: an import that cannot be completed is taken back by an export.
func TestImportGivenUp(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	p := newPair(t, pairConfig)
	ctx := t.Context()
	p.until("start", servedBy("a", "b"))
	_, err := p.client.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 64 << 20, Guest: "a"})
	p.ok(err)
	_, err = p.client.ExportPool(ctx, "pool-a", control.PoolExport{})
	p.ok(err)
	p.ok(p.client.Down(ctx))
	_ = p.agent.Wait()
	// As if agent and guests had died, and the device had gone since.
	state, err := config.ReadState(p.dir)
	p.ok(err)
	gs := state.Guests["a"]
	gs.Pool, gs.Devices, gs.Copies, gs.Created = "tank", []string{filepath.Join(p.dir, "away.img")}, 1, true
	gs.Import = &config.Import{ID: strings.Repeat("07", 16)}
	state.Guests["a"] = gs
	p.ok(state.Write(p.dir))
	p.startAgent()
	p.until("it does not open", func(st control.Status) bool { return strings.Contains(strings.Join(st.Alerts, "\n"), "away.img") })
	if q, err := p.client.Pool(ctx, "tank"); err != nil || q.State != "not imported yet" {
		t.Errorf("%+v, %v", q, err)
	}
	for {
		_, err = p.client.ExportPool(ctx, "tank", control.PoolExport{})
		if control.KindOf(err) != control.KindRefused { // an attempt to open it is under way
			break
		}
	}
	p.ok(err)
	p.until("a is served without", without("a"))
	_, err = p.client.ImportPool(ctx, control.PoolImport{Pool: "pool-a"})
	p.ok(err)
	p.has("pool-a", "a")
	p.until("all is well", protected)
}
