package pool

import (
	"bytes"
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
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/region"
)

// manyPoints makes consistency points of so many scattered blocks each.
func (r *rig) manyPoints(v block.Volume, rng *rand.Rand, points, blocks int, holds map[int64]byte) {
	r.t.Helper()
	for range points {
		for range blocks {
			b, c := rng.Int64N(v.Info().Size/block.Size), byte(1+rng.IntN(250))
			if err := write(v, b*block.Size, pattern(c)); err != nil {
				r.t.Fatal(err)
			}
			holds[b] = c
		}
		if err := r.Commit(context.Background()); err != nil {
			r.t.Fatal(err)
		}
	}
}

// onDisk puts the devices on modelled disks, from the next open on.
func (r *rig) onDisk() *blocktest.Disk {
	disk := blocktest.NewDisk(blocktest.BarracudaES2)
	r.wrap = func(_ int, d hpdi.Device) hpdi.Device { return disk.Wrap(d) }
	return disk
}

// fillKept brings what the journal's section lacks there.
func (r *rig) fillKept() {
	r.t.Helper()
	err := r.do(context.Background(), func() error {
		if err := r.machine.Claimed(); err != nil { // as Run does
			return err
		}
		r.placeJournal()
		for r.machine.KeptBehind() {
			if err := r.machine.FillKept(); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

// Whoever opens a pool after its guest has died reads of its journal's device that the last
// record is there and nothing follows, and has all mappings. Without the section it reads
// everything, and has the section again.
func TestUnfoldedJournalOutlivesGuest(t *testing.T) {
	r := newRigWithLog(t, 1, 1<<30, 16<<20)
	r.mustOpen()
	v := r.volume("v", 2<<30)
	rng := rand.New(rand.NewPCG(1, 31))
	holds := map[int64]byte{}
	r.manyPoints(v, rng, 12, 1500, holds)
	was, waiting := r.machine.KeptJournal(), 0
	waiting, _ = r.bmap.Overlays()
	if !was.Whole || was.Used < 12*1500*28 || was.Recalled != 0 {
		t.Fatalf("%+v", was)
	}
	disk := r.onDisk()
	var took [2]blocktest.DiskCount // without and with
	for _, with := range []bool{true, false, true} {
		r.die()
		if !with {
			if n := r.dropSections(region.SectionJournal); n != 1 {
				t.Fatalf("%d sections", n)
			}
		}
		before := disk.Count()
		r.mustOpen()
		n := disk.Count().Minus(before)
		took[len(took)-1] = n
		if !with {
			took[0] = n
		}
		now := r.machine.KeptJournal()
		if n, _ := r.bmap.Overlays(); n != waiting {
			t.Errorf("with %v: %d mappings instead of %d", with, n, waiting)
		}
		if with != (now.Recalled >= 12) || !with && now.Recalled > 0 {
			t.Errorf("with %v: %+v", with, now)
		}
		v, _ = r.Volume("v")
		verifyBlocks(t, v, holds)
		r.fillKept()
		if now := r.machine.KeptJournal(); !now.Whole || now.Used != was.Used {
			t.Errorf("with %v: %+v became %+v", with, was, now)
		}
		r.mustCheck()
	}
	t.Logf("a disk is busy for %v with the journal to read and for %v without", took[0].Busy, took[1].Busy)
	if took[0].Blocks-took[1].Blocks < was.Used/block.Size*9/10 {
		t.Errorf("%+v with the journal to read, %+v without", took[0], took[1])
	}
	// A fold makes room, and what follows is kept.
	if err := r.Fold(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.manyPoints(v, rng, 2, 100, holds)
	if now := r.machine.KeptJournal(); !now.Whole || now.Used > was.Used/4 {
		t.Errorf("%+v after a fold", now)
	}
	r.die()
	r.mustOpen()
	v, _ = r.Volume("v")
	verifyBlocks(t, v, holds)
	r.shut()
}

// What does not fit is read from the device, and kept when a fold has made room.
func TestUnfoldedJournalDoesNotFit(t *testing.T) {
	r := newRig(t, 1, 1<<30)
	open := func() {
		t.Helper()
		o := r.options()
		o.FoldEntries, o.FoldLimit = 1000, 1000 // room for little; nobody folds here before the test does
		if err := r.openWith(o); err != nil {
			t.Fatal(err)
		}
	}
	open()
	v := r.volume("v", 1<<30)
	rng := rand.New(rand.NewPCG(2, 31))
	holds := map[int64]byte{}
	all := 0
	for {
		r.manyPoints(v, rng, 1, 200, holds)
		all++
		if s := r.machine.KeptJournal(); !s.Whole {
			if s.Used == 0 || s.Used > s.Bytes || all < 3 {
				t.Fatalf("%+v after %d points", s, all)
			}
			break
		}
		if all > 1000 {
			t.Fatal("everything fits")
		}
	}
	r.manyPoints(v, rng, 1, 20, holds)
	r.die()
	open()
	if s := r.machine.KeptJournal(); s.Recalled < 2 || s.Recalled > all {
		t.Errorf("%+v of %d points", s, all)
	}
	v, _ = r.Volume("v")
	verifyBlocks(t, v, holds)
	// A point during the fold is not kept before it ends, and read afterwards.
	err := r.do(t.Context(), func() error { _, err := r.machine.Fold(); return err })
	if err != nil {
		t.Fatal(err)
	}
	r.manyPoints(v, rng, 1, 10, holds)
	if err := r.do(t.Context(), r.foldAll); err != nil {
		t.Fatal(err)
	}
	r.fillKept()
	if s := r.machine.KeptJournal(); !s.Whole {
		t.Errorf("%+v after a fold", s)
	}
	r.die()
	open()
	v, _ = r.Volume("v")
	verifyBlocks(t, v, holds)
	r.shut()
}

// Without room in the region nothing is kept, somebody is told, and nothing else is wrong.
func TestUnfoldedJournalWithoutRoom(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.byRecord = false // the test looks at what is in the region
	r.mustOpen()
	r.volume("v", 1<<20)
	r.die()
	r.dropSections(region.SectionJournal)
	r.changeRegion(func(q *region.Region) {
		for range 7 {
			if _, _, err := q.AddSection(foreign, 1); err != nil {
				t.Fatal(err)
			}
		}
	})
	var told []string
	o := r.options()
	o.Tell = keep(TellKept, &told)
	if err := r.openWith(o); err != nil {
		t.Fatal(err)
	}
	v, _ := r.Volume("v")
	holds := map[int64]byte{}
	r.manyPoints(v, rand.New(rand.NewPCG(3, 31)), 3, 20, holds)
	if s := r.machine.KeptJournal(); s.Bytes != 0 || len(told) != 1 || !strings.Contains(told[0], "sections in a region") {
		t.Errorf("%+v, %q", s, told)
	}
	r.die()
	r.mustOpen()
	v, _ = r.Volume("v")
	verifyBlocks(t, v, holds)
	r.shut()
}

// A large section comes while the guest is at work, and has then what was journalled before
// and meanwhile. Whoever ends before that leaves none, and the next one begins anew.
func TestUnfoldedJournalComes(t *testing.T) {
	r := newBareRig(t, 1, testSize)
	r.byRecord = false
	if _, err := Create(t.Context(), CreateOptions{Name: "p", Identity: "a", Devices: r.devices(), LogBytes: testLog, JournalBytes: 48 << 20}); err != nil {
		t.Fatal(err)
	}
	holds, rng := map[int64]byte{}, rand.New(rand.NewPCG(1, 31))
	r.mustOpen()
	v := r.volume("v", 64<<20)
	var waited int
	for end := time.Now().Add(time.Minute); ; waited++ {
		r.manyPoints(v, rng, 1, 20, holds)
		r.fillKept()
		if r.machine.KeptJournal().Bytes > readyBytes {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the section does not come")
		}
	}
	t.Logf("it came after %d points", waited)
	if s := r.machine.KeptJournal(); !s.Whole || s.Used != s.Unfolded || s.Used == 0 {
		t.Errorf("%+v", s)
	}
	r.die()
	r.mustOpen()
	if s := r.machine.KeptJournal(); s.Recalled < waited {
		t.Errorf("after %d points: %+v", waited, s)
	}
	v, _ = r.Volume("v")
	verifyBlocks(t, v, holds)
	r.die()
	r.dropSections(region.SectionJournal)
	for range 3 { // ended while it comes
		r.mustOpen()
		r.die()
	}
	r.mustOpen()
	v, _ = r.Volume("v")
	verifyBlocks(t, v, holds)
	r.mustCheck()
	r.shut()
}

// keptIsDurable reports an error unless a device whose power was cut has each record that
// the region has.
func (r *rig) keptIsDurable() (records int, err error) {
	r.changeRegion(func(q *region.Region) {
		for _, s := range q.Sections(region.SectionJournal) {
			mem, e := q.MapSection(s)
			if e != nil {
				r.t.Fatal(e)
			}
			d := r.devs[0]
			sb, e := cp.ReadSuperblock(devices.NewSet([]hpdi.Device{d}), q.Header().Pool)
			if e != nil {
				r.t.Fatal(e)
			}
			queue, e := d.NewQueue(1)
			if e != nil {
				r.t.Fatal(e)
			}
			_, e = cp.InspectKept(mem, func(j cp.JournalRecord, raw []byte) error {
				records++
				buf := make([]byte, len(raw))
				if e := hpdi.Do(queue, &hpdi.Request{Op: hpdi.OpRead, Offset: int64(j.At.Block()) * block.Size, Vec: [][]byte{buf}}); e != nil {
					return e
				}
				// What a fold has freed may be overwritten before the region knows.
				if !bytes.Equal(buf, raw) && j.Offset >= sb.Journal.Offset {
					return fmt.Errorf("record %d is in the region, and not on the device", j.Number)
				}
				return nil
			})
			if !errors.Is(e, ondisk.ErrMagic) { // a guest may die before it has written anything
				err = errors.Join(err, e)
			}
			if e := queue.Close(); e != nil {
				r.t.Fatal(e)
			}
		}
	})
	return records, err
}

// keptCut plays a life whose power is cut at an operation, with a region that outlives that,
// and returns an error if what is found then is wrong. was is false when the life ended
// before.
func keptCut(t testing.TB, seed uint64, op int64) (was bool, err error) {
	r := newRig(t, 1, testSize)
	r.battery = true
	r.mustOpen()
	v := r.volume("v", 3<<20)
	m := blocktest.NewModel(seed)
	rng := rand.New(rand.NewPCG(seed, 37))
	r.clock.CutAfter(r.clock.Ops() + op)
	e := exercise(r, v, m, rng, 60)
	was = r.clock.IsOff()
	if e != nil && !was {
		return was, e
	}
	mode := []blocktest.CutMode{blocktest.DropAll, blocktest.CutRandom, blocktest.KeepAll}[op%3]
	r.cutPower(mode, seed+uint64(op))
	if _, err := r.keptIsDurable(); err != nil {
		return was, err
	}
	// The device alone leads to the same point.
	if err := r.open(); err != nil {
		return was, err
	}
	with, recalled := r.machine.CP(), r.machine.KeptJournal().Recalled
	r.die()
	r.dropSections(region.SectionJournal)
	if err := r.open(); err != nil {
		return was, fmt.Errorf("without the section: %w", err)
	}
	if without := r.machine.CP(); with != without {
		return was, fmt.Errorf("consistency point %d with %d records of the section, %d without", with, recalled, without)
	}
	v, err = r.Volume("v")
	if err != nil {
		return was, err
	}
	if _, err := m.CheckPrefix(blockReader(v), m.Acked()); err != nil {
		return was, err
	}
	r.shut()
	return was, nil
}

// A guest may die at any operation of a device, and the host with it: what its region has of
// the journal is on the device, durably.
func TestUnfoldedJournalIsDurable(t *testing.T) {
	long(t)
	for op := int64(1); ; op += int64(oneIn(5)) {
		was, err := keptCut(t, 5, op)
		if err != nil {
			t.Fatalf("seed 5, power cut at operation %d: %v", op, err)
		}
		if !was {
			return
		}
	}
}

// olderDevice has the device of a dead guest put back to what it was before its last points,
// and returns the error with which the pool opens then.
func olderDevice(t testing.TB) error {
	r := newRig(t, 1, testSize)
	r.mustOpen()
	v := r.volume("v", 1<<20)
	rng := rand.New(rand.NewPCG(4, 31))
	r.manyPoints(v, rng, 3, 20, map[int64]byte{})
	area := func(op hpdi.Op, buf []byte) {
		q, err := r.devs[0].NewQueue(1)
		if err != nil {
			t.Fatal(err)
		}
		err = hpdi.Do(q, &hpdi.Request{Op: op, Offset: int64(r.label.Layout.Journal) * block.Size, Vec: [][]byte{buf}})
		if err = errors.Join(err, q.Close()); err != nil {
			t.Fatal(err)
		}
	}
	before := make([]byte, r.label.Layout.JournalBlocks*block.Size)
	area(hpdi.OpRead, before)
	r.manyPoints(v, rng, 3, 20, map[int64]byte{})
	r.die()
	area(hpdi.OpWrite, before)
	err := r.open()
	if err == nil {
		r.die()
	}
	return err
}

// A device that is older than the region is found out, whatever the region has of its
// journal.
func TestUnfoldedJournalOfOlderDevice(t *testing.T) {
	if err := olderDevice(t); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "ends at consistency point") {
		t.Errorf("opened: %v", err)
	}
}

// Whatever happens to the memory of the unfolded journal while no guest lives costs time
// alone.
func TestUnfoldedJournalChaos(t *testing.T) {
	long(t)
	seeds := few(24)
	if soak {
		seeds = 400
	}
	for seed := range uint64(seeds) {
		rng := rand.New(rand.NewPCG(seed, 41))
		r := newRig(t, 1+int(seed%2), testSize)
		r.mustOpen()
		v := r.volume("v", 3<<20)
		m := blocktest.NewModel(seed)
		for round := range 5 {
			if err := exercise(r, v, m, rng, 40); err != nil {
				t.Fatalf("seed %d round %d: %v", seed, round, err)
			}
			r.die()
			r.changeRegion(func(q *region.Region) {
				for _, s := range q.Sections(region.SectionJournal) {
					mem, err := q.MapSection(s)
					if err != nil {
						t.Fatal(err)
					}
					for range 1 + rng.IntN(3) {
						spoil(rng, mem[:min(len(mem), 256<<10)])
					}
				}
			})
			v = r.comesBack(m, m.Acked(), fmt.Sprintf("seed %d round %d", seed, round))
		}
		r.shut()
	}
}

// spoil writes nonsense somewhere.
func spoil(rng *rand.Rand, mem []byte) {
	at := rng.IntN(len(mem))
	part := mem[at:][:1+rng.IntN(min(len(mem)-at, 1<<rng.IntN(15)))]
	switch rng.IntN(4) {
	case 0:
		clear(part)
	case 1: // what stands elsewhere
		copy(part, mem[rng.IntN(len(mem)):])
	default:
		for i := range part {
			mask := byte(rng.Uint32()) // some bits of each byte only
			part[i] ^= byte(rng.Uint32()) & mask
		}
	}
}
