package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/control"
)

// printJSON writes one value for programs.
func (s *session) printJSON(v any) error {
	enc := json.NewEncoder(s.out)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false) // URIs hold & and stay readable
	return enc.Encode(v)
}

// table writes rows with aligned columns; the first is the heading.
func table(w io.Writer, rows [][]string) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, r := range rows {
		// tabwriter pads the last cell too, were it to end with a tab.
		if _, err := fmt.Fprintln(tw, strings.TrimRight(strings.Join(r, "\t"), "\t")); err != nil {
			return err
		}
	}
	return tw.Flush()
}

// orDash shows an empty cell.
func orDash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

func list(words []string) string { return orDash(strings.Join(words, ",")) }

// took shows a duration with the digits that matter.
func took(d control.Duration) string {
	t := time.Duration(d)
	switch {
	case t < 0:
		return "-"
	case t < 10*time.Millisecond:
		return t.Round(10 * time.Microsecond).String()
	case t < time.Second:
		return t.Round(100 * time.Microsecond).String()
	case t < time.Minute:
		return t.Round(10 * time.Millisecond).String()
	}
	return t.Round(time.Second).String()
}

// uptime shows a long duration in at most two units.
func uptime(d control.Duration) string {
	t := time.Duration(d)
	switch {
	case t <= 0:
		return "-"
	case t < time.Minute:
		return t.Round(time.Second).String()
	case t < time.Hour:
		return fmt.Sprintf("%dm%ds", int(t.Minutes()), int(t.Seconds())%60)
	case t < 24*time.Hour:
		return fmt.Sprintf("%dh%dm", int(t.Hours()), int(t.Minutes())%60)
	}
	return fmt.Sprintf("%dd%dh", int(t.Hours())/24, int(t.Hours())%24)
}

// when shows a moment in local time, to the second.
func when(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Local().Format("2006-01-02 15:04:05")
}

// plain matches words that a shell takes as they are.
var plain = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// shellQuote makes a word safe to paste into a shell.
func shellQuote(word string) string {
	if plain.MatchString(word) {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

// isTerminal tells whether a person types at f. A character device that is no
// terminal, such as /dev/null, does not count.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
