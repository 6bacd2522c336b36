package cli

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

type volumeCreateOptions struct {
	*session
	name  string
	size  size
	guest string
}

func newVolumeCreate(s *session) *cobra.Command {
	o := &volumeCreateOptions{session: s}
	c := &cobra.Command{
		Use:   "create NAME --size SIZE",
		Short: "Make a thin volume and serve it at once",
		Long:  "Make a thin volume and serve it at once.\n\n" + sizeHelp + "\n\n" + nameHelp,
		Example: `  pollux volume create disk1 --size 10G
  pollux volume create disk2 --size 1.5T --guest b`,
		Args: args("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			o.name = args[0]
			return o.run(c.Context())
		},
	}
	c.Flags().Var(&o.size, "size", "size of the volume")
	c.Flags().StringVar(&o.guest, "guest", "", "guest that serves it, a or b (default: the first)")
	s.jsonFlag(c)
	return c
}

func (o *volumeCreateOptions) run(ctx context.Context) error {
	if err := checkName("volume", o.name); err != nil {
		return err
	}
	if o.size == 0 {
		return usagef("how large? say --size SIZE, for example --size 10G")
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	v, err := client.CreateVolume(ctx, control.VolumeCreate{Name: o.name, Size: int64(o.size), Guest: o.guest})
	if err != nil {
		return err
	}
	return o.printVolume(v)
}
