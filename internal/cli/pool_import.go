package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

type poolImportOptions struct {
	*session
	pool  string
	paths []string
	control.PoolImport
}

func newPoolImport(s *session) *cobra.Command {
	o := &poolImportOptions{session: s}
	c := &cobra.Command{
		Use:   "import [NAME|ID] [PATH...]",
		Short: "List pools that are on devices, or take one over",
		Long: `List the pools that are found on files and block devices, or take one over: the one
of that name or id. A PATH is a device or a folder with devices, and is told from a
name by a slash in it; without one, all block devices and the directory of the pair
are looked through. The pair remembers devices by the paths under which they were
found: look in /dev/disk/by-id for paths that stay the same.

A pool goes to the guest that --guest names, or to one that has no pool, under its
name or the one that --as gives it. Refused are:

  a pool that was not exported, for whoever had it last may use it or open it again,
  and two that write to a pool destroy it; --force takes it all the same;

  a pool that was not closed on this host since it was started, by another pair: its
  newest writes are in that pair's memory. --force --accept-loss takes it without
  what was acknowledged and not flushed;

  a pool that a process on this host has open, or of which devices are missing.

A mirror may lack copies. Listing works without a pair, and writes nothing.`,
		Example: "  pollux pool import\n" +
			"  pollux pool import tank /dev/disk/by-id\n" +
			"  pollux pool import pool-a ./old --as archive --guest b",
		RunE: func(c *cobra.Command, words []string) error {
			if err := o.sort(words); err != nil {
				return err
			}
			if o.pool == "" {
				return o.list()
			}
			return o.run(c.Context())
		},
	}
	f := c.Flags()
	f.StringVar(&o.As, "as", "", "name that the pool shall have (default: the one it has)")
	f.StringVar(&o.Guest, "guest", "", "guest that shall have it (default: one without a pool)")
	f.BoolVar(&o.Force, "force", false, "take a pool that was not exported")
	f.BoolVar(&o.AcceptLoss, "accept-loss", false, "give up writes that are only in the memory of another pair of this host")
	s.jsonFlag(c)
	return c
}

// sort tells a name from paths.
func (o *poolImportOptions) sort(words []string) error {
	for _, w := range words {
		switch {
		case strings.ContainsRune(w, '/') || w == "." || w == "..":
			o.paths = append(o.paths, w)
		case o.pool == "":
			o.pool = w
		default:
			return usagef("%q is one pool too many; a path has a slash in it, as in ./%[1]s", w)
		}
	}
	if o.pool == "" && (o.As != "" || o.Guest != "" || o.Force || o.AcceptLoss) {
		return usagef("which pool? its name or id is missing; without one, pools are only listed")
	}
	var err error
	o.paths, err = absolute(o.paths)
	return err
}

func (o *poolImportOptions) list() error {
	dirs, err := absolute([]string{o.dir})
	if err != nil {
		return err
	}
	found, err := o.backend.find(o.paths, dirs[0])
	if err != nil {
		return err
	}
	if o.json {
		return o.printJSON(found)
	}
	for _, n := range found.Notes {
		o.say("note: %s", n)
	}
	if len(found.Pools) == 0 {
		fmt.Fprintln(o.out, "no pool was found")
		return nil
	}
	rows := [][]string{{"NAME", "ID", "GUEST", "STATE", "DEVICES", "LAST HOST", "BOOT"}}
	for _, p := range found.Pools {
		devices := fmt.Sprintf("%d of %d", len(p.Devices), p.Wants)
		if p.Wants == 0 {
			devices = fmt.Sprintf("%d of ?", len(p.Devices))
		}
		boot := orDash(p.Boot)
		if p.Here {
			boot = "this one"
		}
		rows = append(rows, []string{p.Name, p.ID, orDash(p.Guest), p.State, devices, orDash(p.Host), boot})
	}
	if err := table(o.out, rows); err != nil {
		return err
	}
	for _, p := range found.Pools {
		if err := o.printFound(p); err != nil {
			return err
		}
	}
	return nil
}

// printFound shows the devices of a pool, and what is to be known.
func (o *poolImportOptions) printFound(p control.FoundPool) error {
	fmt.Fprintf(o.out, "\n%s:\n", p.Name)
	rows := [][]string{{"DEVICE", "COPY", "PATH", "SIZE", "STATE"}}
	for _, d := range p.Devices {
		for i, c := range d.Copies {
			number, state := "-", c.State
			if len(d.Copies) > 1 {
				number = strconv.Itoa(i + 1)
			}
			if c.InUse {
				state = strings.TrimPrefix(state+", in use", ", ")
			}
			rows = append(rows, []string{strconv.Itoa(d.Number), number, orDash(c.Path), humanSize(d.Size), state})
		}
	}
	for _, n := range p.Missing {
		rows = append(rows, []string{strconv.Itoa(n), "-", "-", "-", "missing"})
	}
	if err := table(o.out, rows); err != nil {
		return err
	}
	for _, n := range p.Notes {
		fmt.Fprintf(o.out, "note: %s\n", n)
	}
	return nil
}

func (o *poolImportOptions) run(ctx context.Context) error {
	if o.As != "" {
		if err := checkName("pool", o.As); err != nil {
			return err
		}
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	o.Pool, o.Paths = o.pool, o.paths
	p, err := client.ImportPool(ctx, o.PoolImport)
	if err != nil {
		return err
	}
	return o.printPool(p)
}
