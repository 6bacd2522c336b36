package cache

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

var testPool = block.PoolID{1, 2}

// keptMemory returns memory for a cache of so many bytes.
func keptMemory(t testing.TB, n int) Memory {
	t.Helper()
	mem, err := hpdi.AllocPrivate(n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hpdi.Free(mem) })
	return Memory{Bytes: mem, Pool: testPool}
}

func newKept(t testing.TB, m Memory) *Cache {
	t.Helper()
	c := Start(nil, m.Pool, len(m.Bytes))
	if err := c.Keep(m); err != nil {
		t.Fatal(err)
	}
	return c
}

// adopt takes memory over as it is now, as if its guest were dead.
func adopt(t testing.TB, m Memory) (*Cache, Memory) {
	t.Helper()
	other := keptMemory(t, len(m.Bytes))
	copy(other.Bytes, m.Bytes)
	c, err := Adopt(other)
	if err != nil {
		t.Fatal(err)
	}
	return c, other
}

func build(c *Cache) { c.Build(func() bool { return false }) }

// real returns the key of one of the versions of a block, with its content, of which the
// checksum is true.
func real(n, version int) (Key, []byte) {
	k := Key{Phys: block.Physical(n), Birth: block.CP(version), Sum: uint32(n)}
	sum, known := sums[[2]int{n, version}]
	p := bytes.Repeat(binary.LittleEndian.AppendUint64(nil, uint64(n)<<8|uint64(version)), block.Size/8)
	p[n%block.Size]++
	if !known {
		sum = ondisk.CRC(p)
		sums[[2]int{n, version}] = sum
	}
	k.Sum = sum
	return k, p
}

// sums are those of what real has returned.
var sums = map[[2]int]uint32{}

// Who adopts a cache finds what the one before would have found, and nothing else.
func TestAdopt(t *testing.T) {
	m := keptMemory(t, 9<<20)
	c := newKept(t, m)
	frames := c.Stats().Frames
	var keys []Key
	for n := range frames * 3 / 2 {
		k, p := real(n, 1)
		if n%7 == 0 {
			k.Shared = true
		}
		c.Put(k, p)
		keys = append(keys, k)
	}
	for n := range frames / 4 {
		c.Forget(keys[n*5].Phys)
	}
	was := c.Stats()
	d, _ := adopt(t, m)
	if !c.Kept() || !d.Kept() || New(nil).Kept() {
		t.Error("what outlives the guest is not told from what does not")
	}
	if st := d.Stats(); st.Used != 0 || st.Frames != frames || st.Hits != 0 {
		t.Errorf("before anything was looked at: %+v", st)
	}
	there := 0
	for _, k := range keys {
		if c.Has(k) != d.Has(k) {
			t.Fatalf("%+v is %v here, and %v with who adopted it", k, c.Has(k), d.Has(k))
		}
		var got [block.Size]byte
		if d.Get(k, 0, got[:]) {
			there++
			if ondisk.CRC(got[:]) != k.Sum {
				t.Fatalf("%+v brings something else", k)
			}
		}
	}
	if st := d.Stats(); there < frames*3/5 || there != was.Used || st.Used != was.Used || st.Adopted != was.Used || st.Damaged != 0 {
		t.Errorf("%d of %d frames are found; before %+v, now %+v", there, frames, was, st)
	}
	mustHold(t, d)
	// It goes on as a cache.
	for n := range 2 * frames {
		k, p := real(10*frames+n, 1)
		d.Put(k, p)
	}
	mustHold(t, d)
	if st := d.Stats(); st.Used < frames*9/10 {
		t.Errorf("%+v", st)
	}
}

// Lists, their order, second chances and what left lately are kept: of two caches that were
// one the one that was adopted hits as often as the other.
func TestAdoptedHitsAsOften(t *testing.T) {
	m := keptMemory(t, 16<<20)
	c := newKept(t, m)
	frames := c.Stats().Frames
	seed := rand.Uint64()
	zipf := func(seed uint64) func() int {
		z := rand.NewZipf(rand.New(rand.NewPCG(seed, 1)), 1.1, 20, uint64(3*frames))
		return func() int { return int(z.Uint64()*2654435761) % (4 * frames) }
	}
	run := func(c *Cache, next func() int, n int) (hits int) {
		for range n {
			k, p := real(next(), 1)
			var got [8]byte
			if c.Get(k, 0, got[:]) {
				hits++
			} else {
				c.Put(k, p)
			}
		}
		return hits
	}
	run(c, zipf(seed), 20*frames)
	d, _ := adopt(t, m)
	build(d)
	for i := range c.shards {
		for list := range c.shards[i].lists {
			if list != free && c.shards[i].lists[list].n != d.shards[i].lists[list].n {
				t.Errorf("list %d of shard %d has %d frames, had %d", list, i, d.shards[i].lists[list].n, c.shards[i].lists[list].n)
			}
		}
		s, before := &d.shards[i], &c.shards[i]
		f, g := s.lists[cold].head, before.lists[cold].head
		for f != 0 && f == g {
			f, g = s.records[f-1].next, before.records[g-1].next
		}
		if f != g {
			t.Errorf("the cold list of shard %d has another order", i)
		}
	}
	same, adopted := zipf(seed+1), zipf(seed+1)
	x, y := run(c, same, 10*frames), run(d, adopted, 10*frames)
	t.Logf("%d hits, and %d of who adopted", x, y)
	if float64(y) < 0.995*float64(x) {
		t.Errorf("seed %d: %d hits became %d", seed, x, y)
	}
}

// Each step of a change is a state that can be adopted, and none brings what is not there.
// The states are those after each word that is stored: memory is compared before and after an
// operation, and the words that differ are taken over one by one, in every order that a
// seed draws.
func TestAdoptHalfWay(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 7))
	m := keptMemory(t, headBytes+40*frameCost)
	c := newKept(t, m)
	for round := range 300 {
		before := bytes.Clone(m.Bytes)
		for range 1 + rng.IntN(3) {
			k, p := real(rng.IntN(60), 1+rng.IntN(3))
			switch rng.IntN(6) {
			case 0:
				c.Forget(k.Phys)
			case 1:
				c.Get(k, 0, p[:8])
			case 2:
				c.Offer(k, p)
			default:
				c.Put(k, p)
			}
		}
		var words []int
		for at := 0; at < len(before); at += 8 {
			if !bytes.Equal(before[at:at+8], m.Bytes[at:at+8]) {
				words = append(words, at)
			}
		}
		rng.Shuffle(len(words), func(i, j int) { words[i], words[j] = words[j], words[i] })
		torn := Memory{Bytes: before, Pool: m.Pool}
		for _, at := range words[:min(len(words), rng.IntN(len(words)+1))] {
			copy(torn.Bytes[at:at+8], m.Bytes[at:at+8])
		}
		d, _ := adopt(t, torn)
		if err := trueOnly(d, 60, 3); err != nil {
			t.Fatalf("seed %d round %d: %v", seed, round, err)
		}
	}
}

// trueOnly checks that a cache has only versions of blocks as they are, whatever is asked
// for, and that it is whole then.
func trueOnly(c *Cache, blocks, versions int) error {
	var got [block.Size]byte
	for n := range blocks {
		for v := range versions {
			for _, shared := range []bool{false, true} {
				k, p := real(n, v+1)
				k.Shared = shared
				if c.Get(k, 0, got[:]) && !bytes.Equal(got[:], p) {
					return fmt.Errorf("%+v is a hit with other bytes", k)
				}
			}
		}
	}
	build(c)
	return c.check()
}

// damage writes nonsense over some of a cache: bits, bytes, records of other frames, or
// parts of others.
func damage(rng *rand.Rand, m Memory, from int) {
	mem := m.Bytes[from:]
	at := rng.IntN(len(mem))
	part := mem[at:min(len(mem), at+1+rng.IntN(1<<rng.IntN(17)))]
	switch rng.IntN(5) {
	case 0:
		part[0] ^= 1 << rng.IntN(8)
	case 1:
		clear(part)
	case 2:
		copy(part, mem[rng.IntN(len(mem)):])
	case 3: // small numbers, which look like frames
		for i := 0; i+4 <= len(part); i += 4 {
			binary.LittleEndian.PutUint32(part[i:], rng.Uint32N(300))
		}
	default:
		for i := range part {
			part[i] = byte(rng.Uint32())
		}
	}
}

// damagedBlocks is of how many blocks some are in a cache that is damaged.
const damagedBlocks = 150

// Whatever lies in the memory, nothing is found that is not there, and what was not damaged
// is: a damaged frame costs itself, a damaged record its frame.
func TestAdoptDamaged(t *testing.T) {
	for round := range 400 {
		seed := rand.Uint64()
		rng := rand.New(rand.NewPCG(seed, 9))
		m := keptMemory(t, headBytes+(1+rng.IntN(60))*frameCost)
		if round%40 == 0 { // of several shards
			m = keptMemory(t, headBytes+1500*frameCost)
		}
		c := newKept(t, m)
		for range c.Stats().Frames * 2 {
			k, p := real(rng.IntN(damagedBlocks), 1+rng.IntN(2))
			c.Put(k, p)
		}
		whole := bytes.Clone(m.Bytes)
		before := c.Stats().Used
		for range 1 + rng.IntN(6) {
			damage(rng, m, headBytes)
		}
		if err := memoryOnly(t, m); err != nil {
			t.Fatalf("seed %d round %d: %v", seed, round, err)
		}
		// One frame and one record are all that is lost.
		copy(m.Bytes, whole)
		l := layoutOf(len(m.Bytes)).within(len(m.Bytes) - headBytes)
		m.Bytes[headBytes+rng.IntN(l.each<<l.bits*block.Size)] ^= 0x10
		m.Bytes[headBytes+l.each<<l.bits*block.Size+rng.IntN(l.each*40)] ^= 0x10
		d, _ := adopt(t, m)
		build(d)
		for n := range damagedBlocks {
			for v := range 2 {
				k, _ := real(n, v+1)
				d.View(k, func([]byte) {})
			}
		}
		if now := d.Stats().Used; now < before-2 {
			t.Fatalf("seed %d: %d frames were left of %d", seed, now, before)
		}
	}
}

// memoryOnly checks that memory gives a cache that is right, and can be used.
func memoryOnly(t testing.TB, m Memory) error {
	d, other := adopt(t, m)
	if err := trueOnly(d, damagedBlocks, 2); err != nil {
		return err
	}
	for n := range 3 * d.Stats().Frames {
		k, p := real(n%damagedBlocks, 3)
		d.Put(k, p)
		d.Forget(block.Physical(n * 7 % damagedBlocks))
	}
	if err := trueOnly(d, damagedBlocks, 3); err != nil {
		return err
	}
	d, _ = adopt(t, other)
	return trueOnly(d, damagedBlocks, 3)
}

// Blocks move along when a cache gets other memory, with their lists.
func TestMove(t *testing.T) {
	own, err := hpdi.AllocPrivate(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	c := Start(own, testPool, 8<<20)
	frames := c.Stats().Frames
	for n := range frames {
		k, p := real(n, 1)
		c.Put(k, p)
		if n%3 == 0 {
			c.Offer(k, p)
		}
	}
	before := c.Stats()
	bad, p := real(frames+1, 1)
	p[5] ^= 1
	c.Offer(bad, p)
	m := keptMemory(t, 8<<20)
	if err := c.Keep(m); err != nil {
		t.Fatal(err)
	}
	for i := range own {
		own[i] = 0xee
	}
	if err := hpdi.Free(own); err != nil {
		t.Fatal(err)
	}
	mustHold(t, c)
	if st := c.Stats(); st.Used < before.Used || st.Frames < 7*frames {
		t.Errorf("%+v became %+v", before, st)
	}
	if c.View(bad, func([]byte) {}) {
		t.Error("what was not proved is believed after the move")
	}
	if err := trueOnly(c, frames, 1); err != nil {
		t.Error(err)
	}
	d, _ := adopt(t, m)
	if err := trueOnly(d, frames, 1); err != nil || d.Stats().Used != c.Stats().Used {
		t.Errorf("%v, %+v", err, d.Stats())
	}
	d.Move(make([]byte, 1<<20)) // to less than it has
	mustHold(t, d)
	if st := d.Stats(); d.Kept() || st.Used < st.Frames*3/4 {
		t.Errorf("%+v", st)
	}
	c.Close()
	k, p := real(1, 1)
	if c.Put(k, p); c.Has(k) || c.Stats().Used != 0 || c.Stats().Hits == 0 {
		t.Errorf("closed: %+v", c.Stats())
	}
	mustHold(t, c)
}

func TestAdoptRefuses(t *testing.T) {
	m := keptMemory(t, 9<<20)
	newKept(t, m)
	for what, edit := range map[string]func(m *Memory){
		"another pool":     func(m *Memory) { m.Pool = block.PoolID{2} },
		"too little":       func(m *Memory) { m.Bytes = m.Bytes[:8<<20] },
		"a page":           func(m *Memory) { m.Bytes = m.Bytes[:block.Size] },
		"nothing in it":    func(m *Memory) { clear(m.Bytes[:headBytes]) },
		"another version":  func(m *Memory) { reseal(m.Bytes, cacheVersion+1, headerLen) },
		"another length":   func(m *Memory) { reseal(m.Bytes, cacheVersion, headerLen-8) },
		"odd frames":       func(m *Memory) { m.Bytes[68] |= 1; reseal(m.Bytes, cacheVersion, headerLen) },
		"too many shards":  func(m *Memory) { m.Bytes[64] = 40; reseal(m.Bytes, cacheVersion, headerLen) },
		"no frames":        func(m *Memory) { clear(m.Bytes[68:72]); reseal(m.Bytes, cacheVersion, headerLen) },
		"other frames":     func(m *Memory) { m.Bytes[73] = 32; reseal(m.Bytes, cacheVersion, headerLen) },
		"longer records":   func(m *Memory) { m.Bytes[76]++; reseal(m.Bytes, cacheVersion, headerLen) },
		"frames past them": func(m *Memory) { m.Bytes[70] = 9; reseal(m.Bytes, cacheVersion, headerLen) },
	} {
		other := keptMemory(t, len(m.Bytes))
		copy(other.Bytes, m.Bytes)
		edit(&other)
		if c, err := Adopt(other); err == nil || c != nil {
			t.Errorf("%s was adopted", what)
		}
	}
	for at := range 2 {
		other := keptMemory(t, len(m.Bytes))
		copy(other.Bytes, m.Bytes)
		clear(other.Bytes[at*block.Size:][:block.Size])
		if _, err := Adopt(other); err != nil {
			t.Errorf("with copy %d of the header alone: %v", 1-at, err)
		}
		f, err := ReadFacts(other.Bytes[:FactsBytes], int64(len(other.Bytes)))
		if err != nil || f.Pool != testPool || f.Frames != newKept(t, m).Stats().Frames || f.Shards != 4 {
			t.Errorf("%+v, %v", f, err)
		}
	}
	if _, err := ReadFacts(m.Bytes[:100], 4<<20); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("facts of too few bytes: %v", err)
	}
	if _, err := ReadFacts(make([]byte, FactsBytes), 4<<20); !errors.Is(err, ondisk.ErrMagic) {
		t.Errorf("facts of nothing: %v", err)
	}
	if err := New(nil).Keep(Memory{Bytes: m.Bytes[:headBytes+100]}); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("kept in too little memory: %v", err)
	}
}

// reseal makes both headers right for what is in the first.
func reseal(mem []byte, version uint16, length int) {
	for at := range 2 {
		p := mem[at*block.Size:]
		copy(p[:headerLen], mem[:headerLen])
		ondisk.Seal(p, ondisk.Header{Kind: KindCache, Version: version, Length: length, Pool: testPool})
	}
}

// The stored bytes of version 1: the header, and a record.
func TestGolden(t *testing.T) {
	h := header{pool: block.PoolID{0xaa, 0xbb}, layout: layout{bits: 7, each: 4112}}
	p := make([]byte, headerLen, headerLen+40)
	h.encode(p)
	m := keptMemory(t, headBytes+4*frameCost)
	c := newKept(t, m)
	c.Put(Key{Phys: block.At(3, 0x123456), Birth: 0x99, Sum: 0xcafe, Shared: true}, make([]byte, block.Size))
	p = append(p, m.Bytes[headBytes+4*block.Size:][:40]...)
	text, err := os.ReadFile("testdata/cache.hex")
	if err != nil {
		t.Fatalf("%v; the bytes are\n%x", err, p)
	}
	want, err := hex.DecodeString(strings.Join(strings.Fields(string(text)), ""))
	if err != nil || !bytes.Equal(want, p) {
		t.Errorf("%v\n got %x\nwant %x", err, p, want)
	}
	var back header
	if err := back.decode(p, 1<<40); err != nil || back != h {
		t.Errorf("%v, %+v", err, back)
	}
}

// FuzzAdopt adopts a small cache with bytes written over it, of which the checksum of the
// header may be right.
func FuzzAdopt(f *testing.F) {
	const frames = 6
	size := headBytes + frames*frameCost
	fill := func(m Memory) {
		c := Start(nil, testPool, size)
		if err := c.Keep(m); err != nil {
			f.Fatal(err)
		}
		for n := range 9 {
			k, p := real(n, 1+n%2)
			c.Put(k, p)
		}
	}
	records := headBytes + frames*block.Size
	f.Add(uint32(64), true, []byte{1, 0, 0, 0, 4, 0, 0, 0})
	f.Add(uint32(68), true, []byte{255, 255, 255, 255})
	f.Add(uint32(headBytes+100), false, []byte("not what the checksum says"))
	for r := range frames { // fields of records, and a whole one
		f.Add(uint32(records+40*r+20), false, []byte{1, 0, 0, 0, 1, 0, 0, 0})
		f.Add(uint32(records+40*r+32), false, []byte{255, 255, 255, 255, 2, 255})
	}
	f.Add(uint32(records+40*frames), false, bytes.Repeat([]byte{3, 0, 0, 0}, 4*frames))
	f.Add(uint32(records), false, bytes.Repeat([]byte{255}, 60*frames))
	whole := Memory{Bytes: make([]byte, size+block.Size), Pool: testPool}
	mem := Memory{Bytes: make([]byte, size), Pool: testPool}
	fill(Memory{Bytes: whole.Bytes[:size], Pool: testPool})
	f.Fuzz(func(t *testing.T, at uint32, seal bool, over []byte) {
		copy(mem.Bytes, whole.Bytes[:size])
		copy(mem.Bytes[int(at)%size:], over)
		if seal {
			reseal(mem.Bytes, cacheVersion, headerLen)
		}
		c, err := Adopt(mem)
		if err != nil {
			return
		}
		if err := trueOnly(c, 9, 3); err != nil {
			t.Fatal(err)
		}
		for n := range 20 {
			k, p := real(n, 3)
			c.Put(k, p)
		}
		if err := trueOnly(c, 20, 3); err != nil {
			t.Fatal(err)
		}
	})
}

// BenchmarkBuild makes the tables of the shards of an adopted cache of 1 GiB, one after the
// other.
func BenchmarkBuild(b *testing.B) {
	m := keptMemory(b, 1<<30)
	c := newKept(b, m)
	page := make([]byte, block.Size)
	for n := range c.Stats().Frames * 5 / 4 {
		c.Put(key(n*9%(1<<24)), page)
		if n%3 == 0 {
			c.Put(key((n-n%5)*9%(1<<24)), page)
		}
	}
	for b.Loop() {
		c, err := Adopt(m)
		if err != nil {
			b.Fatal(err)
		}
		build(c)
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/float64(len(c.shards)), "µs/shard")
}
