package cli

import (
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

func newPool(s *session) *cobra.Command {
	return group("pool", groupStorage, "Create, list and extend pools",
		`A pool is devices with one free space. Each guest has one; the volumes of a
guest take their space from it. Devices are files or block devices.`,
		newPoolCreate(s), newPoolList(s), newPoolShow(s), newPoolAdd(s))
}

// printPool shows one pool and its devices.
func (s *session) printPool(p control.Pool) error {
	if s.json {
		return s.printJSON(p)
	}
	st := p.Stats
	err := table(s.out, [][]string{
		{"pool", p.Name},
		{"id", orDash(p.ID)},
		{"guest", p.Guest},
		{"served by", orDash(p.ServedBy)},
		{"state", p.State},
		{"capacity", humanSize(st.Capacity)},
		{"free", humanSize(st.Free)},
		{"operation log", fmt.Sprintf("%s of %s used", humanSize(st.LogUsed), humanSize(st.LogBytes))},
		{"not yet on disk", humanSize(st.Dirty)},
		{"consistency point", strconv.FormatUint(st.CP, 10)},
		{"epoch", strconv.FormatUint(st.Epoch, 10)},
		{"volumes", strconv.Itoa(p.Volumes)},
	})
	if err != nil || len(p.Devices) == 0 {
		return err
	}
	rows := [][]string{{"DEVICE", "SIZE", "DRIVER", "DIRECT", "NOTE"}}
	for _, d := range p.Devices {
		rows = append(rows, []string{d.Path, humanSize(d.Size), orDash(d.Driver), yesNo(d.Direct), d.Note})
	}
	fmt.Fprintln(s.out)
	return table(s.out, rows)
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
