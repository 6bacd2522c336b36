package partner

import (
	"fmt"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/internal/planted"
)

// A guest of which the rules say so is started again at once when it fails, and
// its identity is kept for it: it finds in its own region what it acknowledged,
// and its partner does not have to serve two pools. This is tried once. A guest
// that does not serve again within the limit, cannot be started, dies once more,
// or has failed within the window before, is taken over.
//
// Who gets the identity is decided by the referee alone and in one place, so a
// restart and a takeover cannot both win: while it is kept, [Referee.place] is the
// only one to grant it, to its own guest; resumeOver ends that, and fences the
// guest first if it was granted.

// keep decides, after a guest has ended, whether its identity waits for it.
// Served says that it served the identity.
func (r *Referee) keep(s *seat, served bool) {
	s.resume = time.Time{}
	if !served || !slices.Contains(r.cfg.RestartFirst, s.name) || !r.other(s.name).usable() {
		return // nobody else could serve it, or somebody else does
	}
	// A move that was begun shall end where a person wants it.
	if r.down || s.stopped || len(s.failures) > 1 || r.titles[s.name].to != "" {
		return
	}
	s.startAt, s.resume, s.atMost = r.now, r.now.Add(r.cfg.RestartLimit), r.now.Add(4*r.cfg.RestartLimit)
}

// kept tells whether an identity waits for its own guest.
func (r *Referee) kept(id string) bool { return !r.seats[id].resume.IsZero() }

// lateReferee is the least time without a look that counts as late; drivers look more
// often while a guest is waited for.
const lateReferee = 50 * time.Millisecond

// watchRestarts ends the wait for guests that take too long. Time in which the
// referee itself did not run, since its last look, does not count, within bounds: that
// the guest serves may be told by a message that waits.
func (r *Referee) watchRestarts(since time.Duration) {
	for _, g := range r.cfg.Guests {
		s := r.seats[g]
		switch {
		case s.resume.IsZero():
		case since >= max(lateReferee, r.cfg.RestartLimit/4) && r.now.Before(s.atMost):
			if s.resume = s.resume.Add(since); s.resume.After(s.atMost) {
				s.resume = s.atMost
			}
		case !r.now.Before(s.resume):
			r.resumeOver(s, fmt.Sprintf("has not served again within %s", r.cfg.RestartLimit))
		}
	}
}

// resumeOver gives up waiting for a guest: its identity is the partner's now.
func (r *Referee) resumeOver(s *seat, why string) {
	if !r.kept(s.name) {
		return
	}
	s.resume = time.Time{}
	t, p := r.titles[s.name], r.other(s.name)
	if !p.usable() || r.down || s.killing {
		return // it is waited for as long as it takes, or its end is near
	}
	r.note(s.name, NoteLate, "%s %s: %s takes over", s.name, why, p.name)
	if t.holder == s.name && planted.Has(planted.RestartNotFenced) {
		r.free(t)
	}
	switch {
	case t.holder == s.name:
		r.kill(s, p.name, "it "+why)
	case r.grantable(t) && !r.barred(t, p):
		r.grant(s.name, t, p, BasisLate)
	}
}

// died counts the death of a guest that held an identity. One death is nobody's
// fault. When the partner dies of it, too, and each before it has served the identity
// for long, the cause may be what clients ask of the identity, or what its pool holds.
func (r *Referee) died(id string, t *title, guest string) {
	if t.phase != PhaseOpening && r.proven(t) {
		r.trust(id)
		return
	}
	t.deaths++
	t.partly = t.partly || guest != id
	if r.suspect(id) {
		r.raise("poison:"+id, fmt.Sprintf("whoever serves %s dies of it, both guests did: only guest %s itself may serve it for now, so that its partner goes on; see the crash reports; `pollux takeover %s` lets the partner try all the same",
			id, id, id))
	}
}

// proven tells whether an identity has been served for long.
func (r *Referee) proven(t *title) bool { return r.now.Sub(t.served) >= r.cfg.ProvenAfter }

// suspect tells whether an identity may be what kills guests. The partner, which
// has clients of its own, does not take it over once more.
func (r *Referee) suspect(id string) bool {
	t := r.titles[id]
	return t.deaths >= 2 && t.partly
}

// trust forgets the deaths of those who served an identity.
func (r *Referee) trust(id string) {
	t := r.titles[id]
	t.deaths, t.partly = 0, false
	r.clear("poison:" + id)
}
