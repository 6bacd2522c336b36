package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

type takeoverOptions struct {
	*session
	guest string
	check bool
}

func newTakeover(s *session) *cobra.Command {
	o := &takeoverOptions{session: s}
	c := &cobra.Command{
		Use: "takeover GUEST", GroupID: groupFailover,
		Short: "Let the partner take over a guest",
		Long: `Let the partner take over GUEST: it comes to serve GUEST's volumes at GUEST's
addresses, beside its own. Clients wait for a moment and go on. GUEST stays up
and waits until 'pollux giveback GUEST'.

With --check nothing happens but the checks; the exit status is 5 when a
takeover would not work now.`,
		Args: args("GUEST"),
		RunE: func(c *cobra.Command, args []string) error {
			o.guest = args[0]
			return o.run(c.Context())
		},
	}
	c.Flags().BoolVar(&o.check, "check", false, "only say whether it would work now")
	s.jsonFlag(c)
	return c
}

func (o *takeoverOptions) run(ctx context.Context) error {
	if err := checkName("guest", o.guest); err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	if o.check {
		return o.runCheck(ctx, client)
	}
	t, err := client.Takeover(ctx, o.guest)
	if err != nil {
		return err
	}
	return o.printTakeover(t)
}

func (o *takeoverOptions) runCheck(ctx context.Context, client *control.Client) error {
	t, err := client.CheckTakeover(ctx, o.guest)
	if err != nil {
		return err
	}
	if o.json {
		err = o.printJSON(t)
	} else {
		rows := [][]string{{"CHECK", "OK", "WHY"}}
		for _, i := range t.Checks {
			rows = append(rows, []string{i.Name, okNo(i.OK), i.Why})
		}
		if err := table(o.out, rows); err != nil {
			return err
		}
		would := "can"
		if !t.OK {
			would = "CANNOT"
		}
		_, err = fmt.Fprintf(o.out, "guest %s %s take over guest %s now\n", orDash(t.By), would, t.Of)
	}
	if err == nil && !t.OK {
		return &statusError{exitRefused, errReported}
	}
	return err
}

// okNo shouts about what is not well.
func okNo(b bool) string {
	if b {
		return "yes"
	}
	return "NO"
}

// printTakeover shows a takeover or giveback that has just ended.
func (s *session) printTakeover(t control.Takeover) error {
	if s.json {
		return s.printJSON(t)
	}
	if _, err := fmt.Fprintf(s.out, "guest %s serves identity %s\n", t.By, t.Of); err != nil {
		return err
	}
	_, err := fmt.Fprintf(s.out, "%s\n", steps(t))
	return err
}

// steps shows how long the parts of a takeover took.
func steps(t control.Takeover) string {
	var parts []string
	for _, p := range t.Steps {
		parts = append(parts, p.Name+" "+took(p.Took))
	}
	total := "total " + took(t.Total)
	if len(parts) == 0 {
		return total
	}
	return total + ": " + strings.Join(parts, ", ")
}
