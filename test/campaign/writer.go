package campaign

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

// disk is one volume under load and all that is known of it.
type disk struct {
	name    string
	id      uint64 // in stamps
	unit    int    // bytes
	units   int
	depth   int // requests in flight of each client
	hot     int // units that half of all accesses go to
	clients []client
	history *history
	op      atomic.Uint64
	acked   atomic.Int64 // requests

	mu  sync.Mutex
	err error // the first thing that must not be
}

// Load of one connection.
const (
	depth    = 4  // requests in flight
	hotUnits = 48 // half of all accesses go there
	maxUnits = 16 // of one request
)

func (d *disk) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err == nil {
		d.err = fmt.Errorf("volume %s: %w", d.name, err)
	}
}

func (d *disk) failed() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// work loads the volume until stop is closed and then waits for the requests
// in flight. ctx bounds the wait.
func (d *disk) work(ctx context.Context, seed uint64, stop <-chan struct{}) {
	var wg sync.WaitGroup
	for i, c := range d.clients {
		for j := range d.depth {
			rng := rand.New(rand.NewPCG(seed, d.id<<16|uint64(i<<8|j)))
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					if err := d.one(ctx, c, rng); err != nil {
						d.fail(err)
						return
					}
					d.acked.Add(1)
				}
			})
		}
	}
	wg.Wait()
}

// one does one request and records it.
func (d *disk) one(ctx context.Context, c client, rng *rand.Rand) error {
	n := 1 + rng.IntN(maxUnits)
	first := rng.IntN(d.units - n)
	if rng.IntN(2) == 0 {
		n = 1 + rng.IntN(4)
		first = rng.IntN(d.hot - n)
	}
	r := &nbdclient.Request{Offset: int64(first * d.unit), FUA: rng.IntN(16) == 0}
	var value uint64
	switch k := rng.IntN(100); {
	case k < 45:
		r.Command, r.Data, value = nbdclient.Write, make([]byte, n*d.unit), d.op.Add(1)
		for i := range n {
			fill(r.Data[i*d.unit:(i+1)*d.unit], d.id, uint64(first+i), value)
		}
	case k < 50:
		r.Command, r.Length = nbdclient.Trim, n*d.unit
	case k < 55:
		r.Command, r.Length, r.NoHole = nbdclient.WriteZeroes, n*d.unit, k%2 == 0
	case k < 57:
		r.Command, r.Offset, r.FUA = nbdclient.Flush, 0, false
	default:
		_, err := d.read(ctx, c, first, n)
		return err
	}
	if err := c.Do(ctx, r); err != nil {
		return requestError(r, err)
	}
	if r.Command != nbdclient.Flush {
		d.history.wrote(first, n, value, r.Attempts)
	}
	return nil
}

// read reads units, checks each by itself and records them.
func (d *disk) read(ctx context.Context, c client, first, n int) ([]uint64, error) {
	r := &nbdclient.Request{Command: nbdclient.Read, Offset: int64(first * d.unit), Data: make([]byte, n*d.unit)}
	if err := c.Do(ctx, r); err != nil {
		return nil, requestError(r, err)
	}
	values := make([]uint64, n)
	for i := range n {
		var err error
		if values[i], err = parse(r.Data[i*d.unit:(i+1)*d.unit], d.id, uint64(first+i)); err != nil {
			return nil, fmt.Errorf("unit %d: %w", first+i, err)
		}
	}
	d.history.read(first, values, r.Attempts)
	return values, nil
}

// requestError names the request. Only what Do has let go of may be looked at.
func requestError(r *nbdclient.Request, err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("a request (command %d at %d) was not answered in time: %w", r.Command, r.Offset, err)
	}
	return fmt.Errorf("command %d of %d bytes at %d: %w", r.Command, max(len(r.Data), r.Length), r.Offset, err)
}

// settle reads the whole volume with nothing else in flight and checks what
// happened since it was last done.
func (d *disk) settle(ctx context.Context) error {
	final := make([]uint64, 0, d.units)
	step := (256 << 10) / d.unit
	for first := 0; first < d.units; first += step {
		values, err := d.read(ctx, d.clients[first/step%len(d.clients)], first, min(step, d.units-first))
		if err != nil {
			return fmt.Errorf("volume %s: reading everything: %w", d.name, err)
		}
		final = append(final, values...)
	}
	if err := d.history.settle(final); err != nil {
		return fmt.Errorf("volume %s: %w", d.name, err)
	}
	return nil
}

// progress waits until n more requests have been answered.
func (d *disk) progress(ctx context.Context, n int64) error {
	want := d.acked.Load() + n
	for d.acked.Load() < want {
		if err := d.failed(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("volume %s: no progress: %w (%+v)", d.name, ctx.Err(), d.clients[0].Stats())
		case <-time.After(time.Millisecond):
		}
	}
	return nil
}

func (d *disk) close() {
	for _, c := range d.clients {
		c.Close()
	}
}
