package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

func newPoolScrub(s *session) *cobra.Command {
	c := group("scrub", "", "Read and prove everything that a pool has in use",
		`A scrub reads every block of data and metadata that a pool has in use, from every
copy, and proves it by its checksum, beside the clients and at the rate of the
settings. A copy that is bad is repaired from one that is good. Where no copy is
good it names the volume and the block. Scrubs begin by themselves when the settings
say so, and go on after a takeover where they were.`)
	add := func(action, short string) {
		o := &poolScrubOptions{session: s, action: action}
		sub := &cobra.Command{Use: action + " NAME", Short: short, Args: args("NAME"),
			RunE: func(c *cobra.Command, args []string) error { return o.run(c.Context(), args[0]) }}
		s.jsonFlag(sub)
		c.AddCommand(sub)
	}
	add(control.ScrubStart, "Begin a scrub")
	add(control.ScrubPause, "Let a scrub rest")
	add(control.ScrubResume, "Let a scrub that rests go on")
	add(scrubShow, "Show how far a scrub is, and what it has found")
	add(control.ScrubStop, "End a scrub before it is through")
	return c
}

// scrubShow is the one action that changes nothing.
const scrubShow = "status"

type poolScrubOptions struct {
	*session
	action string
}

func (o *poolScrubOptions) run(ctx context.Context, name string) error {
	if err := checkName("pool", name); err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	var p control.Pool
	if o.action == scrubShow {
		p, err = client.Pool(ctx, name)
	} else {
		p, err = client.ScrubPool(ctx, name, control.ScrubChange{Action: o.action})
	}
	if err != nil {
		return err
	}
	if o.json {
		return o.printJSON(p.Stats.Scrub)
	}
	return o.printScrub(p)
}

func (o *poolScrubOptions) printScrub(p control.Pool) error {
	s := p.Stats.Scrub
	rows := [][]string{{"pool", p.Name}, {"scrub", orDash(s.State)}}
	if s.State == control.ScrubRunning || s.State == control.ScrubPaused {
		rows = append(rows, []string{"progress", scrubProgress(s)})
	}
	r := s.Now
	if !r.Begun.IsZero() {
		rows = append(rows, []string{"begun", scrubTime(r.Begun)})
		if !r.Ended.IsZero() {
			rows = append(rows, []string{"ended", scrubTime(r.Ended)})
		}
		rows = append(rows, scrubFigures(r)...)
	}
	if !s.Last.Ended.IsZero() && !s.Last.Ended.Equal(r.Ended) {
		rows = append(rows, []string{"last complete one", scrubOutcome(s.Last)})
	}
	if !s.Next.IsZero() {
		rows = append(rows, []string{"next", scrubTime(s.Next)})
	}
	if err := table(o.out, rows); err != nil {
		return err
	}
	for _, r := range []control.ScrubResult{s.Now, s.Last} {
		if len(r.Findings) == 0 {
			continue
		}
		fmt.Fprintln(o.out, "\nNo copy has:")
		for _, f := range r.Findings {
			fmt.Fprintln(o.out, "  "+f.Text)
		}
		if more := r.Unreadable - int64(len(r.Findings)); more > 0 {
			fmt.Fprintf(o.out, "  and %d more\n", more)
		}
		break
	}
	return nil
}

func scrubFigures(r control.ScrubResult) [][]string {
	rate := "-"
	if r.Took > 0 {
		rate = fmt.Sprintf("%.0f MB/s", float64(r.Bytes)/1e6/time.Duration(r.Took).Seconds())
	}
	return [][]string{
		{"took", time.Duration(r.Took).Round(time.Second).String()},
		{"read", fmt.Sprintf("%d blocks, %s from all copies, %s", r.Blocks, humanSize(r.Bytes), rate)},
		{"copies repaired", fmt.Sprint(r.Repaired)},
		{"blocks that no copy has", fmt.Sprint(r.Unreadable)},
	}
}

// scrubProgress is a percentage and the time that is left.
func scrubProgress(s control.ScrubStatus) string {
	text := "-"
	if s.Total > 0 {
		text = fmt.Sprintf("%.1f %%", 100*float64(s.Done)/float64(s.Total))
	}
	if s.Left > 0 {
		text += fmt.Sprintf(", about %s left", time.Duration(s.Left).Round(time.Second))
	}
	return text
}

func scrubOutcome(r control.ScrubResult) string {
	return fmt.Sprintf("%s: %d repaired, %d that no copy has", scrubTime(r.Ended), r.Repaired, r.Unreadable)
}

func scrubTime(t time.Time) string { return t.Local().Format(time.DateTime) }

// scrubLine says in one line what is known of the scrubs of a pool.
func scrubLine(s control.ScrubStatus) string {
	switch {
	case s.State == control.ScrubRunning || s.State == control.ScrubPaused:
		return fmt.Sprintf("%s, %s; %d repaired, %d that no copy has", s.State, scrubProgress(s), s.Now.Repaired, s.Now.Unreadable)
	case !s.Last.Ended.IsZero():
		return "done " + scrubOutcome(s.Last)
	}
	return orDash(s.State)
}
