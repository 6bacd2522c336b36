package partner

import (
	"fmt"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/internal/planted"
)

func (m *Machine) regionAnnounced(msg Message) {
	if msg.From != m.cfg.Partner || msg.Inc != m.peer.inc || !m.peer.up || m.ids[msg.Identity] == nil {
		return
	}
	if msg.Region.Path == "" {
		m.unwatch(msg.Identity)
		return
	}
	if w := m.peer.regions[msg.Identity]; w != nil {
		if w.term == msg.Term {
			return
		}
		m.unwatch(msg.Identity)
	}
	if msg.Identity == m.cfg.Partner {
		m.clear("open:" + msg.Identity) // its own guest opened it
	}
	m.peer.regions[msg.Identity] = &watch{term: msg.Term, region: msg.Region, changed: m.now}
	m.do(Action{Do: DoMap, Identity: msg.Identity, Term: msg.Term, Region: msg.Region})
}

func (m *Machine) mapDone(msg Message) {
	w := m.peer.regions[msg.Identity]
	if w == nil || w.term != msg.Term {
		return
	}
	if msg.Reason != "" {
		m.raise("region:"+msg.Identity, fmt.Sprintf("the region of %s cannot be mapped: %s", msg.Identity, msg.Reason))
		return
	}
	w.mapped, w.changed, w.beat = true, m.now, msg.Beat
	m.clear("region:" + msg.Identity)
	m.send(Message{Kind: KindMapped, Identity: msg.Identity, Term: msg.Term})
}

func (m *Machine) unwatch(identity string) {
	if _, ok := m.peer.regions[identity]; ok {
		delete(m.peer.regions, identity)
		m.clear("region:" + identity)
		m.do(Action{Do: DoUnmap, Identity: identity})
	}
}

func (m *Machine) watched() []string {
	ids := make([]string, 0, len(m.peer.regions))
	for id := range m.peer.regions {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

func (m *Machine) unwatchAll() {
	for _, id := range m.watched() {
		m.unwatch(id)
	}
}

func (m *Machine) restartCounts() {
	for _, w := range m.peer.regions {
		w.changed = m.now
	}
}

// Tick tells the machine the time. Heartbeats that were read just before
// belong in front of it.
func (m *Machine) Tick(now time.Time) {
	late := now.Sub(m.now) > m.cfg.LateAfter
	m.now = now
	for _, w := range m.peer.regions {
		if w.fresh {
			w.fresh, w.changed = false, now
		}
	}
	if late && !planted.Has(planted.LateWatcher) {
		m.restartCounts()
	}
	m.watchBeats()
	if m.givebackDue() && now.Sub(m.peer.since) >= m.cfg.GivebackDelay {
		m.giveback()
	}
}

func (m *Machine) watchBeats() {
	stale := ""
	for _, id := range m.watched() {
		if w := m.peer.regions[id]; w.mapped && m.now.Sub(w.changed) >= m.cfg.HangTimeout {
			stale = id
		}
	}
	switch {
	case stale == "":
		m.clear("hang")
	case !m.agent:
		m.raise("hang", fmt.Sprintf("%s does not answer, and without the agent it cannot be fenced: start the agent", m.cfg.Partner))
	default:
		m.clear("hang")
		m.askFence(fmt.Sprintf("no heartbeat for %s", m.cfg.HangTimeout), stale, m.peer.regions[stale].term)
	}
}

// givebackDue tells whether the partner could be given its identity once the
// delay is over.
func (m *Machine) givebackDue() bool {
	if m.cfg.Partner == "" || m.cfg.GivebackDelay < 0 || m.locked {
		return false
	}
	h := m.ids[m.cfg.Partner]
	return m.agent && m.peer.up && m.peer.well && h.phase == PhaseServing && (h.byHand == 0 || h.byHand != m.peer.inc)
}

func (m *Machine) giveback() {
	for len(m.givebacks) > 0 && m.now.Sub(m.givebacks[0]) > m.cfg.LockoutWindow {
		m.givebacks = m.givebacks[1:]
	}
	if len(m.givebacks) >= m.cfg.LockoutCount {
		m.locked = true
		m.raise("lockout", fmt.Sprintf("%s was given back %d times within %s: automatic giveback has stopped; find out why it fails, then `pollux giveback %s`",
			m.cfg.Partner, len(m.givebacks), m.cfg.LockoutWindow, m.cfg.Partner))
		return
	}
	m.givebacks = append(m.givebacks, m.now)
	h := m.ids[m.cfg.Partner]
	h.reason = "automatic giveback"
	m.startRelease(h, m.cfg.Partner)
}
