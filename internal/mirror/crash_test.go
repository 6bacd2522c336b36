package mirror

import (
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/stack"
)

// life is a scenario with all that can happen to a mirror of two: writes,
// flushes, marks that are cleared, a copy that leaves, comes back and is
// resilvered, one that is replaced. It calls step between any two parts.
func life(w *world, disks []*blocktest.Crash, step func() bool) {
	parts := []func(){
		func() { w.write(0, 3); w.write(300, 2) },
		func() { w.flush(); w.write(1, 1) },
		func() { w.try("tidy", w.m.Tidy()); w.try("tidy", w.m.Tidy()) },
		func() { w.write(600, 4); w.latest() },
		func() { w.try("detach", w.m.Detach(0)) },
		func() { w.write(0, 2); w.flush(); w.write(900, 1) },
		func() { disks[0] = disks[0].Reopen(); w.try("attach", w.m.Attach(disks[0])) },
		func() { w.write(2, 1); w.write(901, 1); w.latest() },
		func() { _, err := w.m.Resync(1); w.try("resync", err); w.write(300, 1); w.flush() },
		func() { w.resync(); w.latest() },
		func() { w.try("tidy", w.m.Tidy()); w.try("tidy", w.m.Tidy()); w.try("tidy", w.m.Tidy()) },
		func() { w.try("replace", w.m.Replace(1, disks[2])) },
		func() { w.write(5, 1); w.write(302, 1); w.latest() },
		func() { w.resync(); w.flush(); w.try("tidy", w.m.Tidy()) },
		func() { w.write(600, 1); w.latest() },
	}
	for _, part := range parts {
		if !step() {
			return
		}
		part()
	}
}

// Power is cut at every single operation of the scenario. What is read
// afterwards is what a power cut may leave, and stays what it is whichever copy
// is lost next.
func TestPowerCut(t *testing.T) {
	for n := int64(1); ; n++ {
		disks := crashes(3)
		clock := disks[0].Clock()
		create(t, devices(disks[:2]...))
		begin := clock.Ops()
		m := open(t, Options{Devices: devices(disks[:2]...)})
		w := newWorld(t, m)
		clock.CutAfter(begin + n)
		cut := clock.IsOff
		w.dead = true // any operation may be the last
		life(w, disks, func() bool { return !cut() })
		if !cut() {
			if n < 100 {
				t.Fatalf("the scenario has only %d operations", n)
			}
			t.Logf("%d operations", n)
			return
		}
		for seed := range uint64(3) {
			after(t, w, disks, n, seed)
		}
	}
}

// The guest dies at every single operation of the scenario. Its successor closes the
// mirror; then each copy that was in sync is taken alone by whoever remembers the
// newest generation.
func TestDeathAndOneCopy(t *testing.T) {
	for n, done := int64(1), false; !done; n++ {
		disks := crashes(3)
		create(t, devices(disks[:2]...))
		known := uint64(0)
		remember := func(_ ID, generation uint64) { known = generation }
		clock := disks[0].Clock()
		w := newWorld(t, open(t, Options{Devices: devices(disks[:2]...), Remember: remember}))
		clock.CutAfter(clock.Ops() + n)
		w.dead = true // any operation may be the last
		cut := clock.IsOff
		life(w, disks, func() bool { return !cut() })
		done = !cut()
		clock = blocktest.NewClock()
		var left []*blocktest.Crash
		for _, d := range disks {
			left = append(left, d.CutTo(clock, blocktest.KeepAll, uint64(n))) // only the guest died
		}
		left = members(t, left)
		m, err := Open(Options{Devices: devices(left...), Degraded: true, Remember: remember, Known: func(ID) (uint64, error) { return known, nil }})
		if err != nil {
			t.Fatalf("death at operation %d: %v", n, err)
		}
		s := m.Status()
		left = shut(t, m, left...)
		for _, d := range left {
			f, err := readHeader(d)
			if err != nil {
				t.Fatal(err)
			}
			state := s.Copies[f.index].State
			must(t, f.disk.queues.Release())
			d = d.Reopen()
			m, err := Open(Options{Devices: devices(d), Degraded: true, ReadOnly: true, Known: func(ID) (uint64, error) { return known, nil }})
			if (err == nil) != (state == InSync) {
				t.Fatalf("death at operation %d, copy %d is %v: alone %v", n, f.index+1, state, err)
			}
			if err == nil {
				must(t, m.Close())
			}
		}
	}
}

// after opens what a power cut has left and proves it.
func after(t *testing.T, w *world, disks []*blocktest.Crash, n int64, seed uint64) {
	t.Helper()
	clock := blocktest.NewClock()
	var left []*blocktest.Crash
	for _, d := range disks {
		left = append(left, d.CutTo(clock, blocktest.CutRandom, seed*1000+uint64(n)))
	}
	left = members(t, left)
	m, err := Open(Options{Devices: devices(left...), Degraded: true})
	if err != nil {
		t.Fatalf("cut at operation %d, seed %d: %v", n, seed, err)
	}
	v := &world{t: t, m: m, now: w.now, hist: w.hist, done: w.done, flushed: w.flushed}
	v.connect()
	seen := v.plausible()
	if n%2 == 0 {
		// The preferred copy is lost before anything was resilvered: what was
		// seen is on the other.
		if i := m.sources(false)[0]; m.Detach(i) == nil {
			left = append(left[:0:0], present(m, left)...)
		}
		for b, p := range seen {
			if got := v.read(b); string(got) != string(p) {
				t.Fatalf("cut at operation %d, seed %d: block %d changed when a copy was lost", n, seed, b)
			}
		}
	}
	v.resync()
	for i, c := range m.Status().Copies {
		if c.State == Resilvering {
			t.Fatalf("copy %d is still being resilvered", i)
		}
	}
	alike(t, seen, present(m, left)...)
	if err := v.q.Close(); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
}

// members returns the disks that the newest header names.
func members(t *testing.T, disks []*blocktest.Crash) (out []*blocktest.Crash) {
	t.Helper()
	var newest *found
	var own []*found
	for _, d := range disks {
		f, err := readHeader(d)
		if err != nil {
			continue
		}
		own = append(own, f)
		if newest == nil || f.generation > newest.generation {
			newest = f
		}
	}
	for _, f := range own {
		for _, c := range newest.copies {
			if c.id == f.copies[f.index].id {
				out = append(out, f.disk.dev.(*blocktest.Crash))
			}
		}
	}
	return out
}

// present returns the disks that hold copies which are there.
func present(m *Mirror, disks []*blocktest.Crash) (out []*blocktest.Crash) {
	for _, c := range m.copies {
		if d := c.present(); d != nil {
			for _, x := range disks {
				if hpdi.Device(x) == d.dev {
					out = append(out, x)
				}
			}
		}
	}
	return out
}

// What a copy keeps of the mirror itself decays: it is found, counted and written anew,
// and after that the copy is taken alone.
func TestProveOwn(t *testing.T) {
	for victim := range 2 {
		disks := crashes(2)
		create(t, devices(disks...))
		known := uint64(0)
		m := open(t, Options{Devices: devices(disks...), Remember: func(_ ID, generation uint64) { known = generation }})
		w := newWorld(t, m)
		w.write(3, 1)
		must(t, m.Detach(1-victim))
		disks[1-victim] = disks[1-victim].Reopen()
		must(t, m.Attach(disks[1-victim]))
		w.resync()
		w.write(700, 1)
		if n, err := m.ProveOwn(); n != 0 || err != nil {
			t.Fatalf("nothing is wrong: %d, %v", n, err)
		}
		slot := headerSlots[m.copies[victim].disk.Load().slot]
		for _, b := range []uint64{slot, mapStart} {
			disks[victim].Corrupt(int64(b)*block.Size+100, 0x10)
		}
		if n, err := m.ProveOwn(); n != 2 || err != nil {
			t.Errorf("copy %d: %d blocks, %v", victim+1, n, err)
		}
		if n, err := m.ProveOwn(); n != 0 || err != nil {
			t.Errorf("copy %d, once more: %d blocks, %v", victim+1, n, err)
		}
		// A map that lacks a mark is whole and wrong.
		page := make([]byte, block.Size)
		encodeMapPage(page, m.id, 0, stack.NewBits(m.regions()))
		must(t, writeBlock(m.copies[victim].disk.Load(), mapStart, page))
		if n, err := m.ProveOwn(); n != 1 || err != nil {
			t.Errorf("copy %d, marks gone: %d blocks, %v", victim+1, n, err)
		}
		w.latest()
		must(t, w.q.Close())
		disks = shut(t, m, disks...)
		m = open(t, Options{Devices: devices(disks[victim]), Degraded: true, Known: func(ID) (uint64, error) { return known, nil }})
		if m.old.Next(0) < 0 {
			t.Error("the map names no region")
		}
		w.m = m
		w.connect()
		w.latest()
	}
}
