package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

type eventsOptions struct {
	*session
	follow bool
	last   int
}

func newEvents(s *session) *cobra.Command {
	o := &eventsOptions{session: s}
	c := &cobra.Command{
		Use: "events", GroupID: groupPair,
		Short: "What happened, when, to whom",
		Long: `What happened, when, to whom: oldest first. With --json each event is one line
with one JSON object.`,
		Args: args(),
		RunE: func(c *cobra.Command, _ []string) error { return o.run(c.Context()) },
	}
	c.Flags().BoolVarP(&o.follow, "follow", "f", false, "go on with new events until interrupted")
	c.Flags().IntVarP(&o.last, "last", "n", 0, "only the last so many of the past, 0 for all")
	s.jsonFlag(c)
	return c
}

func (o *eventsOptions) run(ctx context.Context) error {
	if o.last < 0 {
		return usagef("--last %d is negative", o.last)
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	err = client.Events(ctx, control.EventQuery{Last: o.last, Follow: o.follow}, o.print)
	if o.follow && errors.Is(err, context.Canceled) {
		return nil // interrupting is how following ends
	}
	return err
}

func (o *eventsOptions) print(e control.Event) error {
	if o.json {
		return json.NewEncoder(o.out).Encode(e)
	}
	_, err := fmt.Fprintf(o.out, "%s  %-5s  %-14s  %s\n",
		e.Time.Local().Format("2006-01-02 15:04:05.000"), orDash(e.Guest), e.Kind, e.Message)
	return err
}
