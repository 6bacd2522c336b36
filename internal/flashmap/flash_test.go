package flashmap

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// The device over both is a device as the suite wants it: with nothing on flash, with
// half of it there, and while data sets come and go.
func TestConformance(t *testing.T) {
	bare := func(opts blocktest.CrashOptions) *blocktest.Crash {
		opts.Name, opts.Clock = "ssd", blocktest.NewClock()
		opts.Size = 2<<20 + 8*setBytes
		return blocktest.NewCrashWith(opts)
	}
	type variant struct {
		flash blocktest.CrashOptions
		half  bool
		moves bool
	}
	tests := map[string]variant{
		"moving": {flash: blocktest.CrashOptions{Direct: true}, half: true, moves: true},
	}
	if soak {
		tests["empty"], tests["half"] = variant{}, variant{half: true}
		tests["poor"] = variant{flash: blocktest.CrashOptions{NoDiscard: true, NoZeroes: true}, half: true}
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			hpditest.Run(t, func(t *testing.T) hpdi.Device {
				flash := bare(tt.flash)
				_, err := Create(flash, CreateOptions{SetBytes: setBytes, Reach: reach, Notes: notes})
				must(t, err)
				f, err := Open(flash)
				must(t, err)
				d, err := f.Over(blocktest.NewCrash(primarySize, 1), Primary{Number: 3, ID: primaryID})
				must(t, err)
				for set := Set(0); tt.half && set < 16; set += 2 {
					in(t, f, set)
				}
				if tt.moves {
					var wg sync.WaitGroup
					stop := make(chan struct{})
					wg.Go(func() { churn(f, 16, 40, new(atomic.Int32), stop) })
					t.Cleanup(func() { close(stop); wg.Wait() })
				}
				return d
			})
		})
	}
}

// churn moves data sets to flash and back until stop is closed, so many were moved, or
// nothing can be moved any more.
func churn(f *Flash, sets int, most int32, moved *atomic.Int32, stop chan struct{}) {
	rng := rand.New(rand.NewPCG(1, 1))
	for moved.Load() < most {
		select {
		case <-stop:
			return
		default:
		}
		set := Set(rng.IntN(sets))
		m, err := f.MoveIn(3, set)
		if errors.Is(err, block.ErrExists) {
			m, err = f.MoveOut(3, set)
		}
		if errors.Is(err, block.ErrNotFound) {
			return // the device was closed
		}
		for err == nil {
			var p Progress
			if p, err = m.Step(); p == Done {
				moved.Add(1)
				break
			}
			if p == Waiting {
				select {
				case <-f.Woken():
				case <-stop:
					_ = m.Cancel()
					return
				}
			}
		}
		if err != nil && m != nil {
			_ = m.Cancel()
		}
		if _, err := f.Tidy(); err != nil {
			return
		}
	}
}

// What is on flash is read and written there, in requests of any shape, and is what it
// was when everything is opened again, and when it is back.
func TestMoves(t *testing.T) {
	primary, flash := disks(t)
	f, d := attach(t, primary, flash)
	must(t, write(t, d, 0, 1, 5*setBlocks))
	for _, set := range []Set{1, 3, 4} {
		in(t, f, set)
	}
	sound(t, f)
	must(t, write(t, d, 20, 2, 3*setBlocks)) // across what is on flash and what is not
	p := make([]byte, 5*setBytes)
	must(t, do(t, d, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{p[:3*setBytes/2+block.Size], p[3*setBytes/2+block.Size:]}}))
	for b := range 5 * setBlocks {
		want := uint64(1)
		if b >= 20 && b < 20+3*setBlocks {
			want = 2
		}
		if p[b*block.Size] != byte(want) {
			t.Fatalf("block %d holds write %d instead of %d", b, p[b*block.Size], want)
		}
		wantRead(t, d, b, want)
	}
	if got, _ := read(t, primary, 20); got != 1 {
		t.Errorf("the primary has write %d of a block that is on flash", got)
	}
	if start, end := d.NextOnFlash(0); start != setBytes || end != 2*setBytes {
		t.Errorf("first on flash: [%d,%d)", start, end)
	}
	if start, end := d.NextOnFlash(2*setBytes + 5); start != 3*setBytes || end != 5*setBytes {
		t.Errorf("next on flash: [%d,%d)", start, end)
	}
	if start, end := d.NextOnFlash(5 * setBytes); start != primarySize || end != primarySize {
		t.Errorf("nothing more on flash: [%d,%d)", start, end)
	}
	s := f.Status()
	if s.Slots != 8 || s.Used != 3 || s.Free != 5 || s.Lost != 0 || s.Failure != nil {
		t.Errorf("status %+v", s)
	}
	must(t, do(t, d, &hpdi.Request{Op: hpdi.OpFlush}))
	must(t, d.Close())
	must(t, f.Close())
	f, d = attach(t, primary.Reopen(), flash.Reopen())
	wantRead(t, d, 20, 2)
	sound(t, f)
	for _, set := range []Set{1, 3, 4} {
		out(t, f, set)
	}
	sound(t, f)
	wantRead(t, d, 20, 2)
	if got, _ := read(t, primary.Reopen(), 20); got != 2 {
		t.Errorf("the primary has write %d of a block that is back", got)
	}
}

func TestRefused(t *testing.T) {
	primary, flash := disks(t)
	f, d := attach(t, primary, flash)
	for set, want := range map[Set]error{0: ErrFixed, 2: ErrFixed, primarySize / setBytes: ErrFixed, 1 << 40: ErrFixed} {
		if _, err := f.MoveIn(3, set); !errors.Is(err, want) {
			t.Errorf("move of data set %d: %v, want %v", set, err, want)
		}
	}
	for _, number := range []int{-1, 0, MaxPrimaries} {
		if _, err := f.MoveIn(number, 1); !errors.Is(err, block.ErrNotFound) {
			t.Errorf("move from primary %d: %v", number, err)
		}
	}
	for _, set := range []Set{1, 1 << 50} {
		if _, err := f.MoveOut(3, set); !errors.Is(err, block.ErrNotFound) {
			t.Errorf("move back of data set %d, which is not there: %v", set, err)
		}
	}
	for set := range Set(8) {
		in(t, f, 10+set)
	}
	if _, err := f.MoveIn(3, 30); !errors.Is(err, ErrFull) || !errors.Is(err, block.ErrNoSpace) {
		t.Errorf("move to a full flash device: %v", err)
	}
	if _, err := f.MoveIn(3, 10); !errors.Is(err, block.ErrExists) && !errors.Is(err, ErrFull) {
		t.Errorf("move of what is there: %v", err)
	}
	m, err := f.MoveOut(3, 10)
	must(t, err)
	if _, err := f.MoveOut(3, 10); !errors.Is(err, ErrBusy) {
		t.Errorf("second move: %v", err)
	}
	must(t, m.Cancel())
	must(t, m.Cancel())
	sound(t, f)
	for name, o := range map[string]Primary{
		"number":   {Number: MaxPrimaries, ID: primaryID},
		"negative": {Number: -1, ID: primaryID},
		"twice":    {Number: 3, ID: primaryID},
	} {
		if _, err := f.Over(primary, o); err == nil {
			t.Errorf("%s: it was taken", name)
		}
	}
	must(t, d.Close())
	if _, err := f.Over(primary.Reopen(), Primary{Number: 3, ID: block.DeviceID{8}}); !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), "ssd") {
		t.Errorf("another device: %v", err)
	}
	if _, err := f.Over(primary.Resize(11*setBytes), Primary{Number: 3, ID: primaryID}); !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), "shrunk") {
		t.Errorf("a device that has shrunk: %v", err)
	}
	if _, err := f.Over(primary.Reopen(), Primary{Number: 3, ID: primaryID, Fixed: []Range{{10 * setBytes, 1}}}); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("a fixed range is on flash: %v", err)
	}
	if _, err := f.Over(primary.Reopen(), Primary{Number: 4, ID: primaryID}); err != nil {
		t.Errorf("one more primary: %v", err)
	}
	if err := f.Forget(3); !errors.Is(err, ErrBusy) {
		t.Errorf("a primary that is in use was forgotten: %v", err)
	}
	for _, number := range []int{-1, MaxPrimaries, 9} {
		if err := f.Forget(number); !errors.Is(err, block.ErrNotFound) {
			t.Errorf("primary %d was forgotten: %v", number, err)
		}
	}
	sound(t, f)
}

// Of a primary that is too large for the map what is in front can be moved. What it has
// taken of the map is free when it is forgotten.
func TestMapFull(t *testing.T) {
	_, flash := disks(t)
	f, err := Open(flash)
	must(t, err)
	for round := range 3 {
		d, err := f.Over(blocktest.NewCrash(1<<40, 1), Primary{Number: round, ID: primaryID})
		must(t, err)
		last := Set(9*pageSets - 1)
		if d.Info().Note == "" {
			t.Error("nobody is told that the map is too small")
		}
		m, err := f.MoveIn(round, last)
		through(t, m, err)
		if _, err := f.MoveIn(round, last+1); !errors.Is(err, ErrFixed) {
			t.Errorf("a move of what the map has no room for: %v", err)
		}
		none, err := f.Over(blocktest.NewCrash(1<<40, 1), Primary{Number: 10 + round, ID: primaryID})
		must(t, err)
		if _, err := f.MoveIn(10+round, 0); !errors.Is(err, ErrFixed) {
			t.Errorf("a move of what the map has no room for: %v", err)
		}
		must(t, write(t, none, 1, 5, 1))
		wantRead(t, none, 1, 5)
		must(t, none.Close())
		if err := f.Forget(round); !errors.Is(err, ErrBusy) {
			t.Errorf("forgotten while something of it is on flash: %v", err)
		}
		m, err = f.MoveOut(round, last)
		through(t, m, err)
		must(t, d.Close())
		must(t, f.Forget(round))
		must(t, f.Forget(10+round))
		sound(t, f)
	}
}

func TestCreateRefused(t *testing.T) {
	dev := blocktest.NewCrash(flashSize, 1)
	for name, o := range map[string]CreateOptions{
		"small": {SetBytes: MinSetBytes / 2, Reach: reach, Notes: notes}, "large": {SetBytes: 2 * MaxSetBytes, Reach: reach, Notes: notes},
		"odd": {SetBytes: 3 * MinSetBytes, Reach: reach, Notes: notes}, "none": {Reach: reach, Notes: notes}, "reach": {SetBytes: setBytes, Reach: -1},
		"room": {SetBytes: setBytes, Reach: 1 << 50},
	} {
		if _, err := Create(dev, o); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Open(dev); err == nil || !strings.Contains(err.Error(), "no such structure here") {
		t.Errorf("open of what is no flash device: %v", err)
	}
	_, err := Create(dev, CreateOptions{SetBytes: setBytes, Reach: reach, Notes: notes})
	must(t, err)
	if _, err := Open(dev.Resize(flashSize - 16*block.Size)); err == nil || !strings.Contains(err.Error(), "shrunk") {
		t.Errorf("open of a device that has shrunk: %v", err)
	}
}

// A data set that is discarded whole gives its slot up when Tidy comes by, unless
// somebody has written to it since.
func TestDiscard(t *testing.T) {
	primary, flash := disks(t)
	f, d := attach(t, primary, flash)
	for set := range Set(4) {
		must(t, write(t, d, int(10+set)*setBlocks, 5, setBlocks))
		in(t, f, 10+set)
	}
	must(t, discard(t, d, 10))
	must(t, discard(t, d, 11))
	must(t, write(t, d, 11*setBlocks+3, 6, 1))
	must(t, do(t, d, &hpdi.Request{Op: hpdi.OpDiscard, Offset: 12 * setBytes, Length: setBytes / 2}))
	must(t, discard(t, d, 13))
	must(t, do(t, d, &hpdi.Request{Op: hpdi.OpWriteZeroes, Offset: 13 * setBytes, Length: setBytes}))
	for done := false; !done; {
		var err error
		done, err = f.Tidy()
		must(t, err)
	}
	for set, want := range map[Set]bool{10: false, 11: true, 12: true, 13: true} {
		if got := onFlashNow(d, set); got != want {
			t.Errorf("data set %d on flash: %t", set, got)
		}
	}
	wantRead(t, d, 11*setBlocks+3, 6)
	wantRead(t, d, 12*setBlocks+9, 5)
	wantRead(t, d, 13*setBlocks+9, 0)
	must(t, write(t, d, 10*setBlocks, 7, setBlocks))
	wantRead(t, d, 10*setBlocks+1, 7)
	// On the way back there is nothing to copy.
	must(t, discard(t, d, 11))
	before := primary.Unflushed()
	out(t, f, 11)
	if after := primary.Unflushed(); after > before {
		t.Errorf("%d operations at the primary for what was discarded", after-before)
	}
	sound(t, f)
}

// A discard that others write beside does not give the slot up.
func TestDiscardBesideWrite(t *testing.T) {
	primary, flash := disks(t)
	f, d := attach(t, primary, flash)
	in(t, f, 10)
	q, err := d.NewQueue(8)
	must(t, err)
	for name, reqs := range map[string][]*hpdi.Request{
		"before": {{Op: hpdi.OpWrite, Offset: 10 * setBytes, Vec: [][]byte{pattern(1, 1)}}, {Op: hpdi.OpDiscard, Offset: 10 * setBytes, Length: setBytes}},
		"after":  {{Op: hpdi.OpDiscard, Offset: 10 * setBytes, Length: setBytes}, {Op: hpdi.OpWrite, Offset: 10 * setBytes, Vec: [][]byte{pattern(2, 1)}}},
	} {
		must(t, q.Submit(reqs...))
		_, err := q.Wait(2, nil)
		must(t, err)
		if _, err := f.Tidy(); err != nil {
			t.Fatal(err)
		}
		// A write that was over before the discard's end may count as older.
		if name == "after" {
			if !onFlashNow(d, 10) {
				t.Error("a data set lost its slot although it was written to after it was discarded")
			}
			wantRead(t, d, 10*setBlocks, 2)
		}
		if !onFlashNow(d, 10) {
			in(t, f, 10)
		}
	}
	must(t, q.Close())
	sound(t, f)
}

// While a data set is always being written to, it is closed at last; who writes waits
// for nothing but the last pieces, and nothing is lost.
func TestBusySet(t *testing.T) {
	primary, flash := disks(t)
	f, d := attach(t, primary, flash)
	for _, back := range []bool{false, true} {
		q, err := d.NewQueue(8)
		must(t, err)
		m, err := f.MoveIn(3, 10)
		if back {
			m, err = f.MoveOut(3, 10)
		}
		must(t, err)
		var v uint64
		submit := func() {
			v++
			must(t, q.Submit(&hpdi.Request{Op: hpdi.OpWrite, Offset: 10*setBytes + int64(v%setBlocks)*block.Size, Vec: [][]byte{pattern(v, 1)}}))
		}
		submit()
		held := 0
		for p := Moving; p != Done; {
			submit() // the other one is under way until it is waited for
			p, err = m.Step()
			must(t, err)
			done, err := q.Wait(1, nil)
			must(t, err)
			if m.held != nil {
				held++
			}
			if len(done) == 0 {
				t.Fatal("nothing completes")
			}
			if m.held == nil {
				submit()
			}
		}
		if held == 0 {
			t.Error("the data set was never closed: the test does not show what it should")
		}
		must(t, q.Close())
		for i := max(1, int(v)-setBlocks+1); i <= int(v); i++ {
			wantRead(t, d, 10*setBlocks+i%setBlocks, uint64(i))
		}
	}
	sound(t, f)
}

// A slot is not used again while somebody reads from it.
func TestSlowReader(t *testing.T) {
	primary, flash := disks(t)
	slow := blocktest.NewFault(flash, 1)
	f, d := attach(t, primary, slow)
	must(t, write(t, d, 10*setBlocks, 1, setBlocks))
	in(t, f, 10)
	gate := blocktest.NewGate()
	remove := slow.Add(blocktest.Rule{Op: hpdi.OpRead, Count: 1, Hold: gate.Hold})
	q, err := d.NewQueue(1)
	must(t, err)
	p := make([]byte, block.Size)
	must(t, q.Submit(&hpdi.Request{Op: hpdi.OpRead, Offset: 10 * setBytes, Vec: [][]byte{p}}))
	<-gate.Arrived()
	m, err := f.MoveOut(3, 10)
	must(t, err)
	for {
		p, err := m.Step()
		must(t, err)
		if p == Waiting {
			break
		}
		if p == Done {
			t.Fatal("the slot was given up under a reader")
		}
	}
	if err := m.Cancel(); err != nil || !m.Left() {
		t.Errorf("a move that has come back and waits for a reader: left %v, %v", m.Left(), err)
	}
	if problems := f.Check(); len(problems) > 0 {
		t.Errorf("while a reader is waited for: %q", problems)
	}
	must(t, write(t, d, 11*setBlocks, 2, setBlocks))
	for i := range Set(8) {
		if m, err := f.MoveIn(3, 11+i); i < 7 {
			through(t, m, err)
		} else if !errors.Is(err, ErrFull) {
			t.Errorf("the slot was used again: %v", err)
		}
	}
	gate.Open()
	done, err := q.Wait(1, nil)
	must(t, err)
	if done[0].Err != nil || p[0] != 1 {
		t.Errorf("the reader got write %d, %v", p[0], done[0].Err)
	}
	<-f.Woken()
	through(t, m, nil)
	must(t, q.Close())
	remove()
	sound(t, f)
}

// Clients go on while a check reads what is stored.
func TestCheckBesideClients(t *testing.T) {
	primary, flash := disks(t)
	slow := blocktest.NewFault(flash, 1)
	f, d := attach(t, primary, slow)
	must(t, write(t, d, 10*setBlocks, 1, setBlocks))
	in(t, f, 10)
	gate := blocktest.NewGate()
	slow.Add(blocktest.Rule{Op: hpdi.OpRead, Offset: int64(f.tableAt(0)[0]) * block.Size, Length: block.Size, Count: 1, Hold: gate.Hold})
	checked := make(chan []string)
	go func() { checked <- f.Check() }()
	<-gate.Arrived()
	must(t, write(t, d, 10*setBlocks, 2, 1))
	must(t, write(t, d, 11*setBlocks, 3, 1))
	wantRead(t, d, 10*setBlocks, 2)
	wantRead(t, d, 11*setBlocks, 3)
	gate.Open()
	if problems := <-checked; len(problems) > 0 {
		t.Errorf("%q", problems)
	}
	sound(t, f)
}

// What is on flash is read without a seek of the disk, at the speed of the drive.
func TestNoSeeks(t *testing.T) {
	const size = 16 << 30
	disk, drive := blocktest.NewDisk(blocktest.BarracudaES2), blocktest.NewSSD(blocktest.IntelS3700)
	_, flash := disks(t)
	f, err := Open(drive.Wrap(flash))
	must(t, err)
	d, err := f.Over(disk.Wrap(blocktest.NewCrash(size, 1)), Primary{Number: 3, ID: primaryID})
	must(t, err)
	if !d.Info().Rotates || f.Status().Info.Rotates {
		t.Error("what rotates is not the disk alone")
	}
	sets := make([]Set, 8)
	for i := range sets {
		sets[i] = Set(i) * (size / setBytes / 8) // as far apart as can be
	}
	reads := func() (blocktest.DiskCount, time.Duration) {
		diskBefore, driveBefore := disk.Count(), drive.Count()
		rng := rand.New(rand.NewPCG(1, 1))
		for range 200 {
			wantRead(t, d, int(sets[rng.IntN(len(sets))])*setBlocks+rng.IntN(setBlocks), 0)
		}
		return disk.Count().Minus(diskBefore), drive.Count().Busy - driveBefore.Busy
	}
	if n, busy := reads(); n.Seeks < 150 || n.Busy < time.Second || busy != 0 {
		t.Errorf("from the disk: %+v, %v of the drive", n, busy)
	}
	for _, set := range sets {
		in(t, f, set)
	}
	if n, busy := reads(); n.Requests != 0 || busy != 200*blocktest.IntelS3700.Read.Latency {
		t.Errorf("from flash: %+v, %v of the drive", n, busy)
	}
}

// readOnly is a device that is open for reading only.
type readOnly struct{ hpdi.Device }

func (r readOnly) Info() hpdi.Info {
	info := r.Device.Info()
	info.ReadOnly = true
	return info
}

// What is opened for reading only is read, and nothing is written to it.
func TestReadOnly(t *testing.T) {
	primary, flash, before, _ := several(t)
	rot(flash, before.tableAt(0)[0]) // would be mended
	ops := flash.Clock().Ops()
	f, err := Open(readOnly{flash})
	must(t, err)
	d, err := f.Over(readOnly{primary}, Primary{Number: 3, ID: primaryID})
	must(t, err)
	wantRead(t, d, 10*setBlocks, 2)
	wantRead(t, d, 12*setBlocks, 1)
	if err := write(t, d, 10*setBlocks, 3, 1); !errors.Is(err, hpdi.ErrReadOnly) {
		t.Errorf("write: %v", err)
	}
	other, err := f.Over(readOnly{blocktest.NewCrash(primarySize, 9)}, Primary{Number: 5})
	must(t, err)
	wantRead(t, other, 10*setBlocks, 0)
	_, in := f.MoveIn(3, 20)
	_, out := f.MoveOut(3, 10)
	_, tidy := f.Tidy()
	for name, err := range map[string]error{"move in": in, "move out": out, "shrink": f.Shrink(1), "forget": f.Forget(3)} {
		if !errors.Is(err, hpdi.ErrReadOnly) {
			t.Errorf("%s: %v", name, err)
		}
	}
	n, prove := f.Prove()
	if must(t, errors.Join(tidy, prove)); n != 1 || flash.Clock().Ops() != ops {
		t.Errorf("%d blocks are to be mended; %d operations", n, flash.Clock().Ops()-ops)
	}
}

// A write to a data set that is held waits, has entered nothing meanwhile, and keeps
// neither reads nor other writes of its queue; it fails when nobody knows where the data
// set is, and a queue that is closed waits for it.
func TestHeldWrite(t *testing.T) {
	for _, end := range []string{"done", "doubt", "closed"} {
		primary, flash := disks(t)
		fault := blocktest.NewFault(flash, 1)
		f, d := attach(t, primary, fault)
		m, err := f.MoveIn(3, 10)
		must(t, err)
		copyAll(t, m)
		_, err = m.Step() // that is durable
		must(t, err)
		s := f.lock(m.key)
		m.held = make(chan struct{})
		s.mu.Unlock()
		q, err := d.NewQueue(8)
		must(t, err)
		held := &hpdi.Request{Op: hpdi.OpWrite, Offset: 10*setBytes - block.Size, Vec: [][]byte{pattern(7, 2)}}
		other := &hpdi.Request{Op: hpdi.OpWrite, Offset: 9 * setBytes, Vec: [][]byte{pattern(8, 1)}}
		look := &hpdi.Request{Op: hpdi.OpRead, Offset: 10 * setBytes, Vec: [][]byte{pattern(9, 1)}}
		must(t, q.Submit(held, other, look))
		done, err := q.Wait(2, nil)
		must(t, err)
		if len(done) != 2 || other.Err != nil || look.Err != nil {
			t.Fatalf("%s: %d requests are complete, %v, %v", end, len(done), other.Err, look.Err)
		}
		if end == "doubt" {
			fault.Add(blocktest.Rule{Op: hpdi.OpWrite, Err: errBroken})
		}
		waited := make(chan error)
		go func() {
			if end == "closed" {
				waited <- q.Close()
				return
			}
			done, err := q.Wait(1, nil)
			if len(done) != 1 || done[0] != held {
				err = errors.Join(err, errors.New("the held write did not come back"))
			}
			waited <- err
		}()
		p, err := m.Step()
		if (end == "doubt") != errors.Is(err, ErrFailed) || err == nil && p != Done {
			t.Fatalf("%s: progress %d, %v", end, p, err)
		}
		must(t, <-waited)
		if end == "doubt" {
			if !errors.Is(held.Err, ErrFailed) {
				t.Errorf("the held write: %v", held.Err)
			}
			wantRead(t, d, 10*setBlocks-1, 0)
			fault.Clear()
			through(t, m, nil)
		} else {
			must(t, held.Err)
			wantRead(t, d, 10*setBlocks-1, 7)
			wantRead(t, d, 10*setBlocks, 7)
		}
		sound(t, f)
	}
}

// asked are the sizes of reads and writes that a device is asked for.
type asked struct {
	hpdi.Device
	rotates bool
	kib     []int64 // reads above 0, writes below
}

func (a *asked) Info() hpdi.Info {
	info := a.Device.Info()
	info.Rotates = a.rotates
	return info
}

func (a *asked) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := a.Device.NewQueue(depth)
	return &askedQueue{q, a}, err
}

type askedQueue struct {
	hpdi.Queue
	a *asked
}

func (q *askedQueue) Submit(reqs ...*hpdi.Request) error {
	for _, r := range reqs {
		switch r.Op {
		case hpdi.OpRead:
			q.a.kib = append(q.a.kib, r.Bytes()>>10)
		case hpdi.OpWrite:
			q.a.kib = append(q.a.kib, -r.Bytes()>>10)
		}
	}
	return q.Queue.Submit(reqs...)
}

// A step asks a disk for as much as an arm's way is worth, and flash for little at once.
// What is written meanwhile is copied, whether its piece was or was not.
func TestPieces(t *testing.T) {
	const large = 1 << 20
	for _, rotates := range []bool{true, false} {
		primary := &asked{Device: blocktest.NewCrash(4*large, 1), rotates: rotates}
		flash := &asked{Device: blocktest.NewCrash(8*large, 2)}
		_, err := Create(flash, CreateOptions{SetBytes: large, Reach: reach})
		must(t, err)
		f, err := Open(flash)
		must(t, err)
		d, err := f.Over(primary, Primary{Number: 3, ID: primaryID})
		must(t, err)
		for b := range large / block.Size {
			must(t, write(t, d, 2*large/block.Size+b, uint64(b), 1))
		}
		for _, move := range []func(int, Set) (*Move, error){f.MoveIn, f.MoveOut} {
			m, err := move(3, 2)
			must(t, err)
			primary.kib, flash.kib = nil, nil
			most := int64(16)
			if rotates {
				most = 256
			}
			for steps := int64(1); m.stage == copying; steps++ {
				_, err := m.Step()
				must(t, err)
				if m.Copied() != steps*most<<10 {
					t.Fatalf("%d KiB are copied in %d steps of %d", m.Copied()>>10, steps, most)
				}
			}
			if n := int64(len(primary.kib)); n != 1024/most || len(flash.kib) != 64 {
				t.Errorf("%d requests to the primary, %d to flash", n, len(flash.kib))
			}
			for i, k := range append(slices.Clone(primary.kib), flash.kib...) {
				want := int64(16)
				if i < len(primary.kib) {
					want = most
				}
				if k != want && k != -want {
					t.Errorf("request %d of %d KiB", i, k)
				}
			}
			through(t, m, nil)
		}
		m, err := f.MoveIn(3, 2)
		must(t, err)
		_, err = m.Step()
		must(t, err)
		must(t, write(t, d, 2*large/block.Size, 1000, 1))   // copied already
		must(t, write(t, d, 3*large/block.Size-1, 1001, 1)) // not yet
		through(t, m, nil)
		wantRead(t, d, 2*large/block.Size, 1000)
		wantRead(t, d, 3*large/block.Size-1, 1001)
		for b := 1; b < large/block.Size-1; b++ {
			wantRead(t, d, 2*large/block.Size+b, uint64(b))
		}
		// What fails in the middle is copied again, and nothing is left out.
		m, err = f.MoveOut(3, 2)
		must(t, err)
		_, err = m.Step()
		must(t, err)
		must(t, write(t, d, 2*large/block.Size, 1002, 1))
		primary.Device = blocktest.NewFault(primary.Device, 1)
		must(t, m.d.io.Release())
		remove := primary.Device.(*blocktest.Fault).Add(blocktest.Rule{Op: hpdi.OpWrite, Count: 1, Err: errBroken})
		if _, err = m.Step(); err == nil {
			t.Fatal("a write that failed was not told")
		}
		remove()
		through(t, m, nil)
		for b, v := range map[int]uint64{0: 1002, 100: 100, large/block.Size - 1: 1001} {
			wantRead(t, d, 2*large/block.Size+b, v)
		}
		sound(t, f)
	}
}

// A device is busy while requests of its users are under way at the primary, and for no
// other.
func TestBusy(t *testing.T) {
	primary, flash := disks(t)
	slow := blocktest.NewFault(primary, 1)
	f, d := attach(t, slow, flash)
	in(t, f, 11)
	q, err := d.NewQueue(4)
	must(t, err)
	idle, err := d.NewQueue(4)
	must(t, err)
	p := make([]byte, 2*block.Size)
	read := func(set int64) *hpdi.Request {
		return &hpdi.Request{Op: hpdi.OpRead, Offset: set * setBytes, Vec: [][]byte{p[:block.Size]}}
	}
	must(t, q.Submit(read(11)))
	if d.Busy() {
		t.Error("busy with what is on flash")
	}
	_, err = q.Wait(1, nil)
	must(t, err)
	gate := blocktest.NewGate()
	slow.Add(blocktest.Rule{Op: hpdi.OpRead, Count: 1, Hold: gate.Hold})
	must(t, q.Submit(read(10)))
	<-gate.Arrived()
	if !d.Busy() {
		t.Error("not busy with what is under way")
	}
	gate.Open()
	_, err = q.Wait(1, nil)
	must(t, err)
	if d.Busy() {
		t.Error("busy with what is complete")
	}
	gate = blocktest.NewGate()
	slow.Add(blocktest.Rule{Op: hpdi.OpRead, Count: 1, Hold: gate.Hold})
	m, err := f.MoveIn(3, 12)
	must(t, err)
	stepped := make(chan error)
	go func() {
		_, err := m.Step()
		stepped <- err
	}()
	<-gate.Arrived()
	if d.Busy() {
		t.Error("busy with a move")
	}
	gate.Open()
	must(t, <-stepped)
	through(t, m, nil)
	must(t, q.Close())
	must(t, idle.Close())
	sound(t, f)
}

// log is an Observer that writes down what it is told.
type log []string

func (l *log) Record(op hpdi.Op, off, n int64) { *l = append(*l, fmt.Sprint(op, " ", off, " ", n)) }
func (l *log) Close()                          { *l = append(*l, "closed") }

// Who wants to know is told of each request of each queue, wherever it goes.
func TestObserve(t *testing.T) {
	primary, flash := disks(t)
	f, err := Open(flash)
	must(t, err)
	var logs []*log
	d, err := f.Over(primary, Primary{Number: 3, ID: primaryID, Observe: func() Observer { logs = append(logs, new(log)); return logs[len(logs)-1] }})
	must(t, err)
	in(t, f, 10)
	p := pattern(1, 2)
	for _, r := range []*hpdi.Request{
		{Op: hpdi.OpWrite, Offset: 10*setBytes - block.Size, Vec: [][]byte{p}}, {Op: hpdi.OpFlush}, {Op: hpdi.OpRead, Offset: 7, Vec: [][]byte{p}},
		{Op: hpdi.OpRead, Offset: 10 * setBytes, Vec: [][]byte{p}},
	} {
		_ = do(t, d, r) // one is malformed
	}
	var got []string
	for _, l := range logs {
		got = append(got, strings.Join(*l, ", "))
	}
	want := []string{"write 651264 8192, closed", "closed", "closed", "read 655360 8192, closed"}
	if !slices.Equal(got, want) {
		t.Errorf("it was told %q", got)
	}
}
