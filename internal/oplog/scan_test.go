package oplog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// flushed is a flush log of four batches: record 1 with two blocks, record 2
// that zeroes, record 3 with one block, record 4 with two.
type flushed struct {
	dev   *blocktest.Fault
	q     hpdi.Queue
	area  Area
	l     *Log
	d     *Disk
	start DiskPos
	at    []int64 // offset in the area of each batch, and of the end
}

func fourBatches(t testing.TB) *flushed {
	t.Helper()
	f := &flushed{dev: blocktest.NewFault(blocktest.NewCrash(1<<20, 1), 1), area: testArea(200)}
	f.q = queue(t, f.dev)
	f.l = format(t, section(t, 64), 64, 0)
	f.d = NewDisk(f.q, f.area)
	t.Cleanup(func() { _ = f.d.Close() })
	f.start = f.d.Reset(3, 99)
	for i, recs := range [][]Record{write(t, f.l, 0, 2, 1), {{Volume: 1, Kind: KindZero, LBA: 7, Count: 9}}, write(t, f.l, 9, 1, 3), write(t, f.l, 4, 2, 4)} {
		mustPublish(t, f.l, recs)
		if err := f.d.Append(f.l, block.Seq(i), block.Seq(i)+1); err != nil {
			t.Fatal(err)
		}
	}
	for _, k := range f.d.kept {
		f.at = append(f.at, k.pos.Offset)
	}
	f.at = append(f.at, f.d.next.Offset)
	return f
}

// block reads a block of the area.
func (f *flushed) block(t testing.TB, at int64) []byte {
	t.Helper()
	p := make([]byte, block.Size)
	if err := hpdi.Do(f.q, &hpdi.Request{Op: hpdi.OpRead, Offset: f.area.Start + at, Vec: [][]byte{p}}); err != nil {
		t.Fatal(err)
	}
	return p
}

func (f *flushed) put(t testing.TB, at int64, p []byte) {
	t.Helper()
	if err := hpdi.Do(f.q, &hpdi.Request{Op: hpdi.OpWrite, Offset: f.area.Start + at, Vec: [][]byte{p}}); err != nil {
		t.Fatal(err)
	}
}

// sealed gives the first block of a batch the checksum that its content asks
// for, as a writer with a fault would.
func sealed(p []byte, change func(h *ondisk.Header, p []byte)) []byte {
	le := binary.LittleEndian
	h := ondisk.Header{Kind: ondisk.KindFlushLog, Version: le.Uint16(p[8:]), Length: int(le.Uint32(p[12:])),
		Pool: block.PoolID(p[16:32]), Epoch: block.Epoch(le.Uint64(p[32:])), Generation: le.Uint64(p[40:])}
	change(&h, p)
	ondisk.Seal(p, h)
	return p
}

// scan returns how many records come before the end, and the error.
func (f *flushed) scan(t testing.TB) (int, error) {
	t.Helper()
	got, err := scanAll(t, f.q, f.area, f.start)
	return len(got), err
}

// says fails unless err names everything in want.
func says(t testing.TB, what string, err error, kind error, want ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("%s: %v, want %v", what, err, kind)
		return
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %q does not say %q", what, err, w)
		}
	}
}

// A client can write what looks like a batch. Where the chain ends, and beyond,
// such payload of earlier laps is no reason to refuse the log.
func TestScanPayloadThatLooksLikeABatch(t *testing.T) {
	f := fourBatches(t)
	for name, change := range map[string]func(h *ondisk.Header, p []byte){
		"of a later release":    func(h *ondisk.Header, _ []byte) { h.Version = 2 },
		"that cannot be":        func(_ *ondisk.Header, p []byte) { binary.LittleEndian.PutUint32(p[100:], 7) },
		"that claims a loss":    func(h *ondisk.Header, p []byte) { h.Generation = 9; binary.LittleEndian.PutUint64(p[88:], 8) },
		"next, of another pool": func(h *ondisk.Header, _ []byte) { h.Generation = 5; h.Pool[0]++ },
	} {
		p := sealed(f.block(t, f.at[1]), func(h *ondisk.Header, p []byte) {
			binary.LittleEndian.PutUint64(p[64:], 98) // another chain's
			change(h, p)
		})
		f.put(t, f.at[4], p)
		f.put(t, f.at[4]+5*block.Size, p)
		if n, err := f.scan(t); err != nil || n != 4 {
			t.Errorf("a batch %s: %d records, %v", name, n, err)
		}
		end, err := InspectFlushLog(f.q, f.area, f.start, func(Batch) error { return nil })
		if err != nil || end.Damage != nil || end.Batch != 5 || !strings.Contains(end.Why, "another chain") {
			t.Errorf("a batch %s: %+v, %v", name, end, err)
		}
	}
}

// A batch of the chain that is whole and cannot be is an error with its place,
// even where the chain might end: what it holds was acknowledged.
func TestScanImpossibleBatch(t *testing.T) {
	le := binary.LittleEndian
	record := func(change func(r *Record)) func(h *ondisk.Header, p []byte) {
		return func(_ *ondisk.Header, p []byte) {
			at := (*[recordSize]byte)(p[batchHeaderLen:])
			var r Record
			r.decode(at, 0, block.Seq(le.Uint64(at[:])))
			change(&r)
			r.encode(at, 0)
		}
	}
	for name, c := range map[string]struct {
		change func(h *ondisk.Header, p []byte)
		why    string
	}{
		"no records":        {func(_ *ondisk.Header, p []byte) { le.PutUint32(p[100:], 0) }, "records 4 to 4, 0 of them"},
		"too many records":  {func(_ *ondisk.Header, p []byte) { le.PutUint64(p[80:], 9) }, "records 4 to 9, 1 of them"},
		"backwards":         {func(_ *ondisk.Header, p []byte) { le.PutUint64(p[80:], 3) }, "records 4 to 3"},
		"too much payload":  {func(_ *ondisk.Header, p []byte) { le.PutUint32(p[96:], 1<<31) }, "blocks"},
		"other payload":     {func(_ *ondisk.Header, p []byte) { le.PutUint32(p[96:], 1) }, "1 blocks of payload, its records have 2"},
		"foreign record":    {record(func(r *Record) { r.Seq = 2 }), "record 0 does not belong there"},
		"unknown record":    {record(func(r *Record) { r.Kind = 9 }), "record 0: unknown kind(9)"},
		"zero of nothing":   {record(func(r *Record) { r.Kind, r.Count = KindZero, 0 }), "zero of no blocks"},
		"old records again": {func(_ *ondisk.Header, p []byte) { le.PutUint64(p[72:], 1); le.PutUint64(p[80:], 1); putSeq(p, 1) }, "begins with record 1 after 3"},
	} {
		f := fourBatches(t)
		f.put(t, f.at[3], sealed(f.block(t, f.at[3]), c.change))
		place := fmt.Sprintf("batch 4 at byte %d", f.area.Start+f.at[3])
		n, err := f.scan(t)
		if n != 3 {
			t.Errorf("%s: %d records before it", name, n)
		}
		says(t, name, err, block.ErrCorrupt, place, c.why)
		end, err := InspectFlushLog(f.q, f.area, f.start, func(Batch) error { return nil })
		if err != nil || end.At != f.area.Start+f.at[3] {
			t.Errorf("%s: inspected to %+v: %v", name, end, err)
		}
		says(t, name, end.Damage, block.ErrCorrupt, place, c.why)
		d := NewDisk(f.q, f.area)
		_, err = d.Resume(f.start, 4)
		says(t, name+", resumed", err, block.ErrCorrupt, place)
	}
}

// putSeq gives the first record of a batch another sequence.
func putSeq(p []byte, seq block.Seq) {
	at := (*[recordSize]byte)(p[batchHeaderLen:])
	binary.LittleEndian.PutUint64(at[:], uint64(seq))
	binary.LittleEndian.PutUint32(at[28:], recordSum(at, 0))
}

// Our own batch of a later release stops an older program, which says so, and
// the log is as it was for the newer one.
func TestScanLaterRelease(t *testing.T) {
	f := fourBatches(t)
	f.put(t, f.at[2], sealed(f.block(t, f.at[2]), func(h *ondisk.Header, _ []byte) { h.Version = 2 }))
	n, err := f.scan(t)
	if n != 2 {
		t.Errorf("%d records before it", n)
	}
	says(t, "later release", err, ondisk.ErrVersion, fmt.Sprint("byte ", f.area.Start+f.at[2]), "use the release")
}

// Why the chain ends is said, whichever way it does.
func TestInspectWhyTheChainEnds(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(f *flushed) // what is where batch 4 should be
		why   string
		lost  bool // a later batch says that it was flushed
	}{
		"nothing":          {func(f *flushed) { f.put(t, f.at[3], make([]byte, block.Size)) }, "no batch begins there", false},
		"torn header":      {func(f *flushed) { p := f.block(t, f.at[3]); p[90] ^= 1; f.put(t, f.at[3], p) }, "not whole", false},
		"torn payload":     {func(f *flushed) { f.put(t, f.at[3]+block.Size, make([]byte, block.Size)) }, "payload of the batch there is not whole", false},
		"an earlier batch": {func(f *flushed) { f.put(t, f.at[3], f.block(t, f.at[0])) }, "batch 1 is there, of an earlier lap", false},
		"another chain": {func(f *flushed) {
			f.put(t, f.at[3], sealed(f.block(t, f.at[3]), func(_ *ondisk.Header, p []byte) { p[104]++ }))
		}, "follows another one", false},
		"larger than the area": {func(f *flushed) {
			f.put(t, f.at[3], sealed(f.block(t, f.at[3]), func(_ *ondisk.Header, p []byte) {
				r := Record{Seq: 4, Kind: KindWrite, Count: 8}
				r.encode((*[recordSize]byte)(p[batchHeaderLen:]), 0)
				binary.LittleEndian.PutUint32(p[96:], 8)
			}))
			f.area.Length = f.at[3] + 4*block.Size
		}, "payload of the batch there is not whole", false},
		"lost before batch 4": {func(f *flushed) { f.put(t, f.at[2], make([]byte, block.Size)) }, "no batch begins there", true},
	} {
		f := fourBatches(t)
		c.spoil(f)
		var seen []uint64
		end, err := InspectFlushLog(f.q, f.area, f.start, func(b Batch) error { seen = append(seen, b.Number); return nil })
		want := 3
		if c.lost {
			want = 2
		}
		if err != nil || len(seen) != want || end.At != f.area.Start+f.at[want] || !strings.Contains(end.Why, c.why) {
			t.Errorf("%s: batches %v, %+v: %v", name, seen, end, err)
		}
		if (end.Damage != nil) != c.lost {
			t.Errorf("%s: damage %v", name, end.Damage)
		}
		if c.lost {
			says(t, name, end.Damage, block.ErrCorrupt, fmt.Sprintf("batch 3 at byte %d", end.At), "records after 2 are lost")
		}
		if n, err := f.scan(t); n != want || (err != nil) != c.lost {
			t.Errorf("%s: scan gives %d records, %v", name, n, err)
		}
	}
}

// A block that was damaged in memory is counted for who looks.
func TestInspectDamagedPayload(t *testing.T) {
	f := fourBatches(t)
	recs := write(t, f.l, 0, 3, 1)
	mustPublish(t, f.l, recs)
	f.l.Payload(recs[0].First+1, 1)[0] ^= 1
	if err := f.d.Append(f.l, 4, 5); err != nil {
		t.Fatal(err)
	}
	damaged := 0
	stop := errors.New("enough")
	_, err := InspectFlushLog(f.q, f.area, f.start, func(b Batch) error {
		damaged += b.Damaged
		if b.Number == 5 {
			return stop
		}
		return nil
	})
	if damaged != 1 || !errors.Is(err, stop) {
		t.Errorf("%d damaged blocks, %v", damaged, err)
	}
}

// Whichever read the device refuses, it is the device's error that comes back,
// with the place, and never a log that looks shorter or damaged.
func TestScanDeviceErrors(t *testing.T) {
	// Larger than the window, so that reads come in every phase.
	const blocks = 1200
	f := &flushed{dev: blocktest.NewFault(blocktest.NewCrash(8<<20, 1), 1), area: testArea(blocks)}
	f.q = queue(t, f.dev)
	f.l = format(t, section(t, 820), 820, 0)
	f.d = NewDisk(f.q, f.area)
	defer f.d.Close()
	f.start = f.d.Reset(3, 99)
	// The first window ends within the records of the second batch; the third
	// batch is larger than a window.
	mustPublish(t, f.l, write(t, f.l, 0, 254, 1))
	one := f.l.Head()
	for range 100 {
		mustPublish(t, f.l, []Record{{Kind: KindNop}})
	}
	mustPublish(t, f.l, write(t, f.l, 500, 251, 1))
	two := f.l.Head()
	mustPublish(t, f.l, write(t, f.l, 900, 300, 1))
	if err := errors.Join(f.d.Append(f.l, 0, one), f.d.Append(f.l, one, two), f.d.Append(f.l, two, f.l.Head())); err != nil {
		t.Fatal(err)
	}
	ways := map[string]func() error{
		"scan":   func() error { _, err := f.scan(t); return err },
		"resume": func() error { _, err := NewDisk(f.q, f.area).Resume(f.start, 4); return err },
		"inspect": func() error {
			end, err := InspectFlushLog(f.q, f.area, f.start, func(Batch) error { return nil })
			if end.Damage != nil {
				t.Errorf("inspect: a device error became damage: %v", end.Damage)
			}
			return err
		},
	}
	for name, way := range ways {
		failed := 0
		for skip := 0; ; skip++ {
			remove := f.dev.Add(blocktest.Rule{Op: hpdi.OpRead, Skip: skip, Count: 1, Err: unix.EIO})
			err := way()
			hit := f.dev.Hits()
			remove()
			if hit == 0 {
				if err != nil {
					t.Fatalf("%s without an error of the device: %v", name, err)
				}
				break
			}
			failed++
			says(t, fmt.Sprintf("%s, read %d", name, skip), err, unix.EIO, "scan flush log", "read of")
			if errors.Is(err, block.ErrCorrupt) {
				t.Errorf("%s, read %d: taken for damage: %v", name, skip, err)
			}
		}
		t.Logf("%s: %d reads", name, failed)
		if failed < 2 {
			t.Errorf("%s: only %d reads were tried", name, failed)
		}
	}
}

// A position that cannot be in the area, as a damaged or foreign commit record
// would name it, and an area that is none.
func TestScanRefuses(t *testing.T) {
	f := fourBatches(t)
	for _, pos := range []DiskPos{{Offset: -block.Size, Batch: 1}, {Offset: f.area.Length, Batch: 1}, {Offset: 100, Batch: 1}, {Offset: 0}} {
		_, err := Scan(f.q, f.area, pos, nil)
		says(t, "scan", err, block.ErrCorrupt, "position in the flush log", fmt.Sprint(pos.Offset), fmt.Sprint(f.area.Length))
		_, err = NewDisk(f.q, f.area).Resume(pos, 4)
		says(t, "resume", err, block.ErrCorrupt)
		_, err = InspectFlushLog(f.q, f.area, pos, nil)
		says(t, "inspect", err, block.ErrCorrupt)
	}
	_, err := DecodeDiskPos(make([]byte, DiskPosSize-1))
	says(t, "short position", err, block.ErrCorrupt, "31 bytes")
	for _, a := range []Area{{Start: -block.Size, Length: 1 << 20}, {Start: 100, Length: 1 << 20}, {Length: block.Size}, {Length: 1<<20 + 1}} {
		_, err := Scan(f.q, a, f.start, nil)
		says(t, "area", err, block.ErrInvalid, fmt.Sprint(a.Start), fmt.Sprint(a.Length))
		d := NewDisk(f.q, a)
		d.Reset(3, 1)
		says(t, "append", d.Append(f.l, 0, 1), block.ErrInvalid, fmt.Sprint(a.Length))
	}
	stop := errors.New("enough")
	if last, err := Scan(f.q, f.area, f.start, func(r Record, _ [][]byte) error {
		if r.Seq == 3 {
			return stop
		}
		return nil
	}); last != 2 || err != stop {
		t.Errorf("stopped at record 3: last %d, %v", last, err)
	}
}
