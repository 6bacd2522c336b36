package host

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/partner"
)

// statusLimit is how long a guest may take to say how it is.
const statusLimit = 500 * time.Millisecond

// snapshot is what the loop knows at one moment.
type snapshot struct {
	seats  map[string]partner.SeatView
	titles map[string]partner.TitleView
	alerts map[string]string
	spares map[string]bool
}

func (a *agent) snapshot(ctx context.Context) (snapshot, error) {
	var s snapshot
	if err := a.ask(ctx, func() { s = a.look() }); err != nil {
		return snapshot{}, err // the loop may be about to write the other
	}
	return s, nil
}

// look is snapshot for the loop itself.
func (a *agent) look() snapshot {
	s := snapshot{seats: map[string]partner.SeatView{}, titles: map[string]partner.TitleView{}, spares: map[string]bool{}, alerts: a.ref.Alerts()}
	for _, g := range a.names() {
		s.seats[g], s.titles[g] = a.ref.Seat(g), a.ref.Title(g)
		s.spares[g] = a.members[g] != nil && a.members[g].spare != nil
	}
	return s
}

// askAll puts a question to all guests that are on the line, at once.
func askAll[R any](ctx context.Context, a *agent, s snapshot, f func(context.Context, *control.Client) (R, error)) (map[string]R, map[string]error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	out, errs := map[string]R{}, map[string]error{}
	for name, seat := range s.seats {
		if !seat.Alive || !seat.Linked {
			continue
		}
		wg.Go(func() {
			r, err := f(ctx, a.client(name))
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs[name] = err
			} else {
				out[name] = r
			}
		})
	}
	wg.Wait()
	return out, errs
}

func (a *agent) status(ctx context.Context) (control.Status, error) {
	st, _, err := a.observe(ctx)
	return st, err
}

// observe returns the status and what of it the loop knew.
func (a *agent) observe(ctx context.Context) (control.Status, snapshot, error) {
	s, err := a.snapshot(ctx)
	if err != nil {
		return control.Status{}, s, err
	}
	qctx, cancel := context.WithTimeout(ctx, statusLimit)
	defer cancel()
	reports, silent := askAll(qctx, a, s, func(ctx context.Context, c *control.Client) (control.Status, error) { return c.Status(ctx) })
	if len(silent) > 0 {
		// It may have died between the snapshot and the question.
		if s, err = a.snapshot(ctx); err != nil {
			return control.Status{}, s, err
		}
	}

	cfg := a.settings()
	st := control.Status{
		Agent: control.AgentStatus{
			Running: true, PID: os.Getpid(), Version: a.opt.Version, Dir: cfg.Dir, Socket: control.AgentSocket(cfg.Dir),
			Started: a.started.UTC(), Uptime: control.Duration(time.Since(a.started)),
		},
		Protected: true, Alerts: []string{},
	}
	a.keepTold(reports)
	exports := map[string][]control.Export{}
	for _, g := range cfg.Guests {
		gs := a.guestStatus(&g, s, reports)
		for _, e := range gs.Exports {
			exports[e.Guest] = append(exports[e.Guest], e)
		}
		for name := range silent {
			if gs.Protected && s.seats[name].Alive {
				gs.Protected, gs.Why = false, "guest "+name+" does not answer"
			}
		}
		st.Protected = st.Protected && gs.Protected
		st.Guests = append(st.Guests, gs)
	}
	for i := range st.Guests {
		// An export belongs to the identity that clients know.
		g := &st.Guests[i]
		_, answered := reports[g.ServedBy]
		g.Exports = a.lastExports(g.Name, exports[g.Name], answered)
	}
	a.giveGivebacks(&st)
	st.Alerts = append(st.Alerts, a.alertsOf(s, st.Guests)...)
	a.giveBuilds(&st)
	if a.medium.Note != "" {
		st.Notes = append(st.Notes, a.medium.Note)
	}
	a.mu.Lock()
	st.LastTakeover = a.last
	a.mu.Unlock()
	return st, s, nil
}

// guestStatus is what the agent and the guest together know of a guest.
func (a *agent) guestStatus(g *config.Guest, s snapshot, reports map[string]control.Status) control.GuestStatus {
	gs := control.GuestStatus{Name: g.Name, Serves: []string{}, Pools: []string{}, Exports: []control.Export{}}
	seat := s.seats[g.Name]
	if r, ok := reports[g.Name]; ok && len(r.Guests) == 1 {
		gs = r.Guests[0]
	} else {
		switch {
		case seat.Stopped:
			gs.State = control.StateStopped
		case !seat.Alive && seat.Inc > 0:
			gs.State = control.StateFailed
		case !seat.Alive || !seat.Linked:
			gs.State = control.StateStarting
		default:
			gs.State = control.StateHung
		}
	}
	gs.Address, gs.Socket = g.Endpoint(), g.Socket
	a.mu.Lock()
	m := a.members[g.Name]
	gs.Spare = s.spares[g.Name]
	gs.Restarts, gs.Policy, gs.Resumed, gs.ResumedLate = max(0, m.starts-1), g.Policy, m.resumed, m.late
	if m.dom != nil && seat.Alive {
		gs.PID, gs.Uptime = m.dom.PID(), control.Duration(time.Since(m.dom.Started()))
	}
	a.mu.Unlock()
	for i := range gs.Region {
		gs.Region[i].HugePages, gs.Region[i].Note = a.medium.HugePages, a.medium.Note
	}
	gs.Serves, gs.ServedBy = []string{}, ""
	for _, id := range a.names() {
		if t := s.titles[id]; t.Holder == g.Name && t.Phase == partner.PhaseServing {
			gs.Serves = append(gs.Serves, id)
		}
	}
	if t := s.titles[g.Name]; t.Phase == partner.PhaseServing {
		gs.ServedBy = t.Holder
	}
	gs.Protected, gs.Why = a.protection(g.Name, s)
	return gs
}

// lastExports returns the exports of an identity: the given ones if its holder
// answered, and otherwise, as in the middle of a takeover, those known before.
// Their addresses work again as soon as somebody serves them.
func (a *agent) lastExports(id string, now []control.Export, answered bool) []control.Export {
	a.mu.Lock()
	defer a.mu.Unlock()
	if answered {
		a.exports[id] = now
		return append([]control.Export{}, now...)
	}
	out := append([]control.Export{}, a.exports[id]...)
	for i := range out {
		out[i].ServedBy, out[i].Connections = "", 0
		if m := out[i].VhostUser; m != nil {
			known := *m
			known.Clients = 0
			out[i].VhostUser = &known
		}
		if m := out[i].Ring; m != nil {
			known := *m
			known.Clients = 0
			out[i].Ring = &known
		}
	}
	return out
}

// protection tells whether the identity would be served on if the guest that
// serves it died now.
func (a *agent) protection(id string, s snapshot) (bool, string) {
	t := s.titles[id]
	if t.Phase != partner.PhaseServing {
		return false, id + " is not served"
	}
	other := a.settings().Partner(t.Holder)
	seat := s.seats[other]
	switch {
	case other == "":
		return false, "it is alone: there is no second guest"
	case s.titles[id].Suspect:
		return false, "whoever served " + id + " died: guest " + other + " does not take it over for now"
	case !seat.Alive:
		return false, "guest " + other + " is down"
	case !seat.Linked:
		return false, "guest " + other + " is starting"
	case a.settings().Guest(id).Pool.Manual && !s.seats[t.Holder].Guarded:
		return true, "" // nothing to lose before there is a pool
	case !s.seats[t.Holder].Guarded:
		return false, fmt.Sprintf("guest %s has not mapped the region of %s yet", other, t.Holder)
	}
	return true, ""
}

// giveGivebacks moves what a survivor knows about the coming giveback to the
// guest that will get it.
func (a *agent) giveGivebacks(st *control.Status) {
	var in map[string]control.Duration = map[string]control.Duration{}
	locked := map[string]bool{}
	for _, g := range st.Guests {
		p := a.settings().Partner(g.Name)
		in[p], locked[p] = g.GivebackIn, g.LockedOut
	}
	for i := range st.Guests {
		g := &st.Guests[i]
		g.GivebackIn, g.LockedOut = in[g.Name], locked[g.Name]
	}
}

// alertsOf are those of the agent, and redundancy that is lost.
func (a *agent) alertsOf(s snapshot, guests []control.GuestStatus) []string {
	var out []string
	var keys []string
	for k := range s.alerts {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		out = append(out, s.alerts[k])
	}
	for _, g := range guests {
		if g.ServedBy == "" && g.State != control.StateStarting {
			out = append(out, "nobody serves "+g.Name)
		}
		if !g.Protected {
			out = append(out, fmt.Sprintf("redundancy is lost: %s is not protected: %s", g.Name, g.Why))
		}
		if g.State == control.StateHung {
			out = append(out, fmt.Sprintf("guest %s does not answer", g.Name))
		}
	}
	return out
}
