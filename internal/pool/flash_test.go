package pool

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/flashmap"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

// flashSet is the size of a data set in tests.
const flashSet = flashmap.MinSetBytes

// addFlash adds a flash device to the pool.
func (r *rig) addFlash(size int64) *blocktest.Crash {
	r.t.Helper()
	d := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "ssd", Size: size, Seed: 78, Clock: r.clock, Direct: true})
	if err := r.AddFlash(context.Background(), d, flashSet); err != nil {
		r.t.Fatal(err)
	}
	r.devs = append(r.devs, d)
	return d
}

// flashStep lets the flash layer do its next step at once, as Run does in time.
func (r *rig) flashStep() error {
	return r.do(context.Background(), func() error {
		f := r.Pool.flash
		f.next, f.decideAt, f.pins.next, f.tickAt = time.Time{}, time.Time{}, time.Time{}, time.Time{}
		f.work(time.Now())
		return r.machine.Broken()
	})
}

// flashUntil steps the flash layer until ok.
func (r *rig) flashUntil(what string, ok func(s FlashStats) bool) FlashStats {
	r.t.Helper()
	for range 5000 {
		if err := r.flashStep(); err != nil {
			r.t.Fatal(err)
		}
		if s := r.Flash(); ok(s) {
			return s
		}
	}
	s := r.Flash()
	r.t.Fatalf("%s: it never came to that: %+v", what, s)
	return s
}

// pin pins a volume and waits until it is whole on flash.
func (r *rig) pin(name string) {
	r.t.Helper()
	if _, err := r.ChangeFlash(context.Background(), FlashChange{Pin: []FlashPin{{Volume: name}}}); err != nil {
		r.t.Fatal(err)
	}
	r.flashUntil("pin "+name, func(s FlashStats) bool {
		i := slices.IndexFunc(s.Pins, func(p FlashPinned) bool { return p.Volume == name })
		return i >= 0 && s.Pins[i].State == "whole"
	})
}

// fill writes n blocks of a volume, each of its own content.
func (r *rig) fill(v block.Volume, n int64, salt byte) {
	r.t.Helper()
	for b := range n {
		err := write(v, b*block.Size, pattern(byte(b)+salt))
		if err == nil && b%64 == 63 { // nobody else makes room in the log
			err = r.Commit(context.Background())
		}
		if err != nil {
			r.t.Fatal(err)
		}
	}
}

func (r *rig) wantFilled(v block.Volume, n int64, salt byte) {
	r.t.Helper()
	got := make([]byte, block.Size)
	for b := range n {
		if err := v.Read(context.Background(), got, b*block.Size); err != nil {
			r.t.Fatalf("block %d: %v", b, err)
		}
		if !bytes.Equal(got, pattern(byte(b)+salt)) {
			r.t.Fatalf("block %d holds something else", b)
		}
	}
}

// A pool gets flash; what is pinned lies there, wherever it is written, over deaths and power
// cuts; all of it goes back, and the device leaves the pool.
func TestFlash(t *testing.T) {
	r := newRig(t, 2, 64<<20)
	r.mustOpen()
	v := r.volume("v", 16<<20)
	const n = 512
	r.fill(v, n, 1)
	r.fold()
	r.addFlash(16 << 20)
	r.wantFilled(v, n, 1)
	r.pin("v")
	s := r.Flash()
	if s.Promoted < n/16/2 || s.Used < n/16/2 {
		t.Fatalf("%d data sets moved, %d are on flash", s.Promoted, s.Used)
	}
	x, err := r.ExplainFlash(context.Background(), "v", 100*block.Size)
	if err != nil || !x.OnFlash || !x.Pinned || !strings.Contains(x.Summary, "pinned") {
		t.Fatalf("%+v, %v", x, err)
	}
	r.wantFilled(v, n, 1)
	r.fill(v, n, 2) // elsewhere
	r.fold()
	r.flashUntil("rewritten", func(s FlashStats) bool { return len(s.Pins) == 1 && s.Pins[0].State == "whole" })
	r.wantFilled(v, n, 2)
	for round := range 4 {
		if round%2 == 0 {
			r.die()
		} else {
			if err := v.Flush(context.Background()); err != nil {
				t.Fatal(err)
			}
			r.cutPower(blocktest.CutRandom, uint64(round))
		}
		r.mustOpen()
		if v, err = r.Volume("v"); err != nil {
			t.Fatal(err)
		}
		r.wantFilled(v, n, 2+byte(round))
		if s := r.Flash(); s.Used == 0 {
			t.Fatal("nothing is on flash any more")
		}
		r.flashUntil("reopened", func(s FlashStats) bool { return len(s.Pins) == 1 && s.Pins[0].State == "whole" })
		r.mustCheck()
		r.fill(v, n, 3+byte(round))
		if err := r.Commit(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.EvacuateFlash(context.Background(), EvacuateStart); err != nil {
		t.Fatal(err)
	}
	r.flashUntil("evacuated", func(s FlashStats) bool { return s.State == FlashEvacuated })
	if s := r.Flash(); s.Used != 0 || s.Left != 0 {
		t.Fatalf("after the evacuation %d are on flash", s.Used)
	}
	r.die()
	r.mustOpen()
	r.flashUntil("evacuated still", func(s FlashStats) bool { return s.State == FlashEvacuated })
	if err := r.RemoveDevice(context.Background(), "ssd"); err != nil {
		t.Fatal(err)
	}
	r.flashGoes()
	if s := r.Flash(); s.Device != "" {
		t.Fatalf("%+v", s)
	}
	if v, err = r.Volume("v"); err != nil {
		t.Fatal(err)
	}
	r.wantFilled(v, n, 6)
	r.shut()
}

// Flash that is small beside the disks of its pool has a map for all of them, too.
func TestFlashReach(t *testing.T) {
	tib := uint64(1<<40) / block.Size
	roots := []cp.DeviceRoot{{Blocks: tib}, {Blocks: 2 * tib}, {Blocks: tib, Class: cp.ClassMemory}, {Blocks: tib, State: cp.DeviceGone}}
	for size, want := range map[int64]int64{1 << 30: 6 << 40, 1 << 40: 64 << 40} {
		if got := reach(size, roots); got != want {
			t.Errorf("flash of %d bytes: %d", size, got)
		}
	}
}

// countsQueues counts the queues of a device that are open.
type countsQueues struct {
	hpdi.Device
	open *atomic.Int64
}

func (d countsQueues) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	if err == nil {
		d.open.Add(1)
	}
	return countedQueue{q, d.open}, err
}

type countedQueue struct {
	hpdi.Queue
	open *atomic.Int64
}

func (q countedQueue) Close() error {
	q.open.Add(-1)
	return q.Queue.Close()
}

// A flash device that has left a pool, which was opened with it, is used by nobody: it can be
// closed, and opened by somebody else.
func TestFlashLeavesNoQueue(t *testing.T) {
	r := newRig(t, 1, 64<<20)
	r.mustOpen()
	v := r.volume("v", 16<<20)
	r.addFlash(16 << 20)
	r.fill(v, 64, 1)
	r.die()
	var open atomic.Int64
	r.wrap = func(_ int, d hpdi.Device) hpdi.Device {
		if d.Info().Name != "ssd" {
			return d
		}
		return countsQueues{d, &open}
	}
	left := int64(-1)
	r.removal.Removed = func(d hpdi.Device) {
		left = open.Load()
		_ = d.Close()
	}
	r.mustOpen()
	v, err := r.Volume("v")
	if err != nil {
		t.Fatal(err)
	}
	r.wantFilled(v, 64, 1)
	if err := errors.Join(v.Flush(context.Background()), r.RemoveDevice(context.Background(), "ssd")); err != nil {
		t.Fatal(err)
	}
	r.flashGoes()
	if left != 0 {
		t.Errorf("%d queues of the flash device were open when it had left the pool", left)
	}
	r.wantFilled(v, 64, 1)
	if err := errors.Join(write(v, 0, pattern(1)), v.Flush(context.Background())); err != nil {
		t.Fatal(err)
	}
	r.shut()
}

// A pool does not open without its flash device.
func TestFlashMissing(t *testing.T) {
	r := newRig(t, 1, 64<<20)
	r.mustOpen()
	v := r.volume("v", 16<<20)
	r.fill(v, 64, 1)
	r.fold()
	r.addFlash(16 << 20)
	r.pin("v")
	r.die()
	all := r.devs
	r.devs = all[:1]
	if err := r.open(); !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), "missing") {
		t.Fatal(err)
	}
	r.reopen()
	all[0] = r.devs[0]
	r.devs = all
	r.mustOpen()
	v, err := r.Volume("v")
	if err != nil {
		t.Fatal(err)
	}
	r.wantFilled(v, 64, 1)
	r.shut()
}

// What is wrong with a flash device, or with what is asked of it, is refused.
func TestFlashRefused(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 64<<20)
	r.mustOpen()
	r.volume("v", 16<<20)
	for _, err := range []error{
		r.EvacuateFlash(ctx, EvacuateStart),
		second(r.ChangeFlash(ctx, FlashChange{})),
		second(r.ExplainFlash(ctx, "v", 0)),
		second(r.SimulateFlash(ctx, policy.Defaults(), 0)),
	} {
		if !errors.Is(err, block.ErrNotFound) || !strings.Contains(err.Error(), "has no flash device") {
			t.Fatal(err)
		}
	}
	small := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "small", Size: 1 << 20, Clock: r.clock, Direct: true})
	if err := r.AddFlash(ctx, small, 0); !errors.Is(err, block.ErrInvalid) {
		t.Fatal(err)
	}
	odd := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "odd", Size: 16 << 20, Clock: r.clock, Direct: true})
	if err := r.AddFlash(ctx, odd, 100<<10); !errors.Is(err, block.ErrInvalid) {
		t.Fatal(err)
	}
	if err := r.AddFlash(ctx, r.devs[0], 0); !errors.Is(err, block.ErrExists) {
		t.Fatal(err)
	}
	r.addFlash(16 << 20)
	if err := r.AddFlash(ctx, odd, 0); !errors.Is(err, block.ErrExists) {
		t.Fatal(err)
	}
	pin := FlashPin{Volume: "v", Offset: 1 << 20, Length: 1 << 20}
	for _, c := range []struct {
		change FlashChange
		kind   error
	}{
		{FlashChange{Pin: []FlashPin{{Volume: "w"}}}, block.ErrNotFound},
		{FlashChange{Pin: []FlashPin{{Volume: "v", Offset: -1}}}, block.ErrInvalid},
		{FlashChange{Pin: []FlashPin{{Volume: "v", Offset: 16 << 20}}}, block.ErrInvalid},
		{FlashChange{Pin: []FlashPin{pin, pin}}, block.ErrExists},
		{FlashChange{Unpin: []FlashPin{pin}}, block.ErrNotFound},
		{FlashChange{Classes: map[string]string{"nothing": "x"}}, block.ErrNotFound},
		{FlashChange{Classes: map[string]string{"disk0": strings.Repeat("x", 100)}}, block.ErrInvalid},
	} {
		if _, err := r.ChangeFlash(ctx, c.change); !errors.Is(err, c.kind) {
			t.Errorf("%+v: %v", c.change, err)
		}
	}
	var rule *policy.RuleError
	_, err := r.ChangeFlash(ctx, FlashChange{Params: func(p policy.Params) (policy.Params, error) {
		q := policy.DefaultPattern()
		q.Promote = "reads > "
		p.Patterns = map[string]policy.Pattern{policy.AnyType: q}
		return p, nil
	}})
	if !errors.As(err, &rule) || rule.Line != 1 {
		t.Fatal(err)
	}
	if _, pins, err := r.FlashPolicy(ctx); err != nil || len(pins) > 0 {
		t.Fatalf("what was refused counts: %v, %v", pins, err)
	}
	if err := r.EvacuateFlash(ctx, "sideways"); !errors.Is(err, block.ErrInvalid) {
		t.Fatal(err)
	}
	r.shut()
}

func second[T any](_ T, err error) error { return err }

// What people have said is there again after a death, and damage of it costs the defaults and
// an event.
func TestFlashKept(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 64<<20)
	r.mustOpen()
	r.volume("v", 16<<20)
	r.addFlash(16 << 20)
	changes, err := r.ChangeFlash(ctx, FlashChange{
		Params: func(p policy.Params) (policy.Params, error) {
			p.Budget.Migrate = 7 << 20
			return p, nil
		},
		Classes: map[string]string{"disk0": "sata"},
		Pin:     []FlashPin{{Volume: "v", Offset: 1 << 20, Length: 1 << 20}},
	})
	if err != nil || len(changes) != 1 || changes[0].Name != "budget.migrate" {
		t.Fatalf("%+v, %v", changes, err)
	}
	if err := r.RenameVolume(ctx, "v", "w"); err != nil {
		t.Fatal(err)
	}
	r.die()
	r.mustOpen()
	p, pins, err := r.FlashPolicy(ctx)
	if err != nil || p.Budget.Migrate != 7<<20 || len(pins) != 1 || pins[0] != (FlashPin{"w", 1 << 20, 1 << 20}) {
		t.Fatalf("%+v, %+v, %v", p.Budget, pins, err)
	}
	if s := r.Flash(); s.Primaries[0].Class != "sata" || !s.Primaries[0].Given {
		t.Fatalf("%+v", s.Primaries)
	}
	r.die()
	var told []string
	o := r.options()
	for _, b := range notePlaces(t, r.devs[1]) {
		r.devs[1].Corrupt(b*block.Size+80, 1)
	}
	o.Flash.Tell = func(e FlashEvent) { told = append(told, e.Kind) }
	if err := r.openWith(o); err != nil {
		t.Fatal(err)
	}
	if p, pins, err := r.FlashPolicy(ctx); err != nil || p.Budget.Migrate == 7<<20 || len(pins) != 0 || !slices.Contains(told, "flash-policy-lost") {
		t.Fatalf("%+v, %+v, %v, %v", p.Budget, pins, err, told)
	}
	r.shut()
}

// notePlaces returns the blocks of a flash device at which the policy is kept.
func notePlaces(t *testing.T, d *blocktest.Crash) (at []int64) {
	t.Helper()
	p := make([]byte, block.Size)
	q, err := d.NewQueue(1)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = q.Close() }()
	for b := range int64(256) {
		if err := readBlock(q, b, p); err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(p, []byte(`"policy":`)) || bytes.Contains(p, []byte("PLXrmnot")) {
			at = append(at, b)
		}
	}
	if len(at) == 0 {
		t.Fatal("the policy is nowhere")
	}
	return at
}

func readBlock(q hpdi.Queue, b int64, p []byte) error {
	return hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: b * block.Size, Vec: [][]byte{p}})
}

// flashGoes lets a removal of the flash device come to its end.
func (r *rig) flashGoes() {
	r.t.Helper()
	for range 5000 {
		if err := errors.Join(r.flashStep(), r.removalStep()); err != nil {
			r.t.Fatal(err)
		}
		if !r.removing() {
			r.devs = slices.DeleteFunc(r.devs, func(d *blocktest.Crash) bool { return d.Info().Name == "ssd" })
			return
		}
	}
	r.t.Fatalf("the flash device never left: %+v", r.Stats().Removal)
}

// flaky puts a device that misbehaves by rule in the place of the flash device, from when the
// pool is opened next.
func (r *rig) flaky() (fault func() *blocktest.Fault) {
	var f *blocktest.Fault
	r.wrap = func(i int, d hpdi.Device) hpdi.Device {
		if d.Info().Name != "ssd" {
			return d
		}
		f = blocktest.NewFault(d, 5)
		return f
	}
	return func() *blocktest.Fault { return f }
}

// A flash device that fails is an error for what is on it, and for nothing else: clients
// write on, wherever that was before, and when it works again it is used again.
func TestFlashFails(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 64<<20)
	r.mustOpen()
	v, w := r.volume("v", 16<<20), r.volume("w", 16<<20)
	r.fill(v, 128, 1)
	r.fill(w, 128, 2)
	r.fold()
	r.addFlash(16 << 20)
	r.pin("v")
	r.die()
	fault := r.flaky()
	var told []string
	o := r.options()
	o.Flash.Tell = func(e FlashEvent) { told = append(told, e.Kind) }
	if err := r.openWith(o); err != nil {
		t.Fatal(err)
	}
	v, _ = r.Volume("v")
	w, _ = r.Volume("w")
	r.wantFilled(w, 128, 2)
	if err := r.flashStep(); err != nil {
		t.Fatal(err)
	}
	fault().Add(blocktest.Rule{Err: hpdi.ErrClosed})
	got := make([]byte, block.Size)
	if err := v.Read(ctx, got, 0); err == nil || !strings.Contains(err.Error(), "ssd") {
		t.Fatalf("what is on flash reads as %v, %v", got[0], err)
	}
	r.forget()
	r.wantFilled(w, 128, 2)
	// What was on flash is written anew: the point fails once, and goes elsewhere then.
	for b := range int64(128) {
		if err := write(v, b*block.Size, pattern(byte(b)+3)); err != nil {
			t.Fatal(err)
		}
		if b%32 != 31 {
			continue
		}
		var err error
		for range 3 {
			if err = r.Commit(ctx); err == nil {
				break
			}
		}
		if err != nil {
			t.Fatalf("block %d: %v", b, err)
		}
	}
	r.forget()
	r.wantFilled(v, 128, 3)
	r.flashUntil("failed", func(s FlashStats) bool { return s.State == FlashFailed && s.Why != "" })
	if !slices.Equal(told, []string{"flash-failed"}) {
		t.Fatal(told)
	}
	fault().Clear()
	if err := r.do(ctx, func() error {
		r.Pool.flash.shunned = time.Now().Add(-flashRetry)
		r.space.ShunCheap(false)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	r.flashUntil("works", func(s FlashStats) bool { return s.State == FlashInUse })
	if !slices.Equal(told, []string{"flash-failed", "flash-works"}) {
		t.Fatal(told)
	}
	r.wantFilled(v, 128, 3)
	r.shut()
}

// A pool with flash moves to another guest with all that is on it, what was collected too.
func TestFlashExport(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 2, 64<<20)
	r.mustOpen()
	v := r.volume("v", 16<<20)
	r.fill(v, 128, 1)
	r.fold()
	r.addFlash(16 << 20)
	r.pin("v")
	id := r.ID()
	r.stop()
	if err := r.Pool.Export(ctx); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	if err := Adopt(r.devices(), AdoptOptions{Pool: id, Name: "q", Identity: "b"}); err != nil {
		t.Fatal(err)
	}
	r.reopenDevices()
	r.mustOpen()
	if r.Name() != "q" {
		t.Fatal(r.Name())
	}
	v, err := r.Volume("v")
	if err != nil {
		t.Fatal(err)
	}
	r.wantFilled(v, 128, 1)
	if s := r.Flash(); s.Used == 0 || s.Device != "ssd" {
		t.Fatalf("%+v", s)
	}
	r.shut()
}

// A flash device that has grown has more slots when the pool is opened next.
func TestFlashGrows(t *testing.T) {
	r := newRig(t, 1, 64<<20)
	r.mustOpen()
	v := r.volume("v", 16<<20)
	r.fill(v, 128, 1)
	r.fold()
	r.addFlash(16 << 20)
	r.pin("v")
	before := r.Flash().Slots
	r.die()
	r.devs[1] = r.devs[1].Resize(24 << 20)
	var told []string
	o := r.options()
	o.Flash.Tell = func(e FlashEvent) { told = append(told, e.Kind) }
	if err := r.openWith(o); err != nil {
		t.Fatal(err)
	}
	if s := r.Flash(); s.Slots < before+100 || !slices.Equal(told, []string{"flash-grown"}) {
		t.Fatalf("%d slots, %d before, %v", s.Slots, before, told)
	}
	v, err := r.Volume("v")
	if err != nil {
		t.Fatal(err)
	}
	r.wantFilled(v, 128, 1)
	r.shut()
}
