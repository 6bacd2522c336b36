package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

// Many clients change one volume at any alignment while consistency points,
// folds and checks go on. Each owns some byte ranges, whose ends lie within
// blocks that it shares with others, and knows what they must hold.
func TestConcurrentClients(t *testing.T) {
	seeds, ops := uint64(2), 400
	if soak {
		seeds, ops = 20, 5000
	}
	for seed := range seeds {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) { concurrent(t, seed, ops) })
	}
}

func concurrent(t *testing.T, seed uint64, ops int) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute) // only a hang needs it
	defer cancel()
	const clients, size = 8, 3 << 20
	r := newRig(t, 1+int(seed%2), 32<<20)
	stop := r.run()
	v := r.volume("v", size)
	var all []*client
	for i := range clients {
		all = append(all, &client{t: t, v: v, rng: rand.New(rand.NewPCG(seed, uint64(i))), want: make([]byte, size)})
	}
	deal := rand.New(rand.NewPCG(seed, 99))
	for at := int64(0); at < size; {
		n := min(100+deal.Int64N(20_000), size-at)
		c := all[deal.IntN(clients)]
		c.own = append(c.own, block.Extent{Offset: at, Length: n})
		at += n
	}
	var work sync.WaitGroup
	for _, c := range all {
		work.Go(func() { c.run(ctx, ops) })
	}
	done := make(chan struct{})
	var beside sync.WaitGroup
	beside.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			default:
			}
			var err error
			if i%4 == 3 {
				var report CheckReport
				if report, err = r.Check(ctx, CheckOptions{Data: true}); len(report.Problems) > 0 {
					t.Errorf("check: %q", report.Problems)
				}
			} else {
				err = r.Fold(ctx)
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
	})
	work.Wait()
	close(done)
	beside.Wait()
	for _, c := range all {
		c.verify(ctx)
	}
	stop()
	if t.Failed() {
		return
	}
	// As killed: the log has what the devices lack.
	if err := r.Pool.free(); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	r.mustOpen()
	for _, c := range all {
		c.v, _ = r.Volume("v")
		c.verify(ctx)
	}
	r.shut()
}

// client changes the ranges of a volume that are its own.
type client struct {
	t    testing.TB
	v    block.Volume
	rng  *rand.Rand
	own  []block.Extent
	want []byte // of the whole volume; only what is its own counts
}

func (c *client) run(ctx context.Context, ops int) {
	for range ops {
		if c.t.Failed() {
			return
		}
		e := c.own[c.rng.IntN(len(c.own))]
		from := c.rng.Int64N(e.Length)
		n := 1 + c.rng.Int64N(e.Length-from)
		off := e.Offset + from
		var err error
		switch c.rng.IntN(8) {
		case 0:
			if err = c.v.Trim(ctx, off, n, block.Tag{}); err == nil {
				clear(c.want[off : off+n])
			}
		case 1:
			if c.rng.IntN(4) == 0 {
				err = c.v.Flush(ctx)
			}
		case 2, 3:
			err = c.read(ctx, off, n)
		case 4:
			_, err = c.v.Status(ctx, off, n, 16, nil)
		default:
			err = c.write(ctx, off, n)
		}
		if err != nil {
			c.t.Errorf("[%d, %d): %v", off, off+n, err)
			return
		}
	}
}

func (c *client) write(ctx context.Context, off, n int64) error {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(c.rng.Uint32())
	}
	w, err := c.v.TryStage(off, int(n))
	if err == nil && w == nil {
		w, err = c.v.Stage(ctx, off, int(n))
	}
	if err != nil {
		return err
	}
	rest := p
	for _, b := range w.Buffers() {
		rest = rest[copy(b, rest):]
	}
	if c.rng.IntN(10) == 0 {
		w.Abort()
		return nil
	}
	ok, err := w.TryCommit()
	if err == nil && !ok {
		err = w.Commit(ctx)
	}
	if err == nil {
		copy(c.want[off:], p)
	}
	return err
}

func (c *client) read(ctx context.Context, off, n int64) error {
	got := make([]byte, n)
	ok, err := c.v.TryRead(got, off)
	if err == nil && !ok {
		err = c.v.Read(ctx, got, off)
	}
	if err != nil {
		return err
	}
	if want := c.want[off : off+n]; !bytes.Equal(got, want) {
		i := 0
		for got[i] == want[i] {
			i++
		}
		return fmt.Errorf("byte %d is %#x instead of %#x: %w", off+int64(i), got[i], want[i], errWrong)
	}
	return nil
}

var errWrong = errors.New("wrong data")

func (c *client) verify(ctx context.Context) {
	for _, e := range c.own {
		if err := c.read(ctx, e.Offset, e.Length); err != nil {
			c.t.Error(err)
		}
	}
}
