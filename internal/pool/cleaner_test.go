package pool

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

// eager is a cleaner that finds something to do in small pools.
var eager = CleanerOptions{LowWater: 60, MinFree: 20}

// openEager opens a rig's pool with an eager cleaner, which cleanStep drives.
func (r *rig) openEager() {
	r.t.Helper()
	o := r.options()
	o.Cleaner = eager
	if err := r.openWith(o); err != nil {
		r.t.Fatal(err)
	}
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
	for seed := range uint64(3) {
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
