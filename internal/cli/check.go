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
}

func newCheck(s *session) *cobra.Command {
	o := &checkOptions{session: s}
	c := &cobra.Command{
		Use: "check", GroupID: groupPair,
		Short: "Recount everything and compare",
		Long: `Recount the blocks that the volumes use and compare them with what the pools
say of themselves, and read and verify all metadata and data. On a running pair
it works beside the clients; with nothing running it reads the devices and
regions itself, under the locks of the devices. It writes nothing then, and
repairs nothing. On a terminal a line tells how far it has come.

The exit status is 6 when there are problems.`,
		Args: args(),
		RunE: func(c *cobra.Command, _ []string) error { return o.run(c.Context()) },
	}
	c.Flags().StringVar(&o.config, "config", "", "file with settings, used when nothing runs (default: what the pair ran with last)")
	s.jsonFlag(c)
	return c
}

func (o *checkOptions) run(ctx context.Context) error {
	client, err := o.client()
	if err != nil {
		return err
	}
	r, err := o.online(ctx, client)
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
	if !o.watched {
		return o.backend.check(ctx, cfg, nil)
	}
	l := &progressLine{w: o.err, now: o.now}
	defer l.clear()
	return o.backend.check(ctx, cfg, l.show)
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
		if !p.OK {
			result = "1 PROBLEM"
			if n := len(p.Problems); n != 1 {
				result = fmt.Sprintf("%d PROBLEMS", n)
			}
		}
		rows = append(rows, []string{p.Pool, p.Guest, strconv.Itoa(p.Volumes),
			strconv.FormatInt(p.Blocks, 10), took(p.Took), result})
	}
	if err := table(o.out, rows); err != nil {
		return err
	}
	for _, p := range r.Pools {
		for _, problem := range p.Problems {
			fmt.Fprintf(o.out, "pool %s: %s\n", p.Pool, problem)
		}
	}
	for _, n := range r.Notes {
		fmt.Fprintf(o.out, "note: %s\n", n)
	}
	verdict := "clean"
	if !r.OK {
		verdict = "PROBLEMS: stop writing to these pools, keep a copy of their devices, and report this"
	}
	how := "offline"
	if r.Online {
		how = "on the running pair"
	}
	_, err := fmt.Fprintf(o.out, "checked %s: %s\n", how, verdict)
	return err
}
