package oplog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// frozen returns a copy of mem that the processor does not let anybody store
// to: a view that does ends the test run.
func frozen(t testing.TB, mem []byte) []byte {
	t.Helper()
	m, err := hpdi.AllocPrivate(len(mem))
	if err != nil {
		t.Fatal(err)
	}
	copy(m, mem)
	if err := unix.Mprotect(m, unix.PROT_READ); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hpdi.Free(m) })
	return m
}

func view(t testing.TB, mem []byte) *View {
	t.Helper()
	v, err := OpenView(mem)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// seen returns the records from tail to head as a view shows them.
func seen(t testing.TB, v *View) (recs []Record) {
	t.Helper()
	for seq := v.Tail() + 1; seq <= v.Head(); seq++ {
		rec, err := v.Get(seq)
		if err != nil {
			t.Fatal(err)
		}
		recs = append(recs, rec)
	}
	return recs
}

func sameRecords(a, b []Record) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func TestView(t *testing.T) {
	mem, l, live := damaged(t)
	l.SetEpoch(9)
	v := view(t, frozen(t, mem))
	h, err := v.Header()
	want := Header{
		Pool: l.Pool(), Epoch: 9, Birth: 3, Generation: 2, Extents: uint64(l.Capacity()),
		Slots: uint64(l.Slots()), Size: int64(len(mem)),
	}
	if err != nil || h != want {
		t.Errorf("header %+v, %v; want %+v", h, err, want)
	}
	if v.Head() != l.Head() || v.Tail() != l.Tail() {
		t.Errorf("%d to %d, is %d to %d", v.Tail(), v.Head(), l.Tail(), l.Head())
	}
	if !sameRecords(seen(t, v), live) {
		t.Errorf("records %+v, are %+v", seen(t, v), live)
	}
	for i, r := range live {
		if n := int(r.Count * isWrite(r.Kind)); n > 0 && !bytes.Equal(v.Payload(r.First, n), l.Payload(r.First, n)) {
			t.Errorf("payload of record %d differs", i)
		}
		if bad := v.VerifyPayload(&r); bad != nil {
			t.Errorf("record %d: bad blocks %v", i, bad)
		}
		if _, bad, err := v.Look(r.Seq); bad != nil || err != nil {
			t.Errorf("record %d: %v, %v", i, bad, err)
		}
	}
	if bad, lost := v.Damage(); bad != nil || lost != nil {
		t.Errorf("damage %v, %v", bad, lost)
	}
	for _, seq := range []block.Seq{0, 1, l.Tail(), l.Head() + 1, l.Head() + 2, 1 << 40, 1<<64 - 1} {
		if _, err := v.Get(seq); !errors.Is(err, block.ErrNotFound) {
			t.Errorf("get of %d: %v", seq, err)
		}
	}
	for _, e := range []struct {
		first Extent
		n     int
	}{{0, 17}, {16, 1}, {1<<32 - 1, 1}, {3, -1}, {0, 1 << 62}} {
		if p := v.Payload(e.first, e.n); p != nil {
			t.Errorf("payload %d+%d has %d bytes", e.first, e.n, len(p))
		}
	}
}

func TestViewOfNoLog(t *testing.T) {
	mem := section(t, 16)
	if _, err := OpenView(mem); !errors.Is(err, ondisk.ErrMagic) {
		t.Errorf("empty memory: %v", err)
	}
	for _, n := range []int{0, 1, 4096, len(mem) - 1} {
		if _, err := OpenView(mem[:n]); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	format(t, mem, 16, 0)
	v := view(t, mem)
	format(t, mem, 16, 7)
	if _, err := v.Header(); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("another log in the same memory: %v", err)
	}
}

// A view agrees with Attach about what every store of publication, release and
// change of epoch leaves behind, and it alone leaves it as it is.
func TestViewOfEveryStore(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	const extents = 16
	mem := section(t, extents)
	l := format(t, mem, extents, 5)
	before, now := section(t, extents), section(t, extents)
	for step := range 60 {
		copy(before, mem)
		tr := &trace{}
		rec := recorder{l.out, tr}
		switch n := 1 + rng.IntN(8); {
		case step%10 == 9:
			l.hdr.epoch++
			l.hdr.generation++
			storeHeader(rec, &l.geo, &l.hdr)
		case n <= l.ExtentsFree():
			if _, ok := publish(rec, l, write(t, l, block.Logical(rng.Uint32()), n, rng.Uint64())); !ok {
				t.Fatal("no room")
			}
		default:
			release(rec, l, l.Tail()+1+block.Seq(rng.IntN(int(l.Head()-l.Tail()))))
		}
		for cut := range len(tr.stores) + 1 {
			copy(now, before)
			copyArena(l, now, mem)
			apply(now, tr.stores, cut, rng)
			untouched := bytes.Clone(now)
			v := view(t, now)
			got, tail, head := seen(t, v), v.Tail(), v.Head()
			h, err := v.Header()
			bad, lost := v.Damage()
			if err != nil || lost != nil {
				t.Fatalf("step %d cut %d: %v, %v", step, cut, err, lost)
			}
			if _, err := v.Get(head + 1); !errors.Is(err, block.ErrNotFound) {
				t.Fatalf("step %d cut %d: after the head: %v", step, cut, err)
			}
			if !bytes.Equal(untouched, now) {
				t.Fatal("the view has changed the memory")
			}
			a, err := Attach(now)
			if err != nil {
				t.Fatal(err)
			}
			if tail != a.Tail() || head != a.Head() || h.Epoch != a.Epoch() || !sameRecords(got, collect(t, a)) {
				t.Fatalf("step %d cut %d: view %d to %d epoch %d %+v, attached %d to %d epoch %d %+v", step, cut,
					tail, head, h.Epoch, got, a.Tail(), a.Head(), a.Epoch(), collect(t, a))
			}
			if len(bad) > 0 && a.Repaired() == 0 {
				t.Fatalf("step %d cut %d: %v, and nothing repaired", step, cut, bad)
			}
		}
	}
}

// A log that is written to and released all the time shows a view only whole
// records, and positions that only rise.
func TestViewOfLiveLog(t *testing.T) {
	const extents, total = 64, 30000
	mem := section(t, extents)
	l := format(t, mem, extents, 0)
	v := view(t, mem)
	var owner sync.WaitGroup
	owner.Go(func() {
		rng := rand.New(rand.NewPCG(1, 1))
		for l.Head() < total {
			if rng.IntN(4) == 0 || l.ExtentsFree() < 8 {
				l.Release(l.Tail() + block.Seq(rng.IntN(int(l.Head()-l.Tail())+1)))
				l.SetEpoch(l.Epoch() + 1)
				continue
			}
			recs := write(t, l, block.Logical(l.Head()), 1+rng.IntN(8), rng.Uint64())
			for i := range recs {
				recs[i].LBA = block.Logical(l.Head()) + 1 + block.Logical(i)
			}
			mustPublish(t, l, recs)
		}
	})
	var watchers sync.WaitGroup
	for range 2 {
		watchers.Go(func() {
			var tail, head block.Seq
			found := 0
			for head < total {
				h, t0 := v.Head(), v.Tail()
				if h < head || t0 < tail {
					t.Errorf("head %d after %d, tail %d after %d", h, head, t0, tail)
					return
				}
				head, tail = h, t0
				if _, err := v.Header(); err != nil {
					t.Error(err)
					return
				}
				if _, lost := v.Damage(); lost != nil {
					t.Error(lost)
					return
				}
				for _, seq := range []block.Seq{tail + 1, (head + tail) / 2, head, head + 1} {
					rec, err := v.Get(seq)
					if err == nil {
						found++
					}
					// The owner gives each record its sequence as its address.
					if err == nil && rec.LBA != block.Logical(seq) || err != nil && !errors.Is(err, block.ErrNotFound) {
						t.Errorf("record %d is %+v, %v", seq, rec, err)
						return
					}
				}
			}
			if found == 0 {
				t.Error("no record was ever seen")
			}
		})
	}
	owner.Wait()
	watchers.Wait()
}

// One bad copy, wherever it is, costs a view nothing, and it says where it is.
func TestViewOfOneBadCopy(t *testing.T) {
	mem, l, live := damaged(t)
	var places []int
	for c := range 2 {
		for _, r := range live {
			for i := range recordSize {
				places = append(places, l.geo.ring[c]+l.slot(r.Seq)+i)
			}
		}
		for i := range logHeaderLen {
			places = append(places, l.geo.header[c]+i)
		}
		for i := range 16 {
			places = append(places, l.geo.header[c]+tailCellAt+i, l.geo.header[c]+headCellAt+i)
		}
	}
	for _, at := range places {
		mem[at] ^= 1 << (at % 8)
		v := view(t, mem)
		if !sameRecords(seen(t, v), live) || v.Tail() != l.Tail() {
			t.Fatalf("byte %d: %d to %d: %+v", at, v.Tail(), v.Head(), seen(t, v))
		}
		said, lost := v.Damage()
		for _, r := range live {
			_, bad, err := v.Look(r.Seq)
			if err != nil {
				t.Fatalf("byte %d: %v", at, err)
			}
			said = append(said, bad...)
		}
		if len(said) != 1 || lost != nil {
			t.Fatalf("byte %d: %v, %v", at, said, lost)
		}
		mem[at] ^= 1 << (at % 8)
	}
}

// What is bad in both copies is an error with its place; all else can be seen.
func TestViewOfTwoBadCopies(t *testing.T) {
	mem, l, live := damaged(t)
	both := func(a, b int) (restore func()) {
		mem[a] ^= 2
		mem[b] ^= 2
		return func() { mem[a] ^= 2; mem[b] ^= 2 }
	}
	for _, r := range live {
		restore := both(l.geo.ring[0]+l.slot(r.Seq)+30, l.geo.ring[1]+l.slot(r.Seq)+30)
		v := view(t, mem)
		if v.Head() != l.Head() {
			t.Errorf("record %d bad: head %d", r.Seq, v.Head())
		}
		for _, o := range live {
			_, err := v.Get(o.Seq)
			var d *DamageError
			if lost := errors.As(err, &d) && d.First == r.Seq; lost != (o.Seq == r.Seq) || !lost && err != nil {
				t.Errorf("record %d bad: get of %d: %v", r.Seq, o.Seq, err)
			}
		}
		restore()
	}
	for _, at := range []int{tailCellAt, headCellAt} {
		restore := both(l.geo.header[0]+at+3, l.geo.header[1]+at+3)
		v := view(t, mem)
		if _, lost := v.Damage(); !errors.Is(lost, block.ErrCorrupt) {
			t.Errorf("position at %d bad: %v", at, lost)
		}
		for _, o := range live { // still there for who wants to look
			if rec, err := v.Get(o.Seq); err != nil || rec != o {
				t.Errorf("position at %d bad: get of %d: %v", at, o.Seq, err)
			}
		}
		if v.Head() != l.Head() && at == headCellAt {
			t.Errorf("head %d without its position", v.Head())
		}
		restore()
	}
	restore := both(l.geo.header[0]+70, l.geo.header[1]+70)
	if _, err := OpenView(mem); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("both headers bad: %v", err)
	}
	restore()
	// The last record and the stored head are lost together.
	last := live[len(live)-1].Seq
	both(l.geo.ring[0]+l.slot(last), l.geo.ring[1]+l.slot(last))
	both(l.geo.ring[0]+l.slot(last-1)+8, l.geo.ring[1]+l.slot(last-1)+8)
	storeCell(l.out, &l.geo, headCellAt, last-3, l.seed)
	p := new([recordSize]byte)
	(&Record{Seq: last + 1, Kind: KindNop}).encode(p, l.seed)
	storeRecord(l.out, l.geo.ring[1]+l.slot(last+1), p)
	v := view(t, mem)
	if _, err := v.Get(last - 1); !errors.Is(err, block.ErrCorrupt) || v.Head() != last-2 {
		t.Errorf("a bad record before a whole one: %v, head %d", err, v.Head())
	}
}

// A head that was seen beyond the stored position stays, whatever becomes of the
// record: a reader who is slow finds its slot used again.
func TestViewHeadOnlyRises(t *testing.T) {
	mem, l, live := damaged(t)
	last := live[len(live)-1].Seq
	storeCell(l.out, &l.geo, headCellAt, last-1, l.seed)
	v := view(t, mem)
	if v.Head() != last {
		t.Fatalf("head %d, is %d", v.Head(), last)
	}
	for _, ring := range l.geo.ring {
		mem[ring+l.slot(last)] ^= 1
	}
	if v.Head() != last {
		t.Errorf("head %d after %d", v.Head(), last)
	}
	if _, err := v.Get(last); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("get of the record that was seen: %v", err)
	}
}

func FuzzView(f *testing.F) {
	image, l, _ := damaged(f)
	l.AllowTags()
	mustPublish(f, l, tagged([]Record{{Volume: 1, Kind: KindZero, Count: 1}}, 1))
	image = bytes.Clone(image)
	at := l.slot(l.Head() - 1)
	f.Add(uint32(l.geo.ring[0]+at), bytes.Clone(image[l.geo.ring[0]+at:][:recordSize]), true)
	f.Add(uint32(l.geo.ring[1]+at+26), []byte{0xff, 0xff}, true) // more records than there are
	f.Add(uint32(0), image[:logHeaderLen], true)
	f.Add(uint32(80), binary.LittleEndian.AppendUint64(nil, 1<<63), true)
	f.Add(uint32(tailCellAt), image[tailCellAt:tailCellAt+16], false)
	f.Add(uint32(headCellAt), make([]byte, 16), false)
	f.Add(uint32(l.geo.ring[0]), image[l.geo.ring[0]:][:256], true)
	mem := section(f, 16)
	f.Fuzz(func(t *testing.T, at uint32, p []byte, sealed bool) {
		copy(mem, image)
		copy(mem[int(at)%len(mem):], p)
		if sealed {
			reseal(mem, l)
		}
		before := bytes.Clone(mem)
		v, err := OpenView(mem)
		if err != nil {
			return
		}
		_, _ = v.Header()
		_, _ = v.Damage()
		tail, head := v.Tail(), v.Head()
		if head < tail || uint64(head-tail) > v.geo.slots {
			t.Fatalf("tail %d, head %d, slots %d", tail, head, v.geo.slots)
		}
		for seq := tail; seq-tail <= head-tail+2; seq++ {
			rec, err := v.Get(seq)
			if err == nil && (rec.Seq != seq || rec.check(v.geo.extents) != nil) {
				t.Fatalf("get of %d: %+v", seq, rec)
			}
			v.VerifyPayload(&rec)
			_ = v.Payload(rec.First, int(rec.Count))
		}
		if !bytes.Equal(before, mem) {
			t.Fatal("the view has changed the memory")
		}
		if a, err := Attach(mem); err == nil && (a.Tail() != tail || a.Head() != head) {
			t.Fatalf("view %d to %d, attached %d to %d", tail, head, a.Tail(), a.Head())
		}
	})
}
