package pool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/devices"
)

// scanStep makes a scan take a step, as Run does.
func (r *rig) scanStep() error {
	return r.do(context.Background(), func() error {
		s := r.Pool.scan
		s.next = time.Time{}
		for s.work(time.Now()); s.wantsFold(); s.work(time.Now()) {
			if err := r.foldAll(); err != nil {
				return err
			}
			s.next = time.Time{}
		}
		s.next = time.Time{}
		return nil
	})
}

// knownScan returns how the newest scan is, also right after the pool was opened.
func (r *rig) knownScan() ScanStats {
	r.t.Helper()
	if err := r.do(context.Background(), r.Pool.scan.know); err != nil {
		r.t.Fatal(err)
	}
	return r.Stats().Scan
}

// scanAll brings a scan to its end.
func (r *rig) scanAll(name, action string) ScanStats {
	r.t.Helper()
	if err := r.Scan(context.Background(), name, action); err != nil {
		r.t.Fatal(err)
	}
	for n := 0; r.Stats().Scan.State == ScanRunning; n++ {
		if err := r.scanStep(); err != nil {
			r.t.Fatal(err)
		}
		if n > 10_000 {
			r.t.Fatalf("the scan does not come to an end: %+v", r.Stats().Scan)
		}
	}
	r.fold()
	return r.Stats().Scan
}

// used returns how many blocks are in use.
func (r *rig) used() int64 {
	u := r.space.Usage()
	return u.Total - u.Free
}

// What was written before a volume shared blocks is shared by a scan, and made copies
// of again by undoing that; the data stay what they are.
func TestScan(t *testing.T) {
	ctx := context.Background()
	r := newRigWithLog(t, 1, testSize, 8<<20)
	r.mustOpen()
	v, w := r.volume("v", 64<<20), r.volume("w", 64<<20)
	var all [][]byte
	for i := range int64(10) {
		data := content(uint64(i), 200)
		all = append(all, data)
		r.put(v, i*256, data)
		r.put(w, i*300+7, data)
	}
	r.put(w, 10_000, content(99, 50))
	r.fold()
	plain := r.used()
	if err := r.Scan(ctx, "v", ScanStart); !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), "switch deduplication on") {
		t.Errorf("a volume that shares nothing is scanned: %v", err)
	}
	if err := r.Scan(ctx, "x", ScanStart); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("a volume that is not there: %v", err)
	}
	for _, name := range []string{"v", "w"} {
		if err := r.SetSharing(ctx, name, 8); err != nil {
			t.Fatal(err)
		}
	}
	check := func() {
		t.Helper()
		for i, data := range all {
			r.expect(v, int64(i)*256, data)
			r.expect(w, int64(i)*300+7, data)
		}
		r.expect(w, 10_000, content(99, 50))
		r.mustCheck()
	}
	if s := r.scanAll("v", ScanStart); s.State != ScanDone || s.Moved != 0 || s.Done != 2000 || s.Total != 2000 {
		t.Errorf("%+v", s) // there is nothing else whose fingerprints are known
	}
	// Leaves cut two series of w at most; the pieces are long enough.
	if s := r.scanAll("w", ScanStart); s.State != ScanDone || s.Moved < 1990 || s.Done != 2050 || s.Raced+s.Failed > 0 {
		t.Errorf("%+v", s)
	}
	if saved := plain - r.used(); saved < 1900 {
		t.Errorf("%d blocks are saved", saved)
	}
	check()
	// There is nothing left to be done.
	if s := r.scanAll("w", ScanStart); s.Moved > 8 {
		t.Errorf("%+v", s)
	}
	r.die()
	r.mustOpen()
	v, _ = r.Volume("v")
	w, _ = r.Volume("w")
	check()

	if err := r.Scan(ctx, "w", ScanUndo); !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), "switch deduplication off") {
		t.Errorf("what a volume would share again is undone: %v", err)
	}
	if err := r.SetSharing(ctx, "w", 0); err != nil {
		t.Fatal(err)
	}
	if s := r.scanAll("w", ScanUndo); s.State != ScanDone || !s.Undo || s.Moved < 1900 {
		t.Errorf("%+v", s)
	}
	if more := r.used() - plain; more < -100 || more > 100 {
		t.Errorf("%d blocks more are in use than without sharing", more)
	}
	if err := r.bmap.OverlayPointers(func(block.Pointer) error { return errors.New("not folded") }); err != nil {
		t.Error(err)
	}
	check()
	r.shut()
}

// A scan can be paused, resumed and stopped, and what is asked of it in the wrong state
// is refused. It ends when its volume is deleted.
func TestScanControl(t *testing.T) {
	ctx := context.Background()
	r := newRigWithLog(t, 1, testSize, 8<<20)
	r.mustOpen()
	v := r.volume("v", 64<<20)
	for i := range int64(20) {
		r.put(v, i*256, content(uint64(i%5), 200))
	}
	r.fold()
	if err := r.SetSharing(ctx, "v", 4); err != nil {
		t.Fatal(err)
	}
	refused := func(actions ...string) {
		t.Helper()
		for _, a := range actions {
			if err := r.Scan(ctx, "v", a); !errors.Is(err, block.ErrInvalid) {
				t.Errorf("%s in state %s: %v", a, r.Stats().Scan.State, err)
			}
		}
	}
	do := func(action string, want ScanState) {
		t.Helper()
		if err := r.Scan(ctx, "v", action); err != nil || r.Stats().Scan.State != want {
			t.Errorf("%s: %v, %+v", action, err, r.Stats().Scan)
		}
	}
	step := func() {
		t.Helper()
		if err := r.scanStep(); err != nil {
			t.Fatal(err)
		}
	}
	refused(ScanPause, ScanResume, ScanStop, "dance")
	if err := r.Scan(ctx, "v", ScanStart); err != nil {
		t.Fatal(err)
	}
	refused(ScanResume)
	step() // it begins
	if err := r.Scan(ctx, "v", ScanStart); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("two scans: %v", err)
	}
	step()
	do(ScanPause, ScanPaused)
	refused(ScanPause)
	done := r.Stats().Scan.Done
	if step(); done != 200 || r.Stats().Scan.Done != done {
		t.Errorf("%d blocks, then %+v", done, r.Stats().Scan)
	}
	do(ScanResume, ScanRunning)
	step()
	do(ScanStop, ScanStopped)
	refused(ScanPause, ScanResume, ScanStop)
	if err := r.Scan(ctx, "v", ScanStart); err != nil {
		t.Fatal(err)
	}
	step()
	step()
	if err := r.DeleteVolume(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	step()
	if s := r.Stats().Scan; s.State != ScanStopped || !strings.Contains(s.Why, "deleted") {
		t.Errorf("%+v", s)
	}
	r.fold()
	r.shut()
}

// Who owns a pool next goes on with a scan, not far in front of where it was, and with
// nothing left out; one that was paused stays so.
func TestScanGoesOn(t *testing.T) {
	ctx := context.Background()
	r := newRigWithLog(t, 1, testSize, 8<<20)
	r.mustOpen()
	v, w := r.volume("v", 64<<20), r.volume("w", 64<<20)
	for i := range int64(20) {
		data := content(uint64(i), 200)
		r.put(v, i*256, data)
		r.put(w, i*256, data)
	}
	for _, name := range []string{"v", "w"} {
		if err := r.SetSharing(ctx, name, 8); err != nil {
			t.Fatal(err)
		}
	}
	r.fold()
	r.scanAll("v", ScanStart) // its fingerprints are known now
	if err := r.Scan(ctx, "w", ScanStart); err != nil {
		t.Fatal(err)
	}
	// steps makes the record of the last of some steps the newest, or not.
	steps := func(n int, save bool) {
		t.Helper()
		for range n {
			if err := r.do(ctx, func() error {
				if r.Pool.scan.saved = time.Now(); save {
					r.Pool.scan.saved = time.Time{}
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			if err := r.scanStep(); err != nil {
				t.Fatal(err)
			}
		}
	}
	opened := func() ScanStats {
		t.Helper()
		r.mustOpen()
		if err := r.IndexAll(ctx); err != nil {
			t.Fatal(err)
		}
		return r.knownScan()
	}
	again := func() ScanStats {
		t.Helper()
		r.die()
		return opened()
	}
	steps(1, false) // it begins
	steps(6, true)
	steps(2, false)
	if s := again(); s.State != ScanRunning || s.Volume != "w" || s.Done != 1200 || s.Total != 4000 || s.Moved < 1180 {
		t.Errorf("%+v", s)
	}
	steps(4, true) // the first one begins
	if err := r.Scan(ctx, "w", ScanPause); err != nil {
		t.Fatal(err)
	}
	if s := again(); s.State != ScanPaused || s.Done != 1800 {
		t.Errorf("%+v", s)
	}
	if err := r.Scan(ctx, "w", ScanResume); err != nil {
		t.Fatal(err)
	}
	r.cutPower(blocktest.CutRandom, 1)
	s := opened()
	for n := 0; s.State == ScanRunning && n < 100; n++ {
		steps(1, true)
		s = r.Stats().Scan
	}
	if r.fold(); s.State != ScanDone || s.Done != 4000 || s.Total != 4000 {
		t.Errorf("%+v", s)
	}
	if used := r.used(); used > 4500 {
		t.Errorf("%d blocks are in use for 4000", used)
	}
	if s := again(); s.State != ScanDone || s.Volume != "w" {
		t.Errorf("%+v", s)
	}
	// What the volume was told meanwhile counts.
	if err := r.SetSharing(ctx, "w", 0); err != nil {
		t.Fatal(err)
	}
	if err := r.Scan(ctx, "w", ScanUndo); err != nil {
		t.Fatal(err)
	}
	if err := r.SetSharing(ctx, "w", 4); err != nil {
		t.Fatal(err)
	}
	again()
	steps(2, false)
	if s := r.Stats().Scan; s.State != ScanStopped || !s.Undo || !strings.Contains(s.Why, "switched on") {
		t.Errorf("%+v", s)
	}
	// Without a record none was made.
	for _, b := range scanBlocks {
		if err := r.set.Do([]*devices.IO{{Op: hpdi.OpWrite, At: block.At(0, b), Vec: [][]byte{make([]byte, block.Size)}}}); err != nil {
			t.Fatal(err)
		}
	}
	if s := again(); s.State != ScanNever {
		t.Errorf("%+v", s)
	}
	r.mustCheck()
	r.shut()
}

// Clients write, guests die and power is cut while a volume is scanned to and fro:
// nobody notices.
func TestScanRandomly(t *testing.T) {
	long(t)
	ctx := context.Background()
	for seed := range uint64(few(12)) {
		rng := rand.New(rand.NewPCG(seed, 6))
		r := newRig(t, 1+int(seed%2), testSize)
		r.repeats = true
		r.mustOpen()
		v := r.volume("v", 3<<20)
		m := blocktest.NewModel(seed)
		moved := uint64(0)
		for round := range 8 {
			if s := r.knownScan(); s.State != ScanRunning { // or it goes on
				action, run := ScanStart, int(seed%3+1)
				if s.State != ScanNever && !s.Undo {
					action, run = ScanUndo, 0
				}
				if err := r.SetSharing(ctx, "v", run); err != nil {
					t.Fatal(err)
				}
				if err := r.Scan(ctx, "v", action); err != nil {
					t.Fatal(err)
				}
			}
			if rng.IntN(2) == 0 {
				r.clock.CutAfter(r.clock.Ops() + 1 + rng.Int64N(400))
			}
			var err error
			for n := 0; n < 12 && err == nil; n++ {
				if err = exercise(r, v, m, rng, 5); err == nil {
					err = r.scanStep()
				}
			}
			if err != nil && !errors.Is(err, blocktest.ErrPowerCut) {
				t.Fatalf("seed %d round %d: %v", seed, round, err)
			}
			moved += r.Stats().Scan.Moved
			least := m.Acked()
			if round%3 == 2 || err != nil {
				least = m.Flushed()
				r.cutPower(blocktest.CutRandom, seed<<8+uint64(round))
			} else {
				r.clock.CutAfter(0)
				r.die()
			}
			v = r.comesBack(m, least, fmt.Sprintf("seed %d round %d", seed, round))
		}
		if moved == 0 {
			t.Errorf("seed %d: nothing was moved", seed)
		}
		r.shut()
	}
}
