package process

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/domain"
)

// TestStartRefuses: a guest is not started without a log and a record, and a
// process that cannot be recorded does not stay.
func TestStartRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(*Driver) error
		want  string
	}{
		"no folder for the log": {func(d *Driver) error { d.LogDir = filepath.Join(d.LogDir, "none"); return nil }, "log of guest a"},
		"log cannot be put aside": {func(d *Driver) error {
			return errors.Join(os.WriteFile(d.logPath("a"), make([]byte, 200), 0o600), os.Mkdir(d.logPath("a")+".1", 0o700))
		}, "log of guest a"},
		"no folder for the record": {func(d *Driver) error { d.RunDir = filepath.Join(d.RunDir, "none"); return nil }, "start guest a: write"},
	} {
		d := driver(t)
		if err := c.spoil(d); err != nil {
			t.Fatal(err)
		}
		// It would leave a file behind if it were told to begin.
		began := filepath.Join(t.TempDir(), "began")
		p, err := d.Start(domain.Spec{Name: "a", Args: []string{"-c", `test "$(head -c 1 | wc -c)" = 1 && touch ` + began}})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, %v", name, p, err)
		}
		if _, err := os.Stat(began); err == nil {
			t.Errorf("%s: the process began", name)
		}
	}
}

// TestFindRefuses: a record that cannot be read is no sign that nothing runs.
func TestFindRefuses(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"damaged": func(path string) error { return os.WriteFile(path, []byte("{"), 0o600) },
		"folder":  func(path string) error { return os.Mkdir(path, 0o700) },
	} {
		d := driver(t)
		if err := spoil(d.recordPath("a")); err != nil {
			t.Fatal(err)
		}
		if q, err := d.Find("a"); err == nil || !strings.Contains(err.Error(), "record of guest a") {
			t.Errorf("%s: %v, %v", name, q, err)
		}
	}
}

// TestForgetAndTidyRefuse: what is in the way of a record or an output file is
// told.
func TestForgetAndTidyRefuse(t *testing.T) {
	d := driver(t)
	if err := d.Forget("a"); err != nil {
		t.Errorf("of a guest that never ran: %v", err)
	}
	if err := errors.Join(os.MkdirAll(filepath.Join(d.recordPath("a"), "more"), 0o700), os.Mkdir(d.logPath("a"), 0o700)); err != nil {
		t.Fatal(err)
	}
	if err := d.Forget("a"); err == nil {
		t.Error("a record that is still there was forgotten")
	}
	d.LogMax = 1
	if err := d.Tidy("a"); err == nil || !strings.Contains(err.Error(), "log of guest a") {
		t.Errorf("a folder was tidied: %v", err)
	}
}

func TestParseStatRefuses(t *testing.T) {
	for in, want := range map[string]string{
		"1 (a":      "without a name",
		"1 (a) S 0": "too short",
		"1 (a) S 0 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 x 1 2":    "start time",
		"1 (a) long 0 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 1 1 2": "too short",
	} {
		if st, err := parseStat([]byte(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v, %v", in, st, err)
		}
	}
}
