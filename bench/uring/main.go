// Command uring compares the io_uring driver with fio's, on the same file:
//
//	go run ./bench/uring
//
// Both have memory and file registered, the same depth, and direct I/O where there is any.
// They are measured in turn, row by row, and each time another begins. What is compared is
// medians of requests a second. Of the driver the processor time of a request is told too,
// that of the kernel's threads for it included; what fio tells of itself is not the same.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/pollux-storage/pollux/bench/counting"
	"github.com/pollux-storage/pollux/bench/fio"
	"github.com/pollux-storage/pollux/bench/stat"
	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/devbench"
)

type options struct {
	dir, memory, out, rows string
	size                   uint64
	rounds                 int
	window                 time.Duration
	batch                  bool
	file                   file.Options
}

func main() {
	o := options{file: file.Options{Engine: file.EngineURing}}
	flag.StringVar(&o.dir, "dir", ".", "folder on a file system with direct I/O, for the file of some rows")
	flag.StringVar(&o.memory, "memory", "/dev/shm", "folder on a file system in memory, for the file of the other rows")
	flag.StringVar(&o.out, "out", "out/uring.json", "file for all numbers")
	flag.StringVar(&o.rows, "row", "", "measure only rows of which the name matches this pattern, such as 'disk*'")
	counting.SizeFlag(&o.size, "size", "512MiB", "size of the files")
	flag.IntVar(&o.rounds, "rounds", 5, "how often each row is measured")
	flag.DurationVar(&o.window, "window", 2*time.Second, "how long each time")
	flag.BoolVar(&o.batch, "batch", false, "hand over what can be handed over with one call, as fio does not unless it is told to")
	flag.DurationVar(&o.file.Poll, "poll", 0, "how long the driver looks for results at most before it sleeps")
	flag.BoolVar(&o.file.Block, "block", true, "whether the driver waits in the kernel; there is nothing else to do here")
	flag.BoolVar(&o.file.Thread, "thread", true, "whether the driver's queue is bound to the thread that measures, as fio's is")
	flag.StringVar((*string)(&o.file.Fixed), "fixed", string(file.FixedAuto), "auto or off: whether the driver registers memory and file")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "uring:", err)
		os.Exit(1)
	}
}

// row is a load, and what it has shown.
type row struct {
	Name   string `json:"name"`
	op     hpdi.Op
	memory bool
	bytes  int // of a request
	depth  int
	linear bool

	Ours  side    `json:"ours"`
	Fio   side    `json:"fio"`
	Ratio float64 `json:"ratio"` // of requests a second, ours to fio's
}

// side is what one of the two has done, each time.
type side struct {
	IOPS []float64 `json:"iops"`
	CPU  []float64 `json:"cpu_us,omitempty"` // a request
}

func rows() []*row {
	var all []*row
	for _, memory := range []bool{false, true} {
		where := "disk"
		if memory {
			where = "memory"
		}
		for _, r := range []row{
			{op: hpdi.OpRead, bytes: 4 << 10, depth: 1},
			{op: hpdi.OpRead, bytes: 4 << 10, depth: 32},
			{op: hpdi.OpWrite, bytes: 4 << 10, depth: 1},
			{op: hpdi.OpWrite, bytes: 4 << 10, depth: 32},
			{op: hpdi.OpRead, bytes: 128 << 10, depth: 8, linear: true},
			{op: hpdi.OpWrite, bytes: 128 << 10, depth: 8, linear: true},
		} {
			order := "random"
			if r.memory = memory; r.linear {
				order = "sequential"
			}
			r.Name = fmt.Sprintf("%s %s %s %d KiB depth %d", where, order, r.op, r.bytes>>10, r.depth)
			all = append(all, &r)
		}
	}
	return all
}

func run(ctx context.Context, o options) (err error) {
	if _, err := exec.LookPath("fio"); err != nil {
		return err
	}
	if err := o.file.Validate(); err != nil {
		return err
	}
	paths := map[bool]string{}
	for memory, dir := range map[bool]string{false: o.dir, true: o.memory} {
		dir, err := os.MkdirTemp(dir, "uring-")
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
		paths[memory] = filepath.Join(dir, "file")
		if err := file.Create(paths[memory], int64(o.size)); err != nil {
			return err
		}
		if err := fill(paths[memory]); err != nil {
			return err
		}
	}
	var done []*row
	for _, r := range rows() {
		if match, err := filepath.Match(o.rows, r.Name); err != nil {
			return err
		} else if o.rows != "" && !match {
			continue
		}
		for round := range o.rounds {
			for turn := range 2 {
				var iops, cpu float64
				s, measure := &r.Ours, r.ours
				if (round+turn)%2 == 1 {
					s, measure = &r.Fio, r.fio
				}
				if iops, cpu, err = measure(ctx, o, paths[r.memory]); err != nil {
					return fmt.Errorf("%s: %w", r.Name, err)
				}
				s.IOPS = append(s.IOPS, iops)
				if cpu > 0 {
					s.CPU = append(s.CPU, cpu)
				}
			}
		}
		r.Ratio = stat.Median(r.Ours.IOPS) / stat.Median(r.Fio.IOPS)
		done = append(done, r)
	}
	if err := print(done); err != nil {
		return err
	}
	return stat.WriteJSON(o.out, done)
}

func print(rows []*row) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "row\tours\tfio\tratio\tCPU")
	for _, r := range rows {
		fmt.Fprintf(w, "%s\t%.0f/s\t%.0f/s\t%.2f\t%.1f µs\n", r.Name,
			stat.Median(r.Ours.IOPS), stat.Median(r.Fio.IOPS), r.Ratio, stat.Median(r.Ours.CPU))
	}
	return w.Flush()
}

// fio measures fio, but for its processor time.
func (r *row) fio(ctx context.Context, o options, path string) (iops, cpu float64, err error) {
	rw := map[bool]string{false: "rand", true: ""}[r.linear] + r.op.String()
	direct := "1"
	if r.memory {
		direct = "0"
	}
	res, err := fio.Run(ctx, o.window+time.Minute, "--name=row", "--ioengine=io_uring", "--fixedbufs", "--registerfiles",
		"--filename="+path, fmt.Sprintf("--size=%d", o.size), "--rw="+rw, fmt.Sprintf("--bs=%d", r.bytes), fmt.Sprintf("--iodepth=%d", r.depth),
		"--direct="+direct, "--invalidate=0", "--overwrite=1", "--time_based", fmt.Sprintf("--runtime=%dms", o.window.Milliseconds()))
	if err != nil {
		return 0, 0, err
	}
	s := res.Read
	if r.op == hpdi.OpWrite {
		s = res.Write
	}
	if s.IOPS == 0 {
		return 0, 0, errors.New("fio has done nothing")
	}
	return s.IOPS, 0, nil
}

// ours measures the driver, in this process.
func (r *row) ours(ctx context.Context, o options, path string) (iops, cpu float64, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	opts := o.file
	opts.Direct = file.DirectOn
	if r.memory {
		opts.Direct = file.DirectOff
	}
	d, err := file.Open(path, opts)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	mem, err := hpdi.Alloc(r.depth * r.bytes)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, hpdi.Free(mem)) }()
	for i := range mem {
		mem[i] = byte(i * 7)
	}
	if err := d.Register(mem); err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, d.Unregister(mem)) }()
	q, err := d.NewQueue(r.depth)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, q.Close()) }()
	if note := d.Info().Note; note != "" && opts.Fixed != file.FixedOff {
		return 0, 0, fmt.Errorf("the driver is not what is to be measured: %s", note)
	}
	runtime.GC()
	before, began := devbench.CPU(), time.Now()
	n, err := r.drive(ctx, q, mem, d.Info().Size, began.Add(o.window), o.batch)
	if err != nil {
		return 0, 0, err
	}
	took, spent := time.Since(began), devbench.CPU()-before
	return float64(n) / took.Seconds(), spent.Seconds() / float64(n) * 1e6, nil
}
