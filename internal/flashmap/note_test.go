package flashmap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// content returns n bytes that say which note they are.
func content(version uint64, n int) []byte {
	p := make([]byte, n+8)
	rng := rand.New(rand.NewPCG(version, uint64(n)))
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], rng.Uint64())
	}
	return p[:n]
}

// note writes a note to its end.
func note(f *Flash, kind Note, p []byte) error {
	w, err := f.WriteNote(kind, p)
	for done := false; err == nil && !done; {
		done, err = w.Step()
	}
	return err
}

func wantNote(t testing.TB, f *Flash, kind Note, want []byte) {
	t.Helper()
	if got, err := f.ReadNote(kind); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%v: %d bytes, %v; want %d", kind, len(got), err, len(want))
	}
}

// noteDevice returns a flash device with room for so many bytes of what was collected.
func noteDevice(t testing.TB, n int64) *blocktest.Crash {
	t.Helper()
	flash := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "ssd", Size: 2<<20 + 2*(n+block.Size-1)/block.Size*block.Size, Seed: 2, Clock: blocktest.NewClock()})
	_, err := Create(flash, CreateOptions{SetBytes: setBytes, Reach: reach, Notes: n})
	must(t, err)
	return flash
}

// Notes of all lengths are what was written, again and again, also after the flash
// device was opened anew, has grown and shrunk, and beside data sets.
func TestNotes(t *testing.T) {
	const most = 700<<10 + 5*block.Size
	primary, _ := disks(t)
	flash := noteDevice(t, most-9)
	f, d := attach(t, primary, flash)
	in(t, f, 10)
	must(t, write(t, d, 10*setBlocks, 1, setBlocks))
	for kind, limit := range map[Note]int{NotePolicy: policyBlocks * block.Size, NoteAccess: most} {
		if n := f.NoteLimit(kind); n != limit {
			t.Errorf("%v may have %d bytes", kind, n)
		}
		if _, err := f.ReadNote(kind); !errors.Is(err, block.ErrNotFound) || !strings.Contains(err.Error(), "never written") {
			t.Errorf("%v before it was written: %v", kind, err)
		}
		if _, err := f.WriteNote(kind, make([]byte, limit+1)); !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), fmt.Sprint(limit)) {
			t.Errorf("%v of %d bytes: %v", kind, limit+1, err)
		}
		for i, n := range []int{0, 1, block.Size - 1, block.Size, noteStep - 1, noteStep + 1, limit} {
			p := content(uint64(i), min(n, limit))
			must(t, note(f, kind, p))
			wantNote(t, f, kind, p)
		}
	}
	wantRead(t, d, 10*setBlocks, 1)
	sound(t, f)
	must(t, d.Close())
	must(t, f.Close())
	flash = flash.Resize(flash.Info().Size + 20*setBytes)
	f, d = attach(t, primary.Reopen(), flash)
	_, err := f.Grow()
	must(t, err)
	e := evacuate(t, f, 1)
	must(t, f.Shrink(1))
	must(t, e.Cancel())
	wantNote(t, f, NotePolicy, content(6, policyBlocks*block.Size))
	wantNote(t, f, NoteAccess, content(6, most))
	wantRead(t, d, 10*setBlocks, 1)
	sound(t, f)
	other, err := Open(readOnly{flash.Reopen()})
	must(t, err)
	wantNote(t, other, NoteAccess, content(6, most))
	if _, err := other.WriteNote(NotePolicy, nil); !errors.Is(err, hpdi.ErrReadOnly) {
		t.Errorf("write to what is open for reading only: %v", err)
	}
	// What is made anew has no notes of what was before.
	flash = flash.Reopen()
	_, err = Create(flash, CreateOptions{SetBytes: setBytes, Reach: reach, Notes: most})
	must(t, err)
	f, err = Open(flash)
	must(t, err)
	for kind := range noteCount {
		if _, err := f.ReadNote(kind); !errors.Is(err, block.ErrNotFound) || strings.Contains(err.Error(), "damaged") {
			t.Errorf("%v of an earlier flash device: %v", kind, err)
		}
	}
}

// What is kept for notes follows the size of the device, and leaves room for data.
func TestNoteRoom(t *testing.T) {
	const mib = 1 << 20
	for size, want := range map[int64]int64{
		mib: 0, mib + setBytes: 0, 2 * mib: mib/16 - block.Size, 9 * mib: mib/2 - block.Size, 64 * mib: mib, 256 * mib: mib,
		1 << 30: 4 * mib, 16 << 30: 64 * mib, 1 << 40: 64 * mib,
	} {
		if got := int64(CreateOptions{}.notesOf(size)) * block.Size; got != want {
			t.Errorf("a device of %d bytes keeps %d for notes instead of %d", size, got, want)
		}
	}
	if got := (CreateOptions{Notes: block.Size + 1}).notesOf(mib); got != 2 {
		t.Errorf("%d blocks", got)
	}
	for _, size := range []int64{flashSize, 4 * mib} {
		flash := blocktest.NewCrash(size, 1)
		_, err := Create(flash, CreateOptions{SetBytes: setBytes, Reach: reach})
		must(t, err)
		f, err := Open(flash)
		must(t, err)
		if s := f.Status(); int64(s.Slots)*setBytes < (size-mib)/2 {
			t.Errorf("of %d bytes %d slots are left", size, s.Slots)
		}
		must(t, note(f, NoteAccess, content(1, f.NoteLimit(NoteAccess))))
		sound(t, f)
	}
	// Without room nothing is written, least of all to what lies there.
	_, flash := disks(t)
	f, err := Open(flash)
	must(t, err)
	f.label.notes = 0
	if _, err := f.ReadNote(NoteAccess); f.NoteLimit(NoteAccess) != 0 || !errors.Is(err, block.ErrNotFound) {
		t.Errorf("there is room for %d bytes, %v", f.NoteLimit(NoteAccess), err)
	}
	if err := note(f, NoteAccess, nil); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("a note without room: %v", err)
	}
	must(t, note(f, NotePolicy, content(1, 100)))
	for name, o := range map[string]CreateOptions{
		"room": {SetBytes: setBytes, Reach: reach, Notes: 2 * mib}, "negative": {SetBytes: setBytes, Reach: reach, Notes: -1},
		"huge": {SetBytes: setBytes, Reach: reach, Notes: maxNotes + 1},
	} {
		if _, err := Create(blocktest.NewCrash(4*mib, 1), o); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A place that is damaged, at its header or anywhere else, leaves the other one; both
// leave none, and say so. What is written then is whole.
func TestNoteDamaged(t *testing.T) {
	const n = 2*noteStep + 100
	flash := noteDevice(t, n)
	open := func() *Flash {
		t.Helper()
		f, err := Open(flash)
		must(t, err)
		return f
	}
	f := open()
	must(t, note(f, NoteAccess, content(1, n)))
	must(t, note(f, NoteAccess, content(2, n)))
	places, blocks := f.noteAt(NoteAccess)
	for _, at := range []uint64{0, 1, 30, uint64(blocks)} {
		for newest, version := range []uint64{1, 2} { // the second one is at place 1
			rot(flash, places[newest]+at)
			wantNote(t, open(), NoteAccess, content(3-version, n))
			rot(flash, places[newest]+at)
		}
		rot(flash, places[0]+at)
		rot(flash, places[1]+at)
		f := open()
		if _, err := f.ReadNote(NoteAccess); !errors.Is(err, block.ErrNotFound) || !strings.Contains(err.Error(), "damaged") || errors.Is(err, ErrFailed) {
			t.Errorf("block %d of both places damaged: %v", at, err)
		}
		rot(flash, places[0]+at)
		rot(flash, places[1]+at)
	}
	// What is written goes over the damaged one.
	rot(flash, places[1])
	must(t, note(open(), NoteAccess, content(3, n)))
	rot(flash, places[1])
	rot(flash, places[1]+1)
	wantNote(t, open(), NoteAccess, content(1, n))
	rot(flash, places[1]+1)
	must(t, note(open(), NoteAccess, content(4, n)))
	wantNote(t, open(), NoteAccess, content(4, n))
	// A header that a newer program wrote is not touched.
	p := exampleNote()
	ondisk.Seal(p, ondisk.Header{Kind: ondisk.KindFlashNote, Version: noteVersion + 1, Length: block.Size, Pool: f.ID(), Generation: 9})
	must(t, writeAt(t, flash, places[0], p))
	if err := note(open(), NoteAccess, content(5, n)); !errors.Is(err, block.ErrUnsupported) {
		t.Errorf("over a newer one: %v", err)
	}
}

// A device that fails is no reason to say that there is no note, and what could not be
// written can be tried again.
func TestNoteFails(t *testing.T) {
	const n = noteStep + 100
	flash := noteDevice(t, n)
	fault := blocktest.NewFault(flash, 1)
	f, err := Open(fault)
	must(t, err)
	must(t, note(f, NoteAccess, content(1, n)))
	version := uint64(1)
	for _, op := range []hpdi.Op{hpdi.OpWrite, hpdi.OpFlush} {
		for skip := range 3 {
			for _, late := range []bool{false, true} {
				fault.Add(blocktest.Rule{Op: op, Skip: skip, Count: 1, Err: errBroken, Late: late})
				w, err := f.WriteNote(NoteAccess, content(version+1, n))
				must(t, err)
				failures := 0
				for done := false; !done; {
					if done, err = w.Step(); err != nil {
						if failures++; !errors.Is(err, ErrFailed) || !errors.Is(err, errBroken) {
							t.Fatalf("%s %d: %v", op, skip, err)
						}
						// Whichever it is, it is whole.
						got, err := f.ReadNote(NoteAccess)
						if must(t, err); !bytes.Equal(got, content(version, n)) && !bytes.Equal(got, content(version+1, n)) {
							t.Fatalf("%s %d: after an error the note is another one", op, skip)
						}
					}
				}
				if want := min(1, max(0, fault.Hits())); failures != want {
					t.Errorf("%s %d: %d failures", op, skip, failures)
				}
				fault.Clear()
				version++
				wantNote(t, f, NoteAccess, content(version, n))
			}
		}
	}
	must(t, f.Close())
	fault = blocktest.NewFault(flash.Reopen(), 1)
	f, err = Open(fault)
	must(t, err)
	remove := fault.Add(blocktest.Rule{Op: hpdi.OpRead, Err: errBroken})
	if _, err := f.ReadNote(NoteAccess); !errors.Is(err, ErrFailed) || errors.Is(err, block.ErrNotFound) {
		t.Errorf("read from a device that fails: %v", err)
	}
	if err := note(f, NoteAccess, content(0, n)); !errors.Is(err, ErrFailed) {
		t.Errorf("write without knowing where: %v", err)
	}
	remove()
	wantNote(t, f, NoteAccess, content(version, n))
	first, err := f.WriteNote(NoteAccess, content(0, n))
	must(t, err)
	_, err = first.Step()
	must(t, err)
	must(t, note(f, NoteAccess, content(version+1, n)))
	if done, err := first.Step(); done || err == nil {
		t.Error("a note was written over by what had begun before")
	}
	wantNote(t, f, NoteAccess, content(version+1, n))
}

// A step writes 256 KiB at most, and its own buffer: who writes a note may be stopped.
func TestNoteSteps(t *testing.T) {
	const n = 5*noteStep/2 + 1
	flash := noteDevice(t, n)
	f, err := Open(flash)
	must(t, err)
	w, err := f.WriteNote(NoteAccess, content(1, n))
	must(t, err)
	for i := 0; ; i++ {
		before := flash.Unflushed()
		done, err := w.Step()
		must(t, err)
		if now := flash.Unflushed(); now > before+1 {
			t.Errorf("step %d made %d writes", i, now-before)
		}
		if done {
			if i != 5 { // where, three pieces, sync, header
				t.Errorf("it took %d steps", i+1)
			}
			break
		}
	}
	if done, err := w.Step(); !done || err != nil {
		t.Errorf("a step after the end: %t, %v", done, err)
	}
}

// noteLife writes both notes again and again. Request trouble of the device fails, if it
// is not 0, for some outcomes after it was carried out, and the guest reads the notes, or dies, and goes on; at operation cut power
// is cut. It proves that each note is one that was written last or was being written,
// and returns whether power was cut in time.
func noteLife(t testing.TB, trouble, cut int64, dies bool, outcome uint64) (was bool, err error) {
	n := 5 * block.Size
	if trouble == 0 {
		n += noteStep // in two pieces
	}
	flash := noteDevice(t, int64(n))
	fault := blocktest.NewFault(flash, 1)
	f, err := Open(fault)
	must(t, err)
	version, durable := map[Note]uint64{}, map[Note]uint64{}
	size := func(kind Note) int { return map[Note]int{NotePolicy: 5000, NoteAccess: n}[kind] }
	if trouble > 0 {
		fault.Add(blocktest.Rule{Skip: int(trouble) - 1, Count: 1, Err: errBroken, Late: outcome%4 > 1})
	}
	clock := flash.Clock()
	clock.CutAfter(clock.Ops() + cut)
	for range 2 {
		for _, kind := range []Note{NoteAccess, NoteAccess, NotePolicy} {
			version[kind]++
			err := note(f, kind, content(version[kind], size(kind)))
			switch {
			case clock.IsOff(): // nobody knows
			case err == nil:
				durable[kind] = version[kind]
			case dies:
				flash = flash.Reopen()
				f, err = Open(flash)
				must(t, err)
			default:
				_, _ = f.ReadNote(kind) // there may be none yet
			}
		}
	}
	if !clock.IsOff() {
		return false, nil
	}
	f, err = Open(flash.CutTo(blocktest.NewClock(), blocktest.CutRandom, outcome))
	must(t, err)
	for kind := range noteCount {
		got, err := f.ReadNote(kind)
		found := err != nil && durable[kind] == 0 && errors.Is(err, block.ErrNotFound)
		for v := max(1, durable[kind]); v <= version[kind]; v++ {
			found = found || err == nil && bytes.Equal(got, content(v, size(kind)))
		}
		if !found {
			return true, fmt.Errorf("trouble %d, death %t, cut %d, outcome %d: %v is not one of versions %d to %d, %v", trouble, dies, cut, outcome, kind, durable[kind], version[kind], err)
		}
	}
	return true, nil
}

// notesCut cuts the power at every operation of writing notes, without trouble before
// and with trouble at every step-th request, and looks at so many outcomes.
func notesCut(t testing.TB, step int64, outcomes uint64) (cuts int, err error) {
	for trouble := int64(0); trouble < 30; trouble += step {
		for cut := int64(1); ; cut++ {
			was := false
			for outcome := range outcomes {
				if was, err = noteLife(t, trouble, cut, outcome%2 == 0, outcome); err != nil {
					return cuts, err
				}
				cuts++
			}
			if !was {
				break
			}
		}
	}
	return cuts, nil
}

func TestNotePowerCut(t *testing.T) {
	step, outcomes := int64(11), uint64(2)
	if soak {
		step, outcomes = 1, 20
	}
	cuts, err := notesCut(t, step, outcomes)
	must(t, err)
	t.Logf("power was cut %d times", cuts)
}

// A guest dies, and power is cut while the next one moves something back: of two places that
// were alike neither need be durable then.
func TestDeathThenPowerCut(t *testing.T) {
	for _, late := range []bool{false, true} {
		cuts, err := deathThenCut(t, 8, late)
		must(t, err)
		t.Logf("power was cut %d times", cuts)
	}
}

// deathThenCut cuts the power at each operation of a move after a death. When it is late, the
// sync fails by which the device makes durable what the dead guest has left.
func deathThenCut(t testing.TB, outcomes uint64, late bool) (cuts int, err error) {
	const skip = pageWords / 4 // slots that are left out, so that what changes is in several sectors
	for moves := 1; moves <= 3; moves++ {
		for cut := int64(1); ; cut++ {
			primary, flash := disksOf(t, skip+8)
			f, d := attach(t, primary, flash)
			must(t, write(t, d, 10*setBlocks, 1, 3*setBlocks))
			must(t, do(t, d, &hpdi.Request{Op: hpdi.OpFlush}))
			leaveOut := func(f *Flash) {
				for i := range skip {
					f.taken.Set(i)
				}
			}
			leaveOut(f)
			for set := range Set(moves) {
				in(t, f, 10+set)
			}
			primary, flash = primary.Reopen(), flash.Reopen()
			clock := flash.Clock()
			clock.CutAfter(clock.Ops() + cut)
			broken := blocktest.NewFault(flash, 1)
			if late {
				broken.Add(blocktest.Rule{Op: hpdi.OpFlush, Count: 1, Err: errBroken})
			}
			if f, err = Open(broken); err == nil {
				leaveOut(f)
				if _, err = f.Over(primary, Primary{Number: 3, ID: primaryID, Fixed: fixed}); err == nil {
					var m *Move
					m, err = f.MoveOut(3, 10)
					for p := Moving; err == nil && p != Done; {
						p, err = m.Step()
					}
				}
			}
			if !clock.IsOff() {
				must(t, err)
				break
			}
			for outcome := range outcomes {
				cuts++
				if err := afterDeath(t, primary, flash, outcome); err != nil {
					return cuts, fmt.Errorf("%d moves, cut %d, outcome %d: %w", moves, cut, outcome, err)
				}
			}
		}
	}
	return cuts, nil
}

// afterDeath proves what the power cut of deathThenCut has left.
func afterDeath(t testing.TB, primary, flash *blocktest.Crash, outcome uint64) error {
	clock := blocktest.NewClock()
	f, err := Open(flash.CutTo(clock, blocktest.CutRandom, outcome))
	if err != nil {
		return err
	}
	d, err := f.Over(primary.CutTo(clock, blocktest.CutRandom, outcome), Primary{Number: 3, ID: primaryID, Fixed: fixed})
	if err != nil {
		return err
	}
	for set := range 3 {
		if v, err := read(t, d, (10+set)*setBlocks); v != 1 || err != nil {
			return fmt.Errorf("data set %d holds write %d, %v", 10+set, v, err)
		}
	}
	if problems := f.Check(); len(problems) > 0 {
		return fmt.Errorf("%q", problems)
	}
	return nil
}
