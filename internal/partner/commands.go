package partner

import (
	"fmt"
	"time"
)

// move begins to hand an identity from its holder to the guest m.To, by
// command. DoDone reports the end.
func (r *Referee) move(m Message) {
	t, to := r.titles[m.Identity], r.seats[m.To]
	refuse := func(format string, args ...any) {
		r.do(Action{Do: DoDone, Cmd: m.Cmd, Identity: m.Identity, Text: fmt.Sprintf(format, args...)})
	}
	switch {
	case t == nil || to == nil:
		refuse("no such guest")
		return
	case r.down:
		refuse("the pair is going down")
		return
	case t.to != "":
		refuse("%s is on its way to %s already", m.Identity, t.to)
		return
	case !to.usable():
		refuse("%s is not there to serve %s", to.name, m.Identity)
		return
	case t.holder == to.name:
		refuse("%s serves %s already", to.name, m.Identity)
		return
	}
	t.to, t.cmd, t.planned, t.reason = to.name, m.Cmd, true, m.Reason
	t.since = r.now
	clear(t.failed)
	if t.holder == "" {
		// Left by a guest that died and was not taken over.
		r.trust(m.Identity)
		r.seats[m.Identity].resume = time.Time{}
		r.place(m.Identity, BasisReleased)
		return
	}
	t.moveEnd = r.now.Add(r.cfg.ReleaseTimeout)
	r.send(t.holder, Message{Kind: KindRelease, Identity: m.Identity, Term: t.term, Reason: m.Reason, Planned: true})
}

// restart starts a guest that is down at once, and forgets its failures.
func (r *Referee) restart(m Message) {
	s := r.seats[m.Guest]
	if s == nil {
		return
	}
	s.failures, s.stopped = nil, false
	r.clear("crash:" + s.name)
	if s.alive {
		s.restart = true
		return
	}
	s.startAt = r.now
}

// Tick tells the referee the time: it starts guests that are due, fences one
// that does not release or answer, and tries again what failed.
func (r *Referee) Tick(now time.Time) {
	since := now.Sub(r.now)
	r.now = now
	r.listen(since >= r.cfg.AnswerTimeout/2)
	r.watchRestarts(since)
	for _, g := range r.cfg.Guests {
		s := r.seats[g]
		if r.startDue(s) {
			s.starting = true
			r.do(Action{Do: DoStart, Guest: g})
		}
		if s.alive && !s.linked && !s.killing && now.Sub(s.since) >= r.cfg.HelloTimeout {
			r.note(g, "fence", "%s has said nothing for %s and is killed", g, r.cfg.HelloTimeout)
			by := ""
			if p := r.other(g); p.usable() {
				by = p.name
			}
			r.kill(s, by, "it said nothing")
		}
	}
	for _, id := range r.cfg.Guests {
		t := r.titles[id]
		if t.deaths > 0 && t.phase == PhaseServing && r.proven(t) {
			r.trust(id)
		}
		if !t.moveEnd.IsZero() && now.After(t.moveEnd) {
			t.moveEnd = time.Time{}
			if s := r.seats[t.holder]; s != nil && s.alive && !s.killing {
				r.note(s.name, "fence", "%s did not release %s within %s and is fenced", s.name, id, r.cfg.ReleaseTimeout)
				r.kill(s, t.to, "it did not release "+id)
			}
		}
		if t.holder == "" && t.retryDue(now) {
			r.place(id, BasisReleased)
		}
	}
}

// startPatience is how long the start of a guest waits for its partner to
// serve what it takes over.
const startPatience = 5 * time.Second

// startDue tells whether s is to be started now. While its partner takes over
// from it, it is left the processors: clients wait for the takeover, nobody
// waits for the guest.
func (r *Referee) startDue(s *seat) bool {
	if s.alive || s.starting || s.stopped || r.down {
		return false
	}
	if r.takenOver(s) {
		return !r.now.Before(s.startAt.Add(startPatience))
	}
	return !r.now.Before(s.startAt)
}

// takenOver tells whether the partner of s is about to serve an identity that
// is not its own.
func (r *Referee) takenOver(s *seat) bool {
	p := r.other(s.name)
	if !p.usable() {
		return false
	}
	for id, t := range r.titles {
		if id != p.name && t.holder == p.name && t.phase == PhaseOpening {
			return true
		}
	}
	return false
}

// Next returns when Tick must be called again at the latest.
func (r *Referee) Next() time.Time {
	next := r.now.Add(time.Second)
	earlier := func(t time.Time) {
		if t.After(r.now) && t.Before(next) {
			next = t
		}
	}
	for _, s := range r.seats {
		if r.startDue(s) {
			return r.now
		}
		if !s.alive && !s.stopped {
			earlier(s.startAt)
			earlier(s.startAt.Add(startPatience))
		}
		if s.alive && !s.linked {
			earlier(s.since.Add(r.cfg.HelloTimeout))
		}
		if !s.resume.IsZero() {
			earlier(r.now.Add(r.cfg.RestartLimit / 8)) // who looks seldom cannot tell that it was late
			earlier(s.resume)
		}
		if !s.asked.IsZero() {
			earlier(s.asked.Add(r.cfg.AnswerTimeout / 4))
		}
	}
	for _, t := range r.titles {
		earlier(t.moveEnd)
		if t.holder == "" {
			for _, b := range t.failed {
				earlier(b.at)
			}
		}
	}
	return next
}
