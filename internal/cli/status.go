package cli

import (
	"context"
	"slices"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

type statusOptions struct {
	*session
	memory bool
}

func newStatus(s *session) *cobra.Command {
	o := &statusOptions{session: s}
	c := &cobra.Command{
		Use: "status", GroupID: groupPair,
		Short: "Show guests, who serves what, whether the pair is protected",
		Long: `Show whether either guest may die now, what a person must look at, the guests
and who serves what, the volumes with the URIs that clients use, the pools, and
the last takeover with the time of each of its steps.

With --memory it shows instead what each guest's memory is for: what is planned
for the case that it serves its partner's pool too, what is in use now, and why.`,
		Args: args(),
		RunE: func(c *cobra.Command, _ []string) error { return o.run(c.Context()) },
	}
	c.Flags().BoolVar(&o.memory, "memory", false, "show what memory is for instead")
	s.jsonFlag(c)
	return c
}

func (o *statusOptions) run(ctx context.Context) error {
	client, err := o.client()
	if err != nil {
		return err
	}
	st, err := client.Status(ctx)
	if err != nil {
		return err
	}
	if o.json {
		return o.printJSON(whole(st))
	}
	if o.memory {
		return o.printMemory(st)
	}
	return o.printStatus(st)
}

// whole returns st with empty lists where there is nothing, so that programs
// may go through them without a question.
func whole(st control.Status) control.Status {
	st.Alerts = orEmpty(st.Alerts)
	st.Guests = slices.Clone(orEmpty(st.Guests))
	for i := range st.Guests {
		g := &st.Guests[i]
		g.Serves = orEmpty(g.Serves)
		g.Pools = orEmpty(g.Pools)
		g.Exports = orEmpty(g.Exports)
		g.Region = orEmpty(g.Region)
		g.Devices = orEmpty(g.Devices)
		g.PoolStats = orEmpty(g.PoolStats)
	}
	return st
}

func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}
