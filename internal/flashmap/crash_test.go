package flashmap

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// lifeSteps is how much happens in a life.
const lifeSteps = 160

// life lets clients and moves do what the seed says, cuts the power at operation cut of
// the devices, and proves what is left. It returns whether the power was cut before
// the life ended. With trouble the flash device fails some requests, too, of which it
// has carried out a half, and data sets are copied in smaller pieces.
func life(t testing.TB, seed uint64, cut int64, trouble bool) (was bool, err error) {
	defer func() {
		if p, ok := recover().(problem); ok {
			err = fmt.Errorf("seed %d, cut at operation %d, trouble %t: %w", seed, cut, trouble, p.error)
		}
	}()
	primary, flash := disksOf(t, 4) // so that slots are used again soon
	clock := flash.Clock()
	fault := blocktest.NewFault(flash, seed)
	below := hpdi.Device(primary)
	if trouble {
		below = drive{primary}
	}
	f, d := attach(t, below, fault)
	w := newWorld(seed, f, d, clock.IsOff)
	if w.lax = trouble; trouble {
		fault.Add(blocktest.Rule{Probability: 0.04, Err: errBroken})
		fault.Add(blocktest.Rule{Probability: 0.04, Err: errBroken, Late: true})
	}
	clock.CutAfter(clock.Ops() + cut)
	for i := 0; i < lifeSteps && !clock.IsOff(); i++ {
		w.step()
	}
	fault.Clear()
	if !clock.IsOff() {
		w.rest()
	}
	if !clock.IsOff() {
		w.latest()
		return false, nil
	}
	for outcome := range uint64(2) {
		after(t, w, primary, flash, seed*1000+uint64(cut)*10+outcome)
	}
	return true, nil
}

// after opens what a power cut has left and proves it.
func after(t testing.TB, w *world, primary, flash *blocktest.Crash, outcome uint64) {
	clock := blocktest.NewClock()
	primary, flash = primary.CutTo(clock, blocktest.CutRandom, outcome), flash.CutTo(clock, blocktest.CutRandom, outcome)
	v := *w
	v.hist, v.done, v.wild = copyOf(w.hist), copyOf(w.done), copyOf(w.wild)
	v.busy, v.moves, v.off, v.lax = map[int]bool{}, nil, clock.IsOff, false
	open := func() {
		var err error
		v.f, err = Open(flash)
		v.try("open", err)
		v.d, err = v.f.Over(primary, Primary{Number: 3, ID: primaryID, Fixed: fixed})
		v.try("over", err)
		for _, p := range v.f.Check() {
			v.fail("check: %s", p)
		}
	}
	open()
	v.plausible()
	// What was found stays, also when it is opened once more and moved.
	primary, flash = primary.Reopen(), flash.Reopen()
	open()
	v.latest()
	e := v.f.Evacuate(0)
	for p := Moving; p != Done; {
		var err error
		p, err = e.Step()
		v.try("evacuate", err)
	}
	v.try("cancel", e.Cancel())
	v.latest()
	for set := Set(3); set < 6; set++ {
		m, err := v.f.MoveIn(3, set)
		v.try("move in", err)
		for p := Moving; p != Done; {
			p, err = m.Step()
			v.try("step", err)
		}
	}
	v.latest()
	for _, p := range v.f.Check() {
		v.fail("check: %s", p)
	}
}

func copyOf[K comparable, V any](m map[K]V) map[K]V {
	out := make(map[K]V, len(m))
	for k, v := range m {
		out[k] = v
	}
	return out
}

// Power is cut at every operation of moves in both directions under writes. What is
// read afterwards is what a power cut may leave.
func TestPowerCut(t *testing.T) {
	lives, stride := uint64(2), int64(8)
	if soak {
		lives, stride = 200, 1
	}
	first := seedOf(t)
	cuts := 0
	for seed := first; seed < first+lives; seed++ {
		for cut := 1 + int64(seed%uint64(stride)); ; cut += stride {
			was, err := life(t, seed, cut, seed%2 == 0)
			if err != nil {
				t.Fatal(err)
			}
			if !was {
				break
			}
			cuts++
		}
	}
	if cuts < 20 {
		t.Fatalf("power was cut only %d times", cuts)
	}
	t.Logf("power was cut %d times", cuts)
}

// Power is cut while a slot is filled again. Of the data set that was in it nothing is
// lost, whichever of the operations that were not made durable have come through.
func TestPowerCutReuse(t *testing.T) {
	for steps := range 2 { // when it is copied, and when that is durable
		primary, flash := disksOf(t, 1)
		f, d := attach(t, primary, flash)
		must(t, write(t, d, 10*setBlocks, 1, setBlocks))
		must(t, write(t, d, 11*setBlocks, 2, setBlocks))
		in(t, f, 10)
		must(t, write(t, d, 10*setBlocks, 3, setBlocks))
		must(t, do(t, d, &hpdi.Request{Op: hpdi.OpFlush}))
		out(t, f, 10)
		m, err := f.MoveIn(3, 11)
		must(t, err)
		copyAll(t, m)
		for range steps {
			_, err := m.Step()
			must(t, err)
		}
		for outcome := range uint64(50) {
			clock := blocktest.NewClock()
			f, d := attach(t, primary.CutTo(clock, blocktest.CutRandom, outcome), flash.CutTo(clock, blocktest.CutRandom, outcome))
			p := make([]byte, setBytes)
			must(t, do(t, d, &hpdi.Request{Op: hpdi.OpRead, Offset: 10 * setBytes, Vec: [][]byte{p}}))
			if !bytes.Equal(p, pattern(3, setBlocks)) {
				t.Fatalf("outcome %d: the data set is not what was flushed", outcome)
			}
			sound(t, f)
		}
	}
}
