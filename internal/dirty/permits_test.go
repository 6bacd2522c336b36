package dirty

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/oplog"
)

// A large write that waits is served before smaller ones that come later,
// although there is room for those.
func TestLargeWaiterIsNotStarved(t *testing.T) {
	r := newRig(t, 32)
	synctest.Test(t, func(t *testing.T) {
		held, err := r.Acquire(t.Context(), 28, nil)
		r.must(err)
		var order []int
		turn := make(chan int, 8)
		wait := func(n int) {
			go func() {
				ext, err := r.Acquire(context.Background(), n, nil)
				if err != nil || len(ext) != n {
					t.Errorf("%d of %d extents: %v", len(ext), n, err)
				}
				turn <- n
				r.Give(ext)
			}()
			synctest.Wait()
		}
		wait(20)
		if len(turn) != 0 {
			t.Error("20 of 4 extents")
		}
		wait(1)
		wait(2)
		if len(turn) != 0 {
			t.Error("small waiters overtake a large one")
		}
		// Nor does one that does not wait.
		if _, ok, err := r.TryAcquire(1, nil); ok || err != nil {
			t.Errorf("an attempt overtakes those that wait: %v %v", ok, err)
		}
		for _, e := range held {
			r.Give([]oplog.Extent{e})
			synctest.Wait()
		}
		for len(turn) > 0 {
			order = append(order, <-turn)
		}
		if len(order) != 3 || order[0] != 20 {
			t.Errorf("served in the order %v", order)
		}
	})
	r.settled()
}

// Whoever stops waiting leaves nothing behind, and no gap for those behind.
func TestCancelledWait(t *testing.T) {
	r := newRig(t, 16)
	synctest.Test(t, func(t *testing.T) {
		held, err := r.Acquire(t.Context(), 10, nil)
		r.must(err)
		ctx, cancel := context.WithCancelCause(t.Context())
		done := make(chan error, 1)
		go func() {
			ext, err := r.Acquire(ctx, 12, nil)
			if len(ext) != 0 {
				t.Errorf("%d extents with an error", len(ext))
			}
			done <- err
		}()
		synctest.Wait()
		var behind atomic.Bool
		go func() {
			ext, err := r.Acquire(context.Background(), 3, nil)
			if err != nil {
				t.Error(err)
			}
			behind.Store(true)
			r.Give(ext)
		}()
		synctest.Wait()
		if behind.Load() {
			t.Error("overtaken")
		}
		cancel(errors.New("gone"))
		r.want(<-done, context.Canceled)
		synctest.Wait()
		if !behind.Load() {
			t.Error("one that gave up still stands in the way")
		}
		if n := r.used.Load(); n != 10 {
			t.Errorf("%d permits in use instead of 10", n)
		}
		r.Give(held)
	})
	r.settled()
}

func TestTooLargeForTheLog(t *testing.T) {
	r := newRig(t, 16)
	_, err := r.Acquire(t.Context(), 17, nil)
	r.want(err, block.ErrInvalid)
	if _, ok, err := r.TryAcquire(17, nil); ok || err != nil {
		t.Errorf("%v %v", ok, err)
	}
	r.settled()
}

// A log that came back larger than the pool's is used up to the permits.
func TestFewerPermitsThanExtents(t *testing.T) {
	r := newRig(t, 16)
	r.Set = New(Options{Log: r.log, Space: r.space, Permits: 5, Owned: func() error { return nil }, Full: func() {}})
	ext, ok, err := r.TryAcquire(5, nil)
	if !ok || err != nil || r.Capacity() != 5 {
		t.Errorf("%v %v %d", ok, err, r.Capacity())
	}
	if _, ok, _ := r.TryAcquire(1, nil); ok {
		t.Error("a sixth permit of five")
	}
	r.Give(ext)
	r.settled()
	if s := New(Options{Log: r.log, Permits: 99}); s.Capacity() != 16 {
		t.Errorf("%d permits for 16 extents", s.Capacity())
	}
}

// Full is called while a quarter is in use, and when somebody finds no room.
func TestFull(t *testing.T) {
	r := newRig(t, 16)
	r.must(r.Permit(t.Context(), 3))
	if r.calls != 0 {
		t.Errorf("called %d times with 3 of 16", r.calls)
	}
	r.must(r.Permit(t.Context(), 1))
	if r.calls != 1 {
		t.Errorf("called %d times with 4 of 16", r.calls)
	}
	r.must(r.Permit(t.Context(), 12))
	if _, ok, _ := r.TryAcquire(1, nil); ok || r.calls != 3 {
		t.Errorf("called %d times, %v", r.calls, ok)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.want(r.Permit(ctx, 1), context.Canceled)
	if r.calls != 4 {
		t.Errorf("called %d times when somebody waits", r.calls)
	}
	r.GivePermits(16)
	r.settled()
}

// Records damaged in memory lose their extents at the release. Permits for
// them exist all the same: who gets one gets an error, and gives it back.
func TestExtentsLost(t *testing.T) {
	r := newRig(t, 8)
	r.write(1, 0, 2, 1)
	r.write(1, 9, 1, 1)
	for i := range r.mem[block.Size:] { // behind the header, before the second one
		if at := block.Size + i; at < len(r.mem)-block.Size && r.isRecord(at, 2) {
			r.mem[at] ^= 0xff
		}
	}
	r.drain()
	if n := r.log.ExtentsFree(); n != 7 {
		t.Fatalf("%d of 8 extents are free; the damage missed its aim", n)
	}
	if u := r.used.Load(); u != 0 {
		t.Errorf("%d permits in use", u)
	}
	_, err := r.Acquire(t.Context(), 8, nil)
	r.want(err, block.ErrCorrupt)
	ext, ok, err := r.TryAcquire(7, nil)
	if !ok || err != nil {
		t.Fatalf("the rest of the log: %v %v", ok, err)
	}
	_, ok, err = r.TryAcquire(1, nil)
	if ok {
		t.Error("an extent that is lost")
	}
	r.want(err, block.ErrCorrupt)
	r.want(r.Probe(), block.ErrCorrupt)
	r.Give(ext)
	if u := r.used.Load(); u != 0 {
		t.Errorf("%d permits in use", u)
	}
	r.must(r.Probe())
}

// isRecord reports whether a copy of record seq begins at byte at.
func (r *rig) isRecord(at int, seq byte) bool {
	return at%64 == 0 && r.mem[at] == seq && [7]byte(r.mem[at+1:]) == [7]byte{} && r.mem[at+24] == byte(oplog.KindWrite)
}

// A probe passes with the log full, and fails with the pool lost.
func TestProbe(t *testing.T) {
	r := newRig(t, 4)
	r.must(r.Probe())
	ext, err := r.Acquire(t.Context(), 4, nil)
	r.must(err)
	before := r.calls
	r.must(r.Probe())
	if r.calls == before {
		t.Error("a full log, and nobody is told")
	}
	r.lost = block.ErrStale
	r.want(r.Probe(), block.ErrStale)
	r.Give(ext)
	r.want(r.Probe(), block.ErrStale)
	if r.Head() != 0 {
		t.Error("a probe was published")
	}
	r.settled()
}
