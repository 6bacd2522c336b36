package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/region"
	"github.com/pollux-storage/pollux/internal/restart"
)

// lives are guests that open the pool of an identity one after the other.
type lives struct {
	t   *testing.T
	cfg *config.Config
	g   *Guest
	ten *tenancy
	end func()
}

// newLives makes the pool of a, on so many files of which each keeps as many copies.
func newLives(t *testing.T, files, copies int) *lives {
	t.Helper()
	cfg := &config.Config{Dir: t.TempDir()}
	text := fmt.Sprintf("log: 16MiB\ncache: 1MiB\nguests: [{name: a, port: 1, pool: {size: 64MiB, copies: %d, devices: [", copies)
	for n := range files {
		path := filepath.Join(cfg.Dir, fmt.Sprint("disk", n))
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 256<<20)); err != nil {
			t.Fatal(err)
		}
		text += path + ","
	}
	if err := os.WriteFile(filepath.Join(cfg.Dir, "config.yaml"), []byte(text+"]}}, {name: b, port: 1, pool: {manual: true}}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(cfg.Dir, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.MkdirAll(cfg.RunDir(), 0o700), os.MkdirAll(cfg.RegionDir, 0o700)); err != nil {
		t.Fatal(err)
	}
	l := &lives{t: t, cfg: cfg}
	if how := l.begin(); how.Why == "" || !how.Quiet {
		t.Errorf("a pool that was just made: %+v", how)
	}
	l.die()
	l.cfg.Guests[0].Pool.Create = false
	return l
}

// open opens the pool by the settings as they are.
func (l *lives) open() error {
	l.t.Helper()
	if err := l.cfg.WriteEffective(); err != nil {
		l.t.Fatal(err)
	}
	l.g = &Guest{opt: Options{Name: "a", Storage: NewPools(l.cfg, 1<<20)}, cfg: l.cfg, log: quiet(), inputs: make(chan func(), 256), tenants: map[string]*tenancy{}}
	t, err := l.g.openTenancy(partner.Action{Identity: "a", Term: 1}, &stopwatch{at: time.Now()})
	if err != nil {
		l.g.wg.Wait()
		return err
	}
	l.ten = t
	ctx, cancel := context.WithCancel(t.ctx)
	done := make(chan error, 1)
	go func() { done <- t.store.Run(ctx) }()
	l.end = func() {
		cancel()
		if err := <-done; err != nil {
			l.t.Error(err)
		}
	}
	return nil
}

// begin is open, and tells how it was opened. The guest keeps a record.
func (l *lives) begin() Opened {
	l.t.Helper()
	if err := l.open(); err != nil {
		l.t.Fatal(err)
	}
	r, err := l.g.newRecord(l.ten)
	if err != nil {
		l.t.Fatal(err)
	}
	if old, err := readRecord(l.cfg, "a"); err == nil {
		r.Number = old.Number
	}
	r.Number++
	if err := l.g.writeRecord(l.ten, r); err != nil {
		l.t.Fatal(err)
	}
	return l.ten.store.Opened()
}

// die ends a guest: the region is left.
func (l *lives) die() {
	l.t.Helper()
	l.end()
	if err := l.ten.store.Release(); err != nil {
		l.t.Fatal(err)
	}
	l.ten.cancel()
	l.g.wg.Wait()
}

// onlyFile takes the record out of the region, so that the file counts.
func (l *lives) onlyFile() {
	l.t.Helper()
	r, err := region.Open(l.cfg.RegionPath("a"), false)
	if err != nil {
		l.t.Fatal(err)
	}
	for _, s := range r.Sections(region.SectionRestart) {
		if err := r.RemoveSection(s); err != nil {
			l.t.Fatal(err)
		}
	}
	if err := r.Close(); err != nil {
		l.t.Fatal(err)
	}
}

// edit changes the record.
func (l *lives) edit(change func(r *restart.Record)) {
	l.t.Helper()
	l.onlyFile()
	r, err := restart.Read(restart.Path(l.cfg.Dir, "a"))
	if err != nil {
		l.t.Fatal(err)
	}
	change(r)
	enc, err := r.Encode()
	if err == nil {
		err = restart.Write(restart.Path(l.cfg.Dir, "a"), enc)
	}
	if err != nil {
		l.t.Fatal(err)
	}
}

// bytes changes the record's file.
func (l *lives) bytes(change func(b []byte) []byte) {
	l.t.Helper()
	l.onlyFile()
	path := restart.Path(l.cfg.Dir, "a")
	b, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, change(b), 0o600)
	}
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *lives) disk(n int) string { return l.cfg.Guests[0].Pool.Devices[n] }

// replaced puts a copy of a file in its place.
func copyOver(t *testing.T, path string) {
	t.Helper()
	from, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	to, err := os.Create(path + ".new")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(to, from); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(from.Close(), to.Close(), os.Rename(path+".new", path)); err != nil {
		t.Fatal(err)
	}
}

// Every change between two lives leads to the way that it must, and after that the pool is
// opened by a record again.
func TestRestartRecord(t *testing.T) {
	for _, tt := range []struct {
		what  string
		alive func(l *lives) // while the record's guest lives, after it was written
		dead  func(l *lives)
		why   string // that it is opened without a record; empty: it is opened by one
		fails string // it cannot be opened
	}{
		{what: "nothing"},
		{what: "only the file has it", dead: (*lives).onlyFile},
		{what: "only the region has it", dead: func(l *lives) { l.g.forgetRecord("a") }},
		{what: "the file is damaged", dead: func(l *lives) {
			if err := os.WriteFile(restart.Path(l.cfg.Dir, "a"), []byte("PLXrestr"), 0o600); err != nil {
				l.t.Fatal(err)
			}
		}},
		{what: "none is left", dead: func(l *lives) { l.onlyFile(); l.g.forgetRecord("a") }, why: "there is no restart record"},
		{what: "device replaced", dead: func(l *lives) { copyOver(l.t, l.disk(1)) }, why: "disk1 is another one than before"},
		{what: "first device replaced", dead: func(l *lives) { copyOver(l.t, l.disk(0)) }, why: "disk0 is another one than before"},
		{what: "device grown", dead: func(l *lives) {
			if err := os.Truncate(l.disk(1), 300<<20); err != nil {
				l.t.Fatal(err)
			}
		}, why: "disk1 has 314572800 bytes and had 268435456"},
		{what: "device shrunk", dead: func(l *lives) {
			if err := os.Truncate(l.disk(1), 200<<20); err != nil {
				l.t.Fatal(err)
			}
		}, fails: "has shrunk"},
		{what: "device missing", dead: func(l *lives) {
			if err := os.Remove(l.disk(1)); err != nil {
				l.t.Fatal(err)
			}
		}, fails: "no such file"},
		{what: "device not in the settings", dead: func(l *lives) {
			l.cfg.Guests[0].Pool.Devices = l.cfg.Guests[0].Pool.Devices[:2]
		}, fails: "is missing"},
		{what: "device added", alive: func(l *lives) { l.add() }, why: "settings have changed: guest.pool"},
		{what: "device is being added", dead: func(l *lives) { l.cfg.Guests[0].Pool.Adding = 1 }, why: "a device is being added"},
		{what: "device is being removed", dead: func(l *lives) { l.cfg.Guests[0].Pool.Removing = []string{l.disk(2)} }, why: "a device is being removed"},
		{what: "loss is accepted", dead: func(l *lives) { l.cfg.Guests[0].Pool.AcceptLoss = true }, why: "loss is accepted"},
		{what: "address", dead: func(l *lives) { l.cfg.Guests[0].Address = "127.0.0.9" }, why: "settings have changed: guest.address"},
		{what: "port", dead: func(l *lives) { l.cfg.Guests[0].Port = new(int) }, why: "settings have changed: guest.port"},
		{what: "settings of the pair", dead: func(l *lives) { l.cfg.Cleaner.Off = !l.cfg.Cleaner.Off }, why: "settings have changed: cleaner"},
		{what: "settings of the partner", dead: func(l *lives) { l.cfg.Guests[1].Address = "127.0.0.9" }},
		{what: "program", dead: func(l *lives) { l.edit(func(r *restart.Record) { r.Program = "1:2:3:4" }) }, why: "another program"},
		{what: "boot", dead: func(l *lives) { l.edit(func(r *restart.Record) { r.BootID = "another" }) }, why: "booted"},
		{what: "identity", dead: func(l *lives) { l.edit(func(r *restart.Record) { r.Identity = "b" }) }, why: "of identity b"},
		{what: "pool", dead: func(l *lives) { l.edit(func(r *restart.Record) { r.Pool[0]++ }) }, why: "does not belong to the pool"},
		{what: "superblock", dead: func(l *lives) { l.edit(func(r *restart.Record) { r.Generation += 9 }) }, why: "the newest that can be read"},
		{what: "version", dead: func(l *lives) {
			l.bytes(func(b []byte) []byte {
				ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindRestart, Version: binary.LittleEndian.Uint16(b[8:]) + 1, Length: len(b)})
				return b
			})
		}, why: "format version is newer"},
		{what: "damage", dead: func(l *lives) { l.bytes(func(b []byte) []byte { b[len(b)/2] ^= 4; return b }) }, why: "checksum"},
		{what: "volumes", alive: func(l *lives) {
			st, ctx := l.ten.store, l.t.Context()
			if err := errors.Join(st.CreateVolume(ctx, "v", 1<<20, 0), st.CreateVolume(ctx, "w", 1<<20, 0), st.ResizeVolume(ctx, "v", 2<<20), st.DeleteVolume(ctx, "w")); err != nil {
				l.t.Fatal(err)
			}
		}},
		{what: "settings of the pool", alive: func(l *lives) {
			bytes := int64(1 << 20)
			if err := l.ten.store.SetSettings(l.t.Context(), pool.SettingsChange{IndexBytes: &bytes}); err != nil {
				l.t.Fatal(err)
			}
		}},
	} {
		t.Run(tt.what, func(t *testing.T) {
			l := newLives(t, 3, 1)
			l.t = t
			l.begin()
			if tt.alive != nil {
				tt.alive(l)
			}
			l.die()
			if tt.dead != nil {
				tt.dead(l)
			}
			if tt.fails != "" {
				if err := l.open(); err == nil || !strings.Contains(err.Error(), tt.fails) {
					t.Fatalf("%v", err)
				}
				return
			}
			how := l.begin()
			if tt.why == "" && how.Why != "" || !strings.Contains(how.Why, tt.why) || how.Why == "" && how.Number == 0 {
				t.Errorf("%+v", how)
			}
			vols := l.ten.store.Volumes()
			if tt.what == "volumes" && (len(vols) != 1 || vols[0].Name != "v" || vols[0].Size != 2<<20) {
				t.Errorf("%+v", vols)
			}
			c, err := l.ten.store.Check(t.Context())
			if err != nil || !c.OK {
				t.Errorf("%+v, %v", c, err)
			}
			l.die()
			if change(&l.cfg.Guests[0].Pool) != nil {
				return
			}
			if how := l.begin(); how.Why != "" {
				t.Errorf("the next time: %+v", how)
			}
			l.die()
		})
	}
}

// add adds a device to the pool, as the agent and the guest do together.
func (l *lives) add() {
	l.t.Helper()
	path := filepath.Join(l.cfg.Dir, "disk9")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 256<<20)); err != nil {
		l.t.Fatal(err)
	}
	d, err := l.g.openOne(path, time.Now(), nil)
	if err == nil {
		err = l.ten.store.AddDevice(l.t.Context(), d)
	}
	if err != nil {
		l.t.Fatal(err)
	}
	l.cfg.Guests[0].Pool.Devices = append(l.cfg.Guests[0].Pool.Devices, path)
}

// A device whose label is another one is found out while the pool serves, which then ends; and
// nobody opens the pool by that record any more.
func TestRestartRecordUntrue(t *testing.T) {
	l := newLives(t, 3, 1)
	l.begin()
	l.die()
	var label [block.Size]byte
	f, err := os.OpenFile(l.disk(2), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(label[:], 0); err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{0, 128 * block.Size} {
		if _, err := f.WriteAt(make([]byte, block.Size), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.cfg.WriteEffective(); err != nil {
		t.Fatal(err)
	}
	g := &Guest{opt: Options{Name: "a", Storage: NewPools(l.cfg, 1<<20)}, cfg: l.cfg, log: quiet(), inputs: make(chan func(), 256), tenants: map[string]*tenancy{}}
	ten, err := g.openTenancy(partner.Action{Identity: "a", Term: 1}, &stopwatch{at: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	if how := ten.store.Opened(); how.Why != "" {
		t.Errorf("%+v", how)
	}
	untrue := (*pool.RecordError)(nil)
	if err := ten.store.Run(t.Context()); !errors.As(err, &untrue) || !strings.Contains(err.Error(), l.disk(2)) {
		t.Errorf("%v", err)
	}
	g.forgetRecord("a") // as begin does
	if err := ten.store.Release(); err != nil {
		t.Fatal(err)
	}
	ten.cancel()
	g.wg.Wait()
	if err := l.open(); !errors.Is(err, ErrNoPool) {
		t.Errorf("%v", err)
	}
	for _, at := range []int64{0, 128 * block.Size} {
		if _, err := f.WriteAt(label[:], at); err != nil {
			t.Fatal(err)
		}
	}
	if how := l.begin(); !strings.Contains(how.Why, "no restart record") || how.Quiet {
		t.Errorf("%+v", how)
	}
	l.die()
}

// Where copies are kept, one that is lost or replaced is found out, and the pool goes on with
// the other.
func TestRestartRecordOfCopies(t *testing.T) {
	for what, change := range map[string]func(l *lives){
		"lost": func(l *lives) {
			if err := os.Remove(l.disk(1)); err != nil {
				l.t.Fatal(err)
			}
		},
		"replaced": func(l *lives) { copyOver(l.t, l.disk(1)) },
		"nothing":  func(*lives) {},
	} {
		t.Run(what, func(t *testing.T) {
			l := newLives(t, 2, 2)
			l.t = t
			l.begin()
			r, err := readRecord(l.cfg, "a")
			if err != nil || len(r.Devices) != 1 || len(r.Devices[0].Copies) != 2 {
				t.Fatalf("%+v, %v", r, err)
			}
			l.die()
			change(l)
			how := l.begin()
			if want := map[string]string{"lost": "disk1 is missing", "replaced": "disk1 is another one", "nothing": ""}[what]; !strings.Contains(how.Why, want) || want == "" && how.Why != "" {
				t.Errorf("%+v", how)
			}
			l.die()
		})
	}
}

// The plan of the memory is the same by a record and without.
func TestPlanByRecord(t *testing.T) {
	l := newLives(t, 3, 1)
	l.begin()
	l.die()
	set := &l.cfg.Guests[0]
	if _, err := usableRecord(l.cfg, set); err != nil {
		t.Fatal(err)
	}
	by := needsOf(l.cfg, set)
	l.onlyFile()
	l.g.forgetRecord("a")
	if without := needsOf(l.cfg, set); by.log != without.log || by.index != without.index || by.flash != without.flash || !slices.Equal(by.blocks, without.blocks) {
		t.Errorf("%+v by the record, %+v without", by, without)
	}
	if n, ok := needsByRecord(&restart.Record{Devices: []restart.Device{{}}}); ok {
		t.Errorf("by a record without a label: %+v", n)
	}
}

// Records are written while a pool serves, and again when something has changed.
func TestKeepRecord(t *testing.T) {
	l := newLives(t, 2, 1)
	l.g.forgetRecord("a")
	if err := l.open(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); l.g.keepRecord(l.ten, nil) }()
	until := func(what string, good func(r *restart.Record) bool) uint64 {
		t.Helper()
		for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
			r, err := restart.Read(restart.Path(l.cfg.Dir, "a"))
			if err == nil && good(r) {
				if in, err := pool.ReadRecord(l.cfg.RegionPath("a")); err != nil || in.Number < r.Number {
					t.Fatalf("in the region: %+v, %v", in, err)
				}
				return r.Number
			}
			if time.Since(begun) > 20*time.Second {
				t.Fatalf("%s: %+v, %v", what, r, err)
			}
		}
	}
	first := until("the first", func(*restart.Record) bool { return true })
	if err := l.ten.store.CreateVolume(t.Context(), "v", 1<<20, 0); err != nil {
		t.Fatal(err)
	}
	if n := until("a volume", func(r *restart.Record) bool { return len(r.Volumes) == 1 && r.Volumes[0].Name == "v" }); n <= first {
		t.Errorf("number %d after %d", n, first)
	}
	l.ten.cancel()
	<-done
	l.end()
	if err := l.ten.store.Release(); err != nil {
		t.Fatal(err)
	}
	l.g.wg.Wait()
}
