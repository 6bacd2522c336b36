package cp

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/space"
)

// What is behind the last record of a journal is told for what it is.
func TestInspectJournalEnd(t *testing.T) {
	for _, test := range []struct {
		name string
		// next returns what lies where the next record would begin.
		next   func(j *journal) []byte
		why    string
		damage string
	}{
		{"nothing", func(*journal) []byte { return nil }, "no record begins there", ""},
		{"no length", func(j *journal) []byte {
			b := (&record{Number: 4, Type: typeFold}).encode(testPool)
			binary.LittleEndian.PutUint32(b[12:], 3)
			return b
		}, "claims a length of 3 bytes", ""},
		{"a length beyond the area", func(j *journal) []byte {
			b := (&record{Number: 4, Type: typeFold}).encode(testPool)
			binary.LittleEndian.PutUint32(b[12:], 15*block.Size)
			return b
		}, "claims to reach beyond the end of the journal", ""},
		{"a torn one", func(j *journal) []byte {
			b := (&record{Number: 4, Type: typeFold, Prev: j.next.Prev}).encode(testPool)
			b[ondisk.HeaderSize+2] ^= 1
			return b
		}, "is not whole", ""},
		{"one of an earlier lap", func(*journal) []byte {
			return (&record{Number: 2, Type: typeFold}).encode(testPool)
		}, "record 2 is there, of an earlier lap", ""},
		{"one that follows another", func(*journal) []byte {
			return (&record{Number: 4, Type: typeFold, Prev: 0x1234}).encode(testPool)
		}, "it follows a record with checksum 00001234", "record 4"},
	} {
		t.Run(test.name, func(t *testing.T) {
			j, dev, made := journalRig(t, 3)
			if len(made) != 3 {
				t.Fatalf("%d records", len(made))
			}
			at := int64(j.start)*block.Size + int64(j.next.Offset)
			for i, c := range test.next(j) {
				if off := at + int64(i); c != 0 && off < int64(j.start)*block.Size+int64(j.size) {
					dev.Corrupt(off, c)
				}
			}
			n := 0
			inspect := func(set *devices.Set, fn func(JournalRecord) error) (JournalEnd, error) {
				return InspectJournal(set, &Superblock{Pool: testPool, Journal: JournalPos{Number: 1}}, j.start, j.size/block.Size, fn)
			}
			end, err := inspect(j.set, func(JournalRecord) error { n++; return nil })
			if err != nil || n != 3 || end.Number != 4 || end.Offset != j.next.Offset || !strings.Contains(end.Why, test.why) {
				t.Errorf("%v, %d records, %+v", err, n, end)
			}
			if test.damage == "" && end.Damage != nil || test.damage != "" && (!errors.Is(end.Damage, block.ErrCorrupt) || !strings.Contains(end.Damage.Error(), test.damage)) {
				t.Errorf("damage: %v", end.Damage)
			}
			// Each read fails once: never an end that is none.
			for skip, hit := 0, true; hit; skip++ {
				f := blocktest.NewFault(dev, 1)
				f.Add(blocktest.Rule{Op: hpdi.OpRead, Skip: skip, Count: 1, Err: errBroken})
				again, err := inspect(devices.NewSet([]hpdi.Device{f}), func(JournalRecord) error { return nil })
				if hit = f.Hits() > 0; hit != errors.Is(err, errBroken) || !hit && again.Why != end.Why {
					t.Errorf("read %d fails: %v, %+v", skip, err, again)
				}
			}
			if _, err := inspect(j.set, func(JournalRecord) error { return errBroken }); !errors.Is(err, errBroken) {
				t.Errorf("%v", err)
			}
		})
	}
}

// A superblock of another pool never counts, one that cannot be read says why.
func TestInspectSuperblocks(t *testing.T) {
	dev := blocktest.NewCrash(256*block.Size, 1)
	fault := blocktest.NewFault(dev, 1)
	set := devices.NewSet([]hpdi.Device{fault})
	s := testSuperblock()
	s.Generation = 6
	if err := WriteSuperblock(set, s); err != nil {
		t.Fatal(err)
	}
	s.Generation, s.Pool[0] = 7, s.Pool[0]+1
	if err := WriteSuperblock(set, s); err != nil {
		t.Fatal(err)
	}
	fault.Add(blocktest.Rule{Op: hpdi.OpRead, Offset: int64(SuperblockAt(6)[1]) * block.Size, Length: block.Size, Err: errBroken})
	copies, err := InspectSuperblocks(set, testPool)
	if err != nil || len(copies) != 4 {
		t.Fatalf("%v %+v", err, copies)
	}
	for _, c := range copies {
		var want error
		switch c.At.Block() {
		case SuperblockAt(6)[1]:
			want = errBroken
		case SuperblockAt(7)[0], SuperblockAt(7)[1]:
			want = block.ErrCorrupt
		}
		if !errors.Is(c.Err, want) || c.Wins != (want == nil) {
			t.Errorf("block %v: %v, wins %v", c.At, c.Err, c.Wins)
		}
		if want == block.ErrCorrupt && !strings.Contains(c.Err.Error(), "it is of pool") {
			t.Errorf("block %v: %v", c.At, c.Err)
		}
	}
	copies, err = InspectSuperblocks(set, block.PoolID{})
	if err != nil || !copies[2].Wins || copies[0].Wins {
		t.Errorf("of any pool: %v %+v", err, copies)
	}
}

// Records that are whole, follow each other and tell of points that do not.
func TestReplayOfImpossiblePoints(t *testing.T) {
	for _, c := range []commit{{CP: 9, Log: 20}, {CP: 11, Log: 20}, {CP: 10, Log: 4}} {
		m := &Machine{last: commit{CP: 9, Log: 5}}
		err := m.replay(&record{Number: 77, Type: typeCommit, Commit: c})
		if !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "77") || !strings.Contains(err.Error(), "after 9 at 5") {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// Counts that cannot change as the references did stop a fold, and name the
// block.
func TestImpossibleCounts(t *testing.T) {
	page := new([block.Size]byte)
	page[300], page[301] = 255, 1
	f := &fold{}
	for _, c := range []struct {
		ch   countChange
		word string
	}{
		{changeOf(space.Run{At: block.At(1, block.Size+300), N: 1}, false), "block 1:4396"},
		{changeOf(space.Run{At: block.At(1, block.Size+301), N: 2}, true), "block 1:4398"},
	} {
		err := f.applyChange(page, c.ch)
		if !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), c.word) || !strings.Contains(err.Error(), "pollux check") {
			t.Errorf("%v", err)
		}
	}
	f.refs.added = []space.Run{{At: block.At(2, 300), N: 1}}
	f.m = &Machine{}
	f.sb.Devices = make([]DeviceRoot, 2)
	if err := f.prepareCounts(); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "2:300") {
		t.Errorf("%v", err)
	}
}
