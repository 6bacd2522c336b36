package sim

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// ErrScript says that a script cannot be played, whatever the pair does.
var ErrScript = errors.New("the script is wrong")

// Script is a run as text: settings, then steps, one a line.
type Script struct {
	Name  string
	Lines []Line
}

// Line is one line of a script, without its comment.
type Line struct {
	Fields []string
	Number int // in its file, for messages
}

func (l Line) String() string { return strings.Join(l.Fields, " ") }

// arg returns field i, or "".
func (l Line) arg(i int) string {
	if i < len(l.Fields) {
		return l.Fields[i]
	}
	return ""
}

// option returns what follows key= among the fields.
func (l Line) option(key string) (string, bool) {
	for _, f := range l.Fields {
		if v, ok := strings.CutPrefix(f, key+"="); ok {
			return v, true
		}
	}
	return "", false
}

// has tells whether a word is among the fields.
func (l Line) has(word string) bool {
	for _, f := range l.Fields {
		if f == word {
			return true
		}
	}
	return false
}

// Parse reads a script. Comments begin with # and go to the end of the line.
func Parse(name, text string) (*Script, error) {
	s := &Script{Name: name}
	for i, raw := range strings.Split(text, "\n") {
		raw, _, _ = strings.Cut(raw, "#")
		f := strings.Fields(raw)
		if len(f) == 0 {
			continue
		}
		l := Line{f, i + 1}
		if verbOf(l) == nil && !isSetting(f[0]) {
			return nil, fmt.Errorf("%s:%d: there is no step %q: %w", name, i+1, raw, ErrScript)
		}
		s.Lines = append(s.Lines, l)
	}
	return s, nil
}

// String writes the script as a file.
func (s *Script) String() string {
	var b strings.Builder
	for _, l := range s.Lines {
		b.WriteString(l.String())
		b.WriteByte('\n')
	}
	return b.String()
}

// isSetting tells whether a line describes the pair before it starts, and is no
// step:
//
//	seed N                        latencies and fates are drawn from it
//	alone                         a guest without partner
//	pool ID [disks=N] [copies=N] [size=S] [journal=S] [battery]; with copies, a mirror of so many disks for each
//	volume NAME on ID SIZE
//	resubmits CLIENT...           these send requests again by slot and counter, and each is carried out once
//	interval D                    longest time between consistency points
//	cleaner                       pools are cleaned at every opportunity; never without
//	sharing N [weak]              volumes share N blocks or more, and clients write much twice; weak: by fingerprints that say little
//	restart-first GUEST...        these are started again before their partner takes over
//	restart-limit D               and have so long for it; 500ms
//	crash-window D                failures are forgotten after it; one minute
//	poison D                      the deaths of who served an identity are remembered until it was served so long; not at all
//	giveback-delay D              delay of automatic givebacks, or "never"
func isSetting(word string) bool {
	switch word {
	case "seed", "alone", "pool", "volume", "resubmits", "interval", "cleaner", "sharing", "giveback-delay", "restart-first", "restart-limit", "crash-window", "poison":
		return true
	}
	return false
}

// bytesOf reads a number of bytes with an optional suffix K, M or G.
func bytesOf(s string) (int64, error) {
	shift := 0
	switch {
	case strings.HasSuffix(s, "K"):
		shift = 10
	case strings.HasSuffix(s, "M"):
		shift = 20
	case strings.HasSuffix(s, "G"):
		shift = 30
	}
	if shift > 0 {
		s = s[:len(s)-1]
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > 1<<50>>shift {
		return 0, fmt.Errorf("%q is no number of bytes", s)
	}
	return n << shift, nil
}

func sizeText(n int64) string {
	switch {
	case n > 0 && n%(1<<20) == 0:
		return fmt.Sprintf("%dM", n>>20)
	case n > 0 && n%1024 == 0:
		return fmt.Sprintf("%dK", n>>10)
	}
	return fmt.Sprint(n)
}

// countOf reads what follows a word such as "after", or def.
func (l Line) countOf(word string, def int64) (int64, error) {
	for i, f := range l.Fields {
		if f == word {
			n, err := strconv.ParseInt(l.arg(i+1), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("%q is no number", l.arg(i+1))
			}
			return n, nil
		}
	}
	return def, nil
}

func (l Line) duration(i int) (time.Duration, error) {
	d, err := time.ParseDuration(l.arg(i))
	if err == nil && d < 0 {
		err = fmt.Errorf("%q is negative", l.arg(i))
	}
	return d, err
}
