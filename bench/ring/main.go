// Command ring measures requests over a ring in shared memory between two processes, on a
// device in memory: the round trip of one request, and how many there are a second with 32 in
// flight, when both sides only look, when both sleep, and when they look as long as that pays;
// and what a ring costs that nobody uses.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/bench/stat"
	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/hpdi/ring"
)

func main() {
	serve := flag.String("serve", "", "used by the program itself: be the back-end at this socket")
	poll := flag.Duration("poll", 0, "used by the program itself: how long the back-end looks")
	took := flag.Duration("time", time.Second, "how long each measurement takes")
	rounds := flag.Int("rounds", 5, "how many there are of each, of which the median counts")
	out := flag.String("out", "out/ring.json", "file for the results")
	flag.Parse()
	var err error
	if *serve != "" {
		err = backEnd(*serve, *poll)
	} else {
		err = measure(*took, *rounds, *out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "ring:", err)
		os.Exit(1)
	}
}

const deviceBytes = 64 << 20

// backEnd serves until it is killed.
func backEnd(path string, poll time.Duration) error {
	dev, err := mem.New("memory", deviceBytes)
	if err != nil {
		return err
	}
	s, err := ring.NewServer(dev, ring.ServeOptions{Poll: poll})
	if err != nil {
		return err
	}
	l, err := ring.Listen(path)
	if err != nil {
		return err
	}
	return s.Serve(l)
}

// ways are how the sides wait.
var ways = []struct {
	name string
	poll time.Duration
}{
	{"both only look", 10 * time.Second},
	{"as long as it pays (50 µs)", 50 * time.Microsecond},
	{"both sleep", 0},
}

// load is what is asked for.
type load struct {
	name  string
	op    hpdi.Op
	bytes int
	depth int
}

var loads = []load{
	{"flush, depth 1", hpdi.OpFlush, 0, 1},
	{"4 KiB read, depth 1", hpdi.OpRead, 4 << 10, 1},
	{"4 KiB write, depth 1", hpdi.OpWrite, 4 << 10, 1},
	{"4 KiB read, depth 32", hpdi.OpRead, 4 << 10, 32},
	{"4 KiB write, depth 32", hpdi.OpWrite, 4 << 10, 32},
	{"128 KiB read, depth 8", hpdi.OpRead, 128 << 10, 8},
}

// row is a result: medians over the rounds.
type row struct {
	Way    string  `json:"way"`
	Load   string  `json:"load"`
	P50    float64 `json:"p50_us"`
	P99    float64 `json:"p99_us"`
	Second float64 `json:"requests_per_second"`
	Allocs float64 `json:"allocations_per_request"`
}

func measure(took time.Duration, rounds int, out string) error {
	dir, err := os.MkdirTemp("", "pollux-ring-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	var rows []row
	all := map[string][]row{}
	for round := range rounds {
		for _, w := range ways {
			path := filepath.Join(dir, fmt.Sprintf("%d-%d", round, w.poll))
			got, err := one(exe, path, w.poll, took)
			if err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			for _, r := range got {
				r.Way = w.name
				all[r.Way+r.Load] = append(all[r.Way+r.Load], r)
			}
		}
	}
	fmt.Printf("| request | sides | p50, µs | p99, µs | requests/s | allocations |\n|---|---|--:|--:|--:|--:|\n")
	for _, l := range loads {
		for _, w := range ways {
			r := median(all[w.name+l.name])
			rows = append(rows, r)
			fmt.Printf("| %s | %s | %.2f | %.2f | %.0f | %.3f |\n", r.Load, r.Way, r.P50, r.P99, r.Second, r.Allocs)
		}
	}
	idle, err := idleCost(exe, filepath.Join(dir, "idle"))
	if err != nil {
		return err
	}
	fmt.Printf("\n32 rings of 4 queues that nobody uses: the back-end takes %.3f %% of a processor\n", idle)
	return stat.WriteJSON(out, map[string]any{"rows": rows, "idle_percent": idle})
}

func median(rows []row) row {
	pick := func(of func(row) float64) float64 {
		var v []float64
		for _, r := range rows {
			v = append(v, of(r))
		}
		return stat.Median(v)
	}
	m := rows[0]
	m.P50 = pick(func(r row) float64 { return r.P50 })
	m.P99 = pick(func(r row) float64 { return r.P99 })
	m.Second = pick(func(r row) float64 { return r.Second })
	m.Allocs = pick(func(r row) float64 { return r.Allocs })
	return m
}

// start starts a back-end, and connects.
func start(exe, path string, poll time.Duration) (*exec.Cmd, func(queues int) (hpdi.Device, error), error) {
	cmd := exec.Command(exe, "-serve", path, "-poll", poll.String())
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	connect := func(queues int) (d hpdi.Device, err error) {
		for range 1000 {
			if d, err = ring.Open(context.Background(), path, ring.Options{Queues: queues, Poll: poll}); err == nil {
				return d, nil
			}
			time.Sleep(5 * time.Millisecond)
		}
		return nil, err
	}
	return cmd, connect, nil
}

func one(exe, path string, poll, took time.Duration) (rows []row, err error) {
	cmd, connect, err := start(exe, path, poll)
	if err != nil {
		return nil, err
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	d, err := connect(1)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	for _, l := range loads {
		r, err := run(d, l, took)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", l.name, err)
		}
		rows = append(rows, r)
	}
	return rows, nil
}

// run keeps requests in flight for a time.
func run(d hpdi.Device, l load, took time.Duration) (row, error) {
	q, err := d.NewQueue(l.depth)
	if err != nil {
		return row{}, err
	}
	defer q.Close()
	buf, err := hpdi.Alloc(max(l.depth*l.bytes, 4096))
	if err != nil {
		return row{}, err
	}
	defer hpdi.Free(buf)
	type timed struct {
		hpdi.Request
		at time.Time
	}
	all := make([]timed, l.depth)
	next := make([]*hpdi.Request, 0, l.depth)
	for i := range all {
		r := &all[i]
		r.Request = hpdi.Request{Op: l.op, User: r}
		if l.bytes > 0 {
			r.Vec = [][]byte{buf[i*l.bytes : (i+1)*l.bytes]}
		}
		next = append(next, &r.Request)
	}
	samples := make([]float64, 0, 1<<20)
	var before, after runtime.MemStats
	requests := 0
	random := uint64(1)
	phase := func(d time.Duration, keep bool) error {
		for began := time.Now(); ; {
			now := time.Now()
			if now.Sub(began) > d {
				return nil
			}
			for _, r := range next {
				r.User.(*timed).at = now
				if l.bytes > 0 {
					random = random*6364136223846793005 + 1442695040888963407
					r.Offset = int64(random>>33) % int64(deviceBytes/l.bytes) * int64(l.bytes)
				}
			}
			if err := q.Submit(next...); err != nil {
				return err
			}
			if next, err = q.Wait(1, next[:0]); err != nil {
				return err
			}
			now = time.Now()
			for _, r := range next {
				if r.Err != nil {
					return r.Err
				}
				if keep {
					requests++
					if len(samples) < cap(samples) {
						samples = append(samples, float64(now.Sub(r.User.(*timed).at))/1e3)
					}
				}
			}
		}
	}
	if err := phase(took/10, false); err != nil {
		return row{}, err
	}
	runtime.ReadMemStats(&before)
	began := time.Now()
	if err := phase(took, true); err != nil {
		return row{}, err
	}
	lasted := time.Since(began)
	runtime.ReadMemStats(&after)
	if requests == 0 {
		return row{}, fmt.Errorf("no request has completed within %v", took)
	}
	return row{
		Load: l.name, P50: stat.Rank(samples, 50), P99: stat.Rank(samples, 99), Second: float64(requests) / lasted.Seconds(),
		Allocs: float64(after.Mallocs-before.Mallocs) / float64(requests),
	}, nil
}

// idleCost returns how much of a processor a back-end takes whose rings nobody uses, in
// percent.
func idleCost(exe, path string) (float64, error) {
	cmd, connect, err := start(exe, path, 50*time.Microsecond)
	if err != nil {
		return 0, err
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	for range 32 {
		d, err := connect(4)
		if err != nil {
			return 0, err
		}
		defer d.Close()
	}
	const watched = 3 * time.Second
	before, err := processorTime(cmd.Process.Pid)
	if err != nil {
		return 0, err
	}
	time.Sleep(watched)
	after, err := processorTime(cmd.Process.Pid)
	if err != nil {
		return 0, err
	}
	return 100 * float64(after-before) / float64(watched), nil
}

// processorTime returns what all threads of a process have run so far.
func processorTime(pid int) (time.Duration, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil {
		return 0, err
	}
	var sum time.Duration
	for _, t := range tasks {
		b, err := os.ReadFile(t)
		if err != nil {
			continue // the thread has ended
		}
		var ns int64
		if _, err := fmt.Sscan(strings.TrimSpace(string(b)), &ns); err != nil {
			return 0, fmt.Errorf("%s: %w", t, err)
		}
		sum += time.Duration(ns)
	}
	return sum, nil
}
