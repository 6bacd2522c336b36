package volume

import (
	"bytes"
	"context"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

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
					err = r.Trim(ctx, off, int64(n), block.Tag{})
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
