package cli

import (
	"fmt"

	"github.com/pollux-storage/pollux/internal/control"
)

// printMemory shows what the guests' memory is for.
func (s *session) printMemory(st control.Status) error {
	rows := [][]string{{"GUEST", "MEMORY", "PLANNED", "IN USE", "WHY"}}
	for _, g := range st.Guests {
		if len(g.Memory.Parts) == 0 {
			rows = append(rows, []string{g.Name, "-", "-", "-", "it does not answer"})
			continue
		}
		var planned int64
		name := g.Name
		for _, p := range g.Memory.Parts {
			planned += p.Planned
			rows = append(rows, []string{name, p.Name, humanSize(p.Planned), humanSize(p.Used), p.Why})
			name = ""
		}
		why := "no limit is set"
		if g.Memory.Limit > 0 {
			why = "the limit is " + humanSize(g.Memory.Limit)
		}
		rows = append(rows, []string{"", "all", humanSize(planned), humanSize(g.Memory.Resident), why})
	}
	if err := table(s.out, rows); err != nil {
		return err
	}
	for _, g := range st.Guests {
		for _, r := range g.Region {
			pages := "small pages"
			if r.HugePages {
				pages = "huge pages"
			}
			if _, err := fmt.Fprintf(s.out, "region of %s in guest %s: %s on %s (%s)\n", r.Identity, g.Name, humanSize(r.Bytes), pages, r.Mapped); err != nil {
				return err
			}
		}
	}
	return nil
}
