package pool

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

// What is trimmed and deleted comes back although a client never stops writing
// a little.
func TestSpaceComesBackBesideSlowWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		r := newRig(t, 1, testSize)
		stop := r.run()
		slow := r.volume("slow", 1<<20)
		big, gone := r.volume("big", 1<<30), r.volume("gone", 1<<30)
		for off := int64(0); off < 16<<20; off += 128 << 10 {
			for _, v := range []block.Volume{big, gone} {
				if err := write(v, off, make([]byte, 128<<10)); err != nil {
					t.Fatal(err)
				}
				if err := write(v, off, pattern(7)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := r.Fold(ctx); err != nil {
			t.Fatal(err)
		}
		before := r.space.Usage().Free
		if err := big.Trim(ctx, 0, 1<<30, block.Tag{}); err != nil {
			t.Fatal(err)
		}
		if err := r.DeleteVolume(ctx, "gone"); err != nil {
			t.Fatal(err)
		}
		for range 60 { // seconds of virtual time
			time.Sleep(time.Second)
			if err := write(slow, 0, pattern(1)); err != nil {
				t.Fatal(err)
			}
		}
		if free := r.space.Usage().Free; r.bmap.Unfinished() || free-before < 250 {
			t.Errorf("after a minute %d blocks are free, %d before", free, before)
		}
		stop()
		if err := r.Pool.Close(ctx); err != nil {
			t.Error(err)
		}
	})
}
