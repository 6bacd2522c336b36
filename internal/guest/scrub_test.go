package guest

import (
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/partner"
)

// The scrub of a pool takes the commands that suit its state and no others, events
// reach the agent in their order, and what is lost is an alert.
func TestScrubPool(t *testing.T) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	c, ctx := b.client(), t.Context()
	for _, x := range []struct {
		action string
		kind   control.Kind // of the error
		state  string
	}{
		{control.ScrubPause, control.KindRefused, control.ScrubNever},
		{control.ScrubStart, "", control.ScrubRunning},
		{control.ScrubStart, control.KindRefused, control.ScrubRunning},
		{control.ScrubPause, "", control.ScrubPaused},
		{control.ScrubStart, control.KindRefused, control.ScrubPaused},
		{control.ScrubResume, "", control.ScrubRunning},
		{control.ScrubResume, control.KindRefused, control.ScrubRunning},
		{control.ScrubStop, "", control.ScrubStopped},
		{control.ScrubStop, control.KindRefused, control.ScrubStopped},
		{"rub", control.KindInvalid, control.ScrubStopped},
	} {
		p, err := c.ScrubPool(ctx, "pool-a", control.ScrubChange{Action: x.action})
		if got := kindOf(err); got != x.kind || err == nil && p.Stats.Scrub.State != x.state {
			t.Errorf("%s, wanted %q and then %s: %v, %+v", x.action, x.kind, x.state, err, p.Stats.Scrub)
		}
		if err == nil {
			if m := b.expect(partner.KindEvent); m.Identity != "a" || m.Event != "scrub-"+x.action || m.Reason == "" {
				t.Errorf("%s is told as %+v", x.action, m)
			}
		}
	}
	if _, err := c.ScrubPool(ctx, "pool-x", control.ScrubChange{Action: control.ScrubStart}); kindOf(err) != control.KindNotFound {
		t.Error(err)
	}
	st, err := c.Status(ctx)
	if err != nil || !strings.Contains(strings.Join(st.Guests[0].Alerts, ""), "found blocks that no copy has") {
		t.Errorf("%v: %q", err, st.Guests[0].Alerts)
	}
}

// kindOf returns the kind of an error, "" for none.
func kindOf(err error) control.Kind {
	if err == nil {
		return ""
	}
	return control.KindOf(err)
}
