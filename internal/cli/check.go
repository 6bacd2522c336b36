package cli

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
)

type checkOptions struct {
	*session
	config string
	repair bool
}

func newCheck(s *session) *cobra.Command {
	o := &checkOptions{session: s}
	c := &cobra.Command{
		Use: "check", GroupID: groupPair,
		Short: "Recount everything and compare",
		Long: `Recount the blocks that the volumes use and compare them with what the pools
say of themselves, and read and verify all metadata and data. On a running pair
it works beside the clients; with nothing running it reads the devices and
regions itself, under the locks of the devices, and writes nothing. On a terminal
a line tells how far it has come.

With --repair, which needs that nothing runs, it mends what it can and tells what
that was: reference counts and figures of use are made anew from the maps, and
bad copies from good ones. What the only copy has lost remains a problem, and so
do the reference counts while a page of a volume's map is lost.

The exit status is 6 when there are problems, or some remain after a repair.`,
		Args: args(),
		RunE: func(c *cobra.Command, _ []string) error { return o.run(c.Context()) },
	}
	c.Flags().StringVar(&o.config, "config", "", "file with settings, used when nothing runs (default: what the pair ran with last)")
	c.Flags().BoolVar(&o.repair, "repair", false, "mend what can be mended; nothing must run")
	s.jsonFlag(c)
	return c
}

func (o *checkOptions) run(ctx context.Context) error {
	client, err := o.client()
	if err != nil {
		return err
	}
	var r control.CheckReport
	if o.repair {
		if _, err = client.Status(ctx); err == nil {
			return refused("the pair runs, and a repair wants its pools for itself", "take it down first: pollux down"+dirFlag(o.dir))
		}
	} else {
		r, err = o.online(ctx, client)
	}
	if err != nil && control.KindOf(err) == control.KindNotRunning {
		cfg, cerr := o.settings()
		if cerr != nil {
			return usagef("%w", cerr)
		}
		r, err = o.offline(ctx, cfg)
	}
	if err != nil {
		return err
	}
	if o.json {
		err = o.printJSON(r)
	} else {
		err = o.print(r)
	}
	if err == nil && !r.OK {
		return &statusError{exitProblems, errReported}
	}
	return err
}

func (o *checkOptions) online(ctx context.Context, client *control.Client) (control.CheckReport, error) {
	if o.watched {
		l := &progressLine{w: o.err, now: o.now}
		defer l.watch(ctx, client)()
	}
	return client.Check(ctx)
}

func (o *checkOptions) offline(ctx context.Context, cfg *config.Config) (control.CheckReport, error) {
	check := o.backend.check
	if o.repair {
		check = o.backend.repair
	}
	if !o.watched {
		return check(ctx, cfg, nil)
	}
	l := &progressLine{w: o.err, now: o.now}
	defer l.clear()
	return check(ctx, cfg, l.show)
}

// settings returns those of the pair that does not run: those that it ran
// with last, unless a file is named.
func (o *checkOptions) settings() (*config.Config, error) {
	if o.config == "" {
		if cfg, err := config.ReadEffective(o.dir); err == nil {
			return cfg, nil
		}
	}
	return config.Load(o.dir, o.config)
}

func (o *checkOptions) print(r control.CheckReport) error {
	rows := [][]string{{"POOL", "GUEST", "VOLUMES", "BLOCKS USED", "TOOK", "RESULT"}}
	for _, p := range r.Pools {
		result := "clean"
		switch n := len(p.Problems); {
		case !p.OK && n == 1:
			result = "1 PROBLEM"
		case !p.OK:
			result = fmt.Sprintf("%d PROBLEMS", n)
		case len(p.Mended) > 0:
			result = "mended"
		}
		rows = append(rows, []string{p.Pool, p.Guest, strconv.Itoa(p.Volumes),
			strconv.FormatInt(p.Blocks, 10), took(p.Took), result})
	}
	if err := table(o.out, rows); err != nil {
		return err
	}
	for _, p := range r.Pools {
		for _, m := range p.Mended {
			fmt.Fprintf(o.out, "pool %s: mended: %s\n", p.Pool, m)
		}
		for _, problem := range p.Problems {
			fmt.Fprintf(o.out, "pool %s: %s\n", p.Pool, problem)
		}
	}
	for _, n := range r.Notes {
		fmt.Fprintf(o.out, "note: %s\n", n)
	}
	_, err := fmt.Fprintf(o.out, "%s: %s\n", checkedHow(&r), checkVerdict(&r))
	return err
}

func checkedHow(r *control.CheckReport) string {
	switch {
	case r.Repair:
		return "checked and repaired offline"
	case r.Online:
		return "checked on the running pair"
	}
	return "checked offline"
}

func checkVerdict(r *control.CheckReport) string {
	switch {
	case !r.OK && r.Repair:
		return "PROBLEMS remain: what is lost must be restored from elsewhere"
	case !r.OK:
		return "PROBLEMS: stop writing to these pools, keep a copy of their devices, and report this"
	case r.Mended():
		return "all that was wrong is mended"
	}
	return "clean"
}
