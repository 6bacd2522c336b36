package flashmap

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/internal/block"
)

// void is a device that does nothing, at once, and allocates nothing.
type void struct{ info hpdi.Info }

func (v void) Info() hpdi.Info                  { return v.info }
func (v void) NewQueue(int) (hpdi.Queue, error) { return &voidQueue{}, nil }
func (v void) Register([]byte) error            { return nil }
func (v void) Unregister([]byte) error          { return nil }
func (v void) Close() error                     { return nil }

type voidQueue struct {
	hpdi.Plain
	done []*hpdi.Request
}

func (q *voidQueue) Submit(reqs ...*hpdi.Request) error {
	for _, r := range reqs {
		r.Err = nil
	}
	q.done = append(q.done, reqs...)
	return nil
}

func (q *voidQueue) Wait(_ int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	done = append(done, q.done...)
	q.done = q.done[:0]
	return done, nil
}

func (q *voidQueue) Close() error { return nil }

// voids returns a primary of 1 TiB with slots data sets on flash, every second one,
// none of which has a byte of data behind it.
func voids(t testing.TB, slots int) (*Flash, Device) {
	t.Helper()
	info := hpdi.Info{Name: "void", Driver: "void", Size: 1 << 40, BlockSize: block.Size, Discard: true, Zeroes: true, Durable: true}
	l := label{generation: 1, shift: 16}
	l.segments = []segment{{start: reserved, mapPages: 600, tablePages: (slots + pageWords - 1) / pageWords, slots: slots}}
	if n := l.admit(member{0, primaryID, 1 << 24}); n != 1<<24 {
		t.Fatalf("room for %d data sets", n)
	}
	flash := info
	flash.Size = int64(l.end()) * block.Size
	f, err := newFlash(void{flash}, l)
	must(t, err)
	f.primaries[0] = f.label.primary(l.primaries[0])
	for i := range slots {
		set := Set(2 * i)
		k := keyOf(0, set)
		f.keys[i] = k
		f.primaries[0].put(set)
		f.stripeOf(hash(k)).insertLocked(f.keys, slotNumber(i))
	}
	d, err := f.Over(void{info}, Primary{ID: primaryID})
	must(t, err)
	return f, d
}

// requests returns requests of every kind that one may make again and again.
func requests() []*hpdi.Request {
	p := pattern(1, 2*setBlocks)
	vec := [][]byte{p[:setBytes/2], p[setBytes/2:]}
	return []*hpdi.Request{
		{Op: hpdi.OpRead, Offset: 4 * setBytes, Vec: [][]byte{p[:block.Size]}},
		{Op: hpdi.OpWrite, Offset: 5 * setBytes, Vec: [][]byte{p[:block.Size]}},
		{Op: hpdi.OpRead, Offset: 4*setBytes + block.Size, Vec: vec},
		{Op: hpdi.OpWrite, Offset: 4*setBytes + block.Size, Vec: vec},
		{Op: hpdi.OpWriteZeroes, Offset: 4*setBytes + block.Size, Length: 3 * setBytes},
		{Op: hpdi.OpDiscard, Offset: 4 * setBytes, Length: 3 * setBytes},
		{Op: hpdi.OpFlush},
	}
}

// No request allocates anything.
func TestAllocations(t *testing.T) {
	_, d := voids(t, 1000)
	q, err := d.NewQueue(16)
	must(t, err)
	reqs := requests()
	done := make([]*hpdi.Request, 0, len(reqs))
	if n := testing.AllocsPerRun(100, func() {
		must(t, q.Submit(reqs...))
		done, err = q.Wait(len(reqs), done[:0])
		must(t, err)
		for _, r := range done {
			must(t, r.Err)
		}
	}); n != 0 {
		t.Errorf("%.1f allocations for %d requests", n, len(reqs))
	}
}

// A data set on flash takes 13 to 16 bytes of memory, one of a primary a bit.
func TestMemory(t *testing.T) {
	const slots = 1 << 16
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	f, _ := voids(t, slots)
	runtime.GC()
	runtime.ReadMemStats(&after)
	got := float64(after.HeapAlloc-before.HeapAlloc) - 1<<24/8 - stripeCount*64
	per := got / slots
	t.Logf("%.1f bytes a data set on flash", per)
	if per > 16 {
		t.Error("that is more than the package comment says")
	}
	runtime.KeepAlive(f)
}

// BenchmarkLookup looks up data sets at random, of which half are on flash.
func BenchmarkLookup(b *testing.B) {
	for _, slots := range []int{1 << 14, 1 << 20} {
		_, d := voids(b, slots)
		rng := rand.New(rand.NewPCG(1, 2))
		offs := make([]int64, 1<<16)
		for i := range offs {
			offs[i] = rng.Int64N(2*int64(slots)) * setBytes
		}
		b.Run(fmt.Sprint(slots, "slots"), func(b *testing.B) {
			b.ReportAllocs()
			for i := range b.N {
				d.OnFlash(offs[i%len(offs)])
			}
		})
	}
}

// BenchmarkEnter is all that a request adds for a data set: coming in and leaving.
func BenchmarkEnter(b *testing.B) {
	f, d := voids(b, 1<<20)
	p := d.(*device).p
	rng := rand.New(rand.NewPCG(1, 2))
	sets := make([]Set, 1<<16)
	for i := range sets {
		sets[i] = Set(rng.IntN(2 << 20))
	}
	for _, op := range []hpdi.Op{hpdi.OpRead, hpdi.OpWrite} {
		b.Run(op.String(), func(b *testing.B) {
			b.ReportAllocs()
			for i := range b.N {
				set := sets[i%len(sets)]
				e := f.enter(p, set, op == hpdi.OpWrite)
				f.leave(p, set, e.slot, op, e.serial, 0, block.Size)
			}
		})
	}
}

// BenchmarkDevice is a request of 4 KiB through the layer, with devices that take no
// time.
func BenchmarkDevice(b *testing.B) {
	_, d := voids(b, 1<<20)
	b.Run("read", func(b *testing.B) { hpditest.Bench(b, d, hpdi.OpRead, block.Size, 8) })
	b.Run("write", func(b *testing.B) { hpditest.Bench(b, d, hpdi.OpWrite, block.Size, 8) })
}

// BenchmarkMemory is the same with devices of memory, every second data set on flash.
func BenchmarkMemory(b *testing.B) {
	const sets = 256
	primary, err := mem.New("primary", sets*setBytes)
	must(b, err)
	flash, err := mem.New("flash", 2<<20+sets*setBytes)
	must(b, err)
	_, err = Create(flash, CreateOptions{SetBytes: setBytes, Reach: reach, Notes: notes})
	must(b, err)
	f, err := Open(flash)
	must(b, err)
	d, err := f.Over(primary, Primary{Number: 3, ID: primaryID})
	must(b, err)
	for set := Set(0); set < sets; set += 2 {
		in(b, f, set)
	}
	b.Run("read", func(b *testing.B) { hpditest.Bench(b, d, hpdi.OpRead, block.Size, 8) })
	b.Run("write", func(b *testing.B) { hpditest.Bench(b, d, hpdi.OpWrite, block.Size, 8) })
	must(b, errors.Join(d.Close(), f.Close()))
}

// BenchmarkMove moves a data set to flash and back.
func BenchmarkMove(b *testing.B) {
	primary, flash := disks(b)
	f, _ := attach(b, primary, flash)
	b.SetBytes(2 * setBytes)
	for b.Loop() {
		in(b, f, 10)
		out(b, f, 10)
	}
}
