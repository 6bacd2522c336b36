package cli

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

type poolCopyOptions struct {
	*session
	name, device, replacement string
	action                    string
	size                      size
}

func newPoolReplace(s *session) *cobra.Command {
	o := &poolCopyOptions{session: s, action: control.CopyReplace}
	c := &cobra.Command{
		Use:   "replace NAME DEVICE [NEW]",
		Short: "Put an empty device in the place of one of several copies",
		Long: `Put an empty device in the place of one of several copies, while the pool serves.
Without NEW it is DEVICE itself, which was exchanged or emptied. The new device is
filled in the background: "pollux pool show NAME" tells how far that is. A file that
does not exist is created with --size bytes.

` + sizeHelp,
		Args: func(c *cobra.Command, got []string) error {
			if len(got) == 3 {
				return args("NAME", "DEVICE", "NEW")(c, got)
			}
			return args("NAME", "DEVICE")(c, got)
		},
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 3 {
				o.replacement = args[2]
			}
			return o.run(c.Context(), args)
		},
	}
	c.Flags().Var(&o.size, "size", "size of a file that is created")
	s.jsonFlag(c)
	return c
}

func newPoolOffline(s *session) *cobra.Command {
	o := &poolCopyOptions{session: s, action: control.CopyOffline}
	return o.command("offline NAME DEVICE", "Take out one of several copies",
		`Take out one of several copies, and close its device. The pool goes on with the
others and notes what changes. The copy comes back with "pollux pool online", or
when the pool is opened the next time.`)
}

func newPoolOnline(s *session) *cobra.Command {
	o := &poolCopyOptions{session: s, action: control.CopyOnline}
	return o.command("online NAME DEVICE", "Take back a copy that was out",
		`Take back a copy that was taken out or had failed. It gets what changed meanwhile,
in the background.`)
}

func (o *poolCopyOptions) command(use, short, long string) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Long: long, Args: args("NAME", "DEVICE"),
		RunE: func(c *cobra.Command, args []string) error { return o.run(c.Context(), args) }}
	o.jsonFlag(c)
	return c
}

func (o *poolCopyOptions) run(ctx context.Context, args []string) error {
	o.name, o.device = args[0], args[1]
	if err := checkName("pool", o.name); err != nil {
		return err
	}
	paths := []string{o.device}
	if o.replacement != "" {
		paths = append(paths, o.replacement)
	}
	paths, err := absolute(paths)
	if err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	change := control.CopyChange{Action: o.action, Device: paths[0], Size: int64(o.size)}
	if len(paths) == 2 {
		change.New = paths[1]
	}
	p, err := client.ChangeCopy(ctx, o.name, change)
	if err != nil {
		return err
	}
	return o.printPool(p)
}
