package partner

import (
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/internal/planted"
)

// Config are the rules of a [Machine].
type Config struct {
	Self    string // name of this guest, and of its identity
	Partner string // name of the other, "" when this guest is alone
	Inc     uint64 // incarnation of this process
	// HangTimeout is how long a heartbeat of the partner may stand still.
	HangTimeout time.Duration
	// LateAfter is the time between ticks from which on the machine takes
	// itself for late. Default: a quarter of HangTimeout.
	LateAfter time.Duration
	// GivebackDelay is how long the partner must be well before it is given
	// its identity; negative means only by command.
	GivebackDelay time.Duration
	// LockoutCount automatic givebacks within LockoutWindow are the last.
	LockoutCount  int
	LockoutWindow time.Duration
}

// Machine is the part of the protocol that runs in a guest. It is not safe
// for concurrent use.
type Machine struct {
	cfg   Config
	now   time.Time
	agent bool // the line to the agent is up
	ids   map[string]*hold
	peer  peer

	fence     uint64      // incarnation whose fence was asked for, 0 for none
	givebacks []time.Time // automatic ones, the oldest first
	locked    bool
	alerts    map[string]string
	out       []Action
}

// hold is what this guest does with an identity.
type hold struct {
	phase   Phase
	term    uint64
	last    uint64 // highest term ever seen, kept when the identity is released
	leave   bool   // release as soon as the opening has ended
	reason  string // of the release, for the referee
	planned bool
	// byHand is the partner's incarnation when a person moved the identity
	// here. That guest does not get it back by itself; a restarted one does.
	byHand uint64
	region Region
	// closed says that the region was announced once, and is no more.
	closed bool
}

// peer is what this guest knows about the other.
type peer struct {
	inc     uint64
	up      bool
	well    bool
	since   time.Time // since when it is well
	fenced  uint64    // highest incarnation that the referee confirmed as fenced
	regions map[string]*watch
}

// watch is a region of the partner under observation.
type watch struct {
	term    uint64
	region  Region
	mapped  bool
	beat    uint64
	fresh   bool // it changed since the last Tick, which alone knows when
	changed time.Time
}

// New returns a machine at a time; it believes nothing about the partner and
// waits for the agent.
func New(cfg Config, now time.Time) *Machine {
	if cfg.LateAfter == 0 {
		cfg.LateAfter = cfg.HangTimeout / 4
	}
	m := &Machine{cfg: cfg, now: now, ids: map[string]*hold{}, alerts: map[string]string{}}
	m.peer.regions = map[string]*watch{}
	m.ids[cfg.Self] = &hold{}
	if cfg.Partner != "" {
		m.ids[cfg.Partner] = &hold{}
	}
	return m
}

// Ready returns what is to be done, in order, and forgets it.
func (m *Machine) Ready() []Action {
	out := m.out
	m.out = nil
	return out
}

// Phase returns how far this guest is with an identity.
func (m *Machine) Phase(identity string) Phase {
	if h := m.ids[identity]; h != nil {
		return h.phase
	}
	return PhaseNone
}

// Holds lists what this guest holds, its own identity first.
func (m *Machine) Holds() []Hold {
	var out []Hold
	for _, id := range []string{m.cfg.Self, m.cfg.Partner} {
		if h := m.ids[id]; h != nil && h.phase != PhaseNone {
			out = append(out, Hold{id, h.term, h.phase})
		}
	}
	return out
}

// View is what status shows of a machine.
type View struct {
	Agent       bool
	PartnerUp   bool
	PartnerWell bool
	Mapped      bool          // every announced region of the partner is mapped
	GivebackIn  time.Duration // until the automatic giveback, when one is due
	Lockout     bool
	Alerts      map[string]string
}

// View returns the machine's view of the pair.
func (m *Machine) View() View {
	v := View{Agent: m.agent, PartnerUp: m.peer.up, PartnerWell: m.peer.well, Lockout: m.locked, Mapped: len(m.peer.regions) > 0}
	for _, w := range m.peer.regions {
		v.Mapped = v.Mapped && w.mapped
	}
	if m.givebackDue() {
		v.GivebackIn = max(time.Nanosecond, m.peer.since.Add(m.cfg.GivebackDelay).Sub(m.now))
	}
	v.Alerts = make(map[string]string, len(m.alerts))
	for k, t := range m.alerts {
		v.Alerts[k] = t
	}
	return v
}

func (m *Machine) do(a Action) { m.out = append(m.out, a) }
func (m *Machine) send(msg Message) {
	msg.From = m.cfg.Self
	m.do(Action{Do: DoSend, To: Host, Message: msg})
}

func (m *Machine) raise(key, text string) {
	if m.alerts[key] != text {
		m.alerts[key] = text
		m.do(Action{Do: DoRaise, Key: key, Text: text})
	}
}

func (m *Machine) clear(key string) {
	if _, ok := m.alerts[key]; ok {
		delete(m.alerts, key)
		m.do(Action{Do: DoClear, Key: key})
	}
}

// Step takes one input. Inputs that are out of date are ignored.
func (m *Machine) Step(msg Message) {
	switch msg.Kind {
	case KindAgentBack:
		m.agentBack()
	case KindAgentLost:
		m.agent = false
		m.fence = 0 // its answer went with the agent
		m.raise("agent", "the agent is not running: no automatic takeover")
	case KindUp:
		m.partnerUp(msg)
	case KindEnded:
		m.partnerEnded(msg)
	case KindFenced:
		m.peer.fenced = max(m.peer.fenced, msg.Inc)
		m.partnerGone(msg)
		m.fence = 0
	case KindRefused:
		// A hang that goes on is reported again after another whole timeout.
		m.fence = 0
		m.restartCounts()
		m.unwatch(msg.Identity)
		m.do(Action{Do: DoNote, Key: "fence-refused", Text: fmt.Sprintf("fence of %s refused: %s", msg.Guest, msg.Reason)})
	case KindRegion:
		m.regionAnnounced(msg)
	case KindMapDone:
		m.mapDone(msg)
	case KindBeat:
		if w := m.peer.regions[msg.Identity]; w != nil && w.mapped && w.beat != msg.Beat {
			w.beat, w.fresh = msg.Beat, true
		}
	case KindStuck:
		if msg.Reason == "" {
			m.clear("device:" + msg.Identity)
		} else {
			m.raise("device:"+msg.Identity, msg.Reason)
		}
	case KindEvent:
		m.send(Message{Kind: KindEvent, Identity: msg.Identity, Event: msg.Event, Reason: msg.Reason})
	case KindPing:
		m.send(Message{Kind: KindPong})
	case KindStop:
		m.do(Action{Do: DoStop})
	default:
		m.stepIdentity(msg)
	}
}

// stepIdentity takes the inputs that concern one identity.
func (m *Machine) stepIdentity(msg Message) {
	h := m.ids[msg.Identity]
	if h == nil {
		return
	}
	switch msg.Kind {
	case KindGrant:
		m.grant(h, msg)
	case KindRelease:
		m.release(h, msg)
	case KindOpened:
		m.opened(h, msg)
	case KindClosing:
		if h.phase == PhaseServing && h.term == msg.Term && h.region.Path != "" {
			h.region, h.closed = Region{}, true
			m.announce(msg.Identity, h)
		}
	case KindOpenFailed:
		if h.phase == PhaseOpening && h.term == msg.Term {
			m.raise("open:"+msg.Identity, fmt.Sprintf("the pool of %s does not open: %s", msg.Identity, msg.Reason))
			m.drop(h)
			m.send(Message{Kind: KindFailed, Identity: msg.Identity, Term: msg.Term, Reason: msg.Reason, Steps: msg.Steps})
		}
	case KindServeDone:
		if h.phase == PhaseStarting && h.term == msg.Term {
			h.phase = PhaseServing
			m.send(Message{Kind: KindServing, Identity: msg.Identity, Term: msg.Term, Steps: msg.Steps, Since: msg.Since})
		}
	case KindReleaseDone:
		if h.phase == PhaseReleasing && h.term == msg.Term {
			reason, planned := h.reason, h.planned
			m.drop(h)
			m.send(Message{Kind: KindReleased, Identity: msg.Identity, Term: msg.Term, Reason: reason, Planned: planned, Steps: msg.Steps, Since: msg.Since})
		}
	case KindLost:
		if h.phase != PhaseNone && h.term == msg.Term {
			m.raise("open:"+msg.Identity, fmt.Sprintf("the pool of %s stopped: %s", msg.Identity, msg.Reason))
			m.drop(h)
			m.send(Message{Kind: KindFailed, Identity: msg.Identity, Term: msg.Term, Reason: msg.Reason})
		}
	}
}

func (m *Machine) drop(h *hold) {
	*h = hold{last: h.last}
}

func (m *Machine) agentBack() {
	m.agent = true
	m.fence = 0
	m.restartCounts()
	m.clear("agent")
	hello := Message{Kind: KindHello, Inc: m.cfg.Inc, Holds: m.Holds()}
	for _, h := range m.ids {
		hello.Term = max(hello.Term, h.last)
	}
	m.send(hello)
	for _, hd := range m.Holds() {
		h := m.ids[hd.Identity]
		if h.phase == PhaseStarting || h.phase == PhaseServing {
			m.announce(hd.Identity, h)
		}
	}
	for _, id := range m.watched() {
		if w := m.peer.regions[id]; w.mapped {
			m.send(Message{Kind: KindMapped, Identity: id, Term: w.term})
		}
	}
}

// grant begins to serve an identity. A grant of the partner's identity is
// believed only on grounds that this machine can check.
func (m *Machine) grant(h *hold, msg Message) {
	if msg.Term <= h.last || h.phase != PhaseNone {
		return
	}
	h.last = msg.Term
	foreign := msg.Identity != m.cfg.Self
	if foreign && msg.Basis == BasisFenced && (m.peer.fenced < m.peer.inc || m.peer.up) {
		m.send(Message{Kind: KindFailed, Identity: msg.Identity, Term: msg.Term, Reason: "granted without a confirmed fence"})
		return
	}
	if foreign && (msg.Basis == BasisStart || msg.Basis == BasisRestart) {
		m.send(Message{Kind: KindFailed, Identity: msg.Identity, Term: msg.Term, Reason: "not this guest's own identity"})
		return
	}
	h.phase, h.term = PhaseOpening, msg.Term
	if msg.Planned && foreign {
		h.byHand = m.peer.inc
	}
	m.unwatch(msg.Identity)
	m.do(Action{Do: DoOpen, Identity: msg.Identity, Term: msg.Term, Takeover: foreign, Message: msg})
}

func (m *Machine) opened(h *hold, msg Message) {
	if h.phase == PhaseServing && h.term == msg.Term {
		h.region, h.closed = msg.Region, false // its pool was created or imported only now
		m.announce(msg.Identity, h)
		return
	}
	if h.phase != PhaseOpening || h.term != msg.Term {
		return
	}
	h.region = msg.Region
	m.clear("open:" + msg.Identity)
	if h.leave {
		m.startRelease(h, msg.Identity)
		return
	}
	h.phase = PhaseStarting
	m.do(Action{Do: DoServe, Identity: msg.Identity, Term: msg.Term})
	m.announce(msg.Identity, h)
}

// announce tells the partner where the region of an identity's pool is, if it
// has a pool, and that there is none, if it had one. The latter is told to every
// new agent, for it may not have reached the partner by the one before.
func (m *Machine) announce(identity string, h *hold) {
	if h.region.Path != "" || h.closed {
		m.send(Message{Kind: KindRegion, Inc: m.cfg.Inc, Identity: identity, Term: h.term, Region: h.region})
	}
}

func (m *Machine) release(h *hold, msg Message) {
	if msg.Term != h.term || h.phase == PhaseNone {
		// It went before the request came; the referee may not know yet.
		m.send(Message{Kind: KindReleased, Identity: msg.Identity, Term: msg.Term, Reason: msg.Reason, Planned: msg.Planned})
		return
	}
	if msg.Planned && msg.Identity != m.cfg.Self {
		// A person gave back: what made automatic giveback stop is settled.
		m.locked, m.givebacks = false, nil
		m.clear("lockout")
	}
	h.reason, h.planned = msg.Reason, msg.Planned
	switch h.phase {
	case PhaseOpening:
		h.leave = true
	case PhaseStarting, PhaseServing:
		m.startRelease(h, msg.Identity)
	}
}

func (m *Machine) startRelease(h *hold, identity string) {
	h.phase, h.leave = PhaseReleasing, false
	m.do(Action{Do: DoRelease, Identity: identity, Term: h.term})
	if planted.Has(planted.GiveBackBeforeRelease) {
		m.send(Message{Kind: KindReleased, Identity: identity, Term: h.term, Reason: h.reason, Planned: h.planned})
	}
}

func (m *Machine) partnerUp(msg Message) {
	if msg.Guest != m.cfg.Partner || msg.Inc < m.peer.inc || msg.Inc <= m.peer.fenced {
		return
	}
	if msg.Inc > m.peer.inc {
		m.unwatchAll()
		m.clear("hang")
		m.fence = 0
		m.peer.well = false
	}
	m.peer.inc, m.peer.up = msg.Inc, true
	if msg.Well != m.peer.well {
		m.peer.well, m.peer.since = msg.Well, m.now
	}
	m.clear("partner")
}

// partnerEnded answers the death of the partner with the request to fence
// it, which for a process that was reaped is only the confirmation.
func (m *Machine) partnerEnded(msg Message) {
	if m.partnerGone(msg) {
		m.askFence("ended: "+msg.Reason, "", 0)
	}
}

func (m *Machine) partnerGone(msg Message) bool {
	if msg.Guest != m.cfg.Partner || msg.Inc < m.peer.inc {
		return false
	}
	m.peer.inc, m.peer.up, m.peer.well = msg.Inc, false, false
	m.unwatchAll()
	m.clear("hang")
	m.raise("partner", fmt.Sprintf("%s is down: not protected", msg.Guest))
	return true
}

func (m *Machine) askFence(reason, identity string, term uint64) {
	if !m.agent || m.fence == m.peer.inc {
		return
	}
	m.fence = m.peer.inc
	m.send(Message{Kind: KindWantFence, Guest: m.cfg.Partner, Inc: m.peer.inc, Identity: identity, Term: term, Reason: reason})
}
