package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/bench/counting"
	"github.com/pollux-storage/pollux/internal/block"
)

// clientWorkers serve the requests of the clients that are due.
const clientWorkers = 8

// clients ask for blocks of a volume at a fixed rate until they are stopped.
type clients struct {
	stop context.CancelFunc
	work sync.WaitGroup

	mu    sync.Mutex // guards what follows
	times []time.Duration
	err   error
}

// ask starts clients of v, which has size bytes.
func ask(ctx context.Context, v block.Volume, size int64, rate int) *clients {
	loop, stop := context.WithCancel(ctx)
	c := &clients{stop: stop}
	begin := time.Now()
	for i := range clientWorkers {
		c.work.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(i)))
			page := make([]byte, block.Size)
			for n := i; loop.Err() == nil; n += clientWorkers {
				due := begin.Add(time.Duration(n) * time.Second / time.Duration(rate))
				time.Sleep(time.Until(due))
				off := rng.Int64N(size/block.Size) * block.Size
				var err error
				if n%2 == 0 {
					err = v.Read(ctx, page, off)
				} else {
					err = counting.Write(ctx, v, off, block.Size)
				}
				c.done(time.Since(due), err)
			}
		})
	}
	return c
}

func (c *clients) done(took time.Duration, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.times = append(c.times, took)
	c.err = errors.Join(c.err, err)
}

// end stops the clients and returns what they saw.
func (c *clients) end() (latencies, error) {
	c.stop()
	c.work.Wait()
	slices.Sort(c.times)
	at := func(share float64) time.Duration {
		return c.times[min(len(c.times)-1, int(share*float64(len(c.times))))]
	}
	return latencies{len(c.times), at(0.5), at(0.99), at(0.999), at(1)}, c.err
}

// latencies are those of n requests.
type latencies struct {
	n                       int
	p50, p99, p999, longest time.Duration
}

func (l latencies) String() string {
	us := func(d time.Duration) string { return fmt.Sprintf("%d µs", d.Microseconds()) }
	return fmt.Sprintf("| %d | %s | %s | %s | %s |", l.n, us(l.p50), us(l.p99), us(l.p999), us(l.longest))
}

const latencyHead = "| requests | p50 | p99 | p99.9 | longest |"

// beside returns what clients see while fn runs.
func beside(ctx context.Context, v block.Volume, size int64, rate int, fn func() error) (latencies, error) {
	c := ask(ctx, v, size, rate)
	err := fn()
	l, e := c.end()
	return l, errors.Join(err, e)
}

// pause waits.
func pause(d time.Duration) func() error {
	return func() error {
		time.Sleep(d)
		return nil
	}
}
