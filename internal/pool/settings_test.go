package pool

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/dedup"
)

func (r *rig) setIndex(bytes int64) {
	r.t.Helper()
	if err := r.SetSettings(context.Background(), SettingsChange{IndexBytes: &bytes}); err != nil {
		r.t.Fatal(err)
	}
}

// indexStep makes a step of the indexer.
func (r *rig) indexStep() {
	r.t.Helper()
	if err := r.do(context.Background(), func() error { r.indexer.step(); return nil }); err != nil {
		r.t.Fatal(err)
	}
}

// indexes returns the sizes of the index and of the one that takes its place, 0 for none.
func (r *rig) indexes() (now, next int64) {
	r.t.Helper()
	s, err := r.Sharing(context.Background())
	if err != nil {
		r.t.Fatal(err)
	}
	if s.Index != nil {
		now = s.Index.Bytes
	}
	if s.Resized != nil {
		next = s.Resized.Bytes
	}
	if s.IndexBytes != now+next {
		r.t.Errorf("%d bytes of memory are told and not %d and %d", s.IndexBytes, now, next)
	}
	return now, next
}

func (r *rig) expectIndexes(when string, now, next int64) {
	r.t.Helper()
	if n, m := r.indexes(); n != now || m != next {
		r.t.Fatalf("%s: indexes of %d and %d bytes and not of %d and %d", when, n, m, now, next)
	}
}

// Settings stay with the pool whatever happens to it, each until it is changed, and what
// is impossible changes nothing. The superblock is one that earlier programs read as soon
// as nothing is set.
func TestSettings(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.mustOpen()
	ctx := context.Background()
	if s := r.Settings(); s != (cp.Settings{}) {
		t.Errorf("%+v", s)
	}
	want := cp.Settings{IndexBytes: 3 << 20, Threshold: 5}
	if err := r.SetSettings(ctx, SettingsChange{IndexBytes: new(int64(3 << 20))}); err != nil {
		t.Fatal(err)
	}
	v := r.volume("v", 1<<20)
	r.put(v, 0, content(1, 20))
	if err := r.do(ctx, func() error { // a fold is under way
		_, err := r.machine.Fold()
		return err
	}); err != nil || !r.machine.Folding() {
		t.Fatal("no fold is under way", err)
	}
	if err := r.SetSettings(ctx, SettingsChange{Threshold: new(5)}); err != nil {
		t.Fatal(err)
	}
	r.fold()
	for _, how := range []string{"at once", "death", "power cut", "closed"} {
		switch how {
		case "death":
			r.die()
			r.mustOpen()
		case "power cut":
			r.cutPower(blocktest.DropAll, 1)
			r.mustOpen()
		case "closed":
			r.shut()
			r.reopen()
			r.mustOpen()
		}
		if s := r.Settings(); s != want || r.machine.Superblock().Settings != want {
			t.Errorf("%s: %+v", how, s)
		}
	}
	for _, c := range []struct {
		change SettingsChange
		says   string
	}{
		{SettingsChange{IndexBytes: new(int64(dedup.MinIndex - 1))}, "65536 are the least"},
		{SettingsChange{IndexBytes: new(int64(-1))}, "65536 are the least"},
		{SettingsChange{Threshold: new(-1)}, "1 to 8 are possible"},
		{SettingsChange{Threshold: new(257), IndexBytes: new(int64(1 << 20))}, "1 to 8 are possible"},
	} {
		err := r.SetSettings(ctx, c.change)
		if !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), c.says) || !strings.HasPrefix(err.Error(), "pool p: ") {
			t.Errorf("%+v: %v", c.change, err)
		}
	}
	if s := r.Settings(); s != want {
		t.Errorf("after what is impossible: %+v", s)
	}
	version := func() byte { sb := r.machine.Superblock(); return sb.Encode()[8] }
	if version() != 5 {
		t.Errorf("version %d with settings", version())
	}
	if err := r.SetSettings(ctx, SettingsChange{Threshold: new(0), IndexBytes: new(int64(0))}); err != nil || r.Settings() != (cp.Settings{}) || version() == 5 {
		t.Errorf("%+v in version %d, %v", r.Settings(), version(), err)
	}
	r.shut()
}

// A setting that cannot be written is not there, and leaves the index as it was.
func TestSettingsThatCannotBeWritten(t *testing.T) {
	r := newRig(t, 1, testSize)
	faults := r.faulty()
	r.indexBytes = dedup.MinIndex
	r.mustOpen()
	r.sharingVolume("v", 1<<20, 8)
	faults[0].Add(blocktest.Rule{Err: errMedium})
	if err := r.SetSettings(context.Background(), SettingsChange{IndexBytes: new(int64(1 << 20))}); !errors.Is(err, errMedium) {
		t.Errorf("%v", err)
	}
	faults[0].Clear()
	r.expectIndexes("after an error", dedup.MinIndex, 0)
	if s := r.Settings(); s != (cp.Settings{}) {
		t.Errorf("%+v", s)
	}
	r.shut()
}

// The size that is set is that of the first index of a pool, and of the one after a
// takeover; what its blocks need is the most.
func TestIndexOfASetSize(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.indexBytes = dedup.MinIndex
	r.mustOpen()
	r.setIndex(300 << 10)
	r.expectIndexes("without a volume that shares", 0, 0)
	r.sharingVolume("v", 1<<20, 8)
	r.expectIndexes("first", 256<<10, 0)
	r.setIndex(math.MaxInt64)
	if err := r.IndexAll(context.Background()); err != nil {
		t.Fatal(err)
	}
	r.expectIndexes("the largest", 512<<10, 0) // 16 bytes for each block after the first ones, as a power of two
	r.setIndex(128 << 10)
	r.die() // before it is that small
	r.mustOpen()
	if err := r.IndexAll(context.Background()); err != nil {
		t.Fatal(err)
	}
	r.expectIndexes("after a takeover", 128<<10, 0)
	r.setIndex(0)
	if err := r.IndexAll(context.Background()); err != nil {
		t.Fatal(err)
	}
	r.expectIndexes("left to the guest", dedup.MinIndex, 0)
	r.shut()
}

// While an index of another size is made nothing is missed, and it has in the end what
// was stored before, folded or not, and what was written meanwhile.
func TestIndexIsResized(t *testing.T) {
	for _, sizes := range [][2]int64{{128 << 10, 512 << 10}, {512 << 10, 128 << 10}} {
		r := newRigWithLog(t, 1, testSize, 16<<20)
		r.indexBytes = sizes[0]
		r.mustOpen()
		v := r.sharingVolume("v", 256<<20, 1)
		var all [][]byte
		write := func() {
			data := content(uint64(len(all)), 100)
			if written, _ := r.put(v, int64(len(all))*100, data); written != 100 {
				t.Fatalf("%d blocks are written", written)
			}
			all = append(all, data)
		}
		at := int64(20_000)
		expectFound := func(when string) {
			t.Helper()
			for i, data := range all {
				if _, shared := r.put(v, at, data); shared != 100 {
					t.Fatalf("%s: %d blocks of %d are shared", when, shared, i)
				}
				at += 100
			}
		}
		for range 20 {
			write()
		}
		r.fold()
		if err := r.IndexAll(context.Background()); err != nil {
			t.Fatal(err)
		}
		write() // it waits for a fold
		r.setIndex(sizes[1])
		r.expectIndexes("begun", sizes[0], sizes[1])
		for step := 0; ; step++ {
			write()
			expectFound("meanwhile")
			r.indexStep()
			write()
			r.fold()
			if now, next := r.indexes(); next == 0 {
				if now != sizes[1] || step < 2 {
					t.Errorf("%d bytes after %d steps", now, step)
				}
				break
			}
		}
		expectFound("afterwards")
		s, err := r.Sharing(context.Background())
		if err != nil || s.Index.Done != s.Index.Pages || s.Index.Entries != 100*len(all) {
			t.Errorf("%+v, %v; %d blocks are stored", s.Index, err, 100*len(all))
		}
		r.shut()
	}
}

// Who changes his mind gets the size that he said last; an index that is wanted again
// goes on with the round in which it was.
func TestIndexIsResizedAgain(t *testing.T) {
	r := newRigWithLog(t, 1, testSize, 16<<20)
	r.indexBytes = dedup.MinIndex
	r.fingerprint = dedup.Secret(1).Fingerprint // with some secrets a small index has no place for one of 500
	r.mustOpen()
	v := r.sharingVolume("v", 64<<20, 8)
	data := content(1, 500)
	r.put(v, 0, data)
	r.fold()
	r.die()
	r.mustOpen()
	v, _ = r.Volume("v")
	for range 4 {
		r.indexStep() // it is counted, all pages are through, and the round is not
	}
	found := r.machine.Index.Stats().Entries
	if found != 500 || r.machine.Index.Round.Done {
		t.Fatalf("%d entries, %+v", found, r.machine.Index.Round)
	}
	r.setIndex(256 << 10)
	r.indexStep()
	r.setIndex(512 << 10)
	r.expectIndexes("larger", dedup.MinIndex, 512<<10)
	if r.machine.Next.Round.Begun {
		t.Error("a new index begins in the middle")
	}
	r.indexStep()
	r.setIndex(512<<10 + 1) // the same
	if !r.machine.Next.Round.Begun {
		t.Error("the same size begins anew")
	}
	r.setIndex(0)
	r.expectIndexes("as before", dedup.MinIndex, 0)
	r.indexStep()
	if !r.machine.Index.Round.Done || r.machine.Index.Stats().Entries != 500 {
		t.Errorf("%+v, %+v", r.machine.Index.Round, r.machine.Index.Stats())
	}
	if _, shared := r.put(v, 1000, data); shared != 500 {
		t.Errorf("%d blocks are shared", shared)
	}
	r.setIndex(256 << 10)
	r.indexStep()
	r.die() // in the middle
	r.mustOpen()
	r.setIndex(512 << 10) // before the first round of the one that there is
	for r.machine.Next != nil {
		r.indexStep()
	}
	if !r.machine.Index.Round.Done || r.machine.Index.Stats().Entries != 500 {
		t.Errorf("complete: %+v, %+v", r.machine.Index.Round, r.machine.Index.Stats())
	}
	r.setIndex(128 << 10)
	r.indexStep()
	r.shut() // in the middle, too
}

// However an index is resized while a pool is written, folded and left by a guest that
// dies, what is stored with a fingerprint is found.
func TestIndexIsResizedRandomly(t *testing.T) {
	long(t)
	for seed := range uint64(few(8)) {
		rng := rand.New(rand.NewPCG(seed, 17))
		r := newRigWithLog(t, 1, testSize, 16<<20)
		r.mustOpen()
		v := r.sharingVolume("v", 128<<20, 1)
		var all []uint64
		for n := range 150 {
			switch rng.IntN(8) {
			case 0:
				r.setIndex(dedup.MinIndex << rng.IntN(4))
			case 1:
				r.fold()
			case 2:
				if n%3 == 0 {
					r.die()
					r.mustOpen()
					v, _ = r.Volume("v")
				}
			case 3, 4:
				all = append(all, uint64(n)<<8|seed)
				r.put(v, int64(n)*40, content(all[len(all)-1], 40))
			default:
				r.indexStep()
			}
		}
		if err := r.IndexAll(context.Background()); err != nil {
			t.Fatal(err)
		}
		if r.machine.Next != nil {
			t.Errorf("seed %d: two indexes are left", seed)
		}
		for i, c := range slices.Backward(all) {
			if _, shared := r.put(v, int64(10_000+i*40), content(c, 40)); shared != 40 {
				t.Fatalf("seed %d: %d blocks of %d are shared: %+v", seed, shared, i, r.machine.Index.Stats())
			}
		}
		r.shut()
	}
}

// Without memory for another index the pool keeps the one that it has, and the setting.
func TestIndexWithoutMemory(t *testing.T) {
	if raced {
		t.Skip("the race detector takes memory at any moment")
	}
	r := newRig(t, 1, testSize)
	r.indexBytes = dedup.MinIndex
	r.mustOpen()
	v := r.sharingVolume("v", 64<<20, 8)
	data := content(1, 100)
	r.put(v, 0, data)
	r.fillRegion()
	room := make([]byte, 64<<20) // that the heap has, so that it needs no more meanwhile
	for i := 0; i < len(room); i += 4096 {
		room[i] = 1
	}
	runtime.KeepAlive(room)
	room = nil
	runtime.GC()
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_DATA, &was); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_DATA, &unix.Rlimit{Cur: 4096, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	err := r.SetSettings(context.Background(), SettingsChange{IndexBytes: new(int64(512 << 10))})
	if e := unix.Setrlimit(unix.RLIMIT_DATA, &was); e != nil {
		t.Fatal(e)
	}
	if !errors.Is(err, unix.ENOMEM) || !strings.Contains(err.Error(), "pool p: index of fingerprints of 524288 bytes") || !strings.Contains(err.Error(), "it keeps the index that it has") {
		t.Errorf("%v", err)
	}
	r.expectIndexes("without memory", dedup.MinIndex, 0)
	if s := r.Settings(); s != (cp.Settings{}) {
		t.Errorf("%+v", s)
	}
	if _, shared := r.put(v, 1000, data); shared != 100 {
		t.Errorf("%d blocks are shared", shared)
	}
	r.shut()
}

// The indexer of a pool at rest goes on by itself, and not with the ticks of a
// pool that looks four times a second whether there is anything to do.
func TestIndexerOfAnIdlePool(t *testing.T) {
	r := newRigWithLog(t, 1, testSize, 16<<20)
	r.indexBytes = dedup.MinIndex
	stop := r.run()
	v := r.sharingVolume("v", 64<<20, 8)
	if err := write(v, 0, content(1, 500)); err != nil {
		t.Fatal(err)
	}
	r.fold()
	begun, steps := time.Now(), 0
	for i := range int64(12) {
		size := int64(dedup.MinIndex) << (1 + i%2)
		r.setIndex(size)
		for r.Stats().Sharing.IndexBytes != size { // it must not wake Run
			time.Sleep(time.Millisecond)
			if time.Since(begun) > time.Minute {
				t.Fatal("it does not end")
			}
		}
		steps += 2 // and one right after SetSettings
	}
	if took, ticks := time.Since(begun), time.Duration(steps)*DefaultInterval/4; took > ticks/2 {
		t.Errorf("%d steps took %v; with ticks %v", steps, took, ticks)
	}
	stop()
	if err := r.Pool.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// The indexer rests while clients need what it would take, and goes on afterwards.
func TestIndexerYields(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.mustOpen()
	v := r.sharingVolume("v", 64<<20, 8)
	u := r.dirty.Usage()
	for off := int64(0); !r.pressed(); off += 16 {
		if off > 2*int64(u.Permits) {
			t.Fatal("clients are never pressed")
		}
		if err := write(v, off*block.Size, content(uint64(off), 16)); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Now()
	r.indexer.work(now)
	if r.machine.Index.Round.Begun || !r.indexer.next.After(now) || r.indexer.next.After(now.Add(time.Second)) {
		t.Errorf("%+v at %v", r.indexer, now)
	}
	if err := r.Pool.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	r.indexer.work(now.Add(time.Second))
	took := time.Since(begun)
	if rest := r.indexer.next.Sub(begun); !r.machine.Index.Round.Begun || rest <= 0 || rest > (indexRest+1)*took {
		t.Errorf("it rests %v after %v: %+v", rest, took, r.indexer)
	}
	r.shut()
}
