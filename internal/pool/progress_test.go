package pool

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

// TestProgress: what Run does is seen while it has nothing to do, while it works and while
// it does what somebody asks for; reads of clients are not taken for it; and when it hangs
// nothing moves.
func TestProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		r := newRig(t, 1, testSize)
		stop := r.run()
		moved := func(what string, wantOwn, wantAnything bool, do func()) {
			t.Helper()
			synctest.Wait()
			own, anything := r.Progress()
			do()
			o, a := r.Progress()
			if (o != own) != wantOwn || (a != anything) != wantAnything {
				t.Errorf("%s: %d to %d, %d to %d", what, own, o, anything, a)
			}
		}
		moved("at rest", true, true, func() { time.Sleep(time.Second) })
		v := r.volume("v", 1<<20)
		if err := write(v, 0, pattern(1)); err != nil {
			t.Fatal(err)
		}
		if err := r.Fold(ctx); err != nil {
			t.Fatal(err)
		}
		read := func() {
			if err := r.set.Read(block.At(0, 0), make([]byte, block.Size)); err != nil {
				t.Error(err)
			}
		}
		let, hangs := make(chan struct{}), make(chan struct{})
		go func() {
			_ = r.do(ctx, func() error {
				close(hangs)
				<-let
				return nil
			})
		}()
		<-hangs
		moved("it hangs", false, false, func() { time.Sleep(time.Hour) })
		// In what somebody asked for reads are its own, as far as can be told.
		moved("it reads", true, true, read)
		close(let)
		moved("it goes on", true, true, func() { time.Sleep(time.Second) })
		stop()
		moved("it has ended", false, true, read)
		if err := r.Pool.Close(ctx); err != nil {
			t.Error(err)
		}
	})
}
