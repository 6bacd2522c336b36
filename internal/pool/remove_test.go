package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// removalStep makes a removal take its next step and does what it waits for, as Run
// does.
func (r *rig) removalStep() error {
	return r.do(context.Background(), func() error {
		m := r.remover
		r.lastError.Store(nil)
		m.next = time.Time{}
		m.work(time.Now())
		if err := r.lastError.Load(); err != nil {
			return *err
		}
		if u := r.dirty.Usage(); m.phase == removerCommits || u.Active+u.Frozen >= u.Permits/4 {
			return r.commitAll()
		}
		if m.wantsFold() || r.machine.Folding() {
			_, err := r.machine.Fold()
			return err
		}
		return nil
	})
}

// removing reports whether there is something left to do for a removal.
func (r *rig) removing() bool { return r.remover.active() || len(r.remover.gone) > 0 }

// removeRest brings a removal to its end.
func (r *rig) removeRest() {
	r.t.Helper()
	for n := 0; r.removing(); n++ {
		if err := r.removalStep(); err != nil {
			r.t.Fatal(err)
		}
		if n > 5_000 {
			r.t.Fatalf("the removal does not come to an end: %+v, %+v", r.remover.Stats(), r.space.Usage())
		}
	}
}

// on returns how many blocks that volumes have are on a device.
func (r *rig) on(dev int) int64 { return r.space.InUse(dev) }

// A device is taken out while the pool serves: what it had is on the others, it has no
// label any more, and the pool opens without it.
func TestRemoveDevice(t *testing.T) {
	long(t)
	for _, dev := range []int{1, 2}[:few(2)] {
		for seed := range uint64(few(2)) {
			t.Run(fmt.Sprintf("device %d, seed %d", dev, seed), func(t *testing.T) {
				rng := rand.New(rand.NewPCG(seed, 5))
				r := newRig(t, 3, 48<<20)
				var events []string
				var got []hpdi.Device
				r.removal = RemovalOptions{
					Tell:    func(e RemovalEvent) { events = append(events, e.Kind) },
					Removed: func(d hpdi.Device) { got = append(got, d) },
				}
				r.mustOpen()
				v := r.volume("v", 64<<20)
				holds := fragment(r, v, rng, 4000)
				before, used := r.Stats(), r.on(dev)
				if used < 500 {
					t.Fatalf("only %d blocks are on the device", used)
				}
				name := fmt.Sprint("disk", dev)
				if err := r.RemoveDevice(context.Background(), name); err != nil {
					t.Fatal(err)
				}
				s := r.Stats()
				if s.Bytes >= before.Bytes || s.FreeBytes >= before.FreeBytes || s.Removal.Device != name || s.Removal.Total != used*block.Size {
					t.Errorf("before %+v, now %+v", before, s)
				}
				free := s.FreeBytes
				for r.removing() {
					if err := r.removalStep(); err != nil {
						t.Fatal(err)
					}
					if now := r.Stats(); r.remover.active() && now.Removal.Left > s.Removal.Total {
						t.Errorf("%+v", now.Removal)
					}
				}
				if s := r.Stats(); s.Removal.Device != "" || len(s.Devices) != 2 || s.FreeBytes < free-4<<20 || s.FreeBytes > free+4<<20 {
					t.Errorf("free %d before, %+v", free, s)
				}
				if want := []string{"device-removing", "device-removed"}; !slices.Equal(events, want) || len(got) != 1 {
					t.Errorf("%q, %v", events, got)
				}
				if _, err := ReadLabel(r.devs[dev]); !errors.Is(err, ondisk.ErrMagic) {
					t.Errorf("label: %v", err)
				}
				verifyBlocks(t, v, holds)
				r.mustCheck()
				r.devs = slices.Delete(r.devs, dev, dev+1)
				r.die()
				r.mustOpen()
				v, _ = r.Volume("v")
				verifyBlocks(t, v, holds)
				r.mustCheck()

				// The next device gets a number of its own.
				d := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "added", Size: 16 << 20, Seed: 5, Clock: r.clock, Direct: true})
				if err := r.AddDevice(context.Background(), d); err != nil {
					t.Fatal(err)
				}
				r.devs = append(r.devs, d)
				if l, err := ReadLabel(d); err != nil || l.Index != 3 {
					t.Errorf("%v: %+v", err, l)
				}
				fillBlocks(r, v, 500)
				r.die()
				r.mustOpen()
				r.shut()
			})
		}
	}
}

// Clients write, trim, make and delete volumes while a device is taken out, the guest
// dies and another goes on, and a scrub and a check run beside it.
func TestRemoveBesideClients(t *testing.T) {
	long(t)
	ctx := context.Background()
	for seed := range uint64(few(4)) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 6))
			r := newRig(t, 3, 48<<20)
			r.mustOpen()
			v := r.volume("v", 32<<20)
			const blocks = 3000
			holds := fragment(r, v, rng, blocks)
			if err := r.RemoveDevice(ctx, "disk1"); err != nil {
				t.Fatal(err)
			}
			deaths, total := 0, r.Stats().Removal.Total
			for n := 0; r.removing(); n++ {
				switch rng.IntN(8) {
				case 0, 1, 2:
					b, c := rng.Int64N(blocks), byte(1+rng.IntN(250))
					if err := write(v, b*block.Size, pattern(c)); err != nil {
						t.Fatal(err)
					}
					holds[b] = c
				case 3:
					b := rng.Int64N(blocks - 40)
					if err := v.Trim(ctx, b*block.Size, 40*block.Size, block.Tag{}); err != nil {
						t.Fatal(err)
					}
					for i := range int64(40) {
						holds[b+i] = 0
					}
				case 4:
					if n%50 == 0 {
						w := r.volume(fmt.Sprint("w", n), 4<<20)
						if err := write(w, 0, bytes.Repeat(pattern(7), 100)); err != nil {
							t.Fatal(err)
						}
						if err := errors.Join(r.Pool.Commit(ctx), r.DeleteVolume(ctx, fmt.Sprint("w", n))); err != nil {
							t.Fatal(err)
						}
					}
				case 5:
					if rng.IntN(40) == 0 {
						deaths++
						if r.die(); rng.IntN(2) == 0 {
							slices.Reverse(r.devs) // the order does not matter
						}
						r.mustOpen()
						v, _ = r.Volume("v")
						if s := r.Stats().Removal; r.removing() && s.Device != "" && s.State != "erases its label" && s.Total != total {
							t.Fatalf("after a takeover: %+v, it began with %d", s, total)
						}
					}
				}
				if err := r.removalStep(); err != nil {
					t.Fatal(err)
				}
				if n%200 == 0 {
					r.mustCheck()
				}
			}
			t.Logf("%d deaths", deaths)
			verifyBlocks(t, v, holds)
			r.mustCheck()
			r.devs = slices.DeleteFunc(r.devs, func(d *blocktest.Crash) bool { return d.Info().Name == "disk1" })
			r.cutPower(blocktest.CutRandom, seed)
			r.mustOpen()
			r.shut()
		})
	}
}

// Nothing that the pool needs can be removed, and nothing for which there is no room.
func TestRemoveRefused(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 3, smallest)
	r.mustOpen()
	refused := func(name string, kind error, words ...string) {
		t.Helper()
		before := r.Stats()
		err := r.RemoveDevice(ctx, name)
		if !errors.Is(err, kind) {
			t.Errorf("%v: want %v", err, kind)
		}
		for _, w := range words {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%v does not say %q", err, w)
			}
		}
		// A fold gives as many pages twins as there is room for.
		const twins = 16 * block.Size
		if now := r.Stats(); now.FreeBytes > before.FreeBytes+twins || now.FreeBytes < before.FreeBytes-twins || now.Bytes != before.Bytes {
			t.Errorf("%+v became %+v", before, now)
		}
	}
	refused("other", block.ErrNotFound, "other")
	refused("disk0", block.ErrInvalid, "disk0", "superblocks", "journal", "flush log")
	if err := r.CancelRemoval(ctx); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("%v", err)
	}
	v := r.volume("v", 1<<30)
	n := int64(0)
	for ; ; n++ {
		if err := write(v, n*block.Size, pattern(byte(n)|1)); errors.Is(err, block.ErrNoSpace) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if err := r.Pool.Commit(ctx); err != nil {
			t.Fatal(err)
		}
	}
	refused("disk1", block.ErrNoSpace, "disk1", "MiB", "add a device")
	// With what was given up there is room, after the folds that free it.
	if err := v.Trim(ctx, 0, (n-300)*block.Size, block.Tag{}); err != nil {
		t.Fatal(err)
	}
	if err := r.RemoveDevice(ctx, "disk1"); err != nil {
		t.Fatal(err)
	}
	refused("disk2", block.ErrExists, "disk1", "one at a time")
	if err := r.RemoveDevice(ctx, "disk1"); err != nil {
		t.Errorf("once more: %v", err)
	}
	r.removeRest()
	refused("disk1", block.ErrNotFound)
	if err := r.RemoveDevice(ctx, "disk2"); err != nil {
		t.Fatal(err)
	}
	r.removeRest()
	refused("disk0", block.ErrInvalid, "the only one")
	r.opensWithFirst()
}

// Clients get no room that was promised to what is moved.
func TestRemoveFromFullPool(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 3, smallest)
	r.mustOpen()
	v := r.volume("v", 1<<30)
	holds := map[int64]byte{}
	fill := func() {
		t.Helper()
		for b := int64(len(holds)); ; b++ {
			c := byte(b) | 1
			if err := write(v, b*block.Size, pattern(c)); errors.Is(err, block.ErrNoSpace) {
				return
			} else if err != nil {
				t.Fatal(err)
			}
			if holds[b] = c; b%32 == 0 {
				if err := r.Pool.Commit(ctx); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for b := range int64(1200) {
		if err := write(v, b*block.Size, pattern(byte(b)|1)); err != nil {
			t.Fatal(err)
		}
		if holds[b] = byte(b) | 1; b%64 == 0 {
			if err := r.Pool.Commit(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := r.RemoveDevice(ctx, "disk2"); err != nil {
		t.Fatal(err)
	}
	fill()
	before := len(holds)
	r.removeRest()
	if fill(); len(holds) < before {
		t.Errorf("%d blocks fitted, then %d", before, len(holds))
	}
	verifyBlocks(t, v, holds)
	r.devs = r.devs[:2]
	r.die()
	r.mustOpen()
	v, _ = r.Volume("v")
	verifyBlocks(t, v, holds)
	r.shut()
}

// A removal is cancelled somewhere on its way: the device is used as before.
func TestCancelRemoval(t *testing.T) {
	long(t)
	ctx := context.Background()
	for _, steps := range []int{0, 1, 5, 30, 60} {
		if raced && steps != 30 {
			continue
		}
		t.Run(fmt.Sprint(steps), func(t *testing.T) {
			r := newRig(t, 2, 48<<20)
			r.mustOpen()
			v := r.volume("v", 64<<20)
			holds := fragment(r, v, rand.New(rand.NewPCG(1, 7)), 4000)
			before := r.Stats()
			if err := r.RemoveDevice(ctx, "disk1"); err != nil {
				t.Fatal(err)
			}
			for range steps {
				if err := r.removalStep(); err != nil {
					t.Fatal(err)
				}
			}
			if steps == 30 {
				r.die()
				r.mustOpen()
				v, _ = r.Volume("v")
			}
			if err := r.CancelRemoval(ctx); err != nil {
				t.Fatal(err)
			}
			if err := r.Fold(ctx); err != nil {
				t.Fatal(err)
			}
			if now := r.Stats(); now.Bytes != before.Bytes || now.Removal.Device != "" || now.FreeBytes < before.FreeBytes-2<<20 {
				t.Errorf("before %+v, now %+v", before, now)
			}
			if s := r.machine.Superblock(); s.Devices[1].State != cp.DeviceUsed {
				t.Errorf("%+v", s.Devices)
			}
			used := r.on(1)
			for b := range int64(4000) {
				if err := write(v, b*block.Size, pattern(9)); err != nil {
					t.Fatal(err)
				}
				if holds[b] = 9; b%64 == 0 {
					if err := r.Pool.Commit(ctx); err != nil {
						t.Fatal(err)
					}
				}
			}
			if r.on(1) <= used {
				t.Error("nothing comes onto the device any more")
			}
			r.die()
			r.mustOpen()
			v, _ = r.Volume("v")
			verifyBlocks(t, v, holds)
			r.shut()
		})
	}
}

// A fold that is under way when a removal begins, or is cancelled, does not undo that.
func TestRemoveDuringFold(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 2, 48<<20)
	r.mustOpen()
	v := r.volume("v", 64<<20)
	begin := func() {
		t.Helper()
		for b := range int64(100) {
			if err := write(v, b*block.Size, pattern(3)); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(r.Pool.Commit(ctx), r.do(ctx, func() error {
			_, err := r.machine.Fold()
			return err
		})); err != nil || !r.machine.Folding() {
			t.Fatalf("%v, folding %v", err, r.machine.Folding())
		}
	}
	is := func(want cp.DeviceState) {
		t.Helper()
		if err := r.Fold(ctx); err != nil {
			t.Fatal(err)
		}
		if s := r.machine.Superblock(); s.Devices[1].State != want {
			t.Errorf("%v instead of %v", s.Devices[1].State, want)
		}
	}
	begin()
	if err := r.RemoveDevice(ctx, "disk1"); err != nil {
		t.Fatal(err)
	}
	is(cp.DeviceLeaving)
	begin()
	if err := r.CancelRemoval(ctx); err != nil {
		t.Fatal(err)
	}
	is(cp.DeviceUsed)
	r.shut()
}

// Errors of devices at each superblock that a removal writes: the pool goes on as before,
// and so does whoever opens it next.
func TestRemoveSuperblockFails(t *testing.T) {
	ctx := context.Background()
	errBroken := errors.New("broken")
	for _, late := range []bool{false, true} {
		r := newRig(t, 2, 48<<20)
		faults := r.faulty()
		r.mustOpen()
		v := r.volume("v", 64<<20)
		fillBlocks(r, v, 500)
		fail := func(fn func() error) {
			t.Helper()
			remove := faults[0].Add(blocktest.Rule{Op: hpdi.OpWrite, Count: 2, Err: errBroken, Late: late})
			if err := fn(); !errors.Is(err, errBroken) {
				t.Fatalf("%v", err)
			}
			remove()
		}
		before := r.Stats().Bytes
		fail(func() error { return r.RemoveDevice(ctx, "disk1") })
		if now := r.Stats(); now.Bytes != before || r.removing() {
			t.Errorf("%+v", now)
		}
		if err := r.RemoveDevice(ctx, "disk1"); err != nil {
			t.Fatal(err)
		}
		fail(func() error { return r.CancelRemoval(ctx) })
		if !r.removing() {
			t.Error("it was not cancelled, and is not going on")
		}
		failures := 0
		for r.removing() {
			if empty := r.remover.active() && r.machine.Empty(1); empty && failures == 0 || len(r.remover.gone) > 0 && failures == 1 {
				failures++
				fail(r.removalStep)
				if late {
					continue // what is on the device now is for the crash tests
				}
				r.mustCheck()
				continue
			}
			if err := r.removalStep(); err != nil {
				t.Fatal(err)
			}
		}
		if failures != 2 {
			t.Errorf("%d failures of superblocks", failures)
		}
		r.mustCheck()
		r.wrap = nil
		r.opensWithFirst()
	}
}

// A block that cannot be read keeps its device in the pool, which says so, until the
// block is written again.
func TestRemoveUnreadable(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 2, 48<<20)
	var told []string
	r.removal.Tell = func(e RemovalEvent) { told = append(told, e.Kind) }
	r.mustOpen()
	v := r.volume("v", 8<<20)
	fillBlocks(r, v, 1000)
	var at block.Physical
	bad := int64(-1)
	for b := int64(0); bad < 0; b++ {
		var p [1]block.Pointer
		if err := r.bmap.Lookup(1, block.Logical(b), p[:]); err != nil {
			t.Fatal(err)
		}
		if p[0].Phys.Device() == 1 {
			at, bad = p[0].Phys, b
		}
	}
	r.devs[1].Corrupt(int64(at.Block())*block.Size, 0x55)
	if err := r.RemoveDevice(ctx, "disk1"); err != nil {
		t.Fatal(err)
	}
	for n := 0; r.Stats().Removal.Stuck == ""; n++ {
		if err := r.removalStep(); err != nil {
			t.Fatal(err)
		}
		if n > 10_000 {
			t.Fatalf("%+v", r.Stats().Removal)
		}
	}
	if s := r.Stats().Removal; !strings.Contains(s.Stuck, "cannot be read") || s.Left > 8*block.Size {
		t.Errorf("%+v", s)
	}
	for range 200 {
		if err := r.removalStep(); err != nil {
			t.Fatal(err)
		}
	}
	if err := write(v, bad*block.Size, pattern(3)); err != nil {
		t.Fatal(err)
	}
	r.removeRest()
	if want := []string{"device-removing", "device-stuck", "device-removed"}; !slices.Equal(told, want) {
		t.Errorf("%q", told)
	}
	r.opensWithFirst()
}

// A device that was removed, and whose label could not be erased, is no part of the
// pool when it turns up again, and loses its label then.
func TestRemovedDeviceTurnsUp(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 3, 48<<20)
	faults := r.faulty()
	r.mustOpen()
	fillBlocks(r, r.volume("v", 8<<20), 1000)
	if err := r.RemoveDevice(ctx, "disk1"); err != nil {
		t.Fatal(err)
	}
	faults[1].Add(blocktest.Rule{Op: hpdi.OpWrite, Err: errors.New("broken")})
	var told string
	r.remover.o.Tell = func(e RemovalEvent) { told = e.Message }
	r.removeRest()
	if !strings.Contains(told, "could not be erased") {
		t.Error(told)
	}
	r.wrap = nil
	r.die()
	look, err := OpenView(ViewOptions{Devices: r.devices(), RegionPath: r.region, BootID: fmt.Sprint(r.boot)})
	if err != nil {
		t.Fatal(err)
	}
	if err := look.Close(); err != nil {
		t.Error(err)
	}
	r.reopenDevices()
	if _, err := ReadLabel(r.devs[1]); err != nil {
		t.Errorf("looking at it took the label away: %v", err)
	}
	r.mustOpen()
	r.mustCheck()
	r.removeRest()
	if _, err := ReadLabel(r.devs[1].Reopen()); !errors.Is(err, ondisk.ErrMagic) {
		t.Errorf("label: %v", err)
	}
	// One that says to have its number, and never had it.
	l := r.label
	l.Index, l.Device[0] = 1, l.Device[0]+1
	r.die()
	other := blocktest.NewCrash(testSize, 4)
	if err := writeLabel(other, l); err != nil {
		t.Fatal(err)
	}
	r.refused([]hpdi.Device{r.devs[0], other, r.devs[2]}, block.ErrInvalid, "number 2", "replaced")
	r.refused([]hpdi.Device{r.devs[0]}, block.ErrInvalid, "has 2 devices", "number 3 is missing")
	r.devs = slices.Delete(r.devs, 1, 2)
	r.mustOpen()
	r.shut()
}

// A pool that had a device more, and is losing another, is taken to another host: the
// removal goes on there.
func TestRemoveExported(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 3, 48<<20)
	r.mustOpen()
	v := r.volume("v", 64<<20)
	fillBlocks(r, v, 1500)
	if err := r.RemoveDevice(ctx, "disk1"); err != nil {
		t.Fatal(err)
	}
	r.removeRest()
	r.devs = slices.Delete(r.devs, 1, 2)
	if err := r.RemoveDevice(ctx, "disk2"); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if err := r.removalStep(); err != nil {
			t.Fatal(err)
		}
	}
	r.stop()
	if err := r.Export(ctx); err != nil {
		t.Fatal(err)
	}
	r.moved()
	ls, u := r.labels()
	if !r.unused() || len(u.Devices) != 3 || u.Devices[1] != (block.DeviceID{}) || u.Devices[2] != ls[1].Device {
		t.Errorf("%+v, %+v", u, ls)
	}
	if err := Adopt(r.devices(), AdoptOptions{Pool: ls[0].Pool, Name: "q", Identity: "c"}); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	r.mustOpen()
	if s := r.Stats().Removal; s.Device != "disk2" {
		t.Errorf("%+v", s)
	}
	r.removeRest()
	r.mustCheck()
	r.opensWithFirst()
}

// opensWithFirst proves that the pool is whole with its first device alone.
func (r *rig) opensWithFirst() {
	r.t.Helper()
	r.devs = r.devs[:1]
	r.die()
	r.mustOpen()
	r.shut()
}
