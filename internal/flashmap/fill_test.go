package flashmap

import (
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// filled lets a mirror fill a copy that was replaced to its end.
func filled(t testing.TB, dev hpdi.Device) {
	t.Helper()
	m := dev.(*mirror.Mirror)
	for done := false; !done; {
		var err error
		done, err = m.Resync(8)
		must(t, err)
	}
}

// A copy of a mirrored flash device is filled with all but free slots; of a primary with
// all that is not on flash.
func TestFillPassesOver(t *testing.T) {
	const size, slots, sets, per = largeSets, 6, 12, largeSets / block.Size
	w := largeTwins(t, Primary{})
	f, d, primary, flash := w.f, w.d, w.primary, w.flash
	d.(hpdi.Copies).Unused(func(off, n int64) bool { return off >= 2*size && off+n <= 3*size })
	must(t, write(t, d, 0, 7, sets*per))
	for set := range Set(slots) {
		m, err := f.MoveIn(3, 4+set)
		through(t, m, err)
	}
	for set := range Set(2) { // these leave what they held in slots that are free
		m, err := f.MoveOut(3, 5+set)
		through(t, m, err)
	}
	must(t, write(t, d, 4*per, 8, 2*per))
	disk, ssd := blocktest.NewCrash((sets+1)*size, 5), blocktest.NewCrash(17*size, 6)
	must(t, primary.(*mirror.Mirror).Replace(1, disk))
	must(t, flash.(*mirror.Mirror).Replace(1, ssd))
	filled(t, primary)
	filled(t, flash)
	first := func(dev *blocktest.Crash, at int64) byte {
		p := make([]byte, block.Size)
		must(t, do(t, dev, &hpdi.Request{Op: hpdi.OpRead, Offset: block.TrackBytes + at, Vec: [][]byte{p}}))
		return p[0]
	}
	for set := range Set(sets) {
		want := byte(7)
		switch {
		case onSet(f, d, set), set == 2:
			want = 0 // passed over
		case set == 5:
			want = 8
		}
		if got := first(disk, int64(set)*size); got != want {
			t.Errorf("the new copy of the primary holds write %d of data set %d instead of %d", got, set, want)
		}
	}
	used := 0
	for slot, k := range f.keys {
		if !f.label.valid(slotNumber(slot)) {
			continue
		}
		want := byte(0)
		if k != 0 {
			used++
			if want = 7; k.set() == 4 {
				want = 8
			}
		}
		if got := first(ssd, f.offset(slotNumber(slot))); got != want {
			t.Errorf("the new copy of the flash device holds write %d in slot %d instead of %d", got, slot, want)
		}
	}
	if used != slots-2 {
		t.Errorf("%d slots are in use", used)
	}
	// All that counts can be read from the new copies alone.
	must(t, primary.(*mirror.Mirror).Detach(0))
	must(t, flash.(*mirror.Mirror).Detach(0))
	sound(t, f)
	for set := range sets {
		if set != 2 {
			want := uint64(7)
			if set == 4 || set == 5 {
				want = 8
			}
			wantRead(t, d, set*per, want)
		}
	}
	if f.Unused(0, block.Size) || f.Unused(15*size, 2*size) || f.Unused(f.offset(0), 0) {
		t.Error("what is no slot is unused")
	}
}

func onSet(f *Flash, d Device, set Set) bool {
	on, _ := d.OnFlash(int64(set) << f.shift)
	return on
}

// A copy that comes back while data sets are moved gets what had been copied before.
func TestFillBesideMove(t *testing.T) { must(t, fillBesideMove(t)) }

func fillBesideMove(t testing.TB) error {
	const set, per = 10, largeSets / block.Size
	for _, back := range []bool{false, true} {
		for steps := range 3 { // nothing, copied, and durable
			w := largeTwins(t, Primary{})
			must(t, write(t, w.d, set*per, 1, per))
			m, err := w.f.MoveIn(3, set)
			to := w.flash.(*mirror.Mirror)
			if back {
				through(t, m, err)
				must(t, write(t, w.d, set*per, 2, per))
				m, err = w.f.MoveOut(3, set)
				to = w.primary.(*mirror.Mirror)
			}
			must(t, err)
			must(t, to.Detach(1))
			for range steps {
				_, err := m.Step()
				must(t, err)
			}
			must(t, to.Replace(1, blocktest.NewCrash(to.Info().Size+block.TrackBytes, 5)))
			filled(t, to)
			through(t, m, nil)
			must(t, to.Detach(0))
			for b := range per {
				want := uint64(1)
				if back {
					want = 2
				}
				if v, err := read(t, w.d, set*per+b); v != want || err != nil {
					return fmt.Errorf("back %t, after %d steps: the copy that came holds write %d, %v", back, steps, v, err)
				}
			}
			sound(t, w.f)
		}
	}
	return nil
}

// Copies of both mirrors are replaced and filled again and again while clients write and
// data sets come and go; whichever copy answers, clients find what they wrote last.
func TestFillBesideTraffic(t *testing.T) {
	seed := seedOf(t)
	const clients, rounds, enough = 3, 400, 3
	w := largeTwins(t, Primary{})
	var fills atomic.Int32
	var moved atomic.Int32
	stop := make(chan struct{})
	var writers, others sync.WaitGroup
	for c := range clients {
		writers.Go(func() {
			more := func(n int) bool { return n < rounds || fills.Load() < enough || moved.Load() < enough }
			if err := client(w.d, rand.New(rand.NewPCG(seed, uint64(c))), c, clients, more); err != nil {
				t.Error(err)
			}
		})
	}
	others.Go(func() { churn(w.f, 3, math.MaxInt32, &moved, stop) }) // of which clients use the first
	others.Go(func() {
		for i := 0; ; i++ {
			for _, dev := range []hpdi.Device{w.primary, w.flash} {
				m := dev.(*mirror.Mirror)
				must(t, m.Replace(i%2, blocktest.NewCrash(m.Info().Size+block.TrackBytes, uint64(i))))
				for done := false; !done; {
					select {
					case <-stop:
						return
					default:
					}
					var err error
					if done, err = m.Resync(1); err != nil {
						t.Errorf("fill: %v", err)
						return
					}
					w.f.Check()
				}
			}
			fills.Add(1)
		}
	})
	writers.Wait()
	close(stop)
	others.Wait()
	for done := false; !done; {
		var err error
		done, err = w.f.Tidy()
		must(t, err)
	}
	filled(t, w.primary)
	filled(t, w.flash)
	sound(t, w.f)
}

// Pages of a mirrored flash device whose copies a power cut has left different are read
// alike ever after, whichever copy is there; and so are notes.
func TestPowerCutMirrored(t *testing.T) {
	seed := seedOf(t)
	stride := int64(5)
	if soak {
		stride = 1
	}
	cuts := 0
	for cut := 1 + int64(seed%uint64(stride)); ; cut += stride {
		flash, ssds := mirrored(t, "xy", flashSize)
		flash.(hpdi.Copies).Verified(0)
		primary := blocktest.NewCrash(primarySize, 1)
		_, err := Create(flash, CreateOptions{SetBytes: setBytes, Reach: reach, Notes: notes})
		must(t, err)
		f, d := attach(t, primary, flash)
		must(t, write(t, d, 10*setBlocks, 1, 4*setBlocks))
		must(t, do(t, d, &hpdi.Request{Op: hpdi.OpFlush}))
		must(t, note(f, NotePolicy, content(1, 5000)))
		ssds[0].Clock().CutAfter(ssds[0].Clock().Ops() + cut)
		err = nil
		for i := 0; i < 4 && err == nil; i++ {
			m, e := f.MoveIn(3, 10+Set(i))
			if i == 3 {
				m, e = f.MoveOut(3, 10)
			}
			if err = stepped(m, e); err == nil {
				err = note(f, NotePolicy, content(uint64(i)+2, 5000))
			}
		}
		if !ssds[0].Clock().IsOff() {
			must(t, err)
			break
		}
		cuts++
		for outcome := range uint64(3) {
			clock := blocktest.NewClock()
			primary := primary.CutTo(blocktest.NewClock(), blocktest.CutRandom, outcome)
			var left []hpdi.Device
			for i := range ssds {
				left = append(left, ssds[i].CutTo(clock, blocktest.CutRandom, seed+outcome*10+uint64(i)))
			}
			if err := alike(t, primary, left); err != nil {
				t.Fatalf("cut %d, outcome %d: %v", cut, outcome, err)
			}
		}
	}
	if cuts < 4 {
		t.Errorf("power was cut %d times", cuts)
	}
}

// alike opens a mirrored flash device with both copies, then with each of them alone, and
// compares what it says.
func alike(t testing.TB, primary *blocktest.Crash, ssds []hpdi.Device) error {
	var said []string
	for _, which := range [][]int{{0, 1}, {0}, {1}} {
		var devs []hpdi.Device
		for _, i := range which {
			devs = append(devs, ssds[i].(*blocktest.Crash).Reopen())
		}
		if len(which) > 1 {
			ssds = devs
		} else {
			// A copy, so that the other one can be opened alone, too.
			clock := blocktest.NewClock()
			devs[0] = ssds[which[0]].(*blocktest.Crash).CutTo(clock, blocktest.KeepAll, 0)
		}
		m, err := mirror.Open(mirror.Options{Devices: devs, Degraded: true})
		if err != nil {
			return err
		}
		m.Verified(0)
		f, err := Open(m)
		if err != nil {
			return fmt.Errorf("copies %v: %w", which, err)
		}
		d, err := f.Over(primary.Reopen(), Primary{Number: 3, ID: primaryID, Fixed: fixed})
		if err != nil {
			return fmt.Errorf("copies %v: %w", which, err)
		}
		if problems := f.Check(); len(problems) > 0 {
			return fmt.Errorf("copies %v: %q", which, problems)
		}
		p, err := f.ReadNote(NotePolicy)
		if err != nil {
			return fmt.Errorf("copies %v: %w", which, err)
		}
		says := fmt.Sprintf("note %x", p[:4])
		for set := Set(10); set < 14; set++ {
			says += fmt.Sprintf(", data set %d on flash: %t", set, onFlashNow(d, set))
			wantRead(t, d, int(set)*setBlocks, 1)
		}
		said = append(said, says)
	}
	if said[1] != said[0] || said[2] != said[0] {
		return fmt.Errorf("it says %q", said)
	}
	return nil
}
