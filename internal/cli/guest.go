package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

func newGuest(s *session) *cobra.Command {
	return group("guest", groupFailover, "Fault drills on one guest",
		`Drills do to a guest what a fault would do. Typed at a terminal they need --yes.`,
		newDrill(s, drillText{
			drill: control.DrillKill,
			short: "Kill a guest with SIGKILL; its partner takes over",
			long: `Kill a guest with SIGKILL, as a crash would. Its partner takes over; the agent
starts the guest again, and it then waits for giveback.`,
			did: "was killed",
		}),
		newDrill(s, drillText{
			drill: control.DrillHang,
			short: "Stop a guest with SIGSTOP, as if it hung; its partner takes over",
			long: `Stop a guest with SIGSTOP, as if it hung. Its heartbeat stands still; the agent
notices, fences it and lets its partner take over.`,
			did: "was stopped with SIGSTOP",
		}),
		newDrill(s, drillText{
			drill: control.DrillResume,
			short: "Let a guest go on that was stopped with 'hang'",
			long: `Let a guest go on that was stopped with 'pollux guest hang' and was not fenced
yet, because nobody could take over.`,
			did: "goes on",
		}),
		newDrill(s, drillText{
			drill: control.DrillRestart,
			short: "Stop a guest cleanly and start it again",
			long:  "Stop a guest cleanly and start it again, as an upgrade would.",
			did:   "was started again",
		}))
}

// drillText is what the drills differ in.
type drillText struct{ drill, short, long, did string }

type drillOptions struct {
	*session
	text  drillText
	guest string
	yes   bool
}

func newDrill(s *session, text drillText) *cobra.Command {
	o := &drillOptions{session: s, text: text}
	c := &cobra.Command{
		Use:   text.drill + " GUEST",
		Short: text.short,
		Long:  text.long,
		Args:  args("GUEST"),
		RunE: func(c *cobra.Command, args []string) error {
			o.guest = args[0]
			return o.run(c.Context())
		},
	}
	c.Flags().BoolVar(&o.yes, "yes", false, "do it, also at a terminal")
	s.jsonFlag(c)
	return c
}

func (o *drillOptions) run(ctx context.Context) error {
	if err := checkName("guest", o.guest); err != nil {
		return err
	}
	if o.terminal && !o.yes {
		return refused(fmt.Sprintf("this disturbs the clients of guest %s", o.guest),
			fmt.Sprintf("if that is meant: pollux guest %s %s --yes%s", o.text.drill, o.guest, dirFlag(o.dir)))
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	if err := client.Drill(ctx, o.guest, o.text.drill); err != nil {
		return err
	}
	if o.json {
		return o.printJSON(map[string]string{"guest": o.guest, "drill": o.text.drill})
	}
	_, err = fmt.Fprintf(o.out, "guest %s %s\n", o.guest, o.text.did)
	return err
}
