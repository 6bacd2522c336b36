package cli

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
)

type poolCreateOptions struct {
	*session
	name    string
	guest   string
	devices []string
	mirror  int
	size    size
	log     size
}

func newPoolCreate(s *session) *cobra.Command {
	o := &poolCreateOptions{session: s}
	c := &cobra.Command{
		Use:   "create NAME --guest a|b --device PATH...",
		Short: "Make a pool for a guest that has none",
		Long: `Make a pool for a guest that has none. A device is a block device or a file;
a file that does not exist is created with --size bytes. A device that holds
something already is refused.

With --mirror N each block is kept on N devices, 2 or 3: the devices are taken in
groups of N in the order in which they are named. The pool goes on when all but
one of a group fail, and a block that has decayed on one is read from another.

` + sizeHelp,
		Example: "  pollux pool create fast --guest a --device /dev/nvme0n1 --device /dev/nvme1n1\n" +
			"  pollux pool create safe --guest b --mirror 2 --device /dev/sda --device /dev/sdb",
		Args: args("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			o.name = args[0]
			return o.run(c.Context())
		},
	}
	f := c.Flags()
	f.StringVar(&o.guest, "guest", "", "guest that owns the pool, a or b")
	f.StringArrayVar(&o.devices, "device", nil, "file or block device; may be given more than once")
	f.IntVar(&o.mirror, "mirror", 1, "on how many devices each block is kept, 1 to 3")
	f.Var(&o.size, "size", "size of files that are created")
	f.Var(&o.log, "log", "size of the operation log in the region (default: as configured)")
	s.jsonFlag(c)
	return c
}

func (o *poolCreateOptions) run(ctx context.Context) error {
	if err := checkName("pool", o.name); err != nil {
		return err
	}
	if o.guest == "" {
		return usagef("whose pool? say --guest a or --guest b")
	}
	if len(o.devices) == 0 {
		return usagef("of which devices? say --device PATH once for each")
	}
	if o.mirror < 1 || o.mirror > config.MaxCopies || len(o.devices)%o.mirror != 0 {
		return usagef("--mirror %d does not go with %d devices: it is 1 to %d, and devices are named in groups of so many", o.mirror, len(o.devices), config.MaxCopies)
	}
	devices, err := absolute(o.devices)
	if err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	c := control.PoolCreate{Name: o.name, Guest: o.guest, Devices: devices, Size: int64(o.size), LogBytes: int64(o.log)}
	if o.mirror > 1 {
		c.Copies = o.mirror
	}
	p, err := client.CreatePool(ctx, c)
	if err != nil {
		return err
	}
	return o.printPool(p)
}

// absolute makes paths absolute, because the agent has another working
// directory than the person.
func absolute(paths []string) ([]string, error) {
	var abs []string
	for _, p := range paths {
		a, err := filepath.Abs(p)
		if err != nil {
			return nil, fmt.Errorf("device %q: %w", p, err)
		}
		abs = append(abs, a)
	}
	return abs, nil
}
