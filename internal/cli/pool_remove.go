package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

type poolRemoveOptions struct {
	*session
	name   string
	device string
	cancel bool
	wait   bool
}

func newPoolRemove(s *session) *cobra.Command {
	o := &poolRemoveOptions{session: s}
	c := &cobra.Command{
		Use:   "remove NAME DEVICE",
		Short: "Take a device out of a pool",
		Long: `Take a device out of a pool while it serves. What lies on the device is moved to
the others in the background, also after a takeover; then the device is no part of
the pool any more, and its label is erased. Of a mirror, name any copy: all of them go.
"pollux pool show NAME" tells how far that is, and --cancel ends it: the device stays,
and what was moved remains where it is.

The first device of a pool holds its superblocks, its journal and its flush log and
cannot be removed. Nor can one be whose content has no room on the others.`,
		Args: func(c *cobra.Command, got []string) error {
			if o.cancel {
				return args("NAME")(c, got)
			}
			return args("NAME", "DEVICE")(c, got)
		},
		RunE: func(c *cobra.Command, args []string) error {
			if o.name = args[0]; !o.cancel {
				o.device = args[1]
			}
			return o.run(c.Context())
		},
	}
	c.Flags().BoolVar(&o.cancel, "cancel", false, "let the device stay that is being removed")
	c.Flags().BoolVar(&o.wait, "wait", false, "return when the device is removed")
	s.jsonFlag(c)
	return c
}

func (o *poolRemoveOptions) run(ctx context.Context) error {
	if err := checkName("pool", o.name); err != nil {
		return err
	}
	if o.cancel && o.wait {
		return control.NewError(control.KindInvalid, "--cancel does not go with --wait", "what was moved remains where it is, so there is nothing to wait for")
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	req := control.PoolRemove{Cancel: o.cancel}
	if !o.cancel {
		devices, err := absolute([]string{o.device})
		if err != nil {
			return err
		}
		req.Device = devices[0]
	}
	p, err := client.RemoveDevice(ctx, o.name, req)
	if err != nil {
		return err
	}
	if o.wait {
		if p, err = o.await(ctx, client); err != nil {
			return err
		}
	}
	return o.printPool(p)
}

// removePoll is the time between two looks at a removal.
const removePoll = 200 * time.Millisecond

// await waits for the end of the removal, whoever serves the pool.
func (o *poolRemoveOptions) await(ctx context.Context, client *control.Client) (control.Pool, error) {
	for {
		p, err := client.Pool(ctx, o.name)
		if err != nil {
			return p, err
		}
		if p.State == "open" {
			r := p.Stats.Removal
			if r == nil {
				return p, o.outcome(p)
			}
			if r.Stuck != "" {
				return p, control.NewError(control.KindRefused, fmt.Sprintf("device %s cannot be removed now: %s", r.Device, r.Stuck),
					"the removal goes on when that has changed; end it with `pollux pool remove --cancel "+o.name+"`")
			}
		}
		select {
		case <-ctx.Done():
			return p, ctx.Err()
		case <-time.After(removePoll):
		}
	}
}

// outcome tells a removal that came to its end from one that was cancelled.
func (o *poolRemoveOptions) outcome(p control.Pool) error {
	devices, err := absolute([]string{o.device})
	if err != nil {
		return err
	}
	for _, d := range p.Devices {
		if d.Path == devices[0] && d.State != "removing" {
			return control.NewError(control.KindRefused, fmt.Sprintf("the removal of device %s was cancelled", d.Path), "")
		}
	}
	return nil
}

// removalLine says in one line how far a removal is.
func removalLine(r *control.RemovalStatus) string {
	text := fmt.Sprintf("%s, %.1f %%, %s left", r.Device, r.Percent(), humanSize(r.Left))
	if r.Stuck != "" {
		return text + "; stuck: " + r.Stuck
	}
	return text + "; " + orDash(r.State)
}
