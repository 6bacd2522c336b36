package cli

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

func newVolume(s *session) *cobra.Command {
	return group("volume", groupStorage, "Create, list and change volumes",
		"Volumes are thin: they take the space of what was written.",
		newVolumeCreate(s), newVolumeList(s), newVolumeShow(s),
		newVolumeResize(s), newVolumeSet(s), newVolumeRename(s), newVolumeDelete(s))
}

// printVolume shows one volume and how to reach it.
func (s *session) printVolume(v control.Volume) error {
	if s.json {
		return s.printJSON(v)
	}
	rows := [][]string{
		{"volume", v.Name},
		{"size", fmt.Sprintf("%s (%d bytes)", humanSize(v.Size), v.Size)},
		{"used", humanSize(v.Used)},
		{"dedup", v.Sharing()},
		{"guest", v.Guest},
		{"pool", v.Pool},
		{"created", when(v.Created)},
		{"nbd", v.NBD},
		{"nbd_unix", v.NBDUnix},
	}
	return table(s.out, slices.Concat(rows, vhostRows(v.VhostUser), ringRows(v.Ring)))
}

// vhostRows show how virtual machines attach to a volume.
func vhostRows(v *control.VhostUser) [][]string {
	switch {
	case v == nil:
		return nil
	case v.Socket == "":
		return [][]string{{"vhost_user", "no socket: " + v.Note}}
	}
	var words []string
	for _, w := range v.QEMU {
		words = append(words, shellQuote(w))
	}
	return [][]string{{"vhost_user", v.URI}, {"serial", v.Serial}, {"attached to", control.Number(v.Clients, "virtual machine")}, {"qemu", "qemu-system-x86_64 ... " + strings.Join(words, " ")}}
}

// ringRows show how programs open a volume over a ring in shared memory.
func ringRows(v *control.VolumeSocket) [][]string {
	switch {
	case v == nil:
		return nil
	case v.Socket == "":
		return [][]string{{"ring", "no socket: " + v.Note}}
	}
	return [][]string{{"ring", v.URI}, {"open in", control.Number(v.Clients, "program")}}
}

// volumeNames completes the name of a volume in a shell.
func (s *session) volumeNames(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	client, err := s.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	volumes, err := client.Volumes(c.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, v := range volumes {
		names = append(names, v.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
