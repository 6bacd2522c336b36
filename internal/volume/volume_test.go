package volume

import (
	"context"
	"errors"
	"math"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// every request on a range, for tables.
func (r *rig) requests() map[string]func(off, n int64) error {
	ctx := context.Background()
	stage := func(w block.Write, err error) error {
		if err == nil && w != nil {
			w.Abort()
		}
		return err
	}
	buf := func(n int64) []byte { return make([]byte, max(0, min(n, 1<<20))) }
	return map[string]func(off, n int64) error{
		"read":     func(off, n int64) error { return r.Read(ctx, buf(n), off) },
		"try read": func(off, n int64) error { _, err := r.TryRead(buf(n), off); return err },
		"stage":    func(off, n int64) error { return stage(r.Stage(ctx, off, int(n))) },
		"try":      func(off, n int64) error { return stage(r.TryStage(off, int(n))) },
		"trim":     func(off, n int64) error { return r.Trim(ctx, off, n, block.Tag{}) },
		"zero":     func(off, n int64) error { return r.WriteZeroes(ctx, off, n, true, block.Tag{}) },
		"status":   func(off, n int64) error { _, err := r.Status(ctx, off, n, 1, nil); return err },
	}
}

func TestRefusesRanges(t *testing.T) {
	const size = 10 * block.Size
	r := newRig(t, options{size: size, extents: 32})
	for name, do := range r.requests() {
		for _, bad := range [][2]int64{
			{-1, 1}, {-block.Size, block.Size}, {math.MinInt64, 1}, {0, size + 1}, {size, 1}, {size - 1, 2}, {math.MaxInt64, 1}, {math.MaxInt64, 4096},
		} {
			if err := do(bad[0], bad[1]); !errors.Is(err, block.ErrInvalid) {
				t.Errorf("%s of %d bytes at %d: %v", name, bad[1], bad[0], err)
			}
		}
		for _, good := range [][2]int64{{0, size}, {size - 1, 1}} {
			if err := do(good[0], good[1]); err != nil {
				t.Errorf("%s of %d bytes at %d: %v", name, good[1], good[0], err)
			}
		}
	}
	for name, do := range r.requests() {
		if err := do(size, 0); (err != nil) != (name == "stage" || name == "try") {
			t.Errorf("%s of nothing at the end: %v", name, err)
		}
	}
	for _, n := range []int64{math.MaxInt64, -1} {
		r.want(r.Trim(context.Background(), 1, n, block.Tag{}), block.ErrInvalid)
		_, err := r.Status(context.Background(), 1, n, 9, nil)
		r.want(err, block.ErrInvalid)
	}
	r.settled()
}

func TestRefusesSizes(t *testing.T) {
	r := newRig(t, options{size: 1 << 40, extents: 32})
	for _, n := range []int{block.MaxIO + 1, 0, -1} {
		_, err := r.Stage(context.Background(), 0, n)
		r.want(err, block.ErrInvalid)
		w, err := r.TryStage(0, n)
		if r.want(err, block.ErrInvalid); w != nil {
			t.Error("staged all the same")
		}
	}
	// More than the log can hold at once.
	_, err := r.Stage(context.Background(), 0, 33*block.Size)
	r.want(err, block.ErrInvalid)
	if w, err := r.TryStage(0, 33*block.Size); w != nil || err != nil {
		t.Errorf("%v %v", w, err)
	}
	r.settled()
}

func TestClosed(t *testing.T) {
	for _, gate := range []bool{false, true} {
		r := newRig(t, options{size: 1 << 20, extents: 8})
		r.want(r.Flush(context.Background()), errFlush)
		if gate {
			<-r.Gate.Close()
		} else {
			r.Volume.Close()
		}
		for name, do := range r.requests() {
			if err := do(0, 100); !errors.Is(err, block.ErrClosed) {
				t.Errorf("gate %v: %s: %v", gate, name, err)
			}
		}
		r.want(r.Flush(context.Background()), block.ErrClosed)
		if gate {
			r.Gate = &Gate{} // only to see that nothing is held
		}
		r.settled()
	}
}

func TestInfo(t *testing.T) {
	r := newRig(t, options{size: block.Size, extents: 8})
	if i := r.Info(); i != (block.VolumeInfo{ID: 1, Name: "vol", Size: block.Size}) {
		t.Errorf("%+v", i)
	}
	r.Set("other", 2*block.Size)
	if i := r.Info(); i.Name != "other" || i.Size != 2*block.Size {
		t.Errorf("%+v", i)
	}
	r.must(r.write(block.Size, pattern(1, block.Size)))
	err := r.write(2*block.Size, pattern(1, 1))
	if r.want(err, block.ErrInvalid); !strings.Contains(err.Error(), "other") {
		t.Errorf("%v", err)
	}
}

// A closing gate waits for those inside, and for nobody else.
func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g Gate
		for range 2 {
			if !g.Enter() {
				t.Fatal("an open gate")
			}
		}
		out := make(chan struct{})
		idle := g.Close()
		go func() { <-idle; close(out) }()
		ended := func() bool {
			synctest.Wait()
			select {
			case <-out:
				return true
			default:
				return false
			}
		}
		if g.Enter() || ended() {
			t.Error("closed, with two inside")
		}
		if g.Exit(); ended() {
			t.Error("one is still inside")
		}
		if g.Enter() {
			t.Error("entered a closed gate")
		}
		if g.Exit(); !ended() {
			t.Error("nobody is inside")
		}
		if g.Enter() {
			t.Error("entered a closed gate")
		}
	})
	// Against each other, under the race detector.
	for range 200 {
		var g Gate
		var wg sync.WaitGroup
		start := make(chan struct{})
		for range 4 {
			wg.Go(func() {
				<-start
				for g.Enter() {
					g.Exit()
				}
			})
		}
		close(start)
		<-g.Close()
		wg.Wait()
	}
}

// What would need a device, room or space is left to who can wait, and no
// device is asked.
func TestTryNeverWaits(t *testing.T) {
	ctx := context.Background()
	const size = 512 * block.Size
	r := newRig(t, options{size: size, extents: 16, cache: 1 << 20})
	r.must(r.write(0, pattern(1, 4*block.Size)))
	r.must(r.write(300*block.Size, pattern(2, block.Size)))
	r.Point()
	r.Fold()
	r.forget()
	r.fault.Add(blocktest.Rule{Err: errBroken})
	p := make([]byte, 2*block.Size)
	tryRead := func(off int64, want bool) {
		t.Helper()
		if ok, err := r.TryRead(p, off); ok != want || err != nil {
			t.Errorf("try read at %d: %v %v", off, ok, err)
		}
	}
	var w block.Write
	tryWrite := func(off int64, want bool) {
		t.Helper()
		var err error
		if w, err = r.TryStage(off, 100); w == nil || err != nil {
			t.Fatalf("try stage at %d: %v %v", off, w, err)
		}
		receive(t, w, pattern(3, 100))
		if ok, err := w.TryCommit(); ok != want || err != nil {
			t.Errorf("try commit at %d: %v %v", off, ok, err)
		}
	}
	tryRead(0, false) // not even the map is in memory
	tryWrite(10, false)
	w.Abort()
	if r.fault.Hits() != 0 {
		t.Error("a device was asked")
	}
	// With the map in memory, but not the block.
	r.fault.Clear()
	r.reads(100*block.Size, make([]byte, block.Size))
	r.fault.Add(blocktest.Rule{Err: errBroken})
	tryRead(0, false)
	tryRead(200*block.Size, true) // a hole
	tryWrite(200*block.Size+1, true)
	tryWrite(10, false)
	if r.fault.Hits() != 0 {
		t.Error("a device was asked")
	}
	r.fault.Clear()
	r.must(w.Commit(ctx)) // what TryCommit has left alone is whole
	want := pattern(1, block.Size)
	copy(want[10:], pattern(3, 100))
	r.reads(0, want)
	// A block in the cache.
	r.reads(block.Size, pattern(1, 4*block.Size)[block.Size:])
	r.fault.Add(blocktest.Rule{Err: errBroken})
	tryRead(block.Size, true)
	tryWrite(2*block.Size+5, true)

	held, err := r.TryStage(0, 13*block.Size)
	r.must(err)
	full := r.full.Load()
	if w, err := r.TryStage(0, 1); w != nil || err != nil || r.full.Load() == full {
		t.Errorf("a full log: %v %v, said %d times", w, err, r.full.Load()-full)
	}
	if r.fault.Hits() != 0 {
		t.Error("a device was asked")
	}
	held.Abort()
	r.fault.Clear()
	r.settled()
}

// Whoever waits for room in the log can stop.
func TestStopWaiting(t *testing.T) {
	r := newRig(t, options{size: 1 << 20, extents: 8})
	synctest.Test(t, func(t *testing.T) {
		held, err := r.Stage(t.Context(), 0, 8*block.Size)
		r.must(err)
		ctx, cancel := context.WithCancel(t.Context())
		errs := make(chan error, 2)
		go func() { _, err := r.Stage(ctx, 0, 1); errs <- err }()
		go func() { errs <- r.Trim(ctx, 1, 3*block.Size, block.Tag{}) }()
		synctest.Wait()
		if len(errs) > 0 {
			t.Fatalf("did not wait: %v", <-errs)
		}
		cancel()
		r.want(<-errs, context.Canceled)
		r.want(<-errs, context.Canceled)
		// Nor does a request begin for a client that is gone.
		r.want(r.Read(ctx, make([]byte, 10), 0), context.Canceled)
		_, err = r.Status(ctx, 0, 10, 1, nil)
		r.want(err, context.Canceled)
		held.Abort()
	})
	r.must(r.write(0, pattern(1, block.Size)))
	r.drain()
	w, err := r.Stage(t.Context(), 5, 1)
	r.must(err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.want(w.Commit(ctx), context.Canceled)
	r.settled()
}

// Without space Commit frees what it can, twice, before it refuses; TryCommit
// leaves that to it.
func TestNoSpace(t *testing.T) {
	errRelieve := errors.New("cannot fold")
	for _, test := range []struct {
		name    string
		relieve func(r *rig, call int) error
		calls   int
		want    error
	}{
		{"helps", func(r *rig, _ int) error { r.space.Unreserve(100); return nil }, 1, nil},
		{"helps the second time", func(r *rig, call int) error { r.space.Unreserve(int64(100 * (call - 1))); return nil }, 2, nil},
		{"is of no use", func(*rig, int) error { return nil }, 2, block.ErrNoSpace},
		{"fails", func(*rig, int) error { return errRelieve }, 1, errRelieve},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t, options{size: 1 << 20, extents: 32, cache: 0})
			r.must(r.write(0, pattern(1, 3*block.Size)))
			r.drain()
			r.Dirty.ReturnCredit()
			u := r.space.Usage()
			all := u.Free - u.Slop
			if !r.space.Reserve(all) {
				t.Fatal("no room")
			}
			calls := 0
			r.relieve = func() error {
				calls++
				err := test.relieve(r, calls)
				return err
			}
			w, err := r.Stage(t.Context(), 100, 2*block.Size) // two partial blocks
			r.must(err)
			receive(t, w, pattern(2, 2*block.Size))
			if ok, err := w.TryCommit(); ok || err != nil || calls != 0 {
				t.Errorf("try: %v %v, relieved %d times", ok, err, calls)
			}
			err = w.Commit(t.Context())
			if !errors.Is(err, test.want) || calls != test.calls {
				t.Errorf("%v, relieved %d times", err, calls)
			}
			want := pattern(1, 3*block.Size)
			if err == nil {
				copy(want[100:], pattern(2, 2*block.Size))
			}
			r.reads(0, want)
			r.drain()
			r.Dirty.ReturnCredit()
			r.space.Unreserve(r.space.Usage().Reserved)
			r.settled()
		})
	}
}

// Whatever way a write ends, its memory comes back once.
func TestWritesEnd(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, options{size: 1 << 20, extents: 16})
	stage := func() block.Write {
		t.Helper()
		w, err := r.TryStage(100, 10*block.Size)
		r.must(err)
		receive(t, w, pattern(1, 10*block.Size))
		return w
	}
	free := func(what string, want int) {
		t.Helper()
		if got := r.log.ExtentsFree(); got != want {
			t.Errorf("%s: %d extents are free instead of %d", what, got, want)
		}
		if n := r.Gate.n.Load(); n != 0 {
			t.Errorf("%s: %d requests in the gate", what, n)
		}
	}
	stage().Abort()
	free("abort", 16)
	r.lost = block.ErrStale
	_, err := stage().TryCommit()
	r.want(err, block.ErrStale)
	free("a failed TryCommit", 16)
	r.want(stage().Commit(ctx), block.ErrStale)
	free("a failed Commit", 16)
	r.want(r.Trim(ctx, 100, 10*block.Size, block.Tag{}), block.ErrStale)
	r.want(r.Trim(ctx, 100, 10, block.Tag{}), block.ErrStale)
	free("a failed trim", 16)
	r.lost = nil
	r.reads(0, make([]byte, 1<<20))
	ok, err := stage().TryCommit()
	if r.must(err); !ok {
		t.Error("nothing to wait for, and yet it was not committed")
	}
	free("a commit", 5)
	r.settled()
}
