package pool

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/space"
)

// finds checks the open pool and wants problems with certain words.
func (r *rig) finds(words ...string) CheckReport {
	r.t.Helper()
	report, err := r.Check(context.Background(), CheckOptions{Data: true})
	if err != nil {
		r.t.Fatal(err)
	}
	all := strings.Join(report.Problems, "\n")
	for _, w := range words {
		if !strings.Contains(all, w) {
			r.t.Errorf("check does not say %q, but:\n%s", w, all)
		}
	}
	return report
}

// filled returns a rig whose volume v has n folded blocks.
func filled(t *testing.T, n int) (*rig, block.Volume) {
	r := newRig(t, 1, testSize)
	r.mustOpen()
	v := r.volume("v", 64<<20)
	for i := range n {
		if err := write(v, int64(i)*block.Size, pattern(byte(i%250+1))); err != nil {
			t.Fatal(err)
		}
		if i%100 == 99 {
			if err := r.Commit(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := r.Fold(context.Background()); err != nil {
		t.Fatal(err)
	}
	return r, v
}

// leave ends a rig whose state a test has spoilt.
func (r *rig) leave() {
	r.stop()
	if err := r.Pool.free(); err != nil {
		r.t.Error(err)
	}
}

// Wrong counts and references in memory, as a bug would leave them, are what a
// check of an open pool is for: counts are found in it, whatever they are.
func TestCheckFindsWrongState(t *testing.T) {
	at := func(r *rig) block.Physical { // a block in use
		var p [1]block.Pointer
		if err := r.bmap.Lookup(1, 7, p[:]); err != nil {
			t.Fatal(err)
		}
		return p[0].Phys
	}
	point := func(r *rig, lba block.Logical, to block.Physical) {
		r.bmap.Update(func(o *blockmap.Overlay) { o.Set(1, lba, block.Pointer{Phys: to, Birth: 1, Sum: 1}) })
	}
	for _, test := range []struct {
		name  string
		spoil func(r *rig) (words []string)
	}{
		{"a count that is too high", func(r *rig) []string {
			p := at(r)
			if err := r.space.Inc(space.Run{At: p, N: 1}); err != nil {
				t.Fatal(err)
			}
			return []string{fmt.Sprintf("block %v has reference count 2, 1 references were found", p)}
		}},
		{"a block in use that is free", func(r *rig) []string {
			p := at(r)
			if err := r.space.Dec(space.Run{At: p, N: 1}); err != nil {
				t.Fatal(err)
			}
			return []string{fmt.Sprintf("block %v has reference count 0, 1 references were found", p)}
		}},
		{"a reference that was not counted", func(r *rig) []string {
			p := at(r)
			point(r, 9000, p)
			return []string{fmt.Sprintf("block %v has reference count 1, 2 references were found", p), `block 9000 of volume "v"`}
		}},
		{"a reference to a device that is not there", func(r *rig) []string {
			point(r, 9000, block.At(3, 5))
			return []string{"reference to block 3:5", "outside the pool's data area"}
		}},
		{"a reference to the journal", func(r *rig) []string {
			point(r, 9000, block.At(0, r.label.Layout.Journal))
			return []string{"outside the pool's data area"}
		}},
		{"a reference behind the end", func(r *rig) []string {
			point(r, 9000, block.At(0, r.label.Blocks))
			return []string{"outside the pool's data area"}
		}},
		{"more references than a count holds", func(r *rig) []string {
			p := at(r)
			for i := range block.Logical(300) {
				point(r, 9000+i, p)
			}
			return []string{fmt.Sprintf("reference count of block %v is at its limit", p)}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			r, _ := filled(t, 20)
			r.mustCheck()
			r.finds(test.spoil(r)...)
			r.leave()
		})
	}
}

// The list of problems is bounded, their number is told.
func TestCheckFindsMany(t *testing.T) {
	r, _ := filled(t, 150)
	ptrs := make([]block.Pointer, 150)
	if err := r.bmap.Lookup(1, 0, ptrs); err != nil {
		t.Fatal(err)
	}
	for _, p := range ptrs {
		r.devs[0].Corrupt(int64(p.Phys.Block())*block.Size+9, 1)
	}
	if report := r.finds(`of volume "v"`); len(report.Problems) != maxProblems || report.MoreProblem != 50 {
		t.Errorf("%d problems and %d more", len(report.Problems), report.MoreProblem)
	}
	for _, p := range ptrs {
		r.devs[0].Corrupt(int64(p.Phys.Block())*block.Size+9, 1)
	}
	r.shut()
}

// Whoever asks is told which part of a check was done, and how much of it.
func TestCheckProgress(t *testing.T) {
	r, _ := filled(t, 150)
	var p CheckProgress
	report, err := r.Check(context.Background(), CheckOptions{Progress: &p})
	if phase, done, _ := p.Load(); err != nil || phase != "metadata" || done != report.Pages*block.Size {
		t.Errorf("%v: %s, %d bytes of %d pages", err, phase, done, report.Pages)
	}
	_, err = r.Check(context.Background(), CheckOptions{Progress: &p, Data: true})
	if phase, done, total := p.Load(); err != nil || phase != "data" || done != 150*block.Size || total != done {
		t.Errorf("%v: %s, %d bytes of %d", err, phase, done, total)
	}
	r.shut()
}

// A damaged record of the log is named.
func TestCheckFindsDamagedRecord(t *testing.T) {
	r, v := filled(t, 1)
	if err := write(v, 0, pattern(9)); err != nil {
		t.Fatal(err)
	}
	mem := r.Region().Log()
	for i := block.Size; i < len(mem)-block.Size; i++ { // both copies, between the headers
		if mem[i] != 0 && mem[i] != 9 {
			mem[i] ^= 0x55
		}
	}
	r.finds("operation log: ")
	r.leave()
}

// Copies of labels and superblocks that are whole and belong elsewhere.
func TestCheckFindsForeignCopies(t *testing.T) {
	r, _ := filled(t, 3)
	l, err := ReadLabel(r.devs[0])
	if err != nil {
		t.Fatal(err)
	}
	sb := r.machine.Superblock()
	put := func(at uint64, content []byte) (undo func()) {
		t.Helper()
		old, now := make([]byte, block.Size), make([]byte, block.Size)
		copy(now, content)
		q, err := r.devs[0].NewQueue(1)
		if err != nil {
			t.Fatal(err)
		}
		do := func(op hpdi.Op, p []byte) {
			t.Helper()
			if err := hpdi.Do(q, &hpdi.Request{Op: op, Offset: int64(at) * block.Size, Vec: [][]byte{p}}); err != nil {
				t.Fatal(err)
			}
		}
		do(hpdi.OpRead, old)
		do(hpdi.OpWrite, now)
		return func() { do(hpdi.OpWrite, old) }
	}
	other := l
	other.Device[3]++
	undo := put(labelBlocks[1], other.encode())
	r.finds(fmt.Sprintf("copy of the label at block 0:128: it is of device %v of pool %v", other.Device, l.Pool))
	undo()
	older := sb
	older.Generation -= 2
	undo = put(cp.SuperblockAt(sb.Generation)[1], older.Encode())
	r.finds(fmt.Sprintf("copy of the superblock at block 0:%d: it is of generation %d instead of %d", cp.SuperblockAt(sb.Generation)[1], older.Generation, sb.Generation))
	undo()
	r.shut()
}

// A fold under way that cannot be completed is a problem like others; one
// whose end nobody knows keeps the check from being made.
func TestCheckDuringFold(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, testSize)
	f := r.faulty()
	r.mustOpen()
	v := r.volume("v", 1<<20)
	if err := write(v, 0, pattern(1)); err != nil {
		t.Fatal(err)
	}
	if err := r.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	remove := f[0].Add(blocktest.Rule{Op: hpdi.OpWrite, Err: errMedium})
	says(t, "fold", r.Fold(ctx), errMedium)
	r.finds("fold 1: ", errMedium.Error())
	remove()
	r.mustCheck()

	if err := write(v, 0, pattern(2)); err != nil {
		t.Fatal(err)
	}
	if err := r.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	next := cp.SuperblockAt(r.machine.Superblock().Generation + 1)[0]
	f[0].Add(blocktest.Rule{Op: hpdi.OpWrite, Offset: int64(next) * block.Size, Length: block.Size, Err: errMedium})
	says(t, "fold", r.Fold(ctx), errMedium, "must be opened again")
	_, err := r.Check(ctx, CheckOptions{})
	says(t, "check", err, errMedium, "must be opened again")
	r.wrap = nil
	r.die()
	r.mustOpen()
	if v, err = r.Volume("v"); err != nil {
		t.Fatal(err)
	}
	verifyBlocks(t, v, map[int64]byte{0: 2})
	r.shut()
}

// A check ends at each of its stages when nobody waits for it any more.
func TestCheckCancelled(t *testing.T) {
	r, _ := filled(t, 300)
	r.die()
	f := r.faulty()
	for stop := 0; ; stop++ {
		devs := r.devices()
		view, err := OpenView(ViewOptions{Devices: devs, RegionPath: r.region, BootID: fmt.Sprint(r.boot)})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		f[0].Add(blocktest.Rule{Op: hpdi.OpRead, Skip: stop, Count: 1, Hold: func(*hpdi.Request) { cancel() }})
		_, err = view.Check(ctx, CheckOptions{Data: true})
		hit := f[0].Hits() > 0
		cancel()
		if e := view.Close(); e != nil {
			t.Error(e)
		}
		r.devs[0] = r.devs[0].Reopen()
		if !hit {
			if err != nil {
				t.Errorf("not cancelled: %v", err)
			}
			break
		}
		// What was read last may have been the last there is.
		if err != nil {
			says(t, fmt.Sprint("cancelled at read ", stop), err, context.Canceled)
		}
	}
	r.wrap = nil
	r.mustOpen()
	r.shut()
}
