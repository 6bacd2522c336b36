package pool

import (
	"context"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/cp"
)

// stored returns the newest superblock on the devices.
func (r *rig) stored() *cp.Superblock {
	r.t.Helper()
	sb, err := cp.ReadSuperblock(r.set, r.ID())
	if err != nil {
		r.t.Fatal(err)
	}
	return sb
}

// readOnly fails every write and sync of a device.
func readOnly(f *blocktest.Fault) {
	f.Add(blocktest.Rule{Op: hpdi.OpWrite, Err: errMedium})
	f.Add(blocktest.Rule{Op: hpdi.OpFlush, Err: errMedium})
}

// Who adopts a region serves before it has written anything. Nothing goes to the
// devices before the superblock with the new epoch is durable, and what fails
// meanwhile is tried again.
func TestTakeoverWaitsForNoSync(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 2, testSize)
	r.mustOpen()
	v := r.volume("v", 1<<30)
	if err := write(v, 0, pattern(1)); err != nil {
		t.Fatal(err)
	}
	r.die()
	faults := r.faulty()
	wrap := r.wrap
	r.wrap = func(i int, d hpdi.Device) hpdi.Device {
		d = wrap(i, d)
		readOnly(faults[i])
		return d
	}
	r.mustOpen()
	if r.stored().Epoch >= r.Epoch() {
		t.Fatalf("epoch %d is stored, %d in use", r.stored().Epoch, r.Epoch())
	}
	v, _ = r.Volume("v")
	if err := write(v, block.Size, pattern(2)); err != nil {
		t.Fatal(err)
	}
	verifyBlocks(t, v, map[int64]byte{0: 1, 1: 2})
	says(t, "commit", r.Commit(ctx), errMedium, "superblock")
	says(t, "flush", v.Flush(ctx), errMedium, "superblock")
	says(t, "fold", r.Fold(ctx), errMedium, "superblock")
	for _, f := range faults {
		f.Clear()
	}
	if err := v.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	if r.stored().Epoch != r.Epoch() {
		t.Errorf("epoch %d is stored, %d in use", r.stored().Epoch, r.Epoch())
	}
	r.cutPower(blocktest.DropAll, 1)
	r.wrap = nil
	r.mustOpen()
	v, _ = r.Volume("v")
	verifyBlocks(t, v, map[int64]byte{0: 1, 1: 2})
	r.shut()
}

// Power may go between any takeovers that have written nothing: what was flushed
// before is there.
func TestPowerCutAfterTakeovers(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 2, testSize)
	r.mustOpen()
	v := r.volume("v", 1<<30)
	for seed := range uint64(8) {
		if err := write(v, 0, pattern(byte(seed+1))); err != nil {
			t.Fatal(err)
		}
		if err := v.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		for range seed % 3 {
			r.die()
			r.mustOpen()
		}
		r.cutPower(blocktest.CutRandom, seed)
		r.mustOpen()
		v, _ = r.Volume("v")
		verifyBlocks(t, v, map[int64]byte{0: byte(seed + 1)})
	}
	r.shut()
}

// A region that survives a power cut is not in use before its superblock is.
func TestBatteryClaimsAtOnce(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.battery = true
	r.mustOpen()
	v := r.volume("v", 1<<30)
	if err := write(v, 0, pattern(1)); err != nil {
		t.Fatal(err)
	}
	r.die()
	r.mustOpen()
	if r.stored().Epoch != r.Epoch() {
		t.Errorf("epoch %d is stored, %d in use", r.stored().Epoch, r.Epoch())
	}
	r.cutPower(blocktest.DropAll, 1)
	r.mustOpen()
	v, _ = r.Volume("v")
	verifyBlocks(t, v, map[int64]byte{0: 1})
	r.shut()
}
