package collect

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

var update = flag.Bool("update", false, "write golden files anew")

var testIdentity = Identity{Pool: block.PoolID{1, 2, 3}, Epoch: 7, Generation: 9}

var testGeometry = Geometry{gib, 256 * kib}

// filled returns a collector that has counted something, and the time then.
func filled(t testing.TB, sets int64) (*Collector, time.Time) {
	c := newCollector(t, testGeometry, nil)
	r := c.NewRecorder()
	now := start
	for i := range 25 * sets {
		now = now.Add(25 * time.Minute / time.Duration(25*sets))
		set := (i * 2654435761 >> 7) % sets
		r.Record(hpdi.OpRead, set*7%4096*256*kib+i%9*16*kib, 4*kib, now)
		if i%5 == 0 {
			r.Record(hpdi.OpWrite, set*7%4096*256*kib+i%3*64*kib, 16*kib, now)
		}
		if i%500 == 0 {
			c.Tick(now)
		}
	}
	for i := range int64(64) {
		r.Record(hpdi.OpRead, 900*mib+i*64*kib, 64*kib, now)
	}
	c.Snapshot(now.Add(6*time.Second), nil)
	return c, now.Add(6 * time.Second)
}

// What is loaded is what was saved, also much later, and goes on.
func TestSaveAndLoad(t *testing.T) {
	c, now := filled(t, 100)
	saved := c.Save(testIdentity, mib, now)
	want := c.Snapshot(now, nil)
	if len(want.Stats) < 20 {
		t.Fatalf("only %d sets", len(want.Stats))
	}
	later := now.Add(100 * time.Hour)
	d := newCollector(t, testGeometry, nil)
	d.NewRecorder().Record(hpdi.OpRead, 5*mib+4096, 4096, later) // forgotten
	if err := d.Load(saved, testIdentity.Pool, later); err != nil {
		t.Fatal(err)
	}
	got := d.Snapshot(later, nil)
	if got.Windows != want.Windows || !reflect.DeepEqual(got.Stats, want.Stats) {
		t.Errorf("loaded %v windows %+v\nsaved %v windows %+v", got.Windows, got.Stats, want.Windows, want.Stats)
	}
	d.table.check(t)
	if again := d.Save(testIdentity, mib, later); !bytes.Equal(again, saved) {
		t.Error("what was loaded is not saved as it was")
	}
	r := d.NewRecorder()
	r.Record(hpdi.OpWrite, 0, 4096, later)
	later = later.Add(10 * time.Second) // until then it may be the beginning of a run
	before, _ := c.Snapshot(now.Add(10*time.Second), nil).Find(0)
	if one, _ := d.Snapshot(later, nil).Find(0); one.Writes <= before.Writes || one.Age > 10*time.Second {
		t.Errorf("after one more write %+v, before %+v", one, before)
	}
}

// With other windows, less room or a limit of the bytes the state is still of use.
func TestLoadIntoOther(t *testing.T) {
	c, now := filled(t, 1100)
	whole := c.Snapshot(now, nil)
	all, _ := sum(whole)
	saved := c.Save(testIdentity, 4*mib, now)

	d := newCollector(t, testGeometry, func(p *Params) { p.Window = time.Hour })
	if err := d.Load(saved, testIdentity.Pool, now); err != nil {
		t.Fatal(err)
	}
	got, _ := sum(d.Snapshot(now, nil))
	near(t, "accesses in windows six times as long", got, 6*all, 0.001)

	d = newCollector(t, testGeometry, func(p *Params) { p.Memory = minMemory })
	if err := d.Load(saved, testIdentity.Pool, now); err != nil {
		t.Fatal(err)
	}
	d.table.check(t)
	if st := d.Status(); st.Sets != st.Most || st.Sets >= len(whole.Stats) {
		t.Errorf("in less memory %+v", st)
	}

	part := c.Save(testIdentity, 100*savedBytes, now)
	if len(part) > 100*savedBytes || len(part) < 90*savedBytes {
		t.Errorf("%d bytes, at most %d", len(part), 100*savedBytes)
	}
	if err := d.Load(part, testIdentity.Pool, now); err != nil {
		t.Fatal(err)
	}
	least, hottest := d.Snapshot(now, nil), 0.0
	for i := range whole.Stats {
		if _, ok := least.Find(whole.Stats[i].Set); !ok {
			hottest = max(hottest, whole.Stats[i].Accesses())
		}
	}
	for i := range least.Stats {
		if n := least.Stats[i].Accesses(); n > 0 && n < hottest/4 {
			t.Errorf("a set with %g accesses was saved, one with %g was not", n, hottest)
		}
	}
	if b := c.Save(testIdentity, 0, now); d.Load(b, testIdentity.Pool, now) != nil || d.Status().Sets != 0 {
		t.Error("a state without sets is not loaded")
	}
}

// Every bit that changes is noticed, and leaves the collector as it is.
func TestDamaged(t *testing.T) {
	c, now := filled(t, 12)
	saved := c.Save(testIdentity, mib, now)
	want := c.Snapshot(now, nil)
	for i := range len(saved) * 8 {
		saved[i/8] ^= 1 << (i % 8)
		if err := c.Load(saved, testIdentity.Pool, now); err == nil {
			t.Fatalf("bit %d flipped unnoticed", i)
		}
		saved[i/8] ^= 1 << (i % 8)
	}
	seal := func(change func(p []byte)) []byte {
		p := bytes.Clone(saved)
		change(p[ondisk.HeaderSize:])
		ondisk.Seal(p, ondisk.Header{Kind: ondisk.KindAccess, Version: 1, Length: len(p), Pool: testIdentity.Pool})
		return p
	}
	other := newCollector(t, Geometry{gib, 512 * kib}, nil)
	newer := bytes.Clone(saved)
	ondisk.Seal(newer, ondisk.Header{Kind: ondisk.KindAccess, Version: 2, Length: len(newer), Pool: testIdentity.Pool})
	for _, tt := range []struct {
		name string
		err  error
		kind error
	}{
		{"nothing", c.Load(nil, testIdentity.Pool, now), ondisk.ErrMagic},
		{"cut short", c.Load(saved[:len(saved)-1], testIdentity.Pool, now), block.ErrCorrupt},
		{"another pool", c.Load(saved, block.PoolID{}, now), block.ErrInvalid},
		{"another device", other.Load(saved, testIdentity.Pool, now), block.ErrInvalid},
		{"newer", c.Load(newer, testIdentity.Pool, now), block.ErrUnsupported},
		{"set size", c.Load(seal(func(p []byte) { p[0] = 1 }), testIdentity.Pool, now), block.ErrCorrupt},
		{"window", c.Load(seal(func(p []byte) { p[23] = 0xff }), testIdentity.Pool, now), block.ErrCorrupt},
		{"decay", c.Load(seal(func(p []byte) { p[31] = 0xff }), testIdentity.Pool, now), block.ErrCorrupt},
		{"elapsed", c.Load(seal(func(p []byte) { p[39] = 0xff }), testIdentity.Pool, now), block.ErrCorrupt},
		{"windows", c.Load(seal(func(p []byte) { p[47] = 0xff }), testIdentity.Pool, now), block.ErrCorrupt},
		{"sets", c.Load(seal(func(p []byte) { p[58] = 0xff }), testIdentity.Pool, now), block.ErrCorrupt},
		{"no such set", c.Load(seal(func(p []byte) { p[67] = 0xff }), testIdentity.Pool, now), block.ErrCorrupt},
		{"order", c.Load(seal(func(p []byte) { copy(p[60+44:], p[60:68]) }), testIdentity.Pool, now), block.ErrCorrupt},
		{"negative", c.Load(seal(func(p []byte) { p[75] = 0xbf }), testIdentity.Pool, now), block.ErrCorrupt},
	} {
		if !errors.Is(tt.err, tt.kind) {
			t.Errorf("%s: %v", tt.name, tt.err)
		}
	}
	if got := c.Snapshot(now, nil); !reflect.DeepEqual(got, want) {
		t.Error("what could not be loaded has changed the collector")
	}
}

func TestGolden(t *testing.T) {
	c, now := filled(t, 3)
	got := hex.Dump(c.Save(testIdentity, mib, now))
	const file = "testdata/access.hex"
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != strings.ReplaceAll(string(want), "\r\n", "\n") {
		t.Errorf("the format has changed (-update writes it anew):\n%s", got)
	}
}

// Whatever is loaded, the collector works: it saves what it loads.
func FuzzLoad(f *testing.F) {
	c, now := filled(f, 3)
	f.Add(c.Save(testIdentity, mib, now), true)
	f.Fuzz(func(t *testing.T, p []byte, sealed bool) {
		if sealed && len(p) >= ondisk.HeaderSize {
			// The checksum would keep all changes out.
			p = bytes.Clone(p)
			ondisk.Seal(p, ondisk.Header{Kind: ondisk.KindAccess, Version: 1, Length: len(p), Pool: testIdentity.Pool})
		}
		d := newCollector(t, testGeometry, func(p *Params) { p.Memory = minMemory; p.HistoryWindows = 0 })
		if d.Load(p, testIdentity.Pool, now) != nil {
			return
		}
		d.table.check(t)
		r := d.NewRecorder()
		r.Record(hpdi.OpWrite, 0, mib, now)
		s := d.Snapshot(now.Add(time.Hour), nil)
		for i := range s.Stats {
			if st := &s.Stats[i]; !(st.Accesses() >= 0) || !(st.Size >= 0) || st.Age < 0 {
				t.Fatalf("%+v", *st)
			}
		}
		again := newCollector(t, testGeometry, nil)
		if err := again.Load(d.Save(testIdentity, mib, now.Add(time.Hour)), testIdentity.Pool, now); err != nil {
			t.Fatal(err)
		}
	})
}
