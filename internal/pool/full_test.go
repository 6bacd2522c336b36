package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

// smallest is about the smallest device that a pool can have.
const smallest = 12 << 20

// run serves a pool as a guest does, by Run.
func (r *rig) run() (stop func()) {
	r.t.Helper()
	p, err := Open(context.Background(), r.options())
	if err != nil {
		r.t.Fatal(err)
	}
	r.Pool = p
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Error("run: ", err)
		}
	}
}

// A pool that is filled refuses writes, and takes them again after a trim or a
// delete; whatever is tried, and in whatever order.
func TestFullPool(t *testing.T) {
	for seed := range uint64(few(3)) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // only a hang needs it
			defer cancel()
			r := newRig(t, 1+int(seed%2), smallest)
			stop := r.run()
			rng := rand.New(rand.NewPCG(seed, 3))
			v := r.volume("v", 1<<30)
			most := map[bool]int{} // far apart blocks need a page of the map each, and there is less room for them
			for round := range 6 {
				holds, sparse := fill(t, r, v, rng)
				most[sparse] = max(most[sparse], len(holds))
				if len(holds) < most[sparse]*3/4 {
					t.Fatalf("round %d: only %d of %d blocks could be written again", round, len(holds), most[sparse])
				}
				// Refused a second time as well, and what was written is there.
				if err := write(v, 1<<29, bytes.Repeat(pattern(9), 128)); !errors.Is(err, block.ErrNoSpace) {
					t.Fatalf("round %d: write into a full pool: %v", round, err)
				}
				verifyBlocks(t, v, holds)
				r.mustCheck()
				var err error
				switch round % 3 {
				case 0:
					err = v.Trim(ctx, 0, 1<<30, block.Tag{})
				case 1:
					for b := range holds {
						if err = v.Trim(ctx, b*block.Size, block.Size, block.Tag{}); err != nil {
							break
						}
					}
				default:
					if err = r.DeleteVolume(ctx, "v"); err == nil {
						v = r.volume("v", 1<<30)
					}
				}
				if err != nil {
					t.Fatalf("round %d: free space in a full pool: %v", round, err)
				}
				if round == 3 { // once with a restart between
					stop()
					if err := r.Pool.Release(ctx); err != nil {
						t.Fatal(err)
					}
					r.reopenDevices()
					stop = r.run()
					v, _ = r.Volume("v")
				}
			}
			stop()
			if err := r.Pool.Close(ctx); err != nil {
				t.Error(err)
			}
		})
	}
}

// fill writes until the pool refuses, and returns what it took, and whether that lies far apart.
func fill(t *testing.T, r *rig, v block.Volume, rng *rand.Rand) (holds map[int64]byte, sparse bool) {
	t.Helper()
	holds = map[int64]byte{}
	sparse = rng.IntN(2) == 0
	for i := int64(0); ; i++ {
		b := i
		if sparse {
			b = rng.Int64N(v.Info().Size / block.Size)
		}
		c := byte(1 + rng.IntN(250))
		err := write(v, b*block.Size, pattern(c))
		if errors.Is(err, block.ErrNoSpace) {
			return holds, sparse
		}
		if err != nil {
			t.Fatal(err)
		}
		holds[b] = c
		if i > 4*smallest/block.Size {
			t.Fatal("the pool never gets full")
		}
	}
}

func verifyBlocks(t testing.TB, v block.Volume, holds map[int64]byte) {
	t.Helper()
	got := make([]byte, block.Size)
	for b, c := range holds {
		if err := v.Read(context.Background(), got, b*block.Size); err != nil || !bytes.Equal(got, pattern(c)) {
			t.Fatalf("block %d: %v, %d instead of %d", b, err, got[0], c)
		}
	}
}

// Many small volumes need many pages each; a full pool can still fold them.
func TestFullPoolOfSmallVolumes(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r := newRig(t, 1, smallest)
	stop := r.run()
	const n = 300
	full := 0
	for i := range n {
		v := r.volume(fmt.Sprint(i), 1<<20)
		if err := write(v, 0, pattern(byte(i)|1)); errors.Is(err, block.ErrNoSpace) {
			full++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if full == 0 {
		t.Error("the pool never got full")
	}
	if err := r.Fold(ctx); err != nil {
		t.Fatal(err)
	}
	r.mustCheck()
	for i := range n {
		if err := r.DeleteVolume(ctx, fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	v := r.volume("v", 1<<20)
	if err := write(v, 0, bytes.Repeat(pattern(1), 200)); err != nil {
		t.Fatal(err)
	}
	stop()
	if err := r.Pool.Close(ctx); err != nil {
		t.Error(err)
	}
}

// A huge volume in a small pool has a page of its own above nearly every block.
func TestFullPoolOfScatteredBlocks(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r := newRig(t, 1, smallest)
	stop := r.run()
	v := r.volume("v", 16<<40)
	holds := map[int64]byte{}
	for i := int64(0); ; i++ {
		b := i * 65536 * 7 % (16 << 40 / block.Size)
		err := write(v, b*block.Size, pattern(byte(i)|1))
		if errors.Is(err, block.ErrNoSpace) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		holds[b] = byte(i) | 1
	}
	t.Logf("%d blocks", len(holds))
	verifyBlocks(t, v, holds)
	r.mustCheck()
	if s := r.Stats(); s.LastError != "" {
		t.Error(s.LastError)
	}
	if err := v.Trim(ctx, 0, 16<<40, block.Tag{}); err != nil {
		t.Fatal(err)
	}
	if err := write(v, 0, bytes.Repeat(pattern(1), 200)); err != nil {
		t.Fatal(err)
	}
	r.mustCheck()
	stop()
	if err := r.Pool.Close(ctx); err != nil {
		t.Error(err)
	}
}
