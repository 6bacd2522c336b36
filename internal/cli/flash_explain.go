package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

type flashExplainOptions struct {
	*session
	at offset
}

func newFlashExplain(s *session) *cobra.Command {
	o := &flashExplainOptions{session: s}
	c := &cobra.Command{
		Use:   "explain VOLUME --offset N",
		Short: "Say why a block is on flash, or is not",
		Long: `Say where a block of a volume is and why: what its data set shows beside what its class
of devices asks for, its rank among all of them, and what keeps it from flash or would let it
leave.`,
		Example:           "  pollux flash explain disk1 --offset 3G",
		Args:              args("VOLUME"),
		ValidArgsFunction: s.volumeNames,
		RunE: func(c *cobra.Command, args []string) error {
			if !c.Flags().Changed("offset") {
				return usagef("which block? --offset N")
			}
			return o.run(c.Context(), args[0])
		},
	}
	c.Flags().Var(&o.at, "offset", "a byte of the block")
	s.jsonFlag(c)
	return c
}

func (o *flashExplainOptions) run(ctx context.Context, volume string) error {
	if err := checkName("volume", volume); err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	x, err := client.ExplainFlash(ctx, volume, control.FlashPlace{Offset: int64(o.at)})
	if err != nil {
		return err
	}
	if o.json {
		return o.printJSON(x)
	}
	if err := o.printTables(explainRows(x), limitRows(x)); err != nil {
		return err
	}
	_, err = fmt.Fprintf(o.out, "\n%s\n", x.Summary)
	return err
}

func explainRows(x control.FlashExplanation) [][]string {
	rows := [][]string{{"volume", fmt.Sprintf("%s at %s", x.Volume, exact(x.Offset))}}
	add := func(name, text string) { rows = append(rows, []string{name, text}) }
	switch x.Where {
	case control.PlaceHole:
		add("place", "none: it is a hole")
	case control.PlaceLog:
		add("place", "the operation log")
	default:
		add("place", fmt.Sprintf("device %s at %s", x.Device, exact(x.At)))
		add("on flash", yesNo(x.OnFlash))
	}
	if x.Where != control.PlaceDevice || x.Movable != "" {
		return rows
	}
	class := x.Class
	if x.Pattern != x.Class {
		class += ", with the pattern " + x.Pattern
	}
	add("class", class)
	add("state", x.State)
	add("pinned", yesNo(x.Pinned))
	rank := "none"
	if x.Rank > 0 {
		rank = fmt.Sprintf("%d of %d", x.Rank, x.Of)
	}
	add("rank", fmt.Sprintf("%s; %d find room on flash", rank, x.Slots))
	add("flash saves", took(x.Benefit)+" in a window")
	if x.Rule != "" {
		verdict := "does not hold"
		switch {
		case x.RuleError != "":
			verdict = "cannot be evaluated: " + x.RuleError
		case x.Holds:
			verdict = "holds"
		}
		add("rule", strings.Join(strings.Fields(x.Rule), " ")+": "+verdict)
	}
	if len(x.Missing) > 0 {
		add("missing", strings.Join(x.Missing, ", "))
	}
	if x.Failure != "" {
		add("failure", x.Failure)
		add("next try", when(x.Retry))
	}
	return rows
}

func limitRows(x control.FlashExplanation) [][]string {
	rows := [][]string{{"PARAMETER", "SHOWS", "LIMIT", "HOLDS"}}
	for _, l := range x.Limits {
		rows = append(rows, []string{l.Name, l.Value, l.Limit, yesNo(l.Holds)})
	}
	return rows
}
