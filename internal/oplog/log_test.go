package oplog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

func section(t testing.TB, extents int) []byte {
	t.Helper()
	mem, err := hpdi.AllocPrivate(int(SectionSize(int64(extents) * block.Size)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hpdi.Free(mem) })
	return mem
}

func format(t testing.TB, mem []byte, extents int, start block.Seq) *Log {
	t.Helper()
	l, err := Format(mem, Config{PayloadBytes: int64(extents) * block.Size, Pool: block.PoolID{7}, Epoch: 3, Start: start})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// write allocates n extents, fills them from the seed and returns the records.
func write(t testing.TB, l *Log, lba block.Logical, n int, seed uint64) []Record {
	t.Helper()
	ext, ok := l.Alloc(n, nil)
	if !ok {
		t.Fatalf("no room for %d blocks, %d free", n, l.ExtentsFree())
	}
	rng := rand.New(rand.NewPCG(seed, uint64(lba)))
	var recs []Record
	for i := 0; i < n; {
		k := 1
		for k < MaxRecordBlocks && i+k < n && ext[i+k] == ext[i]+Extent(k) {
			k++
		}
		p := l.Payload(ext[i], k)
		for j := 0; j < len(p); j += 512 {
			p[j] = byte(rng.Uint32())
		}
		r := Record{Volume: 1, LBA: lba + block.Logical(i), Kind: KindWrite, Count: uint64(k), First: ext[i]}
		l.Sum(&r)
		recs = append(recs, r)
		i += k
	}
	return recs
}

func mustPublish(t testing.TB, l *Log, recs []Record) {
	t.Helper()
	if _, ok := l.Publish(recs); !ok {
		t.Fatalf("no room for %d records", len(recs))
	}
}

func collect(t testing.TB, l *Log) []Record {
	t.Helper()
	var all []Record
	if err := l.Replay(l.Tail(), l.Head(), func(r *Record) error {
		all = append(all, *r)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

func TestPublishAttachRelease(t *testing.T) {
	mem := section(t, 100)
	l := format(t, mem, 100, 41)
	if l.Capacity() != 100 || l.ExtentsFree() != 100 || l.Slots() < 200 {
		t.Fatalf("capacity %d, free %d, slots %d", l.Capacity(), l.ExtentsFree(), l.Slots())
	}
	recs := write(t, l, 10, 20, 1)
	recs = append(recs, Record{Volume: 2, LBA: 5, Kind: KindZero, Count: 1 << 40}, Record{Kind: KindNop})
	first, ok := l.Publish(recs)
	if !ok || first != 42 || l.Head() != 41+block.Seq(len(recs)) {
		t.Fatalf("first %d, %v, head %d", first, ok, l.Head())
	}
	l.SetEpoch(9)

	a, err := Attach(mem)
	if err != nil {
		t.Fatal(err)
	}
	if a.Head() != l.Head() || a.Tail() != 41 || a.ExtentsFree() != 80 || a.Epoch() != 9 || a.Pool() != l.Pool() || a.Repaired() != 0 {
		t.Fatalf("head %d tail %d free %d epoch %d repaired %d", a.Head(), a.Tail(), a.ExtentsFree(), a.Epoch(), a.Repaired())
	}
	for i, r := range collect(t, a) {
		if r != recs[i] {
			t.Errorf("record %d is %+v, was %+v", i, r, recs[i])
		}
		if bad := a.VerifyPayload(&r); bad != nil {
			t.Errorf("record %d: bad blocks %v", i, bad)
		}
	}
	w := recs[1]
	a.Payload(w.First+2, 1)[7] ^= 1
	if bad := a.VerifyPayload(&w); len(bad) != 1 || bad[0] != 2 {
		t.Errorf("bad blocks %v, want [2]", bad)
	}
	a.Release(42)
	if a.Tail() != 42 || a.ExtentsFree() != 80+int(recs[0].Count) {
		t.Errorf("tail %d free %d", a.Tail(), a.ExtentsFree())
	}
	if _, err := a.Get(42); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("released record: %v", err)
	}
	a.Release(a.Head())
	if a.ExtentsFree() != 100 || a.SlotsFree() != a.Slots() {
		t.Errorf("free %d, slots %d of %d", a.ExtentsFree(), a.SlotsFree(), a.Slots())
	}
}

func TestRingFull(t *testing.T) {
	l := format(t, section(t, 1), 1, 0)
	nops := make([]Record, l.Slots()-1)
	for i := range nops {
		nops[i].Kind = KindNop
	}
	mustPublish(t, l, nops)
	if _, ok := l.Publish([]Record{{Kind: KindNop}, {Kind: KindNop}}); ok {
		t.Fatal("two records in one slot")
	}
	mustPublish(t, l, []Record{{Kind: KindNop}})
	if l.SlotsFree() != 0 {
		t.Fatal("room in a full ring")
	}
	l.Release(1)
	mustPublish(t, l, []Record{{Kind: KindNop}})
}

// A long life in a small log, attached again now and then.
func TestLaps(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	mem := section(t, 150)
	l := format(t, mem, 150, 0)
	var live []Record
	for range 3000 {
		n := 1 + rng.IntN(40)
		if n <= l.ExtentsFree() {
			recs := write(t, l, block.Logical(rng.Uint32()), n, rng.Uint64())
			mustPublish(t, l, recs)
			live = append(live, recs...)
		} else {
			k := 1 + rng.IntN(len(live))
			l.Release(live[k-1].Seq)
			live = live[k:]
		}
		if rng.IntN(20) == 0 {
			a, err := Attach(mem)
			if err != nil {
				t.Fatal(err)
			}
			if a.Repaired() != 0 || a.ExtentsFree() != l.ExtentsFree() || a.Head() != l.Head() || a.Tail() != l.Tail() {
				t.Fatalf("free %d/%d head %d/%d tail %d/%d", a.ExtentsFree(), l.ExtentsFree(), a.Head(), l.Head(), a.Tail(), l.Tail())
			}
			l = a
		}
		got := collect(t, l)
		if len(got) != len(live) {
			t.Fatalf("%d records, want %d", len(got), len(live))
		}
		for i := range got {
			if got[i] != live[i] || l.VerifyPayload(&got[i]) != nil {
				t.Fatalf("record %d differs", got[i].Seq)
			}
		}
	}
}

// Writers, one publisher at a time, a releaser and a reader work at once.
func TestConcurrent(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	const extents, writers, each = 200, 4, 400
	l := format(t, section(t, extents), extents, 0)
	var publish sync.Mutex
	var wg sync.WaitGroup
	for w := range uint64(writers) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, w))
			var ext []Extent
			for range each {
				ok := false
				for n := 1 + rng.IntN(20); !ok; runtime.Gosched() {
					ext, ok = l.Alloc(n, ext[:0])
				}
				if rng.IntN(8) == 0 {
					l.Free(ext)
					continue
				}
				for _, e := range ext {
					binary.LittleEndian.PutUint64(l.Payload(e, 1), w<<32|uint64(e))
					r := []Record{{Volume: block.VolumeID(w), Kind: KindWrite, Count: 1, First: e}}
					l.Sum(&r[0])
					for ok := false; !ok; runtime.Gosched() {
						publish.Lock()
						_, ok = l.Publish(r)
						publish.Unlock()
					}
				}
			}
		})
	}
	stop := make(chan struct{})
	released := make(chan struct{})
	go func() {
		defer close(released)
		for done := false; !done; runtime.Gosched() {
			select {
			case <-stop:
				done = true
			default:
			}
			head := l.Head()
			if err := l.Replay(l.Tail(), head, func(r *Record) error {
				if bad := l.VerifyPayload(r); bad != nil {
					return fmt.Errorf("record %d: bad blocks %v", r.Seq, bad)
				}
				if got := binary.LittleEndian.Uint64(l.Payload(r.First, 1)); got != uint64(r.Volume)<<32|uint64(r.First) {
					return fmt.Errorf("record %d: payload of another", r.Seq)
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
			l.Release(head)
		}
	}()
	wg.Wait()
	close(stop)
	<-released
	if l.ExtentsFree() != extents || l.Tail() != l.Head() {
		t.Errorf("%d of %d extents free, tail %d, head %d", l.ExtentsFree(), extents, l.Tail(), l.Head())
	}
}

// Runs as long as there are any, then whatever is left; all or nothing.
func TestAlloc(t *testing.T) {
	l := format(t, section(t, 200), 200, 0)
	a, ok := l.Alloc(64, nil)
	if !ok {
		t.Fatal("no room")
	}
	for i := range a {
		if i%MaxRecordBlocks != 0 && a[i] != a[i-1]+1 {
			t.Errorf("run broken at %d: %v", i, a)
		}
	}
	if b, ok := l.Alloc(137, a[:0:0]); ok || len(b) != 0 || l.ExtentsFree() != 136 {
		t.Errorf("took %d with %d free", len(b), l.ExtentsFree())
	}
	b, ok := l.Alloc(136, nil)
	if !ok || l.ExtentsFree() != 0 {
		t.Fatal("not all are to be had")
	}
	var odd []Extent // a checkerboard: no two free neighbours
	for _, e := range append(a, b...) {
		if e%2 == 1 {
			odd = append(odd, e)
		}
	}
	l.Free(odd)
	c, ok := l.Alloc(len(odd), nil)
	slices.Sort(c)
	if !ok || !slices.Equal(c, slices.Sorted(slices.Values(odd))) {
		t.Errorf("%v, got %v", ok, c)
	}
	defer func() {
		if recover() == nil {
			t.Error("a double free went unnoticed")
		}
	}()
	l.Free([]Extent{3, 3})
}

func TestFormatRefuses(t *testing.T) {
	mem := section(t, 10)
	for name, c := range map[string]struct {
		mem     []byte
		payload int64
	}{
		"too large":  {mem, 11 * block.Size},
		"no payload": {mem, 0},
		"odd length": {mem[:len(mem)-8], block.Size},
		"unaligned":  {mem[8 : len(mem)-pageSize+8], block.Size},
		"tiny":       {mem[:pageSize], block.Size},
	} {
		if _, err := Format(c.mem, Config{PayloadBytes: c.payload}); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Attach(mem); !errors.Is(err, ondisk.ErrMagic) {
		t.Errorf("attach to zeroes: %v", err)
	}
}
