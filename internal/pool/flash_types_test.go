package pool

import (
	"context"
	"maps"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

// Two types of primary devices have parameters of their own, which are changed while a load
// runs: what is hot on a device of one type comes to flash, on the other it does not; after
// the change it is the other way round, and what has left its pattern goes back when its
// place is wanted.
func TestFlashTypes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		r := newRig(t, 2, testSize)
		stop := r.run()
		v := r.volume("v", 64<<20)
		for off := int64(0); off < 32<<20; off += 128 << 10 {
			p := make([]byte, 128<<10)
			for i := range p {
				p[i] = byte(i>>12) ^ byte(off>>17) | 1
			}
			if err := write(v, off, p); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Fold(ctx); err != nil {
			t.Fatal(err)
		}
		// Room for most of what is hot on one device, not for both.
		r.addFlash(6 << 20)
		pattern := func(sata, nearline float64) func(policy.Params) (policy.Params, error) {
			return func(p policy.Params) (policy.Params, error) {
				p, err := quick(p)
				p.Patterns = maps.Clone(p.Patterns)
				for typ, n := range map[string]float64{"sata": sata, "nearline": nearline} {
					q := policy.DefaultPattern()
					q.MinAccesses = n
					p.Patterns[typ] = q
				}
				return p, err
			}
		}
		const most = 1 << 20
		if _, err := r.ChangeFlash(ctx, FlashChange{Params: pattern(1, most), Classes: map[string]string{"disk0": "sata", "disk1": "nearline"}}); err != nil {
			t.Fatal(err)
		}
		rng := rand.New(rand.NewPCG(3, 4))
		got := make([]byte, block.Size)
		use := func(d time.Duration) {
			for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(4 * time.Millisecond) {
				r.forget()
				if err := v.Read(ctx, got, rng.Int64N(2048)*block.Size); err != nil {
					t.Fatal(err)
				}
			}
		}
		on := func() (sata, nearline int) {
			s := r.Flash()
			return s.Primaries[0].OnFlash, s.Primaries[1].OnFlash
		}
		use(40 * time.Second)
		s, n := on()
		if s == 0 || n != 0 {
			t.Fatalf("%d of the device of type sata are on flash, %d of the other", s, n)
		}
		if x, err := r.ExplainFlash(ctx, "v", 0); err != nil || x.Pattern != map[string]string{"disk0": "sata", "disk1": "nearline"}[x.Device] {
			t.Fatalf("%+v, %v", x, err)
		}
		changes, err := r.ChangeFlash(ctx, FlashChange{Params: pattern(most, 1)})
		if err != nil || len(changes) != 2 {
			t.Fatalf("%+v, %v", changes, err)
		}
		use(60 * time.Second)
		s2, n2 := on()
		t.Logf("before the change %d and %d data sets, after it %d and %d; %+v", s, n, s2, n2, r.Flash().Slots)
		if n2 == 0 || s2 >= s {
			t.Fatalf("after the change %d of the device of type sata are on flash, %d before, and %d of the other", s2, s, n2)
		}
		r.mustCheck()
		stop()
		if err := r.Pool.Close(ctx); err != nil {
			t.Error(err)
		}
	})
}
