package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
)

type volumeDeleteOptions struct {
	*session
	name string
}

func newVolumeDelete(s *session) *cobra.Command {
	o := &volumeDeleteOptions{session: s}
	c := &cobra.Command{
		Use: "delete NAME", Aliases: []string{"rm"},
		Short:             "Delete a volume and what is in it",
		Long:              "Delete a volume and what is in it. There is no way back.",
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

func (o *volumeDeleteOptions) run(ctx context.Context) error {
	if err := checkName("volume", o.name); err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	if err := client.DeleteVolume(ctx, o.name); err != nil {
		return err
	}
	if o.json {
		return o.printJSON(struct {
			Deleted string `json:"deleted"`
		}{o.name})
	}
	_, err = fmt.Fprintf(o.out, "volume %s is deleted\n", o.name)
	return err
}
