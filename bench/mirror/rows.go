package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/bench/fio"
	"github.com/pollux-storage/pollux/bench/stat"
)

// row is one load, measured on a single device and on a mirror in turn.
type row struct {
	Name   string    `json:"name"`
	Single []float64 `json:"single_mb_per_s"`
	Mirror []float64 `json:"mirror_mb_per_s"`
	args   []string
	read   bool
	cold   bool
}

// Writes are of four logs and end in a flush and a consistency point.
var rows = []row{
	{Name: "4 KiB random write", args: []string{"--rw=randwrite", "--bs=4k", "--iodepth=16", fmt.Sprintf("--io_size=%d", 4*logSize), "--end_fsync=1"}},
	{Name: "128 KiB sequential write", args: []string{"--rw=write", "--bs=128k", "--iodepth=16", fmt.Sprintf("--io_size=%d", 16*logSize), "--end_fsync=1", "--refill_buffers"}},
	{Name: "4 KiB random read, cold", read: true, cold: true, args: []string{"--rw=randread", "--bs=4k", "--iodepth=16", "--time_based", "--runtime=3"}},
	{Name: "128 KiB sequential read, cold", read: true, cold: true, args: []string{"--rw=read", "--bs=128k", "--iodepth=16", fmt.Sprintf("--io_size=%d", 16*logSize)}},
}

// compare measures all rows on both.
func compare(ctx context.Context, o options, rigs []*rig) ([]row, error) {
	out := slices.Clone(rows)
	fmt.Printf("| %d rounds, MB/s | single | mirror | ratio |\n|---|--:|--:|--:|\n", o.rounds)
	for i := range out {
		r := &out[i]
		for round := range o.rounds {
			for k := range rigs {
				g := rigs[(k+round)%len(rigs)]
				speed, err := g.measure(ctx, r)
				if err != nil {
					return nil, fmt.Errorf("%s: %w", r.Name, err)
				}
				if g.copies == 1 {
					r.Single = append(r.Single, speed)
				} else {
					r.Mirror = append(r.Mirror, speed)
				}
			}
		}
		s, m := stat.Median(r.Single), stat.Median(r.Mirror)
		fmt.Printf("| %s | %.0f | %.0f | %.2f |\n", r.Name, s, m, m/s)
	}
	return out, nil
}

// measure returns the MB/s of one run, all of it on the devices.
func (r *rig) measure(ctx context.Context, w *row) (float64, error) {
	if w.cold {
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil {
			return 0, fmt.Errorf("empty the page cache: %w", err)
		}
	}
	begin := time.Now()
	f, err := fio.Run(ctx, 5*time.Minute, append([]string{"--name=bench", "--uri=" + r.uri, fmt.Sprintf("--size=%d", r.size)}, w.args...)...)
	if err != nil {
		return 0, err
	}
	if w.read {
		return f.Read.Moved / f.Read.Runtime / 1e3, nil
	}
	if err := r.settled(ctx); err != nil {
		return 0, err
	}
	return f.Write.Moved / time.Since(begin).Seconds() / 1e6, nil
}
