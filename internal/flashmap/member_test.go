package flashmap

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// Who keeps track of what is on flash is told of what comes and goes, after the fact and
// with no locks held.
func TestOnMoved(t *testing.T) {
	primary, flash, before, _ := several(t)
	for _, at := range before.tableAt(1) {
		rot(flash, at) // data set 11 is lost
	}
	f, d := attach(t, primary, flash)
	var told []string
	f.OnMoved(func(number int, set Set, on bool) {
		told = append(told, fmt.Sprint(number, " ", set, " ", on))
		if onFlashNow(d, set) != on {
			t.Errorf("data set %d: on flash %t is not so yet", set, on)
		}
		f.Check()
		if set == 21 {
			f.OnMoved(nil)
		}
	})
	want := func(lines ...string) {
		t.Helper()
		if !slices.Equal(told, lines) {
			t.Errorf("it was told %q instead of %q", told, lines)
		}
		told = nil
	}
	m, err := f.MoveOut(3, 10)
	must(t, err)
	_, err = m.Step()
	must(t, err)
	must(t, m.Cancel())
	want()
	out(t, f, 10)
	want("3 10 false")
	must(t, discard(t, d, 11))
	for done := false; !done; {
		done, err = f.Tidy()
		must(t, err)
	}
	want("3 11 false")
	in(t, f, 10)
	in(t, f, 11)
	want("3 10 true", "3 11 true")
	must(t, discard(t, d, 11))
	for done := false; !done; {
		done, err = f.Tidy()
		must(t, err)
	}
	want("3 11 false")
	_ = evacuate(t, f, 0).Cancel()
	want("3 10 false")
	in(t, f, 21)
	in(t, f, 22)
	want("3 21 true")
	sound(t, f)
}

// A data set that is discarded whole gives its slot back without being read, and so does
// one that is discarded again after the flash device was opened anew in between.
func TestDiscardReadsNothing(t *testing.T) {
	primary, flash := disks(t)
	for _, again := range []bool{false, true} {
		disk, ssd := blocktest.NewFault(primary, 1), blocktest.NewFault(flash, 1)
		f, d := attach(t, disk, ssd)
		must(t, write(t, d, 10*setBlocks, 1, setBlocks))
		in(t, f, 10)
		must(t, discard(t, d, 10))
		if again {
			must(t, d.Close())
			must(t, f.Close())
			primary, flash = primary.Reopen(), flash.Reopen()
			disk, ssd = blocktest.NewFault(primary, 1), blocktest.NewFault(flash, 1)
			f, d = attach(t, disk, ssd)
			if done, err := f.Tidy(); !done || err != nil || !onFlashNow(d, 10) {
				t.Fatalf("what was discarded before: %t, %v", done, err)
			}
			must(t, discard(t, d, 10))
		}
		free := f.Status().Free
		for _, fault := range []*blocktest.Fault{disk, ssd} {
			fault.Add(blocktest.Rule{Op: hpdi.OpRead, Err: errBroken})
		}
		written := primary.Unflushed()
		for done := false; !done; {
			var err error
			done, err = f.Tidy()
			must(t, err)
		}
		if disk.Hits()+ssd.Hits() > 0 || primary.Unflushed() > written+1 { // a discard
			t.Errorf("again %t: %d and %d reads, %d operations at the primary", again, disk.Hits(), ssd.Hits(), primary.Unflushed()-written)
		}
		if s := f.Status(); s.Free != free+1 || onFlashNow(d, 10) {
			t.Errorf("again %t: %d slots are free instead of %d", again, s.Free, free+1)
		}
		disk.Clear()
		ssd.Clear()
		sound(t, f)
		must(t, d.Close())
		must(t, f.Close())
		primary, flash = primary.Reopen(), flash.Reopen()
	}
}

// A primary that is known is opened without a write, whether or not anything of it was
// ever moved, and also when the map has no room for all of it.
func TestKnownWritesNothing(t *testing.T) {
	_, flash := disks(t)
	primaries := map[int]*blocktest.Crash{0: blocktest.NewCrash(primarySize, 1), 1: blocktest.NewCrash(1<<40, 2), 2: blocktest.NewCrash(1<<40, 3)}
	for round := range 3 {
		f, err := Open(flash)
		must(t, err)
		for number := range len(primaries) {
			before := flash.Clock().Ops()
			d, err := f.Over(primaries[number], Primary{Number: number, ID: block.DeviceID{byte(number)}})
			must(t, err)
			if ops := flash.Clock().Ops() - before; (ops > 0) != (round == 0) {
				t.Errorf("round %d, primary device %d: %d operations", round, number, ops)
			}
			must(t, write(t, d, 9, 1, 1))
			must(t, d.Close())
			primaries[number] = primaries[number].Reopen()
		}
		must(t, f.Close())
		flash = flash.Reopen()
	}
}

// A device leaves, and another one takes its number: nothing of the first is left, in
// memory or on the flash device.
func TestForgetAndOver(t *testing.T) {
	primary, flash := disks(t)
	f, d := attach(t, primary, flash)
	for round := range byte(3) {
		must(t, write(t, d, 10*setBlocks, uint64(round)+1, 2*setBlocks))
		in(t, f, 10)
		in(t, f, 11)
		must(t, discard(t, d, 11))
		if err := f.Forget(3); !errors.Is(err, ErrBusy) {
			t.Errorf("forgotten while it is there: %v", err)
		}
		_ = evacuate(t, f, 0).Cancel()
		must(t, d.Close())
		must(t, f.Forget(3))
		other := blocktest.NewCrash(primarySize+int64(round)*setBytes, 9)
		id := block.DeviceID{8, round}
		if round == 1 { // also after a restart in between
			must(t, f.Close())
			flash = flash.Reopen()
			var err error
			f, err = Open(flash)
			must(t, err)
		}
		var err error
		d, err = f.Over(other, Primary{Number: 3, ID: id})
		must(t, err)
		if start, _ := d.NextOnFlash(0); start != other.Info().Size {
			t.Errorf("byte %d of the new device is on flash", start)
		}
		wantRead(t, d, 10*setBlocks, 0)
		sound(t, f)
		must(t, d.Close())
		must(t, f.Close())
		flash = flash.Reopen()
		f, err = Open(flash)
		must(t, err)
		if _, err := f.Over(primary.Reopen(), Primary{Number: 3, ID: primaryID}); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("the device that has left: %v", err)
		}
		d, err = f.Over(other.Reopen(), Primary{Number: 3, ID: id})
		must(t, err)
		sound(t, f)
	}
}
