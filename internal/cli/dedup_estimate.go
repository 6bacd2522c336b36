package cli

import (
	"context"
	"fmt"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/estimate"
)

type dedupEstimateOptions struct {
	*session
	paths     []string
	memory    size
	threshold int
}

func newDedupEstimate(s *session) *cobra.Command {
	o := &dedupEstimateOptions{session: s, memory: 256 << 20}
	c := &cobra.Command{
		Use: "estimate FILE|DEVICE...", Short: "Tell what deduplication would save of files and devices",
		Long: `Read files and block devices and tell what deduplication would save, were each of
them written to a volume, one after the other. Nothing is written, and nothing needs
to run. Holes of files are not read. On a terminal a line tells how far it is.

THN is how many blocks a series must have that is shared with a stored one: the more,
the less is saved, and the fewer seeks it costs to read in sequence. With THN 1 each
duplicate is shared. LLRRM is low-latency random read memory, to which single blocks
of shorter series move once they were received --threshold times beyond the first.

The result is exact as long as --memory has room for some 34 bytes for each block of
4 KiB that is not zero: 256 MiB are enough for 20 GiB. Beyond that, contents are
drawn by their hash, one in so many, and a range is told that has the true value in
19 of 20 cases; LLRRM is then the least that is needed, and may be twice as much.

` + sizeHelp,
		Example: "  pollux dedup estimate /srv/images/*.raw\n  pollux dedup estimate --memory 2GiB --json /dev/vg0/vm1 /dev/vg0/vm2",
		Args: func(c *cobra.Command, got []string) error {
			if len(got) == 0 {
				return usagef("FILE is missing; usage: %s", c.UseLine())
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			o.paths = args
			return o.run(c.Context())
		},
	}
	c.Flags().Var(&o.memory, "memory", "memory to use, beside some 20 MiB of the program itself")
	c.Flags().IntVar(&o.threshold, "threshold", 2, "receptions beyond the first that move a block to LLRRM, 1 to 254")
	s.jsonFlag(c)
	return c
}

func (o *dedupEstimateOptions) run(ctx context.Context) error {
	if o.memory < estimate.MinMemory {
		return usagef("--memory %v is too little: at least %s", &o.memory, humanSize(estimate.MinMemory))
	}
	if o.threshold < 1 || o.threshold > estimate.MaxThreshold {
		return usagef("--threshold %d makes no sense: it is 1 to %d", o.threshold, estimate.MaxThreshold)
	}
	// The heap would grow to twice what is in use, else, before it is cleaned up. The rest
	// is for the index, which does not lie in it.
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(int64(o.memory)/4*3 + 8<<20))
	scanned, err := o.scan(ctx)
	if err != nil {
		return err
	}
	r, err := o.report(ctx, scanned)
	if err != nil {
		return err
	}
	if o.json {
		return o.printJSON(r)
	}
	return o.print(r)
}

func (o *dedupEstimateOptions) scan(ctx context.Context) (*estimate.Scanned, error) {
	step, clear := o.progress("reading")
	defer clear()
	return estimate.Scan(ctx, o.paths, estimate.ScanOptions{Memory: int64(o.memory), Step: step})
}

func (o *dedupEstimateOptions) report(ctx context.Context, scanned *estimate.Scanned) (*estimate.Report, error) {
	step, clear := o.progress("trying policies")
	defer clear()
	return scanned.Report(ctx, o.threshold, step)
}

// progress returns what shows how far a phase is, and what takes that away.
func (o *dedupEstimateOptions) progress(phase string) (step func(done, total int64), clear func()) {
	if !o.watched {
		return nil, func() {}
	}
	l := &progressLine{w: o.err, now: o.now}
	var shown time.Time
	return func(done, total int64) {
		if now := o.now(); now.Sub(shown) >= askEvery {
			shown = now
			l.show(control.CheckProgress{Pool: "estimate", Phase: phase, Done: done, Total: total})
		}
	}, l.clear
}

func (o *dedupEstimateOptions) print(r *estimate.Report) error {
	var all, unread int64
	for _, in := range r.Inputs {
		all += in.Bytes
		unread += in.Unread
	}
	fmt.Fprintf(o.out, "read %s, holes of %s apart: %s of data, and %s of zeroes, which take no space\n",
		humanSize(all-unread), humanSize(unread), humanSize(r.Data), humanSize(r.Zero))
	rows := [][]string{{"THN", "SAVED", "OF DATA", "WITH LLRRM", "OF DATA", "LLRRM"}}
	for _, p := range r.Policies {
		row := []string{strconv.Itoa(p.THN), savedBytes(p.Plain), savedPart(p.Plain, r.Data), "-", "-", "-"}
		if p.THN > 1 { // what is shared always needs none
			llrrm := humanSize(p.WithLLRRM.LLRRM)
			if r.OneIn > 1 {
				llrrm = "at least " + llrrm
			}
			row = append(row[:3], savedBytes(p.WithLLRRM), savedPart(p.WithLLRRM, r.Data), llrrm)
		}
		rows = append(rows, row)
	}
	if err := table(o.out, rows); err != nil {
		return err
	}
	if r.OneIn == 1 {
		_, err := fmt.Fprintln(o.out, "exact: all of the data was followed")
		return err
	}
	_, err := fmt.Fprintf(o.out, "sampled: one content in %d was followed; the ranges have the true value in 19 of 20 cases, and more --memory narrows them\n", r.OneIn)
	return err
}

// savedBytes shows what is saved, or between what it is.
func savedBytes(s estimate.Saving) string {
	if s.Low == s.High {
		return humanSize(s.Saved)
	}
	return humanSize(s.Low) + " to " + humanSize(s.High)
}

// savedPart shows it as a part of the data.
func savedPart(s estimate.Saving, data int64) string {
	percent := func(n int64) string {
		if data == 0 {
			return "0.0"
		}
		return strconv.FormatFloat(100*float64(n)/float64(data), 'f', 1, 64)
	}
	if s.Low == s.High {
		return percent(s.Saved) + "%"
	}
	return percent(s.Low) + " to " + percent(s.High) + "%"
}
