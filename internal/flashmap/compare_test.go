package flashmap

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// twins are a primary and a flash device, each a mirror of two, and what they are made of.
type twins struct {
	primary, flash hpdi.Device
	disks, ssds    []*blocktest.Crash
	f              *Flash
	d              Device
}

// newTwins returns twins whose readers verify what they read, as those of pools.
func newTwins(t testing.TB, o Primary) *twins {
	t.Helper()
	return twinsOf(t, primarySize, flashSize, setBytes, o)
}

// largeSets are as large as the tracks that a mirror fills as a whole.
const largeSets = block.TrackBytes

// largeTwins are twins with large data sets, of which the primary has 12.
func largeTwins(t testing.TB, o Primary) *twins {
	t.Helper()
	return twinsOf(t, 12*largeSets, 16*largeSets, largeSets, o)
}

func twinsOf(t testing.TB, primary, flash, set int64, o Primary) *twins {
	t.Helper()
	w := &twins{}
	w.primary, w.disks = mirrored(t, "ab", primary)
	w.flash, w.ssds = mirrored(t, "xy", flash)
	w.primary.(hpdi.Copies).Verified(0)
	w.flash.(hpdi.Copies).Verified(0)
	_, err := Create(w.flash, CreateOptions{SetBytes: set, Reach: reach, Notes: notes})
	must(t, err)
	w.f, err = Open(w.flash)
	must(t, err)
	o.Number, o.ID = 3, primaryID
	w.d, err = w.f.Over(w.primary, o)
	must(t, err)
	return w
}

// stepped steps a move to its end or first error.
func stepped(m *Move, err error) error {
	for p := Moving; err == nil && p != Done; {
		p, err = m.Step()
	}
	return err
}

// Rot in a copy ends a move, whichever copy it is in and wherever the data set is. It
// stays, can be read from the good copy, and moves once that was done.
func TestRotEndsMove(t *testing.T) {
	for copyNumber := range 2 {
		w := newTwins(t, Primary{})
		f, d := w.f, w.d
		must(t, write(t, d, 10*setBlocks, 1, 2*setBlocks))
		for _, back := range []bool{false, true} {
			rotten, at, name := w.disks[copyNumber], int64(10*setBlocks+5)*block.Size, "mirror of a, b"
			start := f.MoveIn
			if back {
				rotten, at, name = w.ssds[copyNumber], f.offset(f.lookup(keyOf(3, 10)))+5*block.Size, "mirror of x, y"
				start = f.MoveOut
			}
			rotten.Corrupt(block.TrackBytes+at+9, 0x55)
			m, err := start(3, 10)
			must(t, err)
			for range 2 {
				err := stepped(m, nil)
				if !errors.Is(err, ErrCopiesDiffer) || !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), fmt.Sprintf("device %s at byte %d", name, at)) {
					t.Errorf("back %t, copy %d: %v", back, copyNumber, err)
				}
			}
			if onFlashNow(d, 10) != back {
				t.Error("it was moved")
			}
			must(t, m.Cancel())
			p := make([]byte, block.Size)
			if n, err := d.(hpdi.Copies).ReadGood(int64(10*setBlocks+5)*block.Size, p, func(p []byte) bool { return bytes.Equal(p, pattern(1, 1)) }); n != 1 || err != nil {
				t.Errorf("%d repaired, %v", n, err)
			}
			m, err = start(3, 10)
			must(t, stepped(m, err))
			for b := range setBlocks {
				wantRead(t, d, 10*setBlocks+b, 1)
			}
		}
		sound(t, f)
	}
}

// An evacuation goes on with others when copies of one data set differ.
func TestEvacuateBesideRot(t *testing.T) {
	w := newTwins(t, Primary{})
	for set := range Set(4) {
		in(t, w.f, 10+set)
	}
	w.ssds[1].Corrupt(block.TrackBytes+w.f.offset(w.f.lookup(keyOf(3, 11))), 1)
	e := w.f.Evacuate(0)
	failures := 0
	for range 100 {
		if _, err := e.Step(); errors.Is(err, ErrCopiesDiffer) {
			failures++
		} else {
			must(t, err)
		}
	}
	if e.Left() != 1 || !onFlashNow(w.d, 11) || failures < 2 {
		t.Errorf("%d data sets are left, %d failures", e.Left(), failures)
	}
	must(t, e.Cancel())
	sound(t, w.f)
}

// Blocks that nobody reads may differ, those beside them may not. What is told later
// takes the place of what was told first.
func TestRotWhereUnused(t *testing.T) {
	free := int64(10*setBlocks + 5) // a block that nobody uses
	unused := func(off, n int64) bool { return off >= free*block.Size && off+n <= (free+1)*block.Size }
	for _, later := range []bool{false, true} {
		o := Primary{Unused: unused}
		if later {
			o.Unused = func(off, n int64) bool { return true }
		}
		w := newTwins(t, o)
		if later {
			w.d.(hpdi.Copies).Unused(unused)
		}
		must(t, write(t, w.d, 10*setBlocks, 1, setBlocks))
		for _, back := range []bool{false, true} {
			rotten, at, start := w.disks[1], int64(10*setBytes), w.f.MoveIn
			if back {
				rotten, at, start = w.ssds[1], w.f.offset(w.f.lookup(keyOf(3, 10))), w.f.MoveOut
			}
			for b, want := range map[int64]error{4: ErrCopiesDiffer, 6: ErrCopiesDiffer, 5: nil} {
				rotten.Corrupt(block.TrackBytes+at+b*block.Size, 1)
				m, err := start(3, 10)
				if err := stepped(m, err); !errors.Is(err, want) {
					t.Errorf("later %t, back %t, block %d: %v", later, back, b, err)
				}
				if want != nil {
					must(t, m.Cancel())
					rotten.Corrupt(block.TrackBytes+at+b*block.Size, 1)
					continue
				}
				// Moved: the other direction sees what this one has copied.
				m, err = w.f.MoveOut(3, 10)
				if back {
					m, err = w.f.MoveIn(3, 10)
				}
				must(t, stepped(m, err))
				rotten.Corrupt(block.TrackBytes+at+b*block.Size, 1)
				must(t, write(t, w.d, 10*setBlocks, 1, setBlocks))
			}
			if !back {
				in(t, w.f, 10)
			}
		}
		sound(t, w.f)
	}
}

// A copy that is away is passed over.
func TestMoveWithoutCopy(t *testing.T) {
	w := newTwins(t, Primary{})
	must(t, write(t, w.d, 10*setBlocks, 1, 2*setBlocks))
	m := w.primary.(*mirror.Mirror)
	must(t, m.Detach(0))
	w.disks[0].Corrupt(block.TrackBytes+10*setBytes, 1)
	in(t, w.f, 10)
	wantRead(t, w.d, 10*setBlocks, 1)
	must(t, w.flash.(*mirror.Mirror).Detach(1))
	out(t, w.f, 10)
	wantRead(t, w.d, 10*setBlocks, 1)
	sound(t, w.f)
}

// A copy that cannot be read is read around.
func TestMoveBesideReadError(t *testing.T) {
	primary, copies := mirrored(t, "ab", primarySize)
	must(t, primary.Close())
	fault := blocktest.NewFault(copies[0].Reopen(), 1)
	primary, err := mirror.Open(mirror.Options{Devices: []hpdi.Device{fault, copies[1].Reopen()}})
	must(t, err)
	_, flash := disks(t)
	f, d := attach(t, primary, flash)
	must(t, write(t, d, 10*setBlocks, 2, setBlocks))
	fault.Add(blocktest.Rule{Op: hpdi.OpRead, Offset: block.TrackBytes + 10*setBytes, Length: block.Size, Err: errBroken})
	in(t, f, 10)
	wantRead(t, d, 10*setBlocks, 2)
	sound(t, f)
}

// Clients write beside moves of mirrors in both directions. That copies are read at
// different moments ends no move; rot in a block that nobody writes does, each time.
func TestTrafficBesideRot(t *testing.T) {
	seed := seedOf(t)
	const owners, rounds, enough = 4, 1200, 20
	const rotten = 10*setBlocks + owners - 1 // of the one that writes nothing
	unsure := func(names string, size int64) (hpdi.Device, []*blocktest.Crash) {
		m, disks := mirrored(t, names, size)
		must(t, m.Close())
		var devs []hpdi.Device
		for i := range disks {
			disks[i] = disks[i].Reopen()
			devs = append(devs, late(disks[i]))
		}
		again, err := mirror.Open(mirror.Options{Devices: devs})
		must(t, err)
		again.Verified(0)
		return again, disks
	}
	for _, back := range []bool{false, true} {
		primary, disks := unsure("ab", primarySize)
		flash, ssds := unsure("xy", flashSize+30*setBytes)
		_, err := Create(flash, CreateOptions{SetBytes: setBytes, Reach: reach, Notes: notes})
		must(t, err)
		f, d := attach(t, primary, flash)
		if back {
			in(t, f, 10)
			ssds[1].Corrupt(block.TrackBytes+f.offset(f.lookup(keyOf(3, 10)))+(owners-1)*block.Size, 1)
		} else {
			disks[1].Corrupt(block.TrackBytes+rotten*block.Size, 1)
		}
		var moved, refused atomic.Int32
		stop := make(chan struct{})
		var clients, movers sync.WaitGroup
		for c := range owners - 1 {
			clients.Go(func() {
				more := func(n int) bool { return n < rounds || moved.Load() < enough || refused.Load() < 3 }
				if err := client(d, rand.New(rand.NewPCG(seed, uint64(c))), c, owners, more); err != nil {
					t.Error(err)
				}
			})
		}
		movers.Go(func() {
			rng := rand.New(rand.NewPCG(seed, 9))
			for {
				select {
				case <-stop:
					return
				default:
				}
				set := Set(3 + rng.IntN(worldBlocks/setBlocks-3))
				m, err := f.MoveIn(3, set)
				if err != nil {
					m, err = f.MoveOut(3, set)
				}
				must(t, err)
				for p := Moving; err == nil && p != Done; {
					if p, err = m.Step(); p == Waiting {
						<-f.Woken()
					}
				}
				switch {
				case err == nil:
					moved.Add(1)
				case set == 10 && errors.Is(err, ErrCopiesDiffer):
					refused.Add(1)
					must(t, m.Cancel())
				default:
					t.Errorf("data set %d: %v", set, err)
					must(t, m.Cancel())
				}
			}
		})
		clients.Wait()
		close(stop)
		movers.Wait()
		if onFlashNow(d, 10) != back {
			t.Error("the data set with the rotten block was moved")
		}
		sound(t, f)
	}
}

// Rot in the copy that is read first does not become all that there is.
func TestRotIsSeen(t *testing.T) { must(t, rotIsSeen(t)) }

func rotIsSeen(t testing.TB) error {
	w := newTwins(t, Primary{})
	must(t, write(t, w.d, 10*setBlocks, 1, setBlocks))
	w.disks[0].Corrupt(block.TrackBytes+10*setBytes, 0xff)
	m, err := w.f.MoveIn(3, 10)
	if stepped(m, err) != nil {
		must(t, m.Cancel())
	}
	p := make([]byte, block.Size)
	_, err = w.d.(hpdi.Copies).ReadGood(10*setBytes, p, func(p []byte) bool { return bytes.Equal(p, pattern(1, 1)) })
	return err
}
