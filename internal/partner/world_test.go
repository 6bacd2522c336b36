package partner

import (
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"
)

// world is a pair and its agent made of nothing but the machines: lines that
// deliver when told to, processes that act until they are reaped, and a clock.
// Scenarios and random runs share it.
type world struct {
	now   time.Time
	ref   *Referee
	rcfg  RefereeConfig
	mcfg  Config
	procs map[string]*proc // the latest process of each guest
	incs  map[string]uint64
	// acting are the processes that may touch an identity's devices.
	acting map[string][]*proc
	trace  []string
	quiet  bool            // leave out sends
	broken map[string]bool // "g id": opening fails
	slow   map[string]bool // guests whose jobs wait for a `finish`
	noExec map[string]bool
	mute   map[string]bool // guests whose messages to the agent do not arrive yet
	failed error
}

// proc is a guest's process.
type proc struct {
	name    string
	inc     uint64
	m       *Machine
	alive   bool // executes instructions
	reaped  bool
	hung    bool
	line    bool
	toHost  []Message
	toGuest []Message
	eof     bool // the agent's end of the line is gone, to be read after toGuest
	jobs    []Action
	beats   map[string]uint64
	mapped  map[string]*proc
	acts    map[string]bool
	closed  map[string]bool // identities whose pools were closed: they have no heartbeat
}

var epoch0 = time.Unix(1000, 0)

func newWorld() *world {
	w := &world{now: epoch0, procs: map[string]*proc{}, incs: map[string]uint64{}, acting: map[string][]*proc{},
		broken: map[string]bool{}, slow: map[string]bool{}, noExec: map[string]bool{}, mute: map[string]bool{}}
	w.rcfg = RefereeConfig{Guests: []string{"a", "b"}, RestartDelay: 500 * time.Millisecond, RestartMax: 30 * time.Second,
		CrashLimit: 5, CrashWindow: 5 * time.Minute, RestartLimit: 500 * time.Millisecond, ProvenAfter: -1}
	w.mcfg = Config{HangTimeout: time.Second, GivebackDelay: 15 * time.Second, LockoutCount: 2, LockoutWindow: 10 * time.Minute}
	return w
}

func (w *world) log(format string, args ...any) {
	w.trace = append(w.trace, fmt.Sprintf("%6s %s", w.now.Sub(epoch0).Round(time.Millisecond), fmt.Sprintf(format, args...)))
}

// startAgent begins a referee, which learns of processes as from a state file.
func (w *world) startAgent() {
	w.ref = NewReferee(w.rcfg, w.now)
	for _, g := range w.rcfg.Guests {
		if p := w.procs[g]; p != nil {
			w.ref.Step(Message{Kind: KindStarted, Guest: g, Inc: p.inc})
		}
	}
	for _, g := range w.rcfg.Guests {
		if p := w.procs[g]; p != nil && p.reaped {
			w.ref.Step(Message{Kind: KindReaped, Guest: g, Inc: p.inc, Reason: "died while there was no agent"})
		}
	}
	for _, g := range w.rcfg.Guests {
		if p := w.procs[g]; p != nil && p.alive {
			w.connect(p)
		}
	}
	w.ref.Tick(w.now)
	w.drainRef()
}

func (w *world) killAgent() {
	w.ref = nil
	for _, p := range w.procs {
		w.cut(p, len(p.toGuest))
	}
}

// cut breaks the line of a process. It will read what was sent up to keep
// messages and then find the end.
func (w *world) cut(p *proc, keep int) {
	p.toHost = nil
	if !p.line {
		return
	}
	p.line, p.eof = false, true
	p.toGuest = slices.DeleteFunc(p.toGuest[:keep], func(m Message) bool { return m.Kind == KindAgentBack })
}

// connect opens the line of a process. A guest reads an old line to its end
// first, which pump does.
func (w *world) connect(p *proc) {
	p.line = true
	p.toGuest = append(p.toGuest, Message{Kind: KindAgentBack})
}

func (w *world) spawn(g string) {
	if w.noExec[g] {
		w.ref.Step(Message{Kind: KindNoStart, Guest: g, Reason: "no such program"})
		return
	}
	w.incs[g]++
	cfg := w.mcfg
	cfg.Self, cfg.Inc = g, w.incs[g]
	cfg.Partner = w.other(g)
	p := &proc{name: g, inc: w.incs[g], alive: true, beats: map[string]uint64{}, mapped: map[string]*proc{}, acts: map[string]bool{}, closed: map[string]bool{}}
	p.m = New(cfg, w.now)
	w.procs[g] = p
	w.ref.Step(Message{Kind: KindStarted, Guest: g, Inc: p.inc, Known: true})
	w.connect(p)
}

func (w *world) other(g string) string {
	for _, o := range w.rcfg.Guests {
		if o != g {
			return o
		}
	}
	return ""
}

// die stops a process; it may still act until it is reaped.
func (w *world) die(p *proc) {
	p.alive, p.line, p.toGuest, p.jobs = false, false, nil, nil
}

func (w *world) reap(p *proc, reason string) {
	p.reaped = true
	for id := range p.acts {
		w.stopActing(p, id)
	}
	p.toHost = nil
	if w.ref != nil {
		w.ref.Step(Message{Kind: KindReaped, Guest: p.name, Inc: p.inc, Reason: reason})
		w.drainRef()
	}
}

func (w *world) act(p *proc, id string) {
	p.acts[id] = true
	w.acting[id] = append(w.acting[id], p)
	if len(w.acting[id]) > 1 && w.failed == nil {
		w.failed = fmt.Errorf("%s#%d and %s#%d both act on %s", w.acting[id][0].name, w.acting[id][0].inc, p.name, p.inc, id)
	}
}

func (w *world) stopActing(p *proc, id string) {
	delete(p.acts, id)
	delete(p.closed, id)
	var rest []*proc
	for _, q := range w.acting[id] {
		if q != p {
			rest = append(rest, q)
		}
	}
	w.acting[id] = rest
}

// setPool closes the pool of an identity that is served, or opens one again.
func (w *world) setPool(p *proc, id string, open bool) {
	if !p.alive || p.hung || !p.acts[id] || p.m.Phase(id) != PhaseServing || p.closed[id] != open {
		return
	}
	p.closed[id] = !open
	m := Message{Kind: KindClosing, Identity: id, Term: p.m.ids[id].term}
	if open {
		m.Kind, m.Region = KindOpened, Region{Path: "region-" + id}
	}
	w.log("%s: pool of %s is open: %v", p.name, id, open)
	p.m.Step(m)
	w.drain(p)
}

func (w *world) drainRef() {
	for w.ref != nil {
		acts := w.ref.Ready()
		if len(acts) == 0 {
			return
		}
		for _, a := range acts {
			if a.Do != DoSend || !w.quiet {
				w.log("host> %s", a)
			}
			switch a.Do {
			case DoSend:
				if p := w.procs[a.To]; p != nil && p.alive && p.line {
					p.toGuest = append(p.toGuest, a.Message)
				}
			case DoStart:
				w.spawn(a.Guest)
			case DoKill:
				if p := w.procs[a.Guest]; p.inc == a.Inc && p.alive {
					w.die(p)
				}
			}
		}
	}
}

func (w *world) drain(p *proc) {
	for p.alive {
		acts := p.m.Ready()
		if len(acts) == 0 {
			return
		}
		for _, a := range acts {
			if a.Do != DoSend || !w.quiet {
				w.log("%s> %s", p.name, a)
			}
			switch a.Do {
			case DoSend:
				if p.line {
					p.toHost = append(p.toHost, a.Message)
				}
			case DoOpen:
				w.act(p, a.Identity)
				p.jobs = append(p.jobs, a)
			case DoMap, DoServe, DoRelease:
				p.jobs = append(p.jobs, a)
			case DoUnmap:
				delete(p.mapped, a.Identity)
			case DoStop:
				w.die(p)
			}
		}
	}
}

// finish completes the i-th job of a process.
func (w *world) finish(p *proc, i int) {
	a := p.jobs[i]
	p.jobs = append(p.jobs[:i:i], p.jobs[i+1:]...)
	m := Message{Identity: a.Identity, Term: a.Term}
	switch a.Do {
	case DoMap:
		m.Kind = KindMapDone
		for _, q := range w.procs {
			if q != p {
				p.mapped[a.Identity] = q
				m.Beat = q.beats[a.Identity]
			}
		}
	case DoOpen:
		m.Kind = KindOpened
		m.Region = Region{Path: "region-" + a.Identity}
		if w.broken[p.name+" "+a.Identity] {
			m.Kind, m.Reason = KindOpenFailed, "a device is missing"
			w.stopActing(p, a.Identity)
		}
	case DoServe:
		m.Kind = KindServeDone
	case DoRelease:
		m.Kind = KindReleaseDone
		w.stopActing(p, a.Identity)
	}
	p.m.Step(m)
	w.drain(p)
}

// pump delivers one message to or from a process and tells whether it did.
func (w *world) deliverGuest(p *proc) bool {
	if !p.alive || p.hung {
		return false
	}
	if p.eof && (len(p.toGuest) == 0 || p.toGuest[0].Kind == KindAgentBack) {
		p.eof = false
		p.m.Step(Message{Kind: KindAgentLost})
		w.drain(p)
		return true
	}
	if len(p.toGuest) == 0 {
		return false
	}
	m := p.toGuest[0]
	p.toGuest = p.toGuest[1:]
	if m.Kind == KindAgentBack && !p.line {
		return true // that line is gone again
	}
	p.m.Step(m)
	w.drain(p)
	return true
}

func (w *world) deliverHost(p *proc) bool {
	if len(p.toHost) == 0 || w.ref == nil || p.reaped || w.mute[p.name] {
		return false
	}
	m := p.toHost[0]
	p.toHost = p.toHost[1:]
	w.ref.Step(m)
	w.drainRef()
	return true
}

func (w *world) names() []string {
	var n []string
	for g := range w.procs {
		n = append(n, g)
	}
	sort.Strings(n)
	return n
}

// settle lets everything happen that can without time.
func (w *world) settle() {
	for again := true; again; {
		again = false
		for _, g := range w.names() {
			p := w.procs[g]
			if !p.alive && !p.reaped {
				w.log("%s#%d is reaped", p.name, p.inc)
				w.reap(p, "killed")
				again = true
			}
			again = w.deliverHost(p) || again
			again = w.deliverGuest(p) || again
			if p.alive && !p.hung && len(p.jobs) > 0 && !w.slow[g] {
				w.finish(p, 0)
				again = true
			}
		}
	}
}

// tick passes time to all that are awake.
func (w *world) tick(d time.Duration) {
	w.now = w.now.Add(d)
	if w.ref != nil {
		w.ref.Tick(w.now)
		w.drainRef()
	}
	for _, g := range w.names() {
		p := w.procs[g]
		if !p.alive || p.hung {
			continue
		}
		for id := range p.acts {
			if !p.closed[id] {
				p.beats[id]++
			}
		}
		w.observe(p)
	}
}

// observe lets a process read its partner's heartbeats and the clock.
func (w *world) observe(p *proc) {
	for _, id := range sortedKeys(p.mapped) {
		p.m.Step(Message{Kind: KindBeat, Identity: id, Beat: p.mapped[id].beats[id]})
	}
	p.m.Tick(w.now)
	w.drain(p)
}

func sortedKeys[V any](m map[string]V) []string {
	var k []string
	for n := range m {
		k = append(k, n)
	}
	sort.Strings(k)
	return k
}

// pass lets d go by in steps, with everything settled after each.
func (w *world) pass(d, step time.Duration) {
	for ; d > 0; d -= step {
		w.tick(min(step, d))
		w.settle()
	}
}

// show describes who does what.
func (w *world) show() string {
	var b strings.Builder
	if w.ref == nil {
		b.WriteString("agent: gone\n")
	}
	for _, g := range w.rcfg.Guests {
		p := w.procs[g]
		switch {
		case p == nil:
			fmt.Fprintf(&b, "%s: never started\n", g)
			continue
		case p.reaped:
			fmt.Fprintf(&b, "%s#%d: ended\n", g, p.inc)
			continue
		}
		fmt.Fprintf(&b, "%s#%d:", g, p.inc)
		if p.hung {
			b.WriteString(" hung,")
		}
		holds := p.m.Holds()
		if len(holds) == 0 {
			b.WriteString(" waits")
		}
		for _, h := range holds {
			fmt.Fprintf(&b, " %s=%s", h.Identity, h.Phase)
		}
		v := p.m.View()
		if w.ref != nil && !p.hung && len(holds) > 0 && w.ref.Seat(g).Guarded {
			b.WriteString(", protected")
		}
		if v.GivebackIn > 0 {
			fmt.Fprintf(&b, ", gives back in %s", v.GivebackIn.Round(time.Millisecond))
		}
		b.WriteString("\n")
		for _, k := range sortedKeys(v.Alerts) {
			fmt.Fprintf(&b, "  alert %s: %s\n", k, v.Alerts[k])
		}
	}
	if w.ref != nil {
		al := w.ref.Alerts()
		for _, k := range sortedKeys(al) {
			fmt.Fprintf(&b, "host alert %s: %s\n", k, al[k])
		}
	}
	return b.String()
}
