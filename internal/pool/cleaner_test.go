package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// eager is a cleaner that finds something to do in small pools.
var eager = CleanerOptions{LowWater: 70, MinFree: 15}

// openEager opens a rig's pool with an eager cleaner, which cleanStep drives.
func (r *rig) openEager() {
	r.t.Helper()
	r.cleaning = eager
	r.mustOpen()
}

// cleanStep makes the cleaner take its next step and does what it waits for, as
// Run does.
func (r *rig) cleanStep() error {
	return r.do(context.Background(), func() error {
		c := r.cleaner
		c.work(time.Now().Add(time.Hour)) // however long it would have paused
		c.next = time.Time{}
		switch u := r.dirty.Usage(); {
		case c.phase == cleanerCommits || u.Active+u.Frozen >= u.Permits/4:
			return r.commitAll()
		case c.wantsFold() || r.machine.Folding():
			_, err := r.machine.Fold()
			return err
		}
		return nil
	})
}

// clean lets the cleaner work until it has nothing to do any more.
func (r *rig) clean() {
	r.t.Helper()
	for range 100_000 {
		if err := r.cleanStep(); err != nil {
			r.t.Fatal(err)
		}
		if r.cleaner.phase == cleanerIdle && !r.machine.Folding() && (r.cleaner.stuck || r.cleaner.Stats().State == "enough tracks are wholly free") {
			return
		}
	}
	r.t.Fatalf("the cleaner does not come to an end: %+v", r.cleaner.Stats())
}

// fragment overwrites random blocks of a volume that holds n blocks until few
// tracks of the pool are wholly free.
func fragment(r *rig, v block.Volume, rng *rand.Rand, n int64) map[int64]byte {
	r.t.Helper()
	holds := map[int64]byte{}
	put := func(b, blocks int64) {
		c := byte(1 + rng.IntN(250))
		if err := write(v, b*block.Size, bytes.Repeat(pattern(c), int(blocks))); err != nil {
			r.t.Fatal(err)
		}
		for i := range blocks {
			holds[b+i] = c
		}
	}
	commit := func() {
		if err := r.Pool.Commit(context.Background()); err != nil {
			r.t.Fatal(err)
		}
	}
	for b := int64(0); b < n; b += 64 {
		put(b, min(64, n-b))
		commit()
	}
	for i := 0; ; i++ {
		for range 64 {
			put(rng.Int64N(n), 1)
		}
		if commit(); i%8 < 7 {
			continue
		}
		if err := r.Fold(context.Background()); err != nil {
			r.t.Fatal(err)
		}
		if t := r.space.Tracks(); t.Whole*10 < t.All || i > 1000 {
			r.t.Logf("%d rounds, %+v", i, t)
			return holds
		}
	}
}

// A fragmented pool gets whole tracks back, and its data stay what they are.
func TestCleanerMakesWholeTracks(t *testing.T) {
	long(t)
	for seed := range uint64(few(3)) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 31))
			r := newRig(t, 1+int(seed%2), 48<<20)
			r.openEager()
			v := r.volume("v", 64<<20)
			holds := fragment(r, v, rng, 6000)
			before := r.space.Tracks()
			r.clean()
			after, s := r.space.Tracks(), r.Stats().Cleaner
			t.Logf("before %+v, after %+v, %+v", before, after, s)
			if gain := after.Whole - before.Whole; gain < before.Parts/block.TrackBlocks/2 || s.Moved == 0 || s.Freed == 0 {
				t.Errorf("%d tracks gained, of %d blocks in parts of tracks", gain, before.Parts)
			}
			if s.Raced+s.Failed > 0 {
				t.Errorf("blocks were lost to races or errors, although there were none: %+v", s)
			}
			verifyBlocks(t, v, holds)
			r.mustCheck()
			// At rest it does nothing more.
			for range 100 {
				if err := r.cleanStep(); err != nil {
					t.Fatal(err)
				}
			}
			if again := r.Stats().Cleaner; again.Passes != s.Passes || again.Moved != s.Moved {
				t.Errorf("it goes on without anything to gain: %+v", again)
			}
			r.die()
			r.mustOpen()
			v, _ = r.Volume("v")
			verifyBlocks(t, v, holds)
			r.shut()
		})
	}
}

// busy changes a volume as clients do while the cleaner works between their
// requests, until n changes are made or the power goes.
func busy(r *rig, v block.Volume, m *blocktest.Model, rng *rand.Rand, blocks int64, n int) error {
	ctx := context.Background()
	for range n {
		at := rng.Int64N(blocks)
		k := min(1+rng.Int64N(8), blocks-at)
		var err error
		switch rng.IntN(12) {
		case 0:
			id := m.Zero(at*block.Size, k*block.Size)
			if err = v.Trim(ctx, at*block.Size, k*block.Size, block.Tag{}); err == nil {
				m.Ack(id)
			}
		case 1:
			covers := m.FlushStart()
			if err = v.Flush(ctx); err == nil {
				m.FlushDone(covers)
			}
		case 2, 3, 4:
			// Within a block: its rest may be what the cleaner moves.
			off := at*block.Size + 1 + rng.Int64N(block.Size/2)
			id, data := m.Write(off, 1+rng.IntN(block.Size/4))
			if err = write(v, off, data); err == nil {
				m.Ack(id)
			}
		case 5:
			id, data := m.Write(at*block.Size, int(k*block.Size))
			if err = write(v, at*block.Size, data); err == nil {
				m.Ack(id)
			}
		default:
			for range 1 + rng.IntN(8) {
				if err = r.cleanStep(); err != nil {
					break
				}
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// cleaning returns a rig whose pool is small, fragmented and being cleaned.
func cleaning(t *testing.T, seed uint64, rng *rand.Rand) (*rig, block.Volume, *blocktest.Model, int64) {
	t.Helper()
	const blocks = 1500
	r := newRig(t, 1, 22<<20)
	r.openEager()
	v := r.volume("v", blocks*block.Size)
	m := blocktest.NewModel(seed)
	put := func(b, n int64) {
		id, data := m.Write(b*block.Size, int(n*block.Size))
		if err := write(v, b*block.Size, data); err != nil {
			t.Fatal(err)
		}
		m.Ack(id)
	}
	for b := int64(0); b < blocks; b += 100 {
		put(b, 100)
		if err := r.Pool.Commit(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	for range 12 {
		for range 100 {
			put(rng.Int64N(blocks), 1)
		}
		if err := r.Fold(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	return r, v, m, blocks
}

// The power goes, or the guest dies, at any operation of devices while a pool
// is cleaned and clients change what is being moved. A prefix of what clients
// did comes back, with all that was flushed; after a death everything.
func TestCleanerCut(t *testing.T) {
	long(t)
	rounds := uint64(few(25))
	if soak {
		rounds = 20_000
	}
	moved := uint64(0)
	for seed := range rounds {
		rng := rand.New(rand.NewPCG(seed, 41))
		r, v, m, blocks := cleaning(t, seed, rng)
		for life := range uint64(3) {
			what := fmt.Sprintf("seed %d life %d", seed, life)
			cut := r.clock.Ops() + 1 + rng.Int64N(200)
			r.clock.CutAfter(cut)
			err := busy(r, v, m, rng, blocks, 60)
			if err != nil && !errors.Is(err, blocktest.ErrPowerCut) {
				t.Fatalf("%s: %v", what, err)
			}
			moved += r.Stats().Cleaner.Moved
			dies := err == nil && r.clock.Ops() < cut && rng.IntN(2) == 0
			if dies {
				r.clock.CutAfter(0)
				r.die()
			} else {
				r.cutPower(blocktest.CutRandom, seed<<3|life)
			}
			r.openEager()
			if v, err = r.Volume("v"); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			least := m.Flushed()
			if dies {
				least = m.Acked()
			}
			n, err := m.CheckPrefix(blockReader(v), least)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if !dies {
				m.Truncate(n) // after a death nothing more is promised than before
			}
			if r.mustCheck(); t.Failed() {
				t.Fatal(what)
			}
		}
		r.shut()
	}
	if moved == 0 {
		t.Error("nothing was ever moved")
	}
}

// A power cut at each operation of one pass, and a recovery after each.
func TestCleanerCutAtEveryOperation(t *testing.T) {
	long(t)
	step := int64(3)
	switch {
	case soak:
		step = 1
	case raced:
		step = 25
	}
	for cut := int64(1); ; cut += step {
		rng := rand.New(rand.NewPCG(7, 43))
		r, v, m, _ := cleaning(t, 7, rng)
		if err := v.Flush(context.Background()); err != nil {
			t.Fatal(err)
		}
		r.clock.CutAfter(r.clock.Ops() + cut)
		var err error
		for steps := 0; err == nil && r.cleaner.Stats().Passes == 0; steps++ {
			if err = r.cleanStep(); steps > 10_000 {
				t.Fatalf("operation %d: no pass comes to an end: %+v", cut, r.cleaner.Stats())
			}
			if r.cleaner.Stats().Failed > 0 { // reads that the cut has ended
				break
			}
		}
		if err != nil && !errors.Is(err, blocktest.ErrPowerCut) {
			t.Fatalf("operation %d: %v", cut, err)
		}
		through := err == nil && r.cleaner.Stats().Failed == 0
		r.cutPower(blocktest.CutRandom, uint64(cut))
		r.mustOpen()
		v, _ = r.Volume("v")
		// Everything was flushed before, and moves change nothing.
		if _, err := m.CheckPrefix(blockReader(v), m.Acked()); err != nil {
			t.Fatalf("operation %d: %v", cut, err)
		}
		if r.shut(); t.Failed() {
			t.Fatalf("operation %d", cut)
		}
		if through {
			t.Logf("%d operations", cut)
			return
		}
	}
}

// Clients write, trim, resize and delete while Run cleans, all at once.
func TestCleanerBesideClients(t *testing.T) {
	ops := 600
	if soak {
		ops = 20_000
	}
	for seed := range uint64(2) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute) // only a hang needs it
		defer cancel()
		const clients, size = 4, 3 << 20
		r := newRigWithLog(t, 1+int(seed), 96<<20, 16<<20)
		r.cleaning = CleanerOptions{LowWater: 100, MinFree: 1, Pause: 20 * time.Millisecond, Rate: 1 << 30}
		r.interval = 5 * time.Millisecond
		stop := r.run()
		var all []*client
		var work sync.WaitGroup
		// What nobody changes lies in pieces, among what clients do change.
		deal := rand.New(rand.NewPCG(seed, 78))
		still, holds := r.volume("still", 8<<20), map[int64]byte{}
		put := func(b int64, c byte) {
			if err := write(still, b*block.Size, pattern(c)); err != nil {
				t.Fatal(err)
			}
			holds[b] = c
		}
		for b := range int64(2000) {
			put(b, 1)
		}
		for range 20 {
			for b := range int64(50) {
				put(b*40+deal.Int64N(40), 2)
			}
			if err := r.Fold(ctx); err != nil {
				t.Fatal(err)
			}
		}
		v := r.volume("v", size)
		for i := range clients {
			c := &client{t: t, v: v, rng: rand.New(rand.NewPCG(seed, uint64(i))), want: make([]byte, size)}
			for at := int64(i) * 5000; at < size; at += clients * 5000 {
				c.own = append(c.own, block.Extent{Offset: at, Length: min(5000, size-at)})
			}
			all = append(all, c)
			work.Go(func() {
				// On until the cleaner has come to it, however busy the machine is.
				for round := 0; round < 100 && (round == 0 || r.Stats().Cleaner.Moved == 0); round++ {
					c.run(ctx, ops)
				}
			})
		}
		rng := rand.New(rand.NewPCG(seed, 77))
		work.Go(func() {
			for i := range int64(30) {
				name := fmt.Sprint("short", i)
				if _, err := r.CreateVolume(ctx, name, 1<<20); err != nil {
					t.Error(err)
					return
				}
				s, err := r.Volume(name)
				for k := 0; k < 40 && err == nil; k++ {
					err = write(s, rng.Int64N(250)*block.Size, pattern(byte(k)|1))
				}
				if err == nil {
					err = r.Fold(ctx)
				}
				if err == nil && i%2 == 0 {
					err = r.ResizeVolume(ctx, name, 2<<20)
				}
				if err == nil {
					err = r.DeleteVolume(ctx, name)
				}
				if err == nil {
					err = r.ResizeVolume(ctx, "v", size+i*block.Size)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
		work.Wait()
		for _, c := range all {
			c.verify(ctx)
		}
		verifyBlocks(t, still, holds)
		s := r.Stats().Cleaner
		t.Logf("seed %d: %+v", seed, s)
		if s.Moved == 0 {
			t.Errorf("seed %d: nothing was moved", seed)
		}
		r.mustCheck()
		stop()
		if err := r.Pool.Close(ctx); err != nil {
			t.Error(err)
		}
	}
}

// A pool without room to move anything says so and does nothing.
func TestCleanerOfFullPool(t *testing.T) {
	r := newRig(t, 1, smallest)
	r.cleaning = CleanerOptions{LowWater: 100, MinFree: 1, Pause: time.Millisecond}
	stop := r.run()
	v := r.volume("v", 1<<30)
	rng := rand.New(rand.NewPCG(1, 51))
	for range 3 {
		holds, _ := fill(t, r, v, rng)
		verifyBlocks(t, v, holds)
		r.mustCheck()
		if err := v.Trim(context.Background(), 0, 1<<30, block.Tag{}); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%+v", r.Stats().Cleaner)
	stop()
	if err := r.Pool.Close(context.Background()); err != nil {
		t.Error(err)
	}
}
