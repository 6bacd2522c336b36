package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

func newDedupSurvey(s *session) *cobra.Command {
	c := group("survey", "", "Find what deleting each volume would free",
		`A survey finds what deleting each volume of a pool would free, which is what nothing
else refers to, and in how long pieces volumes lie on the devices, which tells how often
a reader has to jump. It reads the maps of all volumes in the background, 16 bytes for
each block, and those of volumes that share blocks all over a large pool several times.
"pollux dedup status" shows how far it is and what it has found. That is forgotten when
the pool is opened anew.`)
	for _, sub := range []struct{ action, short string }{
		{control.SurveyStart, "Begin a survey"}, {control.SurveyStop, "End a survey before it is through"},
	} {
		o := &dedupSurveyOptions{s, sub.action}
		sub := &cobra.Command{Use: sub.action + " POOL", Short: sub.short, Args: args("POOL"),
			RunE: func(c *cobra.Command, args []string) error { return o.run(c.Context(), args[0]) }}
		s.jsonFlag(sub)
		c.AddCommand(sub)
	}
	return c
}

type dedupSurveyOptions struct {
	*session
	action string
}

func (o *dedupSurveyOptions) run(ctx context.Context, name string) error {
	if err := checkName("pool", name); err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	p, err := client.SurveyPool(ctx, name, control.SurveyChange{Action: o.action})
	if err != nil {
		return err
	}
	if o.json {
		return o.printJSON(p.Survey)
	}
	return table(o.out, [][]string{{"pool", p.Pool}, {"survey", surveyText(p.Survey)}})
}

// surveyText says in one line what is known of the surveys of a pool.
func surveyText(s control.DedupSurvey) string {
	if s.State == "" || s.State == "never" {
		return "none since it was opened"
	}
	text := s.State
	if s.State != "done" {
		text = fmt.Sprintf("%s: %d of %d blocks", s.State, s.Done, s.Total)
	}
	if s.Why != "" {
		text += "; " + s.Why
	}
	return text
}

// surveyColumns say what was found of a volume.
func surveyColumns(v *control.VolumeSurvey) []string {
	if v == nil {
		return []string{"-", "-", "-"}
	}
	frees, extent := humanSize(v.WouldFree), "-"
	if !v.Exact {
		frees = "about " + frees
	}
	if v.Pieces > 0 {
		extent = extentText(v.MeanExtent)
	}
	return []string{frees, extent, scrubTime(v.At)}
}

// extentText shows a mean length.
func extentText(blocks float64) string { return fmt.Sprintf("%.1f blocks", blocks) }
