package host

import (
	"context"

	"github.com/pollux-storage/pollux/internal/control"
)

// scrubPool hands a command for the scrub of a pool to the guest that serves it.
func (a *agent) scrubPool(ctx context.Context, name string, c control.ScrubChange) (control.Pool, error) {
	p, _, cl, err := a.poolHolder(ctx, name)
	if err != nil {
		return p, err
	}
	return cl.ScrubPool(ctx, name, c)
}
