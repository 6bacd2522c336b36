package pool

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// labels returns what all devices say, and the last use that the first tells of.
func (r *rig) labels() (ls []Label, u LastUse) {
	r.t.Helper()
	for _, d := range r.devices() {
		l, err := ReadLabel(d)
		if err != nil {
			r.t.Fatal(err)
		}
		ls = append(ls, l)
	}
	u, err := ReadLastUse(r.devices()[0], ls[0].Pool)
	if err != nil {
		r.t.Fatal(err)
	}
	return ls, u
}

// unused tells whether the devices say that nobody has the pool.
func (r *rig) unused() bool {
	ls, u := r.labels()
	for _, l := range ls {
		if !l.Exported {
			return false
		}
	}
	return u.RegionID == "" && u.BootID == ""
}

// moved makes the rig another host with the same devices.
func (r *rig) moved() {
	r.reopen()
	r.boot += 100
	r.region = filepath.Join(r.t.TempDir(), "region")
}

// twoDevices is a rig with a pool of two devices and some blocks in it, the newest
// only in the log.
func twoDevices(t *testing.T) *rig {
	t.Helper()
	r := newRig(t, 2, testSize)
	r.mustOpen()
	v := r.volume("v", 1<<20)
	for i := range 5 {
		if err := write(v, int64(i)*block.Size, pattern(byte(i+1))); err != nil {
			t.Fatal(err)
		}
		if i == 2 {
			if err := r.Fold(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
	}
	return r
}

var fiveBlocks = map[int64]byte{0: 1, 1: 2, 2: 3, 3: 4, 4: 5}

// A pool whose cache is on its way to the region may be closed and exported: nothing is done
// any more in a region that was removed.
func TestCloseBesideCache(t *testing.T) {
	for name, end := range map[string]func(*Pool) error{
		"close":  func(p *Pool) error { return p.Close(t.Context()) },
		"export": func(p *Pool) error { return p.Export(t.Context()) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 1, testSize)
			r.cacheBytes = 256 << 20
			r.mustOpen()
			if err := write(r.volume("v", 1<<20), 0, pattern(1)); err != nil {
				t.Fatal(err)
			}
			r.stop()
			if err := end(r.Pool); err != nil {
				t.Fatal(err)
			}
			r.moved()
			r.mustOpen()
			r.holds(map[int64]byte{0: 1})
		})
	}
}

// A pool that was exported needs nothing of the host that it was on, and serves
// another guest under another name; while it does, nothing says exported any more.
func TestExport(t *testing.T) {
	ctx := context.Background()
	r := twoDevices(t)
	if r.unused() {
		t.Error("it says exported while it is open")
	}
	r.mustCheck()
	r.stop()
	if err := r.Pool.Export(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(r.region); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the region is there: %v", err)
	}
	r.moved()
	r.mustLook()
	if ls, u := r.labels(); !r.unused() || len(u.Devices) != 2 || u.Devices[1] != ls[1].Device || u.Epoch == 0 {
		t.Errorf("exported: %+v, %+v", ls, u)
	}

	ls, _ := r.labels()
	if err := Adopt(r.devices(), AdoptOptions{Pool: ls[0].Pool, Name: "q", Identity: "b"}); err != nil {
		t.Fatal(err)
	}
	if !r.unused() {
		t.Error("adopted, and no longer exported before it is opened")
	}
	o := r.options()
	o.Host = "elsewhere"
	if err := r.openWith(o); err != nil {
		t.Fatal(err)
	}
	if r.Name() != "q" || r.Identity() != "b" {
		t.Errorf("pool %s of %s", r.Name(), r.Identity())
	}
	r.holds(fiveBlocks)
	now, u := r.labels()
	for i, l := range now {
		if l.Exported || l.Host != "elsewhere" || l.Name != "q" || l.Identity != "b" || l.Device != ls[i].Device || l.Layout != ls[i].Layout {
			t.Errorf("device %d: %+v", i, l)
		}
	}
	if u.RegionID == "" || u.BootID != "101" {
		t.Errorf("%+v", u)
	}
	// A device that joins now is of the same pool and host.
	dev := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "more", Size: testSize, Clock: r.clock, Direct: true})
	r.devs = append(r.devs, dev)
	if err := r.AddDevice(ctx, dev); err != nil {
		t.Fatal(err)
	}
	if l, err := ReadLabel(dev); err != nil || l.Host != "elsewhere" || l.Name != "q" {
		t.Errorf("%+v, %v", l, err)
	}
	r.shut()
	r.reopen()
	if r.unused() {
		t.Error("a pool that was only closed says that it was exported")
	}
}

// Each operation of a device fails once while a pool is exported. Nothing is lost,
// the pool opens again where it was, and then says exported no more.
func TestExportFails(t *testing.T) {
	long(t)
	for _, op := range []hpdi.Op{hpdi.OpRead, hpdi.OpWrite, hpdi.OpFlush} {
		for dev := range 2 {
			for skip, hit := 0, true; hit; skip += oneIn(4) {
				r := twoDevices(t)
				r.die()
				f := r.faulty()
				r.mustOpen()
				r.stop()
				f[dev].Add(blocktest.Rule{Op: op, Skip: skip, Count: 1, Err: errMedium})
				err := r.Pool.Export(context.Background())
				if hit = f[dev].Hits() > 0; err != nil {
					says(t, "export", err, errMedium, "export pool p", "to be opened again where it was")
				}
				r.wrap = nil
				r.reopen()
				// The last copy of a label may fail: it is closed all the same.
				if err == nil && !r.unused() {
					t.Errorf("%v %d of device %d: exported, and not unused", op, skip, dev)
				}
				r.mustOpen()
				r.holds(fiveBlocks)
				if ls, _ := r.labels(); ls[0].Exported || ls[1].Exported {
					t.Errorf("%v %d: open, and exported: %+v", op, skip, ls)
				}
				r.shut()
			}
		}
	}
}

// The power fails at each operation of an export. What was flushed is there
// afterwards; all of it is when the devices say that nobody has the pool.
func TestExportPowerCut(t *testing.T) {
	through := false
	for n := int64(0); !through; n++ {
		r := twoDevices(t)
		v, err := r.Volume("v")
		if err == nil {
			err = v.Flush(context.Background())
		}
		if err == nil {
			err = write(v, 5*block.Size, pattern(6)) // not flushed
		}
		if err != nil {
			t.Fatal(err)
		}
		r.stop()
		r.clock.CutAfter(n)
		err = r.Pool.Export(context.Background())
		through = err == nil
		clock := blocktest.NewClock()
		for i, d := range r.devs {
			r.devs[i] = d.CutTo(clock, blocktest.CutRandom, uint64(n)+uint64(i))
		}
		r.clock = clock
		r.moved()
		unused := r.unused()
		if through && !unused {
			t.Errorf("after %d operations it was exported, and then the cut took that back", n)
		}
		r.mustOpen()
		r.holds(fiveBlocks)
		if unused {
			r.holds(map[int64]byte{5: 6})
		}
		if ls, _ := r.labels(); ls[0].Exported || ls[1].Exported {
			t.Errorf("after %d operations: open, and exported: %+v", n, ls)
		}
		r.shut()
	}
}

// An adoption ends at each operation of a device, by an error or by the power. It
// is completed by another one; devices that are not the pool's stay as they are.
func TestAdoptInterrupted(t *testing.T) {
	through := false
	for n := int64(0); !through; n++ {
		r := twoDevices(t)
		r.stop()
		if err := r.Pool.Export(context.Background()); err != nil {
			t.Fatal(err)
		}
		r.moved()
		ls, _ := r.labels()
		to := AdoptOptions{Pool: ls[0].Pool, Name: "q", Identity: "b"}
		r.clock.CutAfter(n)
		through = Adopt(r.devices(), to) == nil
		clock := blocktest.NewClock()
		for i, d := range r.devs {
			r.devs[i] = d.CutTo(clock, blocktest.CutRandom, uint64(n)+uint64(i))
		}
		r.clock = clock
		if !r.unused() {
			t.Fatalf("after %d operations it seems to be in use", n)
		}
		if err := Adopt(r.devices(), to); err != nil {
			t.Fatal(err)
		}
		r.mustOpen()
		if r.Name() != "q" || r.Identity() != "b" {
			t.Errorf("pool %s of %s", r.Name(), r.Identity())
		}
		r.holds(fiveBlocks)
		r.shut()
	}
}

func TestAdoptRefuses(t *testing.T) {
	r, other := newRig(t, 1, testSize), newRig(t, 1, testSize)
	ls, _ := r.labels()
	both := []hpdi.Device{r.devs[0], other.devs[0]}
	says(t, "another pool's", Adopt(both, AdoptOptions{Pool: ls[0].Pool, Name: "q", Identity: "b"}), block.ErrInvalid, "belongs to pool p", "not to")
	says(t, "no name", Adopt(r.devices(), AdoptOptions{Pool: ls[0].Pool, Identity: "b"}), block.ErrInvalid)
	says(t, "no label", Adopt([]hpdi.Device{blocktest.NewCrash(testSize, 1)}, AdoptOptions{Pool: ls[0].Pool, Name: "q"}), nil, "no valid label")
	if now, _ := r.labels(); now[0] != ls[0] {
		t.Errorf("a refused adoption has changed %+v to %+v", ls[0], now[0])
	}
	if _, err := ReadLastUse(other.devs[0], ls[0].Pool); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("the superblock of another pool: %v", err)
	}
}

// Labels of earlier releases are read, and stay as they are where nothing is to be
// added to them.
func TestExportedLabel(t *testing.T) {
	l := testLabel()
	plain := l.encode()
	l.Host, l.Exported = "host.example", true
	b := l.encode()
	golden(t, "testdata/label-exported.hex", b)
	if got, err := decodeLabel(b); err != nil || got != l {
		t.Errorf("%v: %+v", err, got)
	}
	if got, err := decodeLabel(plain); err != nil || got != testLabel() {
		t.Errorf("%v: %+v", err, got)
	}
}

// A pool that somebody has opened since it was found is not adopted, unless it was
// adopted before that.
func TestAdoptStale(t *testing.T) {
	r := twoDevices(t)
	r.stop()
	if err := r.Pool.Export(context.Background()); err != nil {
		t.Fatal(err)
	}
	r.moved()
	ls, u := r.labels()
	to := AdoptOptions{Pool: ls[0].Pool, Name: "q", Identity: "b", Epoch: u.Epoch}
	r.mustOpen() // by somebody else
	r.shut()
	r.reopen()
	slices.Reverse(r.devs) // in any order
	says(t, "opened since", Adopt(r.devices(), to), block.ErrStale, "pool p was opened by somebody since it was found")
	slices.Reverse(r.devs)
	now, u := r.labels()
	for _, l := range now {
		if l.Name != "p" || l.Identity != "a" {
			t.Errorf("refused, and labelled: %+v", l)
		}
	}
	to.Epoch = u.Epoch
	if err := Adopt(r.devices(), to); err != nil {
		t.Fatal(err)
	}
	r.mustOpen()
	r.shut()
	r.reopen()
	if err := Adopt(r.devices(), to); err != nil {
		t.Errorf("again, after it was opened by who adopted it: %v", err)
	}
}
