package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/region"
)

// lookFinds looks at the pool, which nobody serves, and wants problems with
// certain words.
func (r *rig) lookFinds(words ...string) {
	r.t.Helper()
	report, err := r.look()
	if err != nil {
		r.t.Error(err)
		return
	}
	all := strings.Join(report.Problems, "\n")
	for _, w := range words {
		if !strings.Contains(all, w) {
			r.t.Errorf("offline check does not say %q, but:\n%s", w, all)
		}
	}
}

// holds reopens the volume v and compares it.
func (r *rig) holds(want map[int64]byte) {
	r.t.Helper()
	v, err := r.Volume("v")
	if err != nil {
		r.t.Fatal(err)
	}
	verifyBlocks(r.t, v, want)
}

// written returns a rig with three blocks in three consistency points that are
// only in the journal, and where their records are.
func written(t *testing.T) (r *rig, records []cp.JournalRecord) {
	r = newRig(t, 1, testSize)
	r.mustOpen()
	v := r.volume("v", 1<<20)
	for i := range int64(3) {
		if err := write(v, i*block.Size, pattern(byte(i+1))); err != nil {
			t.Fatal(err)
		}
		if err := r.Commit(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	sb := r.machine.Superblock()
	_, err := cp.InspectJournal(r.set, &sb, r.label.Layout.Journal, r.label.Layout.JournalBlocks, func(j cp.JournalRecord) error {
		records = append(records, j)
		return nil
	})
	if err != nil || len(records) < 4 {
		t.Fatalf("%v, %d records", err, len(records))
	}
	return r, records
}

var writtenBlocks = map[int64]byte{0: 1, 1: 2, 2: 3}

// A damaged record of the journal is never taken for its end: the region knows
// the last point, or records that follow give it away. Nothing is changed, so
// that with the record back all is there.
func TestDamagedJournal(t *testing.T) {
	for _, test := range []struct {
		name  string
		power bool
		from  int // the end: which record is damaged
		word  string
	}{
		{"the last, region there", false, 1, "ends at consistency point"},
		{"one in the middle, region there", false, 2, "ends at consistency point"},
		{"one in the middle, no region", true, 2, "journal record"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r, records := written(t)
			if test.power {
				r.cutPower(blocktest.KeepAll, 0)
			} else {
				r.die()
				r.dropSections(region.SectionJournal) // which has them, too
			}
			at := int64(records[len(records)-test.from].At.Block())*block.Size + 80
			r.devs[0].Corrupt(at, 1)
			r.lookFinds(test.word)
			r.refused(r.devices(), block.ErrCorrupt, "p", test.word)
			r.reopen()
			r.devs[0].Corrupt(at, 1)
			r.mustLook()
			r.mustOpen()
			r.holds(writtenBlocks)
			r.shut()
		})
	}
}

// The part of the journal behind its end cannot be read, and nobody knows where
// it ends but the journal.
func TestJournalEndUnreadable(t *testing.T) {
	r, records := written(t)
	r.cutPower(blocktest.KeepAll, 0)
	last := records[len(records)-1]
	behind := int64(last.At.Block())*block.Size + int64(last.Bytes) + 2<<20
	r.wrap = func(_ int, d hpdi.Device) hpdi.Device {
		f := blocktest.NewFault(d, 1)
		f.Add(blocktest.Rule{Op: hpdi.OpRead, Offset: behind, Length: block.Size, Err: errMedium})
		return f
	}
	if _, err := r.look(); !errors.Is(err, errMedium) {
		t.Errorf("offline check: %v", err)
	}
	r.refused(r.devices(), errMedium, "open pool p")
	r.wrap = nil
	r.reopen()
	r.mustOpen()
	r.holds(writtenBlocks)
	r.shut()
}

// Regions that are not the one that the superblock names, or not whole: looking
// says so, opening refuses, and neither harms what is there.
func TestWrongRegion(t *testing.T) {
	for _, test := range []struct {
		name   string
		spoil  func(t *testing.T, r *rig, saved []byte)
		kind   error
		looked string // by the offline check; empty when it cannot be made
		opened string
	}{
		{"both headers are damaged", func(t *testing.T, r *rig, saved []byte) {
			clear(saved[:2*block.Size])
			save(t, r.region, saved)
		}, ondisk.ErrMagic, "region", "region of pool p"},
		{"of another pool", func(t *testing.T, r *rig, _ []byte) {
			o := newRig(t, 1, testSize)
			o.mustOpen()
			o.die()
			b, err := os.ReadFile(o.region)
			if err != nil {
				t.Fatal(err)
			}
			save(t, r.region, b)
		}, block.ErrInvalid, "has its log in", "belongs to pool"},
		{"readable for others", func(t *testing.T, r *rig, _ []byte) {
			if err := os.Chmod(r.region, 0o644); err != nil {
				t.Fatal(err)
			}
		}, block.ErrInvalid, "", "lets others in"},
		{"the log's headers are damaged", func(t *testing.T, r *rig, saved []byte) {
			log := logIn(t, saved)
			clear(log[:block.Size])
			clear(log[len(log)-block.Size:])
			save(t, r.region, saved)
		}, ondisk.ErrMagic, "log", "of pool p: operation log"},
		{"the log's position is damaged", func(t *testing.T, r *rig, saved []byte) {
			log := logIn(t, saved)
			for _, at := range []int{2048, len(log) - block.Size + 2048} { // see docs/format/oplog.md
				log[at] ^= 1
			}
			save(t, r.region, saved)
		}, block.ErrCorrupt, "published position", "of pool p: operation log"},
		{"all records are damaged", func(t *testing.T, r *rig, saved []byte) {
			log := logIn(t, saved)
			for i := block.Size; i < len(log)-block.Size; i++ {
				if log[i] != 0 && log[i] != 9 {
					log[i] ^= 0x55
				}
			}
			save(t, r.region, saved)
		}, block.ErrCorrupt, "operation log", "of pool p: operation log"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t, 1, testSize)
			r.mustOpen()
			v := r.volume("v", 1<<20)
			if err := write(v, 0, pattern(9)); err != nil {
				t.Fatal(err)
			}
			r.die()
			saved, err := os.ReadFile(r.region)
			if err != nil {
				t.Fatal(err)
			}
			test.spoil(t, r, slices.Clone(saved))
			if test.looked == "" {
				_, err := r.look()
				says(t, "look", err, test.kind, test.opened)
			} else {
				r.lookFinds(test.looked)
			}
			if err := r.open(); err == nil {
				r.stop()
				t.Fatal("opened")
			} else {
				says(t, "open", err, test.kind, test.opened)
			}
			r.reopen()
			save(t, r.region, saved)
			if err := os.Chmod(r.region, 0o600); err != nil {
				t.Fatal(err)
			}
			r.mustLook()
			r.mustOpen()
			r.holds(map[int64]byte{0: 9})
			r.shut()
		})
	}
}

func save(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// logIn returns the operation log within the bytes of a region.
func logIn(t *testing.T, region []byte) []byte {
	t.Helper()
	i := strings.Index(string(region), string(oplog.KindLog))
	if i < 0 || i%block.Size != 0 {
		t.Fatalf("no log at %d", i)
	}
	return region[i : i+int(oplog.SectionSize(testLog))]
}

// The offline check knows that a region was in use after the newest superblock
// that can be read.
func TestLookAtOlderSuperblock(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.mustOpen()
	newest := cp.SuperblockAt(r.machine.Superblock().Generation)
	r.die()
	r.wrap = func(_ int, d hpdi.Device) hpdi.Device {
		f := blocktest.NewFault(d, 1)
		for _, b := range newest {
			f.Add(blocktest.Rule{Op: hpdi.OpRead, Offset: int64(b) * block.Size, Length: block.Size, Err: errMedium})
		}
		return f
	}
	r.lookFinds("the newest that can be read is of epoch 0, but region " + r.region + " was in use in epoch 1")
	r.wrap = nil
	r.mustOpen()
	r.shut()
}

// What a flush has made durable and the device then lost is a problem, and the
// prefix before it can be had by who accepts that.
func TestDamagedFlushLog(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, testSize)
	r.mustOpen()
	v := r.volume("v", 1<<20)
	if err := v.Flush(ctx); err != nil { // a chain begins with a consistency point
		t.Fatal(err)
	}
	var at []int64
	for i := range int64(4) {
		if err := write(v, i*block.Size, pattern(byte(i+1))); err != nil {
			t.Fatal(err)
		}
		before := snapshot(t, r)
		if err := v.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		at = append(at, changed(t, r, before))
	}
	r.cutPower(blocktest.KeepAll, 0)
	r.devs[0].Corrupt(at[1], 1)
	r.lookFinds("flush log")
	r.refused(r.devices(), block.ErrCorrupt, "flush log of pool p")
	r.reopen()
	r.devs[0].Corrupt(at[1], 1)
	r.mustLook()
	r.devs[0].Corrupt(at[1], 1)
	r.acceptLoss = true
	r.mustOpen()
	r.holds(map[int64]byte{0: 1, 1: 0, 2: 0, 3: 0})
	r.shut()
}

// snapshot reads the flush log.
func snapshot(t *testing.T, r *rig) []byte {
	t.Helper()
	b := make([]byte, int64(r.label.Layout.FlushBlocks)*block.Size)
	set := devices.NewSet([]hpdi.Device{r.devs[0]})
	if err := set.Do([]*devices.IO{{Op: hpdi.OpRead, At: block.At(0, r.label.Layout.Flush), Vec: [][]byte{b}}}); err != nil {
		t.Fatal(err)
	}
	if err := set.ReleaseQueues(); err != nil {
		t.Error(err)
	}
	return b
}

// changed returns the first byte of the device in the flush log that changed.
func changed(t *testing.T, r *rig, before []byte) int64 {
	t.Helper()
	for i, c := range snapshot(t, r) {
		if c != before[i] {
			return int64(r.label.Layout.Flush)*block.Size + int64(i)
		}
	}
	t.Fatal("the flush has written nothing")
	return 0
}

// A block that was damaged in memory before it was flushed is an error for
// ever, and its neighbours are not.
func TestDamagedPayloadInFlushLog(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, testSize)
	r.mustOpen()
	v := r.volume("v", 1<<20)
	if err := write(v, 0, pattern(1)); err != nil {
		t.Fatal(err)
	}
	if err := v.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	for i := range int64(3) {
		if err := write(v, i*block.Size, pattern(byte(i+5))); err != nil {
			t.Fatal(err)
		}
	}
	rec, err := r.log.Get(r.log.Head() - 1)
	if err != nil {
		t.Fatal(err)
	}
	r.log.Payload(rec.First, 1)[77] ^= 4
	if err := v.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	r.cutPower(blocktest.KeepAll, 0)
	r.lookFinds(fmt.Sprintf("flush log, position %d: payload of block 1 of volume 1 is damaged", rec.Seq))
	r.mustOpen()
	r.holds(map[int64]byte{0: 5, 2: 7})
	if v, err = r.Volume("v"); err != nil {
		t.Fatal(err)
	}
	if err := v.Read(ctx, make([]byte, block.Size), block.Size); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("read of the damaged block: %v", err)
	}
	if err := write(v, block.Size, pattern(8)); err != nil {
		t.Fatal(err)
	}
	if err := r.Commit(ctx); err != nil {
		t.Fatal(err) // the damaged version was overwritten and leaves the log
	}
	r.shut()
}
