package pool

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/dedup"
)

// content returns n blocks that are like no others.
func content(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 99))
	p := make([]byte, n*block.Size)
	for i := 0; i < len(p); i += 8 {
		p[i], p[i+1], p[i+2], p[i+3] = byte(r.Uint32()), byte(r.Uint32()), byte(seed), 1
	}
	return p
}

// sharingRig returns an open pool with a volume that shares runs of blocks.
func sharingRig(t testing.TB, run int) (*rig, block.Volume) {
	t.Helper()
	r := newRigWithLog(t, 1, testSize, 16<<20)
	r.mustOpen()
	return r, r.sharingVolume("v", 64<<20, run)
}

func (r *rig) sharingVolume(name string, size int64, run int) block.Volume {
	r.t.Helper()
	v := r.volume(name, size)
	if err := r.SetSharing(context.Background(), name, run); err != nil {
		r.t.Fatal(err)
	}
	return v
}

// put writes blocks at a block of a volume and commits them, and returns how many
// of them were written to the devices and how many are shared.
func (r *rig) put(v block.Volume, lba int64, data []byte) (written, shared uint64) {
	r.t.Helper()
	before := r.machine.Stats()
	if err := write(v, lba*block.Size, data); err != nil {
		r.t.Fatal(err)
	}
	if err := r.Pool.Commit(context.Background()); err != nil {
		r.t.Fatal(err)
	}
	after := r.machine.Stats()
	return after.Blocks - before.Blocks, after.Shared - before.Shared
}

func (r *rig) fold() {
	r.t.Helper()
	if err := r.Fold(context.Background()); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) expect(v block.Volume, lba int64, data []byte) {
	r.t.Helper()
	got := make([]byte, len(data))
	if err := v.Read(context.Background(), got, lba*block.Size); err != nil {
		r.t.Fatal(err)
	}
	if !bytes.Equal(got, data) {
		for i := 0; i < len(data); i += block.Size {
			if !bytes.Equal(got[i:i+block.Size], data[i:i+block.Size]) {
				r.t.Fatalf("block %d holds other data", lba+int64(i/block.Size))
			}
		}
	}
}

// What is stored is shared wherever it is written again, whatever the pool went
// through in between, and stays when one of those who share it goes.
func TestShare(t *testing.T) {
	for _, how := range []string{"committed", "folded", "death", "folded and death", "power cut", "closed"} {
		t.Run(how, func(t *testing.T) {
			r, v := sharingRig(t, 8)
			data := content(1, 200)
			if written, shared := r.put(v, 0, data); written != 200 || shared != 0 {
				t.Fatalf("%d blocks were written and %d shared", written, shared)
			}
			if how == "folded" || how == "folded and death" {
				r.fold()
			}
			switch how {
			case "death", "folded and death":
				r.die()
				r.mustOpen()
			case "power cut":
				if err := v.Flush(context.Background()); err != nil {
					t.Fatal(err)
				}
				r.cutPower(blocktest.DropAll, 1)
				r.mustOpen()
			case "closed":
				r.shut()
				r.reopen()
				r.mustOpen()
			}
			if err := r.IndexAll(context.Background()); err != nil {
				t.Fatal(err)
			}
			v, _ = r.Volume("v")
			w := r.sharingVolume("w", 64<<20, 8)
			free := r.space.Usage().Free
			if written, shared := r.put(w, 1000, data); written != 0 || shared != 200 {
				t.Fatalf("%d blocks were written and %d shared", written, shared)
			}
			r.fold()
			if now := r.space.Usage().Free; free-now > 64 {
				t.Errorf("sharing took %d blocks", free-now)
			}
			r.expect(v, 0, data)
			r.expect(w, 1000, data)
			r.mustCheck()
			// Half of the one who wrote it goes, then all of it.
			if err := v.Trim(context.Background(), 0, 100*block.Size, block.Tag{}); err != nil {
				t.Fatal(err)
			}
			r.put(v, 150, content(2, 10))
			r.fold()
			r.expect(w, 1000, data)
			if err := r.DeleteVolume(context.Background(), "v"); err != nil {
				t.Fatal(err)
			}
			r.fold()
			r.fold()
			r.put(w, 5000, content(3, 2000)) // whatever became free is used
			r.expect(w, 1000, data)
			r.die()
			r.mustOpen()
			w, _ = r.Volume("w")
			r.expect(w, 1000, data)
			r.shut()
		})
	}
}

// A match of THN with a new block on each side, between two longer ones, would let a
// reader jump four times within 2*THN blocks: the last one begins later, also where the
// window of matching ends in between.
func TestShareKeepsReadersFromJumping(t *testing.T) {
	for _, front := range []int{40, 247} {
		r, v := sharingRig(t, 8)
		a, b, c := content(1, front), content(2, 8), content(3, 40)
		for i, p := range [][]byte{b, c, a} { // b and c on one track
			r.put(v, int64(i)*1000, p)
			r.put(v, int64(i)*1000+500, content(uint64(10+i), 3))
		}
		data := slices.Concat(a, content(4, 1), b, content(5, 1), c)
		written, shared := r.put(v, 5000, data)
		if written != 2+6 || shared != uint64(front+8+40-6) {
			t.Errorf("with %d blocks in front %d were written and %d shared", front, written, shared)
		}
		r.expect(v, 5000, data)
	}
}

// What is shorter than THN is not shared, and a volume that shares nothing does
// not, whatever others do.
func TestShareThreshold(t *testing.T) {
	r, v := sharingRig(t, 8)
	data := content(1, 100)
	r.put(v, 0, data)
	part := func(first, n int) []byte { return data[first*block.Size:][:n*block.Size] }
	if _, shared := r.put(v, 1000, part(20, 7)); shared != 0 {
		t.Errorf("%d blocks of a series of seven are shared", shared)
	}
	if written, shared := r.put(v, 2000, part(40, 8)); shared != 8 || written != 0 {
		t.Errorf("of a series of eight %d are shared", shared)
	}
	// The same in the middle of others.
	mixed := append(append(content(7, 5), part(60, 9)...), content(8, 5)...)
	if written, shared := r.put(v, 3000, mixed); shared != 9 || written != 10 {
		t.Errorf("of a series of nine %d are shared and %d written", shared, written)
	}
	r.expect(v, 3000, mixed)
	if err := r.SetSharing(context.Background(), "v", 0); err != nil {
		t.Fatal(err)
	}
	if _, shared := r.put(v, 4000, part(0, 50)); shared != 0 {
		t.Errorf("%d blocks are shared by a volume that shares nothing", shared)
	}
	if err := r.SetSharing(context.Background(), "v", 1); err != nil {
		t.Fatal(err)
	}
	if _, shared := r.put(v, 5000, part(5, 1)); shared != 1 {
		t.Errorf("%d blocks are shared with THN 1", shared)
	}
	for _, run := range []int{-1, dedup.MaxRun + 1} {
		if err := r.SetSharing(context.Background(), "v", run); err == nil {
			t.Errorf("THN %d was taken", run)
		}
	}
	r.shut()
}

// A series that a consistency point cuts is shared all the same: what was mapped
// before and after it counts.
func TestShareAcrossPoints(t *testing.T) {
	r, v := sharingRig(t, 8)
	data := content(1, 64)
	r.put(v, 0, data)
	part := func(first, n int) []byte { return data[first*block.Size:][:n*block.Size] }
	r.put(v, 1000, part(0, 20))
	if _, shared := r.put(v, 1020, part(20, 3)); shared != 3 {
		t.Errorf("%d of three blocks are shared that go on with a series", shared)
	}
	if _, shared := r.put(v, 1030, part(30, 34)); shared != 34 {
		t.Errorf("%d of 34 blocks are shared", shared)
	}
	if _, shared := r.put(v, 1023, part(23, 7)); shared != 7 {
		t.Errorf("%d of seven blocks are shared that fill a gap in a series", shared)
	}
	// The same content once more: nothing has to be written.
	if written, _ := r.put(v, 1040, part(40, 2)); written != 0 {
		t.Errorf("%d blocks are written that were there", written)
	}
	r.expect(v, 1000, data)
	r.shut()
}

// What one consistency point writes twice is stored once.
func TestShareWithinPoint(t *testing.T) {
	r, v := sharingRig(t, 8)
	data := content(1, 300)
	for _, lba := range []int64{0, 1000, 4000} {
		if err := write(v, lba*block.Size, data); err != nil {
			t.Fatal(err)
		}
	}
	same := bytes.Repeat(content(2, 1), 600)
	if err := write(v, 8000*block.Size, same); err != nil {
		t.Fatal(err)
	}
	if err := r.Pool.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	s := r.machine.Stats()
	if s.Blocks+s.Shared != 1500 || s.Blocks > 300+256+3*16 {
		t.Errorf("%d blocks are written and %d shared", s.Blocks, s.Shared)
	}
	for _, lba := range []int64{0, 1000, 4000} {
		r.expect(v, lba, data)
	}
	r.expect(v, 8000, same)
	r.fold()
	r.shut()
}

// A fold takes blocks for its pages before it writes them. Until then they hold, and are
// found by, what was there before: nobody may share that. The pool is so small that what
// becomes free is soon used again.
func TestShareBesideFold(t *testing.T) {
	long(t)
	ctx := context.Background()
	for seed := range uint64(few(24)) {
		rng := rand.New(rand.NewPCG(seed, 21))
		r := newRig(t, 1, 13<<20)
		r.mustOpen()
		v := r.sharingVolume("v", 2<<20, 4)
		holds := map[int64][]byte{}
		for range 150 {
			lba, data := 16*rng.Int64N(16), content(rng.Uint64N(40), 16)
			holds[lba] = data
			r.put(v, lba, data)
			for range rng.IntN(4) {
				if err := r.do(ctx, func() error { _, err := r.machine.Fold(); return err }); err != nil {
					t.Fatal(err)
				}
			}
		}
		r.die()
		r.mustOpen()
		v, _ = r.Volume("v")
		for lba, data := range holds {
			r.expect(v, lba, data)
		}
		if r.shut(); t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// A block has as many references as its count can hold; then another copy is
// written, and shared in its turn.
func TestShareLimit(t *testing.T) {
	r, v := sharingRig(t, 8)
	data := content(1, 8)
	var shared uint64
	for i := range int64(600) {
		_, n := r.put(v, i*10, data)
		shared += n
	}
	if want := uint64(8 * (600 - 3)); shared != want {
		t.Errorf("%d blocks are shared and not %d", shared, want)
	}
	for i := range int64(600) {
		r.expect(v, i*10, data)
	}
	r.fold()
	r.mustCheck()
	r.die()
	r.mustOpen()
	if err := r.DeleteVolume(context.Background(), "v"); err != nil {
		t.Fatal(err)
	}
	r.fold()
	r.shut()
}

// A fingerprint decides nothing: with one that nearly all blocks have in common
// everything is compared, and nothing wrong is shared.
func TestShareWeakFingerprints(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.fingerprint = func(data []byte) dedup.Fingerprint { return dedup.Fingerprint(1 + data[0]%2) }
	r.mustOpen()
	v := r.sharingVolume("v", 16<<20, 2)
	all := map[int64][]byte{}
	for i := range int64(40) {
		data := content(uint64(i%7), 20)
		all[i*30] = data
		r.put(v, i*30, data)
	}
	for lba, data := range all {
		r.expect(v, lba, data)
	}
	if r.machine.Stats().Unequal == 0 {
		t.Error("no two blocks had the same fingerprint")
	}
	r.shut()
}

// What was trimmed dies up to the moment of the trim: a block that is shared
// afterwards in the same place is older, and stays.
func TestShareIntoTrimmedRange(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.mustOpen()
	w := r.sharingVolume("w", 16<<20, 8)
	v := r.sharingVolume("v", 80<<30, 8)
	data := content(1, 8)
	r.put(w, 0, data)
	const far = 256 << 20 / block.Size // below one page above leaves
	for i := range int64(300) {
		r.put(v, i*far, content(uint64(100+i), 1))
	}
	r.put(v, 299*far, data)
	r.fold()
	if err := v.Trim(context.Background(), 0, 80<<30, block.Tag{}); err != nil {
		t.Fatal(err)
	}
	if _, shared := r.put(v, 299*far, data); shared != 8 {
		t.Fatalf("%d blocks are shared", shared)
	}
	r.fold()
	if !r.bmap.Unfinished() {
		t.Error("the trim is finished: the test shows nothing")
	}
	for range 4 {
		r.expect(v, 299*far, data)
		r.mustCheck()
		r.fold()
	}
	r.expect(v, 299*far, data)
	r.expect(w, 0, data)
	r.shut()
}

// Whatever is written, repeated and trimmed, and whenever the guest dies or power is
// cut: what is read is what was written, and counts are right.
func TestShareRandomly(t *testing.T) {
	long(t)
	for seed := range uint64(few(16)) {
		rng := rand.New(rand.NewPCG(seed, 5))
		r := newRig(t, 1+int(seed%2), testSize)
		r.repeats = true
		if seed%4 == 3 {
			r.fingerprint = func(data []byte) dedup.Fingerprint {
				return dedup.Fingerprint(1 + dedup.Secret(1).Fingerprint(data)%16)
			}
		}
		r.mustOpen()
		v := r.sharingVolume("v", 3<<20, 1+int(seed%3))
		m := blocktest.NewModel(seed)
		shared := uint64(0)
		for round := range 8 {
			if err := exercise(r, v, m, rng, 60); err != nil {
				t.Fatalf("seed %d round %d: %v", seed, round, err)
			}
			shared += r.machine.Stats().Shared
			v = r.nextLife(m, seed, round)
		}
		if shared == 0 && seed%4 != 3 {
			t.Errorf("seed %d: nothing was shared", seed)
		}
		r.shut()
	}
}

// A power cut after each operation of the devices while blocks are shared, overwritten
// and folded.
func TestSharePowerCutAtEveryOperation(t *testing.T) {
	long(t)
	changes, step := 100, int64(2)
	if testing.Short() || raced {
		changes, step = 50, 8
	}
	for cut := int64(1); !powerCut(t, 9, cut, changes, 2) && !t.Failed(); cut += step {
	}
}

// Fingerprints of whole blocks are computed when they are received. A consistency point
// computes the others: of blocks that were received in parts, before the volume shared, or
// by a guest that is dead. None is that of something an extent of the log held before.
func TestFingerprintsAtReceipt(t *testing.T) {
	r := newRigWithLog(t, 1, testSize, 4<<20)
	var computed atomic.Int64
	r.fingerprint = func(data []byte) dedup.Fingerprint {
		computed.Add(1)
		return dedup.Secret(1).Fingerprint(data)
	}
	r.mustOpen()
	v := r.sharingVolume("v", 64<<20, 1)
	plain := r.volume("w", 64<<20)
	receive := func(v block.Volume, off int64, data []byte, want int64) {
		t.Helper()
		computed.Store(0)
		if err := write(v, off, data); err != nil {
			t.Fatal(err)
		}
		if got := computed.Load(); got != want {
			t.Errorf("%d fingerprints were computed when %d bytes were received, instead of %d", got, len(data), want)
		}
	}
	commit := func(want int64) {
		t.Helper()
		computed.Store(0)
		if err := r.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := computed.Load(); got != want {
			t.Errorf("a consistency point computed %d fingerprints instead of %d", got, want)
		}
	}
	receive(v, 60<<20, content(1, 100), 100)
	commit(0)
	// All of the log is used several times over, by blocks with a fingerprint and without.
	for i := range int64(20) {
		receive(v, i<<20, content(10+uint64(i), 200), 200)
		receive(plain, i<<20, content(40+uint64(i), 200), 0)
		receive(v, i<<20+block.Size/2, content(80+uint64(i), 3), 4) // two are parts
		commit(2)
	}
	receive(v, 50<<20, make([]byte, 10*block.Size), 0) // becomes a hole
	receive(plain, 50<<20, content(100, 50), 0)
	if err := r.SetSharing(t.Context(), "w", 1); err != nil { // its consistency point has those
		t.Fatal(err)
	}
	receive(plain, 52<<20, content(1, 100), 100)
	before := r.machine.Stats().Shared
	commit(0)
	if got := r.machine.Stats().Shared - before; got != 100 {
		t.Errorf("%d of 100 blocks were found", got)
	}
	receive(v, 55<<20, content(200, 30), 30)
	r.die()
	r.openBy("a") // and computes one that tells whether the index is the pool's
	commit(30)
	r.mustCheck()
}

// Fingerprints that cannot be read cost savings: the pool serves, folds and shares what
// it still knows of, a check tells, and a repair makes an end of them.
func TestLostFingerprints(t *testing.T) {
	for _, what := range []string{"roots", "root", "leaf"} {
		t.Run(what, func(t *testing.T) {
			r, v := sharingRig(t, 8)
			data := content(1, 200)
			r.put(v, 0, data)
			r.put(v, 8000, content(3, 1200))
			r.fold()
			page := r.machine.Superblock().Prints
			switch root := r.machine.PrintRoots()[0]; what {
			case "root":
				page = root
			case "leaf":
				// One whose tracks are full, so that no fold writes it anew.
				full := r.at(v, 8600).Block() / (block.Size / 8)
				err := blockmap.Walk(r.reader, root, func(p block.Pointer, level int, leaf uint64) (bool, error) {
					if level == 0 && leaf == full {
						page = p
					}
					return level > 0, nil
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			r.die()
			for _, p := range []block.Pointer{page, page.Second()} {
				if !p.IsHole() {
					r.devs[0].Corrupt(int64(p.Phys.Block())*block.Size+77, 0x55)
				}
			}
			r.mustOpen()
			v, _ = r.Volume("v")
			more := content(2, 100)
			r.put(v, 2000, more)
			r.put(v, 4000, data)
			if _, shared := r.put(v, 3000, more); shared != 100 {
				t.Errorf("%d blocks are shared that were written since", shared)
			}
			for range printTries {
				_ = r.Fold(context.Background()) // it may fail some times, but not for ever
			}
			r.fold()
			r.expect(v, 0, data)
			r.expect(v, 3000, more)
			r.expect(v, 4000, data)
			r.die()
			if report := r.mustRepair(); len(report.Mended) == 0 {
				t.Errorf("%+v", report)
			}
			r.mustOpen()
			v, _ = r.Volume("v")
			r.put(v, 5000, data)
			if _, shared := r.put(v, 6000, data); shared != 200 {
				t.Errorf("%d blocks are shared after a repair", shared)
			}
			r.fold()
			r.expect(v, 0, data)
			r.expect(v, 6000, data)
			r.shut()
		})
	}
}

// printTries is more than the folds that fingerprints may make fail.
const printTries = 4

// What is written over and over fills the index with what is not true any more; then it
// is told what there is, folded or not, and knows all of it.
func TestShareWithFullIndex(t *testing.T) {
	r := newRigWithLog(t, 1, testSize, 16<<20)
	r.indexBytes = dedup.MinIndex
	r.mustOpen()
	v := r.sharingVolume("v", 64<<20, 8)
	old := content(1, 200)
	r.put(v, 10_000, old)
	var last []byte
	rounds := 0
	for i := range 200 {
		last = content(uint64(100+i), 200)
		if r.put(v, 0, last); i%50 == 0 {
			r.fold()
		}
		if err := r.do(context.Background(), func() error {
			if r.machine.Index.Full() {
				rounds++
			}
			for range 10 {
				r.indexer.next = time.Time{}
				r.indexer.work(time.Now())
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if rounds < 3 {
		t.Errorf("%d rounds", rounds)
	}
	if s := r.machine.Index.Stats(); s.Every != 1 || s.Entries > s.Slots*14/16 {
		t.Errorf("%+v", s)
	}
	for i, data := range [][]byte{old, last} {
		if _, shared := r.put(v, int64(2000+i*500), data); shared != 200 {
			t.Errorf("%d blocks of %d are shared", shared, i)
		}
	}
	r.shut()
}

// A pool that is filled by volumes that share blocks refuses writes, also of what is
// stored already, because each block was promised a place of its own; and takes them
// again after a trim. Nothing that was acknowledged is lost.
func TestShareInFullPool(t *testing.T) {
	ctx := context.Background()
	for _, run := range []int{8, 1}[:few(2)] {
		r := newRig(t, 1, smallest)
		stop := r.run()
		v := r.sharingVolume("v", 1<<30, run)
		for round := range 4 {
			var held []int64
			for i := int64(0); ; i++ {
				data := content(uint64(i%5)<<8|uint64(round), 16)
				if i%5 > 0 {
					data = content(uint64(round)<<32|uint64(i)<<8, 16)
				}
				err := write(v, i*16*block.Size, data)
				if errors.Is(err, block.ErrNoSpace) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				held = append(held, i)
				if i > 10*smallest/block.Size/16 {
					t.Fatal("the pool never gets full")
				}
			}
			for _, i := range held {
				if i%5 > 0 {
					r.expect(v, i*16, content(uint64(round)<<32|uint64(i)<<8, 16))
				} else {
					r.expect(v, i*16, content(uint64(round), 16))
				}
			}
			r.mustCheck()
			if len(held) < 20 {
				t.Fatalf("round %d: only %d writes", round, len(held))
			}
			if err := v.Trim(ctx, 0, 1<<30, block.Tag{}); err != nil {
				t.Fatal(err)
			}
		}
		if r.Stats().BlocksWritten == 0 || r.machine.Stats().Shared == 0 {
			t.Errorf("%+v", r.machine.Stats())
		}
		stop()
		if err := r.Pool.Close(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// A device that holds shared blocks leaves the pool like others; what shares a series
// shares it afterwards.
func TestShareAndRemoval(t *testing.T) {
	r := newRigWithLog(t, 2, testSize, 4<<20)
	r.mustOpen()
	v, w := r.sharingVolume("v", 64<<20, 8), r.sharingVolume("w", 64<<20, 8)
	for i := range int64(12) {
		data := content(uint64(i), 300)
		r.put(v, i*500, data)
		r.put(w, i*600, data)
	}
	r.fold()
	r.mustCheck()
	used := r.space.Usage()
	if err := r.RemoveDevice(context.Background(), "disk1"); err != nil {
		t.Fatal(err)
	}
	r.removeRest()
	for i := range int64(12) {
		data := content(uint64(i), 300)
		r.expect(v, i*500, data)
		r.expect(w, i*600, data)
	}
	r.fold()
	now := r.space.Usage()
	if grown := (now.Total - now.Free) - (used.Total - used.Free); grown > 400 {
		t.Errorf("%d blocks more are in use", grown)
	}
	r.shut()
}

// A copy has lost the newest content of blocks and holds what was there before, which is
// received once more, and fingerprints do not tell the two. Nothing is shared that is the
// same on that copy alone.
func TestShareWithStaleCopy(t *testing.T) {
	const n = 16
	blocks := func(version byte) []byte {
		p := make([]byte, n*block.Size)
		for i := range n {
			p[i*block.Size], p[i*block.Size+1] = byte(i), version
		}
		return p
	}
	for victim := range 2 {
		r, _ := newMirroredRig(t, 2)
		r.fingerprint = func(data []byte) dedup.Fingerprint { return dedup.Fingerprint(1 + data[0]) }
		r.mustOpen()
		v, w := r.sharingVolume("v", 4<<20, 8), r.sharingVolume("w", 4<<20, 8)
		r.put(v, 0, blocks(2))
		r.fold()
		var ptrs [n]block.Pointer
		if err := r.bmap.Lookup(1, 0, ptrs[:]); err != nil {
			t.Fatal(err)
		}
		for _, p := range ptrs {
			r.devs[victim].Corrupt(int64(block.TrackBlocks+p.Phys.Block())*block.Size+1, 1^2)
		}
		for i := range int64(8) { // read from either copy
			if _, shared := r.put(w, i*n, blocks(1)); i == 0 && shared != 0 {
				t.Errorf("copy %d is stale: %d blocks are shared", victim, shared)
			}
		}
		r.forget()
		for i := range int64(8) {
			r.expect(w, i*n, blocks(1))
		}
		r.expect(v, 0, blocks(2))
		if s := r.scrubAll(); s.Now.Unreadable != 0 {
			t.Errorf("copy %d is stale: scrub: %+v", victim, s)
		}
		r.mustCheck()
		r.shut()
	}
}
