package cp

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/space"
)

var update = flag.Bool("update", false, "write golden files anew")

var testPool = block.PoolID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}

func testSuperblock() *Superblock {
	return &Superblock{
		Pool: testPool, Epoch: 7, Generation: 42, Fold: 5, CP: 9, Log: 1000,
		Flush:   oplog.DiskPos{Offset: 8192, Batch: 3, Chain: 0xabcdef, Nonce: 7<<40 ^ 9},
		Journal: JournalPos{Offset: 12288, Number: 17, Prev: 0x01020304},
		Devices: []DeviceRoot{
			{ID: block.DeviceID{0xd0}, Blocks: 65536, First: 2048, Counts: block.Pointer{Phys: block.At(1, 300), Birth: 9, Sum: 0x11223344}},
			{ID: block.DeviceID{0xd1}, Blocks: 4096, First: 256},
		},
		Catalogue: block.Pointer{Phys: block.At(0, 2050), Birth: 9, Sum: 0x55667788},
		CatBytes:  100, Used: 77, RegionID: "region", BootID: "boot",
	}
}

func testRecords() map[string]*record {
	vol := catalogue.Volume{ID: 3, Name: "vol", Size: 1 << 20, Created: time.Unix(1, 2).UTC()}
	return map[string]*record{
		"commit": {Number: 17, Epoch: 7, Prev: 0x01020304, Type: typeCommit, Commit: commit{
			CP: 10, Log: 1010, Flush: oplog.DiskPos{Offset: 4096, Batch: 2, Chain: 5, Nonce: 6},
			Holes: []volumeRange{{2, block.Range{Start: 5, End: 500}}},
			Runs: []mapRun{
				{Volume: 2, LBA: 7, At: block.At(1, 400), Sums: []uint32{1, 2, 3}},
				{Volume: 3, LBA: 0, At: block.At(0, 2049), Sums: []uint32{4}},
			},
			Catalogue: []catalogue.Change{{Put: &vol}, {Delete: 1}},
		}},
		"shared": {Number: 19, Epoch: 7, Prev: 0x0a0b0c0d, Type: typeCommit, Commit: commit{
			CP: 11, Log: 1020, Flush: oplog.DiskPos{Offset: 4096, Batch: 2, Chain: 5, Nonce: 6},
			Runs: []mapRun{
				{Volume: 2, LBA: 7, At: block.At(1, 400), Sums: []uint32{1, 2}, Prints: []byte("fingerprintsoftw")},
				{Volume: 2, LBA: 9, At: block.At(1, 300), Sums: []uint32{3, 4, 5}, Shared: true},
				{Volume: 3, LBA: 0, At: block.At(0, 2049), Sums: []uint32{4}},
			},
		}},
		"fold": {Number: 18, Epoch: 7, Prev: 0x05060708, Type: typeFold, Fold: foldPages{
			Fold: 6, Taken: []space.Run{{At: block.At(0, 2060), N: 4}}, Freed: []space.Run{{At: block.At(1, 300), N: 1}, {At: block.At(1, 310), N: 2}},
		}},
	}
}

// golden compares b, without the zeroes at its end, with a file of hex dumps.
func golden(t *testing.T, file string, b []byte) {
	t.Helper()
	got := hex.Dump(bytes.TrimRight(b, "\x00"))
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: the format has changed; if that is meant, raise its version:\n%s", file, got)
	}
}

func TestGoldenSuperblock(t *testing.T) {
	s := testSuperblock()
	b := s.Encode()
	golden(t, "testdata/superblock.hex", b)
	got, err := DecodeSuperblock(b)
	if err != nil || !reflect.DeepEqual(got, s) {
		t.Errorf("%v: %+v", err, got)
	}
}

// decodeRecord decodes a record by itself, and returns the bytes that it takes on
// the device.
func decodeRecord(b []byte, pool block.PoolID) (*record, int, error) {
	f, err := openFrame(b, pool)
	if err != nil {
		return nil, 0, err
	}
	r := &record{}
	err = f.decode(r)
	r.sums = nil
	return r, f.n, err
}

// replay calls fn with every record from pos on.
func (j *journal) replay(pos JournalPos, fn func(*record) error) error {
	c, err := j.chain(pos)
	if err != nil {
		return err
	}
	defer c.free()
	return c.each(func(r *record) error {
		r.sums = nil // so that records can be compared
		return fn(r)
	})
}

// A device that leaves, or has left, needs version 2.
func TestGoldenSuperblock2(t *testing.T) {
	s := leavingSuperblock()
	b := s.Encode()
	golden(t, "testdata/superblock-2.hex", b)
	got, err := DecodeSuperblock(b)
	if err != nil || !reflect.DeepEqual(got, s) {
		t.Errorf("%v: %+v", err, got)
	}
	if dev, ok := got.Leaving(); !ok || dev != 1 {
		t.Errorf("device %d leaves, %v", dev, ok)
	}
	if dev, ok := testSuperblock().Leaving(); ok {
		t.Errorf("device %d leaves", dev)
	}
}

// Pages that have twins need version 3: in the pointers of which they are, and once it
// is so in all superblocks after.
func TestGoldenSuperblock3(t *testing.T) {
	s := leavingSuperblock()
	s.Twins = true
	s.Catalogue.Twin, s.Devices[0].Counts.Twin = block.TwinBehind(5), block.TwinOn(1)
	b := s.Encode()
	golden(t, "testdata/superblock-3.hex", b)
	got, err := DecodeSuperblock(b)
	if err != nil || !reflect.DeepEqual(got, s) {
		t.Errorf("%v: %+v", err, got)
	}
	sharing := leavingSuperblock()
	sharing.Secret = 5
	set, memory := testSuperblock(), testSuperblock()
	set.Settings.IndexBytes, memory.Devices[1].Class = 1, ClassMemory
	for _, c := range []struct {
		version uint16
		*Superblock
	}{{1, testSuperblock()}, {2, leavingSuperblock()}, {3, got}, {4, sharing}, {5, set}, {5, memory}} {
		version, s := c.version, c.Superblock
		// What knows less must refuse it.
		if _, err := ondisk.Open(s.Encode(), ondisk.KindSuperblock, version-1); !errors.Is(err, ondisk.ErrVersion) {
			t.Errorf("version %d: %v", version, err)
		}
		if h, err := ondisk.Open(s.Encode(), ondisk.KindSuperblock, version); err != nil || h.Version != version {
			t.Errorf("version %d: %d, %v", version, h.Version, err)
		}
	}
}

// A pool whose volumes share blocks needs version 4, whether pages have twins or not.
func TestGoldenSuperblock4(t *testing.T) {
	s := leavingSuperblock()
	s.Secret, s.Prints = 0x1122334455667788, block.Pointer{Phys: block.At(0, 2070), Birth: 9, Sum: 0x99aabbcc, Twin: block.TwinBehind(3)}
	for _, s.Twins = range []bool{false, true} {
		b := s.Encode()
		got, err := DecodeSuperblock(b)
		if err != nil || !reflect.DeepEqual(got, s) {
			t.Errorf("%v: %+v", err, got)
		}
	}
	golden(t, "testdata/superblock-4.hex", s.Encode())
}

// Devices of another class and settings need version 5, whether anything is shared or not.
func TestGoldenSuperblock5(t *testing.T) {
	s := leavingSuperblock()
	s.Devices[1].Class = ClassMemory
	for _, s.Secret = range []dedup.Secret{0, 0x1122334455667788} {
		for _, s.Settings = range []Settings{{}, {Threshold: MaxThreshold}, {IndexBytes: 1 << 30, Threshold: 3}} {
			if got, err := DecodeSuperblock(s.Encode()); err != nil || !reflect.DeepEqual(got, s) {
				t.Errorf("%v: %+v", err, got)
			}
		}
	}
	golden(t, "testdata/superblock-5.hex", s.Encode())
	spoilt := *s
	spoilt.Settings.Threshold = MaxThreshold + 1
	if _, err := DecodeSuperblock(spoilt.Encode()); err == nil || !strings.Contains(err.Error(), "threshold of 9") {
		t.Errorf("a threshold that is too large: %v", err)
	}
	// The largest one fits into a block.
	for len(s.Devices) < MaxDevices {
		s.Devices = append(s.Devices, s.Devices[0])
	}
	s.RegionID, s.BootID = strings.Repeat("r", 36), strings.Repeat("b", 36)
	if got, err := DecodeSuperblock(s.Encode()); err != nil || !reflect.DeepEqual(got, s) {
		t.Errorf("%v: %+v", err, got)
	}
}

// Flash needs version 6.
func TestGoldenSuperblock6(t *testing.T) {
	s := leavingSuperblock()
	s.Devices[1].Class, s.Devices[1].Blocks = ClassFlash, s.Devices[1].First
	b := s.Encode()
	if got, err := DecodeSuperblock(b); err != nil || !reflect.DeepEqual(got, s) {
		t.Errorf("%v: %+v", err, got)
	}
	if dev, ok := s.Flash(); dev != 1 || !ok {
		t.Errorf("flash is device %d", dev)
	}
	golden(t, "testdata/superblock-6.hex", b)
	s.Devices[1].State, s.Devices[1].Blocks, s.Devices[1].Was = DeviceGone, 0, 0
	if dev, ok := s.Flash(); ok {
		t.Errorf("flash is device %d, which is gone", dev)
	}
}

// leavingSuperblock has a device in each state.
func leavingSuperblock() *Superblock {
	s := testSuperblock()
	s.Devices[1].State, s.Devices[1].Was = DeviceLeaving, 0x123456
	s.Devices = append(s.Devices, DeviceRoot{ID: block.DeviceID{0xd2}, State: DeviceGone})
	return s
}

// States that no pool can be in are refused.
func TestImpossibleDevices(t *testing.T) {
	for name, spoil := range map[string]func(d []DeviceRoot){
		"unknown class":      func(d []DeviceRoot) { d[1].Class = ClassFlash + 1 },
		"first is flash":     func(d []DeviceRoot) { d[0].Class = ClassFlash },
		"flash, with blocks": func(d []DeviceRoot) { d[1].Class = ClassFlash },
		"flash, with counts": func(d []DeviceRoot) { d[1].Class, d[1].Blocks, d[1].Counts = ClassFlash, d[1].First, d[0].Counts },
		"two flash devices": func(d []DeviceRoot) {
			d[1].Class, d[1].Blocks = ClassFlash, d[1].First
			d[2] = d[1]
			d[2].State, d[2].Was = DeviceUsed, 0
		},
		"first of memory":       func(d []DeviceRoot) { d[0].Class = ClassMemory },
		"unknown state":         func(d []DeviceRoot) { d[1].State = DeviceGone + 1 },
		"first leaves":          func(d []DeviceRoot) { d[0].State = DeviceLeaving },
		"first is gone":         func(d []DeviceRoot) { d[0] = DeviceRoot{State: DeviceGone} },
		"gone, with blocks":     func(d []DeviceRoot) { d[2].Blocks = 1 },
		"gone, with counts":     func(d []DeviceRoot) { d[2].Counts = d[0].Counts },
		"had blocks, and stays": func(d []DeviceRoot) { d[1].State = DeviceUsed },
	} {
		s := leavingSuperblock()
		spoil(s.Devices)
		if got, err := DecodeSuperblock(s.Encode()); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("%s: %v: %+v", name, err, got)
		}
	}
}

func TestGoldenRecords(t *testing.T) {
	for name, r := range testRecords() {
		b := r.encode(testPool)
		golden(t, "testdata/"+name+".hex", b)
		if size := recordFixed + r.size(); size != int(binary.LittleEndian.Uint32(b[12:])) {
			t.Errorf("%s: counted %d bytes", name, size)
		}
		got, n, err := decodeRecord(b, testPool)
		if err != nil || n != len(b) || !reflect.DeepEqual(got, r) {
			t.Errorf("%s: %v: %+v", name, err, got)
		}
		if _, _, err := decodeRecord(b, block.PoolID{}); !errors.Is(err, ondisk.ErrMagic) {
			t.Errorf("%s: record of another pool: %v", name, err)
		}
	}
}

// How many blocks a record maps is known before it is decoded: exactly, but for
// what changes of the catalogue take.
func TestMappingsOfFrame(t *testing.T) {
	for _, test := range []struct {
		of   string
		edit func(*record)
		want int
	}{
		{"commit", func(r *record) { r.Commit.Catalogue = nil }, 4},
		{"commit", func(r *record) { r.Commit.Catalogue, r.Commit.Runs = nil, nil }, 0},
		{"fold", func(*record) {}, 0},
		{"shared", func(*record) {}, 6},
	} {
		r := testRecords()[test.of]
		test.edit(r)
		f, err := openFrame(r.encode(testPool), testPool)
		if err != nil {
			t.Fatal(err)
		}
		if n := f.mappings(); n != test.want {
			t.Errorf("%+v: %d instead of %d", r, n, test.want)
		}
	}
	f, err := openFrame(testRecords()["commit"].encode(testPool), testPool)
	if n := f.mappings(); err != nil || n < 4 || n > 40 {
		t.Errorf("with changes of the catalogue: %v, %d", err, n)
	}
}

// reseal gives fuzzed bytes a good checksum, without which no decoder would
// ever look at what follows.
func reseal(b []byte, kind ondisk.Kind, length int) { resealAs(b, kind, 1, length) }

func resealAs(b []byte, kind ondisk.Kind, version uint16, length int) {
	h := ondisk.Header{Kind: kind, Version: version, Length: length, Pool: testPool, Epoch: 1, Generation: 1}
	ondisk.Seal(b, h)
}

func FuzzSuperblock(f *testing.F) {
	f.Add(testSuperblock().Encode()[:400], uint16(1))
	f.Add(leavingSuperblock().Encode()[:400], uint16(2))
	f.Add([]byte("PLXsuper"), uint16(0))
	f.Fuzz(func(t *testing.T, in []byte, version uint16) {
		b := make([]byte, block.Size)
		n := copy(b, in)
		if version > 0 && n >= ondisk.HeaderSize {
			resealAs(b, ondisk.KindSuperblock, version, n)
		}
		s, err := DecodeSuperblock(b)
		if err != nil {
			return
		}
		again, err := DecodeSuperblock(s.Encode())
		if err != nil || !reflect.DeepEqual(s, again) {
			t.Fatalf("%v: %+v became %+v", err, s, again)
		}
	})
}

func FuzzRecord(f *testing.F) {
	for _, r := range testRecords() {
		f.Add(bytes.TrimRight(r.encode(testPool), "\x00"), true)
	}
	f.Add([]byte("PLXjrnal"), false)
	f.Fuzz(func(t *testing.T, in []byte, sound bool) {
		b := make([]byte, roundUp(max(len(in), block.Size)))
		n := copy(b, in)
		if sound && n >= ondisk.HeaderSize {
			reseal(b, ondisk.KindJournal, n)
		}
		_, _ = recordLength(b)
		r, _, err := decodeRecord(b, testPool)
		if err != nil {
			return
		}
		enc := r.encode(testPool)
		if size := recordFixed + r.size(); size != int(binary.LittleEndian.Uint32(enc[12:])) {
			t.Fatalf("counted %d bytes of %+v", size, r)
		}
		again, _, err := decodeRecord(enc, testPool)
		if err != nil || !reflect.DeepEqual(r, again) {
			t.Fatalf("%v: %+v became %+v", err, r, again)
		}
	})
}

// journalRig is a journal with some records in it, on a device of its own.
func journalRig(t testing.TB, n int) (*journal, *blocktest.Crash, [][]byte) {
	dev := blocktest.NewCrash(64*block.Size, 1)
	j := &journal{set: devices.NewSet([]hpdi.Device{dev}), pool: testPool, start: 8, size: 16 * block.Size, next: JournalPos{Number: 1}}
	var made [][]byte
	for i := range n {
		r := &record{Epoch: 1, Type: typeCommit, Commit: commit{CP: block.CP(i + 1), Log: block.Seq(i), Flush: oplog.DiskPos{Batch: 1}}}
		for range i * 300 % 1500 {
			r.Commit.Runs = append(r.Commit.Runs, mapRun{Volume: 1, LBA: block.Logical(i), At: block.At(0, 9), Sums: []uint32{uint32(i)}})
		}
		if err := j.append(r); errors.Is(err, errJournalFull) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		made = append(made, r.encode(testPool))
	}
	return j, dev, made
}

// Whatever happens to the bytes of a journal, replay yields a prefix of what
// was appended to it, and never panics.
func FuzzReplay(f *testing.F) {
	f.Add(4, 0, []byte{1}, 3)
	f.Add(6, 5000, []byte("PLXjrnal"), 700)
	f.Add(3, 4096, make([]byte, 4096), 0)
	f.Fuzz(func(t *testing.T, n, at int, damage []byte, again int) {
		j, dev, made := journalRig(t, min(max(n, 0), 12))
		for i, c := range damage[:min(len(damage), 500)] {
			for _, from := range []int{at, again} {
				if off := from%int(j.size) + i; from >= 0 && off < int(j.size) {
					dev.Corrupt(int64(j.start)*block.Size+int64(off), c)
				}
			}
		}
		k := &journal{set: j.set, pool: testPool, start: j.start, size: j.size}
		i := 0
		err := k.replay(JournalPos{Number: 1}, func(r *record) error {
			if i >= len(made) || !bytes.Equal(r.encode(testPool), made[i]) {
				t.Fatalf("record %d was never written: %+v", i, r)
			}
			i++
			return nil
		})
		if err != nil && !errors.Is(err, block.ErrCorrupt) && !errors.Is(err, block.ErrUnsupported) {
			t.Fatal(err)
		}
		if err == nil {
			_ = k.damaged()
		}
	})
}

// Damage before the end of a journal is found, whether or not what follows is
// of the same lap.
func TestJournalDamageBeforeEnd(t *testing.T) {
	j, dev, made := journalRig(t, 4)
	if len(made) != 4 {
		t.Fatalf("%d records", len(made))
	}
	dev.Corrupt(int64(j.start)*block.Size+int64(len(made[0]))+100, 1)
	k := &journal{set: j.set, pool: testPool, start: j.start, size: j.size}
	if err := k.replay(JournalPos{Number: 1}, func(*record) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if k.next.Number != 2 {
		t.Errorf("replay ended at record %d", k.next.Number)
	}
	if err := k.damaged(); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("%v", err)
	}
}

// The padding of a record is not covered by its own checksum. What has changed in it
// does no harm; anywhere else it is found.
func TestJournalDamageInPadding(t *testing.T) {
	harmless := 0
	for at := block.Size - 1; at > 0; at -= 37 {
		j, dev, made := journalRig(t, 2)
		if len(made) != 2 || len(made[0]) != block.Size {
			t.Fatalf("%d records, the first of %d bytes", len(made), len(made[0]))
		}
		dev.Corrupt(int64(j.start)*block.Size+int64(at), 1)
		k := &journal{set: j.set, pool: testPool, start: j.start, size: j.size}
		if err := k.replay(JournalPos{Number: 1}, func(*record) error { return nil }); err != nil {
			continue // not padding, or found at once
		}
		if k.next == j.next {
			harmless++
		} else if err := k.damaged(); !errors.Is(err, block.ErrCorrupt) {
			t.Fatalf("byte %d: replay ends at record %d, and nobody notices: %v", at, k.next.Number, err)
		}
	}
	if harmless == 0 {
		t.Error("no padding was changed")
	}
}

// A flusher that has not committed all that was promised before it leaves the
// old chain alone.
func TestFlusherKeepsOldPromises(t *testing.T) {
	old := oplog.DiskPos{Offset: 8192, Batch: 9, Chain: 3, Nonce: 4}
	mem, err := hpdi.AllocPrivate(int(oplog.SectionSize(1 << 20)))
	if err != nil {
		t.Fatal(err)
	}
	defer hpdi.Free(mem)
	log, err := oplog.Format(mem, oplog.Config{PayloadBytes: 1 << 20, Pool: testPool, Epoch: 1, Start: 100})
	if err != nil {
		t.Fatal(err)
	}
	f := NewFlusher(log, oplog.NewDisk(nil, oplog.Area{Length: 1 << 20, Pool: testPool}), old, nil)
	if pos := f.positionLocked(99, 2, 1); pos != old {
		t.Errorf("%+v instead of the old chain", pos)
	}
	f.committedLocked(99, old)
	if f.started {
		t.Error("a new chain began")
	}
	pos := f.positionLocked(100, 2, 2)
	if pos == old || f.started {
		t.Errorf("%+v, started %v", pos, f.started)
	}
	f.committedLocked(100, pos)
	if !f.started || f.flushed.Load() != 100 {
		t.Errorf("started %v, flushed %d", f.started, f.flushed.Load())
	}
	f.invalidateLocked()
	if done, err := f.try(context.Background()); done || err != nil {
		t.Errorf("an ended chain goes on: %v %v", done, err)
	}
}
