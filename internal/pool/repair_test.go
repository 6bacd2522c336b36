package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// writable opens a view of the rig's pool whose devices may be written to.
func (r *rig) writable() (*View, error) {
	o := r.options()
	return OpenView(ViewOptions{Devices: o.Devices, RegionPath: o.RegionPath, BatteryBacked: o.BatteryBacked, BootID: o.BootID})
}

// repair repairs the rig's pool, as a command does that nobody disturbs.
func (r *rig) repair() (CheckReport, error) {
	r.t.Helper()
	v, err := r.writable()
	if err != nil {
		return CheckReport{}, err
	}
	report, err := v.Repair(context.Background(), CheckOptions{Data: true})
	err = errors.Join(err, v.Close())
	r.reopenDevices()
	return report, err
}

// mustRepair repairs a pool of which everything can be mended.
func (r *rig) mustRepair() CheckReport {
	r.t.Helper()
	report, err := r.repair()
	if err != nil {
		r.t.Fatal("repair: ", err)
	}
	for _, p := range report.Problems {
		r.t.Error("after repair: ", p)
	}
	return report
}

// spoiler changes what is stored, with good checksums, as a bug would.
type spoiler struct {
	t   *testing.T
	v   *View
	rng *rand.Rand
}

// spoil lets fn change what a pool that nobody serves has stored.
func (r *rig) spoil(t *testing.T, rng *rand.Rand, fn func(x *spoiler)) {
	t.Helper()
	v, err := r.writable()
	if err != nil {
		t.Fatal(err)
	}
	fn(&spoiler{t, v, rng})
	if err := errors.Join(v.p.set.Sync(), v.Close()); err != nil {
		t.Fatal(err)
	}
	r.reopenDevices()
}

func (x *spoiler) do(op hpdi.Op, at block.Physical, frame []byte) {
	x.t.Helper()
	buf, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		x.t.Fatal(err)
	}
	defer hpdi.Free(buf)
	copy(buf, frame)
	if err := x.v.p.set.Do([]*devices.IO{{Op: op, At: at, Vec: [][]byte{buf}}}); err != nil {
		x.t.Fatal(err)
	}
	copy(frame, buf)
}

// path returns the pointers to the pages above a leaf, and to it, from the root on.
func (x *spoiler) path(root block.Pointer, leaf uint64) (ps []block.Pointer) {
	x.t.Helper()
	ps = append(ps, root)
	frame := make([]byte, block.Size)
	for level := blockmap.Top; level > 0; level-- {
		x.do(hpdi.OpRead, ps[len(ps)-1].Phys, frame)
		i := leaf / blockmap.LeavesBelow(level-1) % blockmap.Fanout
		ps = append(ps, block.DecodePointer(frame[i*block.PointerSize:]))
	}
	return ps
}

// store writes a page, and its twin.
func (x *spoiler) store(p block.Pointer, frame []byte) {
	x.t.Helper()
	if x.do(hpdi.OpWrite, p.Phys, frame); p.Twin != 0 {
		x.do(hpdi.OpWrite, p.Second().Phys, frame)
	}
}

// edit changes a leaf where it is, and the pages above it, and returns the root.
func (x *spoiler) edit(root block.Pointer, leaf uint64, change func(page []byte)) block.Pointer {
	x.t.Helper()
	ps := x.path(root, leaf)
	frame := make([]byte, block.Size)
	for level := 0; level <= blockmap.Top; level++ {
		at := &ps[blockmap.Top-level]
		if at.IsHole() {
			x.t.Fatalf("there is no page of level %d above leaf %d", level, leaf)
		}
		x.do(hpdi.OpRead, at.Phys, frame)
		if level == 0 {
			change(frame)
		} else {
			i := leaf / blockmap.LeavesBelow(level-1) % blockmap.Fanout
			ps[blockmap.Top-level+1].Encode(frame[i*block.PointerSize:])
		}
		at.Sum = ondisk.CRC(frame)
		x.store(*at, frame)
	}
	return ps[0]
}

// counts changes a leaf of the counts of a device.
func (x *spoiler) counts(dev int, leaf uint64, change func(page []byte)) {
	x.t.Helper()
	m := x.v.p.machine
	root := x.edit(m.Superblock().Devices[dev].Counts, leaf, change)
	x.rewrite(func(sb *cp.Superblock) { sb.Devices[dev].Counts = root })
}

func (x *spoiler) rewrite(change func(*cp.Superblock)) {
	x.t.Helper()
	if err := x.v.p.machine.Rewrite(change); err != nil {
		x.t.Fatal(err)
	}
}

// volume changes what the list of volumes, as of the superblock, says of one.
func (x *spoiler) volume(id block.VolumeID, change func(v *catalogue.Volume)) {
	x.t.Helper()
	sb := x.v.p.machine.Superblock()
	frame := make([]byte, block.Size)
	x.do(hpdi.OpRead, x.path(sb.Catalogue, 0)[blockmap.Top].Phys, frame)
	list, err := catalogue.Decode(frame[:sb.CatBytes])
	if err != nil {
		x.t.Fatal(err)
	}
	v, ok := list.Get(id)
	if !ok {
		x.t.Fatalf("there is no volume %d", id)
	}
	change(&v)
	list.SetTree(id, v.Root, v.Used, v.Pending)
	enc := catalogue.Encode(list.All(), list.NextID())
	root := x.edit(sb.Catalogue, 0, func(page []byte) { copy(page, enc) })
	x.rewrite(func(sb *cp.Superblock) { sb.Catalogue = root })
}

// device chooses a device that has counts, and the number of the first leaf that they
// have.
func (x *spoiler) device() (dev int, leaf uint64) {
	for {
		dev = x.rng.IntN(x.v.p.set.Len())
		root := x.v.p.machine.Superblock().Devices[dev].Counts
		if root.IsHole() {
			continue
		}
		err := x.v.CountPages(dev, func(p TreePage, first uint64, _ []byte) error {
			if p.Level == 0 {
				leaf = first / block.Size
				return errMedium // that is enough
			}
			return nil
		})
		if !errors.Is(err, errMedium) {
			x.t.Fatal(err)
		}
		return dev, leaf
	}
}

// some returns places of a page of counts whose count is above 0, or is 0.
func some(page []byte, used bool) (at []int) {
	for i, n := range page {
		if n > 0 == used {
			at = append(at, i)
		}
	}
	return at
}

// The ways in which reference counts, and what is said of them, are spoilt.
var spoils = map[string]func(x *spoiler){
	"raised": func(x *spoiler) {
		dev, leaf := x.device()
		x.counts(dev, leaf, func(page []byte) {
			for _, i := range some(page, true)[:1+x.rng.IntN(3)] {
				page[i] += byte(1 + x.rng.IntN(5))
			}
		})
	},
	"lowered": func(x *spoiler) {
		dev, leaf := x.device()
		x.counts(dev, leaf, func(page []byte) {
			used := some(page, true)
			page[used[x.rng.IntN(len(used))]] = 0
		})
	},
	"leaked": func(x *spoiler) {
		dev, leaf := x.device()
		x.counts(dev, leaf, func(page []byte) {
			free := some(page, false)
			for range 1 + x.rng.IntN(9) {
				page[free[len(free)-1-x.rng.IntN(len(free)/2)]] = 1
			}
		})
	},
	"zeroed leaf": func(x *spoiler) {
		dev, leaf := x.device()
		x.counts(dev, leaf, func(page []byte) { clear(page) })
	},
	"at the limit": func(x *spoiler) {
		dev, leaf := x.device()
		x.counts(dev, leaf, func(page []byte) { page[some(page, true)[0]] = 255 })
	},
	"wrong leaf": func(x *spoiler) {
		dev, leaf := x.device()
		x.counts(dev, leaf, func(page []byte) {
			for i := 2000; i < len(page); i++ {
				page[i] = byte(x.rng.IntN(4))
			}
		})
	},
	"no tree": func(x *spoiler) {
		dev, _ := x.device()
		x.rewrite(func(sb *cp.Superblock) { sb.Devices[dev].Counts = block.Pointer{} })
	},
	"unreadable": func(x *spoiler) {
		dev, leaf := x.device()
		ps := x.path(x.v.p.machine.Superblock().Devices[dev].Counts, leaf)
		at := ps[x.rng.IntN(len(ps))]
		frame := make([]byte, block.Size)
		x.do(hpdi.OpRead, at.Phys, frame)
		frame[x.rng.IntN(block.Size)] ^= 1 << x.rng.IntN(8)
		x.store(at, frame)
	},
	"upper page of other pointers": func(x *spoiler) {
		dev, leaf := x.device()
		sb := x.v.p.machine.Superblock()
		ps := x.path(sb.Devices[dev].Counts, leaf)
		frame := make([]byte, block.Size)
		other := x.path(sb.Catalogue, 0)[blockmap.Top]
		for i := range blockmap.Fanout { // to a page that is no page of counts
			other.Encode(frame[i*block.PointerSize:])
		}
		ps[0].Sum = ondisk.CRC(frame)
		x.store(ps[0], frame)
		x.rewrite(func(sb *cp.Superblock) { sb.Devices[dev].Counts = ps[0] })
	},
	"sum": func(x *spoiler) {
		x.rewrite(func(sb *cp.Superblock) { sb.Used += uint64(1 + x.rng.IntN(100)) })
	},
	"figure of a volume": func(x *spoiler) {
		x.volume(1, func(v *catalogue.Volume) { v.Used -= int64(1 + x.rng.IntN(10)) })
	},
}

// served is a pool with a client's content, left in one of the ways of the decay test:
// part of it is folded, part only in the journal and part only in the log.
func served(t *testing.T, left string, rng *rand.Rand) (*rig, map[int64]byte) {
	t.Helper()
	r := newRig(t, 2, smallest)
	r.mustOpen()
	v := r.volume("v", 64<<20)
	content := map[int64]byte{}
	for part := range 3 {
		for i := range int64(60) {
			at := i
			if i%2 > 0 {
				at = rng.Int64N(64 << 20 / block.Size)
			}
			content[at] = byte(1 + rng.IntN(255))
			if err := write(v, at*block.Size, pattern(content[at])); err != nil {
				t.Fatal(err)
			}
		}
		var err error
		switch part {
		case 0:
			err = r.Fold(context.Background())
		case 1:
			err = r.Commit(context.Background())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	switch left {
	case leftClosed:
		r.shut()
		r.reopen()
	case leftDead:
		r.die()
	case leftNoPower:
		if err := v.Flush(context.Background()); err != nil {
			t.Fatal(err)
		}
		r.cutPower(blocktest.CutRandom, rng.Uint64())
	}
	return r, content
}

// keeps opens the pool, whose counts must be right, compares its content, and works
// with it: what is free is used, and what is not stays.
func (r *rig) keeps(content map[int64]byte) {
	r.t.Helper()
	r.mustOpen()
	v, err := r.Volume("v")
	if err != nil {
		r.t.Fatal(err)
	}
	compare := func() {
		r.t.Helper()
		p := make([]byte, block.Size)
		for at, b := range content {
			if err := v.Read(context.Background(), p, at*block.Size); err != nil || !bytes.Equal(p, pattern(b)) {
				r.t.Fatalf("block %d: %v, %d instead of %d", at, err, p[0], b)
			}
		}
	}
	compare()
	r.mustCheck()
	for i := range int64(100) {
		at := 2000 + i
		content[at] = byte(i + 1)
		if err := write(v, at*block.Size, pattern(content[at])); err != nil {
			r.t.Fatal(err)
		}
	}
	for range 2 {
		if err := r.Fold(context.Background()); err != nil {
			r.t.Fatal(err)
		}
	}
	compare()
	r.shut()
	r.reopen()
	r.mustLook()
}

// Whatever has happened to the reference counts, a repair makes them what they must
// be, and everything that was acknowledged is there: in trees, journal and log.
func TestRepairCounts(t *testing.T) {
	long(t)
	names := make([]string, 0, len(spoils))
	for name := range spoils {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, left := range []string{leftClosed, leftDead, leftNoPower}[:few(3)] {
		for seed := range few(4) {
			for _, name := range names {
				rng := rand.New(rand.NewPCG(uint64(seed), 31))
				kinds := []string{name}
				if seed%2 > 0 { // and another
					kinds = append(kinds, names[rng.IntN(len(names))])
				}
				t.Run(fmt.Sprintf("%s/%s/%d", left, name, seed), func(t *testing.T) { repairCounts(t, left, kinds, rng) })
			}
		}
	}
}

func repairCounts(t *testing.T, left string, kinds []string, rng *rand.Rand) {
	r, content := served(t, left, rng)
	r.t = t
	r.mustLook()
	if len(kinds) > 1 && kinds[1] != "sum" { // first what does not need the others
		slices.Reverse(kinds)
	}
	if i := slices.IndexFunc(kinds, func(k string) bool {
		return k == "no tree" || k == "unreadable" || k == "upper page of other pointers"
	}); i >= 0 {
		kinds = kinds[i : i+1]
	}
	for _, k := range kinds {
		r.spoil(t, rng, spoils[k])
	}
	before, err := r.look()
	if err != nil || len(before.Problems) == 0 {
		t.Fatalf("%v: check finds %+v, %v", kinds, before, err)
	}
	report := r.mustRepair()
	if len(report.Mended)+report.MoreMended == 0 {
		t.Error("repair does not tell what it has mended")
	}
	if got := r.mustLook(); got.LogRecords != before.LogRecords || got.DataBlocks != before.DataBlocks {
		t.Errorf("the pool has changed: %+v, before %+v", got, before)
	}
	r.spoil(t, rng, func(x *spoiler) {
		for dev := range r.devs {
			if err := x.v.CountPages(dev, func(p TreePage, _ uint64, _ []byte) error {
				if p.Ptr.Twin == 0 {
					t.Errorf("the page of counts at %v has no twin", p.Ptr)
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		}
	})
	if again := r.mustRepair(); len(again.Mended) > 0 {
		t.Errorf("there was nothing left to mend: %q", again.Mended)
	}
	r.keeps(content)
}

// halfFolded is a pool whose owner died twice: after the journal record of a fold that
// never got its superblock, and after a point whose record is on the device and not
// durable. What a client was promised is content; the first blocks it has trimmed.
func halfFolded(t *testing.T) (r *rig, content map[int64]byte) {
	ctx := context.Background()
	r = newRig(t, 2, smallest)
	faults := r.faulty()
	r.mustOpen()
	v := r.volume("v", 64<<20)
	content = map[int64]byte{}
	put := func(salt int64) {
		t.Helper()
		for i := range int64(40) {
			at := i + i%2*salt*700
			content[at] = byte(i + salt + 1)
			if err := write(v, at*block.Size, pattern(content[at])); err != nil {
				t.Fatal(err)
			}
		}
		if err := v.Flush(ctx); err != nil {
			t.Fatal(err)
		}
	}
	put(1)
	if err := r.Fold(ctx); err != nil {
		t.Fatal(err)
	}
	put(2)
	for _, b := range cp.SuperblockAt(r.machine.Superblock().Generation + 1) {
		faults[0].Add(blocktest.Rule{Op: hpdi.OpWrite, Offset: int64(b) * block.Size, Length: block.Size, Err: errMedium})
	}
	if err := r.Fold(ctx); !errors.Is(err, errMedium) {
		t.Fatalf("a fold without a superblock: %v", err)
	}
	r.die()
	r.mustOpen()
	var err error
	if v, err = r.Volume("v"); err != nil {
		t.Fatal(err)
	}
	put(3)
	if err := r.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	faults[0].Add(blocktest.Rule{Op: hpdi.OpFlush, Lose: true})
	if err := v.Trim(ctx, 0, 20*block.Size, block.Tag{}); err != nil {
		t.Fatal(err)
	}
	for at := range content {
		if at < 20 {
			delete(content, at) // it may be there and may be gone
		}
	}
	if err := r.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	r.die()
	r.wrap = nil
	return r, content
}

// A superblock of a repair has neither the record of the last fold in the journal as
// its own, nor that of a fold which never got a superblock.
func TestRepairBesideFolds(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 32))
	for _, kind := range []string{"zeroed leaf", "figure of a volume"} {
		r, content := halfFolded(t)
		r.spoil(t, rng, spoils[kind])
		if report := r.mustRepair(); len(report.Mended) == 0 {
			t.Error("nothing was mended")
		}
		r.mustLook()
		r.keeps(content)
	}
}

// inUse returns the blocks that anything refers to which a pool that nobody serves has
// stored, pages of wrong counts included.
func (r *rig) inUse(t *testing.T) map[block.Physical]bool {
	t.Helper()
	used := map[block.Physical]bool{}
	r.spoil(t, nil, func(x *spoiler) {
		c, err := x.v.newChecker(CheckOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer c.bulk.close()
		ctx := context.Background()
		add := func(p block.Pointer) { used[p.Phys] = true }
		if err := errors.Join(c.maps(ctx, add, add), c.overlays(add), c.list(ctx, add), c.counts(ctx, add, func(int, uint64, []byte) {})); err != nil {
			t.Fatal(err)
		}
	})
	return used
}

// A repair writes to no block that is in use, whatever the counts say: neither those
// that only the journal maps nor the pages that it replaces, wherever these come to lie.
func TestRepairWritesToFreeBlocks(t *testing.T) {
	long(t)
	const most = 264 // more than a track
	for n := most; n > most-few(80); n-- {
		r := newRig(t, 1, smallest)
		r.mustOpen()
		v := r.volume("v", 64<<20)
		put := func(from, to int) {
			t.Helper()
			for i := from; i < to; i++ {
				if err := write(v, int64(i)*block.Size, pattern(byte(i%200+1))); err != nil {
					t.Fatal(err)
				}
				if i%90 == 89 {
					if err := r.Commit(context.Background()); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := r.Commit(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
		put(0, n)
		if err := r.Fold(context.Background()); err != nil {
			t.Fatal(err)
		}
		if n%2 > 0 {
			put(n, n+256)
		}
		first := r.label.Layout.First
		r.die()
		used := r.inUse(t)
		r.spoil(t, nil, func(x *spoiler) {
			x.counts(0, 0, func(page []byte) { clear(page) })
			x.volume(1, func(v *catalogue.Volume) { v.Used++ })
		})
		var mu sync.Mutex
		wrote := 0
		r.wrap = func(_ int, d hpdi.Device) hpdi.Device {
			f := blocktest.NewFault(d, 1)
			f.Add(blocktest.Rule{Op: hpdi.OpWrite, Offset: int64(first) * block.Size, Hold: func(q *hpdi.Request) {
				mu.Lock()
				defer mu.Unlock()
				for b := q.Offset / block.Size; b < (q.Offset+q.Bytes())/block.Size; b++ {
					if wrote++; used[block.At(0, uint64(b))] {
						t.Errorf("%d blocks: block 0:%d is in use and is written to", n, b)
					}
				}
			}})
			return f
		}
		r.mustRepair()
		if r.wrap = nil; wrote < 8 {
			t.Errorf("%d blocks were written, which is not two trees", wrote)
		}
		r.mustLook()
		if t.Failed() {
			return
		}
	}
}

// The guest that had the pool last died before what it had written was durable. The
// power fails at each operation of the repair that follows: what is left is the state
// before it or the one after, a second repair mends what the first has not, and what
// clients were promised is there. Where only the command dies, too.
func TestRepairInterrupted(t *testing.T) {
	long(t)
	for _, power := range []bool{true, false}[:few(2)] {
		for _, kind := range []string{"zeroed leaf", "unreadable", "figure of a volume", "label", "superblock"}[:few(5)] {
			t.Run(fmt.Sprintf("power=%v/%s", power, kind), func(t *testing.T) {
				step := int64(1)
				if raced {
					step = 5
				}
				ops, rebuilt := int64(0), 0
				for cut := true; cut; ops += step {
					if ops > 200 {
						t.Fatal("the repair never came to its end")
					}
					var after bool
					if cut, after = interruptRepair(t, kind, power, ops+1); after {
						rebuilt++
					}
				}
				t.Logf("%d operations; after %d cuts the counts were well", ops, rebuilt)
				if ops < 3 {
					t.Error("the repair wrote nothing")
				}
			})
		}
	}
}

// interruptRepair reports whether the repair got as far as an operation, and whether
// what it was to mend is mended.
func interruptRepair(t *testing.T, kind string, power bool, op int64) (cut, after bool) {
	rng := rand.New(rand.NewPCG(3, 33))
	r, content := halfFolded(t)
	switch kind {
	case "label":
		r.devs[0].Corrupt(int64(labelBlocks[0])*block.Size+70, 4)
	case "superblock":
		b := cp.SuperblockAt(r.generation(t))[op%2]
		r.devs[0].Corrupt(int64(b)*block.Size+70, 4)
	default:
		r.spoil(t, rng, spoils[kind])
	}
	before, err := r.look()
	if err != nil || len(before.Problems) == 0 {
		t.Fatalf("check finds %+v, %v", before, err)
	}
	clock := r.clock
	clock.CutAfter(clock.Ops() + op)
	_, err = r.repair()
	select {
	case <-clock.Off():
		cut = true
	default:
		if err != nil {
			t.Fatal(err)
		}
	}
	mode := blocktest.KeepAll
	if power {
		mode = blocktest.CutRandom
		r.boot++
	}
	r.clock = blocktest.NewClock()
	for i, d := range r.devs {
		r.devs[i] = d.CutTo(r.clock, mode, uint64(op)+uint64(i))
	}
	r.newCache()
	left, err := r.look()
	if err != nil {
		t.Fatalf("operation %d: %v", op, err)
	}
	after = len(left.Problems) == 0
	if !after && !slices.Equal(left.Problems, before.Problems) && !power {
		t.Errorf("operation %d: it was\n%q\nand is\n%q", op, before.Problems, left.Problems)
	}
	if !cut && !after {
		t.Errorf("after a repair: %q", left.Problems)
	}
	if report := r.mustRepair(); after && len(report.Mended) > 0 {
		t.Errorf("operation %d: all was well, and %q is mended", op, report.Mended)
	}
	r.keeps(content)
	return cut, after
}

// A page of a map is lost, and counts are wrong: which range of which volume it is
// about is told, and no count becomes lower.
func TestRepairWithoutMap(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 34))
	for level := range blockmap.Top + 1 {
		t.Run(fmt.Sprint(level), func(t *testing.T) {
			r, _ := served(t, leftDead, rng)
			const leaf = 0
			var page block.Pointer
			r.spoil(t, rng, func(x *spoiler) {
				dev, first := x.device()
				x.counts(dev, first, func(page []byte) { page[some(page, true)[0]]++ })
				page = x.path(x.v.p.bmap.Trees()[1].Root, leaf)[blockmap.Top-level]
			})
			at := page.Phys
			for _, at := range []block.Physical{at, page.Second().Phys} {
				r.devs[at.Device()].Corrupt(int64(at.Block())*block.Size+9, 1)
			}
			stored := func() (sb cp.Superblock) {
				r.spoil(t, rng, func(x *spoiler) { sb = x.v.p.machine.Superblock() })
				return sb
			}
			before := stored()
			report, err := r.repair()
			if err != nil {
				t.Fatal(err)
			}
			all := strings.Join(report.Problems, "\n")
			for _, want := range []string{
				fmt.Sprintf("volume \"v\" from byte 0 on, %d bytes: metadata page of level %d above leaf 0: block at %v", blockmap.LeavesBelow(level)<<20, level, at),
				"reference counts stay as they are: pages of maps are lost",
			} {
				if !strings.Contains(all, want) {
					t.Errorf("repair does not say %q, but\n%s", want, all)
				}
			}
			if len(report.Mended) > 0 {
				t.Errorf("mended: %q", report.Mended)
			}
			if now := stored(); fmt.Sprint(now) != fmt.Sprint(before) {
				t.Errorf("superblock %+v, was %+v", now, before)
			}
		})
	}
}

// Pages that are bad in one of their two places are made whole.
func TestRepairTwins(t *testing.T) {
	r, content := served(t, leftClosed, rand.New(rand.NewPCG(1, 40)))
	var pages []block.Pointer
	r.spoil(t, nil, func(x *spoiler) {
		var err error
		if pages, err = pagesOf(x.v.p); err != nil {
			t.Fatal(err)
		}
	})
	places := map[bool]string{true: "first place", false: "twin"}
	bad := map[string]int{}
	for i, p := range pages {
		at := p.Phys
		if i%2 == 1 {
			at = p.Second().Phys
		}
		r.devs[at.Device()].Corrupt(int64(at.Block())*block.Size+9, 1)
		bad[places[i%2 == 0]]++
	}
	report := r.mustRepair()
	all := strings.Join(report.Mended, "\n")
	for place, n := range bad {
		if strings.Count(all, ": "+place+": ") != n || len(report.Mended) != len(pages) {
			t.Errorf("%d pages were bad in their %s, mended:\n%s", n, place, all)
		}
	}
	if report, err := r.look(); err != nil || len(report.Problems) > 0 {
		t.Errorf("%v, %q", err, report.Problems)
	}
	r.mustOpen()
	r.holds(content)
	r.shut()
}

// What one copy of a mirror has lost, and the other has, is well again on both.
func TestRepairMirror(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 35))
	r, _ := newMirroredRig(t, 2)
	r.mustOpen()
	v := r.volume("v", 64<<20)
	content := map[int64]byte{}
	for i := range int64(100) {
		content[i*3] = byte(i + 1)
		if err := write(v, i*3*block.Size, pattern(content[i*3])); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Fold(context.Background()); err != nil {
		t.Fatal(err)
	}
	generation := r.machine.Superblock().Generation
	r.die()
	var lost [1]block.Pointer
	r.spoil(t, nil, func(x *spoiler) {
		if err := x.v.p.bmap.Lookup(1, 30, lost[:]); err != nil {
			t.Fatal(err)
		}
	})
	bad := map[block.Physical]bool{}
	for b := range r.inUse(t) {
		if rng.IntN(3) == 0 {
			bad[b] = true
		}
	}
	for _, b := range []uint64{labelBlocks[1], cp.SuperblockAt(generation)[0]} {
		bad[block.At(0, b)] = true
	}
	const front = block.TrackBlocks // what a mirror keeps for itself
	for b := range bad {
		r.devs[rng.IntN(2)].Corrupt(int64(front+b.Block())*block.Size+rng.Int64N(64), 1<<rng.IntN(8))
	}
	// Without a good copy there is nothing to mend it by.
	for _, d := range r.devs {
		d.Corrupt(int64(front+lost[0].Phys.Block())*block.Size+100, 8)
	}
	if report, err := r.look(); err != nil || len(report.Problems) < len(bad) {
		t.Fatalf("check: %v, %d problems for %d blocks", err, len(report.Problems), len(bad))
	}
	report, err := r.repair()
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("block 30 of volume \"v\", from byte %d on: block at %v ", 30*block.Size, lost[0].Phys)
	if len(report.Problems) != 1 || !strings.Contains(report.Problems[0], want) {
		t.Errorf("problems %q, want one with %q", report.Problems, want)
	}
	if n := len(report.Mended); n < len(bad)-6 { // the others as the pool was looked at
		t.Errorf("%d mended of %d", n, len(bad))
	}
	left, err := r.look()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range left.Problems {
		if !strings.Contains(p, fmt.Sprintf("block at %v ", lost[0].Phys)) {
			t.Error("after repair: ", p)
		}
	}
	r.mustOpen()
	if v, err = r.Volume("v"); err != nil {
		t.Fatal(err)
	}
	if err := write(v, 30*block.Size, pattern(content[30])); err != nil {
		t.Fatal(err)
	}
	if err := r.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	r.die()
	r.keeps(content)
}

// Copies of labels and superblocks are written anew from those that are left.
func TestRepairCopies(t *testing.T) {
	long(t)
	for name, c := range map[string]struct{ dev, of, at int }{
		"first label": {0, 0, 0}, "second label": {0, 0, 1}, "first label of another device": {1, 0, 0},
		"first copy of the superblock": {0, 1, 0}, "second copy of the superblock": {0, 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			r, content := served(t, leftClosed, rand.New(rand.NewPCG(1, 36)))
			b := labelBlocks
			if c.of > 0 {
				r.spoil(t, nil, func(x *spoiler) { b = cp.SuperblockAt(x.v.p.machine.Superblock().Generation) })
			}
			r.devs[c.dev].Corrupt(int64(b[c.at])*block.Size+70, 16)
			report := r.mustRepair()
			if want := fmt.Sprintf("at block %d:%d", c.dev, b[c.at]); len(report.Mended) != 1 || !strings.Contains(report.Mended[0], want) {
				t.Errorf("mended %q, want %q", report.Mended, want)
			}
			r.mustLook()
			r.devs[c.dev].Corrupt(int64(b[1-c.at])*block.Size+70, 16) // it is good enough for two
			r.mustRepair()
			r.keeps(content)
		})
	}
}

// The superblock that names the region, or the last journal record, is gone: nothing is
// written that would make an older state the pool's.
func TestRepairOfLessThanThereWas(t *testing.T) {
	for _, lose := range []string{"superblock", "journal record"} {
		t.Run(lose, func(t *testing.T) {
			r := newRig(t, 1, smallest)
			r.mustOpen()
			if err := write(r.volume("v", 1<<20), 0, pattern(1)); err != nil {
				t.Fatal(err)
			}
			if err := r.Commit(context.Background()); err != nil {
				t.Fatal(err)
			}
			var lost []int64
			switch lose {
			case "superblock":
				for _, b := range cp.SuperblockAt(r.machine.Superblock().Generation) {
					lost = append(lost, int64(b))
				}
			default:
				set := devices.NewSet([]hpdi.Device{r.devs[0]})
				sb := r.machine.Superblock()
				if _, err := cp.InspectJournal(set, &sb, r.label.Layout.Journal, r.label.Layout.JournalBlocks, func(rec cp.JournalRecord) error {
					lost = []int64{int64(rec.At.Block())} // the last one
					return nil
				}); err != nil {
					t.Fatal(err)
				}
			}
			r.die()
			for _, b := range lost {
				r.devs[0].Corrupt(b*block.Size+70, 2)
			}
			before := r.generation(t)
			report, err := r.repair()
			if err != nil {
				t.Fatal(err)
			}
			if all := strings.Join(report.Problems, "\n"); !strings.Contains(all, "the devices do not have all that the pool had") {
				t.Errorf("repair says\n%s", all)
			}
			if now := r.generation(t); now != before {
				t.Errorf("a superblock of generation %d was written after %d", now, before)
			}
		})
	}
}

// generation returns that of the newest superblock.
func (r *rig) generation(t *testing.T) (n uint64) {
	t.Helper()
	r.spoil(t, nil, func(x *spoiler) { n = x.v.p.machine.Superblock().Generation })
	return n
}

// More references than a count holds are told, and the counts stay as they are.
func TestRepairBeyondTheLimit(t *testing.T) {
	r, _ := served(t, leftClosed, rand.New(rand.NewPCG(1, 38)))
	r.spoil(t, nil, func(x *spoiler) {
		root := x.v.p.bmap.Trees()[1].Root
		first := make([]byte, block.PointerSize)
		root = x.edit(root, 0, func(page []byte) {
			copy(first, page)
			for i := range blockmap.Fanout {
				copy(page[i*block.PointerSize:], first)
			}
		})
		x.volume(1, func(v *catalogue.Volume) { v.Root = root })
	})
	before := r.generation(t)
	report, err := r.repair()
	if err != nil {
		t.Fatal(err)
	}
	if all := strings.Join(report.Problems, "\n"); !strings.Contains(all, "reference counts stay as they are: reference count of block") {
		t.Errorf("repair says\n%s", all)
	}
	if now := r.generation(t); now != before {
		t.Errorf("a superblock of generation %d was written after %d", now, before)
	}
}

// Blocks of a volume that share one block make its count higher, and what they were
// before is free.
func TestRepairShared(t *testing.T) {
	r, content := served(t, leftClosed, rand.New(rand.NewPCG(1, 39)))
	r.spoil(t, nil, func(x *spoiler) {
		root := x.edit(x.v.p.bmap.Trees()[1].Root, 0, func(page []byte) {
			for _, i := range []int{2, 4, 6} {
				copy(page[i*block.PointerSize:][:block.PointerSize], page)
			}
		})
		x.volume(1, func(v *catalogue.Volume) { v.Root = root })
	})
	for _, at := range []int64{2, 4, 6} {
		content[at] = content[0]
	}
	report := r.mustRepair()
	all := strings.Join(report.Mended, "\n")
	if !strings.Contains(all, "has reference count 1, 4 references were found") || strings.Count(all, "has reference count 1, 0 references were found") != 3 {
		t.Errorf("mended\n%s", all)
	}
	r.keeps(content)
}

// What only the journal maps lies where nothing else is counted, and so do new pages,
// whose own counts then need pages that nobody needed before.
func TestRepairLeaves(t *testing.T) {
	long(t)
	r := newRig(t, 1, 80<<20)
	t.Run("twins", func(t *testing.T) { repairLeaves(t, r) })
	if raced { // the same once more, with devices of another kind
		return
	}
	m, _ := newMirroredRig(t, 2)
	t.Run("copies", func(t *testing.T) { repairLeaves(t, m) })
}

func repairLeaves(t *testing.T, r *rig) {
	const perLeaf = block.Size // counts in a leaf, and so blocks of a device
	r.mustOpen()
	v := r.volume("v", 256<<20)
	content := map[int64]byte{}
	put := func(from, n int64) {
		t.Helper()
		for i := from; i < from+n; i++ {
			content[i] = byte(i%250 + 1)
			if err := write(v, i*block.Size, pattern(content[i])); err != nil {
				t.Fatal(err)
			}
			if i%100 == 99 {
				if err := r.Commit(context.Background()); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := r.Commit(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	put(0, 300)
	if err := r.Fold(context.Background()); err != nil {
		t.Fatal(err)
	}
	// Up to the end of a leaf, so that new pages lie in the next.
	u := r.space.Usage()
	end := int64(r.label.Layout.First) + u.Total - u.Free
	put(10_000, (end/perLeaf+3)*perLeaf-end)
	r.die()
	leaves := func() (n int) {
		t.Helper()
		r.spoil(t, nil, func(x *spoiler) {
			if err := x.v.CountPages(0, func(p TreePage, _ uint64, _ []byte) error {
				if p.Level == 0 {
					n++
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		})
		return n
	}
	before := leaves()
	r.spoil(t, nil, func(x *spoiler) { x.rewrite(func(sb *cp.Superblock) { sb.Used++ }) })
	r.mustRepair()
	r.mustLook()
	// Of what is only in the journal none is counted in the trees. The twins of pages
	// were taken by the last fold, and are counted only now.
	if now := leaves(); now > before+2 {
		t.Errorf("%d leaves of counts instead of %d", now, before)
	}
	r.mustOpen()
	r.mustCheck()
	if err := r.Fold(context.Background()); err != nil {
		t.Fatal(err)
	}
	if n := len(content); int64(n) > r.space.Usage().Total-r.space.Usage().Free {
		t.Errorf("%d blocks are in use, the volume has %d", r.space.Usage().Total-r.space.Usage().Free, n)
	}
	r.mustCheck()
	r.die()
	r.keeps(content)
}

// A device fails a request now and then: whatever it is, nothing becomes worse, and
// the repair succeeds when it is made again.
func TestRepairOnFailingDevice(t *testing.T) {
	long(t)
	rng := rand.New(rand.NewPCG(1, 40))
	base, content := served(t, leftDead, rng)
	base.spoil(t, rng, spoils["zeroed leaf"])
	base.spoil(t, rng, spoils["figure of a volume"])
	base.devs[0].Corrupt(int64(labelBlocks[1])*block.Size+70, 4)
	before, err := base.look()
	if err != nil || len(before.Problems) < 3 {
		t.Fatalf("check finds %+v, %v", before, err)
	}
	devs := slices.Clone(base.devs)
	refused, failed := 0, 0
	for _, op := range []hpdi.Op{hpdi.OpWrite, hpdi.OpFlush, hpdi.OpRead} {
		step := 1
		if raced || op == hpdi.OpRead {
			step = 5
		}
		for n, hit := 0, true; hit; n += step {
			r := base
			clock := blocktest.NewClock()
			for i, d := range devs {
				r.devs[i] = d.CutTo(clock, blocktest.KeepAll, 1)
			}
			var seen []*blocktest.Fault
			r.wrap = func(i int, d hpdi.Device) hpdi.Device {
				f := blocktest.NewFault(d, 1)
				if i == 0 {
					f.Add(blocktest.Rule{Op: op, Skip: n, Count: 1, Err: errMedium})
				}
				seen = append(seen, f)
				return f
			}
			report, err := r.repair()
			hit = seen[0].Hits() > 0
			switch r.wrap = nil; {
			case err != nil && !errors.Is(err, errMedium):
				t.Fatalf("%v %d: %v", op, n, err)
			case err != nil:
				failed++
			case len(report.Problems) > 0:
				refused++
			}
			left, err := r.look()
			if err != nil {
				t.Fatalf("%v %d: %v", op, n, err)
			}
			for _, p := range left.Problems {
				if !slices.Contains(before.Problems, p) {
					t.Errorf("%v %d: %q was no problem before", op, n, p)
				}
			}
			r.mustRepair()
			if got := r.mustLook(); got.LogRecords != before.LogRecords {
				t.Errorf("%v %d: %d records in the log instead of %d", op, n, got.LogRecords, before.LogRecords)
			}
			if t.Failed() {
				return
			}
		}
	}
	base.keeps(content)
	if failed < 3 || refused == 0 {
		t.Errorf("%d repairs failed, %d left something", failed, refused)
	}
	t.Logf("%d repairs failed, %d left something", failed, refused)
}

// A device that is being taken out gets none of the new pages, and its removal goes on.
func TestRepairWhileDeviceLeaves(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 3, smallest)
	r.mustOpen()
	c := &tracked{r.volume("v", 1<<30), map[int64]byte{}, map[int64]byte{}}
	for i := range int64(90) {
		if err := c.put(i*2901, byte(i)|1, false); err != nil {
			t.Fatal(err)
		}
		if i%40 == 39 {
			if err := r.Fold(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := r.RemoveDevice(ctx, "disk1"); err != nil {
		t.Fatal(err)
	}
	if err := r.Fold(ctx); err != nil {
		t.Fatal(err)
	}
	r.die()
	r.spoil(t, nil, func(x *spoiler) { x.counts(1, 0, func(page []byte) { clear(page) }) })
	r.mustRepair()
	r.mustLook()
	r.spoil(t, nil, func(x *spoiler) {
		for dev := range 3 {
			if err := x.v.CountPages(dev, func(p TreePage, _ uint64, _ []byte) error {
				if p.Ptr.Phys.Device() == 1 {
					t.Errorf("a page of the counts of device %d is at %v", dev, p.Ptr.Phys)
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		}
	})
	removed := false
	r.removal.Removed = func(d hpdi.Device) { removed = true; _ = d.Close() }
	r.mustOpen()
	var err error
	if c.v, err = r.Volume("v"); err != nil {
		t.Fatal(err)
	}
	if !r.removing() {
		t.Error("the removal was forgotten")
	}
	r.removeRest()
	if !removed {
		t.Error("the device was not removed")
	}
	c.verify(t)
	r.devs = slices.Delete(r.devs, 1, 2)
	r.mustCheck()
	r.die()
	// Its place is a gap now.
	r.spoil(t, nil, func(x *spoiler) { x.rewrite(func(sb *cp.Superblock) { sb.Used++ }) })
	r.mustRepair()
	r.mustLook()
	r.mustOpen()
	if c.v, err = r.Volume("v"); err != nil {
		t.Fatal(err)
	}
	c.verify(t)
	r.shut()
}

// Also of a volume that is deleted and not freed yet it is told which it is, and a
// repair that is called off has done nothing.
func TestRepairOfDeletedVolume(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	r := newRig(t, 1, smallest)
	r.mustOpen()
	if err := write(r.volume("v", 1<<20), 0, pattern(1)); err != nil {
		t.Fatal(err)
	}
	if err := r.Fold(ctx); err != nil {
		t.Fatal(err)
	}
	if err := r.DeleteVolume(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	root := r.bmap.Trees()[1].Root
	r.die()
	r.devs[0].Corrupt(int64(root.Phys.Block())*block.Size+9, 1)
	r.devs[0].Corrupt(int64(root.Second().Phys.Block())*block.Size+9, 1)
	before := r.generation(t)
	report, err := r.repair()
	if all := strings.Join(report.Problems, "\n"); err != nil || !strings.Contains(all, "volume 1, which is deleted, from byte 0 on, 17592186044416 bytes: ") {
		t.Errorf("%v, %s", err, all)
	}
	v, err := r.writable()
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := v.Repair(ctx, CheckOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("called off: %v", err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	if now := r.generation(t); now != before {
		t.Errorf("a superblock of generation %d was written after %d", now, before)
	}
}
