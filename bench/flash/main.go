// Command flash measures the policy of the flash layer in virtual time: which data sets of a
// disk it brings to flash, beside no flash, a cache of the same size that keeps what was used
// last, and an oracle that knows the accesses of each window before they come.
//
//	go run ./bench/flash
//
// The disk is the modelled one of package blocktest, flash a fixed time an access. A
// workload is collected for half of its time without flash; from that the rest is predicted,
// and then measured. A request waits for no other, nor for moves, so that times are those of
// an idle device.
//
// How long clients wait beside moves is measured apart, with requests that wait for each
// other, on the modelled disk and the modelled flash drive.
//
// All numbers go to a JSON file. It fails when something that is wanted is
// missed; the output tells what.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/pollux-storage/pollux/bench/stat"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

type options struct {
	out    string
	seed   uint64
	params string
	only   string
	scale  scale
	part   int // of the time that clients wait beside moves
}

// latencies is the name of what is no workload: how long clients wait beside moves.
const latencies = "latency"

// results are all numbers.
type results struct {
	Workloads []*outcome
	Latencies []*latency
}

// errMissed says that what was wanted is not reached; the output tells what.
var errMissed = errors.New("not all is as it should be")

func main() {
	var o options
	flag.StringVar(&o.out, "out", "out/flash.json", "file for all numbers")
	flag.Uint64Var(&o.seed, "seed", 1, "what is random is drawn from it")
	flag.StringVar(&o.params, "params", "", "file with parameters of the policy, instead of the defaults")
	flag.StringVar(&o.only, "only", "", "the one workload to measure; "+latencies+" is what clients wait beside moves")
	flag.IntVar(&o.scale.sets, "sets", 4096, "data sets of the disk, of 256 KiB each")
	flag.IntVar(&o.scale.rate, "rate", 32_000, "requests in a window, about")
	flag.IntVar(&o.scale.half, "windows", 72, "windows that are collected, and then as many with flash; a day of them has a scan at its end")
	flag.Parse()
	o.part = 1
	o.scale.setBytes, o.scale.day, o.scale.stay = 256*kib, o.scale.half, 12
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "flash:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	var text []byte
	if o.params != "" {
		var err error
		if text, err = os.ReadFile(o.params); err != nil {
			return err
		}
	}
	p, err := policy.Parse(text)
	if err != nil {
		return err
	}
	o.scale.window = p.Collect.Window
	p.Collect.HistoryWindows = max(p.Collect.HistoryWindows, o.scale.half)
	var all results
	for i := range workloads {
		w := &workloads[i]
		if o.only != "" && o.only != w.name {
			continue
		}
		begun := time.Now()
		one, err := measure(ctx, w, o.scale, o.seed, p)
		if err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		fmt.Fprintf(os.Stderr, "%s: %v\n", w.name, time.Since(begun).Round(time.Second))
		all.Workloads = append(all.Workloads, one)
	}
	if o.only == "" || o.only == latencies {
		if all.Latencies, err = measureLatencies(ctx, o.part, o.seed, p.Budget); err != nil {
			return err
		}
	}
	if len(all.Workloads)+len(all.Latencies) == 0 {
		return fmt.Errorf("there is no workload %q", o.only)
	}
	good := print(all.Workloads)
	good = printLatencies(all.Latencies) && good
	if err := stat.WriteJSON(o.out, all); err != nil {
		return err
	}
	if !good {
		return errMissed
	}
	return nil
}
