package crash

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var began = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)

// lines are n numbered lines.
func lines(what string, n int) []byte {
	var b bytes.Buffer
	for i := range n {
		fmt.Fprintf(&b, "%s %d\n", what, i)
	}
	return b.Bytes()
}

func report() Report {
	return Report{
		Guest: "a", Incarnation: 7, PID: 4711, Reason: "killed by SIGSEGV", Version: "v1", Started: began, Ended: began.Add(time.Minute),
		Status: map[string]int{"epoch": 9}, Said: lines("stack", 3), Events: lines("event", 3), Log: lines("log", 3),
	}
}

func TestReportHasEverything(t *testing.T) {
	path, err := Write(filepath.Join(t.TempDir(), "crash"), report(), Limits{Reports: 1, Bytes: 1 << 16})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := filepath.Base(path), "guest-a.20300102T030505.000Z.7.txt"; got != want {
		t.Errorf("name %s, want %s", got, want)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"guest:        a\n", "incarnation:  7\n", "process:      4711\n", "reason:       killed by SIGSEGV\n", "lived:        1m0s\n",
		"version:      v1\n", `"epoch": 9`, "as it died ==\nstack 0\nstack 1\nstack 2\n", "events of the pair ==\nevent 0\nevent 1\nevent 2\n", "its log ==\nlog 0\nlog 1\nlog 2\n"} {
		if !bytes.Contains(text, []byte(want)) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}

// TestReportIsBounded: of what a process said the beginning counts, of events and log the
// end, whatever is long; lines stay whole.
func TestReportIsBounded(t *testing.T) {
	const limit = 8 << 10
	for _, long := range []string{"stack", "event", "log", "all", "unbroken"} {
		r := report()
		r.Status = nil
		n := func(what string) int {
			if what == long || long == "all" {
				return 5000
			}
			return 3
		}
		r.Said, r.Events, r.Log = lines("stack", n("stack")), lines("event", n("event")), lines("log", n("log"))
		if long == "unbroken" {
			r.Said = bytes.Repeat([]byte{'x'}, 5000)
		}
		path, err := Write(t.TempDir(), r, Limits{Reports: 1, Bytes: limit})
		if err != nil {
			t.Fatal(err)
		}
		p, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text := string(p)
		if len(text) > limit || long != "unbroken" && len(text) < limit-100 {
			t.Errorf("%s is long: %d bytes", long, len(text))
		}
		wants := []string{"== the end of its log ==\n", fmt.Sprintf("event %d\n", n("event")-1), fmt.Sprintf("log %d\n", n("log")-1)}
		if long != "unbroken" {
			wants = append(wants, "== what its process said as it died ==\nstack 0\n")
		}
		for _, want := range wants {
			if !strings.Contains(text, want) {
				t.Errorf("%s is long: no %q in\n%s", long, want, text)
			}
		}
		for line := range strings.Lines(text) {
			if _, tail, ok := strings.Cut(line, "tack "); ok && !strings.HasPrefix(line, "stack ") || ok && tail == "\n" {
				t.Errorf("a line was cut: %q", line)
			}
		}
	}
	// A limit below the head cuts even that.
	r := report()
	if text := r.text(50); len(text) != 50 {
		t.Errorf("%d bytes: %s", len(text), text)
	}
}

// TestOldReportsGo: the newest of each guest stay, also of one whose name begins like
// another's.
func TestOldReportsGo(t *testing.T) {
	dir := t.TempDir()
	r := report()
	r.Guest = "a-b"
	if _, err := Write(dir, r, Limits{Reports: 3, Bytes: 1 << 12}); err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		r := report()
		r.Incarnation, r.Ended = uint64(i), began.Add(time.Duration(i)*time.Second)
		if _, err := Write(dir, r, Limits{Reports: 3, Bytes: 1 << 12}); err != nil {
			t.Fatal(err)
		}
	}
	got, err := List(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i := range got {
		got[i] = strings.Split(filepath.Base(got[i]), ".")[0] + "/" + strings.Split(filepath.Base(got[i]), ".")[3]
	}
	if want := "guest-a-b/7 guest-a/7 guest-a/8 guest-a/9"; strings.Join(got, " ") != want {
		t.Errorf("left are %v, want %s", got, want)
	}
	if got, err := List(filepath.Join(dir, "none")); len(got) != 0 || err != nil {
		t.Errorf("%v, %v", got, err)
	}
}

// TestNoHalfReport: what cannot be written leaves nothing.
func TestNoHalfReport(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Write(file, report(), Limits{Reports: 1, Bytes: 1 << 12}); err == nil {
		t.Error("a file is a directory")
	}
	r := report()
	// The name is taken by a directory that is not empty.
	taken := filepath.Join(dir, "crash", "guest-a.20300102T030505.000Z.7.txt")
	if err := os.MkdirAll(filepath.Join(taken, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Write(filepath.Join(dir, "crash"), r, Limits{Reports: 1, Bytes: 1 << 12}); err == nil {
		t.Error("a report replaced a directory")
	}
}

func TestTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte("0123456789"), 0o600); err != nil {
		t.Fatal(err)
	}
	for limit, want := range map[int64]string{0: "", 3: "789", 10: "0123456789", 99: "0123456789"} {
		if got, err := Tail(path, limit); string(got) != want || err != nil {
			t.Errorf("the last %d: %q, %v", limit, got, err)
		}
	}
	if _, err := Tail(path+"x", 1); err == nil {
		t.Error("there is no such file")
	}
}
