package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// reason is why nothing reaches some places.
type reason struct {
	file   string // in which it stands
	why    string
	places []*written
}

// written is a place as somebody wrote it down: the beginning of its name.
type written struct {
	text string
	used bool // a block that nothing reaches goes by it
}

// told are all reasons.
type told []*reason

// loadReasons reads the files of a directory.
func loadReasons(dir string) (told, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.txt"))
	if err != nil {
		return nil, err
	}
	var all told
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		some, err := parseReasons(filepath.Base(f), text)
		if err != nil {
			return nil, err
		}
		all = append(all, some...)
	}
	return all, nil
}

// parseReasons reads one file. Lines of a reason that follow one another are
// one reason.
func parseReasons(file string, text []byte) (told, error) {
	var all told
	var r *reason
	sc := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(sc.Text())
		why, isReason := strings.CutPrefix(line, "#")
		switch {
		case line == "":
		case isReason && (r == nil || len(r.places) > 0):
			r = &reason{file: file, why: strings.TrimSpace(why)}
			all = append(all, r)
		case isReason:
			r.why += " " + strings.TrimSpace(why)
		case r == nil:
			return nil, fmt.Errorf("%s:%d: a place without a reason above it", file, n)
		default:
			r.places = append(r.places, &written{text: line})
		}
	}
	return all, sc.Err()
}

// untold returns the places of a package that nothing reaches and that no
// reason explains.
func (t told) untold(p pkg) []string {
	var out []string
	for _, place := range p.missed {
		if !t.explain(place) {
			out = append(out, place)
		}
	}
	return out
}

func (t told) explain(place string) bool {
	found := false
	for _, r := range t {
		for _, l := range r.places {
			if strings.HasPrefix(place, l.text) {
				l.used, found = true, true
			}
		}
	}
	return found
}
