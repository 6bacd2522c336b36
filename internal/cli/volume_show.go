package cli

import (
	"context"

	"github.com/spf13/cobra"
)

type volumeShowOptions struct {
	*session
	name string
}

func newVolumeShow(s *session) *cobra.Command {
	o := &volumeShowOptions{session: s}
	c := &cobra.Command{
		Use:               "show NAME",
		Short:             "Show one volume and how to reach it",
		Args:              args("NAME"),
		ValidArgsFunction: s.volumeNames,
		RunE: func(c *cobra.Command, args []string) error {
			o.name = args[0]
			return o.run(c.Context())
		},
	}
	s.jsonFlag(c)
	return c
}

func (o *volumeShowOptions) run(ctx context.Context) error {
	if err := checkName("volume", o.name); err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	v, err := client.Volume(ctx, o.name)
	if err != nil {
		return err
	}
	return o.printVolume(v)
}
