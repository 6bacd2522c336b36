package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/partner"
)

// TestVolumeCommands: what a person asks of volumes is done or refused with
// the reason.
func TestVolumeCommands(t *testing.T) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	c, ctx := b.client(), t.Context()
	if _, err := c.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 4096, Guest: "a"}); err != nil {
		t.Fatal(err)
	}
	if v, err := c.ChangeVolume(ctx, "v", control.VolumeChange{Size: 8192, Rename: "w"}); err != nil || v.Name != "w" || v.Size != 8192 {
		t.Errorf("%+v, %v", v, err)
	}
	if v, err := c.RenameVolume(ctx, "w", "w"); err != nil || v.Name != "w" {
		t.Errorf("renamed to its own name: %+v, %v", v, err)
	}
	s := b.storage.last()
	all := []struct {
		name string
		do   func(volume string) error
	}{
		{"change the settings of", func(string) error {
			_, err := c.ChangePool(ctx, s.Name(), control.PoolChange{LLRRMThreshold: new(3)})
			return err
		}},
		{"create volume", func(string) error {
			_, err := c.CreateVolume(ctx, control.VolumeCreate{Name: "x", Size: 4096, Guest: "a"})
			return err
		}},
		{"resize volume", func(v string) error { _, err := c.ResizeVolume(ctx, v, 4096); return err }},
		{"rename volume", func(v string) error { _, err := c.RenameVolume(ctx, v, "x"); return err }},
		{"deduplication of volume", func(v string) error {
			_, err := c.ChangeVolume(ctx, v, control.VolumeChange{Dedup: new(true)})
			return err
		}},
		{"delete volume", func(v string) error { return c.DeleteVolume(ctx, v) }},
	}
	for _, x := range all[2:] {
		if err := x.do("nobody"); control.KindOf(err) != control.KindNotFound {
			t.Errorf("%s of a volume that is not there: %v", x.name, err)
		}
	}
	s.refuse.Store(true)
	for _, x := range all {
		if err := x.do("w"); control.KindOf(err) != control.KindNoSpace || !strings.Contains(err.Error(), x.name) {
			t.Errorf("%s that the store refuses: %v", x.name, err)
		}
	}
	if all, err := c.Dedup(ctx); err != nil || len(all) != 1 || all[0].Guest != "a" || all[0].Pool != s.Name() || all[0].Error != block.ErrNoSpace.Error() || all[0].Saved != 0 {
		t.Errorf("deduplication of a pool that cannot tell: %+v, %v", all, err)
	}
	s.refuse.Store(false)
	if all, err := c.Dedup(ctx); err != nil || len(all) != 1 || all[0].Error != "" || all[0].Saved != 4096 {
		t.Errorf("%+v, %v", all, err)
	}
	if err := c.DeleteVolume(ctx, "w"); err != nil || len(s.Volumes()) != 0 {
		t.Errorf("%v, left: %v", err, s.Volumes())
	}
}

// TestCheckCommands: a check that cannot be made is an error, one that is under
// way is told, and a pool that cannot write is an alert.
func TestCheckCommands(t *testing.T) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	c, ctx := b.client(), t.Context()
	all := control.NewClient(b.cfg.Dir) // without an agent, it asks the guests
	defer all.Close()
	now, err := all.Checking(ctx)
	if err != nil || len(now) != 1 || now[0].Guest != "a" || now[0].Pool == "" || now[0].Total != 2 {
		t.Errorf("%+v, %v", now, err)
	}
	if r, err := c.Check(ctx); err != nil || !r.OK || len(r.Pools) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	b.storage.last().refuse.Store(true)
	if now, err := all.Checking(ctx); err != nil || len(now) != 0 {
		t.Errorf("none is under way: %+v, %v", now, err)
	}
	if _, err := c.Check(ctx); err == nil || !strings.Contains(err.Error(), "check pool") {
		t.Errorf("a check that fails: %v", err)
	}
	st, err := c.Status(ctx)
	if err != nil || !strings.Contains(strings.Join(st.Guests[0].Alerts, "\n"), "cannot write to its devices") {
		t.Errorf("%+v, %v", st, err)
	}
}

// TestPoolCommands: a guest without a pool gets one by command, unless its
// devices hinder that.
func TestPoolCommands(t *testing.T) {
	b := newBench(t, func(c *config.Config) {
		c.Guests[0].Pool.Manual, c.Guests[0].Pool.Create, c.Guests[0].Pool.Devices = true, false, nil
	})
	c, ctx := b.client(), t.Context()
	all := control.NewClient(b.cfg.Dir)
	defer all.Close()
	create := control.PoolCreate{Name: "tank", Guest: "a"}
	if _, err := c.CreatePool(ctx, create); control.KindOf(err) != control.KindRefused {
		t.Errorf("a pool of an identity that is not held: %v", err)
	}
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	if r, err := c.Check(ctx); err != nil || len(r.Pools) != 0 {
		t.Errorf("a check without a pool: %+v, %v", r, err)
	}
	if p, err := c.Pools(ctx); err != nil || len(p) != 0 {
		t.Errorf("%+v, %v", p, err)
	}
	if now, err := all.Checking(ctx); err != nil || len(now) != 0 {
		t.Errorf("%+v, %v", now, err)
	}
	devices := func(path ...string) {
		t.Helper()
		cfg := *b.cfg
		cfg.Guests = append([]config.Guest{}, b.cfg.Guests...)
		cfg.Guests[0].Pool.Devices = path
		if err := cfg.WriteEffective(); err != nil {
			t.Fatal(err)
		}
	}
	dev := filepath.Join(b.cfg.Dir, "dev")
	devices(dev)
	if _, err := c.CreatePool(ctx, create); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("a device that does not exist: %v", err)
	}
	write := func(content string) {
		t.Helper()
		if err := os.WriteFile(dev, append([]byte(content), make([]byte, 1<<20-len(content))...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("a file system")
	if _, err := c.CreatePool(ctx, create); control.KindOf(err) != control.KindExists {
		t.Errorf("a device with somebody's data: %v", err)
	}
	write("")
	away := b.cfg.RegionDir + ".away"
	if err := os.Rename(b.cfg.RegionDir, away); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CreatePool(ctx, create); err == nil || b.storage.last() != nil {
		t.Error("a pool that does not open after it was made is no error")
	}
	if err := os.Rename(away, b.cfg.RegionDir); err != nil {
		t.Fatal(err)
	}
	if p, err := c.CreatePool(ctx, create); err != nil || p.Name != "tank" || p.Guest != "a" {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := c.CreatePool(ctx, create); control.KindOf(err) != control.KindRefused {
		t.Errorf("a second pool: %v", err)
	}
	if _, err := c.AddDevice(ctx, "tank", control.PoolAdd{Device: dev + "2"}); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("a device that does not exist: %v", err)
	}
	if _, err := c.AddDevice(ctx, "nobody", control.PoolAdd{Device: dev}); control.KindOf(err) != control.KindNotFound {
		t.Errorf("a pool that is not there: %v", err)
	}
}

// TestTakeoverCheck: the dry run names each thing that would hinder it.
func TestTakeoverCheck(t *testing.T) {
	b := newBench(t)
	c, ctx := b.client(), t.Context()
	for _, id := range []string{"a", "nobody"} {
		if _, err := c.CheckTakeover(ctx, id); control.KindOf(err) != control.KindInvalid {
			t.Errorf("takeover of %s by a: %v", id, err)
		}
	}
	dev := b.cfg.Guest("b").Pool.Devices[0]
	hindrance := func(what, why string) {
		t.Helper()
		r, err := c.CheckTakeover(ctx, "b")
		for _, x := range r.Checks {
			if x.Name == what && !x.OK && !r.OK && strings.Contains(x.Why, why) {
				return
			}
		}
		t.Errorf("%s is no hindrance: %+v, %v", what, r, err)
	}
	hindrance("region", "not mapped")
	hindrance("device "+dev, "belongs to no pool")
	b.storage.mu.Lock()
	b.storage.labels[dev] = Label{Name: "tank", Identity: "a"}
	b.storage.mu.Unlock()
	hindrance("device "+dev, "it belongs to pool tank of a")
	if err := os.Remove(dev); err != nil {
		t.Fatal(err)
	}
	hindrance("device "+dev, "no such file")
	cfg := *b.cfg
	cfg.Guests = append([]config.Guest{}, b.cfg.Guests...)
	cfg.Guests[1].Pool.Devices, cfg.Guests[1].Pool.Manual = nil, true
	if err := cfg.WriteEffective(); err != nil {
		t.Fatal(err)
	}
	if r, err := c.CheckTakeover(ctx, "b"); err != nil || !strings.Contains(lastWhy(r, "devices"), "no pool") {
		t.Errorf("without devices: %+v, %v", r, err)
	}
	b.grant("b", partner.BasisReleased, 1)
	b.expect(partner.KindServing)
	hindrance("identity", "a holds b already")
}

func lastWhy(r control.TakeoverCheck, name string) string {
	for _, x := range r.Checks {
		if x.Name == name {
			return x.Why
		}
	}
	return ""
}

// TestAskGivesUp: a question to a loop that does not turn ends with whoever
// asked, whether the loop has taken it or not.
func TestAskGivesUp(t *testing.T) {
	port := 1
	cfg := &config.Config{Dir: t.TempDir(), Guests: []config.Guest{{Name: "a", Port: &port}, {Name: "b", Port: &port}}}
	for _, taken := range []bool{false, true} {
		for name, do := range map[string]func(*Guest, context.Context) error{
			"status":   func(g *Guest, ctx context.Context) error { _, err := g.status(ctx); return err },
			"takeover": func(g *Guest, ctx context.Context) error { _, err := g.checkTakeover(ctx, "b"); return err },
		} {
			g := &Guest{opt: Options{Name: "a"}, cfg: cfg, log: quiet(), inputs: make(chan func())}
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				if taken {
					<-g.inputs
				}
				cancel()
			}()
			if err := do(g, ctx); !errors.Is(err, context.Canceled) {
				t.Errorf("%s, taken %v: %v", name, taken, err)
			}
		}
	}
}

// TestStateOfAGuest: what is under way outweighs what is served.
func TestStateOfAGuest(t *testing.T) {
	const serving, opening, releasing = partner.PhaseServing, partner.PhaseOpening, partner.PhaseReleasing
	for _, c := range []struct {
		holds map[string]partner.Phase
		want  string
	}{
		{nil, control.StateWaiting},
		{map[string]partner.Phase{"a": opening}, control.StateStarting},
		{map[string]partner.Phase{"a": serving}, control.StateServing},
		{map[string]partner.Phase{"b": serving}, control.StateServing},
		{map[string]partner.Phase{"a": serving, "b": opening}, control.StateTakeover},
		{map[string]partner.Phase{"a": serving, "b": releasing}, control.StateReleasing},
	} {
		if got := state("a", c.holds); got != c.want {
			t.Errorf("%v: %s, not %s", c.holds, got, c.want)
		}
	}
}

// What a volume shares is what was asked for last, the default where nobody said in
// what series; where nothing is shared a length of series is refused.
func TestSharingOfVolumes(t *testing.T) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	c, ctx := b.client(), t.Context()
	is := func(v control.Volume, err error, thn int) {
		t.Helper()
		if err != nil || v.THN != thn || v.Dedup != (thn > 0) {
			t.Errorf("%+v, %v; THN should be %d", v, err, thn)
		}
	}
	for i, x := range []struct {
		dedup    bool
		thn, has int
	}{{false, 0, 0}, {true, 0, dedup.DefaultRun}, {true, 32, 32}} {
		v, err := c.CreateVolume(ctx, control.VolumeCreate{Name: fmt.Sprint(i), Size: 4096, Guest: "a", Dedup: x.dedup, THN: x.thn})
		is(v, err, x.has)
	}
	if d, err := c.Dedup(ctx); err != nil || len(d) != 1 || d[0].Guest != "a" || d[0].Pool == "" || d[0].Saved != 4096 {
		t.Errorf("%+v, %v", d, err)
	}
	if _, err := c.CreateVolume(ctx, control.VolumeCreate{Name: "x", Size: 4096, Guest: "a", THN: 4}); control.KindOf(err) != control.KindInvalid {
		t.Errorf("a length of series for nothing: %v", err)
	}
	for _, x := range []struct {
		dedup    *bool
		thn, has int
	}{
		{new(true), 0, dedup.DefaultRun}, {nil, 4, 4}, {new(true), 0, 4}, {new(true), 9, 9}, {nil, 0, 9},
		{new(false), 0, 0}, {new(false), 0, 0}, {nil, 0, 0}, {new(true), 2, 2},
	} {
		v, err := c.ChangeVolume(ctx, "0", control.VolumeChange{Dedup: x.dedup, THN: x.thn})
		is(v, err, x.has)
		all, err := c.Volumes(ctx)
		is(all[0], err, x.has)
	}
	for _, action := range []string{control.ScanStart, control.ScanUndo, control.ScanPause, control.ScanResume, control.ScanStop} {
		_, err := c.ChangeVolume(ctx, "0", control.VolumeChange{Scan: action})
		if s := b.storage.last(); err != nil || s.scanned != "0 "+action {
			t.Errorf("%s: %v, the store was asked for %q", action, err, s.scanned)
		}
	}
	if _, err := c.ChangeVolume(ctx, "0", control.VolumeChange{Scan: "dance"}); control.KindOf(err) != control.KindInvalid {
		t.Errorf("a scan that nobody knows: %v", err)
	}
	for _, x := range []control.VolumeChange{{Dedup: new(false), THN: 4}, {Dedup: new(false), THN: 4, Size: 8192}} {
		if _, err := c.ChangeVolume(ctx, "0", x); control.KindOf(err) != control.KindInvalid || !strings.Contains(err.Error(), "--dedup on") {
			t.Errorf("%+v: %v", x, err)
		}
	}
	if v, err := c.Volume(ctx, "0"); err != nil || v.THN != 2 || v.Size != 4096 {
		t.Errorf("after changes that were refused: %+v, %v", v, err)
	}
}
