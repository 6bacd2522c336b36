package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/flashmap/collect"
)

type poolAddOptions struct {
	*session
	name    string
	devices []string
	mirror  bool
	force   bool
	size    size
	class   string
	set     size
}

func newPoolAdd(s *session) *cobra.Command {
	o := &poolAddOptions{session: s}
	c := &cobra.Command{
		Use:   "add NAME DEVICE [--mirror DEVICE...] [--class disk|llrrm|flash]",
		Short: "Add a device or a mirror to a pool",
		Long: `Add a block device or file to a pool while it serves. A file that does not
exist is created with --size bytes. "pollux pool remove" takes a device out again.

With --mirror the devices that are named, two or three, become a mirror: each keeps
all of what comes to lie there. A mirror can be added to any pool. A device by itself
is refused for a pool whose devices all are mirrors, for what came to lie on it would
be lost with it; --force adds it all the same.

A device of class llrrm is low-latency random read memory: flash or persistent memory
where reading a single block costs no seek. It gets the blocks that deduplication would
leave stored several times because too few of their neighbours are duplicates, once there
are as many copies as "pollux pool set --llrrm-threshold" says, and nothing else. One in
twenty of the bytes that are stored is ample. Many volumes share what lies there, so that
they all lose it with the device: make it a mirror where that must not be.

A device of class flash gets the data of the disks that is used most, in sets of --set-bytes
(64K to 1M, 256K by default), and is then the only place where that is: whatever is on it is
lost with it, unless it is a mirror. A pool has one flash device, or one mirror. "pollux
flash" shows and manages what is there.

` + sizeHelp,
		Example: "  pollux pool add pool-a /dev/vdd\n" +
			"  pollux pool add pool-a --class flash --mirror /dev/nvme0n1 /dev/nvme1n1\n" +
			"  pollux pool add pool-a --mirror /dev/vdd /dev/vde\n" +
			"  pollux pool add pool-a --class llrrm --mirror /dev/nvme0n1 /dev/nvme1n1",
		Args: func(c *cobra.Command, got []string) error {
			if !o.mirror || len(got) < 2 {
				return args("NAME", "DEVICE")(c, got)
			}
			if n := len(got) - 1; n < 2 || n > config.MaxCopies {
				return usagef("a mirror of %d devices; 2 to %d are possible", n, config.MaxCopies)
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			o.name, o.devices = args[0], args[1:]
			return o.run(c.Context())
		},
	}
	c.Flags().BoolVar(&o.mirror, "mirror", false, "make a mirror of the devices")
	c.Flags().StringVar(&o.class, "class", control.ClassDisk, `what the device is used for, "disk", "llrrm" or "flash"`)
	c.Flags().Var(&o.set, "set-bytes", "size of the data sets of flash")
	c.Flags().BoolVar(&o.force, "force", false, "add a device by itself to a pool of mirrors")
	c.Flags().Var(&o.size, "size", "size of a file that is created")
	s.jsonFlag(c)
	return c
}

func (o *poolAddOptions) run(ctx context.Context) error {
	if err := checkName("pool", o.name); err != nil {
		return err
	}
	class := ""
	switch o.class {
	case control.ClassDisk:
	case control.ClassLLRRM, control.ClassFlash:
		class = o.class
	default:
		return usagef("there is no class of devices %q: say %s, %s or %s", o.class, control.ClassDisk, control.ClassLLRRM, control.ClassFlash)
	}
	if o.set != 0 {
		if class != control.ClassFlash {
			return usagef("--set-bytes goes only with --class flash")
		}
		if err := (collect.Geometry{Size: 1, SetBytes: int64(o.set)}).Validate(); err != nil {
			return usagef("--set-bytes: %w", err)
		}
	}
	devices, err := absolute(o.devices)
	if err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	p, err := client.AddDevice(ctx, o.name, control.PoolAdd{Device: devices[0], Copies: devices[1:], Size: int64(o.size), Force: o.force, Class: class, SetBytes: int64(o.set)})
	if err != nil {
		return err
	}
	if class == control.ClassLLRRM && len(devices) == 1 && !o.json {
		fmt.Fprintf(o.err, "note: many volumes share what moves to %s, and lose it with the device; a mirror (--mirror) of two is safer\n", devices[0])
	}
	if class == control.ClassFlash && len(devices) == 1 && !o.json {
		fmt.Fprintf(o.err, "note: whatever moves to %s is lost with it; a mirror (--mirror) of two is safer\n", devices[0])
	}
	return o.printPool(p)
}
