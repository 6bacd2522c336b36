package cli

import (
	"context"

	"github.com/spf13/cobra"
)

type volumeRenameOptions struct {
	*session
	old, name string
}

func newVolumeRename(s *session) *cobra.Command {
	o := &volumeRenameOptions{session: s}
	c := &cobra.Command{
		Use:   "rename OLD NEW",
		Short: "Give a volume another name",
		Long: `Give a volume another name, which is also the name of its export: clients
find it by the new name when they connect again.

` + nameHelp,
		Args:              args("OLD", "NEW"),
		ValidArgsFunction: s.volumeNames,
		RunE: func(c *cobra.Command, args []string) error {
			o.old, o.name = args[0], args[1]
			return o.run(c.Context())
		},
	}
	s.jsonFlag(c)
	return c
}

func (o *volumeRenameOptions) run(ctx context.Context) error {
	for _, name := range []string{o.old, o.name} {
		if err := checkName("volume", name); err != nil {
			return err
		}
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	v, err := client.RenameVolume(ctx, o.old, o.name)
	if err != nil {
		return err
	}
	return o.printVolume(v)
}
