package sim

import (
	"slices"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/internal/partner"
)

// host is the agent and what it remembers of guests.
type host struct {
	w     *World
	names []string
	ref   *partner.Referee // nil while there is no agent
	life  int              // of the agent
	incs  map[string]uint64
	cmd   uint64
	done  map[uint64]string // outcomes of commands
	// starts says how the next starts of a guest go, if not well.
	starts map[string]starting
}

// starting is how starts of a guest go.
type starting struct {
	fails bool          // there is no process
	slow  time.Duration // until the guest is on its line
	dies  int64         // after so many counted operations
	times int           // so many starts
}

// nextStart tells how a guest's start goes that is made now.
func (h *host) nextStart(g string) starting {
	s, ok := h.starts[g]
	if !ok {
		return starting{}
	}
	if s.times--; s.times <= 0 {
		delete(h.starts, g)
	} else {
		h.starts[g] = s
	}
	return s
}

func (w *World) other(g string) string {
	for _, o := range w.host.names {
		if o != g {
			return o
		}
	}
	return ""
}

// startAgent begins a referee. It learns of processes as from a state file.
func (w *World) startAgent() {
	h := &w.host
	if h.ref != nil {
		return
	}
	cfg := w.opt.Referee
	cfg.Guests = h.names
	h.ref = partner.NewReferee(cfg, time.Now())
	h.life++
	w.log("the agent starts")
	for _, g := range h.names {
		if p := w.procs[g]; p != nil {
			h.ref.Step(partner.Message{Kind: partner.KindStarted, Guest: g, Inc: p.inc})
		}
	}
	for _, g := range h.names {
		if p := w.procs[g]; p != nil && p.reaped {
			h.ref.Step(partner.Message{Kind: partner.KindReaped, Guest: g, Inc: p.inc, Reason: "died while there was no agent"})
		}
	}
	for _, g := range h.names {
		if p := w.procs[g]; p != nil && !p.dead.Load() {
			p.line.connect()
		}
	}
	h.tick(h.life)
}

// killAgent ends the agent; what was on the lines to it is lost.
func (w *World) killAgent() {
	if w.host.ref == nil {
		return
	}
	w.log("the agent dies")
	w.host.ref = nil
	for _, g := range w.host.names {
		if p := w.procs[g]; p != nil {
			p.line.cut(w.rng.IntN(len(p.line.guest) + 1))
		}
	}
}

func (h *host) tick(life int) {
	if h.ref == nil || h.life != life {
		return
	}
	h.ref.Tick(time.Now())
	h.carryOut()
	h.w.after(tick, nil, "", func() { h.tick(life) })
}

func (h *host) step(m partner.Message) {
	if h.ref != nil {
		h.ref.Tick(time.Now())
		h.ref.Step(m)
		h.carryOut()
	}
}

func (h *host) carryOut() {
	w := h.w
	for h.ref != nil {
		acts := h.ref.Ready()
		if len(acts) == 0 {
			return
		}
		for _, a := range acts {
			if a.Do != partner.DoSend {
				w.log("host> %s", a)
			}
			switch a.Do {
			case partner.DoSend:
				if p := w.procs[a.To]; p != nil {
					p.line.toGuest(a.Message)
				}
			case partner.DoStart:
				s := h.nextStart(a.Guest)
				if s.fails && w.procs[a.Guest] != nil { // steps name guests that there have been
					h.ref.Step(partner.Message{Kind: partner.KindNoStart, Guest: a.Guest, Reason: "no process can be made"})
					continue
				}
				w.spawn(a.Guest)
				p := w.procs[a.Guest]
				p.killIn = s.dies
				h.ref.Step(partner.Message{Kind: partner.KindStarted, Guest: a.Guest, Inc: p.inc, Known: true})
				life := h.life
				w.after(s.slow+w.between(time.Millisecond, 30*time.Millisecond), nil, "", func() {
					if h.life == life && h.ref != nil && !p.dead.Load() {
						p.line.connect()
					}
				})
			case partner.DoKill:
				if p := w.procs[a.Guest]; p != nil && p.inc == a.Inc {
					w.kill(p, "is fenced")
				}
			case partner.DoNote:
				w.justify(a)
			case partner.DoDone:
				h.done[a.Cmd] = a.Text
			}
		}
	}
}

// justify holds a fence for silence against the silence that there was.
func (w *World) justify(a partner.Action) {
	p := w.procs[a.Guest]
	if a.Key != "fence" || !strings.Contains(a.Text, "no heartbeat") || p == nil {
		return
	}
	hang := w.opt.Machine.HangTimeout
	for _, watcher := range w.procs {
		if watcher != p {
			hang -= min(watcher.jumped, hang/2) // its clock says that more time has passed
		}
	}
	for _, t := range p.tenants {
		if time.Since(t.beaten) >= hang-5*tick || time.Since(t.wasSilent) <= hang/2 {
			return
		}
	}
	w.violate("%s#%d is to be fenced (%s), and its hearts beat", p.name, p.inc, a.Text)
}

func (h *host) reaped(p *proc, why string) {
	h.step(partner.Message{Kind: partner.KindReaped, Guest: p.name, Inc: p.inc, Reason: why})
}

// move asks for a takeover or giveback, as a person does.
func (h *host) move(id, to, why string) uint64 {
	h.cmd++
	h.step(partner.Message{Kind: partner.KindMove, Identity: id, To: to, Cmd: h.cmd, Reason: why, Planned: true})
	return h.cmd
}

// line is what agent and one run of a guest talk over: two streams that keep
// their order. What was sent when it breaks is lost, or read to its end.
type line struct {
	p      *proc
	up     bool
	eof    bool // the guest has yet to read that the line ended
	host   []partner.Message
	guest  []partner.Message
	slow   bool
	repeat int // so many of the next messages with a term come once more, later
}

func (l *line) latency() time.Duration {
	if l.slow || l.p.w.chance(50) {
		return l.p.w.between(0, 300*time.Millisecond)
	}
	return l.p.w.between(10*time.Microsecond, 200*time.Microsecond)
}

// connect opens the line; the guest reads an old one to its end first.
func (l *line) connect() {
	if l.up {
		return
	}
	l.up = true
	l.send(&l.guest, partner.Message{Kind: partner.KindAgentBack}, l.deliverGuest)
}

// cut breaks the line. The guest will read what was sent up to keep messages.
func (l *line) cut(keep int) {
	l.host = nil
	if !l.up {
		return
	}
	l.up, l.eof = false, true
	l.guest = slices.DeleteFunc(l.guest[:keep], func(m partner.Message) bool { return m.Kind == partner.KindAgentBack })
	l.p.w.after(l.latency(), l.p, "", l.deliverGuest)
}

func (l *line) send(q *[]partner.Message, m partner.Message, deliver func()) {
	*q = append(*q, m)
	l.p.w.after(l.latency(), l.p, "", deliver)
}

// again lets a message come once more, some time later. A hello does not: it is
// the first on its line, and so is the truth.
func (l *line) again(m partner.Message, deliver func(partner.Message)) {
	if l.repeat > 0 && m.Term > 0 && m.Kind != partner.KindHello {
		l.repeat--
		w := l.p.w
		w.after(w.between(0, time.Second), nil, "", func() {
			if !l.p.dead.Load() && !l.p.hung {
				w.log("once more: %s", m)
				deliver(m)
			}
		})
	}
}

func (l *line) toHost(m partner.Message) {
	if !l.up {
		return
	}
	// What was sent is on its way even if the guest hangs or dies now.
	l.host = append(l.host, m)
	l.p.w.after(l.latency(), nil, "", l.deliverHost)
	l.again(m, l.p.w.host.step)
	l.p.w.count(l.p, "sends "+m.String())
}

func (l *line) toGuest(m partner.Message) {
	if l.up && !l.p.dead.Load() {
		l.send(&l.guest, m, l.deliverGuest)
		l.again(m, l.p.input)
	}
}

func (l *line) deliverGuest() {
	p := l.p
	if l.eof && (len(l.guest) == 0 || l.guest[0].Kind == partner.KindAgentBack) {
		l.eof = false
		p.input(partner.Message{Kind: partner.KindAgentLost})
		if len(l.guest) > 0 {
			p.w.after(l.latency(), p, "", l.deliverGuest)
		}
		return
	}
	if len(l.guest) == 0 {
		return
	}
	m := l.guest[0]
	l.guest = l.guest[1:]
	if m.Kind == partner.KindAgentBack && !l.up {
		return // that line is gone again
	}
	p.w.count(p, "reads "+m.String())
	if !p.dead.Load() {
		p.input(m)
	}
}

func (l *line) deliverHost() {
	if len(l.host) == 0 || l.p.w.host.ref == nil || l.p.reaped {
		return
	}
	m := l.host[0]
	l.host = l.host[1:]
	l.p.w.host.step(m)
}

// breaks breaks the line while both ends live, and mends it.
func (l *line) breaks() {
	w := l.p.w
	if !l.up || w.host.ref == nil {
		return
	}
	w.log("the line to %s breaks", l.p.name)
	l.cut(w.rng.IntN(len(l.guest) + 1))
	w.host.step(partner.Message{Kind: partner.KindLinkDown, Guest: l.p.name, Inc: l.p.inc})
	life := w.host.life
	w.after(w.between(0, 50*time.Millisecond), nil, "", func() {
		if w.host.life == life && w.host.ref != nil && !l.p.dead.Load() {
			l.connect()
		}
	})
}
