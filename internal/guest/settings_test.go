package guest

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/export/vhostuser"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/pool"
)

// TestPoolSettings: settings reach the pool one by one, and those of a pool that is not
// here, or for which there is no memory, are refused.
func TestPoolSettings(t *testing.T) {
	b := newBench(t, func(c *config.Config) { c.Memory = 256 << 20 })
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	c, ctx := b.client(), t.Context()
	name := b.storage.last().Name()
	p, err := c.ChangePool(ctx, name, control.PoolChange{DedupIndex: new(int64(1 << 20))})
	if want := (control.PoolSettings{DedupIndex: 1 << 20}); err != nil || p.Name != name || p.Stats.Settings != want {
		t.Errorf("%+v, %v", p, err)
	}
	p, err = c.ChangePool(ctx, name, control.PoolChange{LLRRMThreshold: new(3)})
	want := control.PoolSettings{DedupIndex: 1 << 20, LLRRMThreshold: 3}
	if err != nil || p.Stats.Settings != want {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := c.ChangePool(ctx, "nobody", control.PoolChange{LLRRMThreshold: new(3)}); control.KindOf(err) != control.KindNotFound {
		t.Errorf("a pool that is not there: %v", err)
	}
	// Its device is large enough for an index that is not.
	for i := range b.cfg.Guests {
		if err := os.Truncate(b.cfg.Guests[i].Pool.Devices[0], 1<<40); err != nil {
			t.Fatal(err)
		}
	}
	b.cfg.Memory, b.cfg.DedupIndex = 2<<30, 1<<20
	if err := b.cfg.WriteEffective(); err != nil {
		t.Fatal(err)
	}
	_, err = c.ChangePool(ctx, name, control.PoolChange{DedupIndex: new(int64(2 << 30))})
	if control.KindOf(err) != control.KindRefused {
		t.Fatalf("an index as large as the memory: %v", err)
	}
	for _, says := range []string{"pool " + name + " cannot have that index", "memory: 2GiB do not suffice", partIndex} {
		if !strings.Contains(err.Error(), says) {
			t.Errorf("%q lacks %q", err, says)
		}
	}
	if p, err = c.Pool(ctx, name); control.KindOf(err) != control.KindUnsupported {
		t.Errorf("%+v, %v", p, err)
	}
	if got := b.storage.last().Stats().Settings; got != want {
		t.Errorf("%+v after a refusal", got)
	}
	if _, err = c.ChangePool(ctx, name, control.PoolChange{DedupIndex: new(int64(64 << 20))}); err != nil {
		t.Errorf("an index that fits: %v", err)
	}
}

// An index beside the one that there is must find room in the memory of the host, too;
// where none is needed yet, or a smaller one is asked for, it does not matter.
func TestRoomForIndex(t *testing.T) {
	b := newBench(t)
	free, _ := available()
	blocks := 1 << 50 / block.Size // 16 bytes each are more than any host has
	now := control.PoolStatus{Name: "p", Capacity: int64(blocks) * block.Size, Dedup: control.DedupStatus{IndexBytes: 1 << 20}}
	g := &Guest{cfg: b.cfg}
	err := g.roomForIndex("a", now, 4*free)
	if control.KindOf(err) != control.KindRefused || !strings.Contains(err.Error(), "while there is the one before, too") {
		t.Errorf("%v", err)
	}
	for _, bytes := range []int64{0, 1 << 20} {
		if err := g.roomForIndex("a", now, bytes); err != nil {
			t.Errorf("%d: %v", bytes, err)
		}
	}
	now.Dedup.IndexBytes = 0
	if err := g.roomForIndex("a", now, 4*free); err != nil {
		t.Errorf("no index yet: %v", err)
	}
}

// The index that is set for a pool is planned with its size wherever the pool is.
func TestMemoryOfASetIndex(t *testing.T) {
	cfg := settingsOf(t, "{memory: 2GiB, dedup_index: 1MiB, guests: [{name: a, pool: {devices: [disk]}}]}")
	disk := filepath.Join(cfg.Dir, "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, testTiB); err != nil {
		t.Fatal(err)
	}
	st := NewPools(cfg, 1<<20)
	open := func() []hpdi.Device {
		dev, err := openLocked(disk, time.Now(), nil)
		if err != nil {
			t.Fatal(err)
		}
		return []hpdi.Device{dev}
	}
	devs := open()
	if err := st.Create(t.Context(), CreateSpec{Name: "p", Identity: "a", Devices: devs, LogBytes: 24 * testMiB}); err != nil {
		t.Fatal(err)
	}
	closeAll(devs)
	before := headroom(cfg, &cfg.Guests[0], 0)
	s, err := st.Open(t.Context(), OpenSpec{Identity: "a", Owner: "a", Devices: open(), RegionPath: filepath.Join(cfg.Dir, "region")})
	if err != nil {
		t.Fatal(err)
	}
	running, end := context.WithCancel(t.Context())
	defer end()
	done := make(chan error, 1)
	go func() { done <- s.Run(running) }()
	if err := s.SetSettings(t.Context(), pool.SettingsChange{IndexBytes: new(int64(100 * testMiB)), Threshold: new(4)}); err != nil {
		t.Fatal(err)
	}
	if got, want := s.Stats().Settings, (control.PoolSettings{DedupIndex: 100 * testMiB, LLRRMThreshold: 4}); got != want {
		t.Errorf("%+v", got)
	}
	for _, when := range []string{"open", "released"} {
		if n := needsOf(cfg, &cfg.Guests[0]); n.index != 100*testMiB {
			t.Errorf("%s: an index of %d bytes", when, n.index)
		}
		if p, err := PlanMemory(cfg); err != nil || p.Index != 64*testMiB {
			t.Errorf("%s: %+v, %v", when, p, err)
		}
		if grown := headroom(cfg, &cfg.Guests[0], 0) - before; grown != 62*testMiB {
			t.Errorf("%s: a takeover needs %d bytes more", when, grown)
		}
		// A region has its index already, of whatever size.
		if grown := headroom(cfg, &cfg.Guests[0], 64*testMiB) - before; grown != -2*testMiB || headroom(cfg, &cfg.Guests[0], testTiB) != before+grown {
			t.Errorf("%s: a takeover with the index needs %d bytes more", when, grown)
		}
		if when == "open" {
			if end(); <-done != nil {
				t.Fatal("the pool's loop failed")
			}
			if err := s.Release(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// As many queues as the settings allow a machine, the server of its disk can serve.
func TestVhostQueuesFit(t *testing.T) {
	if config.MaxVhostQueues > vhostuser.MaxQueues {
		t.Errorf("settings allow %d queues, a server takes %d", config.MaxVhostQueues, vhostuser.MaxQueues)
	}
}
