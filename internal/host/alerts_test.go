package host

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func states(ns []Notice) string {
	var out []string
	for _, n := range ns {
		out = append(out, n.State+" "+n.Alert)
	}
	return strings.Join(out, ", ")
}

// An alert is told when it is raised, and when it has been gone for a while; one
// that comes and goes is told once.
func TestAlertBook(t *testing.T) {
	b := alertBook{}
	begin := time.Unix(1000, 0)
	for _, step := range []struct {
		after  time.Duration
		alerts string
		want   string
	}{
		{0, "", ""},
		{1, "full", "raised full"},
		{2, "full hung", "raised hung"},
		{3, "hung", ""},
		{4, "full hung", ""},
		{5, "hung", ""},
		{13, "hung", ""},
		{14, "hung", "over full"},
		{15, "full hung", "raised full"},
		{40, "", "over full, over hung"},
		{41, "", ""},
	} {
		got := b.look(begin.Add(step.after*time.Second), strings.Fields(step.alerts))
		if states(got) != step.want {
			t.Errorf("after %d s: %s, want %s", step.after, states(got), step.want)
		}
		for _, n := range got {
			if n.State == alertOver && n.Alert == "hung" && !n.Since.Equal(begin.Add(2*time.Second)) {
				t.Errorf("since %v", n.Since)
			}
		}
	}
}

// A newer notice of an alert replaces an older one that nobody was told, and the
// queue is bounded.
func TestNoticeQueue(t *testing.T) {
	var q noticeQueue
	q.add(Notice{State: alertRaised, Alert: "x"})
	q.add(Notice{State: alertRaised, Alert: "y"})
	q.add(Notice{State: alertOver, Alert: "x"})
	if got := states(q.waiting); got != "raised y, over x" {
		t.Error(got)
	}
	for i := range 2 * maxNotices {
		q.add(Notice{Alert: fmt.Sprint(i)})
	}
	if n := len(q.waiting); n != maxNotices || q.waiting[n-1].Alert != fmt.Sprint(2*maxNotices-1) {
		t.Errorf("%d wait", n)
	}
}

// The program gets the notice on its standard input and in its environment; what it
// says when it fails is told, and it does not outlive its time.
func TestTell(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	n := Notice{State: alertRaised, Alert: "pool p is full", Since: time.Unix(5, 0).UTC(), Dir: "/d"}
	err := tell(t.Context(), []string{"sh", "-c", `cat >"$0"; echo "$POLLUX_ALERT_STATE $POLLUX_ALERT $POLLUX_DIR" >>"$0"`, out}, n)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	first, rest, _ := strings.Cut(string(text), "\n")
	var got Notice
	if err := json.Unmarshal([]byte(first), &got); err != nil || got != n {
		t.Errorf("%v: %+v", err, got)
	}
	if rest != "raised pool p is full /d\n" {
		t.Errorf("%q", rest)
	}
	if err := tell(t.Context(), []string{"sh", "-c", "echo nobody there; exit 3"}, n); err == nil || !strings.Contains(err.Error(), "nobody there") {
		t.Errorf("%v", err)
	}
	flood := `head -c 100000000 /dev/zero; exit 4`
	if err := tell(t.Context(), []string{"sh", "-c", flood}, n); err == nil || len(err.Error()) > 1000 {
		t.Errorf("%d bytes of what it said are kept", len(fmt.Sprint(err)))
	}
	if err := tell(t.Context(), []string{"sh", "-c", "sleep 1000 &"}, n); err != nil {
		t.Errorf("one that leaves another behind: %v", err)
	}
	if err := tell(t.Context(), []string{filepath.Join(t.TempDir(), "missing")}, n); err == nil {
		t.Error("a program that does not exist was run")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- tell(ctx, []string{"sh", "-c", "sleep 1000 & sleep 1000"}, n) }()
	cancel()
	select {
	case err := <-done:
		if err == nil {
			t.Error("it was not ended")
		}
	case <-time.After(10 * time.Second):
		t.Error("what it has started goes on")
	}
}
