package guest

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/partner"
)

// served is a bench whose guest serves identity a with pool-a.
func served(t *testing.T) (*bench, *control.Client) {
	t.Helper()
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindRegion)
	b.expect(partner.KindServing)
	return b, b.client()
}

// edit changes the settings in force, as the agent does.
func (b *bench) edit(change func(p *config.Pool)) {
	b.t.Helper()
	cfg, err := config.ReadEffective(b.cfg.Dir)
	if err == nil {
		change(&cfg.Guest("a").Pool)
		err = cfg.WriteEffective()
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// An exported pool is closed as exported, its region is announced to be gone, and
// the identity is served on, without volumes. Another pool then takes its place.
func TestExportAndImport(t *testing.T) {
	b, c := served(t)
	ctx, st := t.Context(), b.storage.last()
	if _, err := c.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 1 << 20, Guest: "a"}); err != nil {
		t.Fatal(err)
	}
	p, err := c.ExportPool(ctx, "pool-a", control.PoolExport{})
	if err != nil || p.State != control.FoundExported || p.Guest != "a" || len(p.Devices) != 1 {
		t.Fatalf("%+v, %v", p, err)
	}
	if how := st.how.Load(); how != "exported" {
		t.Errorf("the store was %v", how)
	}
	if m := b.expect(partner.KindRegion); m.Region.Path != "" || m.Identity != "a" || m.Term != 1 {
		t.Errorf("announced: %+v", m)
	}
	if b.locked("a") {
		t.Error("the device is locked still")
	}
	if s, err := c.Status(ctx); err != nil || len(s.Guests[0].Serves) != 1 || len(s.Guests[0].Pools) != 0 || len(s.Guests[0].Exports) != 0 {
		t.Errorf("%+v, %v", s, err)
	}
	// The agent did not record it: again is no error.
	if p, err := c.ExportPool(ctx, "pool-a", control.PoolExport{}); err != nil || p.State != control.FoundExported {
		t.Errorf("again: %+v, %v", p, err)
	}
	if _, err := c.ExportPool(ctx, "pool-x", control.PoolExport{}); control.KindOf(err) != control.KindNotFound {
		t.Errorf("another: %v", err)
	}

	// Without the agent's mark nothing is labelled.
	if _, err := c.ImportPool(ctx, control.PoolImport{Guest: "a"}); control.KindOf(err) != control.KindInvalid {
		t.Errorf("%v", err)
	}
	other := filepath.Join(b.cfg.Dir, "other")
	if err := os.WriteFile(other, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	b.storage.mu.Lock()
	b.storage.labels[other] = Label{Pool: block.PoolID{7}, Name: "theirs", Identity: "z"}
	b.storage.mu.Unlock()
	set := func(id string) {
		b.edit(func(p *config.Pool) {
			p.Name, p.Devices, p.Create, p.Import = "tank", []string{other}, false, &config.Import{ID: id, Epoch: 3}
		})
	}
	set(block.PoolID{8}.String())
	if _, err := c.ImportPool(ctx, control.PoolImport{Guest: "a"}); err == nil || !strings.Contains(err.Error(), "another pool") {
		t.Errorf("%v", err)
	}
	set(block.PoolID{7}.String())
	p, err = c.ImportPool(ctx, control.PoolImport{Guest: "a"})
	if err != nil || p.Name != "tank" || p.State != "open" {
		t.Fatalf("%+v, %v", p, err)
	}
	if m := b.expect(partner.KindRegion); m.Region.Path == "" || m.Region.Pool != (block.PoolID{7}) {
		t.Errorf("announced: %+v", m)
	}
	if _, err := c.ImportPool(ctx, control.PoolImport{Guest: "a"}); control.KindOf(err) != control.KindRefused {
		t.Errorf("where there is a pool: %v", err)
	}
	if _, err := c.ExportPool(ctx, "pool-a", control.PoolExport{}); control.KindOf(err) != control.KindNotFound {
		t.Errorf("an export of long ago: %v", err)
	}
}

// Whoever opens a pool whose import was interrupted goes on with it.
func TestImportGoesOnAtOpen(t *testing.T) {
	b := newBench(t, func(c *config.Config) {
		p := &c.Guests[0].Pool
		p.Name, p.Create, p.Import = "tank", false, &config.Import{ID: block.PoolID{7}.String()}
	})
	dev := b.cfg.Guests[0].Pool.Devices[0]
	b.storage.mu.Lock()
	b.storage.labels[dev] = Label{Pool: block.PoolID{7}, Name: "theirs", Identity: "z"}
	b.storage.mu.Unlock()
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	if l := b.storage.labels[dev]; l.Name != "tank" || l.Identity != "a" {
		t.Errorf("%+v", l)
	}
}

// A pool that cannot be closed is given up, for whoever opens it next.
func TestExportFails(t *testing.T) {
	b, c := served(t)
	b.storage.last().refuse.Store(true)
	if _, err := c.ExportPool(t.Context(), "pool-a", control.PoolExport{}); control.KindOf(err) != control.KindNoSpace {
		t.Errorf("%v", err)
	}
	if why := b.failure(); !strings.Contains(why, "no space") {
		t.Error(why)
	}
	b.grant("a", partner.BasisReleased, 2)
	b.expect(partner.KindServing)
}

// A command to hand over that comes while a pool is exported waits for the end of
// that, and then nothing is served here.
func TestReleaseDuringExport(t *testing.T) {
	b, c := served(t)
	st := b.storage.last()
	wait, ending := make(chan struct{}), make(chan struct{})
	st.finish.Store(&wait)
	st.ending.Store(&ending)
	exported := make(chan error, 1)
	go func() {
		_, err := c.ExportPool(context.Background(), "pool-a", control.PoolExport{})
		exported <- err
	}()
	b.expect(partner.KindRegion)
	<-ending // it has begun, and a release cannot come before it any more
	b.line.Send(partner.Message{Kind: partner.KindRelease, Identity: "a", Term: 1, Reason: "test"})
	select {
	case m := <-b.got:
		if m.Kind == partner.KindReleased {
			t.Fatal("released while the pool is open")
		}
	case <-time.After(100 * time.Millisecond):
	}
	close(wait)
	b.expect(partner.KindReleased)
	if err := <-exported; err != nil || st.how.Load() != "exported" {
		t.Errorf("%v, %v", err, st.how.Load())
	}
	if s, err := c.Status(t.Context()); err != nil || len(s.Guests[0].Serves) != 0 {
		t.Errorf("%+v, %v", s, err)
	}
	b.grant("a", partner.BasisReleased, 2)
	b.expect(partner.KindServing)
}
