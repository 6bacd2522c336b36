package mirror

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

var errBroken = errors.New("broken")

// One copy fails for good at any of its requests, in turn: nobody notices,
// nothing is lost, and when it comes back it gets what it lacks.
func TestCopyFails(t *testing.T) {
	for _, copies := range []int{2, 3} {
		for victim := range copies {
			t.Run(fmt.Sprintf("%d of %d", victim+1, copies), func(t *testing.T) {
				for n := 0; failAt(t, copies, victim, n); n++ {
				}
			})
		}
	}
}

// failAt runs a life in which the victim fails at its request n, and reports
// whether it came to that.
func failAt(t *testing.T, copies, victim, n int) bool {
	disks := crashes(copies)
	create(t, devices(disks...))
	devs := devices(disks...)
	fault := blocktest.NewFault(disks[victim], uint64(n))
	devs[victim] = fault
	m := open(t, Options{Devices: devs})
	w := newWorld(t, m)
	fault.Add(blocktest.Rule{Err: errBroken, Skip: n})
	w.write(0, 3)
	w.write(300, 2)
	w.latest()
	w.flush()
	for range 3 {
		w.try("tidy", m.Tidy())
	}
	w.write(1, 1)
	w.write(700, 1)
	w.latest()
	if fault.Hits() == 0 {
		return false
	}
	if m.copies[victim].is(Absent) {
		w.write(2, 1)
		disks[victim] = disks[victim].Reopen()
		w.try("attach", m.Attach(disks[victim]))
		w.write(301, 1)
		w.resync()
	} else {
		fault.Clear() // it failed to be read, and was mended
	}
	w.latest()
	for i, c := range m.copies {
		if !c.is(InSync) {
			t.Fatalf("failed at request %d: copy %d is %v", n, i, State(c.state.Load()))
		}
	}
	alike(t, w.newest(), disks...)
	if err := errors.Join(w.q.Close(), m.Close()); err != nil {
		t.Fatal(err)
	}
	return true
}

// newest returns what each block holds.
func (w *world) newest() map[int][]byte {
	out := map[int][]byte{}
	for b, v := range w.done {
		out[b] = pattern(v, 1)
	}
	return out
}

// When no copy takes a write the client is told, nobody is left out, and what is
// read afterwards is the same whoever is asked.
func TestAllCopiesFail(t *testing.T) {
	disks := crashes(2)
	create(t, devices(disks...))
	faults := []*blocktest.Fault{blocktest.NewFault(disks[0], 1), blocktest.NewFault(disks[1], 2)}
	m := open(t, Options{Devices: devices(faults...)})
	w := newWorld(t, m)
	w.write(0, 1)
	w.flush()
	// The first takes the data and the second does not; then the first cannot
	// tell that it is alone.
	faults[1].Add(blocktest.Rule{Op: hpdi.OpWrite, Err: errBroken})
	faults[0].Add(blocktest.Rule{Op: hpdi.OpWrite, Err: errBroken, Offset: 0, Length: base})
	r := &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{pattern(99, 1)}}
	if err := hpdi.Do(w.q, r); !errors.Is(err, errBroken) || !errors.Is(err, errNoCopy) {
		t.Fatalf("write without a copy: %v", err)
	}
	for _, f := range faults {
		f.Clear()
	}
	first := w.read(0)
	for range 10 {
		if got := w.read(0); string(got) != string(first) {
			t.Fatalf("block 0 holds write %d, and then %d", binary.LittleEndian.Uint64(first), binary.LittleEndian.Uint64(got))
		}
	}
	alike(t, map[int][]byte{0: first}, disks...)
	w.write(0, 1)
	w.latest()
}

// A range that one copy cannot read is read from another and written again.
func TestReadError(t *testing.T) {
	disks := crashes(2)
	create(t, devices(disks...))
	fault := blocktest.NewFault(disks[0], 1)
	m := open(t, Options{Devices: []hpdi.Device{fault, disks[1]}})
	w := newWorld(t, m)
	w.write(0, 8)
	fault.Add(blocktest.Rule{Op: hpdi.OpRead, Err: errBroken, Offset: base + 2*block.Size, Length: block.Size})
	w.latest()
	for range 4 {
		w.read(2)
	}
	w.latest()
	s := m.Status().Copies[0]
	if s.State != InSync || s.ReadErrors == 0 || s.Repaired == 0 {
		t.Errorf("got %+v", s)
	}
	// With the other copy gone there is nothing to read around to.
	if err := m.Detach(1); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, block.Size)
	err := hpdi.Do(w.q, &hpdi.Request{Op: hpdi.OpRead, Offset: 2 * block.Size, Vec: [][]byte{p}})
	if !errors.Is(err, errBroken) {
		t.Errorf("read of a block that no copy has: %v", err)
	}
	if err := m.Detach(0); !errors.Is(err, errNoCopy) {
		t.Errorf("the last copy was detached: %v", err)
	}
}

// Who knows the right content finds the copy that has it, and the others are
// repaired.
func TestReadGood(t *testing.T) {
	for bad := range 3 {
		disks := crashes(3)
		create(t, devices(disks...))
		m := open(t, Options{Devices: devices(disks...)})
		w := newWorld(t, m)
		w.write(7, 1)
		want := pattern(w.now, 1)
		good := func(p []byte) bool { return string(p) == string(want) }
		for i := range bad {
			disks[i].Corrupt(base+7*block.Size+int64(100*i), 0x40)
		}
		buf := make([]byte, block.Size)
		n, err := m.ReadGood(7*block.Size, buf, good)
		if err != nil || n != bad || !good(buf) {
			t.Fatalf("with %d bad copies: %d repaired, %v", bad, n, err)
		}
		alike(t, w.newest(), disks...)
	}
	disks := crashes(2)
	create(t, devices(disks...))
	m := open(t, Options{Devices: devices(disks...)})
	w := newWorld(t, m)
	w.write(7, 1)
	_, err := m.ReadGood(7*block.Size, make([]byte, block.Size), func([]byte) bool { return false })
	if !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("no good copy: %v", err)
	}
	w.latest() // and nothing was changed
	if _, err := m.ReadGood(255*block.Size, make([]byte, 2*block.Size), nil); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("across a track: %v", err)
	}
}

// A copy that was away for a moment is resilvered where something changed, and
// nowhere else.
func TestShortAbsence(t *testing.T) {
	disks := crashes(2)
	create(t, devices(disks...))
	m := open(t, Options{Devices: devices(disks...)})
	w := newWorld(t, m)
	for b := 0; b < 1024; b += 256 {
		w.write(b, 1)
	}
	for range 3 {
		w.try("tidy", m.Tidy())
	}
	if s := m.Status(); s.MarkedBytes != 0 {
		t.Fatalf("%d bytes are marked at rest", s.MarkedBytes)
	}
	w.try("detach", m.Detach(1))
	w.write(256, 2)
	for range 3 {
		w.try("tidy", m.Tidy())
	}
	if s := m.Status(); s.MarkedBytes != 1<<20 {
		t.Fatalf("%d bytes are marked while a copy is absent", s.MarkedBytes)
	}
	disks[1] = disks[1].Reopen()
	w.try("attach", m.Attach(disks[1]))
	if s := m.Status(); s.OldBytes != 1<<20 || s.Copies[1].State != Resilvering {
		t.Fatalf("got %+v", s)
	}
	w.resync()
	if s := m.Status(); s.OldBytes != 0 || s.Copies[1].State != InSync {
		t.Fatalf("got %+v", s)
	}
	alike(t, w.newest(), disks...)
}

// A copy that is lost in the middle of a replacement stays lost.
func TestLostDuringReplace(t *testing.T) {
	disks := crashes(4)
	create(t, devices(disks[:3]...))
	fault := blocktest.NewFault(disks[2], 1)
	m := open(t, Options{Devices: []hpdi.Device{disks[0], disks[1], fault}})
	w := newWorld(t, m)
	w.write(0, 1)
	fault.Add(blocktest.Rule{Op: hpdi.OpWrite, Offset: mapStart * block.Size, Length: block.Size, Err: errBroken})
	if err := m.Replace(0, disks[3]); err != nil {
		t.Fatal(err)
	}
	var states []State
	for _, c := range m.Status().Copies {
		states = append(states, c.State)
	}
	if want := []State{Resilvering, InSync, Absent}; !slices.Equal(states, want) {
		t.Fatalf("got %v, want %v", states, want)
	}
	w.write(1, 1)
	w.resync()
	alike(t, w.newest(), disks[3], disks[1])
}

// A certain copy is read as it is, unless it is away or need not be right.
func TestReadCopy(t *testing.T) {
	disks := crashes(2)
	create(t, devices(disks...))
	m := open(t, Options{Devices: devices(disks...)})
	w := newWorld(t, m)
	w.write(7, 1)
	want := pattern(w.now, 1)
	disks[1].Corrupt(base+7*block.Size, 0x40)
	buf := make([]byte, block.Size)
	if err := m.ReadCopy(0, 7*block.Size, buf); err != nil || string(buf) != string(want) {
		t.Errorf("copy 1: %v", err)
	}
	if err := m.ReadCopy(1, 7*block.Size, buf); err != nil || string(buf) == string(want) {
		t.Errorf("copy 2 is not read as it is: %v", err)
	}
	if n := m.NumCopies(); n != 2 {
		t.Errorf("%d copies", n)
	}
	if err := m.ReadCopy(2, 0, buf); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("copy 3 of 2: %v", err)
	}
	m.distrust(7*block.Size, block.Size)
	if err := m.ReadCopy(0, 7*block.Size, buf); !errors.Is(err, hpdi.ErrNoCopy) {
		t.Errorf("copies that may differ: %v", err)
	}
	m.Verified(0)
	if err := m.ReadCopy(0, 7*block.Size, buf); err != nil {
		t.Errorf("where the reader decides: %v", err)
	}
	if err := m.Detach(1); err != nil {
		t.Fatal(err)
	}
	if err := m.ReadCopy(1, 7*block.Size, buf); !errors.Is(err, hpdi.ErrNoCopy) {
		t.Errorf("a copy that is away: %v", err)
	}
}
