package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

type poolExportOptions struct {
	*session
	name  string
	force bool
}

func newPoolExport(s *session) *cobra.Command {
	o := &poolExportOptions{session: s}
	c := &cobra.Command{
		Use:   "export NAME",
		Short: "Close a pool, so that its devices can be taken elsewhere",
		Long: `Close a pool, so that its devices can be taken to another machine: everything is
brought to the devices, the volumes are no longer served, and the pair forgets the
pool. "pollux pool import" takes it over, there or here. The guest that had the pool
goes on without one.

It is refused while clients are connected, unless --force cuts them off. After a
failure, or when the answer was lost, it can be given again.`,
		Args: args("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			o.name = args[0]
			return o.run(c.Context())
		},
	}
	c.Flags().BoolVar(&o.force, "force", false, "cut off clients that are connected")
	s.jsonFlag(c)
	return c
}

func (o *poolExportOptions) run(ctx context.Context) error {
	if err := checkName("pool", o.name); err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	p, err := client.ExportPool(ctx, o.name, control.PoolExport{Force: o.force})
	if err != nil {
		return err
	}
	if o.json {
		return o.printJSON(p)
	}
	fmt.Fprintf(o.out, "pool %s is %s\n", p.Name, p.State)
	for _, d := range p.Devices {
		fmt.Fprintf(o.out, "  %s\n", orDash(d.Path))
	}
	return nil
}
