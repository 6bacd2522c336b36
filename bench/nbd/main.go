// Command nbd measures Pollux beside other NBD servers: the same client (fio
// with its nbd engine), Unix sockets, files on the same disk, in turn.
//
//	go run ./bench/nbd                     the table of rows, to stdout and out/bench.json
//	go run ./bench/nbd -copies             how often each server copies a byte of its clients
//	go run ./bench/nbd -memory             memory and latencies of a guest under a long load, and a check
//	go run ./bench/nbd -scale              larger pools, more volumes, more connections
//
// All rows five times take some 20 minutes, and no more than an hour. Every run
// of fio has a time limit of its own, every server is ended by its process
// number, and the working directory is removed.
//
// A row is measured on one server after the other before the next row, and each
// repetition begins with another server. Before its turn a server has nothing
// left to write back, neither in the page cache nor in its log, and is idle; and
// the peers that rely on the page cache have their file in it. Before a cold run
// the page cache is dropped; a second pair, whose cache holds one part in 32 of
// the data set, stands for Pollux.
//
// What the comparison leaves out: the peers acknowledge a write from the page
// cache (or the disk, with direct I/O) of one process that nobody takes over;
// Pollux acknowledges it from memory that a second guest would serve, and its
// numbers include the consistency points that run meanwhile. The page cache's
// own writing to disk costs the peers time only when it falls into a run; it
// is not counted as their CPU, because the kernel does it.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// options are the flags.
type options struct {
	pollux      string
	dir         string
	out         string
	size        int64
	log         int64
	runtime     time.Duration
	n           int
	servers     string
	rows        string
	memory      bool
	scale       bool
	guestMemory string
	pool        string
	copies      bool
	duration    time.Duration
	iops        int
	keep        bool
	timeout     time.Duration
}

func main() {
	// Children die with the thread that started them, see start.
	runtime.LockOSThread()
	var o options
	var size, log string
	flag.StringVar(&o.pollux, "pollux", "bin/pollux", "the program to measure; empty leaves it out")
	flag.StringVar(&o.dir, "dir", "", "where the files of all servers are made, on the disk to be measured (default a new folder in ./out)")
	flag.StringVar(&o.out, "out", "out/bench.json", "where the numbers go")
	flag.StringVar(&size, "size", "1GiB", "data set of each server")
	flag.StringVar(&log, "log", "256MiB", "operation log of each pool, by which the rows of bursts and sustained writes are measured")
	flag.DurationVar(&o.runtime, "runtime", 3*time.Second, "length of each run")
	flag.IntVar(&o.n, "n", 5, "how often each row is measured; the median counts")
	flag.StringVar(&o.servers, "servers", "", "only servers whose names contain one of these words, separated by commas")
	flag.StringVar(&o.rows, "rows", "", "only rows whose names contain one of these words, separated by commas")
	flag.BoolVar(&o.memory, "memory", false, "watch the memory of a guest instead")
	flag.BoolVar(&o.scale, "scale", false, "measure larger pools, more volumes and more connections instead")
	flag.StringVar(&o.guestMemory, "guest-memory", "", "with -scale: the setting `memory` of the pairs with large pools")
	flag.StringVar(&o.pool, "pool", "", "with -scale: only a pool of this size, sparse and then full")
	flag.BoolVar(&o.copies, "copies", false, "count how often each byte is copied instead; needs strace")
	flag.DurationVar(&o.duration, "duration", 10*time.Minute, "with -memory: length of the load")
	flag.IntVar(&o.iops, "iops", 6000, "with -memory: limit of the load, half of it writes; it bounds the disk space that is filled")
	flag.BoolVar(&o.keep, "keep", false, "leave the working directory and its logs")
	flag.DurationVar(&o.timeout, "timeout", 0, "for everything together (default 1h, with -memory and -scale as long as it takes)")
	flag.Parse()
	var err error
	if o.size, err = parseSize(size); err == nil {
		o.log, err = parseSize(log)
	}
	if err == nil {
		err = run(o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/nbd:", err)
		os.Exit(1)
	}
}

func run(o options) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if o.timeout == 0 && !o.memory && !o.scale {
		o.timeout = time.Hour
	}
	if o.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, o.timeout, fmt.Errorf("it took longer than %v, see -timeout: %w", o.timeout, context.DeadlineExceeded))
		defer cancel()
	}
	if o.n < 1 || o.runtime < time.Second || o.size < 64<<20 {
		return fmt.Errorf("-n is at least 1, -runtime at least 1s, -size at least 64MiB")
	}
	if o.dir == "" {
		o.dir = "out"
	}
	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(o.dir, "nbd-")
	if err != nil {
		return err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	if !o.keep {
		defer func() { _ = os.RemoveAll(dir) }() // only files of ours
	}
	if o.pollux != "" {
		if o.pollux, err = filepath.Abs(o.pollux); err != nil {
			return err
		}
	}
	switch {
	case o.memory:
		return watchMemory(ctx, o, dir)
	case o.copies:
		return countCopies(ctx, o, dir)
	case o.scale:
		return scale(ctx, o, dir)
	}
	return compare(ctx, o, dir)
}

// parseSize reads a number with KiB, MiB or GiB behind it.
func parseSize(s string) (int64, error) {
	var n int64
	var unit string
	if _, err := fmt.Sscanf(s, "%d%s", &n, &unit); err != nil && unit != "" {
		return 0, fmt.Errorf("size %q: %w", s, err)
	}
	shift, ok := map[string]uint{"": 0, "B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}[unit]
	if !ok || n <= 0 || n > 1<<60>>shift {
		return 0, fmt.Errorf("size %q: use a number with KiB, MiB or GiB behind it", s)
	}
	return n << shift, nil
}

// chosen reports whether name contains one of the words of a list.
func chosen(name, list string) bool {
	if list == "" {
		return true
	}
	for _, w := range strings.Split(list, ",") {
		if strings.Contains(name, strings.TrimSpace(w)) {
			return true
		}
	}
	return false
}
