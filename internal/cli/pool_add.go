package cli

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

type poolAddOptions struct {
	*session
	name   string
	device string
	size   size
}

func newPoolAdd(s *session) *cobra.Command {
	o := &poolAddOptions{session: s}
	c := &cobra.Command{
		Use:   "add NAME DEVICE",
		Short: "Add a device to a pool",
		Long: `Add a block device or file to a pool while it serves. A file that does not
exist is created with --size bytes. Devices cannot be taken out again.

` + sizeHelp,
		Args: args("NAME", "DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			o.name, o.device = args[0], args[1]
			return o.run(c.Context())
		},
	}
	c.Flags().Var(&o.size, "size", "size of a file that is created")
	s.jsonFlag(c)
	return c
}

func (o *poolAddOptions) run(ctx context.Context) error {
	if err := checkName("pool", o.name); err != nil {
		return err
	}
	devices, err := absolute([]string{o.device})
	if err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	p, err := client.AddDevice(ctx, o.name, control.PoolAdd{Device: devices[0], Size: int64(o.size)})
	if err != nil {
		return err
	}
	return o.printPool(p)
}
