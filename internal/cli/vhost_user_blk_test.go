package cli

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A device that grows under the program is seen to, and one that stays as it is makes no
// noise.
func TestWatchSize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var size, changes atomic.Int64
		size.Store(4096)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			watchSize(ctx, size.Load, func() { changes.Add(1) })
		}()
		for i, next := range []int64{4096, 8192, 8192, 4096} {
			synctest.Wait()
			size.Store(next)
			time.Sleep(2 * watchTime)
			synctest.Wait()
			if got, want := changes.Load(), []int64{0, 1, 1, 2}[i]; got != want {
				t.Errorf("%d changes after a size of %d bytes, step %d, not %d", got, next, i, want)
			}
		}
		cancel()
		<-ended
	})
}
