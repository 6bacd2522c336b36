package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/flashmap/collect"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
	"github.com/pollux-storage/pollux/internal/region"
)

// usedRig returns a pool with flash whose disk was used.
func usedRig(t testing.TB, disks int) (*rig, block.Volume) {
	r := newRig(t, disks, testSize)
	r.mustOpen()
	v := r.volume("v", 64<<20)
	r.fill(v, 512, 3)
	r.addFlash(16 << 20)
	r.use(v, 1)
	return r, v
}

// use reads and writes here and there, so that there is something to count.
func (r *rig) use(v block.Volume, seed uint64) {
	r.t.Helper()
	rng := rand.New(rand.NewPCG(seed, 43))
	buf := make([]byte, block.Size)
	for range 300 {
		b := rng.Int64N(512)
		r.forget()
		if err := v.Read(context.Background(), buf, b*block.Size); err != nil {
			r.t.Fatal(err)
		}
	}
}

// keepUsage writes what was collected of all disks to the region now.
func (r *rig) keepUsage() {
	r.t.Helper()
	err := r.do(context.Background(), func() error {
		f := r.Pool.flash
		f.tickAt = time.Time{}
		f.work(time.Now()) // it recalls first
		for range f.disks {
			f.memory.next = time.Time{}
			f.keepUsage(time.Now())
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

// counted returns the counts of each disk under the flash layer, without ages, which are of
// now.
func (r *rig) counted() (all [][]collect.Stat) {
	r.t.Helper()
	err := r.do(context.Background(), func() error {
		f := r.Pool.flash
		if !f.recalled {
			f.recalled = true
			f.recall(time.Now())
		}
		for _, d := range f.disks {
			s := d.collector.Snapshot(time.Now(), nil)
			for i := range s.Stats {
				s.Stats[i] = collect.Stat{Set: s.Stats[i].Set}
			}
			all = append(all, slices.Clone(s.Stats))
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return all
}

// What was collected outlives a guest that dies long before it writes a note, also after a
// takeover; without the section the note on the flash device counts.
func TestUsageOutlivesGuest(t *testing.T) {
	r, _ := usedRig(t, 2)
	if n := len(r.Pool.region.Sections(region.SectionHistory)); n != 0 {
		t.Fatalf("%d sections before anything was kept", n)
	}
	r.keepUsage()
	want := r.counted()
	accesses := r.Pool.flash.disks[0].collector.Status().Counted
	if len(want) != 2 || len(want[0]) == 0 || accesses == 0 {
		t.Fatalf("%+v, %d accesses", want, accesses)
	}
	for _, guest := range []string{"b", "a"} {
		r.die()
		_, told := r.openBy(guest)
		if got := r.counted(); !reflect.DeepEqual(got, want) || len(told) > 0 {
			t.Errorf("%s: %+v was counted, %+v is known: %q", guest, want, got, told)
		}
		if n := r.Pool.flash.disks[0].collector.Status().Counted; n < accesses {
			t.Errorf("%s: %d accesses became %d", guest, accesses, n)
		}
	}
	v, _ := r.Volume("v")
	r.use(v, 2)
	r.keepUsage()
	r.use(v, 3)
	r.keepUsage()
	if n := len(r.Pool.region.Sections(region.SectionHistory)); n != 1 {
		t.Errorf("%d sections", n)
	}
	// A note that is newer than what the region has counts.
	r.use(v, 4)
	err := r.do(t.Context(), func() error { r.Pool.flash.keepAll(time.Now()); return nil })
	if err != nil {
		t.Fatal(err)
	}
	accesses = r.Pool.flash.disks[0].collector.Status().Counted
	r.die()
	r.mustOpen()
	r.counted()
	if n := r.Pool.flash.disks[0].collector.Status().Counted; n < accesses {
		t.Errorf("the note has %d accesses, %d are known", accesses, n)
	}
	r.die()
	if n := r.dropSections(region.SectionHistory); n != 1 {
		t.Errorf("%d sections", n)
	}
	r.mustOpen()
	r.counted()
	if n := r.Pool.flash.disks[0].collector.Status().Counted; n < accesses {
		t.Errorf("without the region the note has %d accesses, %d are known", accesses, n)
	}
	r.shut()
}

// Run keeps it every few seconds, and gives the memory back with the flash.
func TestUsageIsKeptBySeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1, testSize)
		stop := r.run()
		v := r.volume("v", 16<<20)
		if err := write(v, 0, pattern(1)); err != nil {
			t.Fatal(err)
		}
		r.addFlash(16 << 20)
		var was uint64
		for round := range 3 {
			for range 20 {
				r.forget()
				if err := v.Read(t.Context(), make([]byte, block.Size), 0); err != nil {
					t.Fatal(err)
				}
				time.Sleep(100 * time.Millisecond)
			}
			time.Sleep(2 * usageEvery)
			found := map[block.DeviceID]usage{}
			r.changeRegion(func(q *region.Region) {
				for _, s := range q.Sections(region.SectionHistory) {
					mem, err := q.MapSection(s)
					if err != nil {
						t.Fatal(err)
					}
					found, _ = findUsage(bytes.Clone(mem), r.label.Pool)
				}
			})
			n, err := collect.Counted(found[r.Pool.flash.disks[0].id].counts)
			if err != nil || n <= was {
				t.Errorf("round %d: %d accesses after %d, %v", round, n, was, err)
			}
			was = n
		}
		if err := r.RemoveDevice(t.Context(), "ssd"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		if n := len(r.Pool.region.Sections(region.SectionHistory)); n != 0 {
			t.Errorf("%d sections without flash", n)
		}
		stop()
		if err := r.Pool.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

// A guest that dies at any store of its counts leaves those, or the ones before; and whatever
// bytes the section has, nothing but counts is lost.
func TestUsageChaos(t *testing.T) {
	long(t)
	r, v := usedRig(t, 2)
	r.keepUsage()
	section := func(change func(mem []byte)) {
		r.changeRegion(func(q *region.Region) {
			mem, err := q.MapSection(q.Sections(region.SectionHistory)[0])
			if err != nil {
				t.Fatal(err)
			}
			change(mem)
		})
	}
	var before, after []byte
	section(func(mem []byte) { before = bytes.Clone(mem) })
	r.use(v, 9)
	r.keepUsage()
	section(func(mem []byte) { after = bytes.Clone(mem) })
	// Stores go through a slot from its beginning on.
	var places []int
	for i := range after {
		if before[i] != after[i] {
			places = append(places, i)
		}
	}
	if len(places) == 0 {
		t.Fatal("nothing was stored")
	}
	pool := r.label.Pool
	old, _ := findUsage(before, pool)
	for i := 0; i < len(places); i += 1 + len(places)/300 {
		mem := bytes.Clone(before)
		for _, at := range places[:i] {
			mem[at] = after[at]
		}
		for id := range old {
			if now, _ := findUsage(mem, pool); len(now) != 2 || now[id].generation < old[id].generation {
				t.Fatalf("after %d stores generation %d became %d of %d disks", i, old[id].generation, now[id].generation, len(now))
			}
		}
	}
	seeds := few(40)
	if soak {
		seeds = 400
	}
	for seed := range uint64(seeds) {
		rng := rand.New(rand.NewPCG(seed, 47))
		r.die()
		section(func(mem []byte) {
			for range 1 + rng.IntN(4) {
				spoil(rng, mem[:min(len(mem), 64<<10<<rng.IntN(8))])
			}
		})
		o := r.options()
		var told []string
		o.Flash.Tell = func(e FlashEvent) { told = append(told, e.Kind) }
		o.Tell = keep(TellKept, &told)
		if err := r.openWith(o); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if r.counted(); len(told) > 0 && !slices.Contains(told, "flash-history-lost") {
			t.Errorf("seed %d: %q", seed, told)
		}
		v, _ = r.Volume("v")
		r.use(v, seed)
		r.keepUsage()
		r.wantFilled(v, 512, 3)
	}
	r.shut()
}

// Without room in the region, or with parameters that want more of it, the notes go on.
func TestUsageWithoutRoom(t *testing.T) {
	r, v := usedRig(t, 1)
	r.byRecord = false // the test looks at what is in the region
	r.keepUsage()
	_, err := r.ChangeFlash(t.Context(), FlashChange{Params: func(p policy.Params) (policy.Params, error) {
		p.Collect.Memory *= 2
		return p, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	r.use(v, 5)
	r.keepUsage()
	if s := r.Pool.region.Sections(region.SectionHistory); len(s) != 1 {
		t.Errorf("%+v", s)
	}
	r.die()
	r.dropSections(region.SectionHistory)
	r.dropSections(region.SectionJournal)
	r.changeRegion(func(q *region.Region) {
		for range 7 {
			if _, _, err := q.AddSection(foreign, 1); err != nil {
				t.Fatal(err)
			}
		}
	})
	var told []string
	o := r.options()
	o.Tell = keep(TellKept, &told)
	if err := r.openWith(o); err != nil {
		t.Fatal(err)
	}
	v, _ = r.Volume("v")
	for range 3 {
		r.use(v, 6)
		r.keepUsage()
	}
	n := 0
	for _, text := range told {
		if strings.Contains(text, "will not outlive this guest") {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%q", told)
	}
	r.shut()
}

// FuzzUsage opens anything without harm.
func FuzzUsage(f *testing.F) {
	p := make([]byte, 2*block.Size)
	u := usage{id: block.DeviceID{1}, generation: 4, wear: policy.Wear{Hour: 500000}}
	copy(p[usageHead:], "counts")
	sealUsage(p, &u, 6, block.PoolID{1}, 3)
	got, err := openUsage(p, block.PoolID{1})
	if err != nil || got.id != u.id || got.wear != u.wear || string(got.counts) != "counts" || got.generation != 4 {
		f.Fatalf("%+v, %v", got, err)
	}
	if _, err := openUsage(p, block.PoolID{2}); !errors.Is(err, block.ErrCorrupt) {
		f.Fatalf("of another pool: %v", err)
	}
	f.Add(p, 100)
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		if len(b) >= usageHead && n >= 0 && n <= len(b)-usageHead {
			sealUsage(b, &usage{generation: 1}, n, block.PoolID{1}, 1)
			if _, err := openUsage(b, block.PoolID{1}); err != nil {
				t.Fatal(err)
			}
		}
		found, _ := findUsage(b, block.PoolID{1})
		for id, u := range found {
			if len(u.counts) > len(b) {
				t.Fatal(fmt.Sprint(id, len(u.counts)))
			}
		}
	})
}
