package release

import (
	"fmt"
	"slices"
)

// Build is what a program says of itself.
type Build struct {
	Version string   `json:"version"`
	Formats []Format `json:"formats"`
}

// This returns what this program says of itself.
func This() Build { return Build{Version: Version(), Formats: Formats()} }

// Validate says what is wrong with what a program said of itself, which may be any
// program.
func (b Build) Validate() error {
	if b.Version == "" || len(b.Formats) == 0 {
		return fmt.Errorf("it names no version or no formats")
	}
	for i, f := range b.Formats {
		switch {
		case f.Name == "":
			return fmt.Errorf("format %d has no name", i+1)
		case f.ReadsFrom < 1 || f.ReadsTo < f.ReadsFrom || f.Writes != 0 && f.Writes < f.ReadsFrom || f.Asked < max(f.Writes, 1) || f.Asked > f.ReadsTo:
			return fmt.Errorf("format %s: it reads %d to %d and writes %d, %d when asked", f.Name, f.ReadsFrom, f.ReadsTo, f.Writes, f.Asked)
		case slices.ContainsFunc(b.Formats[:i], func(g Format) bool { return g.Name == f.Name }):
			return fmt.Errorf("format %s is named twice", f.Name)
		}
	}
	return nil
}

func (b Build) format(name string) (Format, bool) {
	i := slices.IndexFunc(b.Formats, func(f Format) bool { return f.Name == name })
	if i < 0 {
		return Format{}, false
	}
	return b.Formats[i], true
}

// Verdict is what comes of comparing two builds.
type Verdict struct {
	// Refusals say what one of them writes that the other does not read. With any, the
	// two do not work as a pair.
	Refusals []string
	// Held say what one of them would write if it were asked to, and the other does
	// not read: nobody may ask while both are in use.
	Held []string
	// Lost say what one of them will do without that the other has left.
	Lost []string
}

// Compare tells whether two builds work as a pair, in both directions.
func Compare(old, new Build) Verdict {
	var v Verdict
	v.direction(old, new)
	v.direction(new, old)
	return v
}

// direction adds what a reader makes of what a writer writes.
func (v *Verdict) direction(writer, reader Build) {
	for _, w := range writer.Formats {
		r, known := reader.format(w.Name)
		reads := fmt.Sprintf("%s reads %d to %d", reader.Version, r.ReadsFrom, r.ReadsTo)
		if !known {
			reads = reader.Version + " does not know it"
		}
		say := func(list *[]string, n int, when string) {
			*list = append(*list, fmt.Sprintf("%s: %s writes version %d%s, %s", w.Name, writer.Version, n, when, reads))
		}
		unasked := w.Writes == 0 || known && r.reads(w.Writes)
		switch {
		case unasked && known && r.reads(w.Asked):
		case w.Advisory:
			say(&v.Lost, w.Asked, "")
		case !unasked:
			say(&v.Refusals, w.Writes, "")
		default:
			say(&v.Held, w.Asked, " when it is asked to")
		}
	}
}

func (f Format) reads(version int) bool { return version >= f.ReadsFrom && version <= f.ReadsTo }

// Seen is a version that something was found in.
type Seen struct {
	Kind    string // that the structure begins with
	Version int
	Where   string
}

// Unreadable says which of what was found a build does not read.
func (b Build) Unreadable(found []Seen) []string {
	var out []string
	for _, s := range found {
		i := slices.IndexFunc(b.Formats, func(f Format) bool { return f.Kind == s.Kind })
		switch {
		case i < 0:
			out = append(out, fmt.Sprintf("%s has a structure %q, which %s does not know", s.Where, s.Kind, b.Version))
		case !b.Formats[i].Advisory && !b.Formats[i].reads(s.Version):
			f := b.Formats[i]
			out = append(out, fmt.Sprintf("%s has a %s of version %d, %s reads %d to %d", s.Where, f.Name, s.Version, b.Version, f.ReadsFrom, f.ReadsTo))
		}
	}
	return out
}
