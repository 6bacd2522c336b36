package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/bench/stat"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/campaign/nbdclient"
	"github.com/pollux-storage/pollux/test/pair"
)

// readers is how many read at once.
const readers = 4

// How skewed reads are: an hundredth of the blocks gets some two fifths of them.
const skew, flat = 1.3, 100

// warmth is how reads go, most of them of few blocks.
type warmth struct {
	Hits float64 `json:"hit_share"` // a page of metadata that is read counts as a read that missed
	P50  float64 `json:"p50_us"`
	P99  float64 `json:"p99_us"`
	P999 float64 `json:"p999_us"`
}

// warm is warmth before and after a restart.
type warm struct {
	Before warmth `json:"before"`
	After  warmth `json:"after"`
}

// heat reads until the cache has what is read often.
func (w *world) heat(ctx context.Context) error {
	if w.reads == 0 || w.heated {
		return nil
	}
	w.heated = true
	_, err := w.skewed(ctx, int(w.written/blockSize))
	return err
}

// skewed reads n blocks of what was written, with connections that are there already. With
// n = 0 it does nothing.
func (w *world) skewed(ctx context.Context, n int) (r warmth, err error) {
	if n == 0 {
		return r, nil
	}
	var clients []*nbdclient.Client
	defer func() {
		for _, c := range clients {
			c.Close()
		}
	}()
	for v := range w.used {
		c, err := nbdclient.New(nbdclient.Options{URI: w.uris[w.inUse(v)], Structured: true})
		if err != nil {
			return r, err
		}
		clients = append(clients, c)
		if err := w.read(ctx, c, v, w.places[v][0], blockSize); err != nil {
			return r, err
		}
	}
	before, err := w.missed(ctx)
	if err != nil {
		return r, err
	}
	took := make([]time.Duration, n)
	errs := make([]error, readers)
	seed, next := w.rng.Uint64(), atomic.Int64{}
	var wg sync.WaitGroup
	for i := range readers {
		wg.Go(func() {
			draw := w.draw(rand.New(rand.NewPCG(seed, uint64(i))))
			for errs[i] == nil {
				k := int(next.Add(1)) - 1
				if k >= n {
					return
				}
				v, at := draw()
				begun := time.Now()
				errs[i] = w.read(ctx, clients[v], v, at, blockSize)
				took[k] = time.Since(begun)
			}
		})
	}
	wg.Wait()
	after, err := w.missed(ctx)
	if err := errors.Join(append(errs, err)...); err != nil {
		return r, err
	}
	slices.Sort(took)
	at := func(part float64) float64 { return float64(took[int(part*float64(n-1))].Nanoseconds()) / 1e3 }
	return warmth{Hits: 1 - float64(after-before)/float64(n), P50: at(0.5), P99: at(0.99), P999: at(0.999)}, nil
}

// draw returns what draws blocks that were written, a few of them much more often than
// others: always the same few.
func (w *world) draw(rng *rand.Rand) func() (volume int, at int64) {
	each := len(w.places[0]) * (pieceSize / blockSize)
	all := uint64(each * w.used)
	zipf := rand.NewZipf(rng, skew, float64(all)/flat, all-1)
	return func() (int, int64) {
		// Ranks are spread over all blocks by a multiplication that is a permutation.
		b := int(zipf.Uint64() * 0x9e3779b1 % all)
		v, piece, in := b/each, b%each/(pieceSize/blockSize), b%(pieceSize/blockSize)
		return v, w.places[v][piece] + int64(in)*blockSize
	}
}

// missed returns how many blocks the cache of the pool has not had, since it was opened.
func (w *world) missed(ctx context.Context) (uint64, error) {
	st, err := w.pair.Status(ctx)
	if err != nil {
		return 0, err
	}
	for _, g := range st.Guests {
		i := slices.IndexFunc(g.PoolStats, func(p control.PoolStatus) bool { return p.Identity == guest })
		if i >= 0 {
			return g.PoolStats[i].Cache.Misses, nil
		}
	}
	return 0, fmt.Errorf("the pool of guest %s: %w", guest, pair.ErrGone)
}

// before reads before a restart, with a cache that is warm.
func (b *bench) before(ctx context.Context) (warmth, error) {
	if b.reads == 0 {
		return warmth{}, nil
	}
	if err := b.world.pair.Until(ctx, healLimit, pair.Well); err != nil {
		return warmth{}, err
	}
	if err := b.world.heat(ctx); err != nil {
		return warmth{}, err
	}
	return b.world.skewed(ctx, b.reads)
}

// after reads after a restart.
func (b *bench) after(ctx context.Context, m *warm, s *sample) (err error) {
	if b.reads == 0 {
		return nil
	}
	if m.After, err = b.world.skewed(ctx, b.reads); err == nil {
		s.Warm = m
	}
	return err
}

// warm computes the medians of what was read.
func (c *result) warm() {
	median := func(field func(*warm) float64) float64 {
		var all []float64
		for _, s := range c.Samples {
			if s.Warm != nil {
				all = append(all, field(s.Warm))
			}
		}
		return stat.Median(all)
	}
	if !slices.ContainsFunc(c.Samples, func(s sample) bool { return s.Warm != nil }) {
		return
	}
	side := func(of func(*warm) *warmth) warmth {
		return warmth{
			Hits: median(func(m *warm) float64 { return of(m).Hits }), P50: median(func(m *warm) float64 { return of(m).P50 }),
			P99: median(func(m *warm) float64 { return of(m).P99 }), P999: median(func(m *warm) float64 { return of(m).P999 }),
		}
	}
	c.Warm = &warm{Before: side(func(m *warm) *warmth { return &m.Before }), After: side(func(m *warm) *warmth { return &m.After })}
}

// printWarm shows what was read before and after restarts.
func (r *report) printWarm(w io.Writer) {
	if !slices.ContainsFunc(r.Cases, func(c *result) bool { return c.Warm != nil }) {
		return
	}
	fmt.Fprintf(w, "\n| reads | in the cache | p50 µs | p99 µs | p999 µs |\n|---|--:|--:|--:|--:|\n")
	for _, c := range r.Cases {
		if c.Warm == nil {
			continue
		}
		for _, x := range []struct {
			when string
			is   warmth
		}{{"before", c.Warm.Before}, {"after", c.Warm.After}} {
			fmt.Fprintf(w, "| %s, %s | %.4f | %.0f | %.0f | %.0f |\n", c.Name, x.when, x.is.Hits, x.is.P50, x.is.P99, x.is.P999)
		}
	}
}
