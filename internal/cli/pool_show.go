package cli

import (
	"context"

	"github.com/spf13/cobra"
)

type poolShowOptions struct {
	*session
	name string
}

func newPoolShow(s *session) *cobra.Command {
	o := &poolShowOptions{session: s}
	c := &cobra.Command{
		Use:   "show NAME",
		Short: "Show one pool and its devices",
		Args:  args("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			o.name = args[0]
			return o.run(c.Context())
		},
	}
	s.jsonFlag(c)
	return c
}

func (o *poolShowOptions) run(ctx context.Context) error {
	if err := checkName("pool", o.name); err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	p, err := client.Pool(ctx, o.name)
	if err != nil {
		return err
	}
	return o.printPool(p)
}
