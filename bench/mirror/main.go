// Command mirror measures what keeping copies costs:
//
//	go run ./bench/mirror -pollux bin/pollux
//
// Two pairs are alike but for the copies of their pools, which are files. They
// are measured in turn, row by row. Writes are several times the log, and a run ends
// when all is on the devices, so that the numbers are of devices and not of memory. The files share one disk here, and so do the copies: a mirror can
// write at best half as fast.
//
// Then one copy of the mirrored pool is away while clients write, and comes back;
// is replaced; and clients that write at a fixed rate, and verify what they have
// written, are watched with and without a copy being filled.
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
	"syscall"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/pollux-storage/pollux/bench/counting"
	"github.com/pollux-storage/pollux/bench/fio"
	"github.com/pollux-storage/pollux/bench/stat"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
)

type options struct {
	pollux, out string
	size        uint64
	rounds      int
	rate        int
	window      time.Duration
}

func main() {
	var o options
	flag.StringVar(&o.pollux, "pollux", "bin/pollux", "the program")
	flag.StringVar(&o.out, "out", "out/mirror.json", "file for all numbers")
	counting.SizeFlag(&o.size, "size", "10GiB", "data of the mirrored pool")
	flag.IntVar(&o.rounds, "rounds", 5, "how often each row is measured")
	flag.IntVar(&o.rate, "rate", 1000, "writes a second of the clients that are watched")
	flag.DurationVar(&o.window, "window", 10*time.Second, "how long clients are watched at a time")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "mirror:", err)
		os.Exit(1)
	}
}

// report is what goes to the JSON file.
type report struct {
	Rows       []row      `json:"rows"`
	Resilvers  []resilver `json:"resilvers"`
	Alone      []latency  `json:"clients_alone"`
	Resilvered []latency  `json:"clients_beside_a_resilver"`
}

func run(ctx context.Context, o options) (err error) {
	bin, err := filepath.Abs(o.pollux)
	if err != nil {
		return err
	}
	if _, err := exec.LookPath("fio"); err != nil {
		return err
	}
	var rep report
	var rigs []*rig
	defer func() {
		for _, r := range rigs {
			err = errors.Join(err, r.Remove(context.WithoutCancel(ctx)))
		}
	}()
	for _, copies := range []int{1, 2} {
		r, err := start(ctx, bin, copies, int64(o.size))
		if r != nil {
			rigs = append(rigs, r)
		}
		if err != nil {
			return err
		}
	}
	if rep.Rows, err = compare(ctx, o, rigs); err != nil {
		return err
	}
	if err := rigs[1].resilvers(ctx, o, &rep); err != nil {
		return err
	}
	return stat.WriteJSON(o.out, rep)
}

// rig is a running pair with one full volume.
type rig struct {
	*pair.Pair
	copies int
	size   int64
	uri    string
}

const (
	logSize   = 64 << 20
	cacheSize = 64 << 20
)

// start makes a pair whose pools keep so many copies, and fills a volume.
func start(ctx context.Context, bin string, copies int, size int64) (*rig, error) {
	p, err := pair.New(bin, "", pair.Settings{Log: humanize.IBytes(logSize), Cache: humanize.IBytes(cacheSize), PoolSize: fmt.Sprint(size*5/4 + 1<<30), Copies: copies})
	if err != nil {
		return nil, err
	}
	r := &rig{Pair: p, copies: copies, size: size}
	if err := p.Up(ctx); err != nil {
		return r, err
	}
	if _, err := p.Do(ctx, "volume", "create", "bench", "--size", fmt.Sprint(size), "--guest", "a"); err != nil {
		return r, err
	}
	e, err := p.Export(ctx, "bench")
	if err != nil {
		return r, err
	}
	r.uri = e.NBDUnix
	if err := fio.Fill(ctx, r.uri, size); err != nil {
		return r, err
	}
	return r, r.settled(ctx)
}

// settled waits until all is on the devices.
func (r *rig) settled(ctx context.Context) error {
	return r.Until(ctx, 2*time.Minute, func(st control.Status) string {
		for _, g := range st.Guests {
			for _, s := range g.PoolStats {
				if s.Dirty > 0 {
					return fmt.Sprintf("%d bytes of pool %s are not on its devices", s.Dirty, s.Name)
				}
			}
		}
		return ""
	})
}
