package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/pollux-storage/pollux/internal/config"
)

// scale measures how Pollux grows: with the size of a sparse pool, with the
// number of volumes, with the number of connections.
func scale(ctx context.Context, o options, dir string) error {
	if o.pollux == "" {
		return fmt.Errorf("-scale needs -pollux")
	}
	sizes := []int64{100 << 30, 1 << 40, 10 << 40}
	if o.pool != "" {
		n, err := config.ParseSize(o.pool)
		if err != nil {
			return err
		}
		sizes = []int64{int64(n)}
	}
	fmt.Printf("| pool | start | resident | after writes | takeover | check |\n|--:|--:|--:|--:|--:|--:|\n")
	for _, size := range sizes {
		if err := scalePool(ctx, o, filepath.Join(dir, "pool"+strconv.FormatInt(size>>30, 10)), size); err != nil {
			return fmt.Errorf("pool of %d GiB: %w", size>>30, err)
		}
	}
	fmt.Println()
	if err := fullPool(ctx, o, filepath.Join(dir, "full"), sizes[len(sizes)-1]); err != nil || o.pool != "" {
		return err
	}
	p := &pollux{title: "pollux", program: o.pollux, dir: filepath.Join(dir, "many"), volume: "v0", size: o.size, poolSize: 4*o.size + 64<<30, full: true, cache: o.size/4*5 + 64<<20}
	defer p.stop()
	if err := p.start(ctx); err != nil {
		return err
	}
	fmt.Printf("\n| volumes | 4 KiB writes/s | CPU µs | 4 KiB reads/s | CPU µs | resident |\n|--:|--:|--:|--:|--:|--:|\n")
	have := 1
	for _, n := range []int{1, 10, 100, 1000} {
		for ; have < n; have++ {
			if _, err := output(ctx, time.Minute, p.program, "volume", "create", "v"+strconv.Itoa(have), "--size", "1GiB", "--guest", "a", "--dir", p.dir); err != nil {
				return err
			}
		}
		if err := p.loaded(ctx, o, n, 1); err != nil {
			return err
		}
	}
	fmt.Printf("\n| connections | 4 KiB writes/s | CPU µs | 4 KiB reads/s | CPU µs | resident |\n|--:|--:|--:|--:|--:|--:|\n")
	for _, n := range []int{1, 4, 16, 64, 256} {
		if err := p.loaded(ctx, o, n, n); err != nil {
			return err
		}
	}
	return nil
}

// loaded measures small requests and prints a line of a table.
func (p *pollux) loaded(ctx context.Context, o options, n, conns int) error {
	fmt.Printf("| %d |", n)
	for _, rw := range []string{"randwrite", "randread"} {
		var runs []sample
		for range o.n {
			m, err := measure(ctx, p, row{RW: rw, Block: "4k", Depth: max(1, 16/conns), Conns: conns}, o.size, o.log, o.runtime)
			if err == nil {
				err = p.settle(ctx)
			}
			if err != nil {
				return err
			}
			runs = append(runs, m)
		}
		m := median(runs)
		fmt.Printf(" %.0f | %.1f |", m.IOPS, m.CPUus)
	}
	m, err := resident(p.first)
	fmt.Printf(" %d MiB |\n", m["VmRSS"]>>20)
	return err
}

// scalePool makes a sparse pool, writes to it, kills its guest and checks it.
func scalePool(ctx context.Context, o options, dir string, size int64) error {
	p := &pollux{title: "pollux", program: o.pollux, dir: dir, volume: "bench", size: size / 2, poolSize: size, limit: o.limit}
	defer p.stop()
	if err := p.start(ctx); err != nil {
		return err
	}
	// A second start, for the first one makes the pool.
	if _, err := output(ctx, time.Minute, p.program, "down", "--dir", dir); err != nil {
		return err
	}
	begin := time.Now()
	if _, err := output(ctx, time.Minute, p.program, "up", "--dir", dir, "--detach"); err != nil {
		return err
	}
	took := time.Since(begin)
	if err := p.find(ctx); err != nil {
		return err
	}
	idle, err := resident(p.first)
	if err != nil {
		return err
	}
	if _, _, err := fio(ctx, p.uri(), size/2, o.runtime+time.Minute, "--rw=randwrite", "--bs=4k", "--iodepth=16", "--time_based", fmt.Sprintf("--runtime=%d", int(o.runtime.Seconds()))); err != nil {
		return err
	}
	used, err := resident(p.first)
	if err != nil {
		return err
	}
	begin = time.Now()
	if _, err := output(ctx, 10*time.Minute, p.program, "check", "--dir", dir); err != nil {
		return err
	}
	checked := time.Since(begin)
	if err := syscall.Kill(p.first, syscall.SIGKILL); err != nil {
		return err
	}
	takeover, err := p.takeover(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("| %d GiB | %v | %d MiB | %d MiB | %v | %v |\n", size>>30, took.Round(time.Millisecond), idle["VmRSS"]>>20, used["VmRSS"]>>20,
		takeover.Round(100*time.Microsecond), checked.Round(10*time.Millisecond))
	p.stop()
	return os.RemoveAll(dir)
}

// takeover waits for the other guest to have taken over and returns how long
// its steps took in all.
func (p *pollux) takeover(ctx context.Context) (time.Duration, error) {
	for begin := time.Now(); time.Since(begin) < 20*time.Second; time.Sleep(50 * time.Millisecond) {
		b, err := output(ctx, 20*time.Second, p.program, "status", "--dir", p.dir, "--json")
		if err != nil {
			return 0, err
		}
		var s struct {
			Last *struct {
				Total float64 `json:"total_ms"`
			} `json:"last_takeover"`
		}
		if err := json.Unmarshal(b, &s); err != nil {
			return 0, err
		}
		if s.Last != nil {
			return time.Duration(s.Last.Total * float64(time.Millisecond)), nil
		}
	}
	return 0, fmt.Errorf("nobody took over within 20s")
}
