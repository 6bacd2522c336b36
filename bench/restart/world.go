package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/campaign/nbdclient"
	"github.com/pollux-storage/pollux/test/pair"
)

const (
	guest      = "a" // whose pool it is
	poolSize   = 1 << 40
	volumeSize = 1 << 30
	pieceSize  = 64 << 10 // what is written at once
	blockSize  = 4 << 10
	healLimit  = time.Minute
)

// world is the pair with its pool.
type world struct {
	options
	pair   *pair.Pair
	uris   []string // of all volumes, in the order of their creation
	places [][]int64
	rng    *rand.Rand
	heated bool
}

// inUse returns the n-th volume in use; they are spread over all.
func (w *world) inUse(n int) int { return n * (w.volumes / w.used) }

func volumeName(n int) string { return fmt.Sprintf("v%04d", n) }

// newWorld makes pair, pool and volumes, writes to those in use and reads it again.
func newWorld(ctx context.Context, o options) (*world, error) {
	w := &world{options: o, rng: rand.New(rand.NewPCG(o.seed, 0))}
	size := int64(poolSize) / int64(o.devices) &^ (1<<20 - 1)
	var err error
	if w.pair, err = pair.New(o.pollux, o.dir, pair.Settings{
		Log: o.log, Cache: o.cache, PoolSize: fmt.Sprint(size), Devices: o.devices,
		Failover: []string{"giveback_delay: -1s", "restart_delay: 100ms", "restart_max: 100ms", "crash_limit: 1000000"},
	}); err != nil {
		return nil, err
	}
	if err := w.pair.Up(ctx); err != nil {
		return w, err
	}
	for n := range o.volumes {
		// Every tenth of those in use shares blocks, so that there is an index.
		shares := n%(o.volumes/o.used) == 0 && n/(o.volumes/o.used)%10 == 0
		if _, err := w.pair.Client().CreateVolume(ctx, control.VolumeCreate{Name: volumeName(n), Size: volumeSize, Guest: guest, Dedup: shares}); err != nil {
			return w, err
		}
	}
	if err := w.find(ctx); err != nil {
		return w, err
	}
	for n := range o.used {
		if err := w.use(ctx, n); err != nil {
			return w, fmt.Errorf("volume %s: %w", volumeName(w.inUse(n)), err)
		}
	}
	return w, nil
}

// find asks where the volumes are served.
func (w *world) find(ctx context.Context) error {
	st, err := w.pair.Status(ctx)
	if err != nil {
		return err
	}
	at := map[string]string{}
	for _, e := range pair.Guest(st, guest).Exports {
		at[e.Volume] = e.NBDUnix
	}
	w.uris = nil
	for n := range w.volumes {
		uri := at[volumeName(n)]
		if uri == "" {
			return fmt.Errorf("volume %s: %w", volumeName(n), pair.ErrGone)
		}
		w.uris = append(w.uris, uri)
	}
	return nil
}

// use writes pieces here and there to the n-th volume in use and reads them again.
func (w *world) use(ctx context.Context, n int) (err error) {
	c, err := nbdclient.New(nbdclient.Options{URI: w.uris[w.inUse(n)], Structured: true})
	if err != nil {
		return err
	}
	defer c.Close()
	pieces := max(1, int(w.written/int64(w.used)/pieceSize))
	var places []int64
	for _, at := range w.rng.Perm(volumeSize / pieceSize)[:min(pieces, volumeSize/pieceSize/2)] {
		places = append(places, int64(at)*pieceSize)
	}
	w.places = append(w.places, places)
	for _, at := range places {
		if err := c.Do(ctx, &nbdclient.Request{Command: nbdclient.Write, Offset: at, Data: content(n, at, pieceSize)}); err != nil {
			return err
		}
	}
	for _, at := range places {
		if err := w.read(ctx, c, n, at, pieceSize); err != nil {
			return err
		}
	}
	return nil
}

// content is what the n-th volume in use has at an offset: every block another.
func content(n int, at int64, size int) []byte {
	p := make([]byte, size)
	for i := 0; i < size; i += 16 {
		binary.LittleEndian.PutUint64(p[i:], uint64(n)<<40|uint64(at/blockSize)+uint64(i/blockSize))
		binary.LittleEndian.PutUint64(p[i+8:], uint64(i%blockSize)*0x9e3779b97f4a7c15)
	}
	return p
}

// read reads and compares.
func (w *world) read(ctx context.Context, c *nbdclient.Client, n int, at int64, size int) error {
	p := make([]byte, size)
	if err := c.Do(ctx, &nbdclient.Request{Command: nbdclient.Read, Offset: at, Data: p}); err != nil {
		return err
	}
	if !bytes.Equal(p, content(n, at, size)) {
		return fmt.Errorf("volume %s at %d does not hold what was written", volumeName(w.inUse(n)), at)
	}
	return nil
}

// touch writes some of what is there once more, one block to each volume in use, so
// that there is something in the log.
func (w *world) touch(ctx context.Context) error {
	for n := range w.used {
		c, err := nbdclient.New(nbdclient.Options{URI: w.uris[w.inUse(n)], Structured: true})
		if err != nil {
			return err
		}
		at := w.places[n][w.rng.IntN(len(w.places[n]))]
		err = c.Do(ctx, &nbdclient.Request{Command: nbdclient.Write, Offset: at, Data: content(n, at, blockSize)})
		c.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// answers waits until a read of a volume in use, and then all exports, are answered.
// Times are those since begin.
func (w *world) answers(ctx context.Context, begin func() time.Time, s *sample) error {
	n := w.rng.IntN(w.used)
	c, err := nbdclient.New(nbdclient.Options{URI: w.uris[w.inUse(n)], Structured: true})
	if err != nil {
		return err
	}
	defer c.Close()
	if err := w.read(ctx, c, n, w.places[n][w.rng.IntN(len(w.places[n]))], blockSize); err != nil {
		return err
	}
	read := time.Now()
	if err := askAll(ctx, w.uris, volumeSize); err != nil {
		return err
	}
	all := time.Now()
	began := begin()
	s.Read, s.All = ms(read.Sub(began)), ms(all.Sub(began))
	return nil
}

// askers is how many ask at once. One alone would measure how fast threads wake up.
const askers = 16

// askAll asks every export for its size, again until it answers.
func askAll(ctx context.Context, uris []string, want int64) error {
	var next atomic.Int64
	errs := make([]error, askers)
	var wg sync.WaitGroup
	for i := range askers {
		wg.Go(func() {
			for errs[i] == nil {
				n := int(next.Add(1)) - 1
				if n >= len(uris) {
					return
				}
				errs[i] = ask(ctx, uris[n], want)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func ask(ctx context.Context, uri string, want int64) error {
	for {
		size, err := nbdclient.Ask(ctx, uri)
		if err == nil && size != want {
			return fmt.Errorf("%s has %d bytes, not %d", uri, size, want)
		}
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		case <-time.After(time.Millisecond):
		}
	}
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }
