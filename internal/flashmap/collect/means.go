package collect

import (
	"cmp"
	"slices"
	"time"
)

// Means are the means of a collector of which only windows are known: they are what it has
// told, or would have, while those passed. The zero Means has seen nothing.
type Means struct {
	sets []meanOf // in the order of their numbers
	now  time.Time
}

// meanOf is a set of Means.
type meanOf struct {
	set           Set
	past, current counts
	fresh         bool // used since the newest snapshot
	last          time.Time
}

// Add counts a part of what a set was used in the present window.
func (m *Means) Add(u Used, part float32) {
	i, ok := slices.BinarySearchFunc(m.sets, u.Set, func(a meanOf, b Set) int { return cmp.Compare(a.set, b) })
	if !ok {
		m.sets = slices.Insert(m.sets, i, meanOf{set: u.Set, last: m.now})
	}
	e := &m.sets[i]
	all := u.Reads + u.Writes + u.Runs
	e.current = e.current.plus(counts{u.Reads, u.Writes, u.Runs, u.Size * all}.times(part))
	e.fresh = e.fresh || u.Reads+u.Writes > 0
}

// Snapshot returns the means when the share f of the present window has passed, after so many
// others. What was added since the last snapshot was used now.
func (m *Means) Snapshot(g Geometry, now time.Time, window time.Duration, decay, f float64, windows int) Snapshot {
	s := Snapshot{At: now, Window: window, Windows: float64(windows) + f, Geometry: g}
	m.now = now
	for i := range m.sets {
		e := &m.sets[i]
		if e.fresh {
			e.last, e.fresh = now, false
		}
		s.Stats = append(s.Stats, stat(e.set, blend(e.past, e.current, decay, f, float64(windows)), now.Sub(e.last)))
	}
	return s
}

// forgotten is a count that makes no difference any more.
const forgotten = 1e-3

// End ends the present window.
func (m *Means) End(decay float64) {
	d := float32(decay)
	for i := range m.sets {
		e := &m.sets[i]
		e.past, e.current = e.past.times(d).plus(e.current.times(1-d)), counts{}
	}
	m.sets = slices.DeleteFunc(m.sets, func(e meanOf) bool { return e.past.accesses()+e.past.runs < forgotten })
}
