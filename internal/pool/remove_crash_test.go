package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/devices"
)

// interrupted is how a removal in a test comes to its sudden end.
type interrupted struct {
	power  bool // of the host, else of the guest
	cancel bool // it is cancelled on its way
	op     int64
}

// The guest dies, or the host loses power, at each write and sync of a removal, while a
// client writes. The pool opens with the device or without it, has lost nothing, and
// the removal goes on, or was cancelled, to the same end. At one operation in five, all
// with POLLUX_SOAK=1; with the race detector some must do, see few.
func TestRemoveInterrupted(t *testing.T) {
	long(t)
	step := int64(5)
	switch {
	case soak:
		step = 1
	case testing.Short() || raced:
		step = 31
	}
	for _, x := range []interrupted{{power: true}, {}, {power: true, cancel: true}} {
		ops := int64(0)
		for done := false; !done; {
			x.op = ops + 1
			t.Run(fmt.Sprintf("power=%v,cancel=%v,op=%d", x.power, x.cancel, x.op), func(t *testing.T) {
				done = !interruptRemoval(t, x)
			})
			if ops += step; ops > 5000 {
				t.Fatal("the removal never came to its end")
			}
		}
		t.Logf("%+v: %d operations", x, ops)
	}
}

// tracked knows what a client was promised.
type tracked struct {
	v     block.Volume
	holds map[int64]byte // acknowledged, and durable if the power may go
	maybe map[int64]byte // written without an answer
}

// put writes a block, and flushes it where the power may go.
func (c *tracked) put(b int64, content byte, flush bool) error {
	c.maybe[b] = content
	err := write(c.v, b*block.Size, pattern(content))
	if err == nil && flush {
		err = c.v.Flush(context.Background())
	}
	if err == nil {
		c.holds[b] = content
		delete(c.maybe, b)
	}
	return err
}

// verify reads everything back.
func (c *tracked) verify(t *testing.T) {
	t.Helper()
	for b, want := range c.holds {
		got := make([]byte, block.Size)
		if err := c.v.Read(context.Background(), got, b*block.Size); err != nil {
			t.Errorf("block %d: %v", b, err)
			continue
		}
		if other, ok := c.maybe[b]; ok && got[0] == other {
			want = other
		}
		if string(got) != string(pattern(want)) {
			t.Errorf("block %d holds %d instead of %d", b, got[0], want)
		}
	}
}

// interruptRemoval reports whether the removal got as far as operation x.op.
func interruptRemoval(t *testing.T, x interrupted) (cut bool) {
	ctx := context.Background()
	r := newRig(t, 3, smallest)
	r.mustOpen()
	c := &tracked{r.volume("v", 1<<30), map[int64]byte{}, map[int64]byte{}}
	var gaps int64 = 1
	for i := range int64(120) {
		b := i
		if i >= 60 { // far apart, so that upper pages of the map are on all devices
			b = gaps
			gaps += 3001
		}
		if err := c.put(b, byte(i)|1, false); err != nil {
			t.Fatal(err)
		}
		if i%40 == 39 {
			if err := r.Fold(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := r.Fold(ctx); err != nil {
		t.Fatal(err)
	}
	if r.on(1) < 20 {
		t.Fatalf("only %d blocks are on the device", r.on(1))
	}
	r.clock.CutAfter(r.clock.Ops() + x.op)
	off := func() bool { return r.clock.IsOff() }
	fatal := func(err error) {
		t.Helper()
		if err != nil && !off() {
			t.Fatal(err)
		}
	}
	err := r.RemoveDevice(ctx, "disk1")
	fatal(err)
	began := err == nil
	for n := 0; began && r.removing() && !off(); n++ {
		fatal(r.removalStep())
		if n%3 == 0 && !off() {
			fatal(c.put(int64(n%60), byte(100+n)|1, x.power))
		}
		if x.cancel && n == 12 && !off() {
			fatal(r.CancelRemoval(ctx))
			break
		}
	}
	if cut = off(); x.power {
		r.cutPower(blocktest.CutRandom, uint64(x.op))
	} else {
		r.cutPower(blocktest.KeepAll, 0)
		r.boot-- // the host, and so the region, live
	}
	here := true
	whole := devices.NewSet([]hpdi.Device{r.devs[0]})
	copies, err := cp.InspectSuperblocks(whole, r.label.Pool)
	if err = errors.Join(err, whole.ReleaseQueues()); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadLabel(r.devs[1]); err != nil {
		if !Wiped(err) {
			t.Fatal(err)
		}
		here = false
		// Whichever of its copies is lost now, the pool does not want the device.
		for _, c := range copies {
			if c.Superblock != nil && c.Superblock.Devices[1].State != cp.DeviceGone {
				t.Errorf("the label is gone, and the superblock at %v has the device", c.At)
			}
		}
		r.devs = slices.Delete(r.devs, 1, 2) // as the guest does
	}
	look, err := OpenView(ViewOptions{Devices: r.devices(), RegionPath: r.region, BootID: fmt.Sprint(r.boot)})
	if err != nil {
		t.Fatalf("view, label %v: %v", here, err)
	}
	if err := look.Close(); err != nil {
		t.Error(err)
	}
	r.reopenDevices()
	removed := false
	r.removal.Removed = func(d hpdi.Device) { removed = true; _ = d.Close() }
	if err := r.open(); err != nil {
		t.Fatalf("label %v: %v", here, err)
	}
	if c.v, err = r.Volume("v"); err != nil {
		t.Fatal(err)
	}
	c.verify(t)
	r.mustCheck()
	switch {
	case !cut && !x.cancel && here:
		t.Error("the removal went well, and the device has its label still")
	case !cut && x.cancel && (r.removing() || !r.set.Has(1)):
		t.Error("the removal was cancelled, and goes on")
	case !here && r.set.Has(1):
		t.Error("the label is gone, and the device is a member")
	}
	// To the end, as whoever took over does.
	goesOn := r.removing()
	if !goesOn && here {
		if err := r.RemoveDevice(ctx, "disk1"); err != nil {
			t.Fatal(err)
		}
	}
	r.removeRest()
	if removed != here {
		t.Errorf("label %v, removed %v", here, removed)
	}
	c.verify(t)
	r.mustCheck()
	if here {
		r.devs = slices.Delete(r.devs, 1, 2)
	}
	if x.op%2 == 0 {
		r.die()
	} else {
		fatal(c.v.Flush(ctx))
		r.cutPower(blocktest.CutRandom, 3)
	}
	r.mustOpen()
	if c.v, err = r.Volume("v"); err != nil {
		t.Fatal(err)
	}
	c.verify(t)
	r.shut()
	return cut
}
