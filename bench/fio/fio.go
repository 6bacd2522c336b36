// Package fio runs fio on NBD exports and reads its report.
package fio

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// Result is what is needed of fio's JSON: its sides, of all jobs together.
type Result struct {
	Error             int
	Read, Write, Trim Side
	Sync              struct {
		Lat Percentiles `json:"lat_ns"`
	}
}

// Side is one direction of a load.
type Side struct {
	IOPS    float64
	Moved   float64     `json:"io_bytes"`
	Total   float64     `json:"total_ios"`
	Runtime float64     // in milliseconds
	Clat    Percentiles `json:"clat_ns"`
}

// Percentiles are those of a latency, in nanoseconds.
type Percentiles struct{ Percentile map[string]float64 }

// Us returns three percentiles in microseconds.
func (p Percentiles) Us() (p50, p99, p999 float64) {
	return p.Percentile["50.000000"] / 1e3, p.Percentile["99.000000"] / 1e3, p.Percentile["99.900000"] / 1e3
}

// Run runs fio for at most limit. The arguments describe jobs that name their
// exports; all are reported as one.
func Run(ctx context.Context, limit time.Duration, jobs ...string) (Result, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	argv := append([]string{"--output-format=json", "--ioengine=nbd", "--norandommap", "--randrepeat=0", "--group_reporting", "--verify_state_save=0"}, jobs...)
	cmd := exec.CommandContext(ctx, "fio", argv...)
	cmd.WaitDelay = 5 * time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	b, err := cmd.Output()
	if err != nil {
		return Result{}, fmt.Errorf("fio %s: %w\n%s%s", strings.Join(argv, " "), errors.Join(err, ctx.Err()), stderr.Bytes(), b)
	}
	var r struct{ Jobs []Result }
	if i := bytes.IndexByte(b, '{'); i < 0 {
		return Result{}, fmt.Errorf("fio printed no JSON: %q", b)
	} else if err := json.Unmarshal(b[i:], &r); err != nil {
		return Result{}, fmt.Errorf("fio: %w", err)
	}
	if len(r.Jobs) != 1 || r.Jobs[0].Error != 0 {
		return Result{}, fmt.Errorf("fio failed: %s", b)
	}
	return r.Jobs[0], nil
}

// Fill writes the first size bytes of an export once with data that is nowhere
// zero, and flushes.
func Fill(ctx context.Context, uri string, size int64) error {
	_, err := Run(ctx, 15*time.Minute, "--name=fill", "--uri="+uri, fmt.Sprintf("--size=%d", size),
		"--rw=write", "--bs=1M", "--iodepth=4", "--refill_buffers", "--end_fsync=1")
	if err != nil {
		return fmt.Errorf("fill %s: %w", uri, err)
	}
	return nil
}
