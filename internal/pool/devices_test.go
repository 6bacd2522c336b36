package pool

import (
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// refused opens the pool with other devices and wants an error of a kind that
// says so in certain words.
func (r *rig) refused(devs []hpdi.Device, kind error, words ...string) {
	r.t.Helper()
	o := r.options()
	o.Devices = devs
	p, err := Open(context.Background(), o)
	if err == nil {
		_ = p.free()
		r.t.Errorf("opened; want an error about %q", words)
		return
	}
	if !errors.Is(err, kind) {
		r.t.Errorf("%v: want %v", err, kind)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			r.t.Errorf("%q does not say %q", err, w)
		}
	}
}

func TestWrongDevices(t *testing.T) {
	r := newRig(t, 3, testSize)
	r.mustOpen()
	v := r.volume("v", 1<<20)
	if err := write(v, 0, pattern(7)); err != nil {
		t.Fatal(err)
	}
	r.die()
	other := newRig(t, 2, testSize)
	d, foreign := r.devices(), other.devices()
	copyOf := func(i int) hpdi.Device {
		l, err := ReadLabel(r.devs[i])
		dev := blocktest.NewCrash(testSize, 8)
		if err = errors.Join(err, writeLabel(dev, l)); err != nil {
			t.Fatal(err)
		}
		return dev
	}
	blank := blocktest.NewCrash(testSize, 9)
	short := blocktest.NewFault(d[1], 1)
	short.Shorten(testSize - block.Size)

	r.refused(nil, block.ErrInvalid)
	r.refused(d[:2], block.ErrInvalid, "3", "missing")
	r.refused(d[1:], block.ErrInvalid, "disk2", "number 3")
	r.refused([]hpdi.Device{d[0], d[2]}, block.ErrInvalid, "disk2")
	r.refused([]hpdi.Device{d[0], d[1], foreign[0]}, block.ErrInvalid, "belongs to pool")
	r.refused([]hpdi.Device{d[0], d[1], blank}, ondisk.ErrMagic, "no valid label")
	r.refused([]hpdi.Device{d[0], d[1], d[2], foreign[1]}, block.ErrInvalid, "belongs to pool")
	r.refused([]hpdi.Device{d[0], d[1], copyOf(1)}, block.ErrInvalid, "both are number 2")
	r.refused([]hpdi.Device{d[0], short, d[2]}, block.ErrInvalid, "shrunk", "disk1")
	if got, err := os.Stat(r.region); err != nil || got.Size() == 0 {
		t.Errorf("a refused open has harmed the region: %v", err)
	}

	slices.Reverse(d)
	o := r.options()
	o.Devices = d
	for _, dev := range d { // which whoever opens the pool may have read already
		l, err := ReadLabel(dev)
		if err != nil {
			t.Fatal(err)
		}
		o.Labels = append(o.Labels, l)
	}
	p, err := Open(context.Background(), o)
	if err != nil {
		t.Fatalf("in another order: %v", err)
	}
	v, _ = p.Volume("v")
	got := make([]byte, block.Size)
	if err := v.Read(context.Background(), got, 0); err != nil || !bytes.Equal(got, pattern(7)) {
		t.Errorf("%v %d", err, got[0])
	}
	if err := p.free(); err != nil {
		t.Error(err)
	}
}

// A device of the pool was replaced by one that was labelled in its place for
// the same pool but never became part of it, or by one of another making.
func TestReplacedDevice(t *testing.T) {
	r := newRig(t, 2, testSize)
	r.mustOpen()
	r.die()
	l, err := ReadLabel(r.devs[1])
	if err != nil {
		t.Fatal(err)
	}
	l.Device[0]++
	impostor := blocktest.NewCrash(testSize, 3)
	if err := writeLabel(impostor, l); err != nil {
		t.Fatal(err)
	}
	r.refused([]hpdi.Device{r.devs[0], impostor}, block.ErrInvalid, "number 2", "replaced")
	l.Index = 2
	if err := writeLabel(impostor, l); err != nil {
		t.Fatal(err)
	}
	r.refused([]hpdi.Device{r.devs[0], r.devs[1], impostor}, block.ErrInvalid, "never became part")
	r.mustOpen()
	r.shut()
}

// The area of the flush log is written to its last block, and nothing beside it;
// a pool whose making was given up is none.
func TestFillFlushArea(t *testing.T) {
	dev := blocktest.NewCrash(64<<20, 1)
	o := CreateOptions{Name: "q", Identity: "b", Devices: []hpdi.Device{dev}, LogBytes: testLog, FillFlushArea: true}
	l := layout(0, 64<<20/block.Size, testLog, 0)
	for _, b := range []uint64{l.Flush - 1, l.Flush, l.Flush + l.FlushBlocks/2, l.Flush + l.FlushBlocks - 1, l.Flush + l.FlushBlocks} {
		dev.Corrupt(int64(b)*block.Size, 1)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Create(ctx, o); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	if _, err := ReadLabel(dev); !errors.Is(err, ondisk.ErrMagic) {
		t.Errorf("given up: %v", err)
	}
	if _, err := Create(context.Background(), o); err != nil {
		t.Fatal(err)
	}
	q, err := dev.NewQueue(1)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	p := make([]byte, block.Size)
	for b := l.Flush - 1; b <= l.Flush+l.FlushBlocks; b++ {
		if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: int64(b) * block.Size, Vec: [][]byte{p}}); err != nil {
			t.Fatal(err)
		}
		if outside := b < l.Flush || b == l.Flush+l.FlushBlocks; (p[0] != 0) != outside {
			t.Errorf("block %d of the area of %d from %d on: %d", b, l.FlushBlocks, l.Flush, p[0])
		}
	}
}

func TestCreateRefusesUsedDevices(t *testing.T) {
	r := newRig(t, 1, testSize)
	o := CreateOptions{Name: "q", Identity: "b", Devices: r.devices(), LogBytes: testLog}
	if _, err := Create(context.Background(), o); !errors.Is(err, block.ErrExists) {
		t.Errorf("%v", err)
	}
	r.devs[0].Corrupt(0, 1) // one copy of the label is enough
	if _, err := Create(context.Background(), o); !errors.Is(err, block.ErrExists) {
		t.Errorf("%v", err)
	}
	o.Force = true
	if _, err := Create(context.Background(), o); err != nil {
		t.Errorf("with force: %v", err)
	}
	o.Devices = []hpdi.Device{blocktest.NewCrash(8<<20, 1)}
	if _, err := Create(context.Background(), o); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("too small a device: %v", err)
	}
}

// The region, with what was acknowledged, is gone although the host did not
// restart.
func TestRegionLost(t *testing.T) {
	for _, damaged := range []bool{false, true} {
		r := newRig(t, 1, testSize)
		r.mustOpen()
		v := r.volume("v", 1<<20)
		if err := write(v, 0, pattern(1)); err != nil {
			t.Fatal(err)
		}
		if err := v.Flush(context.Background()); err != nil {
			t.Fatal(err)
		}
		if err := write(v, 0, pattern(2)); err != nil {
			t.Fatal(err)
		}
		r.die()
		saved, err := os.ReadFile(r.region)
		if err != nil {
			t.Fatal(err)
		}
		if damaged {
			hurt := slices.Clone(saved)
			clear(hurt[:8192]) // both headers
			if err := os.WriteFile(r.region, hurt, 0o600); err != nil {
				t.Fatal(err)
			}
			r.refused(r.devices(), ondisk.ErrMagic, "region")
		} else {
			if err := os.Remove(r.region); err != nil {
				t.Fatal(err)
			}
			r.refused(r.devices(), ErrRegionLost, "accept_loss")
		}
		// A refusal changes nothing: with its region back, all is there.
		if err := os.WriteFile(r.region, saved, 0o600); err != nil {
			t.Fatal(err)
		}
		r.mustOpen()
		v, _ = r.Volume("v")
		got := make([]byte, block.Size)
		if err := v.Read(context.Background(), got, 0); err != nil || got[0] != 2 {
			t.Fatalf("%v %d", err, got[0])
		}
		r.die()
		if damaged {
			clear(saved[:8192])
			if err := os.WriteFile(r.region, saved, 0o600); err != nil {
				t.Fatal(err)
			}
		} else if err := os.Remove(r.region); err != nil {
			t.Fatal(err)
		}
		r.acceptLoss = true
		r.mustOpen()
		v, _ = r.Volume("v")
		if err := v.Read(context.Background(), got, 0); err != nil || got[0] != 1 {
			t.Errorf("what was flushed is not there: %v %d", err, got[0])
		}
		r.shut()
	}
}

// A region of another pool is never adopted, nor removed.
func TestForeignRegion(t *testing.T) {
	a, b := newRig(t, 1, testSize), newRig(t, 1, testSize)
	a.mustOpen()
	b.mustOpen()
	a.die()
	b.die()
	b.region = a.region
	b.refused(b.devices(), block.ErrInvalid, "belongs to pool")
	a.mustOpen()
	a.shut()
}

// The log in the region is damaged: what was flushed can be had.
func TestDamagedLogInRegion(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.mustOpen()
	v := r.volume("v", 1<<20)
	for i := range byte(3) {
		if err := write(v, int64(i)*block.Size, pattern(i+1)); err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			if err := v.Flush(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Both copies of all records, and payload.
	mem := r.Region().Log()
	for i := block.Size; i < len(mem)-block.Size; i++ { // between the headers
		if mem[i] != 0 {
			mem[i] ^= 0x55
		}
	}
	r.die()
	if err := r.open(); !errors.Is(err, block.ErrCorrupt) {
		t.Fatal(err)
	}
	r.acceptLoss = true
	r.mustOpen()
	v, _ = r.Volume("v")
	got := make([]byte, block.Size)
	for i := range byte(2) {
		if err := v.Read(context.Background(), got, int64(i)*block.Size); err != nil || got[0] != i+1 {
			t.Errorf("block %d, which was flushed: %v %d", i, err, got[0])
		}
	}
	r.shut()
}

// A device that joins the pool is used, and there after a restart.
func TestAddDevice(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, smallest)
	r.mustOpen()
	v := r.volume("v", 1<<30)
	before := r.Stats()
	d := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "added", Size: 8 << 20, Seed: 5, Clock: r.clock, Direct: true})
	if err := r.AddDevice(ctx, d); err != nil {
		t.Fatal(err)
	}
	if err := r.AddDevice(ctx, d); !errors.Is(err, block.ErrExists) {
		t.Errorf("added twice: %v", err)
	}
	r.devs = append(r.devs, d)
	if now := r.Stats(); now.Bytes <= before.Bytes {
		t.Errorf("%d bytes, %d before", now.Bytes, before.Bytes)
	}
	holds := map[int64]byte{}
	for b := range int64(1200) {
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
	r.mustCheck()
	r.die()
	r.mustOpen()
	v, _ = r.Volume("v")
	verifyBlocks(t, v, holds)
	r.shut()
}

// Adding a device fails at each of its steps, or the guest dies there. The
// pool goes on without it, opens without it, and takes it the next time.
func TestAddDeviceAgain(t *testing.T) {
	ctx := context.Background()
	errBroken := errors.New("broken")
	for _, step := range []struct {
		name string
		own  bool // the new device fails, not the pool's
		rule blocktest.Rule
		dies bool
	}{
		{"first copy of the label", true, blocktest.Rule{Op: hpdi.OpWrite, Count: 1, Err: errBroken}, false},
		{"second copy of the label", true, blocktest.Rule{Op: hpdi.OpWrite, Skip: 1, Count: 1, Err: errBroken}, false},
		{"sync of the label", true, blocktest.Rule{Op: hpdi.OpFlush, Count: 1, Err: errBroken}, false},
		{"superblock", false, blocktest.Rule{Op: hpdi.OpWrite, Count: 1, Err: errBroken}, false},
		{"superblock that is there all the same", false, blocktest.Rule{Op: hpdi.OpWrite, Count: 2, Err: errBroken, Late: true}, false},
		{"sync of the superblock", false, blocktest.Rule{Op: hpdi.OpFlush, Count: 1, Err: errBroken}, false},
		{"superblock, and death", false, blocktest.Rule{Op: hpdi.OpWrite, Err: errBroken}, true},
	} {
		t.Run(step.name, func(t *testing.T) {
			r := newRig(t, 1, smallest)
			faults := r.faulty()
			r.mustOpen()
			v := r.volume("v", 1<<30)
			d := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "added", Size: 8 << 20, Seed: 5, Clock: r.clock, Direct: true})
			add := func() (hpdi.Device, error) {
				f := blocktest.NewFault(d, 1)
				if step.own {
					f.Add(step.rule)
				} else {
					faults[0].Add(step.rule)
				}
				return f, r.AddDevice(ctx, f)
			}
			before := r.Stats().Bytes
			if _, err := add(); !errors.Is(err, errBroken) {
				t.Fatalf("%v", err)
			}
			if now := r.Stats().Bytes; now != before {
				t.Errorf("%d bytes after a failure, %d before", now, before)
			}
			holds := map[int64]byte{3: 7}
			if step.dies {
				r.die()
				r.mustOpen() // without the device
				v, _ = r.Volume("v")
			}
			faults[0].Clear()
			if err := write(v, 3*block.Size, pattern(7)); err != nil {
				t.Fatal(err)
			}
			if step.dies || step.name == "superblock that is there all the same" {
				// What the superblock says now.
				r.die()
				r.mustOpen()
				v, _ = r.Volume("v")
				verifyBlocks(t, v, holds)
			}
			d = d.Reopen()
			if err := r.AddDevice(ctx, d); err != nil {
				t.Fatalf("again: %v", err)
			}
			if now := r.Stats().Bytes; now <= before {
				t.Errorf("%d bytes, %d before", now, before)
			}
			if err := r.AddDevice(ctx, d); !errors.Is(err, block.ErrExists) {
				t.Errorf("added twice: %v", err)
			}
			r.devs = append(r.devs, d)
			r.die()
			r.wrap = nil
			r.mustOpen()
			v, _ = r.Volume("v")
			verifyBlocks(t, v, holds)
			r.shut()
		})
	}
}

// A device that was labelled for a place which another one took since gets the
// next; one of another pool is never taken.
func TestAddDeviceLabelled(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, smallest)
	other := newRig(t, 1, smallest)
	r.mustOpen()
	named := func(name string) *blocktest.Crash {
		return blocktest.NewCrashWith(blocktest.CrashOptions{Name: name, Size: 8 << 20, Clock: r.clock, Direct: true})
	}
	late, first := named("late"), named("first")
	l, err := newLabel(CreateOptions{Name: "p", Identity: "a", LogBytes: testLog}, r.label.Pool, 1, late)
	if err = errors.Join(err, writeLabel(late, l)); err != nil {
		t.Fatal(err)
	}
	for _, d := range []*blocktest.Crash{first, late} {
		if err := r.AddDevice(ctx, d); err != nil {
			t.Fatal(err)
		}
		r.devs = append(r.devs, d)
	}
	if now, err := ReadLabel(late); err != nil || now.Index != 2 || now.Device != l.Device {
		t.Errorf("%v %+v", err, now)
	}
	if err := r.AddDevice(ctx, other.devs[0]); !errors.Is(err, block.ErrExists) {
		t.Errorf("a device of another pool: %v", err)
	}
	hurt := named("hurt")
	hurt.Corrupt(0, 1)
	if err := r.AddDevice(ctx, hurt); err != nil {
		t.Errorf("a device with other content: %v", err)
	}
	r.devs = append(r.devs, hurt)
	r.die()
	r.mustOpen()
	r.shut()
}
