package cli

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/devbench"
)

type hpdiBenchOptions struct {
	*session
	mode     string
	size     size
	depth    int
	queues   int
	time     time.Duration
	requests int64
	span     size
	seed     uint64
	write    bool
	durable  bool
	verify   bool
}

func newHPDIBench(s *session) *cobra.Command {
	o := &hpdiBenchOptions{session: s, size: 4096}
	words := make([]string, 0, len(devbench.Modes))
	for _, m := range devbench.Modes {
		words = append(words, string(m))
	}
	c := &cobra.Command{
		Use: "bench URI", Short: "Measure a device",
		Long: `Keep requests in flight on a device and tell how many it does, how long they take, and
what they cost in processor time of this program. It ends after --time, or after so many
--requests. Each queue has a part of the range to itself.

Modes that write destroy what the device holds, and need --write. A file that another has
under a lock, and a block device that is mounted, are not written to; lock=off in the URI
overrides that. With --verify each
block says where it belongs and which write it is of, and all that was written is read
back at the end.

` + schemeHelp() + "\n\n" + sizeHelp,
		Example: "  pollux hpdi bench uring:/dev/vdb --depth 64 --queues 4\n  pollux hpdi bench mem:?size=1GiB --rw randwrite --write --verify",
		Args:    args("URI"),
		RunE:    func(c *cobra.Command, args []string) error { return o.run(c.Context(), args[0]) },
	}
	f := c.Flags()
	f.StringVar(&o.mode, "rw", string(devbench.RandRead), "what is measured: "+strings.Join(words, ", "))
	f.Var(&o.size, "bs", "bytes of a request")
	f.IntVar(&o.depth, "depth", 32, fmt.Sprintf("requests in flight of a queue, 1 to %d", devbench.MaxDepth))
	f.IntVar(&o.queues, "queues", 1, fmt.Sprintf("queues, each with a thread of its own, 1 to %d", devbench.MaxQueues))
	f.DurationVar(&o.time, "time", 5*time.Second, "how long requests begin; 0s: until --requests are done")
	f.Int64Var(&o.requests, "requests", 0, "how many requests at most; 0: as many as there is time for")
	f.Var(&o.span, "range", "how much of the device is used, from its beginning (default all)")
	f.Uint64Var(&o.seed, "seed", 0, "what places are drawn by; 0: by chance")
	f.BoolVar(&o.write, "write", false, "allow what destroys the contents of the device")
	f.BoolVar(&o.durable, "durable", false, "writes are durable when they complete")
	f.BoolVar(&o.verify, "verify", false, "prove at the end what was written")
	s.jsonFlag(c)
	return c
}

// hpdiBench is a measurement for programs.
type hpdiBench struct {
	URI      string  `json:"uri"`
	Driver   string  `json:"driver"`
	Mode     string  `json:"rw"`
	Size     int64   `json:"bs"`
	Depth    int     `json:"depth"`
	Queues   int     `json:"queues"`
	Seed     uint64  `json:"seed"`
	IOPS     float64 `json:"iops"`
	Rate     float64 `json:"bytes_per_second"`
	Mean     float64 `json:"mean_us"`
	P50      float64 `json:"p50_us"`
	P99      float64 `json:"p99_us"`
	P999     float64 `json:"p99_9_us"`
	Max      float64 `json:"max_us"`
	CPU      float64 `json:"cpu_percent"`        // of one processor
	CPUEach  float64 `json:"cpu_us_per_request"` // of this program
	Requests int64   `json:"requests"`
	Reads    int64   `json:"reads"`
	Writes   int64   `json:"writes"`
	Verified int64   `json:"verified_bytes"`
	Elapsed  float64 `json:"elapsed_ms"`
}

func (o *hpdiBenchOptions) run(ctx context.Context, uri string) error {
	m := devbench.Mode(o.mode)
	if m.Writes() && !o.write {
		return refused(fmt.Sprintf("--rw %s destroys what %s holds", o.mode, uri), "say --write if that is what you want")
	}
	properties := []string{"lock", "on"} // what somebody uses is not to be destroyed
	if !m.Writes() {
		properties = []string{"read-only", "on"}
	}
	if o.seed == 0 {
		o.seed = rand.Uint64()
	}
	d, err := openDevice(ctx, uri, properties...)
	if err != nil {
		return err
	}
	info := d.Info()
	r, err := devbench.Run(ctx, d, devbench.Options{
		Mode: m, Size: int(o.size), Depth: o.depth, Queues: o.queues, Time: o.time, Requests: o.requests,
		Range: int64(o.span), Seed: o.seed, Durable: o.durable, Verify: o.verify,
	})
	if err = closing(d, err); err != nil {
		var wrong *devbench.OptionsError
		switch {
		case errors.Is(err, devbench.ErrWrong):
			err = &statusError{exitProblems, fmt.Errorf("%w (--seed %d repeats it)", err, o.seed)}
		case errors.As(err, &wrong):
			err = usagef("%w", err)
		}
		return err
	}
	seconds := r.Elapsed.Seconds()
	us := func(d time.Duration) float64 { return float64(d) / 1e3 }
	out := hpdiBench{
		URI: uri, Driver: info.Driver, Mode: o.mode, Size: int64(o.size), Depth: o.depth, Queues: o.queues, Seed: o.seed,
		IOPS: float64(r.Requests) / seconds, Rate: float64(r.Bytes) / seconds,
		Mean: us(r.Mean), P50: us(r.P50), P99: us(r.P99), P999: us(r.P999), Max: us(r.Max),
		CPU: 100 * r.CPU.Seconds() / seconds, Requests: r.Requests, Reads: r.Reads, Writes: r.Writes, Verified: r.Verified, Elapsed: us(r.Elapsed) / 1e3,
	}
	if r.Requests > 0 {
		out.CPUEach = us(r.CPU) / float64(r.Requests)
	}
	if o.json {
		return o.printJSON(out)
	}
	return o.print(out)
}

func (o *hpdiBenchOptions) print(b hpdiBench) error {
	us := func(v float64) string { return strconv.FormatFloat(v, 'f', 1, 64) }
	if err := table(o.out, [][]string{
		{"RW", "BS", "DEPTH", "QUEUES", "REQUESTS", "IOPS", "RATE", "P50 µs", "P99 µs", "P99.9 µs", "MAX µs", "CPU", "CPU µs/REQUEST"},
		{b.Mode, humanSize(b.Size), strconv.Itoa(b.Depth), strconv.Itoa(b.Queues), strconv.FormatInt(b.Requests, 10),
			strconv.FormatFloat(b.IOPS, 'f', 0, 64), humanSize(int64(b.Rate)) + "/s", us(b.P50), us(b.P99), us(b.P999), us(b.Max),
			strconv.FormatFloat(b.CPU, 'f', 0, 64) + "%", strconv.FormatFloat(b.CPUEach, 'f', 2, 64)},
	}); err != nil {
		return err
	}
	if o.verify {
		_, err := fmt.Fprintf(o.out, "verified: %s read back as they were written\n", humanSize(b.Verified))
		return err
	}
	return nil
}
