package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/test/campaign/nbdclient"
)

const (
	loadDepth = 16
	loadSize  = 512 << 20
)

// load keeps writes in flight to one volume.
type load struct {
	client *nbdclient.Client
	gate   gate
	cancel context.CancelFunc
	all    sync.WaitGroup
	writes atomic.Int64
	worked time.Duration // while the gate was open
	since  time.Time     // that it is

	mu  sync.Mutex // guards err
	err error
}

func startLoad(uri string, seed uint64) (*load, error) {
	c, err := nbdclient.New(nbdclient.Options{URI: uri})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{client: c, cancel: cancel}
	l.gate.shut()
	for worker := range loadDepth {
		l.all.Go(func() { l.work(ctx, rand.New(rand.NewPCG(seed, uint64(worker)+2))) })
	}
	return l, nil
}

func (l *load) work(ctx context.Context, rng *rand.Rand) {
	r := &nbdclient.Request{Command: nbdclient.Write, Data: make([]byte, blockSize)}
	for op := uint64(1); ; op++ {
		l.gate.pass()
		n := rng.IntN(loadSize / blockSize)
		r.Offset = int64(n) * blockSize
		fill(r.Data, n, op)
		err := l.client.Do(ctx, r)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			l.mu.Lock()
			l.err = errors.Join(l.err, fmt.Errorf("write of the load at %d: %w", r.Offset, err))
			l.mu.Unlock()
			return
		}
		l.writes.Add(1)
	}
}

// rest and resume shut and open the gate.
func (l *load) rest() {
	l.gate.shut()
	l.worked += time.Since(l.since)
}

func (l *load) resume() {
	l.since = time.Now()
	l.gate.open()
}

// stop ends a load that rests and returns how many writes a second were acknowledged,
// pauses included.
func (l *load) stop() (float64, error) {
	l.cancel()
	l.gate.open()
	l.all.Wait()
	l.client.Close()
	return float64(l.writes.Load()) / max(l.worked.Seconds(), 1e-3), l.err
}
