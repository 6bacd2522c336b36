package main

import (
	"context"
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/bench/fio"
)

// sample is one run.
type sample struct {
	IOPS   float64 `json:"iops"`
	MBps   float64 `json:"mb_per_s"`
	P50us  float64 `json:"p50_us"`
	P99us  float64 `json:"p99_us"`
	P999us float64 `json:"p999_us"`
	CPUus  float64 `json:"server_cpu_us_per_request"`
}

// load runs fio on the first size bytes of a volume.
func load(ctx context.Context, uri string, size int64, limit time.Duration, args ...string) (fio.Result, error) {
	return fio.Run(ctx, limit, append([]string{"--name=bench", "--uri=" + uri, fmt.Sprintf("--size=%d", size)}, args...)...)
}

// measure runs one row on a server, which it finds idle and leaves idle: with
// nothing to write back, and with its caches as the row wants them.
func measure(ctx context.Context, s server, r row, o options) (sample, error) {
	if r.Cold {
		if err := dropPageCache(); err != nil {
			return sample{}, err
		}
	} else if err := s.warm(); err != nil {
		return sample{}, err
	}
	before, err := cpuTime(s.pids())
	if err != nil {
		return sample{}, err
	}
	f, err := load(ctx, s.uri(), o.size, o.runtime+2*time.Minute, r.args(o)...)
	if err != nil {
		return sample{}, err
	}
	// Consistency points that come after the last reply belong to the row too.
	if r.writes() {
		if err := s.settle(ctx); err != nil {
			return sample{}, err
		}
	}
	after, err := cpuTime(s.pids())
	if err != nil {
		return sample{}, err
	}
	side := f.Read
	if r.writes() {
		side = f.Write
	}
	if side.Total == 0 || side.Runtime == 0 {
		return sample{}, fmt.Errorf("no request was completed within %v", o.runtime)
	}
	// Of the whole time, in which the last flush is.
	seconds := side.Runtime / 1e3
	m := sample{
		IOPS: side.Total / seconds, MBps: side.Moved / seconds / 1e6,
		CPUus: float64((after - before).Microseconds()) / side.Total,
	}
	lat := side.Clat
	if r.Flush > 0 {
		lat = f.Sync.Lat
	}
	m.P50us, m.P99us, m.P999us = lat.Us()
	return m, nil
}
