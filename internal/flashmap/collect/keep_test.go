package collect

import (
	"bytes"
	"errors"
	"reflect"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// What is recalled is what was kept: the counts of all sets, and of the history what the
// collector had.
func TestKeepAndRecall(t *testing.T) {
	c, now := filled(t, 100)
	mem := make([]byte, KeptBytes(c.p, testGeometry))
	n := c.Keep(mem, testIdentity, now)
	saved := c.Save(testIdentity, mib, now)
	later := now.Add(time.Hour)
	want, got := newCollector(t, testGeometry, nil), newCollector(t, testGeometry, nil)
	if err := want.Load(saved, testIdentity.Pool, later); err != nil {
		t.Fatal(err)
	}
	if err := got.Load(saved, testIdentity.Pool, later); err != nil {
		t.Fatal(err)
	}
	if err := got.Recall(mem[:n], testIdentity.Pool, later); err != nil {
		t.Fatal(err)
	}
	if a, b := want.Snapshot(later, nil), got.Snapshot(later, nil); !reflect.DeepEqual(a, b) || len(a.Stats) == 0 {
		t.Errorf("%+v was kept, %+v recalled", a, b)
	}
	if a, b := want.History(), got.History(); !reflect.DeepEqual(a, b) || len(a) == 0 {
		t.Errorf("%d windows became %d", len(a), len(b))
	}
	got.table.check(t)
	// In less memory there are fewer sets.
	few := c.Keep(mem[:ondisk.HeaderSize+prefixBytes+countBytes+10*savedBytes], testIdentity, now)
	if err := got.Recall(mem[:few], testIdentity.Pool, later); err != nil || got.Status().Sets != 10 {
		t.Errorf("%d sets, %v", got.Status().Sets, err)
	}
	if n := c.Keep(mem[:100], testIdentity, now); n != 0 {
		t.Errorf("%d bytes in 100", n)
	}
	// Of each set there is one.
	n = c.Keep(mem, testIdentity, now)
	copy(mem[ondisk.HeaderSize+prefixBytes+savedBytes:], mem[ondisk.HeaderSize+prefixBytes:][:8])
	testIdentity.seal(mem[:n])
	if err := got.Recall(mem[:n], testIdentity.Pool, later); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("a set that is there twice: %v", err)
	}
}

// Whatever was kept, the collector works.
func FuzzRecall(f *testing.F) {
	c, now := filled(f, 3)
	mem := make([]byte, KeptBytes(c.p, testGeometry))
	f.Add(mem[:c.Keep(mem, testIdentity, now)], true)
	f.Fuzz(func(t *testing.T, p []byte, sealed bool) {
		if sealed && len(p) >= ondisk.HeaderSize {
			p = bytes.Clone(p)
			testIdentity.seal(p)
		}
		d := newCollector(t, testGeometry, func(p *Params) { p.Memory = minMemory })
		if d.Recall(p, testIdentity.Pool, now) != nil {
			return
		}
		d.table.check(t)
		d.NewRecorder().Record(hpdi.OpWrite, 0, mib, now)
		s := d.Snapshot(now.Add(time.Hour), nil)
		for i := range s.Stats {
			if st := &s.Stats[i]; !(st.Accesses() >= 0) || !(st.Size >= 0) || st.Age < 0 {
				t.Fatalf("%+v", *st)
			}
		}
	})
}

// BenchmarkKeep measures what is done every few seconds for a disk of which all that finds
// room is known, and what is done once by whoever comes next.
func BenchmarkKeep(b *testing.B) {
	p := Defaults()
	g := Geometry{1 << 40, 256 * kib}
	c, err := New(g, p, start)
	if err != nil {
		b.Fatal(err)
	}
	for i := range c.table.most {
		e := c.table.at(Set(uint64(i)*7919%g.Sets()), c.window)
		e.current.reads = float32(i % 100)
	}
	mem := make([]byte, KeptBytes(p, g))
	n := 0
	b.Run("keep", func(b *testing.B) {
		for b.Loop() {
			n = c.Keep(mem, testIdentity, start)
		}
		b.SetBytes(int64(n))
	})
	b.Run("recall", func(b *testing.B) {
		for b.Loop() {
			if err := c.Recall(mem[:n], testIdentity.Pool, start); err != nil {
				b.Fatal(err)
			}
		}
	})
}
