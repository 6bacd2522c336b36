package e2e

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/control"
)

// A guest that dies of a signal leaves a report, which is bounded and named by an event, and
// a support bundle has it.
func TestCrash(t *testing.T) {
	s := small
	s.PoolSize = "256MiB"
	s.More = []string{"crash_reports: {keep: 1, size: 32KiB}"}
	r := start(t, s)
	r.volume("v", 1<<20, "a")
	var file string
	for n := range 2 { // the second report replaces the first
		p, err := r.HoldGuest(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Signal(unix.SIGABRT); err != nil {
			t.Fatal(err)
		}
		p.Close()
		r.until(func(control.Status) string {
			events, err := r.Do(t.Context(), "events")
			if err != nil || strings.Count(string(events), "  crash-report  ") != n+1 {
				return fmt.Sprintf("%v, events %s", err, events)
			}
			_, file, _ = strings.Cut(string(events)[strings.LastIndex(string(events), "crash-report"):], " is in ")
			file, _, _ = strings.Cut(file, "\n")
			return ""
		})
		r.well()
		if n == 0 {
			r.must("giveback", "a")
			r.well()
		}
	}
	report, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if len(report) > 32<<10 || !strings.Contains(string(report), "SIGABRT: abort") || !strings.Contains(string(report), "\ngoroutine ") {
		t.Errorf("%d bytes:\n%s", len(report), report)
	}
	if all, err := filepath.Glob(filepath.Join(r.Dir, "crash", "*")); err != nil || len(all) != 1 {
		t.Errorf("reports %v, %v", all, err)
	}
	if got := bundled(t, r, "while it runs")["crash/"+filepath.Base(file)]; got != string(report) {
		t.Errorf("the bundle has %q", got)
	}
	r.clean()
	r.down()
	files := bundled(t, r, "when it is down")
	if files["crash/"+filepath.Base(file)] != string(report) || !strings.Contains(files["manifest.json"], "nothing runs in") || files["log/guest-a.log"] == "" {
		t.Errorf("the bundle has %s", files["manifest.json"])
	}
}

// bundled makes a support bundle and returns its files.
func bundled(t *testing.T, r *rig, what string) map[string]string {
	t.Helper()
	name := filepath.Join(t.TempDir(), what+".tar.gz")
	r.must("support-bundle", "--output", name)
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for tr := tar.NewReader(z); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		p, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		_, below, _ := strings.Cut(h.Name, "/")
		files[path.Clean(below)] = string(p)
	}
	for _, want := range []string{"version.json", "settings.json", "events.log", "host/kernel.txt", "host/proc/meminfo", "manifest.json"} {
		if files[want] == "" {
			t.Errorf("%s the bundle has no %s", what, want)
		}
	}
	return files
}
