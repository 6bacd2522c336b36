package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/control"
)

// A copy that is taken out is an alert for the program that is told of alerts, for
// the events and for monitoring, and is over when the copy is back.
func TestMonitor(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	ln.Close()
	told := filepath.Join(t.TempDir(), "told")
	s := small
	s.PoolSize, s.Copies = "256MiB", 2
	s.More = []string{
		fmt.Sprintf("metrics: {address: %q}", address),
		fmt.Sprintf("alerts: {command: [sh, -c, 'cat >>\"$0\"', %q]}", told),
	}
	r := start(t, s)
	get := func(path string) (int, string) {
		t.Helper()
		resp, err := http.Get("http://" + address + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(text)
	}
	if code, text := get("/healthz"); code != http.StatusOK || !strings.Contains(text, `"protected":true`) {
		t.Errorf("%d %s", code, text)
	}
	if _, text := get("/metrics"); !strings.Contains(text, "\npollux_pool_absent_copies{pool=\"pool-a\"} 0\n") {
		t.Error(text)
	}
	second := filepath.Join(r.Dir, "pool-a.copy2.img")
	alert := "copy 2 of mirror 1 of pool pool-a on " + second + " is absent"
	saidTo := func(state string) func(control.Status) string {
		return func(control.Status) string {
			text, _ := os.ReadFile(told)
			for line := range strings.Lines(string(text)) {
				if strings.Contains(line, `"state":"`+state+`"`) && strings.Contains(line, alert) {
					return ""
				}
			}
			return "the program was told " + string(text)
		}
	}
	r.must("pool", "offline", "pool-a", second)
	r.until(saidTo("raised"))
	if _, text := get("/metrics"); !strings.Contains(text, "\npollux_pool_absent_copies{pool=\"pool-a\"} 1\n") {
		t.Error(text)
	}
	if code, text := get("/healthz"); code != http.StatusOK || !strings.Contains(text, alert) {
		t.Errorf("%d %s", code, text)
	}
	r.must("pool", "online", "pool-a", second)
	r.until(saidTo("over"))
	events, err := r.Do(t.Context(), "events")
	if err != nil || strings.Count(string(events), alert) != 2 {
		t.Errorf("%v: %s", err, events)
	}

	// Without its partner the pair is not healthy.
	r.must("guest", "hang", "b", "--yes")
	r.until(func(control.Status) string {
		if code, _ := get("/healthz"); code != http.StatusServiceUnavailable {
			return "it is healthy with a guest that hangs"
		}
		return ""
	})
	r.well()
}
