package guest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/pool"
)

const (
	testMiB = 1 << 20
	testTiB = 1 << 40
)

func settingsOf(t *testing.T, text string) *config.Config {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// A full pool of 10 TiB fits into 1 GiB, and its partner beside it into 2.
func TestMemoryOfLargePools(t *testing.T) {
	large := []uint64{10 * testTiB / block.Size}
	cfg := settingsOf(t, "memory: 1GiB")
	p, err := plan(cfg, []poolNeeds{{blocks: large}, {blocks: []uint64{64 << 30 / block.Size}}})
	if err != nil {
		t.Fatal(err)
	}
	if p.Sum() != 1<<30 || p.Cache < 120*testMiB || p.Counts < 340*testMiB || p.Counts > 360*testMiB {
		t.Errorf("%+v", p)
	}
	if n := p.HeapLimit(); n <= 0 || n >= p.Work {
		t.Errorf("the heap may take %d bytes of %d", n, p.Work)
	}
	cfg = settingsOf(t, "memory: 2GiB")
	if p, err = plan(cfg, []poolNeeds{{blocks: large}, {blocks: large}}); err != nil || p.Sum() != 2<<30 {
		t.Errorf("%+v, %v", p, err)
	}
}

// Explicit sizes win; what does not fit is refused with what would.
func TestMemorySettings(t *testing.T) {
	cfg := settingsOf(t, "{memory: 1GiB, log: 64MiB, cache: 100MiB}")
	p, err := PlanMemory(cfg)
	if err != nil || p.Cache != 2*100*testMiB || p.PoolCache() != 100*testMiB || p.Regions() < p.Logs+2*p.Index+p.Cache || p.Logs < 2*64*testMiB || p.Logs > 2*70*testMiB {
		t.Errorf("%+v, %v", p, err)
	}
	cfg = settingsOf(t, "{memory: 256MiB, log: 256MiB}")
	if p, err = PlanMemory(cfg); err == nil {
		t.Fatalf("%+v fits", p)
	}
	for _, want := range []string{"memory: 256MiB", "operation logs", "reference counts", "cache", "at least "} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q lacks %q", err, want)
		}
	}
	// Without the setting nothing is limited.
	p, err = PlanMemory(settingsOf(t, "log: 32MiB"))
	if err != nil || p.PoolCache() != 256*testMiB || p.HeapLimit() != 0 {
		t.Errorf("%+v, %v", p, err)
	}
}

// What the error names suffices, and less does not: also where a log grows with
// the memory.
func TestLeastMemory(t *testing.T) {
	for _, text := range []string{"{memory: 100MiB}", "{memory: 100MiB, log: 256MiB}", "{memory: 100MiB, cache: 100MiB}"} {
		_, err := PlanMemory(settingsOf(t, text))
		if err == nil {
			t.Fatalf("%s suffices", text)
		}
		_, rest, _ := strings.Cut(err.Error(), "at least ")
		named, _, _ := strings.Cut(rest, ":")
		least, err := config.ParseSize(named)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range []config.Size{least, least - testMiB} {
			p, err := PlanMemory(settingsOf(t, strings.Replace(text, "100MiB", m.String(), 1)))
			if (err == nil) != (m == least) {
				t.Errorf("%s with %s: %+v, %v", text, m, p, err)
			}
		}
	}
}

// A log that exists counts as large as its pool's label says, and devices as
// large as they are.
func TestMemoryOfWhatExists(t *testing.T) {
	cfg := settingsOf(t, "{memory: 2GiB, guests: [{name: a, pool: {devices: [disk]}}]}")
	disk := filepath.Join(cfg.Dir, "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, testTiB); err != nil {
		t.Fatal(err)
	}
	n := needsOf(cfg, &cfg.Guests[0])
	if len(n.blocks) != 1 || n.blocks[0] != testTiB/block.Size || n.log != 0 {
		t.Errorf("%+v", n)
	}
	st := NewPools(cfg, 1<<20)
	dev, err := openLocked(disk, time.Now(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll([]hpdi.Device{dev})
	if err := st.Create(t.Context(), CreateSpec{Name: "p", Identity: "a", Devices: []hpdi.Device{dev}, LogBytes: 24 * testMiB}); err != nil {
		t.Fatal(err)
	}
	if n := needsOf(cfg, &cfg.Guests[0]); n.log != 24*testMiB {
		t.Errorf("the log has %d bytes", n.log)
	}
}

// The copies of a mirror count once, also when one of them is missing, and say how
// large the log is.
func TestMemoryOfMirrors(t *testing.T) {
	cfg := settingsOf(t, "{memory: 2GiB, guests: [{name: a, pool: {devices: [one, two], copies: 2}}]}")
	set := &cfg.Guests[0]
	for _, path := range set.Pool.Devices {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, testTiB); err != nil {
			t.Fatal(err)
		}
	}
	if n := needsOf(cfg, set); len(n.blocks) != 1 || n.blocks[0] != testTiB/block.Size || n.log != 0 {
		t.Errorf("yet to be made: %+v", n)
	}
	devs, err := disks(&set.Pool, opening{open: func(path string) (hpdi.Device, error) { return openLocked(path, time.Now(), nil) }, without: func(path string, why error) { t.Error(path, why) }})
	if err != nil {
		t.Fatal(err)
	}
	if devs, err = makeMirrors(devs, 2, memory{}); err != nil {
		t.Fatal(err)
	}
	st := NewPools(cfg, 1<<20)
	if err := st.Create(t.Context(), CreateSpec{Name: "p", Identity: "a", Devices: devs, LogBytes: 24 * testMiB}); err != nil {
		t.Fatal(err)
	}
	closeAll(devs)
	for _, missing := range []string{"", set.Pool.Devices[1]} {
		if missing != "" {
			if err := os.Remove(missing); err != nil {
				t.Fatal(err)
			}
		}
		if n := needsOf(cfg, set); len(n.blocks) != 1 || n.blocks[0] != testTiB/block.Size-block.TrackBlocks || n.log != 24*testMiB {
			t.Errorf("without %q: %+v", missing, n)
		}
		g := &Guest{opt: Options{Storage: st}}
		said, err := g.reach(set.Pool.Devices, "a")
		if err != nil || strings.Contains(said, "without") != (missing != "") {
			t.Errorf("without %q: %q, %v", missing, said, err)
		}
	}
	if err := os.Remove(set.Pool.Devices[0]); err != nil {
		t.Fatal(err)
	}
	g := &Guest{opt: Options{Storage: st}}
	if _, err := g.reach(set.Pool.Devices, "a"); err == nil || !strings.Contains(err.Error(), set.Pool.Devices[0]) {
		t.Errorf("without any: %v", err)
	}
}

// An index of fingerprints is planned for each pool, as large as it will be, and what is
// in use of it is not work.
func TestMemoryOfIndexes(t *testing.T) {
	big, small := []uint64{testTiB / block.Size}, []uint64{testTiB / block.Size / 4096, 1024} // 256 MiB and 4
	for _, x := range []struct {
		text string
		want int64
	}{
		{"{}", 32*testMiB + 2*testMiB}, // a region consists of huge pages
		{"{dedup_index: 100MiB}", 64*testMiB + 2*testMiB},
		{"{dedup_index: 64KiB}", 2 * 2 * testMiB},
		{"{memory: 512MiB}", 8*testMiB + 2*testMiB},
		{"{memory: 4GiB}", 32*testMiB + 2*testMiB},
	} {
		cfg := settingsOf(t, x.text)
		p, err := plan(cfg, []poolNeeds{{blocks: big}, {blocks: small}})
		if err != nil || p.Index != x.want {
			t.Errorf("%s: %d bytes, %v", x.text, p.Index, err)
		}
		if p.Limit > 0 && p.Sum() != p.Limit {
			t.Errorf("%s: the parts are %d bytes of %d", x.text, p.Sum(), p.Limit)
		}
		var part control.MemoryPart
		// One lies in a region, and one has memory of the guest.
		pools := []control.PoolStatus{{Dedup: control.DedupStatus{IndexBytes: 5, IndexKept: 6}, RegionKept: 4}, {Cache: control.CacheStatus{Bytes: 9, Used: 7}}, {Dedup: control.DedupStatus{IndexBytes: 2, IndexOwn: 2}, Cache: control.CacheStatus{Bytes: 5, Own: 5, Used: 3}}}
		for _, q := range p.used(control.MemoryStatus{Anonymous: 100, Region: 50}, pools) {
			switch q.Name {
			case partLogs:
				if q.Used != 50-6-9-4 {
					t.Errorf("logs have %d bytes", q.Used)
				}
			case partKept:
				if q.Used != 4 || q.Planned != 2*(pool.JournalMemory(cfg.Points.FoldLimit)+pool.SessionMemory) || p.Regions() < p.Logs+p.Kept {
					t.Errorf("%+v of %+v", q, p)
				}
			case partIndex:
				part = q
			case partWork:
				if q.Used != 100-2-3 {
					t.Errorf("work has %d bytes", q.Used)
				}
			}
		}
		if part.Planned != x.want || part.Used != 6+2 || part.Why == "" {
			t.Errorf("%s: %+v", x.text, part)
		}
	}
	if _, err := plan(settingsOf(t, "{memory: 512MiB, dedup_index: 512MiB}"), []poolNeeds{{blocks: []uint64{testTiB / block.Size}}}); err == nil || !strings.Contains(err.Error(), partIndex) {
		t.Errorf("an index as large as the memory: %v", err)
	}
}

// Where a pool has flash, memory for it is planned, part of the heap's, and what it takes is
// told; nobody else hears of it.
func TestMemoryOfFlash(t *testing.T) {
	cfg := settingsOf(t, "memory: 1GiB")
	disks := []uint64{testTiB / block.Size}
	without, err := plan(cfg, []poolNeeds{{blocks: disks}, {blocks: disks}})
	if err != nil {
		t.Fatal(err)
	}
	with, err := plan(cfg, []poolNeeds{{blocks: disks, flash: 40 * testMiB}, {blocks: disks, flash: 8 * testMiB}})
	if err != nil || with.Flash != 48*testMiB || with.Sum() != without.Sum() || with.HeapLimit() != without.HeapLimit()+48*testMiB || with.Cache != without.Cache-48*testMiB {
		t.Errorf("%+v, %v", with, err)
	}
	pools := []control.PoolStatus{{Flash: &control.FlashStatus{Used: 3, Primaries: []control.FlashPrimary{{Collected: control.FlashCollected{Bytes: 100}}, {Collected: control.FlashCollected{Bytes: 200}}}}}, {}}
	told := map[string]control.MemoryPart{}
	for _, part := range with.used(control.MemoryStatus{Anonymous: 1000}, pools) {
		told[part.Name] = part
	}
	if f, w := told[partFlash], told[partWork]; f.Planned != 48*testMiB || f.Used != 348 || w.Used != 1000-348 {
		t.Errorf("%+v", told)
	}
	for _, part := range without.used(control.MemoryStatus{}, nil) {
		if part.Name == partFlash {
			t.Errorf("%+v", part)
		}
	}
}

// The memory for flash is planned by what the pool's devices say, whoever looks.
func TestMemoryOfAPoolWithFlash(t *testing.T) {
	cfg := settingsOf(t, "{memory: 2GiB, guests: [{name: a, pool: {devices: [disk, flash]}}]}")
	var paths []string
	for _, name := range []string{"disk", "flash"} {
		path := filepath.Join(cfg.Dir, name)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 256*testMiB)); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
	}
	st := NewPools(cfg, 1<<20)
	open := func(path string) hpdi.Device {
		dev, err := openLocked(path, time.Now(), nil)
		if err != nil {
			t.Fatal(err)
		}
		return dev
	}
	disk := open(paths[0])
	if err := st.Create(t.Context(), CreateSpec{Name: "p", Identity: "a", Devices: []hpdi.Device{disk}, LogBytes: 24 * testMiB}); err != nil {
		t.Fatal(err)
	}
	closeAll([]hpdi.Device{disk})
	if n := needsOf(cfg, &cfg.Guests[0]); n.flash != 0 {
		t.Errorf("without flash: %d bytes", n.flash)
	}
	s, err := st.Open(t.Context(), OpenSpec{Identity: "a", Owner: "a", Devices: []hpdi.Device{open(paths[0])}, RegionPath: filepath.Join(cfg.Dir, "region")})
	if err != nil {
		t.Fatal(err)
	}
	running, end := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(running) }()
	err = s.AddFlash(t.Context(), open(paths[1]), 0)
	record, e := s.Restart(t.Context())
	err = errors.Join(err, e)
	end()
	if err = errors.Join(err, <-done, s.Release()); err != nil {
		t.Fatal(err)
	}
	for i := range record.Devices {
		record.Devices[i].Copies[0].File.Size = 256 * testMiB
	}
	if n, ok := needsByRecord(record); !ok || n.disks != 1 || !reflect.DeepEqual(n, needsOf(cfg, &cfg.Guests[0])) {
		t.Errorf("%+v by a record, %+v without", n, needsOf(cfg, &cfg.Guests[0]))
	}
	if n := needsOf(cfg, &cfg.Guests[0]); n.flash < 32*testMiB || n.flash > 33*testMiB {
		t.Errorf("with flash: %d bytes", n.flash)
	}
	if n := needsOf(cfg, &cfg.Guests[0]); n.flash < 32*testMiB+256*testMiB/pool.DefaultSetBytes*flashSet {
		t.Errorf("the table of flash is left out: %d bytes", n.flash)
	}
	if p, err := PlanMemory(cfg); err != nil || p.Flash < 32*testMiB {
		t.Errorf("%+v, %v", p, err)
	}
}
