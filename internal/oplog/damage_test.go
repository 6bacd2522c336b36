package oplog

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// damaged returns a log on its second lap with a few live records of each kind.
func damaged(t testing.TB) (mem []byte, l *Log, live []Record) {
	const extents = 16
	mem = section(t, extents)
	l = format(t, mem, extents, 0)
	for range l.Slots() + 5 {
		mustPublish(t, l, []Record{{Kind: KindNop}})
		l.Release(l.Head())
	}
	live = append(write(t, l, 3, 10, 1), Record{Volume: 1, Kind: KindZero, Count: 1 << 36}, Record{Kind: KindNop})
	mustPublish(t, l, live)
	return mem, l, live
}

// Every flipped bit in one copy is restored from the other.
func TestEveryBitOfOneCopy(t *testing.T) {
	mem, l, live := damaged(t)
	good := bytes.Clone(mem)
	flip := func(at, bit int) {
		mem[at] ^= 1 << bit
		a, err := Attach(mem)
		if err != nil {
			t.Fatalf("byte %d bit %d: %v", at, bit, err)
		}
		got := collect(t, a)
		if len(got) != len(live) {
			t.Fatalf("byte %d bit %d: %d records", at, bit, len(got))
		}
		for i := range got {
			if got[i] != live[i] {
				t.Fatalf("byte %d bit %d: record %d differs", at, bit, i)
			}
		}
		if a.Repaired() == 0 {
			t.Fatalf("byte %d bit %d: nothing restored", at, bit)
		}
	}
	for c := range 2 {
		for _, r := range live {
			for i := range recordSize * 8 {
				flip(l.geo.ring[c]+l.slot(r.Seq)+i/8, i%8)
			}
		}
		for i := range logHeaderLen * 8 {
			flip(l.geo.header[c]+i/8, i%8)
		}
		for i := range 16 * 8 {
			flip(l.geo.header[c]+tailCellAt+i/8, i%8)
			flip(l.geo.header[c]+headCellAt+i/8, i%8)
		}
	}
	// Restored means as before, apart from the place of no record.
	a, err := Attach(mem)
	if err != nil || a.Repaired() != 0 || !bytes.Equal(good, mem) {
		t.Errorf("%v, repaired %d, equal %v", err, a.Repaired(), bytes.Equal(good, mem))
	}
}

// A record that is bad in both copies is reported with its position, the last
// one too, and nothing is changed.
func TestBothCopies(t *testing.T) {
	mem, l, live := damaged(t)
	for _, r := range live {
		for _, other := range []int{0, 5, 24, 31, 40} {
			a, b := l.geo.ring[0]+l.slot(r.Seq)+9, l.geo.ring[1]+l.slot(r.Seq)+other
			mem[a] ^= 4
			mem[b] ^= 1
			before := bytes.Clone(mem)
			_, err := Attach(mem)
			var d *DamageError
			if !errors.As(err, &d) || d.First != r.Seq || d.Last != l.Head() || !errors.Is(err, block.ErrCorrupt) {
				t.Fatalf("record %d: %v", r.Seq, err)
			}
			if !bytes.Equal(before, mem) {
				t.Fatal("a damaged log was changed")
			}
			if _, err := l.Get(r.Seq); !errors.Is(err, block.ErrCorrupt) {
				t.Fatalf("get of record %d: %v", r.Seq, err)
			}
			mem[a] ^= 4
			mem[b] ^= 1
		}
	}
	for _, at := range []int{0, tailCellAt, headCellAt} {
		mem[l.geo.header[0]+at+3] ^= 1
		mem[l.geo.header[1]+at+3] ^= 1
		if _, err := Attach(mem); err == nil {
			t.Errorf("both copies at %d bad: attached", at)
		}
		mem[l.geo.header[0]+at+3] ^= 1
		mem[l.geo.header[1]+at+3] ^= 1
	}
}

// Records that cannot be, sealed as if they were right.
func TestImpossibleRecords(t *testing.T) {
	for name, spoil := range map[string]func(r *Record){
		"extent used twice": func(r *Record) { r.First-- },
		"extent outside":    func(r *Record) { r.First = 1 << 30 },
		"kind":              func(r *Record) { r.Kind = 77 },
		"count":             func(*Record) {}, // below
		"wraps":             func(r *Record) { r.LBA = 1<<64 - 1 },
	} {
		mem, l, live := damaged(t)
		r := live[1]
		spoil(&r)
		var p [recordSize]byte
		r.encode(&p, l.seed)
		if name == "count" {
			p[25] = 9
			binary.LittleEndian.PutUint32(p[28:], recordSum(&p, l.seed))
		}
		for _, ring := range l.geo.ring {
			storeRecord(l.out, ring+l.slot(r.Seq), &p)
		}
		_, err := Attach(mem)
		var d *DamageError
		if !errors.As(err, &d) || d.First != r.Seq {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Bytes of an earlier log in the same memory are no records.
func TestStaleBytes(t *testing.T) {
	mem, l, live := damaged(t)
	rings := [2][]byte{}
	for c, at := range l.geo.ring {
		rings[c] = bytes.Clone(mem[at : at+int(l.geo.slots)*recordSize])
	}
	format(t, mem, 16, live[0].Seq-1)
	for c, at := range l.geo.ring {
		copy(mem[at:], rings[c])
	}
	a, err := Attach(mem)
	if err != nil || a.Head() != live[0].Seq-1 {
		t.Errorf("%v, %+v", err, a)
	}
}

func TestGolden(t *testing.T) {
	var rec, zero [recordSize]byte
	w := Record{Seq: 0x0102030405060708, Volume: 0x11121314, LBA: 0x2122232425262728, Kind: KindWrite, Count: 3, First: 0x31323334,
		CRC: [8]uint32{0x41424344, 0x51525354, 0x61626364}}
	w.encode(&rec, 0x5eed)
	z := Record{Seq: 2, Volume: 1, LBA: 3, Kind: KindZero, Count: 1 << 40}
	z.encode(&zero, 0x5eed)
	var hdr [logHeaderLen]byte
	h := logHeader{pool: block.PoolID{0xaa}, epoch: 5, generation: 6, version: 1, identity: [16]byte{1, 2, 3}, birth: 4,
		extents: 100, slots: 256, size: uint64(SectionSize(100 * block.Size)), start: 41}
	h.encode(&hdr)
	var tag [recordSize]byte
	g := TagRecord(0x11121314, block.Tag{Session: 0x7172737475767778, Queue: 0x8182, Slot: 0x9192, Counter: 0xa1a2a3a4a5a6a7a8}, 3)
	g.Seq = 0x0102030405060708
	g.encode(&tag, 0x5eed)
	var tagged [logHeaderLen]byte
	h2 := h
	h2.version = 2
	h2.encode(&tagged)
	var meta [block.Size]byte
	bw := w
	bw.encode((*[recordSize]byte)(meta[batchHeaderLen:]), 0)
	b := batch{pool: block.PoolID{0xaa}, epoch: 5, number: 6, nonce: 7, first: w.Seq, last: w.Seq, durable: 5, blocks: 3, records: 1, chain: 8, sum: 9}
	b.encode(meta[:])
	var pos [DiskPosSize]byte
	DiskPos{Offset: 4096, Batch: 6, Chain: 8, Nonce: 7}.Encode(pos[:])
	for file, got := range map[string][]byte{
		"record-write.hex": rec[:], "record-zero.hex": zero[:], "header.hex": hdr[:],
		"record-tag.hex": tag[:], "header-tags.hex": tagged[:],
		"batch.hex": meta[:batchHeaderLen+recordSize], "position.hex": pos[:],
	} {
		text, err := os.ReadFile("testdata/" + file)
		want, _ := hex.DecodeString(strings.Join(strings.Fields(string(text)), ""))
		if err != nil || !bytes.Equal(want, got) {
			t.Errorf("%s: %v\n got %x\nwant %x", file, err, got, want)
		}
	}
	var back Record
	if !back.decode(&rec, 0x5eed, w.Seq) || back != w || back.decode(&rec, 0x5eee, w.Seq) || back.decode(&rec, 0x5eed, w.Seq+1) {
		t.Error("record does not come back")
	}
	if !back.decode(&tag, 0x5eed, g.Seq) || back != g || back.Tag() != g.Tag() || back.check(0) != nil {
		t.Errorf("tag comes back as %+v of %+v", back, back.Tag())
	}
	var hb logHeader
	if err := hb.decode(tagged[:]); err != nil || hb != h2 {
		t.Errorf("header of a log with tags comes back as %+v: %v", hb, err)
	}
	if err := hb.decode(hdr[:]); err != nil || hb != h {
		t.Errorf("header comes back as %+v: %v", hb, err)
	}
	var bb batch
	if recs, err := bb.decode(meta[:], nil); err != nil || bb != b || len(recs) != 1 || recs[0] != w {
		t.Errorf("batch comes back as %+v: %v", bb, err)
	}
}

func FuzzAttach(f *testing.F) {
	image, l, _ := damaged(f)
	l.AllowTags()
	mustPublish(f, l, tagged([]Record{{Volume: 1, Kind: KindZero, Count: 1}}, 1))
	image = bytes.Clone(image)
	at := l.slot(l.Head() - 1)
	f.Add(uint32(l.geo.ring[0]+at), bytes.Clone(image[l.geo.ring[0]+at:][:recordSize]), true)
	f.Add(uint32(l.geo.ring[1]+at+26), []byte{0xff, 0xff}, true) // more records than there are
	f.Add(uint32(0), image[:logHeaderLen], true)
	f.Add(uint32(tailCellAt), image[tailCellAt:tailCellAt+16], false)
	f.Add(uint32(l.geo.ring[0]), image[l.geo.ring[0]:][:256], true)
	mem := section(f, 16)
	f.Fuzz(func(t *testing.T, at uint32, p []byte, sealed bool) {
		copy(mem, image)
		copy(mem[int(at)%len(mem):], p)
		if sealed { // as if the checksums had been right: then the fields count
			reseal(mem, l)
		}
		a, err := Attach(mem)
		if err != nil {
			return
		}
		if a.Tail() > a.Head() || uint64(a.Head()-a.Tail()) > a.geo.slots || a.ExtentsFree() > a.Capacity() {
			t.Fatalf("tail %d, head %d, slots %d, free %d of %d", a.Tail(), a.Head(), a.geo.slots, a.ExtentsFree(), a.Capacity())
		}
		used := 0
		for _, r := range collect(t, a) {
			a.VerifyPayload(&r)
			used += int(r.Count * isWrite(r.Kind))
		}
		if used != a.Capacity()-a.ExtentsFree() {
			t.Fatalf("%d extents used, %d not free", used, a.Capacity()-a.ExtentsFree())
		}
		a.Publish([]Record{{Kind: KindNop}})
		a.Release(a.Head())
		if a.ExtentsFree() != a.Capacity() {
			t.Fatal("extents are lost")
		}
	})
}

// reseal gives every header and record of the section a right checksum.
func reseal(mem []byte, l *Log) {
	for _, at := range l.geo.header {
		p := mem[at : at+logHeaderLen]
		h := l.hdr
		le := binary.LittleEndian
		h.extents, h.slots = le.Uint64(p[88:]), le.Uint64(p[96:])
		h.size, h.start = le.Uint64(p[104:]), block.Seq(le.Uint64(p[112:]))
		h.encode((*[logHeaderLen]byte)(p))
	}
	for _, ring := range l.geo.ring {
		for i := range int(l.geo.slots) {
			p := (*[recordSize]byte)(mem[ring+i*recordSize:])
			binary.LittleEndian.PutUint32(p[28:], recordSum(p, l.seed))
		}
	}
}
