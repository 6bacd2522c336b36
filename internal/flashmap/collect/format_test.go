package collect

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"math"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
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
	sameHistory(t, d.History(), c.History())
	if again := d.Save(testIdentity, mib, later); !bytes.Equal(again, saved) {
		t.Error("what was loaded is not saved as it was")
	}
	// The window in which it was saved ends as if nothing had been between.
	end := func(c *Collector, now time.Time) Window {
		c.Tick(now.Add(c.Params().Window))
		ws := c.History()
		if len(ws) != 3 {
			t.Fatalf("%d windows", len(ws))
		}
		return ws[2]
	}
	copied := newCollector(t, testGeometry, nil)
	if err := copied.Load(saved, testIdentity.Pool, later); err != nil {
		t.Fatal(err)
	}
	one, other := end(copied, later), end(c, now)
	other.Start = one.Start
	if !reflect.DeepEqual(one, other) || one.Runs == 0 {
		t.Errorf("the window goes on to %+v, was to be %+v", one, other)
	}
	c, now = filled(t, 100)
	r := d.NewRecorder()
	r.Record(hpdi.OpWrite, 0, 4096, later)
	later = later.Add(10 * time.Second) // until then it may be the beginning of a run
	before, _ := c.Snapshot(now.Add(10*time.Second), nil).Find(0)
	if one, _ := d.Snapshot(later, nil).Find(0); one.Writes <= before.Writes || one.Age > 10*time.Second {
		t.Errorf("after one more write %+v, before %+v", one, before)
	}
}

// sameHistory compares histories, but for what sizes of requests are rounded by.
func sameHistory(t *testing.T, got, want []Window) {
	t.Helper()
	if len(got) != len(want) || len(want) == 0 {
		t.Fatalf("%d windows, want %d", len(got), len(want))
	}
	for i := range want {
		g, w := got[i], want[i]
		g.Sets, w.Sets = slices.Clone(g.Sets), slices.Clone(w.Sets)
		for k := range g.Sets {
			if k < len(w.Sets) && math.Abs(float64(g.Sets[k].Size-w.Sets[k].Size)) <= sizeStep/2 {
				g.Sets[k].Size = w.Sets[k].Size
			}
		}
		if !reflect.DeepEqual(g, w) {
			t.Errorf("window %d: %+v, want %+v", i, g, w)
		}
	}
}

// The history shares the bytes with the sets: each gets half, and what the other one leaves.
func TestHistorySaved(t *testing.T) {
	g := Geometry{1 << 40, 256 * kib}
	const windows, sets = 30, 800
	params := func(p *Params) {
		p.Window, p.HistoryWindows, p.History = time.Minute, windows, windows*sets*config.Size(usedBytes)+mib
	}
	c := newCollector(t, g, params)
	rnd := random(t)
	z := rand.NewZipf(rnd, 1.2, 4, uint64(g.Sets()/64-1))
	r := c.NewRecorder()
	now := start
	for range windows {
		for range 3 {
			for range 1500 {
				set := int64(z.Uint64()) * 2654435761 % int64(g.Sets())
				r.Record(hpdi.Op(1+rnd.IntN(2)), set*g.SetBytes+rnd.Int64N(32)*8*kib, 8*kib, now)
				now = now.Add(time.Minute / 4500)
			}
			c.Tick(now)
		}
	}
	now = now.Add(time.Minute / 2)
	c.Tick(now)
	all, kept := c.History(), 0
	for i := range all {
		kept += len(all[i].Sets)
	}
	whole := c.Save(testIdentity, 16*mib, now)
	packed := len(whole) - ondisk.HeaderSize - prefixBytes - c.Status().Sets*savedBytes
	t.Logf("%.2f bytes a set of a window, %d sets in %d windows; %d sets of %d bytes in the table", float64(packed)/float64(kept), kept, len(all), c.Status().Sets, savedBytes)
	if len(all) != windows || packed > 8*kept {
		t.Errorf("%d windows with %d sets in %d bytes", len(all), kept, packed)
	}
	load := func(p []byte, change func(*Params)) *Collector {
		d := newCollector(t, g, change)
		if err := d.Load(p, testIdentity.Pool, now); err != nil {
			t.Fatal(err)
		}
		return d
	}
	sameHistory(t, load(whole, params).History(), all)

	// Half of too few bytes: all windows, of each the most used sets.
	limit := len(whole) / 3
	d := load(c.Save(testIdentity, limit, now), params)
	least := d.History()
	packed = len(d.Save(testIdentity, limit, now)) - ondisk.HeaderSize - prefixBytes - d.Status().Sets*savedBytes
	if len(least) != windows || packed < limit*4/10 || packed > limit/2 || d.Status().Sets*savedBytes < limit*4/10 {
		t.Errorf("%d windows in %d bytes of %d, %d sets", len(least), packed, limit, d.Status().Sets)
	}
	for i := range least {
		if n := len(least[i].Sets); n < len(all[i].Sets)/8 || n >= len(all[i].Sets) {
			t.Errorf("window %d has %d sets of %d", i, n, len(all[i].Sets))
		}
	}
	cut := slices.Clone(all)
	for i := range cut {
		cut[i].Sets = most(cut[i].Sets, len(least[i].Sets))
	}
	sameHistory(t, least, cut)

	// Very few: the newest windows. Less is kept of what is loaded, too.
	d = load(c.Save(testIdentity, 16*kib, now), params)
	if ws := d.History(); len(ws) < 2 || len(ws) > 5 || !ws[len(ws)-1].Start.Equal(all[windows-1].Start) || len(ws[0].Sets) < 100 {
		t.Errorf("of a history in 8 KiB %d windows are left", len(ws))
	}
	d = load(whole, func(p *Params) { params(p); p.HistoryWindows = 4 })
	if ws := d.History(); len(ws) != 4 || !ws[0].Start.Equal(all[windows-4].Start) {
		t.Errorf("%d windows instead of 4", len(ws))
	}
	d = load(whole, func(p *Params) { params(p); p.Window *= 2 })
	if ws := d.History(); len(ws) != 0 {
		t.Errorf("%d windows of another length", len(ws))
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
	past := prefixBytes + len(want.Stats)*savedBytes // where the windows begin
	sealed := func(p []byte) []byte {
		ondisk.Seal(p, ondisk.Header{Kind: ondisk.KindAccess, Version: 1, Length: len(p), Pool: testIdentity.Pool})
		return p
	}
	seal := func(change func(p []byte)) []byte {
		p := bytes.Clone(saved)
		change(p[ondisk.HeaderSize:])
		return sealed(p)
	}
	// window puts something in the place of what follows the time of the only window.
	window := func(q ...byte) []byte {
		p := append(bytes.Clone(saved[:ondisk.HeaderSize+past+countBytes+8]), q...)
		p[ondisk.HeaderSize+past] = 1
		return sealed(p)
	}
	if err := newCollector(t, testGeometry, nil).Load(window(9, 9, 9, 1, 5, 1, 1, 1, 8), testIdentity.Pool, now); err != nil {
		t.Fatal(err)
	}
	large := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1} // 1<<64 - 1
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
		{"sets", c.Load(seal(func(p []byte) { p[82] = 0xff }), testIdentity.Pool, now), block.ErrCorrupt},
		{"no such set", c.Load(seal(func(p []byte) { p[91] = 0xff }), testIdentity.Pool, now), block.ErrCorrupt},
		{"order", c.Load(seal(func(p []byte) { copy(p[84+44:], p[84:92]) }), testIdentity.Pool, now), block.ErrCorrupt},
		{"sums", c.Load(seal(func(p []byte) { p[63] = 0xff }), testIdentity.Pool, now), block.ErrCorrupt},
		{"windows said", c.Load(seal(func(p []byte) { p[past+2] = 1 }), testIdentity.Pool, now), block.ErrCorrupt},
		{"sum of a window", c.Load(window(append(large, 0, 0, 0)...), testIdentity.Pool, now), block.ErrCorrupt},
		{"sets of a window", c.Load(window(append([]byte{9, 9, 9}, large...)...), testIdentity.Pool, now), block.ErrCorrupt},
		{"set of a window", c.Load(window(9, 9, 9, 1, 0x80, 0x20, 1, 1, 1, 1), testIdentity.Pool, now), block.ErrCorrupt},
		{"sets that come round", c.Load(window(append([]byte{9, 9, 9, 2, 5, 1, 1, 1, 1}, append(large, 1, 1, 1, 1)...)...), testIdentity.Pool, now), block.ErrCorrupt},
		{"size in a window", c.Load(window(9, 9, 9, 1, 5, 1, 1, 1, 0x81, 0x80, 0x80, 1), testIdentity.Pool, now), block.ErrCorrupt},
		{"number without end", c.Load(window(9, 9, 9, 1, 5, 1, 1, 1, 0x80), testIdentity.Pool, now), block.ErrCorrupt},
		{"negative", c.Load(seal(func(p []byte) { p[99] = 0xbf }), testIdentity.Pool, now), block.ErrCorrupt},
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
		d := newCollector(t, testGeometry, func(p *Params) { p.Memory = minMemory })
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
		sets := 0
		for _, w := range d.History() {
			for i := range w.Sets {
				if u := &w.Sets[i]; uint64(u.Set) >= testGeometry.Sets() || !(u.Accesses() >= 0) || i > 0 && u.Set <= w.Sets[i-1].Set {
					t.Fatalf("%+v", w.Sets)
				}
			}
			sets += len(w.Sets)
		}
		if sets*minPackedSet > len(p) {
			t.Fatalf("%d sets of %d bytes", sets, len(p))
		}
		again := newCollector(t, testGeometry, nil)
		if err := again.Load(d.Save(testIdentity, mib, now.Add(time.Hour)), testIdentity.Pool, now); err != nil {
			t.Fatal(err)
		}
	})
}
