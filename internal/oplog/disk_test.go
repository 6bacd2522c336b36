package oplog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

const areaStart = 3 * block.Size

func testArea(blocks int64) Area {
	return Area{Start: areaStart, Length: blocks * block.Size, Pool: block.PoolID{7}, DurableWrites: true}
}

func queue(t testing.TB, dev hpdi.Device) hpdi.Queue {
	t.Helper()
	q, err := dev.NewQueue(8)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = q.Close() })
	return q
}

// flat is a record with its payload, as Scan gives it.
type flat struct {
	rec     Record
	payload []byte
}

func scanAll(t testing.TB, q hpdi.Queue, area Area, pos DiskPos) ([]flat, error) {
	t.Helper()
	var all []flat
	last, err := Scan(q, area, pos, func(r Record, payload [][]byte) error {
		f := flat{rec: r}
		for _, p := range payload {
			f.payload = append(f.payload, p...)
		}
		all = append(all, f)
		return nil
	})
	if len(all) > 0 && last != all[len(all)-1].rec.Seq {
		t.Fatalf("last %d after record %d", last, all[len(all)-1].rec.Seq)
	}
	return all, err
}

// flatten returns what Scan has to give for records in memory.
func flatten(l *Log, recs []Record) []flat {
	var all []flat
	for _, r := range recs {
		f := flat{rec: r}
		if r.Kind == KindWrite {
			f.payload = bytes.Clone(l.Payload(r.First, int(r.Count)))
		}
		f.rec.First = 0
		all = append(all, f)
	}
	return all
}

func same(a, b flat) bool { return a.rec == b.rec && bytes.Equal(a.payload, b.payload) }

func TestDiskRoundTrip(t *testing.T) {
	dev := blocktest.NewCrash(1<<20, 1)
	q := queue(t, dev)
	l := format(t, section(t, 64), 64, 100)
	area := testArea(200)
	d := NewDisk(q, area)
	defer d.Close()
	if err := d.Append(l, 0, 1); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("append before reset: %v", err)
	}
	start := d.Reset(3, 99)
	recs := write(t, l, 5, 11, 1)
	recs = append(recs, Record{Volume: 1, Kind: KindZero, LBA: 9, Count: 1 << 33}, Record{Kind: KindNop})
	mustPublish(t, l, recs)
	mid := recs[1].Seq
	if err := errors.Join(d.Append(l, 100, mid), d.Append(l, mid, l.Head()), d.Append(l, l.Head(), l.Head())); err != nil {
		t.Fatal(err)
	}
	if dev.Unflushed() != 0 || d.Flushed() != l.Head() {
		t.Errorf("%d not flushed, flushed %d", dev.Unflushed(), d.Flushed())
	}
	want := flatten(l, recs)
	got, err := scanAll(t, q, area, start)
	if err != nil || len(got) != len(want) {
		t.Fatalf("%d records, want %d: %v", len(got), len(want), err)
	}
	for i := range got {
		if !same(got[i], want[i]) {
			t.Errorf("record %d differs: %+v", i, got[i].rec)
		}
	}
	// From a later position, as a commit record would hold it.
	var p [DiskPosSize]byte
	d.Position(mid).Encode(p[:])
	pos, err := DecodeDiskPos(p[:])
	if err != nil {
		t.Fatal(err)
	}
	if got, err := scanAll(t, q, area, pos); err != nil || len(got) != len(want)-2 {
		t.Errorf("%d records after %d: %v", len(got), mid, err)
	}
	// Another chain starts with nothing of the former one.
	if got, err := scanAll(t, q, area, d.Reset(4, 100)); err != nil || len(got) != 0 {
		t.Errorf("new chain: %d records, %v", len(got), err)
	}
}

// A block that was damaged in memory does not end the chain.
func TestDiskDamagedPayload(t *testing.T) {
	q := queue(t, blocktest.NewCrash(1<<20, 1))
	l := format(t, section(t, 64), 64, 0)
	area := testArea(200)
	d := NewDisk(q, area)
	defer d.Close()
	start := d.Reset(3, 99)
	recs := write(t, l, 0, 3, 1)
	mustPublish(t, l, recs)
	l.Payload(recs[0].First+1, 1)[0] ^= 1
	mustPublish(t, l, write(t, l, 9, 1, 1))
	if err := d.Append(l, 0, 2); err != nil {
		t.Fatal(err)
	}
	var nils []string
	last, err := Scan(q, area, start, func(r Record, payload [][]byte) error {
		for i, p := range payload {
			if p == nil {
				nils = append(nils, fmt.Sprint(r.Seq, "/", i))
			}
		}
		return nil
	})
	if err != nil || last != 2 || len(nils) != 1 || nils[0] != "1/1" {
		t.Errorf("last %d, damaged %v: %v", last, nils, err)
	}
}

func TestDiskFull(t *testing.T) {
	q := queue(t, blocktest.NewCrash(1<<20, 1))
	l := format(t, section(t, 64), 64, 0)
	area := testArea(20)
	d := NewDisk(q, area)
	defer d.Close()
	d.Reset(3, 99)
	for range 4 {
		mustPublish(t, l, write(t, l, 0, 8, 1))
	}
	if err := errors.Join(d.Append(l, 0, 1), d.Append(l, 1, 2)); err != nil {
		t.Fatal(err)
	}
	if err := d.Append(l, 2, 3); !errors.Is(err, ErrFull) {
		t.Fatalf("third batch: %v", err)
	}
	if err := d.Append(l, 1, 3); !errors.Is(err, block.ErrInvalid) {
		t.Fatalf("overlap: %v", err)
	}
	if err := d.Append(l, 3, 4); !errors.Is(err, block.ErrInvalid) {
		t.Fatalf("gap: %v", err)
	}
	pos := d.Position(1)
	d.Committed(1, pos)
	if err := d.Append(l, 2, 3); err != nil { // around the end of the area
		t.Fatal(err)
	}
	got, err := scanAll(t, q, area, pos)
	if err != nil || len(got) != 2 || got[0].rec.Seq != 2 || got[1].rec.Seq != 3 {
		t.Errorf("%d records: %v", len(got), err)
	}
}

// Huge flushes are several batches under one flush of the device.
func TestDiskHuge(t *testing.T) {
	const n = maxBatchBlocks + 500
	clock := blocktest.NewClock()
	dev := clock.NewCrash(64<<20, 1)
	q := queue(t, dev)
	l := format(t, section(t, n), n, 0)
	area := testArea(n + 200)
	d := NewDisk(q, area)
	defer d.Close()
	start := d.Reset(3, 99)
	mustPublish(t, l, write(t, l, 0, n, 1))
	nops := make([]Record, 2*maxBatchRecords)
	for i := range nops {
		nops[i].Kind = KindNop
	}
	mustPublish(t, l, nops)
	if err := d.Append(l, 0, l.Head()); err != nil {
		t.Fatal(err)
	}
	if dev.Unflushed() != 0 || len(d.kept) < 4 {
		t.Errorf("%d unflushed, %d batches", dev.Unflushed(), len(d.kept))
	}
	if got, err := scanAll(t, q, area, start); err != nil || block.Seq(len(got)) != l.Head() {
		t.Errorf("%d records of %d: %v", len(got), l.Head(), err)
	}
}

// After any power cut, Scan gives a prefix with everything that was flushed.
func TestDiskCrash(t *testing.T) {
	base := rand.Uint64()
	for round := range uint64(120) {
		seed := base + round
		t.Run(fmt.Sprint(seed), func(t *testing.T) { crashRound(t, seed) })
		if t.Failed() {
			return
		}
	}
}

func crashRound(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	clock := blocktest.NewClock()
	dev := clock.NewCrash(1<<20, seed)
	clock.CutAfter(1 + rng.Int64N(120))
	q := queue(t, dev)
	area := testArea(60 + rng.Int64N(100))
	area.DurableWrites = rng.IntN(2) == 0
	l := format(t, section(t, 64), 64, 0)
	d := NewDisk(q, area)
	defer d.Close()
	pos := d.Reset(3, seed)
	var all []flat // all that was published
	committed := block.Seq(0)
	for {
		n := 1 + rng.IntN(20)
		if l.ExtentsFree() >= n && rng.IntN(4) > 0 {
			recs := write(t, l, block.Logical(rng.IntN(1000)), n, rng.Uint64())
			mustPublish(t, l, recs)
			all = append(all, flatten(l, recs)...)
			continue
		}
		from, to := max(d.Flushed(), committed), l.Head()
		err := d.Append(l, from, to)
		if err != nil && !errors.Is(err, ErrFull) {
			break // the cut
		}
		if errors.Is(err, ErrFull) || rng.IntN(2) == 0 {
			// A consistency point, whose commit record is durable at once.
			committed = to - block.Seq(rng.IntN(int(to-committed)+1))
			pos = d.Position(committed)
			d.Committed(committed, pos)
			l.Release(committed)
		}
	}
	flushed := d.Flushed()
	after := dev.Cut(seed)
	got, err := scanAll(t, queue(t, after), area, pos)
	if err != nil {
		t.Fatal(err)
	}
	last := committed
	for _, g := range got {
		if g.rec.Seq <= committed {
			continue
		}
		if g.rec.Seq != last+1 || !same(g, all[g.rec.Seq-1]) {
			t.Fatalf("record %d after %d differs", g.rec.Seq, last)
		}
		last = g.rec.Seq
	}
	if last < flushed {
		t.Fatalf("recovered up to %d, flushed %d, committed %d", last, flushed, committed)
	}

	// The survivor of a process goes on in the same chain.
	q = queue(t, after)
	r := NewDisk(q, area)
	defer r.Close()
	if _, err := r.Resume(pos, 4); err != nil {
		t.Fatal(err)
	}
	r.Committed(committed, pos)
	from := max(r.Flushed(), committed)
	err = r.Append(l, from, l.Head())
	if errors.Is(err, ErrFull) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	got, err = scanAll(t, q, area, pos)
	if err != nil || l.Head() > committed && (len(got) == 0 || got[len(got)-1].rec.Seq != l.Head()) {
		t.Fatalf("after resume %d records of %d: %v", len(got), l.Head(), err)
	}
}

// A flushed batch that the device loses is an error and not a shorter log.
func TestDiskLost(t *testing.T) {
	dev := blocktest.NewCrash(1<<20, 1)
	q := queue(t, dev)
	l := format(t, section(t, 64), 64, 0)
	area := testArea(200)
	d := NewDisk(q, area)
	defer d.Close()
	start := d.Reset(3, 99)
	for i := range block.Seq(4) {
		mustPublish(t, l, write(t, l, 0, 2, uint64(i)))
		if err := d.Append(l, i, i+1); err != nil {
			t.Fatal(err)
		}
	}
	for _, at := range []int64{0, 70, 200, block.Size, 3*block.Size - 1} {
		off := areaStart + 3*block.Size + at // within the second batch
		dev.Corrupt(off, 0x10)
		got, err := scanAll(t, q, area, start)
		if at < 192 || at >= block.Size { // else padding after the records
			if !errors.Is(err, block.ErrCorrupt) || len(got) != 1 {
				t.Errorf("byte %d of batch 2: %d records, %v", at, len(got), err)
			}
		}
		dev.Corrupt(off, 0x10)
	}
	// In the last batch the same looks like a torn tail.
	dev.Corrupt(areaStart+9*block.Size+100, 1)
	if got, err := scanAll(t, q, area, start); err != nil || len(got) != 3 {
		t.Errorf("torn tail: %d records, %v", len(got), err)
	}
}

func FuzzScan(f *testing.F) {
	const blocks = 8
	dev := blocktest.NewCrash(1<<20, 1)
	q := queue(f, dev)
	l := format(f, section(f, 8), 8, 0)
	area := testArea(blocks)
	d := NewDisk(q, area)
	defer d.Close()
	start := d.Reset(3, 99)
	mustPublish(f, l, write(f, l, 0, 2, 1))
	mustPublish(f, l, []Record{{Kind: KindZero, Count: 5}})
	if err := errors.Join(d.Append(l, 0, 1), d.Append(l, 1, 2)); err != nil {
		f.Fatal(err)
	}
	image := make([]byte, blocks*block.Size)
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: areaStart, Vec: [][]byte{image}}); err != nil {
		f.Fatal(err)
	}
	f.Add(uint16(0), image[:192], int64(0), uint64(1))
	f.Add(uint16(3*block.Size), image[3*block.Size:][:192], int64(3*block.Size), uint64(2))
	f.Fuzz(func(t *testing.T, at uint16, p []byte, off int64, number uint64) {
		// Anything, and with its checksum made right so that the fields count.
		img := bytes.Clone(image)
		where := int(at) % len(img) / block.Size * block.Size
		copy(img[where:], p)
		if n := batchMeta(img[where:]); n != 0 && where+n <= len(img) {
			n = int(binary.LittleEndian.Uint32(img[where+12:]))
			ondisk.Seal(img[where:], ondisk.Header{Kind: ondisk.KindFlushLog, Version: 1, Length: n,
				Pool: area.Pool, Epoch: 3, Generation: number})
		}
		fq := queue(t, blocktest.NewCrash(1<<20, 1))
		if err := hpdi.Do(fq, &hpdi.Request{Op: hpdi.OpWrite, Offset: areaStart, Vec: [][]byte{img}}); err != nil {
			t.Fatal(err)
		}
		pos := start
		pos.Offset = off
		prev := block.Seq(0)
		_, _ = Scan(fq, area, pos, func(r Record, payload [][]byte) error {
			if r.Seq <= prev || r.Kind == KindWrite && len(payload) != int(r.Count) {
				t.Fatalf("record %+v after %d with %d blocks", r, prev, len(payload))
			}
			prev = r.Seq
			return nil
		})
	})
}

// An append is one durable request, unless the device has none, or the batch goes
// around the end.
func TestAppendInOneRequest(t *testing.T) {
	for _, able := range []bool{true, false} {
		rec := new(blocktest.Recorder)
		dev := rec.Wrap("log", blocktest.NewCrash(1<<20, 1))
		q := queue(t, dev)
		l := format(t, section(t, 64), 64, 0)
		area := testArea(10)
		area.DurableWrites = able
		d := NewDisk(q, area)
		defer d.Close()
		d.Reset(3, 1)
		appends := func(n int) string {
			for range n {
				from := l.Head()
				mustPublish(t, l, write(t, l, 1, 2, 5)) // with its head three blocks
				if err := d.Append(l, from, l.Head()); err != nil {
					t.Fatal(err)
				}
				d.Committed(l.Head(), d.Position(l.Head()))
				l.Release(l.Head())
			}
			return rec.Take()
		}
		expect := func(what string, n, durable, flushes int) {
			t.Helper()
			if !able {
				durable, flushes = 0, n
			}
			if got := appends(n); strings.Count(got, "durable") != durable || strings.Count(got, "flush") != flushes {
				t.Errorf("%s:\n%s", what, got)
			}
		}
		expect("the first lap", 3, 3, 0)
		expect("around the end", 1, 0, 1)
		expect("the second lap", 2, 2, 0)
	}
}
