package sim

import (
	"fmt"
	"strconv"
	"strings"
)

// Shrink takes lines away from a script, and makes numbers smaller, for as
// long as fails says that it still fails, and returns what is left. It asks at
// most tries times.
func Shrink(s *Script, tries int, fails func(*Script) bool) *Script {
	best := &Script{Name: s.Name, Lines: append([]Line(nil), s.Lines...)}
	try := func(lines []Line) bool {
		if tries <= 0 {
			return false
		}
		tries--
		c := &Script{Name: s.Name, Lines: lines}
		if fails(c) {
			best = c
			return true
		}
		return false
	}
	// What comes after the failure is not needed; then large pieces, then
	// smaller ones.
	for chunk := max(1, len(best.Lines)/2); ; {
		progress := false
		for at := len(best.Lines) - chunk; at > -chunk && tries > 0; at -= chunk {
			from, to := max(0, at), min(len(best.Lines), at+chunk)
			if from >= to {
				continue
			}
			lines := append([]Line(nil), best.Lines[:from]...)
			if try(append(lines, best.Lines[to:]...)) {
				progress = true
			}
		}
		if chunk == 1 && !progress || tries <= 0 {
			break
		}
		if !progress {
			chunk = max(1, chunk/2)
		}
		chunk = min(chunk, max(1, len(best.Lines)))
	}
	for i := range best.Lines {
		for try(withSmaller(best.Lines, i)) {
		}
	}
	return best
}

// withSmaller returns the lines with the last number of line i halved, or
// nothing to try.
func withSmaller(lines []Line, i int) []Line {
	out := append([]Line(nil), lines...)
	f := append([]string(nil), lines[i].Fields...)
	for j := len(f) - 1; j > 0; j-- {
		if n, err := strconv.Atoi(f[j]); err == nil && n > 1 && f[0] != "seed" {
			f[j] = fmt.Sprint(n / 2)
			break
		}
	}
	out[i] = Line{f, lines[i].Number}
	return out
}

// kindOf is what failures have in common that are probably one: the words
// without a number in them.
func kindOf(err error) string {
	if err == nil {
		return ""
	}
	var words []string
	for _, f := range strings.Fields(err.Error()) {
		if !strings.ContainsAny(f, "0123456789") && len(words) < 6 {
			words = append(words, f)
		}
	}
	return strings.Join(words, " ")
}
