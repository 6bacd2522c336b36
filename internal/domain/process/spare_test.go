package process

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/domain"
)

// prepare makes a spare that, told its number, says it with what is recorded of it.
func prepare(t *testing.T, d *Driver) domain.Spare {
	t.Helper()
	s, err := d.Prepare(domain.Spec{Name: "a", Args: []string{"-c", `read n || exit 0; echo $n $(grep -c '"incarnation": '$n ` + d.recordPath("a") + `)`}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Discard)
	return s
}

// A spare is recorded before it is told its number, once, and is a domain like others
// from then on.
func TestSpare(t *testing.T) {
	d := driver(t)
	s := prepare(t, d)
	if _, err := os.Stat(d.recordPath("a")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a spare is recorded: %v", err)
	}
	p, err := s.Start(12)
	if err != nil {
		t.Fatal(err)
	}
	ended(t, p)
	if p.Inc() != 12 || p.Name() != "a" || p.Reason() != "it ended by itself" || p.Started().IsZero() {
		t.Errorf("%+v, %s", p, p.Reason())
	}
	if log, err := os.ReadFile(d.logPath("a")); err != nil || string(log) != "12 1\n" {
		t.Errorf("%q, %v", log, err)
	}
	if r, err := d.Remains(p, 10); err != nil || r == nil {
		t.Errorf("it had no file for its last words: %v, %v", r, err)
	}
	if _, err := s.Start(13); err == nil {
		t.Error("it was started twice")
	}
	s.Discard() // does nothing any more
}

// A spare that nobody needs ends with whoever holds it, and one that has ended is no
// guest's process.
func TestSpareEnds(t *testing.T) {
	d := driver(t)
	s := prepare(t, d)
	s.Discard()
	select {
	case <-s.Ended():
	default:
		t.Error("it lives on")
	}
	if _, err := s.Start(2); err == nil {
		t.Error("a discarded one was started")
	}
	// The other end of its input goes as when the agent dies.
	s = prepare(t, d)
	_ = s.(*spare).take().Close()
	ended(t, s.(*spare).p)
	if why := s.(*spare).p.Reason(); why != "it ended by itself" {
		t.Error(why)
	}

	s, err := d.Prepare(domain.Spec{Name: "a", Args: []string{"-c", "exit 3"}})
	if err != nil {
		t.Fatal(err)
	}
	ended(t, s.(*spare).p)
	if _, err := s.Start(3); err == nil || !strings.Contains(err.Error(), "has ended") {
		t.Error(err)
	}
	d.Program = "/nonexistent/program"
	if _, err := d.Prepare(domain.Spec{Name: "a"}); err == nil {
		t.Error("prepared nothing")
	}
}

// What cannot be recorded is not started: no other agent would find it.
func TestSpareWithoutRecord(t *testing.T) {
	d := driver(t)
	s := prepare(t, d)
	d.RunDir = "/nonexistent"
	if _, err := s.Start(2); err == nil {
		t.Error("it was started")
	}
	ended(t, s.(*spare).p)
}
