package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

type flashEvacuateOptions struct {
	*session
	name string
	stop bool
	wait bool
}

func newFlashEvacuate(s *session) *cobra.Command {
	o := &flashEvacuateOptions{session: s}
	c := &cobra.Command{
		Use:   "evacuate POOL",
		Short: "Move all data back from flash",
		Long: `Move all data back from the flash of a pool to its devices, in the background, also after
a restart or a takeover. Nothing goes to flash until --stop says that it is used again.
"pollux pool remove" does the same and takes the device out then.`,
		Args: args("POOL"),
		RunE: func(c *cobra.Command, args []string) error {
			o.name = args[0]
			return o.run(c.Context())
		},
	}
	c.Flags().BoolVar(&o.stop, "stop", false, "use flash again")
	c.Flags().BoolVar(&o.wait, "wait", false, "return when nothing is on flash any more")
	s.jsonFlag(c)
	return c
}

func (o *flashEvacuateOptions) run(ctx context.Context) error {
	if err := checkName("pool", o.name); err != nil {
		return err
	}
	if o.stop && o.wait {
		return usagef("--stop does not go with --wait: there is nothing to wait for")
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	action := control.EvacuateStart
	if o.stop {
		action = control.EvacuateStop
	}
	p, err := client.EvacuateFlash(ctx, o.name, control.FlashEvacuation{Action: action})
	if err == nil && o.wait {
		p, err = o.await(ctx, client)
	}
	if err != nil {
		return err
	}
	return o.printFlash(p)
}

// await waits for the end of the evacuation, whoever serves the pool, and shows its progress
// to a person.
func (o *flashEvacuateOptions) await(ctx context.Context, client *control.Client) (control.PoolFlash, error) {
	var l *progressLine
	if o.watched {
		l = &progressLine{w: o.err, now: o.now}
		defer l.clear()
	}
	for {
		p, err := client.Pool(ctx, o.name)
		if err != nil {
			return control.PoolFlash{}, err
		}
		if p.State == "open" {
			f := p.Stats.Flash
			switch {
			case f == nil:
				return control.PoolFlash{}, control.NewError(control.KindRefused, fmt.Sprintf("pool %s has no flash any more", o.name), "")
			case f.State == control.FlashEvacuated:
				return client.Flash(ctx, o.name)
			case f.State == control.FlashFailed && f.Total == 0:
				return control.PoolFlash{}, control.NewError(control.KindRefused, fmt.Sprintf("the flash of pool %s has failed, and nothing moves back", o.name),
					"see `pollux flash status "+o.name+"`")
			case f.State == control.FlashInUse:
				return control.PoolFlash{}, control.NewError(control.KindRefused, fmt.Sprintf("the evacuation of the flash of pool %s was stopped", o.name), "")
			case l != nil:
				l.show(control.CheckProgress{Pool: o.name, Phase: "evacuation", Done: int64(f.Total-f.Left) * f.SetBytes, Total: int64(f.Total) * f.SetBytes})
			}
		}
		select {
		case <-ctx.Done():
			return control.PoolFlash{}, ctx.Err()
		case <-time.After(removePoll):
		}
	}
}
