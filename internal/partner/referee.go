package partner

import (
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/internal/planted"
)

// RefereeConfig are the rules of a [Referee].
type RefereeConfig struct {
	// Guests are the names of one or two guests.
	Guests []string
	// RestartDelay is the wait before a failed guest starts again; it doubles
	// with each failure within CrashWindow up to RestartMax, and CrashLimit
	// failures in it stop the restarts.
	RestartDelay, RestartMax time.Duration
	CrashLimit               int
	CrashWindow              time.Duration
	// RestartFirst names the guests that are started again at once when they
	// fail, and of which the partner takes over only what they do not serve again
	// within RestartLimit. Of the others the partner takes over at once.
	RestartFirst []string
	RestartLimit time.Duration
	// ProvenAfter is how long an identity must be served until the deaths of those
	// who served it before are forgotten. Negative: at once, so that only who dies
	// opening it counts. Default: 3 s.
	ProvenAfter time.Duration
	// ReleaseTimeout is how long a guest may take to release; then it is
	// fenced.
	ReleaseTimeout time.Duration
	// HelloTimeout is how long a living guest may be off the line; then it is
	// killed, for nothing is known about it.
	HelloTimeout time.Duration
	// AnswerTimeout is how long a guest that its partner does not watch may
	// leave the agent without an answer; then it is fenced.
	AnswerTimeout time.Duration
}

// Referee is the part of the protocol that runs in the host agent. It is not
// safe for concurrent use.
type Referee struct {
	cfg    RefereeConfig
	now    time.Time
	seats  map[string]*seat
	titles map[string]*title
	term   uint64 // the highest that was granted
	down   bool
	alerts map[string]string
	out    []Action
}

// seat is a guest as the referee sees it.
type seat struct {
	name     string
	inc      uint64
	alive    bool      // its process runs
	linked   bool      // it said hello on the present line
	known    bool      // what it holds is known, because it said so or began with nothing
	since    time.Time // since when it lives without being linked
	heard    time.Time // its last message, while it is asked for answers
	asked    time.Time // the last question, zero when somebody else watches
	killing  bool
	noticed  time.Time // when what it is killed for was noticed
	why      string    // what it is killed for
	fencedBy string    // who waits for its end
	starting bool      // DoStart was issued
	startAt  time.Time
	born     time.Time // when its process began
	resume   time.Time // until when its identity is kept for its next start, zero when it is not
	atMost   time.Time // what resume is put off to when the referee was late
	failures []time.Time
	stopped  bool // crashed too often
	restart  bool // its next end was asked for and is no failure
	regions  map[string]Message
	mapped   map[string]uint64 // identity to term, of the partner's regions
}

// title is an identity.
type title struct {
	holder  string // guest, "" when none
	term    uint64
	phase   Phase
	to      string // where a move takes it, "" when it does not move
	cmd     uint64 // of the command that moves it
	planned bool
	moveEnd time.Time // when a release that is still under way ends in a fence
	// reason says why the present or next grant was made, since when its cause
	// was noticed.
	reason string
	since  time.Time
	served time.Time // since when it is served
	deaths int       // of guests in a row that died while they opened it, or soon after; see died
	partly bool      // the partner of its guest is among them
	// failed are the guests that could not open it. Each has a wait of its
	// own, so that two that both fail do not hand it to and fro.
	failed map[string]backoff
}

// backoff says when a guest that failed to open an identity is asked again.
type backoff struct {
	at   time.Time
	wait time.Duration // until then; the next is twice as long
}

// retryDue tells whether some guest that failed may be asked again, or none
// has failed.
func (t *title) retryDue(now time.Time) bool {
	for _, b := range t.failed {
		if !now.Before(b.at) {
			return true
		}
	}
	return len(t.failed) == 0
}

// NewReferee returns a referee at a time, for guests none of which runs. A
// driver that finds some of an earlier agent's says so before the first Tick,
// which starts the others: KindStarted without Known for all, then KindReaped
// for those that have ended.
func NewReferee(cfg RefereeConfig, now time.Time) *Referee {
	r := &Referee{cfg: cfg, now: now, seats: map[string]*seat{}, titles: map[string]*title{}, alerts: map[string]string{}}
	if r.cfg.ReleaseTimeout == 0 {
		r.cfg.ReleaseTimeout = 5 * time.Second
	}
	if r.cfg.HelloTimeout == 0 {
		r.cfg.HelloTimeout = 10 * time.Second
	}
	if r.cfg.ProvenAfter == 0 {
		r.cfg.ProvenAfter = 3 * time.Second
	}
	if r.cfg.RestartLimit == 0 {
		r.cfg.RestartLimit = 500 * time.Millisecond
	}
	if r.cfg.AnswerTimeout == 0 {
		r.cfg.AnswerTimeout = 3 * time.Second
	}
	for _, g := range cfg.Guests {
		r.seats[g] = &seat{name: g, known: true, startAt: now, regions: map[string]Message{}, mapped: map[string]uint64{}}
		r.titles[g] = &title{failed: map[string]backoff{}}
	}
	return r
}

// Ready returns what is to be done, in order, and forgets it.
func (r *Referee) Ready() []Action {
	out := r.out
	r.out = nil
	return out
}

// SeatView is a guest as the referee sees it.
type SeatView struct {
	Inc     uint64
	Alive   bool
	Linked  bool
	Stopped bool
	StartIn time.Duration // until it is started again, when it is down
	// Guarded tells whether the partner has mapped all its regions.
	Guarded bool
}

// TitleView is an identity as the referee sees it.
type TitleView struct {
	Holder string
	Phase  Phase
	To     string
	// Suspect tells whether the partner keeps off it, because whoever served it died.
	Suspect bool
}

// Seat returns the referee's view of a guest.
func (r *Referee) Seat(g string) SeatView {
	s := r.seats[g]
	v := SeatView{Inc: s.inc, Alive: s.alive, Linked: s.linked, Stopped: s.stopped}
	if !s.alive && !s.stopped {
		v.StartIn = max(0, s.startAt.Sub(r.now))
	}
	if p := r.other(g); p != nil && p.linked {
		v.Guarded = len(s.regions) > 0
		for id, m := range s.regions {
			v.Guarded = v.Guarded && p.mapped[id] == m.Term
		}
	}
	return v
}

// Title returns the referee's view of an identity.
func (r *Referee) Title(id string) TitleView {
	t := r.titles[id]
	return TitleView{Holder: t.holder, Phase: t.phase, To: t.to, Suspect: r.suspect(id)}
}

// Alerts returns the alerts that are raised, by key.
func (r *Referee) Alerts() map[string]string {
	out := make(map[string]string, len(r.alerts))
	for k, v := range r.alerts {
		out[k] = v
	}
	return out
}

func (r *Referee) do(a Action) { r.out = append(r.out, a) }

func (r *Referee) send(to string, m Message) {
	m.From = Host
	r.do(Action{Do: DoSend, To: to, Message: m})
}

func (r *Referee) note(guest, key, format string, args ...any) {
	r.do(Action{Do: DoNote, Guest: guest, Key: key, Text: fmt.Sprintf(format, args...)})
}

func (r *Referee) raise(key, text string) {
	if r.alerts[key] != text {
		r.alerts[key] = text
		r.do(Action{Do: DoRaise, Key: key, Text: text})
	}
}

func (r *Referee) clear(key string) {
	if _, ok := r.alerts[key]; ok {
		delete(r.alerts, key)
		r.do(Action{Do: DoClear, Key: key})
	}
}

func (r *Referee) other(g string) *seat {
	for _, n := range r.cfg.Guests {
		if n != g {
			return r.seats[n]
		}
	}
	return nil
}

func (s *seat) usable() bool { return s != nil && s.alive && s.linked && !s.killing }

// soon tells whether a guest is usable, or was found by this agent and is about to
// say what it holds.
func (s *seat) soon() bool { return s.usable() || s != nil && s.alive && !s.known && !s.killing }

// Step takes one input. Inputs that are out of date are ignored.
func (r *Referee) Step(m Message) {
	switch m.Kind {
	case KindStarted:
		r.started(m)
	case KindReaped:
		r.reaped(m)
	case KindLinkDown:
		r.linkDown(m)
	case KindNoStart:
		if s := r.seats[m.Guest]; s != nil && s.starting {
			s.starting = false
			r.schedule(s, m.Reason, 0)
			r.resumeOver(s, "cannot be started: "+m.Reason)
		}
	case KindMove:
		r.move(m)
	case KindRestart:
		r.restart(m)
	case KindDown:
		r.down = true
		for _, g := range r.cfg.Guests {
			if r.seats[g].alive {
				r.send(g, Message{Kind: KindStop})
			}
		}
	default:
		r.fromGuest(m)
	}
}

func (r *Referee) linkDown(m Message) {
	s := r.seats[m.Guest]
	if s == nil || s.inc != m.Inc || !s.linked {
		return
	}
	s.linked, s.since = false, r.now
	if p := r.other(s.name); p.usable() {
		r.send(p.name, Message{Kind: KindUp, Guest: s.name, Inc: s.inc})
	}
}

// fromGuest takes what a guest sent. The driver passes on only what came on
// the line of the guest's present incarnation.
func (r *Referee) fromGuest(m Message) {
	s := r.seats[m.From]
	if s == nil || !s.alive {
		return
	}
	if m.Kind == KindHello && m.Inc == s.inc {
		r.hello(s, m)
		return
	}
	if !s.linked {
		return
	}
	s.heard = r.now
	switch m.Kind {
	case KindPong:
		return
	case KindEvent:
		r.do(Action{Do: DoNote, Guest: m.Identity, Key: m.Event, Text: m.Reason})
		return
	case KindWantFence:
		r.wantFence(s, m)
		return
	case KindRegion:
		p := r.other(s.name)
		if s.regions[m.Identity] = m; m.Region.Path == "" {
			delete(s.regions, m.Identity)
			if p != nil {
				delete(p.mapped, m.Identity)
			}
		}
		if p.usable() {
			r.do(Action{Do: DoSend, To: p.name, Message: m})
		}
		return
	case KindMapped:
		s.mapped[m.Identity] = m.Term
		return
	}
	t := r.titles[m.Identity]
	if t == nil || t.holder != s.name || t.term != m.Term && !planted.Has(planted.StaleTermAccepted) {
		return
	}
	switch m.Kind {
	case KindServing:
		t.phase, t.served = PhaseServing, r.now
		if m.Identity == s.name {
			s.resume = time.Time{}
		}
		clear(t.failed)
		r.clear("open:" + m.Identity)
		r.settle(m.Identity, t, "")
	case KindReleased:
		delete(s.regions, m.Identity)
		r.free(t)
		t.reason = m.Reason
		if t.to == "" { // the guest gives back by itself
			t.to, t.planned, t.since = r.home(m.Identity, s.name), m.Planned, time.Unix(0, m.Since)
		}
		r.place(m.Identity, BasisReleased)
	case KindFailed:
		delete(s.regions, m.Identity)
		r.openFailed(s, t, m)
	}
}

// home returns where an identity goes that holder released by itself: to its
// own guest, unless that is the holder.
func (r *Referee) home(identity, holder string) string {
	if identity != holder {
		return identity
	}
	if p := r.other(holder); p != nil {
		return p.name
	}
	return holder
}

func (r *Referee) free(t *title) {
	t.holder, t.phase, t.moveEnd = "", PhaseNone, time.Time{}
}

// settle ends a move: the command that began it learns the outcome.
func (r *Referee) settle(identity string, t *title, problem string) {
	if t.cmd != 0 && (problem != "" || t.holder == t.to) {
		r.do(Action{Do: DoDone, Cmd: t.cmd, Identity: identity, Text: problem})
		t.cmd = 0
	}
	t.to, t.planned = "", false
}

func (r *Referee) openFailed(s *seat, t *title, m Message) {
	r.free(t)
	wait := min(max(2*t.failed[s.name].wait, time.Second), 30*time.Second)
	t.failed[s.name] = backoff{r.now.Add(wait), wait}
	if m.Identity == s.name {
		s.resume = time.Time{}
	}
	r.raise("open:"+m.Identity, fmt.Sprintf("%s could not serve %s: %s", s.name, m.Identity, m.Reason))
	r.settle(m.Identity, t, m.Reason)
	r.place(m.Identity, BasisReleased)
}

func (r *Referee) started(m Message) {
	s := r.seats[m.Guest]
	if s == nil || m.Inc <= s.inc && s.alive {
		return
	}
	s.inc, s.alive, s.linked, s.known = m.Inc, true, false, m.Known
	s.killing, s.starting, s.fencedBy, s.since, s.born = false, false, "", r.now, r.now
	clear(s.regions)
	clear(s.mapped)
	if p := r.other(s.name); p.usable() {
		r.send(p.name, Message{Kind: KindUp, Guest: s.name, Inc: s.inc})
	}
}

// hello takes a guest's word for what it holds, which is the truth: it holds
// only what some referee granted and it has not released.
func (r *Referee) hello(s *seat, m Message) {
	if s.killing {
		return
	}
	s.linked, s.known = true, true
	clear(s.regions) // it announces again what it holds, and what it has mapped
	clear(s.mapped)
	// A new referee must not grant a term that a guest has seen already.
	r.term = max(r.term, m.Term)
	held := map[string]bool{}
	for _, h := range m.Holds {
		t := r.titles[h.Identity]
		if t == nil {
			continue
		}
		if t.holder != "" && t.holder != s.name {
			// Two holders cannot be; whatever made it so, one of them goes.
			r.raise("owners", fmt.Sprintf("%s and %s both say that they hold %s: %s is fenced", t.holder, s.name, h.Identity, s.name))
			r.kill(s, "", "it holds what another guest holds")
			return
		}
		held[h.Identity] = true
		if t.holder == "" {
			t.served = r.now
		}
		t.holder, t.term, t.phase = s.name, h.Term, h.Phase
	}
	for _, id := range r.cfg.Guests {
		t := r.titles[id]
		if t.holder != s.name {
			continue
		}
		// What was sent on a line that broke may be lost, either way.
		switch {
		case !held[id]:
			r.free(t)
		case t.to == s.name && t.phase == PhaseServing:
			r.settle(id, t, "")
		case t.to != "" && t.to != s.name && t.phase != PhaseReleasing:
			r.send(s.name, Message{Kind: KindRelease, Identity: id, Term: t.term, Reason: t.reason, Planned: t.planned})
		}
	}
	if p := r.other(s.name); p != nil {
		r.introduce(s, p)
	}
	for _, id := range r.cfg.Guests {
		r.place(id, BasisStart)
	}
}

// introduce tells a guest that said hello and its partner about each other.
func (r *Referee) introduce(s, p *seat) {
	if p.usable() {
		r.send(p.name, Message{Kind: KindUp, Guest: s.name, Inc: s.inc, Well: true})
	}
	if !p.alive {
		r.offer(p, "down")
		return
	}
	r.send(s.name, Message{Kind: KindUp, Guest: p.name, Inc: p.inc, Well: p.linked})
	for _, id := range r.cfg.Guests {
		if m, ok := p.regions[id]; ok {
			r.do(Action{Do: DoSend, To: s.name, Message: m})
		}
	}
}

// offer tells a guest that its partner is down, so that it may take over.
func (r *Referee) offer(dead *seat, reason string) {
	p := r.other(dead.name)
	if !p.usable() || dead.starting || dead.inc == 0 && !dead.stopped || r.down {
		return
	}
	r.send(p.name, Message{Kind: KindEnded, Guest: dead.name, Inc: dead.inc, Reason: reason, Since: r.now.UnixNano()})
}

func (r *Referee) reaped(m Message) {
	s := r.seats[m.Guest]
	if s == nil || !s.alive || s.inc != m.Inc {
		return
	}
	by, noticed := s.fencedBy, s.noticed
	if !s.killing {
		noticed = r.now
	} else {
		m.Reason = "fenced, " + s.why
	}
	s.alive, s.linked, s.known, s.killing, s.fencedBy = false, false, true, false, ""
	clear(s.regions)
	clear(s.mapped)
	served := false // its own identity
	for _, id := range r.cfg.Guests {
		t := r.titles[id]
		if t.holder == s.name {
			served = served || id == s.name && t.phase != PhaseOpening
			if !s.restart {
				r.died(id, t, s.name)
			}
			r.free(t)
			t.reason, t.since = s.name+" ended: "+m.Reason, noticed
		}
		if t.to == s.name {
			r.settle(id, t, s.name+" ended: "+m.Reason)
		}
	}
	r.schedule(s, m.Reason, r.now.Sub(s.born))
	r.keep(s, served)
	if f := r.seats[by]; f.usable() {
		r.confirm(f, s)
	} else {
		r.offer(s, m.Reason)
	}
	for _, id := range r.cfg.Guests {
		r.place(id, BasisReleased)
	}
}

// schedule decides when a guest that ended is started again.
// Lived is how long it ran.
func (r *Referee) schedule(s *seat, reason string, lived time.Duration) {
	if r.down {
		return
	}
	if s.restart {
		s.restart, s.startAt = false, r.now
		return
	}
	for len(s.failures) > 0 && r.now.Sub(s.failures[0]) > r.cfg.CrashWindow {
		s.failures = s.failures[1:]
	}
	s.failures = append(s.failures, r.now)
	n := len(s.failures)
	if n >= r.cfg.CrashLimit {
		s.stopped = true
		r.raise("crash:"+s.name, fmt.Sprintf("%s ended %d times within %s, last: %s: it is not started again; see its log, then `pollux guest restart %s`",
			s.name, n, r.cfg.CrashWindow, reason, s.name))
		return
	}
	wait := min(r.cfg.RestartDelay<<min(n-1, 16), r.cfg.RestartMax)
	if p := r.other(s.name); !p.soon() || r.suspect(s.name) {
		// Nobody takes over: its clients wait for it. What is spaced is its starts.
		if wait -= lived; n == 1 {
			wait = 0
		}
		if p != nil && !p.alive && !p.stopped && len(p.failures) == 1 {
			p.startAt = r.now // each to its own, rather than one to both
		}
	}
	s.startAt = r.now.Add(max(0, wait))
}
