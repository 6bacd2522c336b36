package cli

import (
	"context"

	"github.com/spf13/cobra"
)

type volumeResizeOptions struct {
	*session
	name string
	size size
}

func newVolumeResize(s *session) *cobra.Command {
	o := &volumeResizeOptions{session: s}
	c := &cobra.Command{
		Use:   "resize NAME --size SIZE",
		Short: "Grow a volume",
		Long: `Grow a volume. Volumes cannot shrink. Clients see the new size when they
connect again.

` + sizeHelp,
		Args:              args("NAME"),
		ValidArgsFunction: s.volumeNames,
		RunE: func(c *cobra.Command, args []string) error {
			o.name = args[0]
			return o.run(c.Context())
		},
	}
	c.Flags().Var(&o.size, "size", "new size of the volume")
	s.jsonFlag(c)
	return c
}

func (o *volumeResizeOptions) run(ctx context.Context) error {
	if err := checkName("volume", o.name); err != nil {
		return err
	}
	if o.size == 0 {
		return usagef("how large? say --size SIZE, for example --size 20G")
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	v, err := client.ResizeVolume(ctx, o.name, int64(o.size))
	if err != nil {
		return err
	}
	return o.printVolume(v)
}
