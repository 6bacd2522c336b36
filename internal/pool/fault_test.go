package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// attempt does something that a broken device may keep from succeeding. It
// reopens a pool that says that it must be.
func attempt(r *rig, what func() error) {
	r.t.Helper()
	if err := what(); err != nil && !errors.Is(err, errMedium) {
		r.t.Fatalf("failed for another reason than the device: %v", err)
	}
}

// Every single write or sync of a consistency point and of a fold fails once,
// on devices that may have carried it out all the same. Nothing is lost, with
// or without opening the pool again, and the next attempt succeeds. So it is where
// blocks are shared.
func TestEveryDeviceErrorOnce(t *testing.T) {
	long(t)
	for _, run := range []int{0, 1} {
		for _, op := range []hpdi.Op{hpdi.OpWrite, hpdi.OpFlush, hpdi.OpRead} {
			for _, late := range []bool{false, true} {
				if late && op == hpdi.OpRead {
					continue
				}
				t.Run(fmt.Sprint(op, " late ", late, " sharing ", run), func(t *testing.T) {
					misses := 0       // in a row: both devices are through
					step := 7 + 8*run // odd, so that the devices take turns
					switch {
					case soak:
						step = 1
					case raced:
						step *= 5
					}
					for skip := 0; misses < 2 && !t.Failed(); skip += step {
						if misses++; deviceError(t, op, late, skip, run) {
							misses = 0
						}
					}
				})
			}
		}
	}
}

// deviceError lets one operation fail and returns false when there were not
// so many. The volume shares runs of blocks, or none.
func deviceError(t *testing.T, op hpdi.Op, late bool, skip, run int) bool {
	ctx := context.Background()
	r := newRig(t, 2, testSize)
	faults := r.faulty()
	r.mustOpen()
	v := r.volume("v", 1<<30)
	if err := r.SetSharing(ctx, "v", run); err != nil {
		t.Fatal(err)
	}
	holds := map[int64]byte{}
	put := func(b int64, c byte) error {
		// Part of a block: its rest may have to be read.
		if err := write(v, b*block.Size+100, pattern(c)[:2000]); err != nil {
			return err
		}
		holds[b] = c
		return nil
	}
	for b := range int64(40) {
		if err := put(b*300, 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Fold(ctx); err != nil {
		t.Fatal(err)
	}
	r.forget()
	fault := faults[skip%2]
	fault.Add(blocktest.Rule{Op: op, Skip: skip / 2, Count: 1, Err: errMedium, Late: late})
	for i := range int64(3) {
		for b := range int64(20) {
			b := b
			attempt(r, func() error { return put(b*600+i*50*(b%3), byte(2+i)) })
		}
		attempt(r, func() error { return v.Flush(ctx) })
		attempt(r, func() error { return r.Pool.Commit(ctx) })
		attempt(r, func() error { return v.Trim(ctx, 0, 1<<20, block.Tag{}) })
		for b := range int64(256) {
			delete(holds, b)
		}
		attempt(r, func() error { return r.Fold(ctx) })
	}
	hit := fault.Hits() > 0
	fault.Clear()
	verify := func(when string) {
		t.Helper()
		got := make([]byte, block.Size)
		for b, c := range holds {
			if err := v.Read(ctx, got, b*block.Size); err != nil || !bytes.Equal(got[100:2100], pattern(c)[:2000]) {
				t.Fatalf("operation %d, %s: block %d: %v, %d instead of %d", skip, when, b, err, got[100], c)
			}
		}
	}
	verify("before healing")
	if err := r.do(ctx, func() error { return r.machine.Broken() }); err == nil {
		if err := r.Fold(ctx); err != nil {
			t.Fatalf("operation %d: the device is well again: %v", skip, err)
		}
		r.mustCheck()
		verify("after healing")
	}
	r.die()
	r.mustOpen()
	v, _ = r.Volume("v")
	verify("reopened")
	if err := r.Fold(ctx); err != nil {
		t.Fatal(err)
	}
	verify("folded")
	r.shut()
	return hit
}

// Devices fail at random, again and again, under a workload that goes on.
func TestFlakyDevices(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			ctx := context.Background()
			rng := rand.New(rand.NewPCG(seed, 5))
			r := newRig(t, 1+int(seed%2), testSize)
			faults := r.faulty()
			r.mustOpen()
			v := r.volume("v", 64<<20)
			holds := map[int64]byte{}
			reopen := func() {
				r.die()
				r.mustOpen()
				v, _ = r.Volume("v")
			}
			for round := range 30 {
				f := faults[rng.IntN(len(faults))]
				op := []hpdi.Op{hpdi.OpWrite, hpdi.OpFlush, hpdi.OpRead}[rng.IntN(3)]
				f.Add(blocktest.Rule{Op: op, Skip: rng.IntN(10), Probability: 0.2, Count: 1 + rng.IntN(4), Err: errMedium, Late: op != hpdi.OpRead && rng.IntN(2) == 0})
				for range 30 {
					b, c := rng.Int64N(64<<20/block.Size), byte(1+rng.IntN(255))
					if err := write(v, b*block.Size, pattern(c)); err != nil {
						t.Fatal(err) // whole blocks need no device
					}
					holds[b] = c
				}
				switch rng.IntN(3) {
				case 0:
					attempt(r, func() error { return v.Flush(ctx) })
				case 1:
					attempt(r, func() error { return r.Pool.Commit(ctx) })
				default:
					attempt(r, func() error { return r.Fold(ctx) })
				}
				f.Clear()
				if err := r.do(ctx, func() error { return r.machine.Broken() }); err != nil {
					reopen()
				}
				if rng.IntN(3) == 0 || r.dirty.Usage().Active+r.dirty.Usage().Frozen > 150 {
					if err := r.Pool.Commit(ctx); err != nil {
						t.Fatalf("round %d: %v", round, err)
					}
				}
			}
			verifyBlocks(t, v, holds)
			r.mustCheck()
			reopen()
			verifyBlocks(t, v, holds)
			r.shut()
		})
	}
}

// A volume whose deletion failed is as usable as before.
func TestFailedDelete(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, testSize)
	faults := r.faulty()
	r.mustOpen()
	v := r.volume("v", 1<<20)
	if err := write(v, 0, pattern(1)); err != nil {
		t.Fatal(err)
	}
	other := r.volume("other", 1<<20)
	if err := write(other, 0, pattern(1)); err != nil {
		t.Fatal(err)
	}
	faults[0].Add(blocktest.Rule{Op: hpdi.OpWrite, Count: 1, Err: errMedium})
	if err := r.DeleteVolume(ctx, "v"); !errors.Is(err, errMedium) {
		t.Fatal(err)
	}
	if err := write(v, 0, pattern(2)); err != nil {
		t.Errorf("after a delete that failed: %v", err)
	}
	if err := r.DeleteVolume(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	if err := write(v, 0, pattern(2)); !errors.Is(err, block.ErrClosed) {
		t.Errorf("write to a deleted volume: %v", err)
	}
	r.shut()
}

// A write of part of a block whose rest was damaged in memory must not seal
// the damage with a new checksum.
func TestDamagedPayloadStaysDamaged(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.mustOpen()
	v := r.volume("v", 1<<20)
	if err := write(v, 0, pattern(1)); err != nil {
		t.Fatal(err)
	}
	rec, err := r.log.Get(r.log.Head())
	if err != nil {
		t.Fatal(err)
	}
	r.log.Payload(rec.First, 1)[7] ^= 1
	if err := write(v, 2000, []byte("x")); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("write beside damage: %v", err)
	}
	if err := v.Read(context.Background(), make([]byte, 1), 0); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("read of damage: %v", err)
	}
	report, err := r.Check(context.Background(), CheckOptions{Data: true})
	if err != nil || len(report.Problems) == 0 {
		t.Errorf("check found nothing: %v", err)
	}
	if err := write(v, 0, pattern(2)); err != nil {
		t.Error(err)
	}
	if err := r.Pool.Commit(context.Background()); err != nil {
		t.Fatal(err) // the damaged version was overwritten and leaves the log
	}
	r.shut()
}
