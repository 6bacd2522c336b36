package cli

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
)

type poolAddOptions struct {
	*session
	name    string
	devices []string
	mirror  bool
	force   bool
	size    size
}

func newPoolAdd(s *session) *cobra.Command {
	o := &poolAddOptions{session: s}
	c := &cobra.Command{
		Use:   "add NAME DEVICE [--mirror DEVICE...]",
		Short: "Add a device or a mirror to a pool",
		Long: `Add a block device or file to a pool while it serves. A file that does not
exist is created with --size bytes. "pollux pool remove" takes a device out again.

With --mirror the devices that are named, two or three, become a mirror: each keeps
all of what comes to lie there. A mirror can be added to any pool. A device by itself
is refused for a pool whose devices all are mirrors, for what came to lie on it would
be lost with it; --force adds it all the same.

` + sizeHelp,
		Example: "  pollux pool add pool-a /dev/vdd\n" +
			"  pollux pool add pool-a --mirror /dev/vdd /dev/vde",
		Args: func(c *cobra.Command, got []string) error {
			if !o.mirror || len(got) < 2 {
				return args("NAME", "DEVICE")(c, got)
			}
			if n := len(got) - 1; n < 2 || n > config.MaxCopies {
				return usagef("a mirror of %d devices; 2 to %d are possible", n, config.MaxCopies)
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			o.name, o.devices = args[0], args[1:]
			return o.run(c.Context())
		},
	}
	c.Flags().BoolVar(&o.mirror, "mirror", false, "make a mirror of the devices")
	c.Flags().BoolVar(&o.force, "force", false, "add a device by itself to a pool of mirrors")
	c.Flags().Var(&o.size, "size", "size of a file that is created")
	s.jsonFlag(c)
	return c
}

func (o *poolAddOptions) run(ctx context.Context) error {
	if err := checkName("pool", o.name); err != nil {
		return err
	}
	devices, err := absolute(o.devices)
	if err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	p, err := client.AddDevice(ctx, o.name, control.PoolAdd{Device: devices[0], Copies: devices[1:], Size: int64(o.size), Force: o.force})
	if err != nil {
		return err
	}
	return o.printPool(p)
}
