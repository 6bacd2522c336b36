package pool

import (
	"context"
	"fmt"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/catalogue"
)

// A consistency point of many blocks is written in several batches. Whichever
// of its writes fails, it is made again, wholly.
func TestLargeCommitFails(t *testing.T) {
	long(t)
	ctx := context.Background()
	r := newBareRig(t, 1, testSize)
	if _, err := Create(ctx, CreateOptions{Name: "p", Identity: "a", Devices: r.devices(), LogBytes: 16 << 20}); err != nil {
		t.Fatal(err)
	}
	f := r.faulty()
	r.mustOpen()
	v := r.volume("v", 64<<20)
	holds := map[int64]byte{}
	for skip, hit := 0, true; hit; skip += oneIn(4) {
		for i := range int64(3000) {
			holds[i] = byte(1 + (int(i)+skip)%250)
			if err := write(v, i*block.Size, pattern(holds[i])); err != nil {
				t.Fatal(err)
			}
		}
		before := r.machine.CP()
		f[0].Add(blocktest.Rule{Op: hpdi.OpWrite, Offset: int64(r.label.Layout.First) * block.Size, Skip: skip, Count: 1, Err: errMedium})
		err := r.Commit(ctx)
		if hit = f[0].Hits() > 0; hit {
			says(t, fmt.Sprint("write ", skip), err, errMedium, fmt.Sprintf("consistency point %d", before+1), "disk0")
			if r.machine.CP() != before {
				t.Fatal("the point was made")
			}
		}
		f[0].Clear()
		if err := r.Commit(ctx); err != nil {
			t.Fatal(err)
		}
		if skip%5 == 0 {
			if err := r.Fold(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	verifyBlocks(t, v, holds)
	r.mustCheck()
	before := r.machine.CP()
	if err := r.do(ctx, func() error { return r.machine.Commit(nil) }); err != nil || r.machine.CP() != before {
		t.Errorf("with nothing to commit: %v, point %d after %d", err, r.machine.CP(), before)
	}
	r.wrap = nil
	r.die()
	r.mustOpen()
	r.holds(holds)
	r.shut()
}

// Metadata pages that cannot be read keep a fold from being made and nothing
// else; each is named by the tree that it belongs to, and when it can be read
// again the fold is made.
func TestFoldCannotRead(t *testing.T) {
	ctx := context.Background()
	for _, of := range []string{"map", "counts", "catalogue"} {
		t.Run(of, func(t *testing.T) {
			r, _ := filled(t, 300)
			r.die()
			f := r.faulty()
			r.mustOpen()
			if err := r.do(ctx, func() error { return nil }); err != nil { // loads the counts
				t.Fatal(err)
			}
			v, err := r.Volume("v")
			if err != nil {
				t.Fatal(err)
			}
			holds := map[int64]byte{299: 50, 7: 200, 9000: 201}
			for b, c := range holds {
				if err := write(v, b*block.Size, pattern(c)); err != nil && b != 299 {
					t.Fatal(err)
				}
			}
			if err := r.Commit(ctx); err != nil {
				t.Fatal(err)
			}
			sb := r.machine.Superblock()
			root := map[string]block.Pointer{"map": r.bmap.Trees()[1].Root, "counts": sb.Devices[0].Counts, "catalogue": sb.Catalogue}[of]
			unreadable(f[0], hpdi.OpRead, root)
			r.forget()
			for range 2 {
				says(t, of, r.Fold(ctx), errMedium, "fold 2", root.Phys.String())
				r.forget()
			}
			if err := write(v, 5*block.Size, pattern(77)); err != nil {
				t.Error(err)
			}
			holds[5] = 77
			if err := r.Commit(ctx); err != nil {
				t.Error(err)
			}
			f[0].Clear()
			if err := r.Fold(ctx); err != nil {
				t.Fatal(err)
			}
			verifyBlocks(t, v, holds)
			r.wrap = nil
			r.die()
			r.mustOpen()
			r.holds(holds)
			r.shut()
		})
	}
}

// A pool of as many volumes as there may be opens again with all of them, and
// says that it takes no more.
func TestTooManyVolumes(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, testSize)
	r.mustOpen()
	err := r.do(ctx, func() error {
		for n := 0; n < catalogue.MaxVolumes; n += 1024 {
			var changes []catalogue.Change
			for i := range 1024 {
				id := r.catalogue.NextID() + block.VolumeID(i)
				changes = append(changes, catalogue.Change{Put: &catalogue.Volume{ID: id, Name: fmt.Sprint("v", n+i), Size: 1 << 20}})
			}
			if err := r.commit(changes); err != nil {
				return err
			}
		}
		r.refreshVolumes()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.CreateVolume(ctx, "one more", 1)
	says(t, "one more", err, block.ErrInvalid, "pool p has 4096 volumes")
	if err := r.Fold(ctx); err != nil {
		t.Fatal(err)
	}
	r.die()
	r.mustOpen()
	if n := len(r.catalogue.List()); n != catalogue.MaxVolumes {
		t.Errorf("%d volumes", n)
	}
	if err := r.DeleteVolume(ctx, "v17"); err != nil {
		t.Fatal(err)
	}
	// A volume that is deleted counts until a fold has freed it.
	if err := r.Fold(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := r.CreateVolume(ctx, "one more", 1); err != nil {
		t.Error(err)
	}
	r.shut()
}

// Each read fails once while a pool is looked at: either the check cannot be
// made, or it says what could not be read, or it has read it again.
func TestLookFails(t *testing.T) {
	for _, power := range []bool{false, true} {
		r, _ := written(t)
		want := 1 // the journal
		if power {
			want = 2 // what is behind its end, too
			r.cutPower(blocktest.KeepAll, 0)
		} else {
			r.die()
		}
		failed := 0
		for skip, hit := 0, true; hit; skip++ {
			f := blocktest.NewFault(r.devs[0], 1)
			f.Add(blocktest.Rule{Op: hpdi.OpRead, Skip: skip, Count: 1, Err: errMedium})
			// look puts its own devices on top.
			r.wrap = func(_ int, d hpdi.Device) hpdi.Device { return f }
			report, err := r.look()
			hit = f.Hits() > 0
			if err != nil {
				says(t, fmt.Sprint("read ", skip), err, errMedium)
				failed++
			} else if report.DataBlocks != 3 {
				t.Errorf("read %d: %+v", skip, report)
			}
			r.wrap = nil
		}
		if failed < want {
			t.Errorf("power %v: only %d checks could not be made", power, failed)
		}
		r.mustLook()
		r.mustOpen()
		r.holds(writtenBlocks)
		r.shut()
	}
}
