package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"time"
)

// row is one kind of load.
type row struct {
	Name  string `json:"name"`
	RW    string `json:"rw"`
	Block string `json:"block"`
	Depth int    `json:"depth"` // requests under way on each connection
	Conns int    `json:"connections,omitempty"`
	// Flush is after how many writes of a connection a flush follows; 0 is never.
	Flush int `json:"flush,omitempty"`
	// Bytes is how much is written in all, the last flush included, whatever
	// time that takes; 0 is as much as comes within the time of a run.
	Bytes func(logBytes int64) int64 `json:"-"`
	// Sync says that the row ends in a flush.
	Sync bool `json:"sync,omitempty"`
	// Cold rows read what is in no cache.
	Cold bool `json:"cold,omitempty"`
}

// burst is what an operation log takes before a consistency point has made
// room in it; sustained is what it takes only with their help.
func burst(logBytes int64) int64     { return logBytes / 4 * 3 }
func sustained(logBytes int64) int64 { return 4 * logBytes }

var allRows = []row{
	{Name: "4k-randwrite-qd16", RW: "randwrite", Block: "4k", Depth: 16},
	{Name: "4k-randwrite-qd16-x4", RW: "randwrite", Block: "4k", Depth: 16, Conns: 4},
	{Name: "4k-randread-qd16", RW: "randread", Block: "4k", Depth: 16},
	{Name: "4k-randread-qd16-x4", RW: "randread", Block: "4k", Depth: 16, Conns: 4},
	{Name: "4k-randwrite-qd1", RW: "randwrite", Block: "4k", Depth: 1},
	{Name: "4k-randread-qd1", RW: "randread", Block: "4k", Depth: 1},
	{Name: "4k-randread-cold", RW: "randread", Block: "4k", Depth: 16, Cold: true},
	{Name: "128k-read-qd1-cold", RW: "read", Block: "128k", Depth: 1, Cold: true},
	{Name: "4k-write-flush-x16", RW: "randwrite", Block: "4k", Depth: 1, Conns: 16, Flush: 1},
	{Name: "128k-write-burst", RW: "write", Block: "128k", Depth: 16, Bytes: burst},
	{Name: "128k-write-sustained", RW: "write", Block: "128k", Depth: 16, Bytes: sustained, Sync: true},
	{Name: "128k-read-qd16", RW: "read", Block: "128k", Depth: 16},
	{Name: "128k-write-qd1", RW: "write", Block: "128k", Depth: 1},
	{Name: "128k-read-qd1", RW: "read", Block: "128k", Depth: 1},
}

// suits reports whether a row is measured on a server.
func (r row) suits(server string) bool {
	switch {
	case r.Cold:
		return server == "pollux-cold" || server == "qsd-direct" || server == "nbdkit-nocache"
	case server == "pollux-cold":
		return false
	}
	return true
}

func (r row) writes() bool { return r.RW == "write" || r.RW == "randwrite" }

// sample is one run.
type sample struct {
	IOPS  float64 `json:"iops"`
	MBps  float64 `json:"mb_per_s"`
	P50us float64 `json:"p50_us"`
	P99us float64 `json:"p99_us"`
	CPUus float64 `json:"server_cpu_us_per_request"`
}

// fioResult is what is needed of fio's JSON.
type fioResult struct {
	Jobs []struct {
		Error       int
		Read, Write fioSide
	}
}

type fioSide struct {
	IOPS    float64
	Moved   float64 `json:"io_bytes"`
	Total   float64 `json:"total_ios"`
	Runtime float64 // in milliseconds
	Clat    struct {
		Percentile map[string]float64
	} `json:"clat_ns"`
}

// fio runs fio on a volume and returns its two sides, of all jobs together.
func fio(ctx context.Context, uri string, size int64, limit time.Duration, args ...string) (read, write fioSide, err error) {
	argv := append([]string{"fio", "--name=bench", "--ioengine=nbd", "--uri=" + uri, fmt.Sprintf("--size=%d", size),
		"--norandommap", "--randrepeat=0", "--group_reporting", "--output-format=json"}, args...)
	b, err := output(ctx, limit, argv...)
	if err != nil {
		return read, write, err
	}
	var r fioResult
	if i := bytes.IndexByte(b, '{'); i < 0 {
		return read, write, fmt.Errorf("fio printed no JSON: %q", b)
	} else if err := json.Unmarshal(b[i:], &r); err != nil {
		return read, write, fmt.Errorf("fio: %w", err)
	}
	if len(r.Jobs) != 1 || r.Jobs[0].Error != 0 {
		return read, write, fmt.Errorf("fio failed: %s", b)
	}
	return r.Jobs[0].Read, r.Jobs[0].Write, nil
}

// fill writes a volume once from end to end with data that is nowhere zero.
func fill(ctx context.Context, uri string, size int64) error {
	_, _, err := fio(ctx, uri, size, 15*time.Minute, "--rw=write", "--bs=1M", "--iodepth=4", "--refill_buffers", "--end_fsync=1")
	if err != nil {
		return fmt.Errorf("fill %s: %w", uri, err)
	}
	return nil
}

// args are fio's for a row on a volume.
func (r row) args(size, logBytes int64, length time.Duration) []string {
	args := []string{"--rw=" + r.RW, "--bs=" + r.Block, fmt.Sprintf("--iodepth=%d", r.Depth), fmt.Sprintf("--numjobs=%d", max(r.Conns, 1))}
	if r.Bytes != nil {
		// Around and around, for as long as that takes.
		args = append(args, fmt.Sprintf("--io_size=%d", r.Bytes(logBytes)))
	} else {
		args = append(args, "--time_based", fmt.Sprintf("--runtime=%d", int(length.Seconds())))
	}
	if r.Flush > 0 {
		args = append(args, fmt.Sprintf("--fsync=%d", r.Flush))
	}
	if r.Sync {
		args = append(args, "--end_fsync=1")
	}
	return args
}

// measure runs one row on a server.
func measure(ctx context.Context, s server, r row, size, logBytes int64, length time.Duration) (sample, error) {
	if r.Cold {
		if err := dropPageCache(); err != nil {
			return sample{}, err
		}
	}
	before, err := cpuTime(s.pids())
	if err != nil {
		return sample{}, err
	}
	read, write, err := fio(ctx, s.uri(), size, length+2*time.Minute, r.args(size, logBytes, length)...)
	if err != nil {
		return sample{}, err
	}
	after, err := cpuTime(s.pids())
	if err != nil {
		return sample{}, err
	}
	side := read
	if r.writes() {
		side = write
	}
	if side.Total == 0 || side.Runtime == 0 {
		return sample{}, fmt.Errorf("no request was completed within %v", length)
	}
	// Of the whole time, in which the last flush is.
	seconds := side.Runtime / 1e3
	return sample{
		IOPS: side.Total / seconds, MBps: side.Moved / seconds / 1e6,
		P50us: side.Clat.Percentile["50.000000"] / 1e3, P99us: side.Clat.Percentile["99.000000"] / 1e3,
		CPUus: float64((after - before).Microseconds()) / side.Total,
	}, nil
}
