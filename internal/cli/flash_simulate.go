package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

type flashSimulateOptions struct {
	flashPolicyOptions
	bytes size
}

func newFlashSimulate(s *session) *cobra.Command {
	o := &flashSimulateOptions{flashPolicyOptions: flashPolicyOptions{session: s}}
	c := &cobra.Command{
		Use:   "simulate POOL [--device-class CLASS] [NAME=VALUE...] [--policy FILE] [--slots-bytes SIZE]",
		Short: "Predict what another policy, or more flash, would come to",
		Long: `Replay what was collected of the use of the pool against other parameters, or another
size of flash, and predict the share of requests that flash would have served, their mean
time, and the moves for it, beside what the policy that counts comes to. Nothing is moved or
changed. Parameters are given as to "pollux flash policy set".

` + sizeHelp,
		Example: `  pollux flash simulate pool-a min_accesses=8 hysteresis.gain=16
  pollux flash simulate pool-a --slots-bytes 200G`,
		Args: func(c *cobra.Command, got []string) error {
			if len(got) == 0 {
				return args("POOL")(c, got)
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error { return o.simulate(c.Context(), args[0], args[1:]) },
	}
	classFlag(c, &o.class)
	c.Flags().StringVar(&o.file, "policy", "", "file with parameters")
	c.Flags().Var(&o.bytes, "slots-bytes", "size of the flash, for data")
	s.jsonFlag(c)
	return c
}

func (o *flashSimulateOptions) simulate(ctx context.Context, name string, words []string) error {
	if err := checkName("pool", name); err != nil {
		return err
	}
	set, err := o.assigned(words)
	if err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	p, err := client.SimulateFlash(ctx, name, control.FlashTrial{
		FlashPolicyChange: control.FlashPolicyChange{Class: o.class, Set: set}, Bytes: int64(o.bytes),
	})
	if err != nil {
		return err
	}
	if o.json {
		return o.printJSON(p)
	}
	if p.Windows == 0 {
		_, err := fmt.Fprintf(o.out, "No window of collect.window has ended since pool %s has flash: there is no history yet.\n", p.Pool)
		return err
	}
	rows := [][]string{{"pool", p.Pool}, {"history", fmt.Sprintf("%d windows, %s to %s", p.Windows, when(p.From), when(p.To))}}
	row := func(what string, f func(control.FlashForecast) string) []string {
		return []string{what, f(p.Now), f(p.Then)}
	}
	return o.printTables(rows, changeRows(p.Changes), [][]string{
		{"PREDICTED", "NOW", "THEN"},
		row("flash", func(f control.FlashForecast) string { return humanSize(int64(f.Slots) * p.SetBytes) }),
		row("hit share", func(f control.FlashForecast) string { return percent(f.HitShare) }),
		row("mean time", func(f control.FlashForecast) string { return took(f.Mean) }),
		row("moved to flash", func(f control.FlashForecast) string { return fmt.Sprintf("%d sets", f.Promoted) }),
		row("moved back", func(f control.FlashForecast) string { return fmt.Sprintf("%d sets", f.Demoted) }),
	})
}
