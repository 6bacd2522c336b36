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
	cancel context.CancelFunc
	all    sync.WaitGroup
	writes atomic.Int64
	began  time.Time

	mu  sync.Mutex // guards err
	err error
}

func startLoad(uri string, seed uint64) (*load, error) {
	c, err := nbdclient.New(nbdclient.Options{URI: uri})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{client: c, cancel: cancel, began: time.Now()}
	for worker := range loadDepth {
		l.all.Go(func() { l.work(ctx, rand.New(rand.NewPCG(seed, uint64(worker)+2))) })
	}
	return l, nil
}

func (l *load) work(ctx context.Context, rng *rand.Rand) {
	r := &nbdclient.Request{Command: nbdclient.Write, Data: make([]byte, blockSize)}
	for op := uint64(1); ; op++ {
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

// stop ends the load and returns how many writes a second were acknowledged,
// pauses included.
func (l *load) stop() (float64, error) {
	l.cancel()
	l.all.Wait()
	l.client.Close()
	return float64(l.writes.Load()) / time.Since(l.began).Seconds(), l.err
}
