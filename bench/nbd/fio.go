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
	Depth int    `json:"depth"`
}

var allRows = []row{
	{"4k-randwrite-qd16", "randwrite", "4k", 16},
	{"4k-randread-qd16", "randread", "4k", 16},
	{"4k-randwrite-qd1", "randwrite", "4k", 1},
	{"4k-randread-qd1", "randread", "4k", 1},
	{"128k-write-qd16", "write", "128k", 16},
	{"128k-read-qd16", "read", "128k", 16},
	{"128k-write-qd1", "write", "128k", 1},
	{"128k-read-qd1", "read", "128k", 1},
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
	IOPS  float64
	Bytes float64 `json:"bw_bytes"`
	Total float64 `json:"total_ios"`
	Clat  struct {
		Percentile map[string]float64
	} `json:"clat_ns"`
}

// fio runs fio on a volume and returns its two sides.
func fio(ctx context.Context, uri string, size int64, limit time.Duration, args ...string) (read, write fioSide, err error) {
	argv := append([]string{"fio", "--name=bench", "--ioengine=nbd", "--uri=" + uri, fmt.Sprintf("--size=%d", size),
		"--norandommap", "--randrepeat=0", "--output-format=json"}, args...)
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

// measure runs one row on a server.
func measure(ctx context.Context, s server, r row, size int64, length time.Duration) (sample, error) {
	before, err := cpuTime(s.pids())
	if err != nil {
		return sample{}, err
	}
	read, write, err := fio(ctx, s.uri(), size, length+30*time.Second, "--rw="+r.RW, "--bs="+r.Block,
		fmt.Sprintf("--iodepth=%d", r.Depth), "--time_based", fmt.Sprintf("--runtime=%d", int(length.Seconds())))
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
	if side.Total == 0 {
		return sample{}, fmt.Errorf("no request was completed within %v", length)
	}
	return sample{
		IOPS: side.IOPS, MBps: side.Bytes / 1e6,
		P50us: side.Clat.Percentile["50.000000"] / 1e3, P99us: side.Clat.Percentile["99.000000"] / 1e3,
		CPUus: float64((after - before).Microseconds()) / side.Total,
	}, nil
}
