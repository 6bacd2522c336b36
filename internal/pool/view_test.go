package pool

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/devices"
)

// look opens a view of the rig's pool, whose devices refuse everything but
// reads, and checks it. The region must be as it was afterwards.
func (r *rig) look() (report CheckReport, err error) {
	r.t.Helper()
	before, _ := os.ReadFile(r.region)
	wrap := r.wrap
	defer func() { r.wrap, r.readOnly = wrap, false }()
	r.readOnly = true
	r.wrap = func(i int, d hpdi.Device) hpdi.Device {
		f := blocktest.NewFault(d, 1)
		for _, op := range []hpdi.Op{hpdi.OpWrite, hpdi.OpDiscard, hpdi.OpFlush, hpdi.OpWriteZeroes} {
			f.Add(blocktest.Rule{Op: op, Hold: func(q *hpdi.Request) { r.t.Errorf("looking: %v at %d", q.Op, q.Offset) }, Err: errMedium})
		}
		if wrap != nil {
			return wrap(i, f)
		}
		return f
	}
	o := r.options()
	v, err := OpenView(ViewOptions{Devices: o.Devices, RegionPath: o.RegionPath, BatteryBacked: o.BatteryBacked, BootID: o.BootID})
	if err != nil {
		return CheckReport{}, err
	}
	report, err = v.Check(context.Background(), CheckOptions{Data: true})
	if e := v.Close(); e != nil {
		r.t.Error(e)
	}
	if after, _ := os.ReadFile(r.region); !bytes.Equal(before, after) {
		r.t.Error("looking has changed the region")
	}
	r.reopenDevices()
	return report, err
}

// mustLook is look at a pool that is whole.
func (r *rig) mustLook() CheckReport {
	r.t.Helper()
	report, err := r.look()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, p := range report.Problems {
		r.t.Error("offline check: ", p)
	}
	return report
}

// A pool whose guest died at any of many moments is checked without a change
// to devices or region, and opens afterwards with all that was acknowledged.
func TestOfflineCheckChangesNothing(t *testing.T) {
	for _, how := range []string{"dead", "no power", "closed"} {
		t.Run(how, func(t *testing.T) {
			r := newRig(t, 2, testSize)
			rng := rand.New(rand.NewPCG(3, 4))
			r.mustOpen()
			v := r.volume("v", 64<<20)
			m := map[int64]byte{}
			for round := range 6 {
				for range 40 {
					at := rng.Int64N(64<<20/block.Size) * block.Size
					m[at] = byte(rng.IntN(255) + 1)
					if err := write(v, at, pattern(m[at])); err != nil {
						t.Fatal(err)
					}
				}
				var err error
				switch {
				case how == "no power":
					err = v.Flush(context.Background())
				case round%3 == 1:
					err = r.Fold(context.Background())
				case round%3 == 2:
					err = r.Commit(context.Background())
				}
				if err != nil {
					t.Fatal(err)
				}
				switch how {
				case "dead":
					r.die()
				case "no power":
					r.cutPower(blocktest.CutRandom, rng.Uint64())
				case "closed":
					r.stop()
					if err := r.Pool.Close(context.Background()); err != nil {
						t.Fatal(err)
					}
					r.reopen()
				}
				got := r.mustLook()
				r.mustOpen()
				if got.Volumes != 1 || got.DataBlocks == 0 && got.LogRecords == 0 {
					t.Errorf("offline check saw %+v", got)
				}
				if n := int64(r.log.Head() - r.machine.Committed()); n != got.LogRecords {
					t.Errorf("offline check saw %d records in the log, there are %d", got.LogRecords, n)
				}
				if v, err = r.Volume("v"); err != nil {
					t.Fatal(err)
				}
				p := make([]byte, block.Size)
				for at, b := range m {
					if err := v.Read(context.Background(), p, at); err != nil || !bytes.Equal(p, pattern(b)) {
						t.Fatalf("block at %d: %v, %d instead of %d", at, err, p[0], b)
					}
				}
			}
			r.shut()
		})
	}
}

// What an offline check is for: data, metadata, log and region that are lost.
func TestOfflineCheckFindsDamage(t *testing.T) {
	fresh := func(t *testing.T) *rig {
		r := newRig(t, 1, testSize)
		r.mustOpen()
		v := r.volume("v", 64<<20)
		for i := range 100 {
			if err := write(v, int64(i)*block.Size, pattern(byte(i+1))); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Fold(context.Background()); err != nil {
			t.Fatal(err)
		}
		for i := range 10 {
			if err := write(v, int64(i)*block.Size, pattern(byte(i+101))); err != nil {
				t.Fatal(err)
			}
		}
		return r
	}
	for name, c := range map[string]struct {
		spoil func(t *testing.T, r *rig)
		want  string
	}{
		"data": {func(t *testing.T, r *rig) {
			var p [1]block.Pointer
			if err := r.bmap.Lookup(1, 42, p[:]); err != nil {
				t.Fatal(err)
			}
			r.die()
			r.devs[0].Corrupt(int64(p[0].Phys.Block())*block.Size+77, 4)
		}, `block 42 of volume "v"`},
		"map": {func(t *testing.T, r *rig) {
			root := r.bmap.Trees()[1].Root
			r.die()
			r.devs[0].Corrupt(int64(root.Phys.Block())*block.Size+7, 4)
		}, "metadata page of level 3"},
		"count": {func(t *testing.T, r *rig) {
			root := r.machine.Superblock().Devices[0].Counts
			r.die()
			r.devs[0].Corrupt(int64(root.Phys.Block())*block.Size+7, 4)
		}, "metadata page of level 3"},
		"label": {func(t *testing.T, r *rig) {
			r.die()
			r.devs[0].Corrupt(int64(labelBlocks[1])*block.Size+70, 4)
		}, "copy of the label at block 0:128"},
		"log payload": {func(t *testing.T, r *rig) {
			rec, err := r.log.Get(r.log.Head())
			if err != nil {
				t.Fatal(err)
			}
			r.log.Payload(rec.First, 1)[9] ^= 1
			r.die()
		}, "payload of block 9 of volume 1 is damaged"},
		"region": {func(t *testing.T, r *rig) {
			r.die()
			if err := os.Remove(r.region); err != nil {
				t.Fatal(err)
			}
		}, "region is lost"},
	} {
		t.Run(name, func(t *testing.T) {
			r := fresh(t)
			c.spoil(t, r)
			report, err := r.look()
			if err != nil {
				t.Fatal(err)
			}
			if all := strings.Join(report.Problems, "\n"); !strings.Contains(all, c.want) {
				t.Errorf("problems:\n%s\nwant %q", all, c.want)
			}
		})
	}
}

// A recount by small windows, which end within tracks and devices, finds
// exactly what one window finds, in an open pool as in one that is looked at.
func TestRecountByWindows(t *testing.T) {
	r := newRig(t, 3, 64<<20)
	r.mustOpen()
	v := r.volume("v", 64<<20)
	for i := range 200 {
		if err := write(v, int64(i)*5*block.Size, pattern(byte(i+1))); err != nil {
			t.Fatal(err)
		}
		if i == 150 {
			if err := r.Fold(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := r.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	var p [1]block.Pointer
	if err := r.bmap.Lookup(1, 10, p[:]); err != nil {
		t.Fatal(err)
	}
	wrong := p[0].Phys
	recount := func(q *Pool, stored bool, size uint64, spoil bool) CheckReport {
		t.Helper()
		c, err := q.newChecker(CheckOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer c.bulk.close()
		c.window = size
		load := c.countsInMemory
		if stored {
			load = c.countsStored
		}
		c.loadCounts = func(ctx context.Context, w *window) error {
			err := load(ctx, w)
			if i, ok := w.at(wrong); ok && spoil {
				w.have[i]++
			}
			return err
		}
		if err := c.recount(context.Background()); err != nil {
			t.Fatal(err)
		}
		return c.report
	}
	compare := func(q *Pool, stored bool) {
		t.Helper()
		whole := recount(q, stored, countWindow, false)
		if len(whole.Problems) > 0 || whole.DataBlocks != 200 || whole.Pages == 0 {
			t.Fatalf("stored %v: %+v", stored, whole)
		}
		for _, size := range []uint64{1 << 14, 5000, 1777} {
			for _, spoil := range []bool{false, true} {
				got := recount(q, stored, size, spoil)
				if got.DataBlocks != whole.DataBlocks || got.Pages != whole.Pages {
					t.Errorf("stored %v, windows of %d: %d blocks, %d pages; in one %d and %d",
						stored, size, got.DataBlocks, got.Pages, whole.DataBlocks, whole.Pages)
				}
				said := strings.Join(got.Problems, "; ")
				if spoil && said != "block "+wrong.String()+" has reference count 2, 1 references were found" || !spoil && said != "" {
					t.Errorf("stored %v, windows of %d, spoilt %v: %q", stored, size, spoil, said)
				}
			}
		}
	}
	compare(r.Pool, false)
	r.die()
	o := r.options()
	w, err := OpenView(ViewOptions{Devices: o.Devices, RegionPath: o.RegionPath, BootID: o.BootID})
	if err != nil {
		t.Fatal(err)
	}
	compare(w.p, true)
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}

// Whatever order blocks are asked for in, each gets its own content or error,
// and a bad block does not hide its neighbours.
func TestBulkRead(t *testing.T) {
	r := newRig(t, 2, 64<<20)
	r.mustOpen()
	v := r.volume("v", 32<<20)
	const n = 700
	for i := range n {
		if err := write(v, int64(i)*block.Size, pattern(byte(i%250+1))); err != nil {
			t.Fatal(err)
		}
		if i%100 == 99 {
			if err := r.Commit(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := r.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	ptrs := make([]block.Pointer, n)
	if err := r.bmap.Lookup(1, 0, ptrs); err != nil {
		t.Fatal(err)
	}
	r.die()
	medium, flipped := ptrs[100].Phys, ptrs[300].Phys
	r.devs[flipped.Device()].Corrupt(int64(flipped.Block())*block.Size+5, 1)
	f := r.faulty()
	set := devices.NewSet(r.devices())
	f[medium.Device()].Add(blocktest.Rule{Op: hpdi.OpRead, Offset: int64(medium.Block()) * block.Size, Length: block.Size, Err: errMedium})
	b, err := newBulk(set)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	order := rand.New(rand.NewPCG(1, 1)).Perm(n)
	order = append(order, order[:50]...) // some twice
	got := make([]int, len(order))
	err = b.read(context.Background(), len(order), func(i int) block.Pointer { return ptrs[order[i]] }, func(i int, p []byte, err error) {
		switch lba := order[i]; {
		case lba == 100 && !errors.Is(err, errMedium), lba == 300 && !errors.Is(err, block.ErrCorrupt),
			lba != 100 && lba != 300 && (err != nil || !bytes.Equal(p, pattern(byte(lba%250+1)))):
			t.Errorf("block %d: %v", lba, err)
		}
		got[i]++ // each i is one goroutine's
	})
	for i, k := range got {
		if k != 1 {
			t.Fatalf("block %d came %d times", order[i], k)
		}
	}
	if err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := b.read(ctx, n, func(i int) block.Pointer { return ptrs[i] }, func(int, []byte, error) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}
	if err := set.Close(); err != nil {
		t.Error(err)
	}
}

// A check that reads data does not keep a pool from being handed over.
func TestCloseEndsCheck(t *testing.T) {
	r := newRig(t, 1, testSize)
	f := r.faulty()
	r.mustOpen()
	v := r.volume("v", 512<<20)
	for i := range 2 * dataLeaves { // two batches
		if err := write(v, int64(i)<<20, pattern(byte(i%250+1))); err != nil {
			t.Fatal(err)
		}
		if i%100 == 99 {
			if err := r.Fold(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := r.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	var p [1]block.Pointer
	if err := r.bmap.Lookup(1, 0, p[:]); err != nil {
		t.Fatal(err)
	}
	reading, goOn := make(chan struct{}), make(chan struct{})
	f[0].Add(blocktest.Rule{Op: hpdi.OpRead, Offset: int64(p[0].Phys.Block()) * block.Size, Length: block.Size, Count: 1,
		Hold: func(*hpdi.Request) { close(reading); <-goOn }})
	checked := make(chan error)
	go func() {
		report, err := r.Check(context.Background(), CheckOptions{Data: true})
		if report.BlocksRead == 0 || report.BlocksRead >= 2*dataLeaves {
			t.Errorf("%d blocks were read", report.BlocksRead)
		}
		checked <- err
	}()
	<-reading
	r.stop()
	r.gate.Close()
	close(goOn)
	if err := <-checked; !errors.Is(err, block.ErrClosed) {
		t.Errorf("the check ended with %v", err)
	}
	if err := r.Pool.Release(context.Background()); err != nil {
		t.Error(err)
	}
}
