package mirror

import (
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/stack"
)

// What is old stays marked until it was visited, however often the guest dies.
func TestOldStaysMarked(t *testing.T) {
	disks := crashes(2)
	create(t, devices(disks...))
	m := open(t, Options{Devices: devices(disks...)})
	newWorld(t, m).write(0, 1)
	for range 3 {
		// The guest dies here; the next one opens the disks.
		disks = []*blocktest.Crash{disks[0].Reopen(), disks[1].Reopen()}
		m = open(t, Options{Devices: devices(disks...)})
		if s := m.Status(); s.OldBytes != 1<<20 {
			t.Fatalf("got %+v", s)
		}
		for range 3 {
			if err := m.Tidy(); err != nil {
				t.Fatal(err)
			}
		}
	}
	w := newWorld(t, m)
	m.Verified(0) // nothing is written while it is visited
	w.resync()
	for range 2 {
		w.try("tidy", m.Tidy())
	}
	if s := m.Status(); s.OldBytes != 0 || s.MarkedBytes != 0 {
		t.Errorf("visited, and got %+v", s)
	}
}

// leaveMark writes a map that names the first region to a disk, and does not make it
// durable: the guest that did it died then.
func leaveMark(t *testing.T, m *Mirror, d *blocktest.Crash) {
	t.Helper()
	marks := stack.NewBits(m.regions())
	marks.Set(0)
	page := make([]byte, block.Size)
	encodeMapPage(page, m.id, 0, marks)
	q, err := d.NewQueue(1)
	must(t, err)
	must(t, hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Offset: mapStart * block.Size, Vec: [][]byte{page}}))
	must(t, q.Close())
}

// A mark that the dead guest left on some copies is not enough for its successor: when
// the copy that has it is lost, the others know what that one lacks.
func TestMarkOnOneCopy(t *testing.T) {
	for has := range 2 {
		for lost := range 2 {
			disks := crashes(2)
			create(t, devices(disks...))
			m := open(t, Options{Devices: devices(disks...)})
			disks = shut(t, m, disks...)
			leaveMark(t, m, disks[has])
			w := newWorld(t, open(t, Options{Devices: devices(disks...)}))
			w.try("detach", w.m.Detach(lost))
			w.write(0, 1)
			must(t, w.q.Close())
			disks = shut(t, w.m, disks...)
			w.m = open(t, Options{Devices: devices(disks...)})
			w.connect()
			w.resync()
			if s := w.m.Status(); s.Copies[lost].State != InSync {
				t.Errorf("%+v", s)
			}
			alike(t, w.newest(), disks...)
		}
	}
}

// A mark that the dead guest had not made durable is durable before its successor
// writes: what a power cut leaves different is known.
func TestMarkNotDurable(t *testing.T) {
	for n := int64(1); ; n++ {
		for seed := range uint64(8) {
			disks := crashes(2)
			create(t, devices(disks...))
			m := open(t, Options{Devices: devices(disks...)})
			disks = shut(t, m, disks...)
			for _, d := range disks {
				leaveMark(t, m, d)
			}
			w := newWorld(t, open(t, Options{Devices: devices(disks...)}))
			clock := disks[0].Clock()
			clock.CutAfter(clock.Ops() + n)
			w.dead = true // any operation may be the last
			w.write(0, 4)
			if !clock.IsOff() {
				if n < 3 {
					t.Errorf("the write has only %d operations", n)
				}
				return
			}
			after(t, w, disks, n, seed)
		}
	}
}

// hold makes a device keep the next request of a kind, to what lies behind the
// headers and the map, waiting.
func hold(f *blocktest.Fault, op hpdi.Op) (reached, release chan struct{}) {
	reached, release = make(chan struct{}), make(chan struct{})
	rule := blocktest.Rule{Op: op, Count: 1, Hold: func(*hpdi.Request) {
		close(reached)
		<-release
	}}
	if op != hpdi.OpFlush {
		rule.Offset = base
	}
	f.Add(rule)
	return reached, release
}

// A write that begins while Tidy makes the copies durable keeps its mark.
func TestWriteDuringTidy(t *testing.T) {
	disks := crashes(2)
	create(t, devices(disks...))
	fault := blocktest.NewFault(disks[0], 1)
	w := newWorld(t, open(t, Options{Devices: []hpdi.Device{fault, disks[1]}}))
	w.write(0, 1)
	w.try("tidy", w.m.Tidy()) // the region had a write
	reached, release := hold(fault, hpdi.OpFlush)
	done := make(chan error)
	go func() { done <- w.m.Tidy() }()
	<-reached
	w.write(1, 1)
	close(release)
	w.try("tidy", <-done)
	if s := w.m.Status(); s.MarkedBytes != 1<<20 {
		t.Errorf("%d bytes are marked", s.MarkedBytes)
	}
}

// A copy that comes back while a region is being visited gets it too.
func TestAttachDuringResync(t *testing.T) {
	disks := crashes(3)
	create(t, devices(disks...))
	w := newWorld(t, open(t, Options{Devices: devices(disks...)}))
	w.write(0, 1)
	w.try("detach", w.m.Detach(1))
	w.try("detach", w.m.Detach(2))
	w.write(1, 1)
	disks[1], disks[2] = disks[1].Reopen(), disks[2].Reopen()
	fault := blocktest.NewFault(disks[1], 1)
	w.try("attach", w.m.Attach(fault))
	reached, release := hold(fault, hpdi.OpWrite)
	done := make(chan error)
	go func() {
		_, err := w.m.Resync(1)
		done <- err
	}()
	<-reached
	w.try("attach", w.m.Attach(disks[2]))
	close(release)
	w.try("resync", <-done)
	w.resync()
	alike(t, w.newest(), disks...)
}

// After a crash a copy that has decayed is not copied over a sound one where the
// reader can tell them apart; where nobody can, all are made like the first.
func TestVerified(t *testing.T) {
	for _, verified := range []int64{0, 1 << 20} {
		disks := crashes(2)
		create(t, devices(disks...))
		m := open(t, Options{Devices: devices(disks...)})
		w := newWorld(t, m)
		w.write(0, 1)
		disks = []*blocktest.Crash{disks[0].Reopen(), disks[1].Reopen()}
		disks[0].Corrupt(base, 1)
		w.m = open(t, Options{Devices: devices(disks...)})
		w.m.Verified(verified)
		w.connect()
		for range 4 {
			w.read(0)
		}
		w.resync()
		want := pattern(1, 1)
		if verified > 0 {
			want[0] ^= 1
		}
		alike(t, map[int][]byte{0: want}, disks[1])
		good := func(p []byte) bool { return string(p) == string(want) }
		if _, err := w.m.ReadGood(0, make([]byte, len(want)), good); err != nil {
			t.Error(err)
		}
		alike(t, map[int][]byte{0: want}, disks...)
	}
}

// A copy is not filled with what nobody uses, but with what is written there while
// it is filled, and it is filled with everything else.
func TestUnused(t *testing.T) {
	disks := crashes(3)
	create(t, devices(disks[:2]...))
	w := newWorld(t, open(t, Options{Devices: devices(disks[:2]...)}))
	const tracks = 4
	for i := range tracks {
		w.write(i*block.TrackBlocks, 1)
	}
	w.m.Verified(block.TrackBytes)
	unused := map[int64]bool{0: true, 1: true, 2: true, 3: false} // the first is not verified
	w.m.Unused(func(off, n int64) bool {
		if off/block.TrackBytes != (off+n-1)/block.TrackBytes {
			t.Errorf("asked for %d bytes at %d", n, off)
		}
		return unused[off/block.TrackBytes]
	})
	w.try("replace", w.m.Replace(1, disks[2]))
	w.resync()
	want := map[int][]byte{}
	for i := range tracks {
		if want[i*block.TrackBlocks] = pattern(uint64(1+i), 1); i == 1 || i == 2 {
			want[i*block.TrackBlocks] = make([]byte, block.Size)
		}
	}
	alike(t, want, disks[2])
	w.write(2*block.TrackBlocks, 1)
	want[2*block.TrackBlocks] = pattern(w.now, 1)
	alike(t, want, disks[2])
	if s := w.m.Status(); s.OldBytes != 0 || s.Copies[1].State != InSync {
		t.Errorf("%+v", s)
	}
}
