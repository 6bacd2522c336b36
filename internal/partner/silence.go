package partner

import (
	"fmt"
	"time"
)

// A guest that has announced the regions of what it holds is watched by its
// partner, through their heartbeats. One that was granted an identity and has
// not opened it yet, or whose partner is not there, has no such watcher: the
// referee asks it whether it is there, and fences one that does not answer.
// Its loop answers, whatever its devices do.

// unwatched tells whether nobody but the referee would notice that s hangs.
func (r *Referee) unwatched(s *seat) bool {
	if !s.usable() {
		return false
	}
	holds := false
	for _, t := range r.titles {
		if t.holder == s.name {
			if t.phase == PhaseOpening {
				return true
			}
			holds = true
		}
	}
	return holds && !r.Seat(s.name).Guarded
}

// listen asks the guests that nobody else watches, and fences the silent. A
// referee that was itself late begins to count anew.
func (r *Referee) listen(late bool) {
	for _, g := range r.cfg.Guests {
		s := r.seats[g]
		if !r.unwatched(s) {
			s.asked = time.Time{}
			continue
		}
		if s.asked.IsZero() || late {
			s.asked, s.heard = r.now, r.now
			r.send(g, Message{Kind: KindPing})
			continue
		}
		switch {
		case r.now.Sub(s.heard) >= r.cfg.AnswerTimeout:
			r.note(g, "fence", "%s has not answered for %s and is fenced", g, r.cfg.AnswerTimeout)
			by := ""
			if p := r.other(g); p.usable() {
				by = p.name
			}
			r.kill(s, by, fmt.Sprintf("it did not answer for %s", r.cfg.AnswerTimeout))
		case r.now.Sub(s.asked) >= r.cfg.AnswerTimeout/4:
			s.asked = r.now
			r.send(g, Message{Kind: KindPing})
		}
	}
}
