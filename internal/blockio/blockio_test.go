package blockio

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/cache"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

const devBlocks = 1024

// rig is a Reader over two devices full of blocks that tell of their address.
type rig struct {
	*Reader
	t     *testing.T
	fault [2]*blocktest.Fault
	crash [2]*blocktest.Crash
}

func newRig(t *testing.T, cacheBytes int) *rig {
	t.Helper()
	r := &rig{t: t}
	var devs []hpdi.Device
	for i := range r.fault {
		r.crash[i] = blocktest.NewCrashWith(blocktest.CrashOptions{Size: devBlocks * block.Size, Seed: uint64(i), Direct: true})
		r.fault[i] = blocktest.NewFault(r.crash[i], uint64(i))
		devs = append(devs, r.fault[i])
	}
	set := devices.NewSet(devs)
	mem, err := hpdi.AllocPrivate(devBlocks * block.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = hpdi.Free(mem) }()
	for dev := range devs {
		for b := range uint64(devBlocks) {
			copy(mem[b*block.Size:], content(block.At(dev, b)))
		}
		if err := set.Do([]*devices.IO{{Op: hpdi.OpWrite, At: block.At(dev, 0), Vec: [][]byte{mem}}}); err != nil {
			t.Fatal(err)
		}
	}
	if r.Reader, err = New(set, cache.New(make([]byte, cacheBytes))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if n := len(r.bufs); n != bounces {
			t.Errorf("%d bounce buffers of %d came back", n, bounces)
		}
		if err := errors.Join(r.Close(), set.Close()); err != nil {
			t.Error(err)
		}
	})
	return r
}

// content is what the block at p holds: each 8 bytes tell of address and place.
func content(p block.Physical) []byte {
	b := make([]byte, 0, block.Size)
	for i := range uint64(block.Size / 8) {
		b = binary.LittleEndian.AppendUint64(b, uint64(p)<<16|i)
	}
	return b
}

func pointer(dev int, b uint64) block.Pointer {
	p := block.At(dev, b)
	return block.Pointer{Phys: p, Birth: 3, Sum: ondisk.CRC(content(p))}
}

// fetches wants whole blocks.
func fetches(ptrs ...block.Pointer) []Fetch {
	var fs []Fetch
	for _, p := range ptrs {
		fs = append(fs, Fetch{Ptr: p, Dst: bytes.Repeat([]byte{0xee}, block.Size)})
	}
	return fs
}

// requests counts what reaches the devices from now on, and how large it is.
func (r *rig) requests() func() (sizes []int) {
	var mu sync.Mutex
	var sizes []int
	for _, f := range r.fault {
		f.Add(blocktest.Rule{Op: hpdi.OpRead, Hold: func(q *hpdi.Request) {
			mu.Lock()
			defer mu.Unlock()
			sizes = append(sizes, int(q.Bytes()/block.Size))
		}})
	}
	return func() []int {
		mu.Lock()
		defer mu.Unlock()
		got := sizes
		sizes = nil
		slices.Sort(got)
		return got
	}
}

// Neighbours that follow each other become one request; others do not.
func TestNeighboursMerge(t *testing.T) {
	r := newRig(t, 0)
	sizes := r.requests()
	for _, test := range []struct {
		name string
		want []block.Pointer
		reqs []int
	}{
		{"one", []block.Pointer{pointer(0, 5)}, []int{1}},
		{"neighbours", []block.Pointer{pointer(0, 5), pointer(0, 6), pointer(0, 7)}, []int{3}},
		{"a gap", []block.Pointer{pointer(0, 5), pointer(0, 6), pointer(0, 8)}, []int{1, 2}},
		{"backwards", []block.Pointer{pointer(0, 6), pointer(0, 5)}, []int{1, 1}},
		{"twice the same", []block.Pointer{pointer(0, 6), pointer(0, 6)}, []int{1, 1}},
		{"two devices", []block.Pointer{pointer(0, 5), pointer(1, 6), pointer(1, 7)}, []int{1, 2}},
		{"back and forth", []block.Pointer{pointer(0, 5), pointer(1, 6), pointer(0, 6), pointer(0, 7)}, []int{1, 1, 2}},
	} {
		fs := fetches(test.want...)
		if err := r.ReadAll(fs); err != nil {
			t.Errorf("%s: %v", test.name, err)
		}
		for i, f := range fs {
			if f.Err != nil || !bytes.Equal(f.Dst, content(f.Ptr.Phys)) {
				t.Errorf("%s: fetch %d: %v", test.name, i, f.Err)
			}
		}
		if got := sizes(); !slices.Equal(got, test.reqs) {
			t.Errorf("%s: requests of %v blocks instead of %v", test.name, got, test.reqs)
		}
	}
	// More than a buffer holds.
	var many []block.Pointer
	for b := range uint64(2*bounceBlocks + 3) {
		many = append(many, pointer(1, 100+b))
	}
	fs := fetches(many...)
	if err := r.ReadAll(fs); err != nil {
		t.Fatal(err)
	}
	for i, f := range fs {
		if !bytes.Equal(f.Dst, content(f.Ptr.Phys)) {
			t.Errorf("fetch %d of many holds something else", i)
		}
	}
	if got := sizes(); !slices.Equal(got, []int{3, bounceBlocks, bounceBlocks}) {
		t.Errorf("requests of %v blocks", got)
	}
}

// A part of a block is copied from where it was asked for.
func TestPartOfBlock(t *testing.T) {
	r := newRig(t, 1<<20)
	p := pointer(0, 9)
	for _, cached := range []bool{false, true} {
		f := []Fetch{{Ptr: p, Off: 100, Dst: make([]byte, 300)}}
		if cached {
			if !r.Cached(p, 100, f[0].Dst) {
				t.Error("not cached")
			}
		} else if err := r.ReadAll(f); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(f[0].Dst, content(p.Phys)[100:400]) {
			t.Errorf("cached %v: other bytes", cached)
		}
	}
}

var errBroken = errors.New("broken")

// A failed request is the error of exactly the blocks that it was for, in
// whichever buffer's worth of fetches, and the others are there.
func TestReadErrorsStayApart(t *testing.T) {
	const n = 3*bounceBlocks + 5
	for _, bad := range []uint64{0, 7, bounceBlocks, 2*bounceBlocks + 1, n - 1} {
		r := newRig(t, 4<<20)
		var want []block.Pointer
		for b := range uint64(n) {
			want = append(want, pointer(int(b/4%2), 1+b)) // runs of 4
		}
		r.fault[bad/4%2].Add(blocktest.Rule{Op: hpdi.OpRead, Err: errBroken, Offset: int64(1+bad) * block.Size, Length: block.Size})
		fs := fetches(want...)
		err := r.ReadAll(fs)
		if !errors.Is(err, errBroken) {
			t.Errorf("block %d broken: %v", bad, err)
		}
		if e, other := r.set.Errors(int(bad/4%2)), r.set.Errors(int(1-bad/4%2)); e != (devices.Errors{Reads: 1}) || other != (devices.Errors{}) {
			t.Errorf("block %d broken: counted %+v, %+v", bad, e, other)
		}
		for i, f := range fs {
			hit := uint64(i)/4 == bad/4
			if hit != errors.Is(f.Err, errBroken) || !hit && f.Err != nil {
				t.Errorf("block %d broken: fetch %d: %v", bad, i, f.Err)
			}
			if !hit && !bytes.Equal(f.Dst, content(f.Ptr.Phys)) {
				t.Errorf("block %d broken: fetch %d was not read", bad, i)
			}
			if hit && !bytes.Equal(f.Dst, bytes.Repeat([]byte{0xee}, block.Size)) {
				t.Errorf("block %d broken: fetch %d was given bytes", bad, i)
			}
			if r.cache.Has(r.key(f.Ptr)) == hit {
				t.Errorf("block %d broken: fetch %d cached: %v", bad, i, !hit)
			}
		}
	}
}

// Of blocks read together one is damaged: its bytes go nowhere.
func TestDamagedBlock(t *testing.T) {
	r := newRig(t, 1<<20)
	r.crash[0].Corrupt(6*block.Size+77, 4)
	fs := fetches(pointer(0, 5), pointer(0, 6), pointer(0, 7))
	err := r.ReadAll(fs)
	if !errors.Is(err, block.ErrCorrupt) || r.set.Errors(0) != (devices.Errors{Corrupt: 1}) {
		t.Errorf("%v, counted %+v", err, r.set.Errors(0))
	}
	for i, f := range fs {
		damaged := i == 1
		if (f.Err != nil) != damaged || r.cache.Has(r.key(f.Ptr)) == damaged {
			t.Errorf("fetch %d: %v, cached %v", i, f.Err, r.cache.Has(r.key(f.Ptr)))
		}
		if bytes.Equal(f.Dst, content(f.Ptr.Phys)) == damaged {
			t.Errorf("fetch %d has wrong bytes", i)
		}
	}
	if !bytes.Equal(fs[1].Dst, bytes.Repeat([]byte{0xee}, block.Size)) {
		t.Error("damaged bytes were handed on")
	}
	if err := r.View(fs[1].Ptr, func([]byte) { t.Error("damaged bytes were shown") }); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("%v", err)
	}
	// The block at the right place that is another version is as wrong.
	old := pointer(0, 7)
	old.Sum++
	if err := r.View(old, func([]byte) { t.Error("another version was shown") }); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("%v", err)
	}
	if r.ViewCached(old, func([]byte) {}) {
		t.Error("another version is cached under this one's name")
	}
}

func TestView(t *testing.T) {
	r := newRig(t, 1<<20)
	sizes := r.requests()
	p := pointer(1, 40)
	view := func() (seen bool, err error) {
		err = r.View(p, func(frame []byte) { seen = bytes.Equal(frame, content(p.Phys)) })
		return seen, err
	}
	if r.ViewCached(p, func([]byte) {}) || r.Cached(p, 0, make([]byte, 8)) {
		t.Error("cached before it was read")
	}
	for range 2 {
		if seen, err := view(); !seen || err != nil {
			t.Errorf("%v %v", seen, err)
		}
	}
	if got := sizes(); len(got) != 1 {
		t.Errorf("%d requests for two views", len(got))
	}
	r.Forget(block.At(1, 38), 2)
	if !r.ViewCached(p, func([]byte) {}) {
		t.Error("forgot its neighbour's block")
	}
	r.Forget(block.At(1, 38), 3)
	if r.ViewCached(p, func([]byte) {}) {
		t.Error("not forgotten")
	}
	r.fault[1].Clear()
	r.fault[1].Add(blocktest.Rule{Op: hpdi.OpRead, Err: errBroken})
	if seen, err := view(); seen || !errors.Is(err, errBroken) {
		t.Errorf("%v %v", seen, err)
	}
	r.Put(p, content(p.Phys))
	if seen, err := view(); !seen || err != nil {
		t.Errorf("after Put: %v %v", seen, err)
	}
	// An address that no device has.
	if err := r.View(block.Pointer{Phys: block.At(2, 1)}, func([]byte) {}); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("%v", err)
	}
	if err := r.View(pointer(0, devBlocks), func([]byte) {}); err == nil {
		t.Error("a block beyond the device")
	}
}

// Prefetch brings in what is missing, and is silent about what it cannot.
func TestPrefetch(t *testing.T) {
	r := newRig(t, 4<<20)
	sizes := r.requests()
	have := pointer(0, 11)
	r.Put(have, content(have.Phys))
	r.crash[0].Corrupt(13*block.Size, 1)
	ptrs := []block.Pointer{{}, pointer(0, 10), have, pointer(0, 12), pointer(0, 13), {}}
	r.Prefetch(ptrs)
	r.Prefetch(nil)
	if got := sizes(); !slices.Equal(got, []int{1, 2}) {
		t.Errorf("requests of %v blocks", got)
	}
	for _, p := range ptrs {
		if want := !p.IsHole() && p.Phys.Block() != 13; r.cache.Has(r.key(p)) != want {
			t.Errorf("%v cached: %v", p, !want)
		}
	}
	var many []block.Pointer
	for b := range uint64(3 * bounceBlocks) {
		many = append(many, pointer(1, 1+b))
	}
	r.fault[1].Add(blocktest.Rule{Op: hpdi.OpRead, Err: errBroken})
	r.Prefetch(many)
	for _, p := range many {
		if !r.cache.Has(r.key(p)) {
			t.Errorf("%v was not brought in", p)
		}
	}
}

// Readers at once, some of them unlucky, share the buffers.
func TestConcurrentReaders(t *testing.T) {
	r := newRig(t, 64<<10)
	r.fault[0].Add(blocktest.Rule{Op: hpdi.OpRead, Err: errBroken, Probability: 0.1})
	r.fault[1].Add(blocktest.Rule{Op: hpdi.OpRead, FlipBits: 1, Probability: 0.1})
	const seed = 11
	var good, bad atomic.Int64
	var wg sync.WaitGroup
	for g := range uint64(2 * bounces) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, g))
			for range 10 {
				var ps []block.Pointer
				at := rng.Uint64N(devBlocks - 100)
				for i := range 1 + rng.Uint64N(90) {
					ps = append(ps, pointer(int(i/8%2), 1+at+i))
				}
				fs := fetches(ps...)
				err := r.ReadAll(fs)
				some := false
				for _, f := range fs {
					if f.Err == nil && !bytes.Equal(f.Dst, content(f.Ptr.Phys)) {
						t.Errorf("seed %d: block %v holds something else", seed, f.Ptr)
					}
					some = some || f.Err != nil
				}
				if some != (err != nil) {
					t.Errorf("seed %d: %v, although a fetch failed: %v", seed, err, some)
				}
				if some {
					bad.Add(1)
				} else {
					good.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if good.Load() == 0 || bad.Load() == 0 {
		t.Errorf("seed %d: %d good and %d bad reads prove little", seed, good.Load(), bad.Load())
	}
}
