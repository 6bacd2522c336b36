package flashmap

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// Clients write, read, zero and flush while data sets come and go, enough of them. Each client owns
// some blocks of every data set, and always finds what it wrote last.
func TestTraffic(t *testing.T) {
	seed := seedOf(t)
	primary, flash := disks(t)
	f, d := attach(t, late(primary), late(flash.Resize(flashSize+30*setBytes)))
	const clients, rounds, enough = 3, 1500, 30
	var moved atomic.Int32
	var clientsDone, movers sync.WaitGroup
	stop := make(chan struct{})
	for c := range clients {
		clientsDone.Go(func() {
			if err := client(d, rand.New(rand.NewPCG(seed, uint64(c))), c, clients, func(n int) bool { return n < rounds || moved.Load() < enough }); err != nil {
				t.Error(err)
			}
		})
	}
	movers.Go(func() { churn(f, worldBlocks/setBlocks, math.MaxInt32, &moved, stop) })
	movers.Go(func() {
		if n, err := f.Grow(); n == 0 || err != nil {
			t.Errorf("it has grown by %d slots, %v", n, err)
		}
		for {
			select {
			case <-stop:
				return
			default:
				_, _, _ = f.Status(), len(f.Check()), first(d.NextOnFlash(0))
			}
		}
	})
	clientsDone.Wait()
	close(stop)
	movers.Wait()
	for done := false; !done; {
		var err error
		done, err = f.Tidy()
		must(t, err)
	}
	sound(t, f)
}

// late returns a device of which every third request completes after others.
func late(dev hpdi.Device) hpdi.Device {
	f := blocktest.NewFault(dev, 1)
	f.Add(blocktest.Rule{Probability: 0.3, Hold: func(*hpdi.Request) { runtime.Gosched() }})
	return f
}

func first(n, _ int64) int64 { return n }

// client is one of n that share the blocks, each every n-th one. It goes on while more
// says so of how many requests it has begun.
func client(d hpdi.Device, rng *rand.Rand, c, n int, more func(started int) bool) error {
	const depth = 4
	q, err := d.NewQueue(depth)
	if err != nil {
		return err
	}
	type slot struct {
		hpdi.Request
		b int
		v uint64
		p []byte
	}
	slots := make([]*slot, depth)
	var free []*slot
	for i := range slots {
		slots[i] = &slot{p: make([]byte, block.Size)}
		slots[i].User = slots[i]
		free = append(free, slots[i])
	}
	holds, busy := map[int]uint64{}, map[int]bool{}
	v := uint64(c)
	var done []*hpdi.Request
	for started := 0; more(started) || len(free) < depth; {
		for len(free) > 0 && more(started) {
			s := free[len(free)-1]
			free = free[:len(free)-1]
			started++
			s.b = rng.IntN(worldBlocks/n)*n + c
			s.Offset, s.Length, s.Vec = int64(s.b)*block.Size, 0, nil
			switch k := rng.IntN(10); {
			case busy[s.b] || k == 0:
				s.Op, s.Offset, s.b = hpdi.OpFlush, 0, -1
			case k == 1:
				s.Op, s.Length, s.v = hpdi.OpWriteZeroes, block.Size, 0
			case k < 6:
				v += uint64(n)
				s.Op, s.v, s.Vec = hpdi.OpWrite, v, [][]byte{s.p}
				for i := 0; i < len(s.p); i += 8 {
					binary.LittleEndian.PutUint64(s.p[i:], v)
				}
			default:
				s.Op, s.v, s.Vec = hpdi.OpRead, holds[s.b], [][]byte{s.p}
			}
			if s.b >= 0 {
				busy[s.b] = true
			}
			if err := q.Submit(&s.Request); err != nil {
				return err
			}
		}
		if done, err = q.Wait(1, done[:0]); err != nil {
			return err
		}
		for _, r := range done {
			s := r.User.(*slot)
			free = append(free, s)
			if r.Err != nil {
				return r.Err
			}
			if s.b < 0 {
				continue
			}
			delete(busy, s.b)
			if got := binary.LittleEndian.Uint64(s.p); r.Op == hpdi.OpRead && got != s.v {
				return fmt.Errorf("block %d holds write %d instead of %d", s.b, got, s.v)
			}
			holds[s.b] = s.v
		}
	}
	return q.Close()
}
