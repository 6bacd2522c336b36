package cli

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/dedup"
)

// dedupHelp goes into the help of every command that says what a volume shares.
const dedupHelp = `With deduplication on, blocks that follow each other and are stored already, on
one track and in the same order, are shared instead of written once more: at
least THN of them at a time. A small THN saves more, a large one leaves longer
pieces to be read in sequence. What is shared stays so when it is switched off.`

// dedupFlags are --dedup and --thn.
type dedupFlags struct {
	on  *bool // nil if not given
	thn *int
}

func (d *dedupFlags) addTo(c *cobra.Command) {
	c.Flags().Var((*onFlag)(d), "dedup", "share blocks with what is stored already: on or off")
	c.Flags().Var((*thnFlag)(d), "thn", fmt.Sprintf("share series of at least so many blocks, 1 to %d (default %d)", dedup.MaxRun, dedup.DefaultRun))
}

// onFlag is --dedup of dedupFlags.
type onFlag dedupFlags

// String shows the value in the help.
func (f *onFlag) String() string {
	switch {
	case f.on == nil:
		return ""
	case *f.on:
		return "on"
	}
	return "off"
}

// Type names the value in the help.
func (f *onFlag) Type() string { return "on|off" }

// Set parses the value of the flag.
func (f *onFlag) Set(text string) error {
	if text != "on" && text != "off" {
		return usagef("%q is neither on nor off", text)
	}
	on := text == "on"
	f.on = &on
	return nil
}

// thnFlag is --thn of dedupFlags.
type thnFlag dedupFlags

// String shows the value in the help.
func (f *thnFlag) String() string {
	if f.thn == nil {
		return ""
	}
	return strconv.Itoa(*f.thn)
}

// Type names the value in the help.
func (f *thnFlag) Type() string { return "N" }

// Set parses the value of the flag.
func (f *thnFlag) Set(text string) error {
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > dedup.MaxRun {
		return usagef("%q is not a number of blocks from 1 to %d", text, dedup.MaxRun)
	}
	f.thn = &n
	return nil
}

// check refuses flags that contradict each other.
func (d *dedupFlags) check() error {
	if d.thn != nil && d.on != nil && !*d.on {
		return usagef("--thn says in what series blocks are shared, and --dedup off that none are: give one of them")
	}
	return nil
}

type volumeSetOptions struct {
	*session
	name string
	dedupFlags
}

func newVolumeSet(s *session) *cobra.Command {
	o := &volumeSetOptions{session: s}
	c := &cobra.Command{
		Use:   "set NAME [--dedup on|off] [--thn N]",
		Short: "Change what a volume shares",
		Long:  "Change what a volume shares, from the next write on.\n\n" + dedupHelp,
		Example: `  pollux volume set images --dedup on
  pollux volume set images --thn 32`,
		Args:              args("NAME"),
		ValidArgsFunction: s.volumeNames,
		RunE: func(c *cobra.Command, args []string) error {
			o.name = args[0]
			return o.run(c.Context())
		},
	}
	o.addTo(c)
	s.jsonFlag(c)
	return c
}

func (o *volumeSetOptions) run(ctx context.Context) error {
	if err := checkName("volume", o.name); err != nil {
		return err
	}
	if o.on == nil && o.thn == nil {
		return usagef("set what? --dedup on or off, --thn N, or both")
	}
	if err := o.check(); err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	change := control.VolumeChange{Dedup: o.on}
	if o.thn != nil {
		change.THN = *o.thn
	}
	v, err := client.ChangeVolume(ctx, o.name, change)
	if err != nil {
		return err
	}
	return o.printVolume(v)
}
