package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"time"
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

// fioResult is what is needed of fio's JSON: its sides, of all jobs together.
type fioResult struct {
	Error             int
	Read, Write, Trim fioSide
	Sync              struct {
		Lat percentiles `json:"lat_ns"`
	}
}

type fioSide struct {
	IOPS    float64
	Moved   float64     `json:"io_bytes"`
	Total   float64     `json:"total_ios"`
	Runtime float64     // in milliseconds
	Clat    percentiles `json:"clat_ns"`
}

type percentiles struct{ Percentile map[string]float64 }

// us returns three percentiles in microseconds.
func (p percentiles) us() (p50, p99, p999 float64) {
	return p.Percentile["50.000000"] / 1e3, p.Percentile["99.000000"] / 1e3, p.Percentile["99.900000"] / 1e3
}

// fio runs fio on a volume.
func fio(ctx context.Context, uri string, size int64, limit time.Duration, args ...string) (fioResult, error) {
	return fioJobs(ctx, limit, append([]string{"--name=bench", "--uri=" + uri, fmt.Sprintf("--size=%d", size)}, args...)...)
}

// fioJobs runs fio with jobs that name their volumes.
func fioJobs(ctx context.Context, limit time.Duration, jobs ...string) (fioResult, error) {
	argv := append([]string{"fio", "--output-format=json", "--ioengine=nbd", "--norandommap", "--randrepeat=0", "--group_reporting"}, jobs...)
	b, err := output(ctx, limit, argv...)
	if err != nil {
		return fioResult{}, err
	}
	var r struct{ Jobs []fioResult }
	if i := bytes.IndexByte(b, '{'); i < 0 {
		return fioResult{}, fmt.Errorf("fio printed no JSON: %q", b)
	} else if err := json.Unmarshal(b[i:], &r); err != nil {
		return fioResult{}, fmt.Errorf("fio: %w", err)
	}
	if len(r.Jobs) != 1 || r.Jobs[0].Error != 0 {
		return fioResult{}, fmt.Errorf("fio failed: %s", b)
	}
	return r.Jobs[0], nil
}

// fill writes a volume once from end to end with data that is nowhere zero.
func fill(ctx context.Context, uri string, size int64) error {
	_, err := fio(ctx, uri, size, 15*time.Minute, "--rw=write", "--bs=1M", "--iodepth=4", "--refill_buffers", "--end_fsync=1")
	if err != nil {
		return fmt.Errorf("fill %s: %w", uri, err)
	}
	return nil
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
	f, err := fio(ctx, s.uri(), o.size, o.runtime+2*time.Minute, r.args(o)...)
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
	m.P50us, m.P99us, m.P999us = lat.us()
	return m, nil
}
