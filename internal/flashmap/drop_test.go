package flashmap

import (
	"errors"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// TestDrop gives up a primary with all that it has on flash, with the power cut at each
// operation: whoever opens the flash device again drops it once more, if it is known still,
// and finds all slots free, and nothing of it when another device gets its number.
func TestDrop(t *testing.T) {
	seed := seedOf(t)
	for cut := int64(0); ; cut++ {
		primary, flash := disks(t)
		f, d := attach(t, primary, flash)
		for set := Set(3); set < 7; set++ {
			must(t, write(t, d, int(set)*setBlocks, uint64(set), 1))
			in(t, f, set)
		}
		must(t, d.Close())
		flash.Clock().CutAfter(flash.Clock().Ops() + cut)
		err := f.Drop(3)
		through, off := err == nil, flash.Clock().IsOff()
		if through {
			if s := f.Status(); s.Used != 0 || s.Free != s.Slots {
				t.Fatalf("cut %d: %d slots are used, %d of %d free", cut, s.Used, s.Free, s.Slots)
			}
		}
		for outcome := range uint64(4) {
			flash := flash.CutTo(blocktest.NewClock(), blocktest.CutRandom, seed+outcome)
			f, err := Open(flash)
			must(t, err)
			if p := f.Check(); len(p) > 0 {
				t.Fatalf("cut %d, seed %d: %v", cut, seed, p)
			}
			switch err := f.Drop(3); {
			case err == nil && through:
				t.Fatalf("cut %d, seed %d: it is known still", cut, seed)
			case err != nil && !errors.Is(err, block.ErrNotFound):
				t.Fatalf("cut %d, seed %d: %v", cut, seed, err)
			}
			if s := f.Status(); s.Used != 0 || s.Free != s.Slots {
				t.Fatalf("cut %d, seed %d: %d slots are used, %d of %d free", cut, seed, s.Used, s.Free, s.Slots)
			}
			other := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "other", Size: primarySize, Seed: 3, Clock: flash.Clock()})
			o, err := f.Over(other, Primary{Number: 3, ID: block.DeviceID{8}, Fixed: fixed})
			must(t, err)
			if on, _ := o.NextOnFlash(0); on != primarySize {
				t.Fatalf("cut %d, seed %d: byte %d of another device is on flash", cut, seed, on)
			}
			for set := Set(3); set < 7; set++ {
				must(t, write(t, o, int(set)*setBlocks, 50+uint64(set), 1))
				in(t, f, set)
				wantRead(t, o, int(set)*setBlocks, 50+uint64(set))
			}
			if p := f.Check(); len(p) > 0 {
				t.Fatalf("cut %d, seed %d: %v", cut, seed, p)
			}
		}
		if through && !off {
			return
		}
	}
}

// TestDropRefused refuses to drop what is in use, or not there.
func TestDropRefused(t *testing.T) {
	primary, flash := disks(t)
	f, d := attach(t, primary, flash)
	if err := f.Drop(3); !errors.Is(err, ErrBusy) {
		t.Fatal(err)
	}
	for _, n := range []int{-1, 4, MaxPrimaries} {
		if err := f.Drop(n); !errors.Is(err, block.ErrNotFound) {
			t.Fatal(n, err)
		}
	}
	raw, err := d.Detach()
	must(t, err)
	if raw != primary {
		t.Fatal("another device was detached")
	}
	must(t, f.Drop(3))
}
