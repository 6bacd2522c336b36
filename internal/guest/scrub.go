package guest

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/pool"
)

// scrubActions are what may be asked of a scrub.
var scrubActions = []string{control.ScrubStart, control.ScrubPause, control.ScrubResume, control.ScrubStop}

// scrubPool begins, pauses, goes on with or ends the scrub of a pool.
func (g *Guest) scrubPool(ctx context.Context, name string, c control.ScrubChange) (control.Pool, error) {
	t, st, err := g.serving(name)
	if err != nil {
		return control.Pool{}, err
	}
	if !slices.Contains(scrubActions, c.Action) {
		return control.Pool{}, control.NewError(control.KindInvalid, fmt.Sprintf("a scrub cannot be made to %q", c.Action), "")
	}
	err = st.Scrub(ctx, c.Action)
	if e := (*pool.ScrubStateError)(nil); errors.As(err, &e) {
		err = control.NewError(control.KindRefused, e.Error(), fmt.Sprintf("see `pollux pool scrub status %s`", name))
	}
	if err != nil {
		return control.Pool{}, err
	}
	return g.poolOf(ctx, t.identity)
}

// toldAtOnce is how many events of a pool wait for the loop; further ones are lost.
const toldAtOnce = 64

// teller returns what tells the agent of events of an identity's pool, in their
// order, until ctx ends.
func (g *Guest) teller(ctx context.Context, identity string) func(kind, text string) {
	told := make(chan partner.Message, toldAtOnce)
	g.wg.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case m := <-told:
				g.step(m)
			}
		}
	})
	return func(kind, text string) {
		select {
		case told <- partner.Message{Kind: partner.KindEvent, Identity: identity, Event: kind, Reason: text}:
		default:
		}
	}
}

func scrubStatus(s pool.ScrubStats) control.ScrubStatus {
	return control.ScrubStatus{
		State: s.State.String(), Now: scrubResult(s.Now), Last: scrubResult(s.Last),
		Done: int64(s.Done), Total: int64(s.Total), Left: control.Duration(s.Left), Next: s.Next,
	}
}

func scrubResult(r pool.ScrubResult) control.ScrubResult {
	out := control.ScrubResult{
		Begun: r.Begun, Ended: r.Ended, Took: control.Duration(r.Took), Blocks: int64(r.Blocks), Bytes: int64(r.Bytes),
		Repaired: int64(r.Repaired), Unreadable: int64(r.Unreadable),
	}
	for _, f := range r.Findings {
		out.Findings = append(out.Findings, control.ScrubFinding{Volume: f.Volume, Block: int64(f.Block), Text: f.Text})
	}
	return out
}
