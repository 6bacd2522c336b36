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

	"github.com/pollux-storage/pollux/bench/stat"
	"github.com/pollux-storage/pollux/internal/config"
)

// scaleReport is what goes to the JSON file.
type scaleReport struct {
	Started     time.Time   `json:"started"`
	Pools       []poolScale `json:"pools"`
	Volumes     []loadScale `json:"volumes"`
	Connections []loadScale `json:"connections"`
}

// poolScale is how a sparse pool of a size does.
type poolScale struct {
	Bytes    int64   `json:"pool_bytes"`
	Start    float64 `json:"start_ms"` // of the pair, the pool exists
	Idle     int64   `json:"rss_idle"`
	Written  int64   `json:"rss_after_writes"`
	Takeover float64 `json:"takeover_ms"` // of the steps, without the wait for notice
	Check    float64 `json:"check_ms"`
}

// loadScale is how small requests do with n volumes or connections.
type loadScale struct {
	N     int    `json:"n"`
	Write sample `json:"write"`
	Read  sample `json:"read"`
	RSS   int64  `json:"rss"`
}

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
	rep := &scaleReport{Started: time.Now().UTC()}
	fmt.Printf("| pool | start | resident | after writes | takeover | check |\n|--:|--:|--:|--:|--:|--:|\n")
	for _, size := range sizes {
		r, err := scalePool(ctx, o, filepath.Join(dir, "pool"+strconv.FormatInt(size>>30, 10)), size)
		if err != nil {
			return fmt.Errorf("pool of %d GiB: %w", size>>30, err)
		}
		fmt.Printf("| %d GiB | %.0f ms | %d MiB | %d MiB | %.1f ms | %.1f s |\n", size>>30, r.Start, r.Idle>>20, r.Written>>20, r.Takeover, r.Check/1e3)
		rep.Pools = append(rep.Pools, r)
	}
	fmt.Println()
	if err := fullPool(ctx, o, filepath.Join(dir, "full"), sizes[len(sizes)-1]); err != nil || o.pool != "" {
		return err
	}
	if err := rep.many(ctx, o, filepath.Join(dir, "many")); err != nil {
		return err
	}
	return stat.WriteJSON(filepath.Join(filepath.Dir(o.out), "scale.json"), rep)
}

// many measures one pair with more and more volumes, then one of them with more
// and more connections.
func (rep *scaleReport) many(ctx context.Context, o options, dir string) error {
	p := &pollux{title: "pollux", program: o.pollux, dir: dir, volume: "v0", size: o.size, poolSize: 4*o.size + 64<<30, full: true, cache: o.size/4*5 + 64<<20}
	defer p.stop()
	if err := p.start(ctx); err != nil {
		return err
	}
	heading := "\n| %s | 4 KiB writes/s | CPU µs | 4 KiB reads/s | CPU µs | resident |\n|--:|--:|--:|--:|--:|--:|\n"
	fmt.Printf(heading, "volumes")
	have := 1
	for _, n := range []int{1, 10, 100, 1000} {
		for ; have < n; have++ {
			if _, err := output(ctx, time.Minute, p.program, "volume", "create", "v"+strconv.Itoa(have), "--size", "1GiB", "--guest", "a", "--dir", p.dir); err != nil {
				return err
			}
		}
		r, err := p.loaded(ctx, o, n, 1)
		if err != nil {
			return err
		}
		rep.Volumes = append(rep.Volumes, r)
	}
	fmt.Printf(heading, "connections")
	for _, n := range []int{1, 4, 16, 64, 256} {
		r, err := p.loaded(ctx, o, n, n)
		if err != nil {
			return err
		}
		rep.Connections = append(rep.Connections, r)
	}
	return nil
}

// loaded measures small requests and prints a line of a table.
func (p *pollux) loaded(ctx context.Context, o options, n, conns int) (r loadScale, err error) {
	r.N = n
	for _, load := range []struct {
		rw  string
		out *sample
	}{{"randwrite", &r.Write}, {"randread", &r.Read}} {
		var runs []sample
		for range o.n {
			m, err := measure(ctx, p, row{RW: load.rw, Block: "4k", Depth: max(1, 16/conns), Conns: conns}, o)
			if err != nil {
				return r, err
			}
			runs = append(runs, m)
		}
		*load.out = median(runs)
	}
	m, err := resident(p.first)
	r.RSS = m["VmRSS"]
	fmt.Printf("| %d | %.0f | %.1f | %.0f | %.1f | %d MiB |\n", n, r.Write.IOPS, r.Write.CPUus, r.Read.IOPS, r.Read.CPUus, r.RSS>>20)
	return r, err
}

// scalePool makes a sparse pool, writes to it, kills its guest and checks it.
func scalePool(ctx context.Context, o options, dir string, size int64) (r poolScale, err error) {
	r.Bytes = size
	p := &pollux{title: "pollux", program: o.pollux, dir: dir, volume: "bench", size: size / 2, poolSize: size, limit: o.guestMemory}
	defer p.stop()
	if err := p.start(ctx); err != nil {
		return r, err
	}
	// A second start, for the first one makes the pool.
	if _, err := output(ctx, time.Minute, p.program, "down", "--dir", dir); err != nil {
		return r, err
	}
	begin := time.Now()
	if _, err := output(ctx, time.Minute, p.program, "up", "--dir", dir, "--detach"); err != nil {
		return r, err
	}
	r.Start = milliseconds(time.Since(begin))
	if err := p.find(ctx); err != nil {
		return r, err
	}
	m, err := resident(p.first)
	if err != nil {
		return r, err
	}
	r.Idle = m["VmRSS"]
	if _, err := load(ctx, p.uri(), size/2, o.runtime+time.Minute, "--rw=randwrite", "--bs=4k", "--iodepth=16", "--time_based", fmt.Sprintf("--runtime=%d", int(o.runtime.Seconds()))); err != nil {
		return r, err
	}
	if m, err = resident(p.first); err != nil {
		return r, err
	}
	r.Written = m["VmRSS"]
	begin = time.Now()
	if _, err := output(ctx, 10*time.Minute, p.program, "check", "--dir", dir); err != nil {
		return r, err
	}
	r.Check = milliseconds(time.Since(begin))
	if err := syscall.Kill(p.first, syscall.SIGKILL); err != nil {
		return r, err
	}
	if r.Takeover, err = p.takeover(ctx); err != nil {
		return r, err
	}
	p.stop()
	return r, os.RemoveAll(dir)
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }

// takeover waits for the other guest to have taken over and returns how long
// its steps took in all, in milliseconds.
func (p *pollux) takeover(ctx context.Context) (float64, error) {
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
			return s.Last.Total, nil
		}
	}
	return 0, fmt.Errorf("nobody took over within 20s")
}
