package counting

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

// clientWorkers serve the requests of the clients that are due.
const clientWorkers = 8

// Clients says what clients ask for: blocks of the first Size bytes of Volume at random,
// half of them to be read and half to be written, at a fixed rate.
type Clients struct {
	Volume block.Volume
	Size   int64
	Rate   int // requests a second
	// Write writes the block at off; nil writes Pattern.
	Write func(ctx context.Context, off int64) error
}

// Beside returns what clients see while fn runs.
func (c Clients) Beside(ctx context.Context, fn func() error) (Latencies, error) {
	if c.Write == nil {
		c.Write = func(ctx context.Context, off int64) error { return Write(ctx, c.Volume, off, block.Size) }
	}
	a := c.ask(ctx)
	err := fn()
	l, e := a.end()
	return l, errors.Join(err, e)
}

// asking are clients that ask until they are stopped.
type asking struct {
	stop context.CancelFunc
	work sync.WaitGroup

	mu            sync.Mutex // guards what follows
	reads, writes []time.Duration
	err           error
}

// ask starts clients.
func (c Clients) ask(ctx context.Context) *asking {
	loop, stop := context.WithCancel(ctx)
	a := &asking{stop: stop}
	begin := time.Now()
	for i := range clientWorkers {
		a.work.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(i)))
			page := make([]byte, block.Size)
			for n := i; loop.Err() == nil; n += clientWorkers {
				due := begin.Add(time.Duration(n) * time.Second / time.Duration(c.Rate))
				time.Sleep(time.Until(due))
				off := rng.Int64N(c.Size/block.Size) * block.Size
				if n%2 == 0 {
					err := c.Volume.Read(ctx, page, off)
					a.done(&a.reads, time.Since(due), err)
				} else {
					err := c.Write(ctx, off)
					a.done(&a.writes, time.Since(due), err)
				}
			}
		})
	}
	return a
}

func (a *asking) done(times *[]time.Duration, took time.Duration, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	*times = append(*times, took)
	a.err = errors.Join(a.err, err)
}

// end stops the clients and returns what they saw.
func (a *asking) end() (Latencies, error) {
	a.stop()
	a.work.Wait()
	all := slices.Concat(a.reads, a.writes)
	return Latencies{
		N: len(all), P50: quantile(all, 0.5), P99: quantile(all, 0.99), P999: quantile(all, 0.999), Longest: quantile(all, 1),
		ReadP99: quantile(a.reads, 0.99), WriteP99: quantile(a.writes, 0.99),
	}, a.err
}

// quantile sorts times and returns the one that a share of them does not exceed, 0 of
// none.
func quantile(times []time.Duration, share float64) time.Duration {
	if len(times) == 0 {
		return 0
	}
	slices.Sort(times)
	return times[min(len(times)-1, int(share*float64(len(times))))]
}

// Latencies are those of N requests.
type Latencies struct {
	N       int           `json:"requests"`
	P50     time.Duration `json:"p50_ns"`
	P99     time.Duration `json:"p99_ns"`
	P999    time.Duration `json:"p999_ns"`
	Longest time.Duration `json:"longest_ns"`
	// Of reads and writes apart.
	ReadP99  time.Duration `json:"read_p99_ns"`
	WriteP99 time.Duration `json:"write_p99_ns"`
}

func (l Latencies) String() string {
	us := func(d time.Duration) string { return fmt.Sprintf("%d µs", d.Microseconds()) }
	return fmt.Sprintf("| %d | %s | %s | %s | %s |", l.N, us(l.P50), us(l.P99), us(l.P999), us(l.Longest))
}

// LatencyHead heads the columns of Latencies in a table.
const LatencyHead = "| requests | p50 | p99 | p99.9 | longest |"
