package oplog

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// tagged returns records of a change with their tag before them.
func tagged(recs []Record, counter uint64) []Record {
	return append([]Record{TagRecord(1, block.Tag{Session: 77, Queue: 1, Slot: 2, Counter: counter}, len(recs))}, recs...)
}

// sinkOf returns what stores to an image of a section and notes it.
func sinkOf(mem []byte, tr *trace) recorder {
	return recorder{mapped{unsafe.Pointer(unsafe.SliceData(mem))}, tr}
}

// TestTaggedAtEveryStore stops the publication of tagged changes after every single store,
// and then the recovery from that: the change is there as a whole or not at all, its extents
// are free when it is not, and who goes on does not find its remains.
func TestTaggedAtEveryStore(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	const extents = 24
	mem := section(t, extents)
	l := format(t, mem, extents, 5)
	l.AllowTags()
	before, now, again := section(t, extents), section(t, extents), section(t, extents)
	whole, none := 0, 0
	for step := range 40 {
		copy(before, mem)
		if l.ExtentsFree() < 8 {
			l.Release(l.Head())
			copy(before, mem)
		}
		head, free := l.Head(), l.ExtentsFree()
		recs := write(t, l, block.Logical(rng.Uint32()), 1+rng.IntN(8), rng.Uint64())
		if step%3 == 0 {
			recs = append(recs, Record{Volume: 1, Kind: KindZero, LBA: 7, Count: 99})
		}
		recs = tagged(recs, uint64(step)+1)
		blocks := free - l.ExtentsFree()
		tr := &trace{}
		if _, ok := publish(recorder{l.out, tr}, l, recs); !ok {
			t.Fatal("no room")
		}
		for cut := range len(tr.stores) + 1 {
			copy(now, before)
			copyArena(l, now, mem)
			apply(now, tr.stores, cut, rng)
			v, err := OpenView(now)
			if err != nil {
				t.Fatal(err)
			}
			sees := v.Head()
			copy(again, now)
			a, err := Attach(now)
			if err != nil {
				t.Fatalf("step %d, store %d: %v", step, cut, err)
			}
			switch a.Head() {
			case head:
				none++
				if a.ExtentsFree() != free {
					t.Fatalf("step %d, store %d: %d extents free instead of %d", step, cut, a.ExtentsFree(), free)
				}
				diesErasing(t, again, a, head, rng)
			case head + block.Seq(len(recs)):
				whole++
				if a.ExtentsFree() != free-blocks {
					t.Fatalf("step %d, store %d: %d extents free instead of %d", step, cut, a.ExtentsFree(), free-blocks)
				}
			default:
				t.Fatalf("step %d, store %d: head %d, was %d, a change of %d records", step, cut, a.Head(), head, len(recs))
			}
			if sees != a.Head() {
				t.Fatalf("step %d, store %d: a view sees the head at %d, who attaches at %d", step, cut, sees, a.Head())
			}
			// Others go on, and die again: nothing of the change is behind them.
			for range 3 {
				if _, ok := a.Publish([]Record{{Kind: KindNop}}); !ok {
					t.Fatal("no room")
				}
				b, err := Attach(now)
				if err != nil || b.Head() != a.Head() {
					t.Fatalf("step %d, store %d: %v, after others went on up to %d", step, cut, err, a.Head())
				}
				a = b
			}
		}
	}
	if whole == 0 || none == 0 {
		t.Errorf("%d changes were whole and %d were not", whole, none)
	}
}

// diesErasing makes recovery die after each of the stores by which it gives a change up.
func diesErasing(t *testing.T, image []byte, l *Log, head block.Seq, rng *rand.Rand) {
	t.Helper()
	var rec Record
	natural := head
	m := memory{mem: image, geo: l.geo, hdr: l.hdr, seed: l.seed}
	for m.read(0, natural+1, &rec) || m.read(1, natural+1, &rec) {
		natural++
	}
	scratch := section(t, l.Capacity())
	copy(scratch, image)
	tr := &trace{}
	erase(sinkOf(scratch, tr), l, head, natural)
	for cut := range len(tr.stores) {
		copy(scratch, image)
		apply(scratch, tr.stores, cut, rng)
		a, err := Attach(scratch)
		if err != nil || a.Head() != head {
			t.Fatalf("recovery died after %d of %d stores: %v", cut, len(tr.stores), err)
		}
	}
}

// A look at a change that was given up, or is being published, finds nothing.
func TestViewOfPartialChange(t *testing.T) {
	mem := section(t, 16)
	l := format(t, mem, 16, 0)
	mustPublish(t, l, write(t, l, 0, 1, 1))
	recs := tagged(write(t, l, 3, 8, 2), 1)
	recs = append(recs, Record{Volume: 1, Kind: KindZero, Count: 1})
	recs[0].Count++
	stores := func() []Store {
		c := section(t, 16)
		copy(c, mem)
		x, err := Attach(c)
		if err != nil {
			t.Fatal(err)
		}
		return x.Stores(slices.Clone(recs))
	}()
	m := mapped{unsafe.Pointer(unsafe.SliceData(mem))}
	v := view(t, mem)
	for _, s := range stores[:2*len(stores)/3] {
		m.seal(s.Off, *(*uint64)(unsafe.Pointer(&s.Word)))
	}
	if v.Head() != 1 || v.Tail() != 0 {
		t.Errorf("head %d, tail %d", v.Head(), v.Tail())
	}
	_, err := v.Get(2)
	if !errors.Is(err, block.ErrNotFound) || !strings.Contains(err.Error(), "of a change that is not whole") {
		t.Errorf("%v", err)
	}
	if _, err := v.Get(4); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("%v", err)
	}
}

// A change that is given up may have lost a copy of a record to a flipped bit, too.
func TestCutWithOneCopy(t *testing.T) {
	for ring := range 2 {
		mem := section(t, 16)
		l := format(t, mem, 16, 0)
		recs := tagged(write(t, l, 0, 8, 1), 1)
		recs[0].Count++ // one more, which is not published
		tr := &trace{}
		head := l.Head()
		if _, ok := publish(recorder{l.out, tr}, l, recs); !ok {
			t.Fatal("no room")
		}
		storeCell(l.out, &l.geo, headCellAt, head, l.seed)
		mem[l.geo.ring[ring]+l.slot(head+2)+33] ^= 4
		a, err := Attach(mem)
		if err != nil || a.Head() != head || a.ExtentsFree() != 16 {
			t.Errorf("ring %d: %v, %+v", ring, err, a)
		}
	}
}

// What no crash leaves is damage.
func TestTagDamage(t *testing.T) {
	lay := func(recs ...Record) ([]byte, *Log) {
		mem := section(t, 16)
		l := format(t, mem, 16, 0)
		mustPublish(t, l, recs)
		return mem, l
	}
	zero := Record{Volume: 1, Kind: KindZero, Count: 1}
	tag := TagRecord(1, block.Tag{Session: 1, Counter: 1}, 2)
	for name, recs := range map[string][]Record{
		"within the change of another": {tag, zero, tag, zero, zero},
		"not whole although":           {zero, tag, zero},
	} {
		mem, _ := lay(recs...)
		_, err := Attach(mem)
		var d *DamageError
		if !errors.As(err, &d) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for why, r := range map[string]Record{
		"session 0":                            TagRecord(1, block.Tag{Counter: 1}, 1),
		"submission 0":                         TagRecord(1, block.Tag{Session: 1}, 1),
		"tag of 65536 records":                 TagRecord(1, block.Tag{Session: 1, Counter: 1}, 1<<16),
		"tag at block 3":                       {Kind: KindTag, LBA: 3, CRC: [8]uint32{1, 0, 1}},
		"extents 14+3 of 16":                   {Kind: KindWrite, First: 14, Count: 3},
		"unknown kind(5)":                      {Kind: 5},
		"blocks 18446744073709551615+1 overfl": {Kind: KindZero, LBA: 1<<64 - 1, Count: 1},
	} {
		if err := r.check(16); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v", why, err)
		}
	}
	if KindTag.String() != "tag" {
		t.Error(KindTag)
	}
}

// A log is of the version with tags from AllowTags until there are none any more.
func TestLogVersion(t *testing.T) {
	mem := section(t, 16)
	l := format(t, mem, 16, 0)
	attached := func() *Log {
		t.Helper()
		a, err := Attach(mem)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	if v := attached().hdr.version; v != 1 {
		t.Errorf("a new log is of version %d", v)
	}
	l.AllowTags()
	generation := l.hdr.generation
	l.AllowTags()
	if a := attached(); a.hdr.version != 2 || l.hdr.generation != generation {
		t.Errorf("a log for tags is of version %d, its header was stored %d times", a.hdr.version, l.hdr.generation)
	}
	mustPublish(t, l, tagged(write(t, l, 0, 1, 1), 1))
	l = attached()
	l.SetEpoch(7)
	if v := attached().hdr.version; v != 2 {
		t.Errorf("a log with tags becomes one of version %d", v)
	}
	l.Release(l.Head())
	l = attached()
	l.SetEpoch(8)
	if a := attached(); a.hdr.version != 1 || a.Epoch() != 8 {
		t.Errorf("a log without tags stays of version %d", a.hdr.version)
	}
}

// The flush log has no tags: what was one keeps its position.
func TestFlushedTags(t *testing.T) {
	dev := blocktest.NewCrash(1<<20, 1)
	q := queue(t, dev)
	l := format(t, section(t, 16), 16, 0)
	area := testArea(64)
	d := NewDisk(q, area)
	defer d.Close()
	pos := d.Reset(3, 99)
	recs := tagged(write(t, l, 4, 3, 1), 5)
	mustPublish(t, l, recs)
	if err := d.Append(l, 0, l.Head()); err != nil {
		t.Fatal(err)
	}
	var kinds []Kind
	last, err := Scan(q, area, pos, func(r Record, _ [][]byte) error {
		kinds = append(kinds, r.Kind)
		return nil
	})
	if err != nil || last != l.Head() || kinds[0] != KindNop || slices.Contains(kinds, KindTag) {
		t.Errorf("%v, %v up to %d of %d", err, kinds, last, l.Head())
	}
	// One that is there all the same was not written by this program.
	var p [block.Size]byte
	r := recs[0]
	r.encode((*[recordSize]byte)(p[batchHeaderLen:]), 0)
	b := batch{pool: area.Pool, epoch: 3, number: 1, nonce: 99, first: r.Seq, last: r.Seq, records: 1}
	b.encode(p[:])
	if _, err := new(batch).decode(bytes.Clone(p[:]), nil); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "is a tag") {
		t.Errorf("a tag in the flush log: %v", err)
	}
}
