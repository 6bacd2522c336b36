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

// The guest dies, or the host loses power, at each write and sync of what flash is to a pool:
// it is added, a volume is pinned there and rewritten, a part of it goes back, all goes back,
// the device leaves. The pool opens with the device or without it, has lost nothing, table
// and data agree, and it goes on. At one operation in five, all with POLLUX_SOAK=1; with the
// race detector some must do, see few.
func TestFlashInterrupted(t *testing.T) {
	long(t)
	step := int64(5)
	switch {
	case soak:
		step = 1
	case testing.Short() || raced:
		step = 61
	}
	for _, power := range []bool{true, false} {
		ops := int64(0)
		for done := false; !done; {
			op := ops + 1
			t.Run(fmt.Sprintf("power=%v,op=%d", power, op), func(t *testing.T) {
				done = !interruptFlash(t, power, op)
			})
			if ops += step; ops > 20_000 {
				t.Fatal("it never came to its end")
			}
		}
		t.Logf("power %v: %d operations", power, ops)
	}
}

// interruptFlash reports whether it got as far as an operation.
func interruptFlash(t *testing.T, power bool, op int64) (cut bool) {
	ctx := context.Background()
	r := newRig(t, 2, smallest)
	r.mustOpen()
	c := &tracked{r.volume("v", 16<<20), map[int64]byte{}, map[int64]byte{}}
	for b := range int64(96) {
		if err := c.put(b, byte(b)|1, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Fold(ctx); err != nil {
		t.Fatal(err)
	}
	r.clock.CutAfter(r.clock.Ops() + op)
	off := func() bool { return r.clock.IsOff() }
	fatal := func(err error) {
		t.Helper()
		if err != nil && !off() {
			t.Fatal(err)
		}
	}
	ssd := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "ssd", Size: 8 << 20, Seed: 78, Clock: r.clock, Direct: true})
	added := r.AddFlash(ctx, ssd, flashSet)
	fatal(added)
	r.devs = append(r.devs, ssd)
	n := 0
	// until steps and writes until ok.
	until := func(ok func(s FlashStats) bool) {
		for ; !off() && !ok(r.Flash()); n++ {
			if n > 3000 {
				t.Fatalf("it never came to that: %+v", r.Flash())
			}
			fatal(r.flashStep())
			if n%4 == 0 && !off() {
				fatal(c.put(int64(n%96), byte(100+n)|1, power))
			}
			if n%32 == 31 && !off() {
				fatal(r.Commit(ctx))
			}
		}
	}
	if added == nil {
		_, err := r.ChangeFlash(ctx, FlashChange{Pin: []FlashPin{{Volume: "v"}}})
		fatal(err)
		until(func(s FlashStats) bool { return len(s.Pins) == 1 && s.Pins[0].On >= 4 })
		if !off() {
			_, err = r.ChangeFlash(ctx, FlashChange{Unpin: []FlashPin{{Volume: "v"}}, Pin: []FlashPin{{Volume: "v", Length: 64 * block.Size}}})
			fatal(err)
		}
		stop := n + 40
		until(func(FlashStats) bool { return n >= stop })
		if !off() {
			fatal(r.Fold(ctx))
		}
		if !off() {
			fatal(r.EvacuateFlash(ctx, EvacuateStart))
			until(func(s FlashStats) bool { return s.State == FlashEvacuated })
		}
		if !off() {
			fatal(r.RemoveDevice(ctx, "ssd"))
			for k := 0; k < 3000 && r.removing() && !off(); k++ {
				fatal(errors.Join(r.flashStep(), r.removalStep()))
			}
		}
	}
	if cut = off(); power {
		r.cutPower(blocktest.CutRandom, uint64(op))
	} else {
		r.cutPower(blocktest.KeepAll, 0)
		r.boot-- // the host, and so the region, live
	}
	here := true
	if _, err := ReadLabel(r.devs[2]); err != nil {
		if !Wiped(err) {
			t.Fatal(err)
		}
		here = false
		r.devs = r.devs[:2] // as the guest does
	}
	var closed []hpdi.Device
	for _, d := range r.devices() {
		closed = append(closed, forReading{d})
	}
	look, err := OpenView(ViewOptions{Devices: closed, RegionPath: r.region, BootID: fmt.Sprint(r.boot)})
	if err != nil {
		t.Fatalf("view, label %v: %v", here, err)
	}
	if report, err := look.Check(ctx, CheckOptions{Data: true}); err != nil || len(report.Problems) > 0 {
		t.Errorf("view: %v, %v", report.Problems, err)
	}
	if err := look.Close(); err != nil {
		t.Error(err)
	}
	r.reopenDevices()
	if err := r.open(); err != nil {
		t.Fatalf("label %v: %v", here, err)
	}
	if c.v, err = r.Volume("v"); err != nil {
		t.Fatal(err)
	}
	c.verify(t)
	r.mustCheck()
	// On to the end, whatever that was.
	if here && r.Flash().Device == "" { // it never joined, or has left and keeps its label still
		for k := 0; k < 3000 && r.removing(); k++ {
			fatal(r.removalStep())
		}
		r.devs = r.devs[:2]
	} else if here {
		if !r.removing() {
			fatal(r.EvacuateFlash(ctx, EvacuateStop))
			r.pinAgain("v")
			c.verify(t)
			fatal(r.RemoveDevice(ctx, "ssd"))
		}
		r.flashGoes()
	}
	c.verify(t)
	r.mustCheck()
	if op%2 == 0 {
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

// forReading is a device that is open for reading only.
type forReading struct{ hpdi.Device }

func (d forReading) Info() hpdi.Info {
	i := d.Device.Info()
	i.ReadOnly = true
	return i
}

// pinAgain is pin for a volume that may have pins already.
func (r *rig) pinAgain(name string) {
	r.t.Helper()
	_, pins, err := r.FlashPolicy(context.Background())
	if err == nil && !slices.Contains(pins, FlashPin{Volume: name}) {
		r.pin(name)
	}
}
