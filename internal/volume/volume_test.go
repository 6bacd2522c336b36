package volume

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/oplog"
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
		"trim":     func(off, n int64) error { return r.Trim(ctx, off, n) },
		"zero":     func(off, n int64) error { return r.WriteZeroes(ctx, off, n, true) },
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
		r.want(r.Trim(context.Background(), 1, n), block.ErrInvalid)
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

// What was lost of the log's memory is an error, whoever wants it, and is not
// taken into new blocks under a good checksum.
func TestDamagedLog(t *testing.T) {
	ctx := context.Background()
	const size = 16 * block.Size
	r := newRig(t, options{size: size, extents: 32, cache: 1 << 20})
	good := pattern(1, size)
	r.must(r.write(0, good))
	g := r.Dirty.Freeze()
	_, slots, _ := g.Blocks(1)
	r.log.Payload(slots[5].Extent, 1)[99] ^= 2
	got := make([]byte, size)
	for name, err := range map[string]error{
		"read":     r.Read(ctx, got, 0),
		"try read": func() error { _, err := r.TryRead(got[:100], 5*block.Size); return err }(),
	} {
		if !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "block 5 of volume vol") {
			t.Errorf("%s: %v", name, err)
		}
	}
	r.reads(0, good[:5*block.Size])
	r.reads(6*block.Size, good[6*block.Size:])
	for _, try := range []bool{true, false} {
		w, err := r.Stage(ctx, 5*block.Size+1, 10)
		r.must(err)
		receive(t, w, pattern(2, 10))
		if try {
			ok, e := w.TryCommit()
			if err = e; ok {
				t.Error("committed")
			}
		} else {
			err = w.Commit(ctx)
		}
		r.want(err, block.ErrCorrupt)
	}
	r.want(r.Trim(ctx, 5*block.Size+1, 10), block.ErrCorrupt)
	// Other blocks of it can be written in part, and this one as a whole.
	r.must(r.write(4*block.Size+1, pattern(2, 10)))
	r.must(r.write(5*block.Size, pattern(3, block.Size)))
	r.reads(5*block.Size, pattern(3, block.Size))
	r.settled()
}

var errBroken = errors.New("broken")

// Device errors come out as they are; damage says where it is.
func TestDeviceErrors(t *testing.T) {
	ctx := context.Background()
	const size = 2048 * block.Size
	r := newRig(t, options{size: size, extents: 64, cache: 0})
	r.must(r.write(0, pattern(1, 16*block.Size)))
	r.must(r.write(300*block.Size, pattern(1, block.Size)))
	r.drain()
	bad := r.where(3)
	r.fault.Add(blocktest.Rule{Op: hpdi.OpRead, Err: errBroken, Offset: int64(bad.Phys.Block()) * block.Size, Length: block.Size})
	p := make([]byte, 3*block.Size)
	r.want(r.Read(ctx, p, 2*block.Size), errBroken)
	r.want(r.write(3*block.Size+1, pattern(2, 10)), errBroken)
	r.want(r.Trim(ctx, 3*block.Size+1, 2*block.Size), errBroken)
	r.fault.Clear()
	r.reads(0, pattern(1, 16*block.Size)) // nothing of what failed was written

	r.crash.Corrupt(int64(bad.Phys.Block())*block.Size, 1)
	err := r.Read(ctx, p, 2*block.Size)
	if r.want(err, block.ErrCorrupt); err == nil || !strings.Contains(err.Error(), "volume vol: bytes [8192, 20480)") {
		t.Errorf("%v does not say where", err)
	}
	r.want(r.write(3*block.Size+1, pattern(2, 10)), block.ErrCorrupt)
	r.must(r.write(3*block.Size, pattern(2, block.Size)))
	r.reads(3*block.Size, pattern(2, block.Size))
	r.drain()

	// A page of the map.
	r.Fold()
	r.fault.Add(blocktest.Rule{Op: hpdi.OpRead, Err: errBroken})
	r.want(r.Read(ctx, p, 0), errBroken)
	_, err = r.Status(ctx, 0, size, 9, nil)
	r.want(err, errBroken)
	w, err := r.Stage(ctx, 1, 1)
	r.must(err)
	if ok, err := w.TryCommit(); ok || err != nil {
		t.Errorf("a page that is not in memory: %v %v", ok, err)
	}
	r.want(w.Commit(ctx), errBroken)
	r.fault.Clear()
	root := r.Map.Trees()[1].Root
	r.crash.Corrupt(int64(root.Phys.Block())*block.Size, 1)
	r.want(r.Read(ctx, p, 0), block.ErrCorrupt)
	r.want(r.write(1, []byte{1}), block.ErrCorrupt)
	r.settled()
}

// A block is read, and before the device has it, is committed anew and its old
// place used for something else. The reader starts again.
func TestStaleRead(t *testing.T) {
	ctx := context.Background()
	const size = 64 * block.Size
	r := newRig(t, options{size: size, extents: 64, cache: 0})
	r.must(r.write(0, pattern(1, 8*block.Size)))
	r.drain()
	for _, inPart := range []bool{false, true} {
		old := r.where(2)
		gate := blocktest.NewGate()
		r.fault.Add(blocktest.Rule{Op: hpdi.OpRead, Hold: gate.Hold})
		done := make(chan error, 1)
		got := make([]byte, 4*block.Size)
		go func() {
			if inPart { // a partial block's rest
				done <- r.write(2*block.Size+100, pattern(9, 50))
			} else {
				done <- r.Read(ctx, got, block.Size)
			}
		}()
		<-gate.Arrived()
		r.must(r.write(2*block.Size, pattern(5, block.Size)))
		r.drain()
		if r.where(2) == old {
			t.Fatal("the block did not move")
		}
		r.crash.Corrupt(int64(old.Phys.Block())*block.Size, 255) // used anew
		gate.Open()
		r.must(<-done)
		r.fault.Clear()
		want := pattern(1, 8*block.Size)
		copy(want[2*block.Size:], pattern(5, block.Size))
		if inPart {
			copy(want[2*block.Size+100:], pattern(9, 50))
		} else if mismatch(got, want[block.Size:5*block.Size]) >= 0 {
			t.Error("read something else")
		}
		r.reads(0, want)
	}
	r.settled()
}

// A reader that loses each race gives up in the end.
func TestStaleForEver(t *testing.T) {
	r := newRig(t, options{size: 8 * block.Size, extents: 64, cache: 0})
	r.must(r.write(0, pattern(1, block.Size)))
	r.drain()
	moves := 0
	r.fault.Add(blocktest.Rule{Op: hpdi.OpRead, Hold: func(*hpdi.Request) {
		moves++
		old := r.where(0)
		r.must(r.write(0, pattern(byte(moves), block.Size)))
		r.drain()
		r.crash.Corrupt(int64(old.Phys.Block())*block.Size, 255)
	}})
	r.want(r.Read(context.Background(), make([]byte, block.Size), 0), errStale)
	if moves != staleTries+1 {
		t.Errorf("%d attempts", moves)
	}
	r.fault.Clear()
	r.reads(0, pattern(byte(moves), block.Size))
	r.settled()
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
	full := r.full
	if w, err := r.TryStage(0, 1); w != nil || err != nil || r.full == full {
		t.Errorf("a full log: %v %v, said %d times", w, err, r.full-full)
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
		go func() { errs <- r.Trim(ctx, 1, 3*block.Size) }()
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
	r.want(r.Trim(ctx, 100, 10*block.Size), block.ErrStale)
	r.want(r.Trim(ctx, 100, 10), block.ErrStale)
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

// A log that lacks extents although it has permits: a trim with partial ends
// fails and keeps nothing.
func TestExtentsLost(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, options{size: 1 << 20, extents: 2})
	r.must(r.write(0, pattern(1, 2*block.Size)))
	for at := block.Size; at < len(r.mem)-block.Size; at += 64 {
		// Both copies of the record: it is number 1 and a write.
		if binary.LittleEndian.Uint64(r.mem[at:]) == 1 && r.mem[at+24] == byte(oplog.KindWrite) {
			r.mem[at] ^= 0xff
		}
	}
	r.drain()
	if n := r.log.ExtentsFree(); n != 0 {
		t.Fatalf("%d extents are free; the damage missed its aim", n)
	}
	r.want(r.Trim(ctx, 100, 2*block.Size-100), block.ErrCorrupt)
	_, err := r.TryStage(0, 1)
	r.want(err, block.ErrCorrupt)
	_, err = r.Stage(ctx, 0, 1)
	r.want(err, block.ErrCorrupt)
	r.must(r.Trim(ctx, 0, 2*block.Size)) // needs no extent
	r.reads(0, make([]byte, 2*block.Size))
	if n := r.Gate.n.Load(); n != 0 {
		t.Errorf("%d requests in the gate", n)
	}
}

// Writers to different parts of the same blocks never undo each other, while
// consistency points and folds move the blocks under them.
func TestWritersOfOneBlock(t *testing.T) {
	ctx := context.Background()
	const seed, writers, blocks = 3, 4, 3
	const part = block.Size / writers
	r := newRig(t, options{size: blocks * block.Size, extents: 64, cache: 64 << 10})
	stop := make(chan struct{})
	var moving, wg sync.WaitGroup
	moving.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			r.Point()
			if i%3 == 0 {
				r.Fold()
			}
			if i%2 == 0 {
				r.forget()
			}
		}
	})
	var last [writers][]byte
	for me := range writers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(me)))
			mine := make([]byte, blocks*part) // my part of each block
			last[me] = mine
			for i := range 1000 {
				b, in := rng.IntN(blocks), rng.IntN(part)
				n := 1 + rng.IntN(part-in)
				off := int64(b*block.Size + me*part + in)
				p := pattern(byte(i), n)
				var err error
				switch rng.IntN(4) {
				case 0:
					clear(p)
					err = r.Trim(ctx, off, int64(n))
				case 1:
					var w block.Write
					if w, err = r.Stage(ctx, off, n); err == nil {
						receive(t, w, p)
						var ok bool
						if ok, err = w.TryCommit(); !ok && err == nil {
							err = w.Commit(ctx)
						}
					}
				default:
					err = r.write(off, p)
				}
				if err != nil {
					t.Errorf("seed %d: %v", seed, err)
					return
				}
				copy(mine[b*part+in:], p)
				got := make([]byte, part)
				if err := r.Read(ctx, got, int64(b*block.Size+me*part)); err != nil {
					t.Errorf("seed %d: %v", seed, err)
				}
				if !bytes.Equal(got, mine[b*part:][:part]) {
					t.Errorf("seed %d: writer %d, write %d: its part of block %d is lost", seed, me, i, b)
					return
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	moving.Wait()
	r.drain()
	r.Fold()
	r.forget()
	for me, mine := range last {
		for b := range blocks {
			r.reads(int64(b*block.Size+me*part), mine[b*part:][:part])
		}
	}
	r.settled()
}
