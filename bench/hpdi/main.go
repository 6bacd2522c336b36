// Command hpdi measures disks of virtual machines: our front-end driver of vhost-user-blk at a
// volume of a pair, at another back-end, and at Pollux's back-end over plain memory, which is
// the ceiling. All have their data in memory. Servers take turns in each round, and what is
// printed is the median of the rounds.
//
// It measures too what a guest takes of a processor with disks attached that nobody uses.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/pollux-storage/pollux/bench/stat"
	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/vhostuser"
	"github.com/pollux-storage/pollux/internal/devbench"
)

type options struct {
	pollux  string
	dir     string
	out     string
	size    int64
	seconds time.Duration
	rounds  int
	idle    time.Duration
	disks   int
	check   bool
	servers string
	rows    string
	profile string
}

func main() {
	var o options
	flag.StringVar(&o.pollux, "pollux", "", "the program; without it no pair is measured")
	flag.StringVar(&o.dir, "dir", "/dev/shm", "where files of servers are: a file system in memory")
	flag.StringVar(&o.out, "out", "out/hpdi.json", "file for the numbers")
	flag.Int64Var(&o.size, "size", 256<<20, "bytes of a disk")
	flag.DurationVar(&o.seconds, "time", time.Second, "how long each row takes at each server in a round")
	flag.IntVar(&o.rounds, "rounds", 3, "rounds")
	flag.DurationVar(&o.idle, "idle", 10*time.Second, "how long idle disks are watched; 0: not at all")
	flag.IntVar(&o.disks, "disks", 32, "idle disks")
	flag.BoolVar(&o.check, "check", false, "fail when something does not reach what is wanted")
	flag.StringVar(&o.servers, "servers", "", "only servers whose names begin with one of these, with commas between")
	flag.StringVar(&o.rows, "rows", "", "only rows whose names have this in them")
	flag.StringVar(&o.profile, "cpuprofile", "", "write a CPU profile of the ceiling's server to this file")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "hpdi:", err)
		os.Exit(1)
	}
}

// row is one way to use a disk.
type row struct {
	name          string
	mode          devbench.Mode
	size          int
	depth, queues int
	want          float64 // times what the best peer does
}

var rows = []row{
	{"4k-randread-1", devbench.RandRead, 4 << 10, 1, 1, 1},
	{"4k-randwrite-1", devbench.RandWrite, 4 << 10, 1, 1, 1},
	{"4k-randread-32", devbench.RandRead, 4 << 10, 32, 1, 1.5},
	{"4k-randwrite-32", devbench.RandWrite, 4 << 10, 32, 1, 1.5},
	{"4k-randread-4x32", devbench.RandRead, 4 << 10, 32, 4, 1},
	{"4k-randwrite-4x32", devbench.RandWrite, 4 << 10, 32, 4, 1},
	{"128k-read-8", devbench.Read, 128 << 10, 8, 1, 1},
	{"128k-write-8", devbench.Write, 128 << 10, 8, 1, 1},
}

// sample is what one run has shown.
type sample struct {
	IOPS   float64 `json:"iops"`
	P50us  float64 `json:"p50_us"`
	P99us  float64 `json:"p99_us"`
	CPUus  float64 `json:"server_cpu_us"` // processor time of the server for a request
	Allocs float64 `json:"allocations"`   // of the front-end for a request
}

// line is a row at a server: the medians of its rounds.
type line struct {
	Row    string   `json:"row"`
	Server string   `json:"server"`
	Median sample   `json:"median"`
	Rounds []sample `json:"rounds"`
}

// report is the file of numbers.
type report struct {
	Machine  string    `json:"machine"`
	When     time.Time `json:"when"`
	Lines    []line    `json:"lines"`
	Verdicts []verdict `json:"verdicts"`
	Idle     *idle     `json:"idle,omitempty"`
}

func run(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp(o.dir, "vub")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	list, err := servers(ctx, o, dir)
	if err != nil {
		return err
	}
	for _, s := range list {
		defer func() { err = errors.Join(err, s.stop(ctx)) }()
		if err := s.start(ctx); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		fmt.Fprintf(os.Stderr, "%s is served by process %d\n", s.name, s.pids()[0])
		if err := fill(ctx, s, o.size); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	r := report{Machine: fmt.Sprintf("%d processors, %s", runtime.NumCPU(), runtime.Version()), When: time.Now()}
	samples := map[string][]sample{}
	for round := range o.rounds {
		for _, row := range rows {
			if !strings.Contains(row.name, o.rows) {
				continue
			}
			for i := range list {
				s := list[(i+round)%len(list)]
				one, err := measure(ctx, s, row, o)
				if err != nil {
					return fmt.Errorf("%s at %s: %w", row.name, s.name, err)
				}
				fmt.Fprintf(os.Stderr, "round %d %-18s %-12s %9.0f/s p50 %7.1f µs\n", round+1, row.name, s.name, one.IOPS, one.P50us)
				samples[row.name+" "+s.name] = append(samples[row.name+" "+s.name], one)
			}
		}
	}
	for _, row := range rows {
		for _, s := range list {
			if all := samples[row.name+" "+s.name]; len(all) > 0 {
				r.Lines = append(r.Lines, line{row.name, s.name, median(all), all})
			}
		}
	}
	r.Verdicts = verdicts(r.Lines)
	for _, s := range list {
		if s.pair != nil && o.idle > 0 {
			if r.Idle, err = watch(ctx, s, o); err != nil {
				return fmt.Errorf("idle disks: %w", err)
			}
		}
	}
	r.print(os.Stdout)
	if err := stat.WriteJSON(o.out, r); err != nil {
		return err
	}
	if o.check {
		return r.missed()
	}
	return nil
}

// open opens a server's disk. While it is measured nobody else is at it.
func open(ctx context.Context, sock string, queues int) (hpdi.Device, error) {
	return vhostuser.Open(ctx, sock, vhostuser.Options{Queues: queues, Poll: 50 * time.Microsecond})
}

// fill writes the whole disk once.
func fill(ctx context.Context, s *server, size int64) error {
	d, err := open(ctx, s.sock, 1)
	if err != nil {
		return err
	}
	_, err = devbench.Run(ctx, d, devbench.Options{Mode: devbench.Write, Size: 1 << 20, Depth: 4, Queues: 1, Requests: size >> 20, Seed: 1})
	return errors.Join(err, d.Close(), s.settle(ctx))
}

func measure(ctx context.Context, s *server, row row, o options) (sample, error) {
	d, err := open(ctx, s.sock, row.queues)
	if err != nil {
		return sample{}, err
	}
	do := func(t time.Duration) (devbench.Result, error) {
		return devbench.Run(ctx, d, devbench.Options{Mode: row.mode, Size: row.size, Depth: row.depth, Queues: row.queues, Time: t, Seed: 2})
	}
	if !row.mode.Writes() {
		// What was written is in a guest's cache only when somebody has read it.
		warm := devbench.Options{Mode: devbench.Read, Size: 1 << 20, Depth: 4, Queues: 1, Requests: o.size >> 20}
		if _, err := devbench.Run(ctx, d, warm); err != nil {
			return sample{}, errors.Join(err, d.Close())
		}
	}
	// Pollers learn how long to look, and pages are mapped.
	if _, err := do(o.seconds / 10); err != nil {
		return sample{}, errors.Join(err, d.Close())
	}
	before, err := cpuTime(s.pids())
	if err != nil {
		return sample{}, errors.Join(err, d.Close())
	}
	var a, b runtime.MemStats
	runtime.ReadMemStats(&a)
	r, err := do(o.seconds)
	runtime.ReadMemStats(&b)
	after, err2 := cpuTime(s.pids())
	if err = errors.Join(err, err2, d.Close(), s.settle(ctx)); err != nil {
		return sample{}, err
	}
	if r.Requests == 0 {
		return sample{}, errors.New("there were no requests")
	}
	n := float64(r.Requests)
	us := func(d time.Duration) float64 { return float64(d) / 1e3 }
	return sample{
		IOPS: n / r.Elapsed.Seconds(), P50us: us(r.P50), P99us: us(r.P99), CPUus: us(after-before) / n,
		// What is allocated once, for memory, queues and histograms, is not a request's.
		Allocs: float64(b.Mallocs-a.Mallocs) / n,
	}, nil
}

// median returns the median of each figure.
func median(all []sample) sample {
	of := func(f func(s sample) float64) float64 {
		v := make([]float64, len(all))
		for i, s := range all {
			v[i] = f(s)
		}
		return stat.Median(v)
	}
	return sample{
		IOPS: of(func(s sample) float64 { return s.IOPS }), P50us: of(func(s sample) float64 { return s.P50us }),
		P99us: of(func(s sample) float64 { return s.P99us }), CPUus: of(func(s sample) float64 { return s.CPUus }),
		Allocs: of(func(s sample) float64 { return s.Allocs }),
	}
}

// chosen reports whether a server is to be measured.
func chosen(name string, o options) bool {
	for _, p := range strings.Split(cmp.Or(o.servers, name), ",") {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

// idle is what disks cost that nobody uses.
type idle struct {
	Disks   int     `json:"disks"`
	Seconds float64 `json:"seconds"`
	Percent float64 `json:"percent_of_a_processor"` // of the guest that serves them
	Before  float64 `json:"percent_without_disks"`  // likewise
}

const idleWanted = 1.0

// watch attaches disks of their own to the pair's guest, each with four queues, and looks at
// its processor time.
func watch(ctx context.Context, s *server, o options) (*idle, error) {
	percent := func() (float64, error) {
		if err := rest(ctx, time.Second); err != nil {
			return 0, err
		}
		before, err := cpuTime(s.pids())
		if err != nil {
			return 0, err
		}
		if err := rest(ctx, o.idle); err != nil {
			return 0, err
		}
		after, err := cpuTime(s.pids())
		return 100 * float64(after-before) / float64(o.idle), err
	}
	r := &idle{Disks: o.disks, Seconds: o.idle.Seconds()}
	var err error
	var open []hpdi.Device
	defer func() {
		for _, d := range open {
			_ = d.Close() // it has done nothing
		}
	}()
	for i := range o.disks {
		name := fmt.Sprintf("idle-%d", i)
		sock, err := s.pair.volume(ctx, name, 64<<20)
		if err != nil {
			return nil, err
		}
		d, err := vhostuser.Open(ctx, sock, vhostuser.Options{Queues: 4, Poll: 50 * time.Microsecond})
		if err != nil {
			return nil, err
		}
		open = append(open, d)
		// A disk that was in use and is not any more.
		if _, err := devbench.Run(ctx, d, devbench.Options{Mode: devbench.RandRead, Size: 4096, Depth: 8, Queues: 4, Time: 50 * time.Millisecond}); err != nil {
			return nil, err
		}
	}
	if err := s.settle(ctx); err != nil {
		return nil, err
	}
	if r.Percent, err = percent(); err != nil {
		return nil, err
	}
	for _, d := range open {
		if err := d.Close(); err != nil {
			return nil, err
		}
	}
	open = nil
	r.Before, err = percent()
	return r, err
}

// rest waits, unless the context ends.
func rest(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// file is a path in a server's directory.
func file(dir, name string) string { return filepath.Join(dir, name) }
