package mirror

import (
	"errors"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// A copy that lacks a block which its source cannot read is not in sync, and
// gets everything else meanwhile; it gets the block when the source can be read
// again.
func TestUnreadSource(t *testing.T) {
	disks := crashes(2)
	create(t, devices(disks...))
	source := blocktest.NewFault(disks[0], 1)
	w := newWorld(t, open(t, Options{Devices: []hpdi.Device{source, disks[1]}}))
	w.write(0, 1)
	w.write(block.TrackBlocks, 1)
	w.try("detach", w.m.Detach(1))
	w.write(0, 2)
	w.write(block.TrackBlocks, 2)
	disks[1] = disks[1].Reopen()
	w.try("attach", w.m.Attach(disks[1]))
	source.Add(blocktest.Rule{Op: hpdi.OpRead, Offset: base + block.Size, Length: block.Size, Err: errBroken})
	failed := 0
	for range 10 {
		done, err := w.m.Resync(2)
		if done {
			t.Fatal("done with a block that was not read")
		}
		if err != nil {
			failed++
		}
	}
	if failed == 0 || failed > 10 {
		t.Errorf("%d of 10 calls told of the block", failed)
	}
	if s := w.m.Status(); s.Copies[1].State != Resilvering || s.OldBytes != 1<<20 {
		t.Errorf("got %+v", s)
	}
	want := w.newest()
	delete(want, 1)
	alike(t, want, disks...)
	source.Clear()
	w.resync()
	alike(t, w.newest(), disks...)
}

// One bad region does not keep Resync from the others, nor from returning.
func TestUnreadSourceLast(t *testing.T) {
	disks := crashes(2)
	create(t, devices(disks...))
	source := blocktest.NewFault(disks[0], 1)
	w := newWorld(t, open(t, Options{Devices: []hpdi.Device{source, disks[1]}}))
	w.try("detach", w.m.Detach(1))
	for track := range 3 {
		w.write(track*block.TrackBlocks, 1)
	}
	disks[1] = disks[1].Reopen()
	w.try("attach", w.m.Attach(disks[1]))
	source.Add(blocktest.Rule{Op: hpdi.OpRead, Offset: base, Length: block.Size, Err: errBroken})
	for range 2 {
		_, _ = w.m.Resync(100)
	}
	if s := w.m.Status(); s.OldBytes != 1<<20 {
		t.Errorf("%d bytes are old", s.OldBytes)
	}
}

// A copy that comes back and takes no writes does not keep the mirror from being
// opened: it stays absent, and comes back when it can.
func TestReturnsMute(t *testing.T) {
	for n := range 8 {
		disks := crashes(3)
		create(t, devices(disks...))
		m := open(t, Options{Devices: devices(disks...)})
		w := newWorld(t, m)
		w.write(0, 1)
		w.try("detach", m.Detach(2))
		w.write(1, 1)
		disks = shut(t, m, disks...)
		mute := blocktest.NewFault(disks[2], 1)
		mute.Add(blocktest.Rule{Op: hpdi.OpWrite, Err: errBroken, Skip: n})
		left := 0
		m, err := Open(Options{Devices: []hpdi.Device{disks[0], disks[1], mute}, LeftOut: func(hpdi.Device, error) { left++ }})
		if err != nil {
			t.Fatalf("fails at write %d: %v", n, err)
		}
		if n == 0 && left != 1 {
			t.Error("nobody was told")
		}
		w.m = m
		w.connect()
		w.latest()
		w.write(2, 1)
		if c := m.Status().Copies; mute.Hits() > 0 && c[2].State != Absent || c[0].State != InSync || c[1].State != InSync {
			t.Errorf("fails at write %d: %+v", n, c)
		}
		if mute.Hits() > 0 {
			disks[2] = disks[2].Reopen()
			w.try("attach", m.Attach(disks[2]))
		}
		mute.Clear()
		w.resync()
		alike(t, w.newest(), disks...)
	}
}

// Another copy is lost in the middle of the return of one: that one is taken in,
// and the lost one can come back as well.
func TestLostDuringAttach(t *testing.T) {
	for _, victim := range []int{0, 1} {
		disks := crashes(3)
		create(t, devices(disks...))
		fault := blocktest.NewFault(disks[victim], 1)
		devs := devices(disks...)
		devs[victim] = fault
		w := newWorld(t, open(t, Options{Devices: devs}))
		w.write(0, 1)
		w.try("detach", w.m.Detach(2))
		w.write(1, 1)
		fault.Add(blocktest.Rule{Op: hpdi.OpWrite, Length: base, Err: errBroken}) // its header
		for _, i := range []int{2, victim} {
			disks[i] = disks[i].Reopen()
			w.try("attach", w.m.Attach(disks[i]))
			w.write(2+i, 1)
		}
		w.resync()
		alike(t, w.newest(), disks...)
	}
}

// A return that fails since no copy in sync takes the header can be tried again.
func TestAttachFails(t *testing.T) {
	disks := crashes(2)
	create(t, devices(disks...))
	fault := blocktest.NewFault(disks[0], 1)
	w := newWorld(t, open(t, Options{Devices: []hpdi.Device{fault, disks[1]}}))
	w.write(0, 1)
	w.try("detach", w.m.Detach(1))
	w.write(1, 1)
	fault.Add(blocktest.Rule{Op: hpdi.OpWrite, Length: base, Err: errBroken})
	disks[1] = disks[1].Reopen()
	if err := w.m.Attach(disks[1]); !errors.Is(err, errBroken) {
		t.Fatalf("attach: %v", err)
	}
	fault.Clear()
	disks[1] = disks[1].Reopen()
	w.try("attach", w.m.Attach(disks[1]))
	w.resync()
	alike(t, w.newest(), disks...)
}

// When the sound copy that was chosen is none at its second read, another is.
func TestReadGoodAgain(t *testing.T) {
	disks := crashes(3)
	create(t, devices(disks...))
	for fickle := range 3 {
		fault := blocktest.NewFault(disks[fickle], 1)
		devs := devices(disks...)
		devs[fickle] = fault
		m := open(t, Options{Devices: devs})
		w := newWorld(t, m)
		w.write(7, 1)
		for bad := range 3 {
			if bad == fickle {
				continue
			}
			disks[bad].Corrupt(base+7*block.Size, 1)
			fault.Add(blocktest.Rule{Op: hpdi.OpRead, Offset: base + 7*block.Size, Length: block.Size, Skip: 1, Err: errBroken})
			want := pattern(w.now, 1)
			if _, err := m.ReadGood(7*block.Size, make([]byte, block.Size), func(p []byte) bool { return string(p) == string(want) }); err != nil {
				t.Errorf("copy %d is read once, copy %d is bad: %v", fickle+1, bad+1, err)
			}
			fault.Clear()
			alike(t, w.newest(), disks...)
		}
		if err := errors.Join(w.q.Close(), m.Close()); err != nil {
			t.Fatal(err)
		}
		for i := range disks {
			disks[i] = disks[i].Reopen()
		}
	}
}

// Where nobody can tell what is right, all copies become the one that was read,
// also when all of them look right.
func TestReadGoodOld(t *testing.T) {
	disks := crashes(2)
	create(t, devices(disks...))
	m := open(t, Options{Devices: devices(disks...)})
	w := newWorld(t, m)
	w.write(0, 1)
	disks = []*blocktest.Crash{disks[0].Reopen(), disks[1].Reopen()}
	disks[0].Corrupt(base, 1)
	m = open(t, Options{Devices: devices(disks...)})
	buf := make([]byte, block.Size)
	if _, err := m.ReadGood(0, buf, func([]byte) bool { return true }); err != nil {
		t.Fatal(err)
	}
	alike(t, map[int][]byte{0: buf}, disks...)
}

// Each generation is remembered, and what is remembered decides which copies are
// too old to be used alone.
func TestRemember(t *testing.T) {
	memory := map[ID]uint64{}
	o := Options{Degraded: true, Known: func(id ID) (uint64, error) { return memory[id], nil }, Remember: func(id ID, g uint64) { memory[id] = g }}
	with := func(disks ...*blocktest.Crash) Options {
		o := o
		o.Devices = devices(disks...)
		return o
	}
	disks := crashes(2)
	create(t, devices(disks...))
	fault := blocktest.NewFault(disks[1], 1)
	od := o
	od.Devices = []hpdi.Device{disks[0], fault}
	m := open(t, od)
	w := newWorld(t, m)
	w.write(0, 1)
	fault.Add(blocktest.Rule{Op: hpdi.OpWrite, Offset: base, Err: errBroken})
	w.write(0, 1) // acknowledged without copy 2
	if got := memory[m.ID()]; got != m.Generation() || got < 2 {
		t.Fatalf("generation %d is remembered, the newest is %d", got, m.Generation())
	}
	disks = shut(t, m, disks...)
	if _, err := Open(with(disks[1])); !errors.Is(err, ErrOld) {
		t.Fatalf("only the copy that lacks a write: %v", err)
	}
	// Who accepts the loss uses it, and the other one is not taken for older.
	m = open(t, Options{Devices: devices(disks[1]), Degraded: true, Remember: o.Remember})
	disks = shut(t, m, disks...)
	var out []string
	oo := with(disks...)
	oo.LeftOut = func(d hpdi.Device, _ error) { out = append(out, d.Info().Name) }
	m = open(t, oo)
	if len(out) != 1 || out[0] != "x" || m.Status().Copies[1].State != InSync {
		t.Errorf("left out: %v; %+v", out, m.Status())
	}
	disks[1] = shut(t, m, disks...)[1]
	unknown := errors.New("damaged")
	oo.Known = func(ID) (uint64, error) { return 0, unknown }
	oo.Devices = devices(disks[1])
	if _, err := Open(oo); !errors.Is(err, unknown) {
		t.Errorf("without a copy, and nothing is known of it: %v", err)
	}
	if m, err := Open(with(disks[1])); err != nil {
		t.Error(err)
	} else {
		shut(t, m)
	}
}

// What was gone by is on all copies afterwards, and is written only where it was
// not.
func TestSettle(t *testing.T) {
	disks := crashes(3)
	create(t, devices(disks...))
	m := open(t, Options{Devices: devices(disks...)})
	w := newWorld(t, m)
	w.write(254, 4)
	w.flush()
	want := pattern(w.now, 4)
	if n, err := m.Settle(254*block.Size, want); n != 0 || err != nil {
		t.Errorf("%d copies written, %v", n, err)
	}
	disks[1].Corrupt(base+257*block.Size, 1)
	ops := disks[0].Clock().Ops()
	if n, err := m.Settle(254*block.Size, want); n != 1 || err != nil {
		t.Errorf("%d copies written, %v", n, err)
	}
	if disks[0].Clock().Ops() == ops {
		t.Error("nothing was made durable")
	}
	alike(t, w.newest(), disks...)
	if _, err := m.Settle(1, want); err == nil {
		t.Error("an offset within a block")
	}
}

// The only copy that was given does not take the header that says so: then there
// is none to go on with, although the old header counts the missing one.
func TestLastCopyMute(t *testing.T) {
	disks := crashes(2)
	create(t, devices(disks...))
	mute := blocktest.NewFault(disks[0], 1)
	mute.Add(blocktest.Rule{Op: hpdi.OpWrite, Err: errBroken})
	told := 0
	_, err := Open(Options{Devices: []hpdi.Device{mute}, Degraded: true, Remember: func(ID, uint64) { told++ }})
	if !errors.Is(err, errNoCopy) || told > 0 {
		t.Errorf("%v, remembered %d times", err, told)
	}
}
