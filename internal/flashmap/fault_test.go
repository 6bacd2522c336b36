package flashmap

import (
	"errors"
	"fmt"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// troubled lets clients and moves do what the seed says on a flash device that spoils
// requests by a rule. No block may ever read as something that it does not hold; when
// the device works again, nothing is left of the trouble.
func troubled(t testing.TB, seed uint64, rule blocktest.Rule) (hits int, err error) {
	defer func() {
		if p, ok := recover().(problem); ok {
			err = fmt.Errorf("seed %d, %s after %d: %w", seed, rule.Op, rule.Skip, p.error)
		}
	}()
	primary, flash := disks(t)
	fault := blocktest.NewFault(flash, seed)
	f, d := attach(t, primary, fault)
	w := newWorld(seed, f, d, flash.Clock().IsOff)
	w.lax = true
	fault.Add(rule)
	for range lifeSteps / 2 {
		w.step()
	}
	hits = fault.Hits()
	fault.Clear()
	for range lifeSteps / 4 {
		w.step()
	}
	// Tidy ends what it had begun, and moves end.
	for done := false; !done; {
		var err error
		done, err = f.Tidy()
		w.try("tidy", err)
	}
	for i := 0; len(w.moves) > 0; i++ {
		w.reap()
		if w.push(); i > 1000 {
			w.fail("moves do not end: %v", w.moves[0].key)
		}
	}
	w.rest()
	w.lax = false
	_, err = f.Tidy()
	w.try("tidy", err)
	w.latest()
	for _, p := range f.Check() {
		w.fail("check: %s", p)
	}
	w.write(false)
	w.flush()
	w.rest()
	w.latest()
	return hits, nil
}

// Each request of the flash device fails in turn, once or from then on, with or
// without having been carried out.
func TestFlashFails(t *testing.T) {
	seed := seedOf(t)
	for _, op := range []hpdi.Op{hpdi.OpRead, hpdi.OpWrite, hpdi.OpFlush} {
		for skip, hit := 0, true; hit; skip += 1 + skip {
			hit = false
			for i, rule := range []blocktest.Rule{{Count: 1}, {Count: 5, Late: true}, {}} {
				rule.Op, rule.Skip, rule.Err = op, skip, errBroken
				hits, err := troubled(t, seed+uint64(10*skip+i), rule)
				if err != nil {
					t.Fatal(err)
				}
				hit = hit || hits > 0
			}
		}
	}
}

// While the flash device is gone, what is on it fails and says so, nothing else does,
// and a flush that has nothing to do there goes well.
func TestFlashGone(t *testing.T) {
	primary, flash := disks(t)
	fault := blocktest.NewFault(flash, 1)
	f, d := attach(t, primary, fault)
	must(t, write(t, d, 0, 1, worldBlocks))
	in(t, f, 10)
	must(t, do(t, d, &hpdi.Request{Op: hpdi.OpFlush}))
	fault.Add(blocktest.Rule{Err: errBroken})
	if _, err := read(t, d, 10*setBlocks); !errors.Is(err, ErrFailed) || !errors.Is(err, errBroken) {
		t.Errorf("read: %v", err)
	}
	if err := write(t, d, 10*setBlocks, 2, 1); !errors.Is(err, ErrFailed) {
		t.Errorf("write: %v", err)
	}
	must(t, write(t, d, 9*setBlocks, 2, setBlocks))
	wantRead(t, d, 9*setBlocks, 2)
	must(t, do(t, d, &hpdi.Request{Op: hpdi.OpFlush}))
	m, err := f.MoveIn(3, 9)
	must(t, err)
	for p := Moving; err == nil && p != Done; {
		p, err = m.Step()
	}
	if !errors.Is(err, ErrFailed) {
		t.Errorf("a move: %v", err)
	}
	must(t, m.Cancel())
	e := f.Evacuate(0)
	if _, err := e.Step(); !errors.Is(err, ErrFailed) {
		t.Errorf("an evacuation: %v", err)
	}
	must(t, e.Cancel())
	if _, err := f.Over(blocktest.NewCrash(primarySize, 9), Primary{Number: 7}); !errors.Is(err, ErrFailed) {
		t.Errorf("one more primary: %v", err)
	}
	if _, err := f.MoveIn(3, 9); !errors.Is(err, ErrFailed) {
		t.Errorf("a move after the label was not written: %v", err)
	}
	if _, err := f.Tidy(); !errors.Is(err, ErrFailed) {
		t.Errorf("tidy: %v", err)
	}
	fault.Clear()
	_, err = f.Tidy()
	must(t, err)
	wantRead(t, d, 10*setBlocks, 1)
	in(t, f, 9)
	sound(t, f)
}

// When the table cannot be written, nobody writes to the data set that was on the way
// until it is known where it is; all others, and reads of it, go on.
func TestTableInDoubt(t *testing.T) {
	primary, flash := disks(t)
	fault := blocktest.NewFault(flash, 1)
	f, d := attach(t, primary, fault)
	must(t, write(t, d, 0, 1, worldBlocks))
	for _, back := range []bool{false, true} {
		m, err := f.MoveIn(3, 10)
		if back {
			m, err = f.MoveOut(3, 10)
		}
		must(t, err)
		remove := fault.Add(blocktest.Rule{Op: hpdi.OpWrite, Offset: int64(f.tableAt(0)[0]) * block.Size, Length: block.Size, Err: errBroken, Late: true})
		remove2 := fault.Add(blocktest.Rule{Op: hpdi.OpWrite, Offset: int64(f.tableAt(0)[1]) * block.Size, Length: block.Size, Err: errBroken, Late: true})
		for p := Moving; err == nil && p != Done; {
			p, err = m.Step()
		}
		if !errors.Is(err, ErrFailed) || f.Status().Failure == nil {
			t.Fatalf("the table was not written: %v", err)
		}
		if err := write(t, d, 10*setBlocks, 2, 1); !errors.Is(err, ErrFailed) {
			t.Errorf("write in doubt: %v", err)
		}
		if err := m.Cancel(); !errors.Is(err, ErrFailed) {
			t.Errorf("cancel in doubt: %v", err)
		}
		wantRead(t, d, 10*setBlocks, 1)
		must(t, write(t, d, 9*setBlocks, 2, 1))
		if _, err := f.MoveIn(3, 8); !errors.Is(err, ErrFailed) {
			t.Errorf("another move: %v", err)
		}
		remove()
		remove2()
		through(t, m, nil)
		if onFlashNow(d, 10) == back || f.Status().Failure != nil {
			t.Error("the move did not end")
		}
		must(t, write(t, d, 10*setBlocks, 3, 1))
		wantRead(t, d, 10*setBlocks, 3)
		must(t, write(t, d, 10*setBlocks, 1, 1))
	}
	sound(t, f)
}

// What cannot be made one when the flash device is opened keeps it from taking more.
func TestNotSettled(t *testing.T) {
	primary, flash, before, _ := several(t)
	rot(flash, before.tableAt(0)[0])
	fault := blocktest.NewFault(flash, 1)
	fault.Add(blocktest.Rule{Op: hpdi.OpWrite, Err: errBroken})
	f, err := Open(fault)
	must(t, err)
	d, err := f.Over(primary, Primary{Number: 3, ID: primaryID})
	must(t, err)
	wantRead(t, d, 10*setBlocks, 2)
	fault.Clear()
	if _, err := f.MoveIn(3, 20); !errors.Is(err, ErrFailed) || f.Status().Failure == nil {
		t.Errorf("a move: %v", err)
	}
	out(t, f, 10)
	done, err := f.Tidy()
	if err != nil || !done || f.Status().Failure != nil {
		t.Errorf("when it works again: %v, %v, %v", done, err, f.Status().Failure)
	}
	in(t, f, 21)
	out(t, f, 21)
	sound(t, f)
	must(t, d.Close())
	must(t, f.Close())
	f, _ = attach(t, primary.Reopen(), flash.Reopen())
	in(t, f, 20)
	sound(t, f)
}

// A queue of the flash device that cannot be opened, or breaks, disturbs nobody who
// does not need it.
func TestBrokenQueue(t *testing.T) {
	primary, flash := disks(t)
	f, d := attach(t, primary, flash)
	must(t, write(t, d, 0, 1, worldBlocks))
	in(t, f, 10)
	q, err := d.NewQueue(4)
	must(t, err)
	must(t, flash.Close()) // submitting to it fails, and so does opening a queue
	late, err := d.NewQueue(4)
	must(t, err)
	for name, q := range map[string]hpdi.Queue{"open": q, "late": late} {
		p := make([]byte, block.Size)
		if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: 10 * setBytes, Vec: [][]byte{p}}); err == nil {
			t.Errorf("%s: read from a closed device", name)
		}
		must(t, hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: 9 * setBytes, Vec: [][]byte{p}}))
		if p[0] != 1 {
			t.Errorf("%s: write %d", name, p[0])
		}
		_ = q.Close() // that of the closed device fails
	}
}

// A page that is new counts only when both of its places have taken it: one of them may
// hold what it was in an earlier life, of a higher generation.
func TestNewPageAtOnePlace(t *testing.T) {
	primary, flash := disks(t)
	f, d := attach(t, primary, flash)
	in(t, f, 10)
	in(t, f, 11)
	out(t, f, 11)
	out(t, f, 10)
	must(t, d.Close())
	must(t, f.Forget(3))
	must(t, f.Close())
	for i := range 2 {
		fault := blocktest.NewFault(flash.Reopen(), 1)
		fault.Add(blocktest.Rule{Op: hpdi.OpWrite, Offset: int64(f.mapAt(0)[i]) * block.Size, Length: block.Size, Err: errBroken})
		again, err := Open(fault)
		must(t, err)
		if _, err := again.Over(primary.Reopen(), Primary{Number: 4}); !errors.Is(err, ErrFailed) {
			t.Errorf("place %d: %v", i, err)
		}
		fault.Clear()
		if _, err := again.Over(primary.Reopen(), Primary{Number: 4}); err != nil {
			t.Errorf("place %d, a second time: %v", i, err)
		}
		must(t, again.Close())
		again, err = Open(flash.Reopen())
		must(t, err)
		sound(t, again)
		must(t, again.Forget(4))
		must(t, again.Close())
	}
}
