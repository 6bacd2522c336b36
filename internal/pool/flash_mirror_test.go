package pool

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// mirroredFlash adds flash that is a mirror of two devices, the last two of the rig's, which
// from now on is made of them whenever the pool is opened.
func (r *rig) mirroredFlash(size int64) {
	r.t.Helper()
	first := len(r.devs)
	var copies []hpdi.Device
	for i := range 2 {
		d := blocktest.NewCrashWith(blocktest.CrashOptions{Name: fmt.Sprintf("ssd%d", i), Size: size, Seed: uint64(78 + i), Clock: r.clock, Direct: true})
		r.devs = append(r.devs, d)
		copies = append(copies, d)
	}
	if _, err := mirror.Create(copies); err != nil {
		r.t.Fatal(err)
	}
	open := func(devs []*blocktest.Crash) hpdi.Device {
		copies = copies[:0]
		for _, d := range devs {
			copies = append(copies, d)
		}
		m, err := mirror.Open(mirror.Options{Devices: copies, Degraded: true})
		if err != nil {
			r.t.Fatal(err)
		}
		return m
	}
	if err := r.AddFlash(context.Background(), open(r.devs[first:]), flashSet); err != nil {
		r.t.Fatal(err)
	}
	r.gather = func() []hpdi.Device {
		var devs []hpdi.Device
		for _, d := range r.devs[:first] {
			devs = append(devs, d)
		}
		return append(devs, open(r.devs[first:]))
	}
}

// Flash that is a mirror beside disks that are none: metadata keeps twins, wherever it lies;
// what one copy of flash loses the other has, over deaths and moves in both directions; and
// the pool goes on with one.
func TestFlashMirror(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 64<<20)
	r.mustOpen()
	v := r.volume("v", 16<<20)
	const n = 256
	r.fill(v, n, 1)
	r.fold()
	r.mirroredFlash(16 << 20)
	r.pin("v")
	r.fill(v, n, 2)
	r.fold()
	if sb := r.machine.Superblock(); !sb.Twins {
		t.Fatal("pages have no twins although the disk keeps one copy")
	}
	if got := r.set.LeastCopies(0); got != 1 {
		t.Fatalf("a block of the disk has %d copies at least", got)
	}
	r.flashUntil("pinned", func(s FlashStats) bool { return len(s.Pins) == 1 && s.Pins[0].State == "whole" })
	r.die()
	// Rot in one copy of flash, everywhere but in what the mirror keeps for itself.
	for b := int64(2 * block.TrackBlocks); b < 16<<20/block.Size; b += 3 {
		r.devs[1].Corrupt(b*block.Size+17, 0x55)
	}
	r.mustOpen()
	v, err := r.Volume("v")
	if err != nil {
		t.Fatal(err)
	}
	r.wantFilled(v, n, 2)
	r.scrubAll()
	r.mustCheck()
	r.die()
	// One copy is away, and writes go on; all of it moves back from the other.
	all := r.devs
	gather := r.gather
	r.devs = slices.Delete(slices.Clone(all), 1, 2)
	r.mustOpen()
	if v, err = r.Volume("v"); err != nil {
		t.Fatal(err)
	}
	r.wantFilled(v, n, 2)
	r.fill(v, n, 3)
	r.fold()
	if err := r.EvacuateFlash(ctx, EvacuateStart); err != nil {
		t.Fatal(err)
	}
	r.flashUntil("evacuated", func(s FlashStats) bool { return s.State == FlashEvacuated })
	r.mustCheck()
	r.die()
	r.gather = gather
	r.mustOpen()
	if v, err = r.Volume("v"); err != nil {
		t.Fatal(err)
	}
	r.wantFilled(v, n, 3)
	r.shut()
}
