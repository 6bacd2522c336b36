package pool

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/cache"
	"github.com/pollux-storage/pollux/internal/region"
)

// warmRig returns an open pool with a volume that has some blocks on its devices, whose cache
// is left to who opens it next.
func warmRig(t testing.TB, data []byte) (*rig, block.Volume) {
	t.Helper()
	r := newRigWithLog(t, 2, testSize, 16<<20)
	r.warm = true
	r.mustOpen()
	v := r.volume("v", 64<<20)
	r.put(v, 0, data)
	r.fold()
	return r, v
}

// keep returns a function that adds what it is told of a kind to told.
func keep(kind string, told *[]string) func(kind, text string) {
	return func(k, text string) {
		if k == kind {
			*told = append(*told, text)
		}
	}
}

// openTelling opens the pool for a guest, and returns what it is told of the cache.
func (r *rig) openTelling(guest string) (told []string) {
	r.t.Helper()
	o := r.options()
	o.Owner = guest
	o.Tell = keep(TellCache, &told)
	if err := r.openWith(o); err != nil {
		r.t.Fatal(err)
	}
	r.Pool.cache.doing.Wait()
	return told
}

// reads returns how many blocks are read from devices while do does something.
func (r *rig) reads(do func()) uint64 {
	before, _ := r.set.Ended()
	do()
	after, _ := r.set.Ended()
	return after - before
}

// Whoever opens a pool after its guest, by a takeover or at a giveback, has its hits.
func TestCacheOutlivesGuest(t *testing.T) {
	data := content(1, 300)
	r, v := warmRig(t, data)
	r.expect(v, 0, data)
	for i, how := range []string{"died", "released", "died"} {
		used := r.Pool.Stats().Cache.Used
		if how == "released" {
			r.stop()
			if err := r.Release(context.Background()); err != nil {
				t.Fatal(err)
			}
			r.reopen()
		} else {
			r.die()
		}
		if told := r.openTelling([]string{"b", "a", "b"}[i]); len(told) > 0 {
			t.Errorf("%q", told)
		}
		st := r.Pool.Stats().Cache
		if st.Own != 0 || st.Why != "" || st.Adopted < 300 || st.Adopted > used+10 || st.Bytes != cacheSize {
			t.Errorf("%s: %+v after %d frames were used", how, st, used)
		}
		v, _ = r.Volume("v")
		if n := r.reads(func() { r.expect(v, 0, data) }); n > 0 {
			t.Errorf("%s: %d reads from devices", how, n)
		}
		if st := r.Pool.Stats().Cache; st.Hits < 300 || st.Misses > 0 || st.Damaged > 0 {
			t.Errorf("%s: %+v", how, st)
		}
		if n := len(r.Pool.region.Sections(region.SectionCache)); n != 1 {
			t.Errorf("%s: %d sections", how, n)
		}
	}
	r.shut()
}

// A survivor has the caches of both pools, each in its own region, and neither takes
// anything from the other.
func TestCachesOfTwoPools(t *testing.T) {
	var rigs [2]*rig
	var data [2][]byte
	for i := range rigs {
		data[i] = content(uint64(i), 300)
		rigs[i], _ = warmRig(t, data[i])
	}
	rigs[0].die()
	if told := rigs[0].openTelling("b"); len(told) > 0 {
		t.Errorf("%q", told)
	}
	for i, r := range rigs {
		v, _ := r.Volume("v")
		if n := r.reads(func() { r.expect(v, 0, data[i]) }); n > 0 {
			t.Errorf("pool %d: %d reads from devices", i, n)
		}
		if st := r.Pool.Stats().Cache; (st.Adopted > 0) != (i == 0) || st.Bytes != cacheSize || st.Own != 0 {
			t.Errorf("pool %d: %+v", i, st)
		}
	}
	// One whose region has the cache of the other has none.
	var other []byte
	rigs[1].die()
	rigs[1].changeCache(func(mem []byte) { other = slices.Clone(mem) })
	rigs[0].die()
	rigs[0].changeCache(func(mem []byte) { copy(mem, other) })
	if told := rigs[0].openTelling("a"); len(told) != 1 || !strings.Contains(told[0], "it is of pool") {
		t.Errorf("%q", told)
	}
	rigs[1].mustOpen()
	for i, r := range rigs {
		v, _ := r.Volume("v")
		r.expect(v, 0, data[i])
		r.shut()
	}
}

// A large cache comes to its place in the background, with what it has by then, and the next
// guest takes it at once.
func TestLargeCache(t *testing.T) {
	r := newRigWithLog(t, 1, testSize, 16<<20)
	r.cacheBytes = readyBytes + 8<<20
	r.warm = true
	if told := r.openTelling("a"); len(told) > 0 {
		t.Errorf("%q", told)
	}
	v := r.volume("v", 64<<20)
	data := content(1, 100)
	r.put(v, 0, data)
	if st := r.Pool.Stats().Cache; !r.Pool.cache.Kept() || st.Own != 0 || st.Bytes != r.cacheBytes || st.Frames < int(r.cacheBytes/block.Size)*9/10 {
		t.Errorf("%+v", st)
	}
	r.die()
	r.mustOpen()
	v, _ = r.Volume("v")
	if n := r.reads(func() { r.expect(v, 0, data) }); n > 0 {
		t.Errorf("%d reads from devices", n)
	}
	r.stop()
	if err := r.Pool.Close(context.Background()); err != nil { // while the shards may be looked at
		t.Error(err)
	}
	if r.Pool.cache.Has(cache.Key{}) || r.Pool.cache.stats().Used != 0 {
		t.Error("a cache is in use after its pool was closed")
	}
}

// Where the region has no room the cache lies in the guest's own memory, says so, and moves
// to the region with the next guest that finds room.
func TestCacheWithoutRoomInRegion(t *testing.T) {
	for _, size := range []int64{cacheSize, readyBytes + 4<<20} {
		r := newRigWithLog(t, 1, testSize, 16<<20)
		r.byRecord = false // the test looks at what is in the region
		r.cacheBytes = size
		r.mustOpen()
		v := r.volume("v", 64<<20)
		r.fillRegion()
		r.die() // not warm
		r.changeRegion(func(q *region.Region) {
			for {
				if _, _, err := q.AddSection(foreign, 1); err != nil {
					return
				}
			}
		})
		told := r.openTelling("a")
		st := r.Pool.Stats().Cache
		if len(told) != 1 || !strings.Contains(told[0], "will not outlive this guest") || st.Own != size || st.Bytes != size || !strings.Contains(st.Why, "sections in a region") {
			t.Errorf("%q, %+v", told, st)
		}
		v, _ = r.Volume("v")
		data := content(1, 100)
		r.put(v, 0, data)
		if n := r.reads(func() { r.expect(v, 0, data) }); n > 0 {
			t.Errorf("%d reads from devices", n)
		}
		r.die()
		r.dropSections(foreign)
		if told := r.openTelling("a"); len(told) > 0 || r.Pool.Stats().Cache.Own != 0 || r.Pool.Stats().Cache.Why != "" {
			t.Errorf("%q, %+v", told, r.Pool.Stats().Cache)
		}
		r.shut()
	}
}

// A cache of about the size that is wanted is kept, one of another size makes room for an
// empty one, and of several one stays.
func TestCacheResized(t *testing.T) {
	data := content(1, 300)
	r, _ := warmRig(t, data)
	for _, x := range []struct {
		bytes  int64
		stays  bool
		second bool
	}{
		{cacheSize + 1<<20, true, false}, {12 << 20, false, false}, {cacheSize, false, false}, {cacheSize, true, true}, {40 << 20, false, false}, {40<<20 - 1<<20, true, false},
	} {
		r.die()
		if x.second {
			r.changeRegion(func(q *region.Region) {
				if _, _, err := q.AddSection(region.SectionCache, cacheSize); err != nil {
					t.Fatal(err)
				}
			})
		}
		r.cacheBytes = x.bytes
		if told := r.openTelling("b"); len(told) > 0 {
			t.Errorf("%q", told)
		}
		st := r.Pool.Stats().Cache
		if (st.Adopted >= 300) != x.stays || st.Own != 0 {
			t.Errorf("%d bytes: %+v", x.bytes, st)
		}
		if s := r.Pool.region.Sections(region.SectionCache); len(s) != 1 || !sameSize(s[0].Length, x.bytes) {
			t.Errorf("%d bytes: %+v", x.bytes, s)
		}
		v, _ := r.Volume("v")
		r.expect(v, 0, data)
	}
	r.shut()
}

// What is no cache of the pool's is told, and one that is empty takes its place.
func TestCacheMadeAnew(t *testing.T) {
	data := content(1, 300)
	for what, edit := range map[string]func(mem []byte){
		"damaged":         func(mem []byte) { copy(mem, strings.Repeat("x", cache.FactsBytes)) },
		"half made":       func(mem []byte) { clear(mem[:cache.FactsBytes]) },
		"another version": func(mem []byte) { mem[8]++; mem[block.Size+8]++ },
		"another pool":    func(mem []byte) { mem[16]++; mem[block.Size+16]++ },
	} {
		r, _ := warmRig(t, data)
		r.die()
		r.changeCache(edit)
		told := r.openTelling("b")
		if st := r.Pool.Stats().Cache; len(told) != 1 || !strings.Contains(told[0], "begins empty") || st.Adopted != 0 || st.Own != 0 {
			t.Errorf("%s: %q, %+v", what, told, st)
		}
		v, _ := r.Volume("v")
		r.expect(v, 0, data)
		r.shut()
	}
}

// changeCache changes the cache in the region of a guest that is dead.
func (r *rig) changeCache(edit func(mem []byte)) {
	r.t.Helper()
	r.changeRegion(func(q *region.Region) {
		for _, s := range q.Sections(region.SectionCache) {
			mem, err := q.MapSection(s)
			if err != nil {
				r.t.Fatal(err)
			}
			edit(mem)
		}
	})
}

// A damaged frame costs a read, and nobody sees it.
func TestCacheFrameDecays(t *testing.T) {
	data := content(1, 300)
	r, _ := warmRig(t, data)
	r.die()
	r.changeCache(func(mem []byte) {
		for at := cache.FactsBytes; at < len(mem)*9/10; at += block.Size {
			mem[at+7] ^= 2
		}
	})
	r.mustOpen()
	v, _ := r.Volume("v")
	n := r.reads(func() { r.expect(v, 0, data) })
	if st := r.Pool.Stats().Cache; n == 0 || st.Damaged < 300 {
		t.Errorf("%d reads from devices, %+v", n, st)
	}
	r.shut()
}

// A pool whose log is lost is opened without its region; the cache, which was in use by
// then, does not stay there.
func TestCacheLeavesLostRegion(t *testing.T) {
	data := content(1, 300)
	r, _ := warmRig(t, data)
	r.die()
	r.changeRegion(func(q *region.Region) { clear(q.Log()) })
	if err := r.open(); err == nil {
		t.Fatalf("opened with a log that is lost: %v", err)
	}
	r.acceptLoss = true
	r.reopenDevices()
	r.mustOpen()
	v, _ := r.Volume("v")
	r.expect(v, 0, data)
	if st := r.Pool.Stats().Cache; st.Own != 0 || st.Adopted != 0 {
		t.Errorf("%+v", st)
	}
	r.shut()
}

// A guest that dies at any operation of a device leaves a cache with which everything is
// read as it was written.
func TestCacheAfterDeathAnywhere(t *testing.T) {
	long(t)
	step := int64(oneIn(5))
	if !soak && step == 1 {
		step = 3
	}
	for seed := range uint64(3) {
		for cut := 1 + int64(seed)%step; ; cut += step {
			rng := rand.New(rand.NewPCG(seed, 41))
			r := newRig(t, 1+int(seed%2), 13<<20) // so small that freed blocks are soon used again
			r.warm, r.repeats = true, seed == 2
			r.mustOpen()
			v := r.volume("v", 2<<20)
			if r.repeats {
				if err := r.SetSharing(context.Background(), "v", 2); err != nil {
					t.Fatal(err)
				}
			}
			m := blocktest.NewModel(seed)
			r.clock.CutAfter(r.clock.Ops() + cut)
			err := exercise(r, v, m, rng, 60)
			if err != nil && !errors.Is(err, blocktest.ErrPowerCut) {
				t.Fatalf("seed %d cut %d: %v", seed, cut, err)
			}
			r.stop()
			_ = r.Pool.free()
			clock := blocktest.NewClock()
			for i, d := range r.devs {
				r.devs[i] = d.CutTo(clock, blocktest.KeepAll, seed)
			}
			r.clock = clock
			v = r.comesBack(m, m.Acked(), fmt.Sprintf("seed %d cut %d", seed, cut))
			if st := r.Pool.Stats().Cache; cut > 100 && st.Adopted == 0 {
				t.Errorf("seed %d cut %d: %+v", seed, cut, st)
			}
			if err := exercise(r, v, m, rng, 10); err != nil {
				t.Fatalf("seed %d cut %d: after recovery: %v", seed, cut, err)
			}
			if r.shut(); t.Failed() {
				t.Fatalf("seed %d cut %d", seed, cut)
			}
			if err == nil {
				t.Logf("seed %d: %d operations", seed, cut)
				break
			}
		}
	}
}

// blotch writes nonsense over a part of a cache: bytes, zeroes, other parts of it, or small
// numbers, which look like frames and lists.
func blotch(rng *rand.Rand, mem []byte) {
	from := 0
	if rng.IntN(5) > 0 {
		from = cache.FactsBytes // so that the rest is believed
	}
	if rng.IntN(2) == 0 {
		from = len(mem) - len(mem)/64 // records and tables
	}
	part := mem[from+rng.IntN(len(mem)-from):]
	part = part[:min(len(part), 1+rng.IntN(1<<(1+rng.IntN(19))))]
	switch kind := rng.IntN(4); kind {
	case 0:
		clear(part)
	case 1:
		copy(part, mem[rng.IntN(len(mem)):])
	default:
		for i := 0; i+4 <= len(part); i += 4 {
			n := rng.Uint32()
			if kind == 3 {
				n %= 1200
			}
			binary.LittleEndian.PutUint32(part[i:], n)
		}
	}
}

// Whatever happens to the memory of a cache while no guest lives costs reads alone: what is
// read is what was written, and counts are right.
func TestCacheChaos(t *testing.T) {
	long(t)
	seeds := few(60)
	if soak {
		seeds = 450
	}
	for seed := range uint64(seeds) {
		rng := rand.New(rand.NewPCG(seed, 43))
		r := newRig(t, 1+int(seed%2), testSize)
		r.warm, r.repeats = true, seed%3 == 0
		r.mustOpen()
		v := r.volume("v", 3<<20)
		if r.repeats {
			if err := r.SetSharing(context.Background(), "v", 1+int(seed%4)); err != nil {
				t.Fatal(err)
			}
		}
		m := blocktest.NewModel(seed)
		for round := range 4 {
			if err := exercise(r, v, m, rng, 40); err != nil {
				t.Fatalf("seed %d round %d: %v", seed, round, err)
			}
			if _, err := m.CheckPrefix(blockReader(v), m.Acked()); err != nil {
				t.Fatalf("seed %d round %d: %v", seed, round, err)
			}
			r.die()
			r.changeCache(func(mem []byte) {
				for range 1 + rng.IntN(5) {
					blotch(rng, mem)
				}
			})
			v = r.comesBack(m, m.Acked(), fmt.Sprintf("seed %d round %d", seed, round))
		}
		if r.shut(); t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}
