package cp

import (
	"encoding/binary"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/space"
)

// sealed gives altered bytes a good checksum again, for a decoder must not
// rely on it: they may come from another program.
func sealed(t *testing.T, b []byte, kind ondisk.Kind, length int) []byte {
	t.Helper()
	ondisk.Seal(b, ondisk.Header{Kind: kind, Version: 1, Length: length, Pool: testPool, Epoch: 7, Generation: 42})
	return b
}

func lengthOf(b []byte) int { return int(binary.LittleEndian.Uint32(b[12:])) }

const lastBlock = catalogue.MaxSize / block.Size

func TestSuperblockRefusals(t *testing.T) {
	for _, test := range []struct {
		name string
		edit func(*Superblock)
		word string
	}{
		{"no device", func(s *Superblock) { s.Devices = nil }, "0 devices"},
		{"too many devices", func(s *Superblock) {
			for len(s.Devices) <= MaxDevices {
				s.Devices = append(s.Devices, s.Devices[1])
			}
		}, "65 devices"},
		{"a device that is too large", func(s *Superblock) { s.Devices[1].Blocks = block.MaxDeviceBlocks + 1 }, "that begins at 256"},
		{"a device without room", func(s *Superblock) { s.Devices[0].First = 65537 }, "device of 65536 blocks that begins at 65537"},
		{"a catalogue that is too long", func(s *Superblock) { s.CatBytes = maxRecordBytes + 1 }, "catalogue of 268435457 bytes"},
		{"a point that no pointer holds", func(s *Superblock) { s.CP = block.MaxCP + 1 }, "consistency point 1099511627776"},
	} {
		s := testSuperblock()
		test.edit(s)
		_, err := DecodeSuperblock(s.Encode())
		if !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), test.word) || !strings.Contains(err.Error(), "generation 42") {
			t.Errorf("%s: %v", test.name, err)
		}
	}
	// The largest that are possible.
	s := testSuperblock()
	for len(s.Devices) < MaxDevices {
		s.Devices = append(s.Devices, s.Devices[1])
	}
	s.CatBytes, s.CP, s.Devices[0].First, s.Devices[2].Blocks = maxRecordBytes, block.MaxCP, 65536, block.MaxDeviceBlocks
	if got, err := DecodeSuperblock(s.Encode()); err != nil || !reflect.DeepEqual(got, s) {
		t.Errorf("%v", err)
	}
	whole := testSuperblock().Encode()
	for n := ondisk.HeaderSize; n < lengthOf(whole); n++ {
		b := sealed(t, append([]byte(nil), whole...), ondisk.KindSuperblock, n)
		if _, err := DecodeSuperblock(b); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
}

func TestRecordRefusals(t *testing.T) {
	run := func(r mapRun) func(*record) { return func(x *record) { x.Commit.Runs[0] = r } }
	pages := func(r space.Run) func(*record) { return func(x *record) { x.Fold.Taken[0] = r } }
	for _, test := range []struct {
		name, of string
		edit     func(*record)
		word     string
	}{
		{"type", "commit", func(r *record) { r.Type = 99 }, "record type 99"},
		{"an empty hole", "commit", func(r *record) { r.Commit.Holes[0].End = 5 }, "hole [5, 5)"},
		{"a hole backwards", "commit", func(r *record) { r.Commit.Holes[0].End = 4 }, "hole [5, 4)"},
		{"a hole beyond all volumes", "commit", func(r *record) { r.Commit.Holes[0].End = lastBlock + 1 }, "hole"},
		{"an empty run", "commit", run(mapRun{Volume: 1, LBA: 1, At: 300}), "mapping of 0 blocks"},
		{"a run beyond all volumes", "commit", run(mapRun{Volume: 1, LBA: lastBlock, At: 300, Sums: []uint32{1}}), "mapping of 1 blocks"},
		{"a run over the end of all volumes", "commit", run(mapRun{Volume: 1, LBA: lastBlock - 1, At: 300, Sums: []uint32{1, 2}}), "mapping of 2 blocks"},
		{"a run to nowhere", "commit", run(mapRun{Volume: 1, LBA: 1, At: 1 << 56, Sums: []uint32{1}}), "mapping of 1 blocks"},
		{"a volume of no size", "commit", func(r *record) { r.Commit.Catalogue[0].Put.Size = 0 }, `volume 3 "vol" of 0 bytes`},
		{"a run of no pages", "fold", pages(space.Run{At: 300}), "run of 0 blocks"},
		{"a run of more than a track", "fold", pages(space.Run{At: 300, N: block.TrackBlocks + 1}), "run of 257 blocks"},
		{"pages nowhere", "fold", pages(space.Run{At: 1 << 56, N: 1}), "run of 1 blocks"},
	} {
		r := testRecords()[test.of]
		test.edit(r)
		b := r.encode(testPool)
		if test.name == "type" {
			b = testRecords()["fold"].encode(testPool)
			binary.LittleEndian.PutUint32(b[ondisk.HeaderSize+4:], 99)
			b = sealed(t, b, ondisk.KindJournal, lengthOf(b))
		}
		_, _, err := decodeRecord(b, testPool)
		if !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), test.word) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
	// The very last block of the largest volume.
	r := testRecords()["commit"]
	r.Commit.Runs[0] = mapRun{Volume: 1, LBA: lastBlock - 2, At: 300, Sums: []uint32{1, 2}}
	r.Commit.Holes[0].End = lastBlock
	if got, _, err := decodeRecord(r.encode(testPool), testPool); err != nil || !reflect.DeepEqual(got, r) {
		t.Errorf("%v", err)
	}
	// A change of a kind that this program does not know.
	r = testRecords()["commit"]
	r.Commit.Catalogue = []catalogue.Change{{Delete: 1}}
	b := r.encode(testPool)
	b[lengthOf(b)-5] = 3
	if _, _, err := decodeRecord(sealed(t, b, ondisk.KindJournal, lengthOf(b)), testPool); err == nil || !strings.Contains(err.Error(), "change of kind 3") {
		t.Errorf("%v", err)
	}
	for name, r := range testRecords() {
		whole := r.encode(testPool)
		for n := ondisk.HeaderSize; n < lengthOf(whole); n++ {
			b := sealed(t, append([]byte(nil), whole...), ondisk.KindJournal, n)
			if _, _, err := decodeRecord(b, testPool); !errors.Is(err, block.ErrCorrupt) {
				t.Errorf("%s cut to %d bytes: %v", name, n, err)
			}
		}
	}
}

// The newest superblock of this pool is taken, from whichever copy is whole.
func TestReadSuperblock(t *testing.T) {
	newSet := func() (*devices.Set, *blocktest.Crash, *blocktest.Fault) {
		dev := blocktest.NewCrash(256*block.Size, 1)
		fault := blocktest.NewFault(dev, 1)
		return devices.NewSet([]hpdi.Device{fault}), dev, fault
	}
	put := func(set *devices.Set, generation uint64, edit func(*Superblock)) {
		t.Helper()
		s := testSuperblock()
		s.Generation = generation
		if edit != nil {
			edit(s)
		}
		if err := WriteSuperblock(set, s); err != nil {
			t.Fatal(err)
		}
	}
	want := func(what string, set *devices.Set, generation uint64) {
		t.Helper()
		if s, err := ReadSuperblock(set, testPool); err != nil || s.Generation != generation {
			t.Errorf("%s: %+v %v", what, s, err)
		}
	}
	refused := func(what string, set *devices.Set, kind error, words ...string) {
		t.Helper()
		s, err := ReadSuperblock(set, testPool)
		if s != nil || !errors.Is(err, kind) {
			t.Errorf("%s: %+v %v", what, s, err)
			return
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v does not say %q", what, err, w)
			}
		}
	}
	set, dev, fault := newSet()
	refused("blank", set, ondisk.ErrMagic, "no valid superblock", "block 1:", "block 2:", "block 129:", "block 130:")
	put(set, 6, nil)
	put(set, 7, nil)
	want("both slots", set, 7)
	dev.Corrupt(2*block.Size+100, 1)
	want("one copy damaged", set, 7)
	fault.Add(blocktest.Rule{Op: hpdi.OpRead, Offset: 2 * block.Size, Length: block.Size, Err: errBroken})
	want("one copy unreadable", set, 7)
	dev.Corrupt(130*block.Size+100, 1)
	want("the newest damaged", set, 6)
	fault.Clear()
	put(set, 9, func(s *Superblock) { s.Pool[0]++ })
	want("another pool's", set, 6)
	put(set, 8, func(s *Superblock) { s.Pool[0]++ })
	refused("nothing but another pool's", set, block.ErrCorrupt, "is of pool")
	fault.Add(blocktest.Rule{Op: hpdi.OpRead, Err: errBroken})
	refused("unreadable", set, errBroken)

	// What a newer program wrote is not passed over.
	set, _, _ = newSet()
	put(set, 6, nil)
	b, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = hpdi.Free(b) }()
	copy(b, testSuperblock().Encode())
	ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindSuperblock, Version: superblockVersion + 1, Length: lengthOf(b), Pool: testPool, Generation: 7})
	if err := set.Do([]*devices.IO{{Op: hpdi.OpWrite, At: block.At(0, 130), Vec: [][]byte{b}}}); err != nil {
		t.Fatal(err)
	}
	refused("a newer version", set, ondisk.ErrVersion, "block 130")

	set, _, fault = newSet()
	for _, op := range []hpdi.Op{hpdi.OpWrite, hpdi.OpFlush} {
		fault.Clear()
		fault.Add(blocktest.Rule{Op: op, Err: errBroken})
		if err := WriteSuperblock(set, testSuperblock()); !errors.Is(err, errBroken) || !strings.Contains(err.Error(), "generation 42") {
			t.Errorf("%v fails: %v", op, err)
		}
	}
}

var errBroken = errors.New("broken")

// A journal on a device that fails: no record is believed to be there, and no
// end is taken for the end when it cannot be read.
func TestJournalErrors(t *testing.T) {
	dev := blocktest.NewCrash(64*block.Size, 1)
	fault := blocktest.NewFault(dev, 1)
	j := &journal{set: devices.NewSet([]hpdi.Device{fault}), pool: testPool, start: 8, size: 16 * block.Size, next: JournalPos{Number: 1}}
	add := func() error {
		return j.append(&record{Epoch: 1, Type: typeCommit, Commit: commit{CP: 1, Flush: oplog.DiskPos{Batch: 1}}})
	}
	for _, op := range []hpdi.Op{hpdi.OpWrite, hpdi.OpFlush} {
		fault.Add(blocktest.Rule{Op: op, Err: errBroken})
		before := j.next
		if err := add(); !errors.Is(err, errBroken) || !strings.Contains(err.Error(), "journal record 1") || j.next != before {
			t.Errorf("%v fails: %v, at %+v", op, err, j.next)
		}
		fault.Clear()
	}
	for range 3 {
		if err := add(); err != nil {
			t.Fatal(err)
		}
	}
	k := &journal{set: j.set, pool: testPool, start: j.start, size: j.size}
	remove := fault.Add(blocktest.Rule{Op: hpdi.OpRead, Err: errBroken})
	if err := k.replay(JournalPos{Number: 1}, func(*record) error { return nil }); !errors.Is(err, errBroken) {
		t.Errorf("%v", err)
	}
	if err := k.damaged(); !errors.Is(err, errBroken) {
		t.Errorf("%v", err)
	}
	remove()
	n := 0
	if err := k.replay(JournalPos{Number: 1}, func(*record) error {
		if n++; n == 2 {
			return errBroken
		}
		return nil
	}); !errors.Is(err, errBroken) || k.next.Number != 2 {
		t.Errorf("%v after %d records", err, n)
	}
	if err := k.replay(JournalPos{Number: 1}, func(*record) error { return nil }); err != nil || k.next != j.next {
		t.Errorf("%v: %+v instead of %+v", err, k.next, j.next)
	}
	if err := k.damaged(); err != nil {
		t.Errorf("%v", err)
	}

	// A record of a newer program is not an end.
	b, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = hpdi.Free(b) }()
	r := record{Number: 4, Epoch: 1, Prev: j.next.Prev, Type: typeFold}
	copy(b, r.encode(testPool))
	ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindJournal, Version: journalVersion + 1, Length: lengthOf(b), Pool: testPool, Generation: 4})
	if err := j.set.Do([]*devices.IO{{Op: hpdi.OpWrite, At: j.at(j.next.Offset), Vec: [][]byte{b}}}); err != nil {
		t.Fatal(err)
	}
	if err := k.replay(JournalPos{Number: 1}, func(*record) error { return nil }); !errors.Is(err, ondisk.ErrVersion) {
		t.Errorf("%v", err)
	}
	if err := k.damaged(); !errors.Is(err, ondisk.ErrVersion) {
		t.Errorf("%v", err)
	}
	// A header that claims more than the area has belongs to nothing.
	binary.LittleEndian.PutUint32(b[12:], 17*block.Size)
	if err := j.set.Do([]*devices.IO{{Op: hpdi.OpWrite, At: j.at(j.next.Offset), Vec: [][]byte{b}}}); err != nil {
		t.Fatal(err)
	}
	if err := k.replay(JournalPos{Number: 1}, func(*record) error { return nil }); err != nil || k.next != j.next {
		t.Errorf("%v", err)
	}
	if err := k.damaged(); err != nil {
		t.Errorf("%v", err)
	}
	j.tail = 0
	for i := 0; ; i++ {
		if err := add(); errors.Is(err, errJournalFull) {
			break
		} else if err != nil || i > 20 {
			t.Fatal(err)
		}
	}
}
