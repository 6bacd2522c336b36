package partner

import (
	"github.com/pollux-storage/pollux/internal/planted"
	"time"
)

// wantFence answers a guest that asks for its partner's fence.
func (r *Referee) wantFence(s *seat, m Message) {
	v := r.seats[m.Guest]
	refuse := func(why string) {
		r.send(s.name, Message{Kind: KindRefused, Guest: m.Guest, Inc: m.Inc, Reason: why})
	}
	switch {
	case v == nil || v == s:
		refuse("no such partner")
	case s.killing:
		refuse("this guest is being fenced itself")
	case !v.alive && v.inc == m.Inc:
		r.confirm(s, v)
	case v.inc != m.Inc:
		refuse("it was started again")
	case v.killing:
		v.fencedBy = s.name
	case !v.known:
		// It has not told a restarted agent what it holds, and now it is
		// silent towards its partner too.
		r.kill(v, s.name, m.Reason)
	default:
		// Silence counts only while the identity is still held as it was
		// when the guest looked.
		if t := r.titles[m.Identity]; t == nil || t.holder != v.name || t.term != m.Term {
			r.send(s.name, Message{Kind: KindRefused, Guest: m.Guest, Inc: m.Inc, Identity: m.Identity, Reason: "it has handed over what was watched"})
			return
		}
		r.note(v.name, "fence", "%s asks to fence %s: %s", s.name, v.name, m.Reason)
		r.kill(v, s.name, m.Reason)
		if planted.Has(planted.TakeoverBeforeFence) {
			for _, t := range r.titles {
				if t.holder == v.name {
					r.free(t)
				}
			}
			r.confirm(s, v)
		}
	}
}

func (r *Referee) kill(s *seat, by, why string) {
	s.killing, s.fencedBy, s.noticed, s.why = true, by, r.now, why
	r.do(Action{Do: DoKill, Guest: s.name, Inc: s.inc})
}

// confirm tells s that v can write no more, and grants s what v left.
func (r *Referee) confirm(s, v *seat) {
	r.send(s.name, Message{Kind: KindFenced, Guest: v.name, Inc: v.inc})
	for _, id := range []string{s.name, v.name} {
		t := r.titles[id]
		if r.grantable(t) && !r.kept(id) && (id == s.name || !r.suspect(id)) && !r.barred(t, s) {
			if t.reason == "" {
				t.reason = v.name + " is down"
			}
			r.grant(id, t, s, BasisFenced)
		}
	}
}

// grantable tells whether nobody can hold the identity.
func (r *Referee) grantable(t *title) bool {
	if t.holder != "" || r.down {
		return false
	}
	for _, s := range r.seats {
		if s.alive && !s.known && !planted.Has(planted.HelloIgnored) {
			return false
		}
	}
	return true
}

// barred tells whether the guest failed to open the identity just now.
func (r *Referee) barred(t *title, s *seat) bool {
	return r.now.Before(t.failed[s.name].at)
}

func (r *Referee) grant(id string, t *title, s *seat, basis string) {
	r.term++
	t.holder, t.term, t.phase = s.name, r.term, PhaseOpening
	if t.since.IsZero() {
		t.since = r.now
	}
	r.send(s.name, Message{Kind: KindGrant, Identity: id, Term: r.term, Basis: basis, Reason: t.reason, Planned: t.planned, Since: t.since.UnixNano()})
	t.since = time.Time{}
}

// place grants an identity that nobody holds to where it belongs: the end of
// its move, else its own guest, else, when a move failed, to the other one,
// which had it. Without a guest to take it, it waits.
func (r *Referee) place(id, basis string) {
	t := r.titles[id]
	if !r.grantable(t) {
		return
	}
	moving := t.to != ""
	if s := r.seats[t.to]; moving && s.usable() && !r.barred(t, s) {
		if id != s.name {
			basis = BasisReleased
		}
		r.grant(id, t, s, basis)
		return
	}
	if moving {
		r.settle(id, t, t.to+" is not there")
	}
	home := r.seats[id]
	if home.usable() && r.kept(id) {
		basis = BasisRestart
	}
	if home.usable() && !r.barred(t, home) {
		r.grant(id, t, home, basis)
		return
	}
	// Its guest lives and cannot take it now: the partner, which had it, may.
	// When its guest is dead the partner is offered the fence instead.
	p := r.other(id)
	if p.usable() && !r.barred(t, p) && !r.suspect(id) && (home.usable() || moving && home.alive) {
		r.grant(id, t, p, BasisReleased)
	}
}
