// Package crash keeps what is left of guests that failed: a file for each failure, in
// one directory, for the person who looks for the cause. There are at most so many
// files of a guest, each of at most so many bytes; the oldest go first.
//
// A file is text. Its first part says who failed, when and how; then comes what its
// runtime or its watchdog wrote as it died, which begins with the cause and is kept from
// its beginning; then what it said of itself last; then the last events of the pair and
// the end of the guest's log, which are kept to their end.
package crash

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Report is what is known of a failure.
type Report struct {
	Guest       string
	Incarnation uint64
	PID         int
	Reason      string // how its process ended
	Version     string // of the agent, which is that of the guest unless it was replaced meanwhile
	Started     time.Time
	Ended       time.Time
	// Status is what the guest said of itself last, for JSON; nil if it said nothing.
	Status any
	// Said is what its runtime or watchdog wrote as it died.
	Said []byte
	// Events are the last of the pair, one a line.
	Events []byte
	// Log is the end of its output.
	Log []byte
}

// Limits bound what is kept of one guest.
type Limits struct {
	Reports int   // files
	Bytes   int64 // of each
}

// stamp is the time in a file's name, by which names sort.
const stamp = "20060102T150405.000Z"

// Write keeps a report in dir, which is made if it is missing, removes what is too much of
// the guest there, and returns the path of the file.
func Write(dir string, r Report, l Limits) (string, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("crash reports: %w", err)
	}
	path := filepath.Join(dir, fmt.Sprintf("guest-%s.%s.%d.txt", r.Guest, r.Ended.UTC().Format(stamp), r.Incarnation))
	// Under another name first: a report that is cut by a full disk is none.
	if err := os.WriteFile(path+".new", r.text(l.Bytes), 0o600); err != nil {
		return "", errors.Join(fmt.Errorf("crash report: %w", err), os.Remove(path+".new"))
	}
	if err := os.Rename(path+".new", path); err != nil {
		return "", errors.Join(fmt.Errorf("crash report: %w", err), os.Remove(path+".new"))
	}
	return path, prune(dir, r.Guest, l.Reports)
}

// prune removes the oldest reports of a guest until no more than keep are left.
func prune(dir, guest string, keep int) error {
	paths, err := List(dir)
	if err != nil {
		return err
	}
	paths = slices.DeleteFunc(paths, func(p string) bool { return !strings.HasPrefix(filepath.Base(p), "guest-"+guest+".") })
	var errs []error
	for i := 0; i < len(paths)-keep; i++ {
		errs = append(errs, os.Remove(paths[i]))
	}
	return errors.Join(errs...)
}

// List returns the reports in dir, of each guest the oldest first. A directory that is not
// there has none.
func List(dir string) ([]string, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "guest-*.txt"))
	if err != nil {
		return nil, fmt.Errorf("crash reports: %w", err)
	}
	slices.Sort(paths)
	return paths, nil
}

// text writes a report of at most limit bytes. Each part gets half of what is left, or more
// where those after it are short; the log gets the rest.
func (r *Report) text(limit int64) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "guest:        %s\nincarnation:  %d\nprocess:      %d\nended:        %s\nreason:       %s\nstarted:      %s\nlived:        %s\nversion:      %s\n",
		r.Guest, r.Incarnation, r.PID, when(r.Ended), r.Reason, when(r.Started), r.Ended.Sub(r.Started).Round(time.Millisecond), r.Version)
	var status []byte
	if r.Status != nil {
		var err error
		if status, err = json.MarshalIndent(r.Status, "", "  "); err != nil {
			status = []byte(err.Error())
		}
	}
	parts := []struct {
		title string
		text  []byte
		last  bool // its end counts, not its beginning
	}{
		{"what its process said as it died", r.Said, false},
		{"what it said of itself last", status, false},
		{"the last events of the pair", r.Events, true},
		{"the end of its log", r.Log, true},
	}
	for i, p := range parts {
		b.WriteString(heading(p.title))
		room := int(max(limit-int64(b.Len()), 0))
		if i < len(parts)-1 { // the others need some, too
			rest := 0
			for _, q := range parts[i+1:] {
				rest += len(heading(q.title)) + len(q.text) + 1
			}
			room = max(room/2, room-rest)
		}
		b.Write(fit(p.text, room, p.last))
	}
	b.Truncate(min(b.Len(), int(limit)))
	return b.Bytes()
}

func heading(title string) string { return "\n== " + title + " ==\n" }

func when(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// fit returns the beginning or the end of text, in whole lines where there are any, that
// takes at most room bytes and ends with a line feed.
func fit(text []byte, room int, last bool) []byte {
	if len(text) == 0 || room < 1 {
		return nil
	}
	if text[len(text)-1] != '\n' {
		text = append(slices.Clone(text), '\n')
	}
	if len(text) <= room {
		return text
	}
	if !last {
		text = text[:room]
		return text[:bytes.LastIndexByte(text, '\n')+1]
	}
	text = text[len(text)-room:]
	return text[bytes.IndexByte(text, '\n')+1:]
}

// Tail returns the last bytes of a file, at most limit of them.
func Tail(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	// A file that grows meanwhile is not read further.
	return io.ReadAll(io.NewSectionReader(f, max(0, st.Size()-limit), min(st.Size(), limit)))
}
