package flashmap

import (
	"errors"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

func writeAt(t testing.TB, d hpdi.Device, at uint64, p []byte) error {
	t.Helper()
	return do(t, d, &hpdi.Request{Op: hpdi.OpWrite, Offset: int64(at) * block.Size, Vec: [][]byte{p}})
}

// several returns a flash device with two pages of the table, and a data set in a slot
// of each: 10 in one of the first, 11 in one of the second. Their blocks on flash hold
// write 2, on the primary write 1.
func several(t *testing.T) (primary, flash *blocktest.Crash, f *Flash, d Device) {
	t.Helper()
	clock := blocktest.NewClock()
	primary = blocktest.NewCrashWith(blocktest.CrashOptions{Name: "disk", Size: primarySize, Seed: 1, Clock: clock})
	flash = blocktest.NewCrashWith(blocktest.CrashOptions{Name: "ssd", Size: 2<<20 + (pageWords+2)*setBytes, Seed: 2, Clock: clock})
	_, err := Create(flash, CreateOptions{SetBytes: setBytes, Reach: reach, Notes: notes})
	must(t, err)
	f, d = attach(t, primary, flash)
	must(t, write(t, d, 0, 1, primarySize/block.Size))
	in(t, f, 10)
	f.setLimit(none)
	for i := range pageWords - 1 {
		f.taken.Set(i + 1) // as if others had them
	}
	in(t, f, 11)
	must(t, write(t, d, 10*setBlocks, 2, 2*setBlocks))
	if f.lookup(keyOf(3, 10)) != 0 || f.lookup(keyOf(3, 11)) != pageWords {
		t.Fatal("the data sets are elsewhere")
	}
	must(t, do(t, d, &hpdi.Request{Op: hpdi.OpFlush}))
	must(t, d.Close())
	must(t, f.Close())
	return primary.Reopen(), flash.Reopen(), f, d
}

// rot flips a bit of a block.
func rot(d *blocktest.Crash, at uint64) { d.Corrupt(int64(at)*block.Size+70, 4) }

// One place of anything may be damaged: nothing is lost, and it is mended.
func TestOnePlaceDamaged(t *testing.T) {
	primary, flash, before, _ := several(t)
	places := [][2]uint64{labelBlocks, before.tableAt(0), before.tableAt(1), before.mapAt(0)}
	for i := range 2 {
		for _, at := range places {
			rot(flash, at[i])
			f, d := attach(t, primary, flash)
			wantRead(t, d, 10*setBlocks, 2)
			wantRead(t, d, 11*setBlocks, 2)
			wantRead(t, d, 12*setBlocks, 1)
			sound(t, f)
			rot(flash, at[i])
			if n, err := f.Prove(); n != 1 || err != nil {
				t.Errorf("block %d: %d mended, %v", at[i], n, err)
			}
			sound(t, f)
			must(t, d.Close())
			must(t, f.Close())
			primary, flash = primary.Reopen(), flash.Reopen()
		}
	}
}

// A page of the table is lost at both places: exactly the data sets that it named are
// errors, until they are discarded. Then the page is written anew.
func TestTablePageLost(t *testing.T) {
	for page, lost := range map[int]Set{0: 10, 1: 11} {
		primary, flash, before, _ := several(t)
		for _, at := range before.tableAt(page) {
			rot(flash, at)
		}
		f, d := attach(t, primary, flash)
		for set := range Set(primarySize / setBytes) {
			v, err := read(t, d, int(set)*setBlocks)
			switch {
			case set == lost:
				if !errors.Is(err, ErrLost) || !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "ssd") {
					t.Errorf("read of what is lost: write %d, %v", v, err)
				}
				if err := write(t, d, int(set)*setBlocks, 3, 1); !errors.Is(err, ErrLost) {
					t.Errorf("write to what is lost: %v", err)
				}
				if err := write(t, d, int(set)*setBlocks-1, 1, 2); !errors.Is(err, ErrLost) {
					t.Errorf("write across what is lost: %v", err)
				}
			case err != nil:
				t.Errorf("data set %d: %v", set, err)
			case set == 10 || set == 11:
				if v != 2 {
					t.Errorf("data set %d holds write %d", set, v)
				}
			case v != 1:
				t.Errorf("data set %d holds write %d", set, v)
			}
		}
		s := f.Status()
		if s.Lost != 1 || s.LostPages != 1 || s.Used != 1 {
			t.Errorf("status %+v", s)
		}
		if _, err := f.MoveIn(3, 20); !errors.Is(err, ErrLost) {
			t.Errorf("a move while a page is lost: %v", err)
		}
		if _, err := f.MoveOut(3, lost); !errors.Is(err, ErrLost) {
			t.Errorf("a move of what is lost: %v", err)
		}
		if err := f.Shrink(1); !errors.Is(err, ErrLost) {
			t.Errorf("shrink while a page is lost: %v", err)
		}
		// It stays so when it is opened again, and until Tidy has come by.
		must(t, d.Close())
		must(t, f.Close())
		primary, flash = primary.Reopen(), flash.Reopen()
		f, d = attach(t, primary, flash)
		must(t, discard(t, d, lost))
		if _, err := read(t, d, int(lost)*setBlocks); !errors.Is(err, ErrLost) {
			t.Errorf("read of what was discarded and is not given up yet: %v", err)
		}
		for done := false; !done; {
			var err error
			done, err = f.Tidy()
			must(t, err)
		}
		sound(t, f)
		must(t, write(t, d, int(lost)*setBlocks, 3, 1))
		in(t, f, lost)
		wantRead(t, d, int(lost)*setBlocks, 3)
		if s := f.Status(); s.Lost != 0 || s.LostPages != 0 || s.Used != 2 || s.Free != s.Slots-2 {
			t.Errorf("status %+v", s)
		}
		must(t, d.Close())
		must(t, f.Close())
		f, d = attach(t, primary.Reopen(), flash.Reopen())
		wantRead(t, d, int(lost)*setBlocks, 3)
		sound(t, f)
	}
}

// The page of the map is lost: the table says what it said, and it is written anew.
// Is a page of the table lost as well, nobody knows what it named: all that is not
// named elsewhere, and could have been there, is an error.
func TestMapPageLost(t *testing.T) {
	for _, both := range []bool{false, true} {
		primary, flash, before, _ := several(t)
		for _, at := range before.mapAt(0) {
			rot(flash, at)
		}
		if both {
			for _, at := range before.tableAt(0) {
				rot(flash, at)
			}
		}
		for range 2 { // and when it is opened once more
			f, d := attach(t, primary, flash)
			wantRead(t, d, 11*setBlocks, 2)
			wantRead(t, d, 0, 1) // it is fixed
			wantRead(t, d, primarySize/block.Size-1, 1)
			for _, set := range []Set{10, 12} {
				v, err := read(t, d, int(set)*setBlocks)
				if both != errors.Is(err, ErrLost) || !both && v != 12-uint64(set) && v != 1 {
					t.Errorf("both %t: data set %d holds write %d, %v", both, set, v, err)
				}
			}
			if !both {
				sound(t, f)
			}
			must(t, d.Close())
			must(t, f.Close())
			primary, flash = primary.Reopen(), flash.Reopen()
		}
	}
}

// Both labels are lost: the flash device is not opened, and says why.
func TestLabelLost(t *testing.T) {
	_, flash, _, _ := several(t)
	for _, at := range labelBlocks {
		rot(flash, at)
	}
	if _, err := Open(flash); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "ssd") || !strings.Contains(err.Error(), "block 192") {
		t.Errorf("open without a label: %v", err)
	}
}

// What a newer program wrote is not touched.
func TestNewerVersion(t *testing.T) {
	_, flash, before, _ := several(t)
	l := before.label
	for kind, at := range map[ondisk.Kind]uint64{ondisk.KindFlashMap: before.mapAt(0)[1], ondisk.KindFlashTable: before.tableAt(1)[0], ondisk.KindFlash: labelBlocks[1]} {
		p := make([]byte, block.Size)
		copy(p, l.encode())
		ondisk.Seal(p, ondisk.Header{Kind: kind, Version: 2, Length: block.Size, Pool: l.id, Generation: 1})
		must(t, writeAt(t, flash, at, p))
		if _, err := Open(flash); !errors.Is(err, block.ErrUnsupported) {
			t.Errorf("a newer %s: %v", kind, err)
		}
	}
}

// Two slots say that they hold one data set: it is an error, whichever is right, until
// it is discarded.
func TestTwoSlots(t *testing.T) {
	primary, flash, before, _ := several(t)
	p := make([]byte, block.Size)
	putWord(p, 0, uint64(keyOf(3, 11)))
	encodePage(p, ondisk.KindFlashTable, before.id, 1, 100)
	putWord(p, 1, uint64(keyOf(3, 11)))
	encodePage(p, ondisk.KindFlashTable, before.id, 1, 100)
	for _, at := range before.tableAt(1) {
		must(t, writeAt(t, flash, at, p))
	}
	f, d := attach(t, primary, flash)
	wantRead(t, d, 10*setBlocks, 2)
	if v, err := read(t, d, 11*setBlocks); !errors.Is(err, ErrLost) {
		t.Errorf("it holds write %d, %v", v, err)
	}
	if problems := strings.Join(f.Check(), "\n"); !strings.Contains(problems, "data set 11 of primary device 3 is in slots") {
		t.Errorf("check says %q", problems)
	}
	e := f.Evacuate(0)
	var err error
	for p := Moving; p != Done; {
		p, err = e.Step()
	}
	if !errors.Is(err, ErrLost) || e.Left() != 2 {
		t.Errorf("evacuation: %d left, %v", e.Left(), err)
	}
	must(t, e.Cancel())
	must(t, discard(t, d, 11))
	for done := false; !done; {
		done, err = f.Tidy()
		must(t, err)
	}
	sound(t, f)
	must(t, write(t, d, 11*setBlocks, 5, 1))
	must(t, d.Close())
	must(t, f.Close())
	f, d = attach(t, primary.Reopen(), flash.Reopen())
	wantRead(t, d, 11*setBlocks, 5)
	sound(t, f)
}

// An entry that cannot be is no reason to guess.
func TestImpossibleEntry(t *testing.T) {
	primary, flash := disks(t)
	before, d := attach(t, primary, flash)
	must(t, d.Close())
	must(t, before.Close())
	flash = flash.Reopen()
	for name, k := range map[string]key{"primary": keyOf(4, 1), "high": keyOf(200, 1), "none": key(5), "set": keyOf(3, 1<<40)} {
		p := make([]byte, block.Size)
		putWord(p, 3, uint64(k))
		encodePage(p, ondisk.KindFlashTable, before.id, 0, 100)
		for _, at := range before.tableAt(0) {
			must(t, writeAt(t, flash, at, p))
		}
		if _, err := Open(flash); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "slot 3 ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, flash, before, _ = several(t)
	p := make([]byte, block.Size)
	putWord(p, 9, 1)
	encodePage(p, ondisk.KindFlashMap, before.id, 0, 100)
	must(t, writeAt(t, flash, before.mapAt(0)[0], p))
	if _, err := Open(flash); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "data set 576") {
		t.Errorf("the map names what is not there: %v", err)
	}
}

// A page that cannot be read now is not given up: it may be there again later.
func TestUnreadNow(t *testing.T) {
	primary, flash, before, _ := several(t)
	fault := blocktest.NewFault(flash, 1)
	for _, at := range before.tableAt(0) {
		fault.Add(blocktest.Rule{Op: hpdi.OpRead, Offset: int64(at) * block.Size, Length: block.Size, Err: errBroken})
	}
	f, d := attach(t, primary, fault)
	if _, err := read(t, d, 10*setBlocks); !errors.Is(err, ErrLost) {
		t.Errorf("it cannot be known where it is: %v", err)
	}
	wantRead(t, d, 11*setBlocks, 2)
	must(t, d.Close())
	must(t, f.Close())
	f, d = attach(t, primary.Reopen(), flash.Reopen())
	wantRead(t, d, 10*setBlocks, 2)
	sound(t, f)
}

var errBroken = errors.New("broken")
