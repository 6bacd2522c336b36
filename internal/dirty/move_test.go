package dirty

import (
	"errors"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/oplog"
)

// Only what nobody has changed since it was read is moved.
func TestMove(t *testing.T) {
	r := newRig(t, 64)
	asOf := r.Drops()
	_, recs := r.stage(1, 10, 8, 100)
	r.write(1, 11, 1, 1) // in the active generation
	r.write(1, 13, 1, 2) // in a frozen one
	if r.Freeze() == nil {
		t.Fatal("nothing was dirty")
	}
	r.zero(1, 15, 1)
	r.zero(1, 40, 100)
	r.write(1, 11, 1, 3)
	n, err := r.Move(recs, asOf, false)
	if err != nil || n != 5 {
		t.Fatalf("%d of 5 blocks moved: %v", n, err)
	}
	var rest []oplog.Extent
	for _, rec := range recs[n:] {
		if rec.LBA != 11 && rec.LBA != 13 && rec.LBA != 15 {
			t.Errorf("block %d was not moved", rec.LBA)
		}
		rest = append(rest, rec.First)
	}
	r.Give(rest)
	want := map[int]uint64{0: 100, 1: 3, 2: 102, 3: 2, 4: 104, 6: 106, 7: 107}
	found := r.Read(1, 10, 8, func(i int, p []byte, _ uint32) {
		if i == 5 && p == nil {
			return
		}
		if p == nil || number(p) != want[i] {
			t.Errorf("block %d is not what it must be", 10+i)
		}
	})
	if found != 8 {
		t.Errorf("%d of 8 blocks are dirty", found)
	}

	// A whole hole that a range covers, and a consistency point in between.
	ext, recs := r.stage(1, 50, 1, 7)
	if n, err := r.Move(recs, r.Drops(), false); n != 0 || err != nil {
		t.Errorf("a trimmed block was moved: %d, %v", n, err)
	}
	r.Give(ext)
	asOf = r.Drops()
	ext, recs = r.stage(1, 300, 1, 8)
	r.Drop()
	if n, err := r.Move(recs, asOf, false); n != 0 || err != nil {
		t.Errorf("moved although a consistency point came between: %d, %v", n, err)
	}
	r.lost = block.ErrStale
	if n, err := r.Move(recs, r.Drops(), false); n != 0 || !errors.Is(err, block.ErrStale) {
		t.Errorf("moved in a pool of somebody else: %d, %v", n, err)
	}
	r.lost = nil
	r.Give(ext)
	for r.Freeze() != nil {
		r.Drop()
	}
	if used := r.used.Load(); used != 0 {
		t.Errorf("%d permits are not given back", used)
	}
}
