package cli

import (
	"context"
	"strconv"

	"github.com/spf13/cobra"
)

type poolListOptions struct{ *session }

func newPoolList(s *session) *cobra.Command {
	o := &poolListOptions{s}
	c := &cobra.Command{
		Use: "list", Aliases: []string{"ls"},
		Short: "List the pools of both guests",
		Args:  args(),
		RunE:  func(c *cobra.Command, _ []string) error { return o.run(c.Context()) },
	}
	s.jsonFlag(c)
	return c
}

func (o *poolListOptions) run(ctx context.Context) error {
	client, err := o.client()
	if err != nil {
		return err
	}
	pools, err := client.Pools(ctx)
	if err != nil {
		return err
	}
	if o.json {
		return o.printJSON(orEmpty(pools))
	}
	rows := [][]string{{"NAME", "GUEST", "SERVED BY", "STATE", "CAPACITY", "FREE", "DEVICES", "VOLUMES"}}
	for _, p := range pools {
		rows = append(rows, []string{
			p.Name, p.Guest, orDash(p.ServedBy), p.State,
			humanSize(p.Stats.Capacity), humanSize(p.Stats.Free),
			strconv.Itoa(len(p.Devices)), strconv.Itoa(p.Volumes),
		})
	}
	return table(o.out, rows)
}
