package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// Each operation of a device fails once while a pool is closed. Nothing is lost
// by it, the error says so and where the log is, and the pool opens again.
func TestCloseFails(t *testing.T) {
	long(t)
	for _, op := range []hpdi.Op{hpdi.OpRead, hpdi.OpWrite, hpdi.OpFlush} {
		for skip, hit := 0, true; hit; skip += oneIn(4) {
			hit = closeFails(t, op, skip)
		}
	}
}

func closeFails(t *testing.T, op hpdi.Op, skip int) (hit bool) {
	t.Helper()
	ctx := context.Background()
	r, v := filled(t, 5)
	if err := write(v, 0, pattern(200)); err != nil {
		t.Fatal(err)
	}
	r.die() // so that Close has the counts to load
	f := r.faulty()
	r.mustOpen()
	var err error
	if v, err = r.Volume("v"); err != nil {
		t.Fatal(err)
	}
	if err := write(v, block.Size, pattern(201)); err != nil {
		t.Fatal(err)
	}
	f[0].Add(blocktest.Rule{Op: op, Skip: skip, Count: 1, Err: errMedium})
	r.stop()
	err = r.Pool.Close(ctx)
	hit = f[0].Hits() > 0
	_, there := os.Stat(r.region)
	what := fmt.Sprintf("%v %d", op, skip)
	switch {
	case err != nil:
		says(t, what, err, errMedium, "close pool p", "nothing is lost, its log stays in "+r.region)
		if there != nil {
			t.Errorf("%s: the region is gone: %v", what, there)
		}
	case there == nil:
		t.Errorf("%s: closed, and the region is there", what)
	}
	r.wrap = nil
	r.reopen()
	r.mustLook()
	r.mustOpen()
	r.holds(map[int64]byte{0: 200, 1: 201, 2: 3, 3: 4, 4: 5})
	r.shut()
	return hit
}

// Each operation of a device fails once while a pool is opened. It opens the
// next time, with the same devices and all that was acknowledged.
func TestOpenFails(t *testing.T) {
	long(t)
	for _, power := range []bool{false, true} {
		for _, op := range []hpdi.Op{hpdi.OpRead, hpdi.OpWrite, hpdi.OpFlush} {
			for skip, hit := 0, true; hit; skip++ {
				hit = openFails(t, op, skip, power)
			}
		}
	}
}

func openFails(t *testing.T, op hpdi.Op, skip int, power bool) (hit bool) {
	t.Helper()
	r, v := filled(t, 5)
	for i, c := range []byte{200, 201} {
		if err := write(v, int64(i)*block.Size, pattern(c)); err != nil {
			t.Fatal(err)
		}
		if err := v.Flush(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	if power {
		r.cutPower(blocktest.CutRandom, uint64(skip))
	} else {
		r.die()
	}
	f := blocktest.NewFault(r.devs[0], 1)
	r.wrap = func(int, hpdi.Device) hpdi.Device { return f }
	f.Add(blocktest.Rule{Op: op, Skip: skip, Count: 1, Err: errMedium})
	err := r.open()
	hit = f.Hits() > 0
	f.Clear()
	what := fmt.Sprintf("%v %d, power %v", op, skip, power)
	if err != nil {
		says(t, what, err, errMedium)
		if !strings.Contains(err.Error(), "pool p") && !strings.Contains(err.Error(), "disk0") {
			t.Errorf("%s: %v names neither pool nor device", what, err)
		}
		r.mustOpen() // the devices are open still
	}
	r.holds(map[int64]byte{0: 200, 1: 201, 2: 3, 3: 4, 4: 5})
	r.wrap = nil
	r.shut()
	return hit
}

// Nobody waits for an Open any more when it comes to its end.
func TestOpenCancelled(t *testing.T) {
	r, _ := filled(t, 3)
	r.die()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Open(ctx, r.options()); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	r.mustOpen() // the devices are open still, and locks of the region are not kept
	r.holds(map[int64]byte{0: 1, 1: 2, 2: 3})
	r.shut()
}

// An owner's name that does not fit the region is refused, whoever passes it.
func TestOpenWithImpossibleOwner(t *testing.T) {
	r, _ := filled(t, 3)
	r.die()
	o := r.options()
	o.Owner = strings.Repeat("x", 5000)
	if err := r.openWith(o); err == nil {
		r.stop()
		t.Fatal("opened")
	}
	r.mustOpen()
	r.holds(map[int64]byte{0: 1, 1: 2, 2: 3})
	r.shut()
}

// Something that is no region lies in its place, and the loss was accepted:
// what is not a file is not removed.
func TestFolderInPlaceOfRegion(t *testing.T) {
	r, _ := filled(t, 3)
	r.die()
	if err := errors.Join(os.Rename(r.region, r.region+".saved"), os.MkdirAll(filepath.Join(r.region, "x"), 0o700)); err != nil {
		t.Fatal(err)
	}
	r.refused(r.devices(), syscall.EISDIR, "region of pool p", r.region)
	r.acceptLoss = true
	r.refused(r.devices(), os.ErrExist, "remove a region that is of no use", r.region)
	r.acceptLoss = false
	if err := errors.Join(os.RemoveAll(r.region), os.Rename(r.region+".saved", r.region)); err != nil {
		t.Fatal(err)
	}
	r.mustOpen()
	r.holds(map[int64]byte{0: 1, 1: 2, 2: 3})
	r.shut()
}

// Requests under way keep a pool from being closed or released for as long as
// the caller waits; afterwards it can be, and nothing new gets in.
func TestCloseWaitsForRequests(t *testing.T) {
	ctx := context.Background()
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	for _, end := range []func(*Pool, context.Context) error{(*Pool).Close, (*Pool).Release} {
		r, _ := filled(t, 3)
		r.die()
		stop := r.run()
		v, err := r.Volume("v")
		if err != nil {
			t.Fatal(err)
		}
		if !r.gate.Enter() {
			t.Fatal("the gate is closed")
		}
		stop()
		says(t, "with a request under way", end(r.Pool, cancelled), context.Canceled, "close pool p: requests are still under way")
		says(t, "probe", r.Probe(ctx), block.ErrClosed, "pool p")
		says(t, "write", write(v, 0, pattern(9)), block.ErrClosed)
		says(t, "a job", r.Commit(ctx), block.ErrClosed, "pool p")
		r.gate.Exit()
		if err := end(r.Pool, ctx); err != nil {
			t.Fatal(err)
		}
		r.reopen()
		r.mustOpen()
		r.holds(map[int64]byte{0: 1, 1: 2, 2: 3})
		r.shut()
	}
}

// A full pool whose device fails when space is to be won for a write: the
// client hears of it, and gets its space when the device is well again.
func TestRelieveFails(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, testSize)
	f := r.faulty()
	r.mustOpen()
	v := r.volume("v", 1<<20)
	if err := write(v, 0, pattern(1)); err != nil {
		t.Fatal(err)
	}
	f[0].Add(blocktest.Rule{Op: hpdi.OpWrite, Count: 1, Err: errMedium})
	says(t, "commit", r.relieve(ctx), errMedium, "consistency point")
	if err := r.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	f[0].Add(blocktest.Rule{Op: hpdi.OpWrite, Count: 1, Err: errMedium})
	says(t, "fold", r.relieve(ctx), errMedium, "fold")
	if err := r.relieve(ctx); err != nil {
		t.Fatal(err)
	}
	r.holds(map[int64]byte{0: 1})
	r.shut()
}
