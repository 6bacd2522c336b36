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
	dedupFlags
}

func newVolumeCreate(s *session) *cobra.Command {
	o := &volumeCreateOptions{session: s}
	c := &cobra.Command{
		Use:   "create NAME --size SIZE",
		Short: "Make a thin volume and serve it at once",
		Long:  "Make a thin volume and serve it at once.\n\n" + sizeHelp + "\n\n" + nameHelp + "\n\n" + dedupHelp,
		Example: `  pollux volume create disk1 --size 10G
  pollux volume create disk2 --size 1.5T --guest b
  pollux volume create images --size 1T --dedup on`,
		Args: args("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			o.name = args[0]
			return o.run(c.Context())
		},
	}
	c.Flags().Var(&o.size, "size", "size of the volume")
	c.Flags().StringVar(&o.guest, "guest", "", "guest that serves it, a or b (default: the first)")
	o.addTo(c)
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
	if err := o.check(); err != nil {
		return err
	}
	if o.thn != nil && (o.on == nil || !*o.on) {
		return usagef("--thn says in what series blocks are shared: say --dedup on as well")
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	req := control.VolumeCreate{Name: o.name, Size: int64(o.size), Guest: o.guest, Dedup: o.on != nil && *o.on}
	if o.thn != nil {
		req.THN = *o.thn
	}
	v, err := client.CreateVolume(ctx, req)
	if err != nil {
		return err
	}
	return o.printVolume(v)
}
