package cli

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
)

func newFlash(s *session) *cobra.Command {
	return group("flash", groupStorage, "Keep what is used most on flash",
		`Flash is a device of a pool to which the data sets move that are used most and would
cost the disks most seeks; requests for them go there from then on. "pollux pool add
--class flash" adds it and "pollux pool remove" takes it out. A policy says what moves.
It can be changed at any time, and "pollux flash simulate" tells beforehand what a change
would come to.`,
		newFlashStatus(s), newFlashPolicy(s), newFlashPin(s), newFlashExplain(s), newFlashSimulate(s), newFlashEvacuate(s))
}

// flashLine says in one line what is known of the flash of a pool.
func flashLine(f *control.FlashStatus) string {
	text := fmt.Sprintf("%s, %s; %s of %s used; hit share %s", f.Device, f.State, humanSize(int64(f.Used)*f.SetBytes), humanSize(int64(f.Slots)*f.SetBytes), percent(f.HitShare))
	if f.State == control.FlashEvacuating {
		text += "; " + evacuationText(f)
	}
	if f.Lost > 0 {
		text += fmt.Sprintf("; %s LOST", humanSize(int64(f.Lost)*f.SetBytes))
	}
	return text
}

// evacuationText says how far an evacuation is.
func evacuationText(f *control.FlashStatus) string {
	done := f.Total - f.Left
	return fmt.Sprintf("%d of %d sets have moved back (%s)", done, f.Total, percent(float64(done)/float64(max(f.Total, 1))))
}

func percent(share float64) string { return fmt.Sprintf("%.1f %%", 100*share) }

// classFlag gives a command --device-class.
func classFlag(c *cobra.Command, class *string) {
	c.Flags().StringVar(class, "device-class", "", "class of devices whose pattern is meant; the default one without it")
}

// offset is a flag that holds a place in bytes.
type offset int64

// String shows the value in the help.
func (o *offset) String() string {
	if *o == 0 {
		return ""
	}
	return config.Size(*o).String()
}

// Type names the value in the help.
func (o *offset) Type() string { return "OFFSET" }

// Set parses the value of the flag.
func (o *offset) Set(text string) error {
	n, err := config.ParseSize(text)
	switch {
	case err != nil:
		return usagef("%w", err)
	case n > 1<<62:
		return usagef("%q is too large", text)
	}
	*o = offset(n)
	return nil
}

// exact shows a number of bytes without loss.
func exact(n int64) string { return config.Size(n).String() }

// short shows a long time with the digits that matter.
func short(d control.Duration) string {
	if t := time.Duration(d); t > 100*365*24*time.Hour {
		return "never"
	}
	return took(d)
}

// assignments reads NAME=VALUE.
func assignments(words []string, set map[string]string) error {
	for _, w := range words {
		name, value, ok := strings.Cut(w, "=")
		if name = strings.TrimSpace(name); !ok || name == "" {
			return usagef("%q is not NAME=VALUE", w)
		}
		if _, twice := set[name]; twice {
			return usagef("%s is given twice", name)
		}
		set[name] = value
	}
	return nil
}

// changeRows show what has changed of a policy.
func changeRows(changes []control.FlashChange) [][]string {
	rows := [][]string{{"PARAMETER", "WAS", "NOW"}}
	for _, c := range changes {
		rows = append(rows, []string{c.Name, orDash(c.Was), orDash(c.Now)})
	}
	return rows
}

// printTables shows tables with an empty line between them; one that has only a heading is
// left out.
func (s *session) printTables(tables ...[][]string) error {
	first := true
	for _, rows := range tables {
		if len(rows) < 2 {
			continue
		}
		if !first {
			fmt.Fprintln(s.out)
		}
		first = false
		if err := table(s.out, rows); err != nil {
			return err
		}
	}
	return nil
}
