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
)

// The guest dies, or the host loses power, at each device operation of
// AddDevice. The pool opens with the devices that have a label, loses nothing,
// and the addition can be repeated.
func TestAddDeviceInterrupted(t *testing.T) {
	long(t)
	for _, power := range []bool{false, true} {
		done := false
		for op := int64(1); !done; op += int64(oneIn(4)) {
			t.Run(fmt.Sprintf("power=%v,op=%d", power, op), func(t *testing.T) {
				done = !interruptAddition(t, power, op)
			})
			if op > 100 {
				t.Fatal("AddDevice never came to its end")
			}
		}
	}
}

// interruptAddition reports whether the addition got as far as operation op.
func interruptAddition(t *testing.T, power bool, op int64) (interrupted bool) {
	ctx := context.Background()
	r := newRig(t, 1, smallest)
	r.mustOpen()
	v := r.volume("v", 1<<30)
	holds := map[int64]byte{3: 7, 900: 9}
	for b, x := range holds {
		if err := write(v, b*block.Size, pattern(x)); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Pool.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	added := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "added", Size: 8 << 20, Seed: 5, Clock: r.clock, Direct: true})
	r.clock.CutAfter(r.clock.Ops() + op)
	err := r.AddDevice(ctx, added)
	select {
	case <-r.clock.Off():
		interrupted = true
	default:
		if err != nil {
			t.Fatal(err)
		}
	}
	r.devs = append(r.devs, added)
	if power {
		r.cutPower(blocktest.CutRandom, uint64(op))
	} else {
		r.cutPower(blocktest.KeepAll, 0)
		r.boot-- // the host, and so the region, live
	}
	added = r.devs[1]
	if _, err := ReadLabel(added); err != nil {
		r.devs = r.devs[:1] // as the guest does
	}

	look, err := OpenView(ViewOptions{Devices: r.devices(), RegionPath: r.region, BootID: fmt.Sprint(r.boot)})
	if err != nil {
		t.Fatalf("view: %v", err)
	}
	named := look.p.set.Len() == 2
	if err := look.Close(); err != nil {
		t.Error(err)
	}
	r.reopenDevices()
	if !interrupted && !named {
		t.Error("the addition went well, and the device is no part of the pool")
	}

	var left []hpdi.Device
	o := r.options()
	o.LeftOut = func(d hpdi.Device) { left = append(left, d) }
	if err := r.openWith(o); err != nil {
		t.Fatalf("named=%v: %v", named, err)
	}
	if got := r.set.Len() == 2; got != named {
		t.Errorf("%d devices are open, named=%v", r.set.Len(), named)
	}
	if want := len(r.devs) == 2 && !named; want != (len(left) == 1) {
		t.Errorf("left out: %d devices, named=%v", len(left), named)
	}
	v, err = r.Volume("v")
	if err != nil {
		t.Fatal(err)
	}
	verifyBlocks(t, v, holds)
	r.mustCheck()
	if !named {
		added = added.Reopen()
		if err := r.AddDevice(ctx, added); err != nil {
			t.Fatalf("again: %v", err)
		}
		r.devs = append(r.devs[:1:1], added)
	}
	for b := range int64(600) {
		if b%100 == 0 {
			if err := r.Pool.Commit(ctx); err != nil {
				t.Fatal(err)
			}
		}
		if err := write(v, b*block.Size, pattern(byte(b)|1)); err != nil {
			t.Fatal(err)
		}
		holds[b] = byte(b) | 1
	}
	r.die()
	slices.Reverse(r.devs) // the order does not matter
	r.mustOpen()
	for _, d := range r.devs {
		if l, err := ReadLabel(d); err != nil || l.Joining {
			t.Errorf("label of %s: joining %v, %v", d.Info().Name, l.Joining, err)
		}
	}
	if v, err = r.Volume("v"); err != nil {
		t.Fatal(err)
	}
	verifyBlocks(t, v, holds)
	r.shut()
	return interrupted
}

// A member is never left out: that its superblock does not name it means that
// the superblock is an old one.
func TestMemberIsNotLeftOut(t *testing.T) {
	r := newRig(t, 1, smallest)
	r.mustOpen()
	r.die()
	l, err := ReadLabel(r.devs[0])
	if err != nil {
		t.Fatal(err)
	}
	other := blocktest.NewCrash(smallest, 3)
	l.Index, l.Device[0] = 1, l.Device[0]+1
	for _, joining := range []bool{true, false} {
		l.Joining = joining
		if err := writeLabel(other, l); err != nil {
			t.Fatal(err)
		}
		_, err := OpenView(ViewOptions{Devices: []hpdi.Device{r.devs[0], other}})
		if joining && err != nil || !joining && !errors.Is(err, block.ErrInvalid) {
			t.Errorf("joining %v: %v", joining, err)
		}
		r.devs[0], other = r.devs[0].Reopen(), other.Reopen()
	}
}
