package pool

import (
	"bytes"
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

// quick makes the policy one that decides within seconds.
func quick(p policy.Params) (policy.Params, error) {
	p.Collect.Window, p.Collect.Pause = 10*time.Second, time.Second
	p.Interval = time.Second
	p.Hysteresis.Stay = 5 * time.Second
	return p, nil
}

// Run moves what is hot to flash by itself, keeps it there when it is rewritten, leaves what
// is cold, and knows after a death what was hot before.
func TestFlashFindsWhatIsHot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		r := newRig(t, 1, testSize)
		stop := r.run()
		hot, cold := r.volume("hot", 64<<20), r.volume("cold", 64<<20)
		for off := int64(0); off < 32<<20; off += 256 << 10 {
			for _, v := range []block.Volume{hot, cold} {
				if err := write(v, off, make([]byte, 256<<10)); err != nil {
					t.Fatal(err)
				}
				for b := range int64(64) {
					if err := write(v, off+b*block.Size, pattern(byte(off>>18)^byte(b)|1)); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		if err := r.Fold(ctx); err != nil {
			t.Fatal(err)
		}
		r.addFlash(32 << 20)
		if _, err := r.ChangeFlash(ctx, FlashChange{Params: quick}); err != nil {
			t.Fatal(err)
		}
		rng := rand.New(rand.NewPCG(1, 2))
		got := make([]byte, block.Size)
		use := func(d time.Duration) {
			for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
				b := rng.Int64N(1024) * block.Size // of 4 MiB
				if rng.IntN(4) == 0 {
					if err := write(hot, b, pattern(byte(b>>12)|1)); err != nil {
						t.Fatal(err)
					}
				}
				r.forget()
				if err := hot.Read(ctx, got, b); err != nil {
					t.Fatal(err)
				}
			}
		}
		use(40 * time.Second)
		before := r.Flash()
		if before.Promoted == 0 || before.Used > 200 {
			t.Fatalf("%d promoted, %d on flash: %+v", before.Promoted, before.Used, before.Top)
		}
		use(20 * time.Second)
		after := r.Flash()
		d, b := after.Primaries[0], before.Primaries[0]
		hits, misses := d.Flash.Reads-b.Flash.Reads, d.Primary.Reads-b.Primary.Reads
		t.Logf("%d on flash, %d promoted, %d demoted, %d given up; %d reads of flash, %d of the disk", after.Used, after.Promoted, after.Demoted, after.GivenUp, hits, misses)
		if hits < 4*misses {
			t.Errorf("%d reads of flash, %d of the disk", hits, misses)
		}
		x, err := r.ExplainFlash(ctx, "cold", 24<<20)
		if err != nil || x.OnFlash {
			t.Errorf("%+v, %v", x, err)
		}
		// What was collected goes with the pool.
		time.Sleep(2 * flashKeep)
		stop()
		if err := r.Release(ctx); err != nil {
			t.Fatal(err)
		}
		r.reopen()
		stop = r.run()
		if hot, err = r.Volume("hot"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		if x, err := r.ExplainFlash(ctx, "hot", 0); err != nil || !x.OnFlash || x.Benefit == 0 {
			t.Errorf("after a takeover nothing is known: %+v, %v", x, err)
		}
		p, err := r.SimulateFlash(ctx, mustParams(t, r), 0)
		if err != nil || p.Windows == 0 {
			t.Errorf("%+v, %v", p, err)
		}
		t.Logf("simulated: %+v", p)
		if hot, err := r.Volume("hot"); err != nil {
			t.Error(err)
		} else if err := hot.Read(ctx, got, 0); err != nil {
			t.Error(err)
		}
		r.mustCheck()
		stop()
		if err := r.Pool.Close(ctx); err != nil {
			t.Error(err)
		}
	})
}

func mustParams(t *testing.T, r *rig) policy.Params {
	t.Helper()
	p, _, err := r.FlashPolicy(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// A flash device is added, filled, evacuated and removed while clients go on, who lose
// nothing and are told no error.
func TestFlashBesideClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		r := newRig(t, 2, testSize)
		r.interval = 20 * time.Millisecond
		stop := r.run()
		const clients, blocks = 3, 256
		v := r.volume("v", 16<<20)
		quit := make(chan struct{})
		var wg sync.WaitGroup
		for c := range int64(clients) {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(c), 9))
				var holds [blocks]byte
				got := make([]byte, block.Size)
				for {
					select {
					case <-quit:
						return
					default:
					}
					time.Sleep(time.Millisecond)
					b := rng.Int64N(blocks)
					off := (c*blocks + b) * block.Size
					if rng.IntN(2) == 0 {
						x := byte(rng.IntN(255) + 1)
						if err := write(v, off, pattern(x)); err != nil {
							t.Error(err)
							return
						}
						holds[b] = x
					} else if holds[b] != 0 {
						if err := v.Read(ctx, got, off); err != nil || !bytes.Equal(got, pattern(holds[b])) {
							t.Errorf("block %d of client %d holds %d instead of %d: %v", b, c, got[0], holds[b], err)
							return
						}
					}
				}
			})
		}
		for range 2 {
			r.addFlash(16 << 20)
			if _, err := r.ChangeFlash(ctx, FlashChange{Params: func(p policy.Params) (policy.Params, error) {
				p.Interval, p.Budget.Migrate = 100*time.Millisecond, 0
				return p, nil
			}, Pin: []FlashPin{{Volume: "v"}}}); err != nil {
				t.Fatal(err)
			}
			await(t, func() bool { s := r.Flash(); return len(s.Pins) == 1 && s.Pins[0].On >= 8 })
			if err := r.RemoveDevice(ctx, "ssd"); err != nil {
				t.Fatal(err)
			}
			await(t, func() bool { return r.Flash().Device == "" && r.Stats().Removal.Device == "" })
			r.devs = slices.DeleteFunc(r.devs, func(d *blocktest.Crash) bool { return d.Info().Name == "ssd" })
		}
		close(quit)
		wg.Wait()
		r.mustCheck()
		stop()
		if err := r.Pool.Close(ctx); err != nil {
			t.Error(err)
		}
	})
}

// await waits for something that Run does.
func await(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it never came to that")
		}
	}
}
