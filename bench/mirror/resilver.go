package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/pollux-storage/pollux/bench/fio"
	"github.com/pollux-storage/pollux/bench/stat"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
)

// resilver is how long it took to fill a copy.
type resilver struct {
	What    string  `json:"what"`
	Bytes   int64   `json:"bytes"` // that were to be filled when it began
	Seconds float64 `json:"seconds"`
}

// latency is what clients saw in one window.
type latency struct {
	P50us  float64 `json:"p50_us"`
	P99us  float64 `json:"p99_us"`
	P999us float64 `json:"p999_us"`
	IOPS   float64 `json:"iops"`
}

// resilvers takes a copy away for a moment, and replaces it, with clients and
// without.
func (r *rig) resilvers(ctx context.Context, o options, rep *report) error {
	copy2 := filepath.Join(r.Dir, "pool-a.copy2.img")
	fmt.Printf("\n| resilver of %s | to fill | seconds | MB/s |\n|---|--:|--:|--:|\n", humanize.IBytes(o.size))
	note := func(what string, fn func() error) error {
		s, err := r.filled(ctx, what, copy2, fn)
		if err != nil {
			return err
		}
		rep.Resilvers = append(rep.Resilvers, s)
		fmt.Printf("| %s | %s | %.1f | %.0f |\n", what, humanize.IBytes(uint64(s.Bytes)), s.Seconds, float64(s.Bytes)/1e6/s.Seconds)
		return nil
	}
	if _, err := r.Do(ctx, "pool", "offline", "pool-a", copy2); err != nil {
		return err
	}
	if _, err := fio.Run(ctx, time.Minute, "--name=absence", "--uri="+r.uri, fmt.Sprintf("--size=%d", r.size),
		"--rw=randwrite", "--bs=4k", "--iodepth=4", "--rate_iops=1000", "--time_based", "--runtime=5"); err != nil {
		return err
	}
	if err := r.settled(ctx); err != nil {
		return err
	}
	err := note("back after 5 s with 1,000 random writes a second", func() error {
		_, err := r.Do(ctx, "pool", "online", "pool-a", copy2)
		return err
	})
	if err != nil {
		return err
	}
	if err := note("replaced, clients at rest", func() error { return r.replace(ctx, copy2) }); err != nil {
		return err
	}
	for range o.rounds {
		l, err := r.clients(ctx, o)
		if err != nil {
			return err
		}
		rep.Alone = append(rep.Alone, l)
		err = note("replaced, beside clients", func() error {
			if err := r.replace(ctx, copy2); err != nil {
				return err
			}
			l, err := r.clients(ctx, o)
			rep.Resilvered = append(rep.Resilvered, l)
			return err
		})
		if err != nil {
			return err
		}
	}
	p := func(ls []latency, f func(latency) float64) float64 {
		var v []float64
		for _, l := range ls {
			v = append(v, f(l))
		}
		return stat.Median(v)
	}
	fmt.Printf("\n| clients that write at most %d times a second, and verify | writes/s | p50 µs | p99 | p99.9 |\n|---|--:|--:|--:|--:|\n", o.rate)
	p99 := func(l latency) float64 { return l.P99us }
	line := func(name string, ls []latency) {
		fmt.Printf("| %s | %.0f | %.0f | %.0f | %.0f |\n", name, p(ls, func(l latency) float64 { return l.IOPS }),
			p(ls, func(l latency) float64 { return l.P50us }), p(ls, p99), p(ls, func(l latency) float64 { return l.P999us }))
	}
	line("alone", rep.Alone)
	line("while a copy is filled", rep.Resilvered)
	ratio := p(rep.Resilvered, p99) / p(rep.Alone, p99)
	fmt.Printf("\np99 while a copy is filled is %.2f of that without; at most 1.5 is wanted\n", ratio)
	out, err := r.Do(ctx, "check")
	fmt.Printf("\n%s", out)
	return err
}

// replace puts an empty file in the place of a copy.
func (r *rig) replace(ctx context.Context, path string) error {
	if _, err := r.Do(ctx, "pool", "offline", "pool-a", path); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	_, err := r.Do(ctx, "pool", "replace", "pool-a", path)
	return err
}

// filled begins a resilver with fn and waits for its end.
func (r *rig) filled(ctx context.Context, what, path string, fn func() error) (resilver, error) {
	s := resilver{What: what}
	begin := time.Now()
	if err := fn(); err != nil {
		return s, err
	}
	err := r.Until(ctx, 10*time.Minute, func(st control.Status) string {
		for _, d := range pair.Guest(st, "a").Devices {
			if d.Path == path {
				s.Bytes = max(s.Bytes, d.Resilver)
				if d.State == "in sync" {
					return ""
				}
				return "the copy is " + d.State
			}
		}
		return "the copy is not listed"
	})
	s.Seconds = time.Since(begin).Seconds()
	return s, err
}

// clients read and write at random for a while, and verify what they read.
func (r *rig) clients(ctx context.Context, o options) (latency, error) {
	f, err := fio.Run(ctx, o.window+time.Minute, "--name=clients", "--uri="+r.uri, fmt.Sprintf("--size=%d", r.size),
		"--rw=randwrite", "--bs=4k", "--iodepth=16", fmt.Sprintf("--rate_iops=%d", o.rate), "--rate_process=poisson",
		"--verify=crc32c", "--verify_backlog=256", "--time_based", fmt.Sprintf("--runtime=%d", int(o.window.Seconds())))
	if err != nil {
		return latency{}, fmt.Errorf("a client failed: %w", err)
	}
	w, g := f.Write.Clat, f.Read.Clat
	l := latency{IOPS: f.Write.Total / o.window.Seconds()}
	// The worse of both sides.
	wp50, wp99, wp999 := w.Us()
	gp50, gp99, gp999 := g.Us()
	l.P50us, l.P99us, l.P999us = max(wp50, gp50), max(wp99, gp99), max(wp999, gp999)
	return l, nil
}
