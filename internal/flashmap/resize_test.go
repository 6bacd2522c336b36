package flashmap

import (
	"errors"
	"fmt"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// evacuate moves everything back but what is in the first slots.
func evacuate(t testing.TB, f *Flash, keep int) *Evacuation {
	t.Helper()
	e := f.Evacuate(keep)
	for range 10000 {
		left := e.Left()
		p, err := e.Step()
		must(t, err)
		if now := e.Left(); now > left {
			t.Fatalf("%d data sets are left after %d", now, left)
		}
		if p == Done {
			return e
		}
	}
	t.Fatal("the evacuation does not end")
	return nil
}

// A flash device grows with its device, is emptied in part, and shrinks, again and
// again; what is on it stays.
func TestResize(t *testing.T) {
	primary, flash := disks(t)
	f, d := attach(t, primary, flash)
	must(t, write(t, d, 0, 1, primarySize/block.Size))
	reopen := func(size int64) {
		must(t, d.Close())
		must(t, f.Close())
		primary, flash = primary.Reopen(), flash.Resize(size)
		f, d = attach(t, primary, flash)
	}
	for set := range Set(8) {
		in(t, f, 10+set)
	}
	must(t, write(t, d, 10*setBlocks, 2, 8*setBlocks))
	if n, err := f.Grow(); n != 0 || err != nil {
		t.Errorf("it has grown by %d slots, %v, without room", n, err)
	}
	for round := range 4 {
		size := int64(flashSize + (10+10*int64(round))*setBytes)
		reopen(size)
		may := f.Status().Grown
		n, err := f.Grow()
		if n < 8 || n != may || err != nil {
			t.Fatalf("it has grown by %d slots of %d, %v", n, may, err)
		}
		if n, err := f.Grow(); n != 0 || err != nil {
			t.Errorf("it has grown by %d slots more, %v", n, err)
		}
		for set := range Set(n) {
			in(t, f, 20+set)
		}
		must(t, write(t, d, 20*setBlocks, 3, n*setBlocks))
		if _, err := f.MoveIn(3, 70); !errors.Is(err, ErrFull) {
			t.Errorf("more slots than there are: %v", err)
		}
		sound(t, f)
		reopen(size)
		sound(t, f)
		if err := f.Shrink(8); !errors.Is(err, ErrBusy) {
			t.Errorf("shrink of what is in use: %v", err)
		}
		e := evacuate(t, f, 8)
		if e.Total() != n || e.Left() != 0 {
			t.Errorf("%d of %d data sets are left, there were %d", e.Left(), e.Total(), n)
		}
		if s := f.Status(); s.Used != 8 || s.Free != 0 {
			t.Errorf("status %+v", s)
		}
		must(t, f.Shrink(8))
		must(t, e.Cancel())
		sound(t, f)
		if s := f.Status(); s.Slots != 8 || s.Used != 8 || s.Free != 0 {
			t.Errorf("status %+v", s)
		}
		for b := 10 * setBlocks; b < (20+n)*setBlocks; b += setBlocks - 1 {
			want := uint64(1)
			if b < 18*setBlocks {
				want = 2
			} else if b >= 20*setBlocks {
				want = 3
			}
			wantRead(t, d, b, want)
		}
		reopen(f.End())
		wantRead(t, d, 10*setBlocks, 2)
		sound(t, f)
	}
	for _, keep := range []int{0, -1, 8, 100} {
		if err := f.Shrink(keep); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("shrink to %d of 8 slots: %v", keep, err)
		}
	}
	evacuate(t, f, 3)
	must(t, f.Shrink(3))
	reopen(f.End())
	sound(t, f)
	if s := f.Status(); s.Slots != 3 || s.Used != 3 {
		t.Errorf("status %+v", s)
	}
	wantRead(t, d, 10*setBlocks, 2)
}

// A primary grows, and gets pages of the map where there are some.
func TestPrimaryGrows(t *testing.T) {
	clock := blocktest.NewClock()
	flash := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "ssd", Size: flashSize, Seed: 2, Clock: clock})
	_, err := Create(flash, CreateOptions{SetBytes: setBytes, Reach: reach, Notes: notes})
	must(t, err)
	a, b := blocktest.NewCrashWith(blocktest.CrashOptions{Size: primarySize, Seed: 3, Clock: clock}), blocktest.NewCrashWith(blocktest.CrashOptions{Size: primarySize, Seed: 4, Clock: clock})
	for round := range 3 {
		f, err := Open(flash)
		must(t, err)
		da, err := f.Over(a, Primary{Number: 3, ID: primaryID})
		must(t, err)
		db, err := f.Over(b, Primary{Number: 0, ID: block.DeviceID{1}})
		must(t, err)
		last := Set(a.Info().Size>>16 - 1)
		must(t, write(t, da, int(last)*setBlocks, uint64(round)+1, 1))
		m, err := f.MoveIn(3, last)
		through(t, m, err)
		m, err = f.MoveIn(0, Set(round))
		through(t, m, err)
		sound(t, f)
		wantRead(t, da, int(last)*setBlocks, uint64(round)+1)
		wantRead(t, da, primarySize/setBytes*setBlocks-setBlocks, 1)
		if s := f.Status(); s.Used != 2*round+2 {
			t.Errorf("status %+v", s)
		}
		must(t, errors.Join(da.Close(), db.Close(), f.Close()))
		a, b, flash = a.Resize(primarySize+int64(round+1)*pageSets*setBytes), b.Reopen(), flash.Reopen()
	}
}

// Power is cut at every operation of what changes the label. Whatever was before or
// after counts, and nothing of what is on flash is lost.
func TestPowerCutResize(t *testing.T) {
	stride := int64(3)
	if soak {
		stride = 1
	}
	for n := int64(1); ; n += stride {
		primary, flash := disks(t)
		f, d := attach(t, primary, flash)
		must(t, write(t, d, 10*setBlocks, 2, 8*setBlocks))
		for set := range Set(3) {
			in(t, f, 10+set)
		}
		must(t, do(t, d, &hpdi.Request{Op: hpdi.OpFlush}))
		must(t, d.Close())
		must(t, f.Close())
		primary, flash = primary.Reopen(), flash.Resize(flashSize+20*setBytes)
		f, err := Open(flash)
		must(t, err)
		flash.Clock().CutAfter(flash.Clock().Ops() + n)
		steps := []func() error{
			func() error { _, err := f.Grow(); return err },
			func() error { d, err = f.Over(primary, Primary{Number: 3, ID: primaryID, Fixed: fixed}); return err },
			func() error {
				_, err := f.Over(blocktest.NewCrash(primarySize, 9), Primary{Number: 5, ID: block.DeviceID{2}})
				return err
			},
			func() error {
				e := f.Evacuate(2)
				for p := Moving; p != Done; {
					if p, err = e.Step(); err != nil {
						return err
					}
				}
				return nil
			},
			func() error { return f.Shrink(2) },
		}
		for _, step := range steps {
			if err = step(); err != nil {
				break
			}
		}
		cut := flash.Clock().IsOff()
		if (err != nil) != cut {
			t.Fatalf("power is off: %t; %v", cut, err)
		}
		for seed := range uint64(2) {
			clock := blocktest.NewClock()
			primary, flash := primary.CutTo(clock, blocktest.CutRandom, seed*1000+uint64(n)), flash.CutTo(clock, blocktest.CutRandom, seed*1000+uint64(n))
			if err := resized(t, primary, flash); err != nil {
				t.Fatalf("cut at operation %d, seed %d: %v", n, seed, err)
			}
		}
		if !cut {
			return
		}
	}
}

// resized proves a flash device that may have been resized.
func resized(t *testing.T, primary, flash *blocktest.Crash) error {
	f, err := Open(flash)
	if err != nil {
		return err
	}
	d, err := f.Over(primary, Primary{Number: 3, ID: primaryID, Fixed: fixed})
	if err != nil {
		return err
	}
	if problems := f.Check(); len(problems) > 0 {
		return fmt.Errorf("%q", problems)
	}
	for b := 10 * setBlocks; b < 18*setBlocks; b++ {
		wantRead(t, d, b, 2)
	}
	return nil
}
