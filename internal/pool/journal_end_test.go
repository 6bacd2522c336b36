package pool

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/cp"
)

// journalRead returns how many bytes of its journal a pool reads when it is opened.
func (r *rig) journalRead() (bytes int64, err error) {
	r.t.Helper()
	l, err := ReadLabel(r.devs[0])
	if err != nil {
		r.t.Fatal(err)
	}
	r.reopenDevices()
	trace := r.traced()
	err = r.open()
	r.wrap = nil
	for _, line := range linesOf(trace, 0) {
		var at, n int64
		if k, _ := fmt.Sscanf(line, "read %d+%d", &at, &n); k == 2 && at/block.Size >= int64(l.Layout.Journal) && at/block.Size < int64(l.Layout.Journal+l.Layout.JournalBlocks) {
			bytes += n
		}
	}
	return bytes, err
}

// closedRig returns a rig whose pool was used and closed.
func closedRig(t *testing.T) *rig {
	t.Helper()
	r := newRig(t, 1, testSize)
	r.byRecord = false
	r.mustOpen()
	v := r.volume("v", 16<<20)
	for n := range int64(3) {
		if err := write(v, n*block.Size, pattern(byte(n+1))); err != nil {
			t.Fatal(err)
		}
		if err := r.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	r.shut()
	r.reopen()
	return r
}

// Opening a pool that was closed reads the beginning of its journal, and the whole of it where
// something may be missing.
func TestJournalEnd(t *testing.T) {
	r := closedRig(t)
	size := int64(0)
	if l, err := ReadLabel(r.devs[0]); err == nil {
		size = int64(l.Layout.JournalBlocks) * block.Size
	}
	r.reopenDevices()
	least := min(size/4, 512<<10) // what looking for a next record reads
	if n, err := r.journalRead(); err != nil || n > least {
		t.Errorf("after it was closed %d of %d bytes are read, %v", n, size, err)
	}
	r.shut()
	r.reopen()
	// One place of the other slot is bad: nobody knows what it was.
	bad := cp.SuperblockAt(r.slotBefore())[1]
	r.devs[0].Corrupt(int64(bad)*block.Size+100, 0xff)
	if n, err := r.journalRead(); err != nil || n < size {
		t.Errorf("with a superblock less %d of %d bytes are read, %v", n, size, err)
	}
	r.shut()
	r.reopen()
	r.mustOpen()
	if err := r.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.cutPower(blocktest.DropAll, 1)
	if n, err := r.journalRead(); err != nil || n < size {
		t.Errorf("after a power cut %d of %d bytes are read, %v", n, size, err)
	}
	r.shut()
}

// slotBefore returns the generation of the superblock before the newest.
func (r *rig) slotBefore() uint64 {
	r.t.Helper()
	v, err := OpenView(ViewOptions{Devices: r.devices()})
	if err != nil {
		r.t.Fatal(err)
	}
	g := v.p.machine.Superblock().Generation
	if err := v.Close(); err != nil {
		r.t.Fatal(err)
	}
	r.reopenDevices()
	return g - 1
}

// The superblock of whoever opened a closed pool is lost, and with it the first of the records
// that follow: that others exist is found out.
func TestJournalEndLost(t *testing.T) {
	for _, places := range []int{1, 2} {
		r := closedRig(t)
		before := r.slotBefore() + 1 // that of the pool that was closed
		r.mustOpen()
		generation := r.machine.Superblock().Generation
		if generation != before+1 {
			t.Fatalf("superblock %d follows %d", generation, before)
		}
		journal := func() []byte {
			return bytesOf(t, r.devs[0])[r.label.Layout.Journal*block.Size:][:r.label.Layout.JournalBlocks*block.Size]
		}
		was := journal()
		v, _ := r.Volume("v")
		for n := range int64(3) {
			if err := write(v, n*block.Size, pattern(byte(n+100))); err != nil {
				t.Fatal(err)
			}
			if err := r.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		r.cutPower(blocktest.KeepAll, 1)
		if err := os.Remove(r.region); err != nil {
			t.Fatal(err)
		}
		lost := cp.SuperblockAt(generation)
		for _, b := range lost[:places] {
			r.devs[0].Corrupt(int64(b)*block.Size+100, 0xff)
		}
		if places == 2 {
			now := journal()
			at := 0
			for now[at] == was[at] {
				at++
			}
			r.devs[0].Corrupt(int64(r.label.Layout.Journal)*block.Size+int64(at)+100, 0xff)
		}
		err := r.open()
		if places == 1 && err != nil {
			t.Fatal(err)
		}
		if places == 2 && (!errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "journal record")) {
			t.Errorf("records are lost: %v", err)
		}
		if err == nil {
			v, _ := r.Volume("v")
			verifyBlocks(t, v, map[int64]byte{0: 100, 1: 101, 2: 102})
			r.shut()
		}
	}
}
