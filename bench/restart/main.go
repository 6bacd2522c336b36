// Command restart measures how fast a guest comes back.
//
//	go run ./bench/restart                        the tables to stdout, all samples to out/restart.json
//	go run ./bench/restart -cache 256MiB          the same with a smaller warm cache
//	go run ./bench/restart -cases own,clean       only some cases; -rounds 1 for a quick look
//	go run ./bench/restart -cases own,takeover -reads 10000 -more 1.25    what is left of the cache
//
// A pair is made whose guest a has a pool of 1 TiB on 64 sparse files and 1,000
// volumes, of which 200 were in use: data were written here and there and read
// again, as much as the cache takes, and every tenth of those volumes shares blocks.
// In each round, one case after the other, beginning with another one each time:
//
//   - own: both guests are killed, and a opens its own pool again; its region is there.
//     Blocks were written right before, so that the log is not empty. A round in which
//     the partner was started sooner, and took both pools, is repeated.
//   - clean: the pair is taken down and brought up again.
//   - takeover: a is killed the same way, and its partner serves the pool.
//   - qemu: qemu-storage-daemon is started with as many exports of sparse files of the
//     same size.
//   - tgt: the same with tgtd, tgtadm and as many logical units of one target.
//
// The clock starts with the process: of guest a, as the agent has recorded it when it
// started it; of the peer. At a takeover it starts with the kill. It is read at two
// moments: when the first read of a volume in use has been answered, with the data that
// were written, and when every export has told its size, each asked with a connection
// of its own, sixteen at a time. What asking alone takes is shown beside it, measured while nothing
// restarts. tgt has a client of its own, iscsi-inq, whose process is part of its times,
// and only the last of its units is asked: until then it is given them one by one.
//
// With -reads, so many blocks are read before each restart of the own guest and each takeover,
// and after it, a few of them much more often than others: how many of them the cache had,
// and how long they took, four at a time over connections that are there already. Before
// that is done first the cache is filled with such reads. With -more the blocks that were
// written do not fit into it.
//
// Steps before the pool is opened are told by the times in the guest's log, in
// milliseconds; the others by the guest itself.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pollux-storage/pollux/bench/stat"
	"github.com/pollux-storage/pollux/internal/config"
)

// What is wanted.
const (
	bootLimit     = 2000.0 // ms until all exports answer, of a conventional boot
	takeoverLimit = 150.0  // ms until the partner has answered the first read
	warmLimit     = 0.99   // of the share of reads that the cache had before
	// Those of a restart by the record of the configuration are only shown.
	fastRead, fastAll = 50.0, 200.0
)

// options are the flags.
type options struct {
	pollux  string
	dir     string
	out     string
	cases   string
	cache   string
	log     string
	rounds  int
	devices int
	volumes int
	used    int
	seed    uint64
	reads   int
	more    float64
	check   bool
	limit   time.Duration
	written int64 // bytes of all volumes in use
}

func main() {
	// Peers die with the thread that started them.
	runtime.LockOSThread()
	var o options
	flag.StringVar(&o.pollux, "pollux", "bin/pollux", "the program to measure")
	flag.StringVar(&o.dir, "dir", "", "where all files are made (default the system's temporary folder)")
	flag.StringVar(&o.out, "out", "out/restart.json", "where the numbers go")
	flag.StringVar(&o.cases, "cases", strings.Join(caseNames, ","), "which cases, with commas")
	flag.StringVar(&o.cache, "cache", "2GiB", "cache of each pool; as much is written and read before, see -more")
	flag.StringVar(&o.log, "log", "", "operation log of each pool (default the program's)")
	flag.IntVar(&o.rounds, "rounds", 5, "rounds of all cases")
	flag.IntVar(&o.devices, "devices", 64, "devices of the pool, which has 1 TiB in all")
	flag.IntVar(&o.volumes, "volumes", 1000, "volumes of the pool, and exports of the peers")
	flag.IntVar(&o.used, "used", 200, "volumes that are in use")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()), "of where is written and read")
	flag.IntVar(&o.reads, "reads", 0, "skewed reads of 4 KiB before and after each restart of the own guest and takeover, to see what of the cache is left")
	flag.Float64Var(&o.more, "more", 1, "how often the cache fits into what is written")
	flag.BoolVar(&o.check, "check", false, "fail when a target is missed")
	flag.DurationVar(&o.limit, "limit", 30*time.Minute, "for everything together")
	flag.Parse()
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "bench/restart:", err)
		os.Exit(1)
	}
}

func run(o options) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeoutCause(ctx, o.limit, fmt.Errorf("it took longer than %v, see -limit: %w", o.limit, context.DeadlineExceeded))
	defer cancel()
	if o.reads < 0 || o.more <= 0 {
		return errors.New("there are no fewer reads than none, and something has to be written")
	}
	if o.rounds < 1 || o.devices < 1 || o.volumes < 1 || o.used < 1 || o.used > o.volumes {
		return errors.New("there must be rounds, devices and volumes, and no more volumes in use than there are")
	}
	names := strings.Split(o.cases, ",")
	for _, n := range names {
		if !slices.Contains(caseNames, n) {
			return fmt.Errorf("there is no case %q: %s are possible", n, strings.Join(caseNames, ", "))
		}
	}
	size, err := config.ParseSize(o.cache)
	if err != nil {
		return fmt.Errorf("-cache: %w", err)
	}
	o.written = int64(float64(size) * o.more)
	if o.pollux, err = filepath.Abs(o.pollux); err != nil {
		return err
	}
	if o.dir, err = os.MkdirTemp(o.dir, "restart-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(o.dir)) }()
	rep := newReport(o)
	if err := measure(ctx, o, names, rep); err != nil {
		return fmt.Errorf("seed %d: %w", o.seed, err)
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
