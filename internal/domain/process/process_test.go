package process

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/domain"
)

func driver(t *testing.T) *Driver {
	t.Helper()
	dir := t.TempDir()
	return &Driver{Program: "/bin/sh", RunDir: dir, LogDir: dir, LogMax: 100}
}

func start(t *testing.T, d *Driver, script string) domain.Domain {
	t.Helper()
	p, err := d.Start(domain.Spec{Name: "a", Inc: 7, Args: []string{"-c", script}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Kill(-p.PID(), unix.SIGKILL) // with what it has started, which may outlive it
		_ = p.Kill()
		<-p.Ended()
	})
	return p
}

func ended(t *testing.T, p domain.Domain) {
	t.Helper()
	select {
	case <-p.Ended():
	case <-time.After(30 * time.Second):
		t.Fatal("the process did not end")
	}
}

func TestKillIsNoticedByBothAgents(t *testing.T) {
	d := driver(t)
	p := start(t, d, "sleep 1000 & wait")
	q, err := d.Find("a")
	if err != nil || q == nil || q.PID() != p.PID() || q.Inc() != 7 || q.Name() != "a" {
		t.Fatalf("%+v, %v", q, err)
	}
	select {
	case <-q.Ended():
		t.Fatal("a living process was taken for dead: " + q.Reason())
	default:
	}
	if err := q.Kill(); err != nil {
		t.Fatal(err)
	}
	ended(t, p)
	ended(t, q)
	if p.Reason() != "killed by SIGKILL" {
		t.Error(p.Reason())
	}
	if err := p.Kill(); err == nil {
		t.Error("a signal to a process that has ended was no error")
	}
	r, err := d.Find("a")
	if err != nil || r.Inc() != 7 {
		t.Fatal(r, err)
	}
	ended(t, r)
}

func TestPauseAndResume(t *testing.T) {
	d := driver(t)
	p := start(t, d, "exec sleep 1000")
	if err := p.Pause(); err != nil {
		t.Fatal(err)
	}
	state := func(want string) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); ; {
			st, err := readStat(p.PID())
			if err != nil {
				t.Fatal(err)
			}
			if strings.ContainsRune(want, rune(st.state)) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("state %c, want one of %s", st.state, want)
			}
		}
	}
	state("T")
	if err := p.Resume(); err != nil {
		t.Fatal(err)
	}
	state("SR")
	if err := p.Terminate(); err != nil {
		t.Fatal(err)
	}
	ended(t, p)
}

func TestAnotherProcessIsNotTakenForOurs(t *testing.T) {
	d := driver(t)
	p := start(t, d, "exec sleep 1000")
	b, err := os.ReadFile(d.recordPath("a"))
	if err != nil {
		t.Fatal(err)
	}
	// The same number with another start time: it was given out again.
	b = []byte(strings.Replace(string(b), `"start_time": `, `"start_time": 1`, 1))
	if err := os.WriteFile(d.recordPath("a"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	q, err := d.Find("a")
	if err != nil {
		t.Fatal(err)
	}
	ended(t, q)
	if err := q.Kill(); err == nil {
		t.Fatal("a stranger was killed")
	}
	select {
	case <-p.Ended():
		t.Fatal("a stranger was killed")
	default:
	}
	if err := d.Forget("a"); err != nil {
		t.Fatal(err)
	}
	if q, err := d.Find("a"); q != nil || err != nil {
		t.Fatal(q, err)
	}
}

func TestOutputIsLimited(t *testing.T) {
	d := driver(t)
	p := start(t, d, "i=0; while [ $i -lt 50 ]; do echo line $i; i=$((i+1)); done; exit 3")
	ended(t, p)
	if !strings.Contains(p.Reason(), "status 3") {
		t.Error(p.Reason())
	}
	if err := d.Tidy("a"); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(d.LogDir, "guest-a.log")
	old, err := os.ReadFile(path + ".1")
	if err != nil || len(old) != 100 || !strings.HasSuffix(string(old), "line 49\n") {
		t.Errorf("%q, %v", old, err)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != 0 {
		t.Errorf("%v, %v", st, err)
	}
}

func TestStartFails(t *testing.T) {
	d := driver(t)
	d.Program = "/nonexistent/program"
	if _, err := d.Start(domain.Spec{Name: "a"}); err == nil {
		t.Fatal("started nothing")
	}
	if q, err := d.Find("a"); q != nil || err != nil {
		t.Fatal(q, err)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("1 (a) b) S 0 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1 2"))
	f.Add([]byte("1 ("))
	f.Fuzz(func(t *testing.T, p []byte) { _, _ = parseStat(p) })
}

// A process is told to begin only after it can be found by another agent.
func TestRecordedBeforeItBegins(t *testing.T) {
	d := driver(t)
	p := start(t, d, `test "$(head -c 1 | wc -c)" = 1 && test -s `+d.recordPath("a"))
	ended(t, p)
	if p.Reason() != "it ended by itself" {
		t.Errorf("the process was not told to begin, or has no record: %s", p.Reason())
	}
}

// TestRemains: what ends in good order removes its last words and leaves nothing; what does
// not leaves what it wrote there, from its beginning, and the end of its log, once.
func TestRemains(t *testing.T) {
	d := driver(t)
	died := config.LastWordsPath(d.RunDir, "a", 7)
	p := start(t, d, "rm "+died)
	ended(t, p)
	if r, err := d.Remains(p, 10); r != nil || err != nil {
		t.Errorf("in good order: %+v, %v", r, err)
	}
	p = start(t, d, "echo before $GOTRACEBACK; echo 0123456789abc | tee -a "+died+"; echo after; exit 70")
	ended(t, p)
	if !strings.Contains(p.Reason(), "watchdog") {
		t.Error(p.Reason())
	}
	// An agent that came later knows as much.
	q, err := d.Find("a")
	if err != nil {
		t.Fatal(err)
	}
	r, err := d.Remains(q, 20)
	if err != nil || r == nil || string(r.Said) != "0123456789abc\n" || string(r.Log) != "before all\nafter\n" {
		t.Errorf("%q, %q, %v", r.Said, r.Log, err)
	}
	if r, err := d.Remains(p, 10); r != nil || err != nil {
		t.Errorf("once more: %+v, %v", r, err)
	}
	p = start(t, d, "echo 0123456789abcdef | tee -a "+died+"; exit 2")
	ended(t, p)
	if r, err := d.Remains(p, 10); r == nil || err != nil || string(r.Said) != "0123456789" || string(r.Log) != "abc\nafter\n" {
		t.Errorf("too much: %+v, %v", r, err)
	}
	p = start(t, d, "exec sleep 1000")
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	ended(t, p)
	if err := os.Remove(d.logPath("a")); err != nil {
		t.Fatal(err)
	}
	if r, err := d.Remains(p, 10); r == nil || err == nil || len(r.Said) != 0 {
		t.Errorf("without a log: %+v, %v", r, err)
	}
	if err := os.WriteFile(died, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	other := config.LastWordsPath(d.RunDir, "a-b", 7)
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Forget("a"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(died); err == nil {
		t.Error("it was not forgotten")
	}
	if _, err := os.Stat(other); err != nil {
		t.Error("another guest's was forgotten")
	}
}
