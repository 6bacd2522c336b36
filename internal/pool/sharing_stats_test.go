package pool

import (
	"context"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/dedup"
)

// figures returns what the pool tells of its sharing, which must agree with a recount.
func (r *rig) figures(when string) Sharing {
	r.t.Helper()
	s, err := r.Sharing(context.Background())
	if err != nil {
		r.t.Fatalf("%s: %v", when, err)
	}
	c, err := r.Check(context.Background(), CheckOptions{})
	if err != nil || len(c.Problems) > 0 {
		r.t.Fatalf("%s: %v, %v", when, err, c.Problems)
	}
	if s.Refers != c.DataBlocks*block.Size || s.Metadata != c.Pages*block.Size || s.Stored+s.Saved != s.Refers {
		r.t.Errorf("%s: %d blocks refer and %d are metadata by a recount, not %+v", when, c.DataBlocks, c.Pages, s)
	}
	var blocks, references int64
	for n, k := range s.References[1:] {
		blocks += k
		references += k * int64(n+1)
	}
	if blocks*block.Size != s.Stored+s.Metadata || (references-blocks)*block.Size != s.Saved {
		r.t.Errorf("%s: %d blocks have %d references: %+v", when, blocks, references, s)
	}
	return s
}

// What is told of sharing agrees with a recount at every moment, whatever is overwritten,
// trimmed, deleted and folded, and counters begin anew when the pool is opened.
func TestSharingFigures(t *testing.T) {
	r, v := sharingRig(t, 8)
	ctx := context.Background()
	w := r.sharingVolume("w", 64<<20, 8)
	if s := r.figures("empty"); s.Refers != 0 || s.Index == nil || s.Index.Bytes == 0 || s.Index.Slots == 0 || s.Index.Every != 1 {
		t.Errorf("%+v", s)
	}
	data := content(1, 300)
	r.put(v, 0, data)
	r.put(w, 500, data)
	const kept, all = 300 * block.Size, 600 * block.Size
	s := r.figures("shared")
	if s.Refers != all || s.Saved != kept || s.References[2] != 300 {
		t.Errorf("%+v", s)
	}
	want := SharingCounts{Written: 300, Shared: 300, Saved: kept, IndexBytes: s.Index.Bytes, IndexEntries: 300, IndexKept: 2 << 20}
	if s.SharingCounts != want || s.Index.Entries != 300 {
		t.Errorf("%+v instead of %+v", s.SharingCounts, want)
	}
	if len(s.Volumes) != 2 || s.Volumes[0].VolumeStats != (cp.VolumeStats{Blocks: 300}) || s.Volumes[1].VolumeStats != (cp.VolumeStats{Shared: 300}) {
		t.Errorf("%+v", s.Volumes)
	}
	r.fold()
	if s = r.figures("folded"); s.Refers != all || s.Saved != kept || s.Volumes[1].Used != kept {
		t.Errorf("%+v", s)
	}

	// Zeroes become holes, and what they replace is referred to until a fold frees it.
	if written, _ := r.put(w, 500, make([]byte, 100*block.Size)); written != 0 {
		t.Errorf("%d blocks of zeroes were written", written)
	}
	if s = r.figures("zeroes"); s.Zeros != 100 || s.Volumes[1].Zeros != 100 || s.Volumes[0].Zeros != 0 || s.Refers != all {
		t.Errorf("%+v", s)
	}
	if err := w.Trim(ctx, 600*block.Size, 50*block.Size, block.Tag{}); err != nil {
		t.Fatal(err)
	}
	r.put(w, 700, content(2, 20))
	for step := 0; ; step++ {
		done := false
		if err := r.do(ctx, func() (err error) {
			done, err = r.machine.Fold()
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if s, err := r.Sharing(ctx); err != nil || s.Stored+s.Saved != s.Refers || s.Refers < all-170*block.Size || s.Refers > all+20*block.Size || s.Metadata <= 0 {
			t.Errorf("step %d: %+v, %v", step, s, err)
		}
		if done {
			break
		}
	}
	if s = r.figures("overwritten"); s.Refers != all-150*block.Size || s.Saved != kept-170*block.Size || s.Zeros != 100 {
		t.Errorf("%+v", s)
	}

	r.die()
	r.mustOpen()
	if s = r.figures("opened"); s.Saved != kept-170*block.Size || s.SharingCounts.Shared != 0 || s.Zeros != 0 || s.Index.Done != 0 || s.Index.Pages != 1 {
		t.Errorf("%+v", s)
	}
	if st := r.Stats().Sharing; st.IndexEntries != 320 || st.IndexBytes == 0 || st.IndexOwn != 0 || !s.Index.Kept {
		t.Errorf("%+v", st)
	}
	if err := r.IndexAll(ctx); err != nil {
		t.Fatal(err)
	}
	if s = r.figures("indexed"); s.Index.Entries != 320 || s.Index.Done != 1 || s.IndexEntries != 320 {
		t.Errorf("%+v", s.Index)
	}
	if err := r.DeleteVolume(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	r.fold()
	if s = r.figures("deleted"); s.Saved != 0 || s.Stored != 150*block.Size || len(s.Volumes) != 1 {
		t.Errorf("%+v", s)
	}
	r.shut()
}

// A pool in which nothing was ever shared has no index, and the rest of the figures.
func TestSharingFiguresWithoutSharing(t *testing.T) {
	r := newRig(t, 2, testSize)
	r.mustOpen()
	v := r.volume("v", 16<<20)
	r.put(v, 0, content(1, 50))
	r.put(v, 100, content(1, 50))
	if s := r.figures("written"); s.Index != nil || s.Saved != 0 || s.Written != 100 || s.Refers != 100*block.Size || s.IndexBytes != 0 {
		t.Errorf("%+v", s)
	}
	r.shut()
}

// What a fingerprint only seemed to say is counted; what cannot be read to be compared
// is not, for it may be the same.
func TestSharingCountsUnequal(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.fingerprint = func(data []byte) dedup.Fingerprint { return dedup.Fingerprint(1 + data[0]%2) }
	r.mustOpen()
	v := r.sharingVolume("v", 16<<20, 2)
	r.put(v, 0, make16(1))
	r.put(v, 100, make16(3))
	if n := r.Stats().Sharing.Unequal; n == 0 {
		t.Error("no series was unequal")
	}
	r.shut()

	r = newRigWithLog(t, 1, testSize, 16<<20)
	faults := r.faulty()
	r.mustOpen()
	data := content(1, 100)
	r.put(r.sharingVolume("v", 16<<20, 8), 0, data)
	r.fold()
	r.die()
	r.mustOpen()
	if err := r.IndexAll(context.Background()); err != nil {
		t.Fatal(err)
	}
	v, err := r.Volume("v")
	if err != nil {
		t.Fatal(err)
	}
	faults[0].Add(blocktest.Rule{Op: hpdi.OpRead, Err: errMedium})
	written, shared := r.put(v, 1000, data)
	if written != 100 || shared != 0 || faults[0].Hits() == 0 {
		t.Errorf("%d blocks are written and %d shared after %d errors", written, shared, faults[0].Hits())
	}
	if n := r.Stats().Sharing.Unequal; n != 0 {
		t.Errorf("%d series were unequal that could not be read", n)
	}
	faults[0].Clear()
	r.expect(v, 1000, data)
	r.shut()
}

// make16 returns 16 blocks that all begin with a byte.
func make16(first byte) []byte {
	data := content(uint64(first), 16)
	for i := 0; i < len(data); i += block.Size {
		data[i] = first
	}
	return data
}
