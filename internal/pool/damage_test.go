package pool

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/cp"
)

var errMedium = errors.New("medium error")

// A journal that cannot be read must not pass for one that ends there: with
// its last points the log that they released would be lost.
func TestJournalReadError(t *testing.T) {
	for _, power := range []bool{false, true} {
		r := newRig(t, 1, testSize)
		r.mustOpen()
		v := r.volume("v", 1<<20)
		for i := range 3 {
			if err := write(v, int64(i)*8192, pattern(byte(i+1))); err != nil {
				t.Fatal(err)
			}
			// Without a word to the region, as when the guest dies before it.
			if err := r.do(context.Background(), func() error { return r.machine.Commit(nil) }); err != nil {
				t.Fatal(err)
			}
		}
		if power {
			r.cutPower(blocktest.CutRandom, 1)
		} else {
			r.die()
		}
		r.wrap = func(_ int, d hpdi.Device) hpdi.Device {
			f := blocktest.NewFault(d, 1)
			f.Add(blocktest.Rule{Op: hpdi.OpRead, Offset: int64(r.label.Layout.Journal) * block.Size,
				Length: int64(r.label.Layout.JournalBlocks) * block.Size, Err: errMedium})
			return f
		}
		if err := r.open(); !errors.Is(err, errMedium) {
			t.Errorf("power %v: opened with a journal that cannot be read: %v", power, err)
			if err == nil {
				r.stop()
			}
		}
		r.wrap = nil
		r.mustOpen()
		v, _ = r.Volume("v")
		got := make([]byte, block.Size)
		for i := range 3 {
			if err := v.Read(context.Background(), got, int64(i)*8192); err != nil || !bytes.Equal(got, pattern(byte(i+1))) {
				t.Errorf("power %v: block %d: %v %d", power, i, err, got[0])
			}
		}
		r.shut()
	}
}

// When the newest superblock cannot be read, the region, which it alone names,
// must not be taken for one that is of no use.
func TestSuperblockOlderThanRegion(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.mustOpen()
	v := r.volume("v", 1<<20)
	if err := write(v, 0, pattern(1)); err != nil {
		t.Fatal(err)
	}
	newest := cp.SuperblockAt(r.machine.Superblock().Generation)
	r.die()
	faults := r.faulty()
	wrap := r.wrap
	r.wrap = func(i int, d hpdi.Device) hpdi.Device {
		d = wrap(i, d)
		for _, b := range newest {
			faults[i].Add(blocktest.Rule{Op: hpdi.OpRead, Offset: int64(b) * block.Size, Length: block.Size, Err: errMedium})
		}
		return d
	}
	if err := r.open(); err == nil {
		r.stop()
		t.Error("opened with a superblock that does not know the region")
	} else {
		t.Log(err)
	}
	r.wrap = nil
	r.mustOpen()
	v, _ = r.Volume("v")
	got := make([]byte, block.Size)
	if err := v.Read(context.Background(), got, 0); err != nil || !bytes.Equal(got, pattern(1)) {
		t.Errorf("%v, %d", err, got[0])
	}
	r.shut()
}
