package cli

import (
	"context"

	"github.com/spf13/cobra"
)

type givebackOptions struct {
	*session
	guest string
}

func newGiveback(s *session) *cobra.Command {
	o := &givebackOptions{session: s}
	c := &cobra.Command{
		Use: "giveback GUEST", GroupID: groupFailover,
		Short: "Give a guest that was taken over its volumes back",
		Long: `Give GUEST, which was taken over and is up again, its volumes and addresses
back. Clients wait for a moment and go on.`,
		Args: args("GUEST"),
		RunE: func(c *cobra.Command, args []string) error {
			o.guest = args[0]
			return o.run(c.Context())
		},
	}
	s.jsonFlag(c)
	return c
}

func (o *givebackOptions) run(ctx context.Context) error {
	if err := checkName("guest", o.guest); err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	t, err := client.Giveback(ctx, o.guest)
	if err != nil {
		return err
	}
	return o.printTakeover(t)
}
