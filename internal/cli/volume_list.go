package cli

import (
	"context"

	"github.com/spf13/cobra"
)

type volumeListOptions struct{ *session }

func newVolumeList(s *session) *cobra.Command {
	o := &volumeListOptions{s}
	c := &cobra.Command{
		Use: "list", Aliases: []string{"ls"},
		Short: "List the volumes of both guests",
		Args:  args(),
		RunE:  func(c *cobra.Command, _ []string) error { return o.run(c.Context()) },
	}
	s.jsonFlag(c)
	return c
}

func (o *volumeListOptions) run(ctx context.Context) error {
	client, err := o.client()
	if err != nil {
		return err
	}
	volumes, err := client.Volumes(ctx)
	if err != nil {
		return err
	}
	if o.json {
		return o.printJSON(orEmpty(volumes))
	}
	rows := [][]string{{"NAME", "SIZE", "USED", "DEDUP", "GUEST", "POOL", "NBD"}}
	for _, v := range volumes {
		rows = append(rows, []string{v.Name, humanSize(v.Size), humanSize(v.Used), v.Sharing(), v.Guest, v.Pool, v.NBD})
	}
	return table(o.out, rows)
}
