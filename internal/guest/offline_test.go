package guest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/pool"
)

// stillPair is a pair that does not run, with a real pool for a.
func stillPair(t *testing.T) (*config.Config, *Pools) {
	t.Helper()
	dir := t.TempDir()
	text := "log: 16MiB\ncache: 1MiB\nguests:\n  - {name: a, pool: {size: 64MiB}}\n  - {name: b, pool: {size: 64MiB}}\n"
	if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	p := NewPools(cfg, 1<<20)
	d := device(t, cfg, true)
	defer d.Close()
	if err := p.Create(t.Context(), CreateSpec{Name: "tank", Identity: "a", Devices: []hpdi.Device{d}, LogBytes: int64(cfg.Log)}); err != nil {
		t.Fatal(err)
	}
	return cfg, p
}

// device opens the device of a's pool.
func device(t *testing.T, cfg *config.Config, fresh bool) hpdi.Device {
	t.Helper()
	path := cfg.Guests[0].Pool.Devices[0]
	if fresh {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, int64(cfg.Guests[0].Pool.Size)); err != nil {
			t.Fatal(err)
		}
	}
	d, err := file.Open(path, file.Options{Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestCheckOffline: pools that are not there are noted, those that cannot be
// looked at are errors.
func TestCheckOffline(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(*testing.T, *config.Config)
		want  string // of the error
		note  string // about a
	}{
		"whole":      {},
		"no devices": {spoil: func(_ *testing.T, c *config.Config) { c.Guests[0].Pool.Devices = nil }, note: "without devices"},
		"not made":   {spoil: func(t *testing.T, c *config.Config) { _ = device(t, c, true).Close() }, note: "belongs to no pool"},
		"gone": {spoil: func(t *testing.T, c *config.Config) {
			c.Guests[0].Pool.Create = false
			if err := os.Remove(c.Guests[0].Pool.Devices[0]); err != nil {
				t.Fatal(err)
			}
		}, want: "no such file"},
		"in use": {spoil: func(t *testing.T, c *config.Config) {
			d := device(t, c, false)
			t.Cleanup(func() { _ = d.Close() })
		}, want: "locked"},
		"nothing but its label": {spoil: func(t *testing.T, c *config.Config) {
			path := c.Guests[0].Pool.Devices[0]
			if err := errors.Join(os.Truncate(path, 4096), os.Truncate(path, int64(c.Guests[0].Pool.Size))); err != nil {
				t.Fatal(err)
			}
		}, want: "check pool"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg, _ := stillPair(t)
			if c.spoil != nil {
				c.spoil(t, cfg)
			}
			r, err := CheckOffline(t.Context(), cfg, func(control.CheckProgress) {})
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%+v, %v", r, err)
				}
				return
			}
			notes := strings.Join(r.Notes, "\n")
			if err != nil || !r.OK || !strings.Contains(notes, c.note) || !strings.Contains(notes, "guest b has no pool") {
				t.Errorf("%+v, %v", r, err)
			}
			if found := len(r.Pools) == 1 && r.Pools[0].Guest == "a"; found != (c.note == "") {
				t.Errorf("pools: %+v", r.Pools)
			}
		})
	}
}

// spoilLabel overwrites one copy of the label of a's device.
func spoilLabel(cfg *config.Config) error {
	f, err := os.OpenFile(cfg.Guests[0].Pool.Devices[0], os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte("no label"), 128*4096)
	return errors.Join(err, f.Close())
}

// TestRepairOffline: a copy of a label that is damaged is written anew, once, and a
// pool that somebody has open is left alone.
func TestRepairOffline(t *testing.T) {
	cfg, _ := stillPair(t)
	if err := spoilLabel(cfg); err != nil {
		t.Fatal(err)
	}
	tell := func(control.CheckProgress) {}
	d := device(t, cfg, false)
	if _, err := RepairOffline(t.Context(), cfg, tell); control.KindOf(err) != control.KindRefused || !strings.Contains(err.Error(), "is in use") {
		t.Errorf("a pool in use: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if r, err := CheckOffline(t.Context(), cfg, tell); err != nil || r.OK || r.Repair {
		t.Errorf("check: %+v, %v", r, err)
	}
	// What was mended is told also when the next pool cannot be repaired.
	other := cfg.Guests[1].Pool.Devices[0]
	if err := os.WriteFile(other, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	locked, err := file.Open(other, file.Options{Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	r, err := RepairOffline(t.Context(), cfg, tell)
	if err != nil || r.OK || len(r.Pools) != 2 || len(r.Pools[0].Mended) != 1 || r.Pools[1].OK || !strings.Contains(strings.Join(r.Pools[1].Problems, ""), "locked") {
		t.Errorf("repair beside a pool in use: %+v, %v", r, err)
	}
	if err := errors.Join(locked.Close(), os.Remove(other), spoilLabel(cfg)); err != nil {
		t.Fatal(err)
	}
	r, err = RepairOffline(t.Context(), cfg, tell)
	if err != nil || !r.OK || !r.Repair || len(r.Pools) != 1 || len(r.Pools[0].Mended) != 1 || !strings.Contains(r.Pools[0].Mended[0], "copy of the label at block 0:128") {
		t.Errorf("repair: %+v, %v", r, err)
	}
	if r, err = RepairOffline(t.Context(), cfg, tell); err != nil || !r.OK || len(r.Pools[0].Mended) != 0 {
		t.Errorf("repair again: %+v, %v", r, err)
	}
	if r, err := CheckOffline(t.Context(), cfg, tell); err != nil || !r.OK {
		t.Errorf("check: %+v, %v", r, err)
	}
}

// TestPoolsRefuse: a device that belongs to nobody, or to another identity, is
// not opened as a pool, and is let go.
func TestPoolsRefuse(t *testing.T) {
	for name, c := range map[string]struct {
		identity string
		fresh    bool
		region   string
		want     string
	}{
		"blank":     {"a", true, "region", "belongs to no pool"},
		"another's": {"b", false, "region", `of "a", not of "b"`},
		"no region": {"a", false, "none/region", "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg, p := stillPair(t)
			d := device(t, cfg, c.fresh)
			_, err := p.Open(context.Background(), OpenSpec{
				Identity: c.identity, Owner: c.identity, Devices: []hpdi.Device{d}, RegionPath: filepath.Join(cfg.Dir, c.region),
			})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v", err)
			}
			_ = device(t, cfg, false).Close() // the lock is free
		})
	}
}

// TestCheckReports: a store tells of no check when none is under way, and of
// problems that were too many to list.
func TestCheckReports(t *testing.T) {
	s := &store{}
	if _, ok := s.Checking(); ok {
		t.Error("nothing is being checked")
	}
	s.checking.Store(&pool.CheckProgress{})
	if _, ok := s.Checking(); !ok {
		t.Error("a check is under way")
	}
	if c := poolCheck(pool.CheckReport{Problems: []string{"one"}, MoreProblem: 2}); c.OK || len(c.Problems) != 2 || c.Problems[1] != "and 2 more" {
		t.Errorf("%+v", c)
	}
	if c := poolCheck(pool.CheckReport{Mended: []string{"one"}, MoreMended: 3}); !c.OK || len(c.Mended) != 2 || c.Mended[1] != "and 3 more" {
		t.Errorf("%+v", c)
	}
	if c := poolCheck(pool.CheckReport{}); !c.OK {
		t.Errorf("%+v", c)
	}
}
