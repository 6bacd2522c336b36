package cli

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

func newPool(s *session) *cobra.Command {
	return group("pool", groupStorage, "Create, list, extend and move pools",
		`A pool is devices with one free space. Each guest has one; the volumes of a
guest take their space from it. Devices are files or block devices.`,
		newPoolCreate(s), newPoolList(s), newPoolShow(s), newPoolSet(s), newPoolAdd(s), newPoolRemove(s), newPoolExport(s), newPoolImport(s),
		newPoolReplace(s), newPoolOffline(s), newPoolOnline(s), newPoolScrub(s))
}

// printPool shows one pool and its devices.
func (s *session) printPool(p control.Pool) error {
	if s.json {
		return s.printJSON(p)
	}
	st := p.Stats
	lines := [][]string{
		{"pool", p.Name},
		{"id", orDash(p.ID)},
		{"guest", p.Guest},
		{"served by", orDash(p.ServedBy)},
		{"state", p.State},
		{"capacity", humanSize(st.Capacity)},
		{"free", humanSize(st.Free)},
		{"wholly free tracks", fmt.Sprintf("%d of %d", st.Cleaner.Whole, st.Cleaner.Tracks)},
		{"cleaner", fmt.Sprintf("%s; %d tracks freed, %s moved", orDash(st.Cleaner.State), st.Cleaner.Freed, humanSize(int64(st.Cleaner.Moved)*4096))},
		{"scrub", scrubLine(st.Scrub)},
		{"operation log", fmt.Sprintf("%s of %s used", humanSize(st.LogUsed), humanSize(st.LogBytes))},
		{"not yet on disk", humanSize(st.Dirty)},
		{"consistency point", strconv.FormatUint(st.CP, 10)},
		{"epoch", strconv.FormatUint(st.Epoch, 10)},
		{"volumes", strconv.Itoa(p.Volumes)},
	}
	lines = append(lines, settingRows(st.Settings)...)
	if m := st.LLRRM; m != nil {
		lines = append(lines, []string{"LLRRM", llrrmLine(m)})
	}
	if st.Flash != nil {
		lines = append(lines, []string{"flash", flashLine(st.Flash)})
	}
	if st.Removal != nil {
		lines = append(lines, []string{"removal", removalLine(st.Removal)})
	}
	err := table(s.out, lines)
	if err != nil || len(p.Devices) == 0 {
		return err
	}
	rows := [][]string{{"DEVICE", "SIZE", "DRIVER", "DIRECT", "READ ERRORS", "WRITE ERRORS", "CORRUPT", "NOTE"}}
	copies := [][]string{{"MIRROR", "DEVICE", "STATE", "TO RESILVER", "REPAIRED"}}
	count := func(n uint64) string { return strconv.FormatUint(n, 10) }
	for _, d := range p.Devices {
		note := d.Note
		if d.Class != "" {
			note = strings.TrimSuffix(classWord(d.Class)+"; "+note, "; ")
		}
		rows = append(rows, []string{d.Path, humanSize(d.Size), orDash(d.Driver), yesNo(d.Direct),
			count(d.ReadErrors), count(d.WriteErrors), count(d.Corrupt), note})
		if d.Mirror > 0 {
			copies = append(copies, []string{strconv.Itoa(d.Mirror), orDash(d.Path), d.State, humanSize(d.Resilver), count(d.Repaired)})
		}
	}
	fmt.Fprintln(s.out)
	if err := table(s.out, rows); err != nil || len(copies) == 1 {
		return err
	}
	fmt.Fprintln(s.out)
	return table(s.out, copies)
}

// classWord is how people know a class of devices.
func classWord(class string) string {
	if class == control.ClassLLRRM {
		return "LLRRM"
	}
	return class
}

// llrrmLine tells of low-latency memory.
func llrrmLine(m *control.LLRRMStatus) string {
	s := fmt.Sprintf("%s of %s used; threshold %d; %d blocks since the pool was opened", humanSize(m.Used), humanSize(m.Bytes), m.Threshold, m.Written)
	if m.Waiting > 0 {
		s += fmt.Sprintf(", references to %d more wait", m.Waiting)
	}
	if m.Failed {
		s += "; IT COULD NOT BE WRITTEN"
	}
	return s
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
