package mirror

import (
	"errors"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// shut closes a mirror and returns its disks as they are found next.
func shut(t *testing.T, m *Mirror, disks ...*blocktest.Crash) []*blocktest.Crash {
	t.Helper()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	var out []*blocktest.Crash
	for _, d := range disks {
		out = append(out, d.Reopen())
	}
	return out
}

func TestOpenWithoutACopy(t *testing.T) {
	disks := crashes(2)
	create(t, devices(disks...))
	if _, err := Open(Options{Devices: devices(disks[1])}); !errors.Is(err, ErrMissing) {
		t.Fatalf("without copy 1: %v", err)
	}
	m := open(t, Options{Devices: devices(disks[1]), Degraded: true})
	generation := m.Generation()
	disks = shut(t, m, disks...)
	// The one that was missing cannot be believed from now on.
	if _, err := Open(Options{Devices: devices(disks[0]), Degraded: true, Known: func(ID) (uint64, error) { return generation, nil }}); !errors.Is(err, ErrOld) {
		t.Fatalf("only the copy that was left out, and its absence is known: %v", err)
	}
	m = open(t, Options{Devices: devices(disks...)})
	if s := m.Status(); s.Copies[0].State != Resilvering || s.Copies[1].State != InSync {
		t.Fatalf("got %+v", s)
	}
	disks = shut(t, m, disks...)
	if _, err := Open(Options{Devices: devices(disks[0]), Degraded: true}); !errors.Is(err, ErrMissing) {
		t.Fatalf("only a copy that is not resilvered: %v", err)
	}
}

// Two copies that were each used without the other are not put together.
func TestPartedWays(t *testing.T) {
	disks := crashes(2)
	create(t, devices(disks...))
	for i := range disks {
		m := open(t, Options{Devices: devices(disks[i]), Degraded: true})
		disks[i] = shut(t, m, disks[i])[0]
	}
	if _, err := Open(Options{Devices: devices(disks...)}); !errors.Is(err, block.ErrInvalid) {
		t.Fatalf("got %v", err)
	}
	m := open(t, Options{Devices: devices(disks[0])})
	spare := crashes(1)[0]
	if err := m.Replace(1, spare); err != nil {
		t.Fatal(err)
	}
	disks = shut(t, m, disks[0], disks[1], spare)
	if _, err := Open(Options{Devices: devices(disks...)}); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("with the copy that was replaced: %v", err)
	}
	m = open(t, Options{Devices: devices(disks[0], disks[2])})
	if s := m.Status(); s.Copies[1].State != Resilvering || s.OldBytes < m.Info().Size {
		t.Errorf("after a replacement: %+v", s)
	}
}

func TestOpenRefuses(t *testing.T) {
	disks := crashes(4)
	if _, err := Open(Options{Devices: devices(disks...)}); !errors.Is(err, ondisk.ErrMagic) {
		t.Errorf("no mirror: %v", err)
	}
	if _, err := Open(Options{}); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("no device: %v", err)
	}
	create(t, devices(disks[:2]...))
	create(t, devices(disks[2:]...))
	if _, err := Open(Options{Devices: devices(disks[0], disks[2])}); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("two mirrors: %v", err)
	}
	if _, err := Open(Options{Devices: devices(disks[0], disks[0], disks[1])}); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("the same twice: %v", err)
	}
	short := blocktest.NewFault(disks[1], 1)
	short.Shorten(testSize - block.Size)
	if _, err := Open(Options{Devices: []hpdi.Device{disks[0], short}}); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("a copy has shrunk: %v", err)
	}
	for _, devs := range [][]hpdi.Device{devices(disks[0]), devices(disks...), devices(blocktest.NewCrash(1<<20, 1), blocktest.NewCrash(1<<20, 2))} {
		if _, err := Create(devs); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("mirror of %d devices: %v", len(devs), err)
		}
	}
}

func TestChangesRefused(t *testing.T) {
	disks := crashes(5)
	create(t, devices(disks[:2]...))
	create(t, devices(disks[2:4]...))
	m := open(t, Options{Devices: devices(disks[:2]...)})
	if err := m.Attach(disks[2]); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("attach a copy of another mirror: %v", err)
	}
	if err := m.Attach(disks[4]); !errors.Is(err, ondisk.ErrMagic) {
		t.Errorf("attach what is no copy: %v", err)
	}
	if err := m.Replace(0, blocktest.NewCrash(testSize-block.Size, 9)); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("replace by a smaller device: %v", err)
	}
	if err := m.Replace(0, blocktest.NewCrashWith(blocktest.CrashOptions{Size: testSize, NoZeroes: true})); !errors.Is(err, block.ErrUnsupported) {
		t.Errorf("replace by a device that cannot write zeroes: %v", err)
	}
	for _, i := range []int{-1, 2} {
		if err := m.Detach(i); !errors.Is(err, block.ErrNotFound) {
			t.Errorf("detach copy %d: %v", i, err)
		}
		if err := m.Replace(i, blocktest.NewCrash(testSize, 9)); !errors.Is(err, block.ErrNotFound) {
			t.Errorf("replace copy %d: %v", i, err)
		}
	}
	if err := m.Detach(0); err != nil {
		t.Fatal(err)
	}
	if err := m.Replace(1, blocktest.NewCrash(testSize, 9)); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("replace the only copy: %v", err)
	}
	if err := m.Attach(disks[1]); !errors.Is(err, block.ErrExists) {
		t.Errorf("attach what is there: %v", err)
	}
}

// A map that a torn write has left names everything, not nothing.
func TestTornMap(t *testing.T) {
	disks := crashes(2)
	create(t, devices(disks...))
	for _, d := range disks {
		d.Corrupt(mapStart*block.Size+100, 1)
	}
	m := open(t, Options{Devices: devices(disks...)})
	if s := m.Status(); s.OldBytes < m.Info().Size {
		t.Errorf("got %+v", s)
	}
	for range 1000 {
		if done, err := m.Resync(8); err != nil {
			t.Fatal(err)
		} else if done {
			return
		}
	}
	t.Error("resilvering does not end")
}

// Who only looks changes nothing, and sees what a copy in sync holds.
func TestReadOnly(t *testing.T) {
	disks := crashes(2)
	create(t, devices(disks...))
	w := newWorld(t, open(t, Options{Devices: devices(disks...)}))
	w.write(0, 1)
	w.try("detach", w.m.Detach(0))
	w.write(0, 2)
	disks = []*blocktest.Crash{disks[0].Reopen(), disks[1].Reopen()}
	ops := disks[0].Clock().Ops()
	w.m = open(t, Options{Devices: devices(disks...), ReadOnly: true})
	w.connect()
	w.latest()
	want := pattern(w.now, 1)
	if _, err := w.m.ReadGood(0, make([]byte, len(want)), func(p []byte) bool { return string(p) == string(want) }); err != nil {
		t.Error(err)
	}
	if err := hpdi.Do(w.q, &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{want}}); !errors.Is(err, hpdi.ErrReadOnly) {
		t.Errorf("write: %v", err)
	}
	if err := errors.Join(w.q.Close(), w.m.Close()); err != nil {
		t.Error(err)
	}
	if n := disks[0].Clock().Ops() - ops; n != 0 {
		t.Errorf("%d operations have changed something", n)
	}
}

// Mirrors take the places of their first copies; what is none stays, and what
// cannot be one any more is left out.
func TestAssemble(t *testing.T) {
	disks := crashes(5)
	create(t, devices(disks[:2]...))
	create(t, devices(disks[3:]...))
	short := blocktest.NewFault(disks[1], 1)
	short.Shorten(testSize / 2)
	var out []string
	got, err := Assemble([]hpdi.Device{disks[3], disks[2], disks[0], short, disks[4]}, Options{Degraded: true, LeftOut: func(d hpdi.Device, _ error) { out = append(out, d.Info().Name) }})
	if err != nil || len(got) != 3 {
		t.Fatalf("got %d devices, %v", len(got), err)
	}
	if got[1] != hpdi.Device(disks[2]) || got[0].Info().Driver != "mirror" || got[2].Info().Driver != "mirror" {
		t.Errorf("got %v, %v, %v", got[0].Info(), got[1].Info(), got[2].Info())
	}
	if len(out) != 1 || out[0] != "y" {
		t.Errorf("left out: %v", out)
	}
	for _, d := range got {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	disks = crashes(2)
	create(t, devices(disks...))
	if _, err := Assemble(devices(disks[0]), Options{}); !errors.Is(err, ErrMissing) {
		t.Errorf("half a mirror: %v", err)
	}
}
