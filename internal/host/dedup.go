package host

import (
	"context"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/control"
)

// dedup tells what the pools of the pair share, in the order of their guests, whoever
// serves them.
func (a *agent) dedup(ctx context.Context) ([]control.PoolDedup, error) {
	s, err := a.snapshot(ctx)
	if err != nil {
		return nil, err
	}
	got, errs := askAll(ctx, a, s, func(ctx context.Context, c *control.Client) ([]control.PoolDedup, error) { return c.Dedup(ctx) })
	all := []control.PoolDedup{}
	for _, g := range a.names() {
		if err := errs[g]; err != nil {
			return nil, fmt.Errorf("guest %s: %w", g, err)
		}
		all = append(all, got[g]...)
	}
	slices.SortStableFunc(all, func(x, y control.PoolDedup) int {
		return slices.Index(a.names(), x.Guest) - slices.Index(a.names(), y.Guest)
	})
	return all, nil
}

// surveyPool hands a command for the survey of a pool to the guest that serves it.
func (a *agent) surveyPool(ctx context.Context, name string, c control.SurveyChange) (control.PoolDedup, error) {
	_, _, cl, err := a.poolHolder(ctx, name)
	if err != nil {
		return control.PoolDedup{}, err
	}
	return cl.SurveyPool(ctx, name, c)
}
