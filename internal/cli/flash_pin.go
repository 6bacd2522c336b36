package cli

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

func newFlashPin(s *session) *cobra.Command {
	return group("pin", "", "Keep volumes, or parts of them, on flash",
		`What is pinned moves to flash whatever its use, before everything else, and stays there,
as far as there is room. What is written to the range later is pinned, too.`,
		newFlashPinAdd(s), newFlashPinRemove(s), newFlashPinList(s))
}

type flashPinOptions struct {
	*session
	change control.FlashPinChange
	offset offset
	length size
}

func newFlashPinAdd(s *session) *cobra.Command {
	o := &flashPinOptions{session: s, change: control.FlashPinChange{Action: control.PinAdd}}
	return o.command(&cobra.Command{
		Use:     "add VOLUME [--offset N] [--length N]",
		Short:   "Pin a volume, or a range of it, to flash",
		Example: "  pollux flash pin add disk1\n  pollux flash pin add disk1 --offset 1G --length 512M",
	})
}

func newFlashPinRemove(s *session) *cobra.Command {
	o := &flashPinOptions{session: s, change: control.FlashPinChange{Action: control.PinRemove}}
	return o.command(&cobra.Command{
		Use:   "remove VOLUME [--offset N] [--length N]",
		Short: "Let a volume, or a range of it, leave flash again",
		Long: `Take away the pin of a range, which must be the one that was pinned; without a range
all pins of the volume. Its data stays on flash as long as
its use says so, or nothing else wants the room.`,
	})
}

// command completes a command that changes pins.
func (o *flashPinOptions) command(c *cobra.Command) *cobra.Command {
	c.Args, c.ValidArgsFunction = args("VOLUME"), o.volumeNames
	c.RunE = func(c *cobra.Command, args []string) error {
		ranged := c.Flags().Changed("offset") || c.Flags().Changed("length")
		o.change.All = o.change.Action == control.PinRemove && !ranged
		return o.run(c.Context(), args[0])
	}
	c.Flags().Var(&o.offset, "offset", "where the range begins")
	c.Flags().Var(&o.length, "length", "its bytes; to the end of the volume without it")
	o.jsonFlag(c)
	return c
}

func (o *flashPinOptions) run(ctx context.Context, volume string) error {
	if err := checkName("volume", volume); err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	o.change.Offset, o.change.Length = int64(o.offset), int64(o.length)
	p, err := client.ChangeFlashPin(ctx, volume, o.change)
	if err != nil {
		return err
	}
	return o.printPins(p)
}

type flashPinListOptions struct{ *session }

func newFlashPinList(s *session) *cobra.Command {
	o := &flashPinListOptions{s}
	c := &cobra.Command{
		Use: "list POOL", Short: "Show what is pinned, and how much of it is on flash",
		Args: args("POOL"),
		RunE: func(c *cobra.Command, args []string) error { return o.run(c.Context(), args[0]) },
	}
	s.jsonFlag(c)
	return c
}

func (o *flashPinListOptions) run(ctx context.Context, name string) error {
	p, err := o.poolFlash(ctx, name)
	if err != nil {
		return err
	}
	return o.printPins(p)
}

func (s *session) printPins(p control.PoolFlash) error {
	if s.json {
		return s.printJSON(orEmpty(p.Pins))
	}
	rows := pinRows(p)
	if len(rows) == 1 {
		fmt.Fprintf(s.err, "nothing is pinned to the flash of pool %s\n", p.Pool)
		return nil
	}
	return table(s.out, rows)
}

func pinRows(p control.PoolFlash) [][]string {
	rows := [][]string{{"PINNED", "FROM", "LENGTH", "SETS", "ON FLASH", "WILL COME", "STATE"}}
	for _, pin := range p.Pins {
		length := "to its end"
		if pin.Length > 0 {
			length = exact(pin.Length)
		}
		rows = append(rows, []string{orDash(pin.Volume), exact(pin.Offset), length, strconv.Itoa(pin.Sets), strconv.Itoa(pin.On), strconv.Itoa(pin.Room), pin.State})
	}
	return rows
}
