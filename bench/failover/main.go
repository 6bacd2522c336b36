// Command failover measures how long a client waits when a guest fails.
//
//	go run ./bench/failover                 the tables to stdout, all samples to out/failover.json
//	go run ./bench/failover -log 2GiB       the same with regions of that size
//	go run ./bench/failover -huge=false     the same with regions of small pages
//
// A probe writes and reads 4 KiB blocks of one volume over a unix socket, one
// request at a time, and compares what it reads with what it wrote. In each
// round the guest that serves the volume is hurt at a random moment, and the
// pause is the time from the last reply before the fault to the first reply
// after it, as the probe sees them.
//
// Guest a is taken over first, guest b is started again first (-policies), and both
// are hurt by turns; clients of the other one rest meanwhile. What was taken over is
// given back by command when the failed guest has come back, so that each round
// begins alike. Log, cache, hang timeout and the first wait before a restart are the
// defaults; only repeated restarts are quicker and never given up, and each failure
// is the first, because a pair that fails a hundred times is not expected to.
//
// The cases:
//
//   - kill: SIGKILL.
//   - hang: SIGSTOP. Nothing tells the pair; the heartbeat stands still until
//     the hang timeout, and the fence kills the guest.
//   - busy: SIGKILL, while a second client keeps sixteen random 4 KiB writes in
//     flight to another volume of the same guest. It runs in the process of
//     the probe and competes with it for processors.
//   - qemu: SIGKILL, with an unmodified QEMU NBD client (qemu-storage-daemon
//     with reconnect-delay=10) between probe and pair. The probe's connection
//     to QEMU holds; the pause is the longest silence on it.
//   - giveback: the planned return after each kill.
//
// The probe's own client connects again every millisecond. What a client with
// another habit sees is its habit, and the qemu case shows that of QEMU.
//
// The steps are those that the pair itself reports with each takeover; they
// begin when the end or hang of a guest was noticed. Percentiles are the
// nearest rank: p99 of fewer than 100 rounds is the maximum.
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
	"strings"
	"syscall"
	"time"

	"github.com/pollux-storage/pollux/bench/stat"
	"github.com/pollux-storage/pollux/bench/through"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/test/pair"
)

// What the project promises; see -check.
const (
	killLimit    = 100 * time.Millisecond  // 99th percentile
	restartLimit = 80 * time.Millisecond   // the same where the guest is started again first
	hangLimit    = 1500 * time.Millisecond // maximum
)

// options are the flags.
type options struct {
	pollux   string
	dir      string
	out      string
	log      string
	rounds   int
	hangs    int
	busy     int
	qemu     int
	seed     uint64
	tcp      bool
	check    bool
	huge     bool
	placed   bool
	limit    time.Duration
	policies string
}

func main() {
	// QEMU dies with the thread that started it, see through.Start.
	runtime.LockOSThread()
	var o options
	flag.StringVar(&o.pollux, "pollux", "bin/pollux", "the program to measure")
	flag.StringVar(&o.dir, "dir", "", "where the pair's folder is made (default the system's temporary folder)")
	flag.StringVar(&o.out, "out", "out/failover.json", "where the numbers go")
	flag.StringVar(&o.log, "log", "", "operation log of each pool, for example 2GiB (default the program's)")
	flag.IntVar(&o.rounds, "rounds", 100, "rounds of SIGKILL")
	flag.IntVar(&o.hangs, "hangs", 10, "rounds of SIGSTOP")
	flag.IntVar(&o.busy, "busy", 20, "rounds of SIGKILL under full load")
	flag.IntVar(&o.qemu, "qemu", 20, "rounds of SIGKILL with QEMU's NBD client")
	flag.StringVar(&o.policies, "policies", config.TakeoverFirst+","+config.RestartFirst, "what comes first when a guest fails; several by turns, with commas")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()), "of the moments of the faults and of the load")
	flag.BoolVar(&o.tcp, "tcp", false, "connect over TCP instead of unix sockets")
	flag.BoolVar(&o.placed, "placed", false, "write the pool's file before, as a block device has no holes")
	flag.BoolVar(&o.check, "check", true, "fail when the pauses are longer than promised")
	flag.BoolVar(&o.huge, "huge", true, "huge pages for the regions, where the pair would take them; -huge=false shows the pause without them")
	flag.DurationVar(&o.limit, "limit", 30*time.Minute, "for everything together")
	flag.Parse()
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "bench/failover:", err)
		os.Exit(1)
	}
}

func run(o options) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeoutCause(ctx, o.limit, fmt.Errorf("it took longer than %v, see -limit: %w", o.limit, context.DeadlineExceeded))
	defer cancel()
	if min(o.rounds, o.hangs, o.busy, o.qemu) < 0 || o.rounds+o.hangs+o.busy+o.qemu == 0 {
		return errors.New("numbers of rounds are 0 or more, and not all 0")
	}
	if o.qemu > 0 {
		if _, err := exec.LookPath(through.QEMU); err != nil {
			return fmt.Errorf("%w: install it with `make deps`, or leave the case out with -qemu 0", err)
		}
	}
	bin, err := filepath.Abs(o.pollux)
	if err != nil {
		return err
	}
	rep := newReport(ctx, bin, o)
	if err := measure(ctx, o, bin, rep); err != nil {
		return err
	}
	rep.finish()
	rep.print(os.Stdout)
	if err := stat.WriteJSON(o.out, rep); err != nil {
		return err
	}
	if o.check {
		return rep.judge()
	}
	return nil
}

// measure runs a pair from up to down, and all cases in between.
func measure(ctx context.Context, o options, bin string, rep *report) (err error) {
	size := "32GiB"
	if o.placed {
		size = fmt.Sprint(placedSize)
	}
	b := &bench{options: o, report: rep}
	set := pair.Settings{Log: o.log, PoolSize: size, Policies: map[string]string{}, Failover: []string{
		"giveback_delay: -1s", "restart_max: 500ms", "crash_limit: 1000000", "crash_window: 1ms",
	}}
	for _, policy := range strings.Split(o.policies, ",") {
		s, ok := sides[policy]
		if !ok {
			return fmt.Errorf("-policies: %q is neither %s nor %s", policy, config.TakeoverFirst, config.RestartFirst)
		}
		b.sides = append(b.sides, s)
		set.Policies[s.guest] = policy
	}
	p, err := pair.New(bin, o.dir, set)
	if err != nil {
		return err
	}
	b.pair = p
	defer func() {
		switch cause := context.Cause(ctx); {
		case cause != nil:
			err = cause // whatever else failed, failed because of it
		case err != nil:
			err = fmt.Errorf("seed %d: %w\n%s", o.seed, err, p.Logs(25))
		}
		// Also after an interrupt nothing may stay behind.
		down, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, p.Remove(down))
	}()
	if !o.huge {
		if err := smallPages(p.Dir); err != nil {
			return err
		}
	}
	if o.placed {
		for _, s := range b.sides {
			if err := pair.PlaceFile(filepath.Join(p.Dir, "pool-"+s.guest+".img"), placedSize, nil); err != nil {
				return err
			}
		}
	}
	if err := p.Up(ctx); err != nil {
		return err
	}
	if rep.Region, rep.HugePages, err = regions(ctx, p, o); err != nil {
		return err
	}
	for _, c := range b.cases() {
		if err := b.run(ctx, c); err != nil {
			return fmt.Errorf("case %s: %w", c.name, err)
		}
	}
	if _, err := p.Check(ctx); err != nil {
		return fmt.Errorf("after all rounds: %w", err)
	}
	return nil
}

// placedSize is the size of a pool whose file is written before it is made.
const placedSize = 16 << 30
