package campaign

import (
	"context"
	"fmt"
	"strings"

	"github.com/pollux-storage/pollux/internal/control"
)

// end checks everything a last time: the recount while the pair runs and while
// it does not, and what the volumes hold after a clean restart.
func (c *campaign) end(ctx context.Context) error {
	if err := c.whole(ctx); err != nil {
		return err
	}
	if _, err := c.pair.Check(ctx); err != nil {
		return fmt.Errorf("of the running pair: %w", err)
	}
	var shared []control.PoolDedup
	if err := c.pair.JSON(ctx, &shared, "dedup", "status"); err != nil {
		return err
	}
	if len(shared) == 0 || shared[0].Saved == 0 {
		return fmt.Errorf("nothing is shared: %+v", shared)
	}
	if err := c.pair.Down(ctx); err != nil {
		return err
	}
	if _, err := c.pair.Check(ctx); err != nil {
		return fmt.Errorf("of the pair that is down: %w", err)
	}
	if err := c.pair.Up(ctx); err != nil {
		return err
	}
	for _, d := range c.disks {
		if err := d.settle(ctx); err != nil {
			return fmt.Errorf("after a clean restart: %w", err)
		}
	}
	return nil
}

// report makes an error of a campaign complete.
func (c *campaign) report(err error) error {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d, round %d: %v\n\nthe schedule so far:\n", c.Seed, len(c.done)-1, err)
	for i, r := range c.done {
		fmt.Fprintf(&b, "  %3d %v\n", i, r)
	}
	fmt.Fprintf(&b, "run it again: go test ./test/campaign -v -run TestCampaign -timeout 0 -seed %d -rounds %d", c.Seed, len(c.done)+5)
	if c.Only != "" {
		fmt.Fprintf(&b, " -only %q", c.Only)
	}
	fmt.Fprintf(&b, "\nits files: %s\n\n%s", c.pair.Dir, c.pair.Logs(25))
	return &failure{b.String(), err}
}

// failure is an error with its report.
type failure struct {
	text string
	err  error
}

// Error is the whole report.
func (f *failure) Error() string { return f.text }

func (f *failure) Unwrap() error { return f.err }
