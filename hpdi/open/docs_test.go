package open

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
)

// rows are what docs/hpdi.md has of a scheme.
func rows(s Scheme) []string {
	all := []string{fmt.Sprintf("| `%s` | %s |", s.Form, s.Meaning)}
	for _, p := range s.Properties {
		all = append(all, fmt.Sprintf("| `%s` | %s | %s | %s |", p.Name, cmp.Or(p.Default, "none"), p.Range(), p.Meaning))
	}
	return all
}

// The page for users has each scheme and each of its properties, what a device tells, and
// no property that is not there.
func TestDocumented(t *testing.T) {
	p, err := os.ReadFile("../../docs/hpdi.md")
	must(t, err)
	page := string(p)
	var want []string
	for _, s := range Schemes() {
		want = append(want, rows(s)...)
	}
	for _, s := range (hpdi.Info{}).List() {
		want = append(want, fmt.Sprintf("| `%s` | %s | %s |", s.Name, s.Range(), s.Meaning))
	}
	for _, row := range want {
		if !strings.Contains(page, row+"\n") {
			t.Errorf("docs/hpdi.md lacks the row\n%s", row)
		}
	}
	for line := range strings.Lines(page) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "| `") && !slices.Contains(want, line) {
			t.Errorf("docs/hpdi.md has a row of nothing that is there\n%s", line)
		}
	}
}
