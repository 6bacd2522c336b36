package release

import (
	"fmt"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
)

// Set with -ldflags -X by those who package the program (version), and by tests
// that need a program of another release (claims: rows of the table in the form
// NAME=FROM-TO/WRITES/ASKED, with commas between them).
var version, claims string

// Version returns the version of this build, or "unknown".
func Version() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

// Formats returns the table of this build.
func Formats() []Format {
	fs := slices.Clone(formats)
	if err := claim(fs, claims); err != nil {
		panic("release: " + err.Error()) // by whoever built the program
	}
	return fs
}

// claim changes rows of a table.
func claim(fs []Format, text string) error {
	for row := range strings.SplitSeq(text, ",") {
		if row == "" {
			continue
		}
		name, numbers, _ := strings.Cut(row, "=")
		i := slices.IndexFunc(fs, func(f Format) bool { return f.Name == name })
		if i < 0 {
			return fmt.Errorf("claims: there is no format %q", name)
		}
		words := strings.FieldsFunc(numbers, func(r rune) bool { return r == '-' || r == '/' })
		if len(words) != 4 {
			return fmt.Errorf("claims: %q is not of the form NAME=FROM-TO/WRITES/ASKED", row)
		}
		for j, at := range []*int{&fs[i].ReadsFrom, &fs[i].ReadsTo, &fs[i].Writes, &fs[i].Asked} {
			n, err := strconv.Atoi(words[j])
			if err != nil {
				return fmt.Errorf("claims: %q: %w", row, err)
			}
			*at = n
		}
	}
	return nil
}
