package cache

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// content fills p with what the block of a key holds, so that a wrong hit is
// seen.
func content(k Key, p []byte) {
	x := uint64(k.Phys)*31 + uint64(k.Birth)*1_000_003 + uint64(k.Sum)<<8
	for i := 0; i+8 <= len(p); i += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(p[i:], x)
	}
}

func data(k Key) []byte {
	p := make([]byte, block.Size)
	content(k, p)
	return p
}

func key(n int) Key { return Key{Phys: block.Physical(n), Birth: 1, Sum: uint32(n)} }

// check verifies the invariants of the package comment.
func (c *Cache) check() error {
	for i := range c.shards {
		if err := c.shards[i].check(); err != nil {
			return fmt.Errorf("shard %d: %w", i, err)
		}
	}
	return nil
}

func (s *shard) check() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := make(map[uint32]uint8)
	for name := range s.lists {
		l, n, prev := &s.lists[name], uint32(0), uint32(0)
		for f := l.head; f != 0; f = s.records[f-1].next {
			r := &s.records[f-1]
			if r.list != uint8(name) || r.prev != prev {
				return fmt.Errorf("frame %d in list %d says list %d, previous %d", f-1, name, r.list, r.prev)
			}
			if _, dup := seen[f-1]; dup || f-1 >= s.fresh {
				return fmt.Errorf("frame %d is in two lists or was never used", f-1)
			}
			seen[f-1] = uint8(name)
			prev = f
			n++
		}
		if n != l.n || l.tail != prev {
			return fmt.Errorf("list %d has %d frames and tail %d, says %d and %d", name, n, prev, l.n, l.tail)
		}
	}
	if uint32(len(seen)) != s.fresh {
		return fmt.Errorf("%d frames in lists, %d were used", len(seen), s.fresh)
	}
	inTable := uint32(0)
	for i, sl := range s.table {
		if sl.frame == 0 {
			continue
		}
		inTable++
		r := &s.records[sl.frame-1]
		if seen[sl.frame-1] == free || r.hash != sl.hash {
			return fmt.Errorf("table entry %d names frame %d wrongly", i, sl.frame-1)
		}
		if at, ok := s.find(sl.hash, block.Physical(r.phys)); !ok || at != uint32(i) {
			return fmt.Errorf("table entry %d is not found: at %d, %t", i, at, ok)
		}
	}
	if inTable != s.lists[cold].n+s.lists[hot].n {
		return fmt.Errorf("%d entries in the table, %d frames in lists", inTable, s.lists[cold].n+s.lists[hot].n)
	}
	return nil
}

func mustHold(t *testing.T, c *Cache) {
	t.Helper()
	if err := c.check(); err != nil {
		t.Fatal(err)
	}
}

// A shared block is found whoever put it, and what was put for a shared one does not
// answer who knows which point has written it.
func TestSharedKey(t *testing.T) {
	c := New(make([]byte, 1<<20))
	own := Key{Phys: block.At(2, 77), Birth: 5, Sum: 9}
	shared := Key{Phys: own.Phys, Birth: 8, Sum: 9, Shared: true}
	c.Put(own, data(own))
	if !c.Has(own) || !c.Has(shared) {
		t.Error("a shared block is not found by its content")
	}
	c.Put(shared, data(own))
	if !c.Has(own) {
		t.Error("the same content put again has taken the knowledge of its birth away")
	}
	c.Forget(own.Phys)
	c.Put(shared, data(own))
	other := own
	other.Birth = shared.Birth
	if c.Has(own) || c.Has(other) || !c.Has(shared) {
		t.Error("a frame put for a shared block answers for one whose birth is known")
	}
	c.Put(own, data(own))
	if !c.Has(own) || !c.Has(shared) || c.Stats().Used != 1 {
		t.Error("the owner's frame did not take the place of the shared one")
	}
	mustHold(t, c)
}

func TestKeyMustAgree(t *testing.T) {
	c := New(make([]byte, 1<<20))
	k := Key{Phys: block.At(2, 77), Birth: 5, Sum: 9}
	c.Put(k, data(k))
	got := make([]byte, 100)
	if !c.Get(k, 1000, got) || string(got) != string(data(k)[1000:1100]) {
		t.Fatal("no hit, or the wrong part")
	}
	for _, other := range []Key{
		{k.Phys + 1, k.Birth, k.Sum, false}, {k.Phys, 6, k.Sum, false}, {k.Phys, k.Birth, 8, false},
		{k.Phys, 6, 8, true}, {k.Phys + 1, 6, k.Sum, true},
	} {
		if c.Get(other, 0, got) || c.Has(other) || c.View(other, func([]byte) {}) {
			t.Errorf("%+v hits the frame of %+v", other, k)
		}
		c.Drop(other)
	}
	if !c.View(k, func(f []byte) {
		if len(f) != block.Size || string(f) != string(data(k)) {
			t.Error("the wrong frame")
		}
	}) {
		t.Error("dropped by another's key")
	}
	again := k
	again.Birth++
	c.Put(again, data(again))
	if c.Has(k) || !c.Has(again) || c.Stats().Used != 1 {
		t.Error("the block's new content did not take the place of the old")
	}
	c.Drop(again)
	if c.Has(again) || c.Stats().Used != 0 {
		t.Error("still there after Drop")
	}
	if st := c.Stats(); st.Hits != 2 || st.Misses != 10 || st.Evictions != 0 {
		t.Errorf("%+v", st)
	}
	mustHold(t, c)
}

// TestSizes: any piece of memory gives a working cache that stays inside it.
func TestSizes(t *testing.T) {
	for _, size := range []int{0, 1, 4095, 8191, 8400, 12288, 40000, 1 << 17, 1<<20 + 13, 3 << 20} {
		for _, skew := range []int{0, 1, 4000} {
			mem := make([]byte, size+skew+64)
			guard := mem[size+skew:]
			for i := range guard {
				guard[i] = 0xee
			}
			c := New(mem[skew : size+skew : size+skew])
			st := c.Stats()
			if st.Frames*block.Size > size || size > 1<<20 && st.Frames < size/frameCost-64 {
				t.Errorf("%d frames in %d bytes", st.Frames, size)
			}
			for n := range 2*st.Frames + 10 {
				c.Put(key(n), data(key(n)))
			}
			if st = c.Stats(); st.Used > st.Frames || st.Frames > 0 && st.Used < st.Frames*3/4 {
				t.Errorf("%d bytes: %d of %d frames used", size, st.Used, st.Frames)
			}
			for _, b := range guard {
				if b != 0xee {
					t.Fatalf("%d bytes: wrote past the memory", size)
				}
			}
			mustHold(t, c)
		}
	}
}

// TestLarge: a large cache has more shards instead of larger ones.
func TestLarge(t *testing.T) {
	mem, err := unix.Mmap(-1, 0, 5*minShards*shardFrames*frameCost/2, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_NORESERVE)
	if err != nil {
		t.Skip("no memory: ", err)
	}
	defer func() { _ = unix.Munmap(mem) }()
	c := New(mem)
	if st := c.Stats(); len(c.shards) != 4*minShards || len(c.shards) != 1<<c.bits || st.Frames > len(mem)/block.Size || st.Frames < len(mem)/frameCost-4*minShards*2 {
		t.Errorf("%d shards, %d frames", len(c.shards), st.Frames)
	}
	for n := range 5000 {
		c.Put(key(n), data(key(n)))
	}
	if st := c.Stats(); st.Used != 5000 {
		t.Errorf("%d of 5000 blocks are there", st.Used)
	}
	mustHold(t, c)
}

// access reads a block through the cache and reports whether it hit.
func access(c *Cache, k Key, buf []byte) bool {
	if c.Get(k, 0, buf) {
		return true
	}
	content(k, buf)
	c.Put(k, buf)
	return false
}

// TestScan: a scan ten times as long as the cache leaves the hot set in it,
// also when each block is read in eight pieces.
func TestScan(t *testing.T) {
	for _, pieces := range []int{1, 8} {
		c := New(make([]byte, 4<<20))
		frames := c.Stats().Frames
		buf := make([]byte, block.Size)
		hotSet := frames / 2
		for round := range 4 {
			for n := range hotSet {
				access(c, key(n), buf)
			}
			for n := range frames / 2 { // other traffic, which fills memory
				access(c, key(1<<20+round*frames+n), buf)
			}
		}
		for n := range 10 * frames {
			k := key(1<<30 + n)
			for range pieces {
				access(c, k, buf)
			}
		}
		left := 0
		for n := range hotSet {
			if c.Has(key(n)) {
				left++
			}
		}
		t.Logf("%d pieces: %d of %d hot blocks left after a scan of %d", pieces, left, hotSet, 10*frames)
		if left < hotSet*9/10 {
			t.Errorf("%d pieces: only %d of %d hot blocks are left", pieces, left, hotSet)
		}
		mustHold(t, c)
	}
}

// TestWorkingSet: a set that fits is in the cache after a few random rounds,
// and takes it over from a former one.
func TestWorkingSet(t *testing.T) {
	c := New(make([]byte, 4<<20))
	frames := c.Stats().Frames
	rng := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, block.Size)
	for phase := range 3 {
		set := frames * 9 / 10
		hits := 0
		const rounds = 12
		for i := range rounds * set {
			if access(c, key(phase<<24+rng.IntN(set)), buf) && i >= (rounds-1)*set {
				hits++
			}
		}
		t.Logf("phase %d: %.3f hits in the last round", phase, float64(hits)/float64(set))
		if hits < set*9/10 {
			t.Errorf("phase %d: %d of %d hit", phase, hits, set)
		}
	}
}

// TestConcurrent runs random operations from several goroutines; content
// tells of a wrong hit. Each physical block has several lives.
func TestConcurrent(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	c := New(make([]byte, 2<<20))
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(w)))
			buf, want := make([]byte, block.Size), make([]byte, block.Size)
			for range 20000 {
				n := rng.IntN(700)
				k := Key{Phys: block.Physical(n), Birth: block.CP(1 + rng.IntN(3)), Sum: uint32(rng.IntN(2))}
				content(k, want)
				switch rng.IntN(20) {
				case 0:
					c.Drop(k)
				case 1:
					c.Forget(k.Phys)
				case 2, 3, 4, 5, 6, 7, 8:
					c.Put(k, want)
				case 9, 10:
					c.View(k, func(f []byte) {
						if string(f) != string(want) {
							t.Errorf("seed %d: view of %+v shows another block", seed, k)
						}
					})
				default:
					off := rng.IntN(block.Size)
					p := buf[:1+rng.IntN(block.Size-off)]
					if c.Get(k, off, p) && string(p) != string(want[off:off+len(p)]) {
						t.Errorf("seed %d: get of %+v returns another block", seed, k)
					}
				}
			}
		})
	}
	wg.Wait()
	mustHold(t, c)
	t.Logf("%+v", c.Stats())
}

// FuzzOps compares a cache of few frames, in one shard, with a map: what it
// has is right, what it must have (put last, dropped never) is there.
func FuzzOps(f *testing.F) {
	f.Add([]byte{0, 1, 0, 2, 0, 1, 64, 1, 128, 1, 192, 0})
	f.Add([]byte("put and get and drop, again and again, in a small table of frames"))
	rng := rand.New(rand.NewPCG(3, 4))
	long := make([]byte, 800)
	for i := range long {
		long[i] = byte(rng.Uint32())
	}
	f.Add(long)
	mem := make([]byte, 13*frameCost+block.Size)
	f.Fuzz(func(t *testing.T, ops []byte) {
		c := New(mem)
		model := make(map[block.Physical]Key) // the last put of each block, until dropped
		buf := make([]byte, block.Size)
		for len(ops) >= 2 && len(ops) < 1024 {
			op, arg := ops[0], ops[1]
			ops = ops[2:]
			k := Key{Phys: block.Physical(arg & 63), Birth: block.CP(op & 1), Sum: uint32(op >> 1 & 1)}
			last, known := model[k.Phys]
			switch op >> 6 {
			case 0, 1:
				c.Put(k, data(k))
				model[k.Phys] = k
				if !c.Has(k) {
					t.Fatalf("%+v is gone right after Put", k)
				}
			case 2:
				if hit := c.Get(k, 0, buf); hit && (!known || last != k || string(buf) != string(data(k))) {
					t.Fatalf("hit of %+v, last put was %+v (%t)", k, last, known)
				}
			case 3:
				if op&0x3f == 0 {
					c.Forget(k.Phys)
					delete(model, k.Phys)
				} else if c.Drop(k); last == k {
					delete(model, k.Phys)
				}
			}
			if err := c.check(); err != nil {
				t.Fatal(err)
			}
		}
		if st := c.Stats(); st.Evictions == 0 && st.Used != len(model) {
			t.Fatalf("%d frames used for %d blocks without any eviction", st.Used, len(model))
		}
	})
}

func TestNoAllocation(t *testing.T) {
	c := New(make([]byte, 1<<20))
	buf := make([]byte, block.Size)
	n := 0
	if a := testing.AllocsPerRun(2000, func() {
		n++
		c.Put(key(n), buf)
		c.Get(key(n), 0, buf)
		c.Drop(key(n - 5))
	}); a != 0 {
		t.Errorf("%v allocations an operation", a)
	}
}

func benchCache(b *testing.B) *Cache {
	mem, err := hpdi.AllocPrivate(256 << 20)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { hpdi.Free(mem) })
	c := New(mem)
	buf := make([]byte, block.Size)
	for n := range c.Stats().Frames * 3 / 4 {
		c.Put(key(n), buf)
	}
	b.ReportAllocs()
	b.SetBytes(block.Size)
	return c
}

func BenchmarkGetHit(b *testing.B) {
	c := benchCache(b)
	n := uint32(c.Stats().Frames / 2)
	b.RunParallel(func(pb *testing.PB) {
		buf, rng := make([]byte, block.Size), rand.New(rand.NewPCG(1, rand.Uint64()))
		for pb.Next() {
			c.Get(key(int(rng.Uint32N(n))), 0, buf)
		}
	})
}

func BenchmarkGetMiss(b *testing.B) {
	c := benchCache(b)
	b.RunParallel(func(pb *testing.PB) {
		buf, rng := make([]byte, block.Size), rand.New(rand.NewPCG(1, rand.Uint64()))
		for pb.Next() {
			c.Get(key(1<<30+int(rng.Uint32()>>8)), 0, buf)
		}
	})
}

func BenchmarkPutEvict(b *testing.B) {
	c := benchCache(b)
	b.RunParallel(func(pb *testing.PB) {
		buf, rng := make([]byte, block.Size), rand.New(rand.NewPCG(1, rand.Uint64()))
		for pb.Next() {
			c.Put(key(1<<30+int(rng.Uint32()>>4)), buf)
		}
	})
}

// What is offered is proved when it is asked for first, and only then.
func TestOffer(t *testing.T) {
	c := New(make([]byte, 64*frameCost))
	page := make([]byte, block.Size)
	offer := func(n int, damage bool) (Key, []byte) {
		page[5] = byte(n)
		k := Key{Phys: block.Physical(n), Birth: 1, Sum: ondisk.CRC(page)}
		if damage {
			page[7] ^= 4
		}
		c.Offer(k, page)
		want := bytes.Clone(page)
		page[7] = 0
		return k, want
	}
	got := make([]byte, block.Size)
	good, want := offer(1, false)
	bad, _ := offer(2, true)
	for range 2 {
		if !c.Get(good, 0, got) || !bytes.Equal(got, want) {
			t.Error("an undamaged block is not here")
		}
		if c.Get(bad, 0, got) || c.View(bad, func([]byte) { t.Error("seen") }) || c.Has(bad) {
			t.Error("a damaged block is a hit")
		}
	}
	if st := c.Stats(); st.Used != 1 {
		t.Errorf("%d frames are in use", st.Used)
	}
	// Proved once, and what is put needs no proof, also over what was offered.
	if !c.View(good, func(frame []byte) { frame[9] ^= 1 }) || !c.Get(good, 0, got) {
		t.Error("proved again")
	}
	// What is the same as the right content is proved by that, and what is not is asked for
	// its checksum.
	for n := 4; n < 8; n++ {
		damaged := n%2 == 1
		k, _ := offer(n, damaged)
		right := bytes.Clone(page)
		right[5] = byte(n)
		if n < 6 {
			right[9] ^= 1 // whoever asks has something else
		}
		same, here := c.Same(k, right)
		if here == damaged || same != (n == 6) {
			t.Errorf("block %d: here %v, the same %v", n, here, same)
		}
		if damaged == c.Has(k) {
			t.Errorf("block %d is %v here afterwards", n, c.Has(k))
		}
	}
	if same, here := c.Same(Key{Phys: 99}, page); same || here {
		t.Error("a block that is not here is the same")
	}
	bad, want = offer(3, true)
	if c.Put(bad, want); !c.Get(bad, 0, got) || !bytes.Equal(got, want) {
		t.Error("what was put over an offer is not here")
	}
	defer func() {
		if recover() == nil {
			t.Error("half a block was offered")
		}
	}()
	c.Offer(good, page[:100])
}
