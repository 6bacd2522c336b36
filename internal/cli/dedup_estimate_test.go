package cli

import (
	"strings"
	"testing"
	"time"
)

// The line of an estimate is written twice a second at most, and taken away.
func TestDedupEstimateProgress(t *testing.T) {
	var out strings.Builder
	now := time.Unix(1000, 0)
	o := &dedupEstimateOptions{session: &session{err: &out, watched: true, now: func() time.Time { return now }}}
	step, clear := o.progress("reading")
	for i := range int64(5) {
		step(i<<20, 4<<20)
		now = now.Add(askEvery / 2)
	}
	clear()
	lines := strings.Split(out.String(), "\r")
	want := []string{"", "estimate: reading, 0 B of 4.0 MiB (0%)", "estimate: reading, 2.0 MiB of 4.0 MiB (50%)",
		"estimate: reading, 4.0 MiB of 4.0 MiB (100%), 4.0 MiB/s"}
	if len(lines) < len(want) {
		t.Fatalf("%q", lines)
	}
	for i, w := range want {
		if got := strings.TrimRight(lines[i], " "); got != w {
			t.Errorf("line %d is %q instead of %q", i, got, w)
		}
	}
	for _, rest := range lines[len(want):] {
		if strings.TrimSpace(rest) != "" {
			t.Errorf("%q is left", rest)
		}
	}
	o.watched = false
	if step, _ := o.progress("reading"); step != nil {
		t.Error("progress for nobody")
	}
}
