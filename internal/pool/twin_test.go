package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/blockmap"
)

// unreadable makes operations on a page of the device fail, on its twin, too.
func unreadable(f *blocktest.Fault, op hpdi.Op, p block.Pointer) {
	for _, at := range []block.Physical{p.Phys, p.Second().Phys} {
		if at != block.None {
			f.Add(blocktest.Rule{Op: op, Offset: int64(at.Block()) * block.Size, Length: block.Size, Err: errMedium})
		}
	}
}

// mustVolume returns a volume that there is.
func (r *rig) mustVolume(name string) block.Volume {
	r.t.Helper()
	v, err := r.Volume(name)
	if err != nil {
		r.t.Fatal(err)
	}
	return v
}

// metadata returns the pointers of all pages of a pool's trees.
func (r *rig) metadata() (pages []block.Pointer) {
	r.t.Helper()
	err := r.do(context.Background(), func() (err error) {
		pages, err = pagesOf(r.Pool)
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return pages
}

func pagesOf(p *Pool) (pages []block.Pointer, err error) {
	sb := p.machine.Superblock()
	roots := []block.Pointer{sb.Catalogue}
	for _, d := range sb.Devices {
		roots = append(roots, d.Counts)
	}
	for _, t := range p.bmap.Trees() {
		roots = append(roots, t.Root)
	}
	for _, root := range roots {
		if err := blockmap.Walk(p.reader, root, func(p block.Pointer, _ int, _ uint64) (bool, error) {
			pages = append(pages, p)
			return true, nil
		}); err != nil {
			return nil, err
		}
	}
	return pages, nil
}

// The pages of a small fold all have twins, far from them, where devices keep no copies;
// where they do, none has.
func TestEveryPageHasATwin(t *testing.T) {
	for _, devices := range []int{1, 2, 3} {
		r := newRig(t, devices, testSize)
		r.mustOpen()
		v := r.volume("v", 8<<20)
		fillBlocks(r, v, 700)
		for _, p := range r.metadata() {
			second := p.Second().Phys
			switch {
			case p.Twin == 0:
				t.Errorf("%d devices: page at %v has no twin", devices, p)
			case second.Device() != p.Phys.Device():
			case devices > 1 || second-p.Phys < testSize/block.Size/16:
				t.Errorf("%d devices: the twin of the page at %v is at %v", devices, p, second)
			}
		}
		if !r.machine.Superblock().Twins {
			t.Error("the superblock does not tell")
		}
		r.shut()
	}
	r, m := newMirroredRig(t, 2)
	r.mustOpen()
	level(t, m())
	fillBlocks(r, r.volume("v", 8<<20), 700)
	for _, p := range r.metadata() {
		if p.Twin != 0 {
			t.Errorf("mirror: page at %v has a twin", p)
		}
	}
	if r.machine.Superblock().Twins {
		t.Error("mirror: the superblock tells of twins")
	}
	r.shut()
}

// Each page of metadata in turn, in one of its two places, rots or cannot be read:
// check tells, everything reads and folds, and is mended by reading, or by a scrub.
func TestAnyPageMayDecay(t *testing.T) {
	long(t)
	for _, devices := range []int{1, 2}[:few(2)] {
		for _, place := range []string{"first", "twin"} {
			t.Run(fmt.Sprintf("%s of %d", place, devices), func(t *testing.T) { decayPages(t, devices, place == "twin") })
		}
	}
}

func decayPages(t *testing.T, devices int, twin bool) {
	ctx := context.Background()
	r := newRig(t, devices, 64<<20)
	r.mustOpen()
	v := r.volume("v", 8<<20)
	fillBlocks(r, v, 700)
	holds := map[int64]byte{}
	for i := range int64(700) {
		holds[i] = byte(i)
	}
	r.shut()
	r.reopenDevices()
	view, err := OpenView(ViewOptions{Devices: r.devices(), BootID: "1"})
	if err != nil {
		t.Fatal(err)
	}
	pages, err := pagesOf(view.p)
	if err := errors.Join(err, view.Close()); err != nil {
		t.Fatal(err)
	}
	sound := slices.Clone(r.devs)
	for i, p := range pages {
		at := p.Phys
		if twin {
			at = p.Second().Phys
		}
		clock := blocktest.NewClock()
		r.devs = nil
		for _, d := range sound {
			r.devs = append(r.devs, d.CutTo(clock, blocktest.KeepAll, 1))
		}
		r.devs[at.Device()].Corrupt(int64(at.Block())*block.Size+int64(i*37%block.Size), 0x10)
		looked, err := r.look()
		if err != nil || len(looked.Problems) != 1 {
			t.Fatalf("page at %v: an offline check found %q, %v", p, looked.Problems, err)
		}
		r.newCache()
		r.mustOpen()
		r.holds(holds)
		r.forget()
		if err := r.do(ctx, func() error { r.reader.Mend(); return nil }); err != nil {
			t.Fatal(err)
		}
		if twin {
			if s := r.scrubAll(); s.Now.Repaired != 1 || s.Now.Unreadable != 0 {
				t.Errorf("page at %v: %+v", p, s.Now)
			}
		} else if report, err := r.Check(ctx, CheckOptions{}); err != nil || len(report.Problems) > 1 {
			// It reads all pages, also those that nobody needed yet.
			t.Errorf("page at %v: %v, %v", p, report.Problems, err)
		}
		if n := r.Stats().Mended; n != 1 {
			t.Errorf("page at %v: %d pages were mended", p, n)
		}
		r.forget()
		r.mustCheck()
		if err := errors.Join(write(r.mustVolume("v"), 699*block.Size, pattern(1)), r.Fold(ctx)); err != nil {
			t.Errorf("page at %v: %v", p, err)
		}
		r.shut()
		if t.Failed() {
			return
		}
	}
	t.Logf("%d pages", len(pages))
}

// A page whose first place cannot be read or written any more is read from its twin as
// long as it is not moved.
func TestUnreadablePages(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 64<<20)
	r.mustOpen()
	fillBlocks(r, r.volume("v", 8<<20), 700)
	holds := map[int64]byte{}
	for i := range int64(700) {
		holds[i] = byte(i)
	}
	pages := r.metadata()
	r.die()
	f := r.faulty()
	r.mustOpen()
	for i, p := range pages {
		for _, at := range []block.Physical{p.Phys, p.Second().Phys} {
			one := block.Pointer{Phys: at}
			unreadable(f[0], hpdi.OpRead, one)
			unreadable(f[0], hpdi.OpWrite, one)
			r.forget()
			r.holds(holds)
			report, err := r.Check(ctx, CheckOptions{})
			if err != nil || len(report.Problems) != 1 {
				t.Fatalf("page %d at %v: check: %v, %v", i, p, report.Problems, err)
			}
			f[0].Clear()
		}
	}
	if n := r.Stats().Mended; n != 0 {
		t.Errorf("%d pages were mended that cannot be written", n)
	}
	unreadable(f[0], hpdi.OpRead, pages[0].First())
	for i := range int64(20) {
		r.forget()
		holds[i*30] = byte(i)
		if err := errors.Join(write(r.mustVolume("v"), i*30*block.Size, pattern(byte(i))), r.Fold(ctx)); err != nil {
			t.Fatal(err)
		}
	}
	f[0].Clear()
	r.holds(holds)
	r.shut()
}

// Readers note a bad page for the pool to mend; not one that a fold has freed meanwhile,
// whose place may be somebody else's by then.
func TestStalePagesAreNotMended(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 64<<20)
	r.mustOpen()
	v := r.volume("v", 8<<20)
	fillBlocks(r, v, 300)
	root := r.bmap.Trees()[v.Info().ID].Root
	r.rot(0, root.Phys)
	for _, fold := range []bool{true, false} {
		r.forget()
		if err := v.Read(ctx, make([]byte, block.Size), 0); err != nil {
			t.Fatal(err)
		}
		if fold {
			if err := errors.Join(write(v, 0, pattern(0)), r.Fold(ctx)); err != nil {
				t.Fatal(err)
			}
			before := r.Stats().Mended // the fold read the page, too
			if err := r.do(ctx, func() error { r.reader.Mend(); return nil }); err != nil {
				t.Fatal(err)
			}
			if n := r.Stats().Mended; n != before {
				t.Error("a page was mended that was freed")
			}
			r.rot(0, r.bmap.Trees()[v.Info().ID].Root.Phys)
			continue
		}
		before := r.Stats().Mended
		if err := r.do(ctx, func() error { r.reader.Mend(); return nil }); err != nil {
			t.Fatal(err)
		}
		if n := r.Stats().Mended; n != before+1 {
			t.Errorf("%d pages were mended after one was read", n-before)
		}
	}
	r.shut()
}

// scatter writes blocks of a volume of 8 GiB, each below a leaf of its own, and folds.
func scatter(r *rig, n int64, content byte) {
	r.t.Helper()
	v, err := r.Volume("v")
	if err != nil {
		v = r.volume("v", 8<<30)
	}
	for i := range n {
		if err := write(v, i*7<<20, pattern(content)); err != nil {
			r.t.Fatal(err)
		}
		if i%128 == 127 { // the log holds no more
			if err := r.Pool.Commit(context.Background()); err != nil {
				r.t.Fatal(err)
			}
		}
	}
	if err := r.Fold(context.Background()); err != nil {
		r.t.Fatal(err)
	}
}

// without returns how many pages of metadata there are, and how many have no twin.
func (r *rig) without() (pages, without int) {
	r.t.Helper()
	all := r.metadata()
	for _, p := range all {
		if p.Twin == 0 {
			without++
		}
	}
	return len(all), without
}

// A fold of overwrites that are scattered writes no leaf twice. A scrub gives leaves
// twins, of maps and of counts.
func TestScrubGivesTwins(t *testing.T) {
	for _, devices := range []int{1, 2} {
		r := newRig(t, devices, testSize)
		r.mustOpen()
		scatter(r, 600, 1)
		scatter(r, 600, 2)
		err := blockmap.Walk(r.reader, r.bmap.Trees()[1].Root, func(p block.Pointer, level int, _ uint64) (bool, error) {
			if (level > 0) != (p.Twin != 0) {
				t.Errorf("page of level %d at %v: twin %d", level, p, p.Twin)
			}
			return true, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		folds := r.Stats().Folds
		if s := r.scrubAll(); s.Now.Unreadable+s.Now.Repaired > 0 {
			t.Errorf("%+v", s.Now)
		}
		for r.Pool.scrub.wantsFold() || r.machine.Folding() {
			if err := r.scrubStep(); err != nil {
				t.Fatal(err)
			}
		}
		if all, none := r.without(); none > 0 || all < 600 {
			t.Errorf("%d of %d pages have no twin", none, all)
		}
		if n := r.Stats().Folds - folds; n > 12 {
			t.Errorf("%d folds", n)
		}
		// There is nothing left to be done.
		if r.scrubAll(); r.Pool.scrub.wantsFold() {
			t.Error("a second scrub wants a fold")
		}
		holds := map[int64]byte{}
		for i := range int64(600) {
			holds[i*7*256] = 2
		}
		r.holds(holds)
		r.shut()
	}
}

// No scrub takes for twins what the pool has promised, or is about to lack.
func TestNoTwinsWithoutRoom(t *testing.T) {
	r := newRig(t, 1, smallest)
	r.mustOpen()
	v := r.volume("v", 1<<30)
	for i := int64(0); ; i++ {
		if err := write(v, i<<20%(1<<30)+i>>10<<12, pattern(1)); errors.Is(err, block.ErrNoSpace) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if i%64 == 63 {
			if err := r.Pool.Commit(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := r.Fold(context.Background()); err != nil {
		t.Fatal(err)
	}
	_, before := r.without()
	if before == 0 {
		t.Fatal("every page has a twin although the pool is full")
	}
	if s := r.scrubAll(); s.State != ScrubDone || r.Pool.scrub.wantsFold() {
		t.Errorf("%+v", s)
	}
	r.shut()
}

// The power is cut, or the guest dies, at every operation of a fold that gives leaves
// twins: what there is afterwards is whole.
func TestRenewalInterrupted(t *testing.T) {
	long(t)
	step := int64(11)
	switch {
	case soak:
		step = 1
	case raced:
		step = 131
	}
	for _, power := range []bool{true, false} {
		ops := int64(0)
		for done := false; !done; ops += step {
			r := newRig(t, 1+int(ops%2), 64<<20)
			r.mustOpen()
			scatter(r, 300, 3)
			r.clock.CutAfter(r.clock.Ops() + ops + 1)
			off := func() bool { return r.clock.IsOff() }
			if err := r.Scrub(context.Background(), ScrubStart); err != nil && !off() {
				t.Fatal(err)
			}
			for !off() && (r.Pool.scrub.Stats().State == ScrubRunning || r.Pool.scrub.wantsFold() || r.machine.Folding()) {
				if err := r.scrubStep(); err != nil && !off() {
					t.Fatal(err)
				}
			}
			if done = !off(); power {
				r.cutPower(blocktest.CutRandom, uint64(ops))
			} else {
				r.cutPower(blocktest.KeepAll, 0)
				r.boot-- // the host, and so the region, live
			}
			r.mustOpen()
			holds := map[int64]byte{}
			for i := range int64(300) {
				holds[i*7*256] = 3
			}
			r.holds(holds)
			r.mustCheck()
			scatter(r, 20, 3)
			r.shut()
			if t.Failed() {
				t.Fatalf("power %v, operation %d", power, ops)
			}
		}
		t.Logf("power %v: %d operations", power, ops)
	}
}
