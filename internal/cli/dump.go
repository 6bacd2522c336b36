package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/dump"
)

type dumpOptions struct {
	*session
	dump.Options
	from   uint64
	volume string
	lba    uint64
}

// dumped is a result of package dump.
type dumped interface {
	// print shows it to people.
	print(s *session) error
	found() *dump.Found
}

func newDump(s *session) *cobra.Command {
	return group("dump", groupStorage, "Look at what is stored, without a guest",
		`Show what devices and regions hold, byte by byte verified. Nothing is written and
no ownership is taken; damage is shown and not an error, and the exit status is
then 6. Devices that a guest has locked are refused, unless --live is given:
then what changes while it is read may seem damaged. A region is looked at
whether a guest works in it or not.`,
		newDumpLabel(s), newDumpSuperblock(s), newDumpJournal(s), newDumpLog(s),
		newDumpRegion(s), newDumpMap(s), newDumpCounts(s), newDumpFlash(s))
}

// command makes a dump command; read gets its arguments.
func (o *dumpOptions) command(c *cobra.Command, read func(args []string) (dumped, error)) *cobra.Command {
	c.RunE = func(_ *cobra.Command, args []string) error {
		if o.Limit < 0 {
			return usagef("--limit %d makes no sense", o.Limit)
		}
		if o.Live {
			o.say("WARNING: --live: what a guest changes meanwhile may seem damaged")
		}
		d, err := read(args)
		if errors.Is(err, hpdi.ErrLocked) {
			return control.NewError(control.KindRefused, err.Error()+": a guest that runs has it",
				"take the pair down first, or look all the same with --live")
		}
		if err != nil {
			return err
		}
		return o.show(d)
	}
	c.Flags().IntVar(&o.Limit, "limit", 100, "rows to show at most")
	o.jsonFlag(c)
	return c
}

// devicesArg accepts one device or more.
func devicesArg(c *cobra.Command, got []string) error {
	if len(got) == 0 {
		return usagef("DEVICE is missing; usage: %s", c.UseLine())
	}
	return nil
}

func (o *dumpOptions) liveFlag(c *cobra.Command) *cobra.Command {
	c.Flags().BoolVar(&o.Live, "live", false, "look although a guest has the device locked")
	return c
}

func (o *dumpOptions) show(d dumped) error {
	f := d.found()
	if o.json {
		if err := o.printJSON(d); err != nil {
			return err
		}
	} else {
		if err := d.print(o.session); err != nil {
			return err
		}
		if f.More > 0 {
			fmt.Fprintf(o.out, "and %d more; --limit shows more\n", f.More)
		}
		for _, n := range f.Notes {
			fmt.Fprintf(o.out, "note: %s\n", n)
		}
		for _, d := range f.Damage {
			fmt.Fprintf(o.out, "DAMAGED: %s\n", d)
		}
	}
	if len(f.Damage) > 0 {
		return &statusError{exitProblems, errReported}
	}
	return nil
}

func newDumpLabel(s *session) *cobra.Command {
	o := &dumpOptions{session: s}
	return o.liveFlag(o.command(&cobra.Command{Use: "label DEVICE", Short: "Both copies of a device's label", Args: args("DEVICE")},
		func(a []string) (dumped, error) {
			r, err := dump.ReadLabels(a[0], o.Options)
			return (*dumpedLabels)(r), err
		}))
}

func newDumpFlash(s *session) *cobra.Command {
	o := &dumpOptions{session: s}
	return o.liveFlag(o.command(&cobra.Command{Use: "flash DEVICE...", Short: "A flash device: what of which devices is there, and the policy", Args: devicesArg,
		Long: `Show what a flash device keeps beside data: its slots, the devices whose data sets are
there, and the policy. Of a mirror name all devices. The table is proved.`},
		func(a []string) (dumped, error) {
			r, err := dump.ReadFlash(a, o.Options)
			return (*dumpedFlash)(r), err
		}))
}

func newDumpSuperblock(s *session) *cobra.Command {
	o := &dumpOptions{session: s}
	return o.liveFlag(o.command(&cobra.Command{Use: "superblock DEVICE", Short: "All superblocks, which counts, and why the others do not", Args: args("DEVICE")},
		func(a []string) (dumped, error) {
			r, err := dump.ReadSuperblocks(a[0], o.Options)
			return (*dumpedSuperblocks)(r), err
		}))
}

func newDumpJournal(s *session) *cobra.Command {
	o := &dumpOptions{session: s}
	c := o.command(&cobra.Command{Use: "journal DEVICE", Short: "The records since the last fold, and why they end where they end", Args: args("DEVICE")},
		func(a []string) (dumped, error) {
			r, err := dump.ReadJournal(a[0], o.from, o.Options)
			return (*dumpedJournal)(r), err
		})
	c.Flags().Uint64Var(&o.from, "from", 0, "number of the first record to show")
	return o.liveFlag(c)
}

func newDumpLog(s *session) *cobra.Command {
	o := &dumpOptions{session: s}
	return o.liveFlag(o.command(&cobra.Command{Use: "log DEVICE", Short: "The batches of the flush log", Args: args("DEVICE")},
		func(a []string) (dumped, error) {
			r, err := dump.ReadFlushLog(a[0], o.Options)
			return (*dumpedLog)(r), err
		}))
}

func newDumpRegion(s *session) *cobra.Command {
	o := &dumpOptions{session: s}
	return o.command(&cobra.Command{Use: "region FILE", Short: "A region and the operation log in it", Args: args("FILE")},
		func(a []string) (dumped, error) {
			r, err := dump.ReadRegion(a[0], o.Options)
			return (*dumpedRegion)(r), err
		})
}

func newDumpMap(s *session) *cobra.Command {
	o := &dumpOptions{session: s}
	c := &cobra.Command{
		Use: "map DEVICE...", Short: "The pages of a volume's map, or the way to one of its blocks",
		Long: `Walk the map of a volume and verify its pages. All devices of the pool must be
given, in any order. Without --volume it lists the volumes. With --lba it shows
the way to one block, whether the journal has a newer mapping than the tree, and
whether the block's content is what was written. What is in an operation log in
memory is newer still; see 'pollux dump region'.`,
		Args: devicesArg,
	}
	o.command(c, func(a []string) (dumped, error) {
		var lba *uint64
		if c.Flags().Changed("lba") {
			if lba = &o.lba; o.volume == "" {
				return nil, usagef("--lba needs --volume")
			}
		}
		r, err := dump.ReadMap(a, o.volume, lba, o.Options)
		return (*dumpedMap)(r), err
	})
	c.Flags().StringVar(&o.volume, "volume", "", "name of the volume")
	c.Flags().Uint64Var(&o.lba, "lba", 0, "block of the volume, of 4 KiB, from 0")
	return o.liveFlag(c)
}

func newDumpCounts(s *session) *cobra.Command {
	o := &dumpOptions{session: s}
	return o.liveFlag(o.command(&cobra.Command{
		Use: "counts DEVICE...", Short: "The reference counts of a pool's blocks", Args: devicesArg,
	}, func(a []string) (dumped, error) {
		r, err := dump.ReadCounts(a, o.Options)
		return (*dumpedCounts)(r), err
	}))
}
