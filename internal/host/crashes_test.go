package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/control"
)

// crashReport waits for the event that names a report of a process, and returns its text.
func (p *pair) crashReport(pid int) string {
	p.t.Helper()
	var path string
	p.until(fmt.Sprintf("a report of process %d", pid), func(control.Status) bool {
		_ = p.client.Events(p.t.Context(), control.EventQuery{}, func(e control.Event) error {
			if e.Kind == "crash-report" && strings.Contains(e.Message, fmt.Sprintf("(process %d)", pid)) && strings.Contains(e.Message, e.Fields["file"]) {
				path = e.Fields["file"]
			}
			return nil
		})
		return path != ""
	})
	text, err := os.ReadFile(path)
	p.ok(err)
	return string(text)
}

// TestCrashReports: a guest that fails leaves a report with the cause, all goroutines and
// what it said of itself, also when its agent was not there; one that ends by command
// leaves none.
func TestCrashReports(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	p := newPair(t, pairConfig+"crash_reports: {size: 64KiB}\n")
	has := func(what, text string, wants ...string) {
		t.Helper()
		for _, want := range append(wants, "reason: ", "== the end of its log ==", "guest starts", `"kind":"guest-started"`) {
			if !strings.Contains(text, want) {
				t.Errorf("%s: the report lacks %q:\n%s", what, want, text)
			}
		}
		if len(text) > 64<<10 {
			t.Errorf("%s: the report has %d bytes", what, len(text))
		}
	}
	st := p.until("start", servedBy("a", "b"))
	p.ok(p.client.Drill(t.Context(), "b", control.DrillRestart))
	st = p.until("b was started again", func(now control.Status) bool {
		return servedBy("a", "a")(now) && now.Guests[1].PID != st.Guests[1].PID
	})
	p.ok(unix.Kill(st.Guests[0].PID, unix.SIGABRT))
	has("SIGABRT", p.crashReport(st.Guests[0].PID), "guest:        a\n", "SIGABRT: abort", "\ngoroutine ", "pool.(*Pool).Run", `"epoch": `)
	st = p.until("b serves", servedBy("b", "b"))

	p.killAgent()
	p.ok(unix.Kill(st.Guests[0].PID, unix.SIGSEGV))
	p.until("a has ended", func(st control.Status) bool { return len(st.Guests) == 1 })
	p.startAgent()
	has("without an agent", p.crashReport(st.Guests[0].PID), "reason:       it ended while there was no agent\n", "SIGSEGV")
	p.until("a is back", servedBy("b", "b"))

	left, err := filepath.Glob(filepath.Join(p.dir, "crash", "*"))
	if err != nil || len(left) != 2 {
		t.Errorf("%v, %v", left, err)
	}
	p.ok(p.client.Down(t.Context()))
	_ = p.agent.Wait()
	if left, _ := filepath.Glob(filepath.Join(p.dir, "run", "*.died-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
