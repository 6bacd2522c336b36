package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/dedup"
)

// addMemory adds a device of LLRRM to the pool.
func (r *rig) addMemory(size int64) *blocktest.Crash {
	r.t.Helper()
	d := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "memory", Size: size, Seed: 77, Clock: r.clock, Direct: true})
	if err := r.AddMemory(context.Background(), d); err != nil {
		r.t.Fatal(err)
	}
	r.devs = append(r.devs, d)
	return d
}

// transferStep lets references be moved by a step, as Run does, and waits for nothing.
func (r *rig) transferStep() error {
	return r.do(context.Background(), func() error {
		t := r.Pool.transfer
		step := func() {
			t.next = time.Time{}
			if t.work(time.Now()); !t.since.IsZero() && !t.due {
				t.since = t.since.Add(-t.o.Wait)
				t.work(time.Now())
			}
		}
		for step(); t.wantsFold(); step() {
			if err := r.foldAll(); err != nil {
				return err
			}
		}
		return nil
	})
}

// transferAll moves all references that wait for it, and frees what they leave.
func (r *rig) transferAll() {
	r.t.Helper()
	for n := 0; r.Pool.transfer.due || r.machine.MovedLen() > 0; n++ {
		if err := errors.Join(r.transferStep(), r.Pool.Commit(context.Background())); err != nil {
			r.t.Fatal(err)
		}
		if n > 10_000 {
			r.t.Fatalf("references are moved without end: %+v", r.Stats().Memory)
		}
	}
	r.fold()
	r.fold()
}

// lies returns the number of the device that a block of a volume lies on.
func (r *rig) lies(v block.Volume, lba int64) int { return r.at(v, lba).Device() }

// at returns where a block of a volume lies.
func (r *rig) at(v block.Volume, lba int64) block.Physical {
	r.t.Helper()
	var p [1]block.Pointer
	w, ok := r.catalogue.ByName(v.Info().Name)
	if !ok {
		r.t.Fatal("no such volume")
	}
	if err := r.bmap.Lookup(w.ID, block.Logical(lba), p[:]); err != nil {
		r.t.Fatal(err)
	}
	return p[0].Phys
}

// memoryRig returns a pool with a volume that shares series of eight, and memory, which
// is device 1.
func memoryRig(t testing.TB, threshold uint8) (*rig, block.Volume) {
	r, v := sharingRig(t, 8)
	r.addMemory(8 << 20)
	r.setThreshold(threshold)
	return r, v
}

func (r *rig) setThreshold(threshold uint8) {
	r.t.Helper()
	n := int(threshold)
	if err := r.SetSettings(context.Background(), SettingsChange{Threshold: &n}); err != nil {
		r.t.Fatal(err)
	}
}

// With the threshold's number of copies on disks the next one goes to memory, those after
// it share that, and the copies' references follow, whatever happens to the guest.
func TestTransfer(t *testing.T) {
	for threshold := range uint8(4) {
		for _, how := range []string{"", "death", "power cut", "closed"} {
			t.Run(fmt.Sprintf("threshold %d %s", threshold, how), func(t *testing.T) {
				r, v := memoryRig(t, threshold)
				data := content(1, 100)
				r.put(v, 0, data)
				one, at := data[20*block.Size:][:block.Size], []int64{20}
				copies := int(threshold)
				if copies == 0 {
					copies = cp.DefaultThreshold
				}
				put := func(written, shared uint64, device int) {
					t.Helper()
					lba := int64(1000 + 10*len(at))
					if w, s := r.put(v, lba, one); w != written || s != shared || r.lies(v, lba) != device {
						t.Errorf("copy %d: %d written, %d shared, on device %d", len(at), w, s, r.lies(v, lba))
					}
					at = append(at, lba)
				}
				for range copies - 1 {
					put(1, 0, 0)
				}
				put(1, 0, 1)
				if s := r.Stats().Memory; s.Written != 1 || s.Total-s.Free != block.Size {
					t.Errorf("%+v", s)
				}
				put(0, 1, 1)
				if how != "" {
					switch how {
					case "death":
						r.die()
					case "power cut":
						if err := v.Flush(context.Background()); err != nil {
							t.Fatal(err)
						}
						r.cutPower(blocktest.DropAll, 1)
					case "closed":
						r.fold()
						r.shut()
						r.reopen()
					}
					r.mustOpen()
					v, _ = r.Volume("v")
					if err := r.IndexAll(context.Background()); err != nil {
						t.Fatal(err)
					}
				}
				put(0, 1, 1)
				r.fold()
				used := r.on(0)
				r.transferAll()
				for _, lba := range at {
					if dev := r.lies(v, lba); dev != 1 {
						t.Errorf("block %d lies on device %d", lba, dev)
					}
					r.expect(v, lba, one)
				}
				if now := r.on(0); now > used-int64(copies)+6 { // pages of metadata come and go
					t.Errorf("%d blocks of disks are in use, %d before", now, used)
				}
				// It parts no series: nothing of this is written.
				if w, s := r.put(v, 5000, data); w != 0 || s != 100 || r.lies(v, 5020) != 1 {
					t.Errorf("of a series with a block in memory %d are written and %d shared", w, s)
				}
				r.expect(v, 0, data)
				r.expect(v, 5000, data)
				r.mustCheck()
				r.shut()
			})
		}
	}
}

// Whoever writes the same again in the same place refers to it once, as before.
func TestRewriteIsNoCopy(t *testing.T) {
	r, v := memoryRig(t, 1)
	data := content(1, 3)
	for range 4 {
		r.put(v, 100, data)
	}
	if s := r.Stats().Memory; s.Written != 0 {
		t.Errorf("%+v", s)
	}
	r.put(v, 200, data)
	r.put(v, 100, data)
	if s := r.Stats().Memory; s.Written != 3 || r.lies(v, 100) != 1 || r.lies(v, 200) != 1 {
		t.Errorf("%+v", s)
	}
	r.shut()
}

// What one consistency point writes several times goes to memory like the rest; series of
// the same point are shared around it.
func TestTransferWithinPoint(t *testing.T) {
	r, v := memoryRig(t, 2)
	data := content(1, 40)
	for i := range int64(5) {
		if err := write(v, (2000+i*10)*block.Size, data[20*block.Size:][:block.Size]); err != nil {
			t.Fatal(err)
		}
	}
	for i := range int64(3) {
		if err := write(v, i*100*block.Size, data); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Pool.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	// The one of the first series is a copy, a second is written, the third is in memory.
	if s := r.machine.Stats(); s.Blocks != 42 || s.Shared != 2*40+3 || s.Transferred != 1 {
		t.Errorf("%+v", s)
	}
	r.transferAll()
	for i := range int64(3) {
		r.expect(v, i*100, data)
	}
	for i := range int64(5) {
		if lba := 2000 + i*10; r.lies(v, lba) != 1 {
			t.Errorf("block %d is on a disk", lba)
		}
	}
	if r.lies(v, 20) != 1 || r.lies(v, 120) != 1 || r.lies(v, 220) != 1 {
		t.Error("a block of a series is on a disk that memory has")
	}
	r.shut()
}

// shorts writes each of n blocks times times, one by one between others.
func (r *rig) shorts(v block.Volume, n, times int) (data []byte) {
	r.t.Helper()
	data = content(5, n)
	for k := range times {
		var p []byte
		for i := range n {
			p = append(append(p, data[i*block.Size:][:block.Size]...), content(uint64(1000*k+i+10), 1)...)
		}
		r.put(v, int64(k*2*n), p)
	}
	return data
}

func (r *rig) expectShorts(v block.Volume, data []byte, times int) {
	r.t.Helper()
	n := len(data) / block.Size
	for k := range times {
		for i := range n {
			r.expect(v, int64(k*2*n+2*i), data[i*block.Size:][:block.Size])
		}
	}
}

// Memory that is full takes nothing more, and what it has is shared as before.
func TestMemoryFull(t *testing.T) {
	r, v := sharingRig(t, 8)
	r.addMemory(5 * block.TrackBytes)
	const n, times = 1200, 4
	data := r.shorts(v, n, times)
	if s := r.Stats().Memory; s.Free != 0 || s.Written != 4*block.TrackBlocks {
		t.Errorf("%+v", s)
	}
	r.transferAll()
	r.expectShorts(v, data, times)
	r.mustCheck()
	if w, s := r.put(v, 16_000, data[:block.Size]); w != 0 || s != 1 {
		t.Errorf("of a block in memory %d are written", w)
	}
	// Room comes back with what nobody refers to any more.
	if err := v.Trim(context.Background(), 0, v.Info().Size, block.Tag{}); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		r.fold()
	}
	if s := r.Stats().Memory; s.Free != s.Total {
		t.Errorf("%+v", s)
	}
	r.shut()
}

// Memory is taken out while the pool serves. What many shared there is one block on a disk
// again, and not one for each reference, also of a volume that shares nothing any more.
func TestRemoveMemory(t *testing.T) {
	long(t)
	for i := range few(4) {
		dies, off := i%2 == 1, i/2 == 1
		r, v := sharingRig(t, 8)
		r.addMemory(5 * block.TrackBytes)
		const n, times = 300, 20
		data := r.shorts(v, n, times)
		r.transferAll()
		used := r.on(0)
		if r.on(1) < n {
			t.Fatalf("%d blocks are in memory", r.on(1))
		}
		if off {
			if err := r.SetSharing(context.Background(), "v", 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.RemoveDevice(context.Background(), "memory"); err != nil {
			t.Fatal(err)
		}
		for i := 0; r.removing(); i++ {
			if err := r.removalStep(); err != nil {
				t.Fatal(err)
			}
			if dies && i == 12 {
				r.die()
				r.mustOpen()
				v, _ = r.Volume("v")
			}
		}
		r.devs = r.devs[:1]
		if now := r.on(0); now > used+n+200 {
			t.Errorf("%d blocks of disks are in use, %d before and %d were in memory", now, used, n)
		}
		r.expectShorts(v, data, times)
		r.mustCheck()
		r.die()
		r.mustOpen()
		v, _ = r.Volume("v")
		r.expectShorts(v, data, times)
		r.shut()
	}
}

// When memory cannot be written, blocks go to disks as they do without it.
func TestMemoryFails(t *testing.T) {
	r, _ := memoryRig(t, 2)
	r.stop()
	r.reopenDevices()
	faults := r.faulty()
	r.mustOpen()
	v, _ := r.Volume("v")
	data := r.shorts(v, 20, 2)
	faults[1].Add(blocktest.Rule{Op: hpdi.OpWrite, Err: errMedium})
	if err := write(v, 5000*block.Size, data[:block.Size]); err != nil {
		t.Fatal(err)
	}
	if err := r.Pool.Commit(context.Background()); err == nil {
		t.Fatal("memory that fails was written")
	}
	if err := r.Pool.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	if s := r.Stats().Memory; !s.Failed || s.Written != 0 || r.lies(v, 5000) != 0 {
		t.Errorf("%+v", s)
	}
	r.expect(v, 5000, data[:block.Size])
	r.mustCheck()
	r.shut()
}

// A scan finds what memory has, too: also what it had before somebody began to move the
// references, and did not come to the end.
func TestScanFindsMemory(t *testing.T) {
	r, v := memoryRig(t, 2)
	if err := r.SetSharing(context.Background(), "v", 0); err != nil {
		t.Fatal(err)
	}
	plain := r.shorts(v, 50, 1)
	w := r.sharingVolume("w", 16<<20, 8)
	r.shorts(w, 50, 4)
	r.transferAll()
	if r.lies(v, 0) != 0 || r.lies(w, 0) != 1 {
		t.Fatalf("on devices %d and %d", r.lies(v, 0), r.lies(w, 0))
	}
	if err := r.SetSharing(context.Background(), "v", 8); err != nil {
		t.Fatal(err)
	}
	if s := r.scanAll("v", ScanStart); s.State != ScanDone || s.Moved < 50 {
		t.Errorf("%+v", s)
	}
	for i := range int64(50) {
		if r.lies(v, 2*i) != 1 {
			t.Errorf("block %d is on a disk", 2*i)
		}
	}
	r.expectShorts(v, plain, 1)
	r.shut()
}

// With an index that keeps one block of several, short matches are found by one of their
// blocks, and all of memory is kept.
func TestTransferWithThinIndex(t *testing.T) {
	long(t)
	r := newRigWithLog(t, 1, testSize, 16<<20)
	r.indexBytes = 64 << 10
	r.fingerprint = dedup.Secret(1).Fingerprint // with some secrets a small index has no place for one of memory's
	r.mustOpen()
	v := r.sharingVolume("v", 1<<30, 8)
	r.addMemory(8 << 20)
	r.setThreshold(1)
	const n, part = 24_000, 4
	data := content(1, n)
	for at := 0; at < n; at += 2000 {
		r.put(v, int64(at), data[at*block.Size:][:2000*block.Size])
	}
	r.fold()
	for range 3 {
		if err := r.IndexAll(context.Background()); err != nil {
			t.Fatal(err)
		}
		if err := r.do(context.Background(), func() error { r.machine.Index.Renew(); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	every := r.machine.Index.Stats().Every
	if every < 2 || every > part {
		t.Fatalf("the index keeps one block in %d: the test shows nothing", every)
	}
	for i := range 100 {
		short := data[i*block.TrackBytes/2+block.Size:][:part*block.Size]
		if w, s := r.put(v, int64(100_000+i*10), short); w != part || s != 0 {
			t.Fatalf("%d written, %d shared", w, s)
		}
		if w, s := r.put(v, int64(200_000+i*10), short); w != 0 || s != part {
			t.Fatalf("once more: %d written, %d shared", w, s)
		}
	}
	if s := r.Stats().Memory; s.Written != 100*part {
		t.Errorf("%+v", s)
	}
	r.transferAll()
	r.expect(v, 0, data)
	r.shut()
}

// Whatever is written, repeated and trimmed, moved to memory and away again, and whenever
// the guest dies or power is cut: what is read is what was written, and counts are right.
func TestTransferRandomly(t *testing.T) {
	long(t)
	transferred := uint64(0)
	for seed := range uint64(few(16)) {
		rng := rand.New(rand.NewPCG(seed, 15))
		r := newRig(t, 1+int(seed%2), testSize)
		r.repeats = true
		r.mustOpen()
		v := r.sharingVolume("v", 3<<20, 4+int(seed%3))
		r.addMemory(5 * block.TrackBytes)
		r.setThreshold(uint8(1 + seed%3))
		m := blocktest.NewModel(seed)
		for round := range 8 {
			for range 6 {
				if err := exercise(r, v, m, rng, 10); err != nil {
					t.Fatalf("seed %d round %d: %v", seed, round, err)
				}
				for range rng.IntN(4) {
					if err := r.transferStep(); err != nil {
						t.Fatalf("seed %d round %d: %v", seed, round, err)
					}
				}
				if round == 6 && r.Stats().Removal.Device == "" {
					if err := r.RemoveDevice(context.Background(), "memory"); err != nil {
						t.Fatalf("seed %d: %v", seed, err)
					}
				}
				if round == 6 {
					if err := r.removalStep(); err != nil {
						t.Fatalf("seed %d round %d: %v", seed, round, err)
					}
				}
			}
			transferred += r.Stats().Memory.Written
			if round == 6 {
				for r.removing() {
					if err := r.removalStep(); err != nil {
						t.Fatalf("seed %d: %v", seed, err)
					}
				}
				r.devs = r.devs[:len(r.devs)-1]
			}
			v = r.nextLife(m, seed, round)
		}
		r.shut()
	}
	if transferred == 0 {
		t.Error("nothing went to memory")
	}
}

// A power cut after each operation of the devices while blocks go to memory, and references
// follow them.
func TestTransferPowerCutAtEveryOperation(t *testing.T) {
	long(t)
	step := int64(3)
	if testing.Short() || raced {
		step = 11
	}
	for cut := int64(1); ; cut += step {
		r, v := memoryRig(t, 1)
		data := content(1, 12)
		r.put(v, 0, data)
		r.clock.CutAfter(r.clock.Ops() + cut)
		err := func() error {
			for i := range int64(12) {
				if err := write(v, (100+2*i)*block.Size, data[i*block.Size:][:block.Size]); err != nil {
					return err
				}
			}
			if err := r.Pool.Commit(context.Background()); err != nil {
				return err
			}
			for range 5 {
				if err := errors.Join(r.transferStep(), r.Pool.Commit(context.Background())); err != nil {
					return err
				}
			}
			return r.Fold(context.Background())
		}()
		if err != nil && !errors.Is(err, blocktest.ErrPowerCut) {
			t.Fatalf("cut %d: %v", cut, err)
		}
		if err == nil && r.lies(v, 0) != 1 {
			t.Error("the references did not follow")
		}
		r.cutPower(blocktest.CutRandom, uint64(cut))
		if err := r.open(); err != nil {
			t.Fatalf("cut %d: open: %v", cut, err)
		}
		v, _ = r.Volume("v")
		r.expect(v, 0, data)
		got := make([]byte, block.Size)
		for i := range int64(12) {
			if err := v.Read(context.Background(), got, (100+2*i)*block.Size); err != nil {
				t.Fatalf("cut %d: %v", cut, err)
			}
			if want := data[i*block.Size:][:block.Size]; !bytes.Equal(got, want) && !bytes.Equal(got, make([]byte, block.Size)) {
				t.Fatalf("cut %d: block %d is neither old nor new", cut, i)
			}
		}
		r.mustCheck()
		r.shut()
		if err == nil || t.Failed() {
			return
		}
	}
}
