package guest

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/identity"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/region"
)

// tick is how often the machine looks at the partner's heartbeats.
const tick = 20 * time.Millisecond

// Options are what a guest is made from.
type Options struct {
	Config  *config.Config
	Name    string
	Inc     uint64
	Sockets []*identity.Sockets // of all identities; the guest owns them
	Line    *net.UnixListener   // where the agent connects; the guest owns it
	Storage Storage
	Plan    Plan // of its memory
	Logger  *slog.Logger
	// Stuck is called, if set, when the guest does nothing any more, with the reason. It
	// ends the guest's process.
	Stuck func(reason string)
	// Stalled is called, if set, when the guest is about to be fenced because a heartbeat
	// stands still, with the reason; and with an empty one when it beats again.
	Stalled func(reason string)
}

// Guest is one storage operating system.
type Guest struct {
	opt     Options
	cfg     *config.Config
	log     *slog.Logger
	started time.Time
	inputs  chan func()  // run by the loop
	awake   atomic.Int64 // when the loop last turned, Unix nanoseconds
	stop    context.CancelFunc
	wg      sync.WaitGroup
	under   underway // of the devices that are open

	// Owned by the loop.
	m       *partner.Machine
	line    *Line                     // to the agent, nil when there is none
	watches map[string]*region.Region // the partner's, by identity
	noticed map[string]time.Time      // causes of grants, by identity
	fatal   error                     // why the guest must end without more ado
	ending  bool                      // the agent's questions are answered, no more

	mu      sync.Mutex // guards what follows
	tenants map[string]*tenancy
	closing bool // no tenancy may begin any more
	last    *control.Takeover
}

// Run is the life of a guest. It returns nil when the agent told it to stop,
// or ctx ended, and its pools were closed cleanly.
func Run(ctx context.Context, o Options) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	g := &Guest{
		opt: o, cfg: o.Config, log: o.Logger, started: time.Now(), stop: stop,
		inputs: make(chan func(), 256), watches: map[string]*region.Region{},
		noticed: map[string]time.Time{}, tenants: map[string]*tenancy{},
	}
	f := o.Config.Failover
	g.m = partner.New(partner.Config{
		Self: o.Name, Partner: o.Config.Partner(o.Name), Inc: o.Inc,
		HangTimeout: f.HangTimeout, GivebackDelay: f.GivebackDelay,
		LockoutCount: f.LockoutCount, LockoutWindow: f.LockoutWindow,
	}, time.Now())
	ln, err := identity.ListenUnix(control.GuestSocket(o.Config.Dir, o.Name), 0o600)
	if err != nil {
		return err
	}
	srv := control.Serve(ln, g.handlers())
	g.wg.Go(g.acceptLines)
	g.loop(ctx)
	if g.fatal != nil {
		return g.fatal
	}
	err = g.closeWhileAnswering()
	_ = o.Line.Close()
	if g.line != nil {
		g.line.Close()
	}
	grace, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = srv.Close(grace) // requests that still run are cut
	g.drainInputs()
	for _, s := range o.Sockets {
		s.Close()
	}
	for _, w := range g.watches {
		_ = w.Close()
	}
	return err
}

// closeWhileAnswering ends the guest's pools. A large pool takes its time for the
// last fold, and the agent would fence a guest that is silent meanwhile.
func (g *Guest) closeWhileAnswering() error {
	g.ending = true
	done := make(chan error, 1)
	go func() { done <- g.closeAll() }()
	for {
		select {
		case err := <-done:
			return err
		case f := <-g.inputs:
			f()
			g.awake.Store(time.Now().UnixNano())
			g.carryOut()
		}
	}
}

// drainInputs lets goroutines that still post end.
func (g *Guest) drainInputs() {
	done := make(chan struct{})
	go func() { g.wg.Wait(); close(done) }()
	for {
		select {
		case <-g.inputs:
		case <-done:
			return
		}
	}
}

// post hands f to the loop.
func (g *Guest) post(f func()) { g.inputs <- f }

// step hands a message to the machine.
func (g *Guest) step(m partner.Message) { g.post(func() { g.input(m) }) }

func (g *Guest) loop(ctx context.Context) {
	t := time.NewTicker(tick)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case f := <-g.inputs:
			f()
		case <-t.C:
			g.advance()
		}
		g.awake.Store(time.Now().UnixNano())
		g.carryOut()
	}
}

// input gives the machine a message, at its time.
func (g *Guest) input(m partner.Message) {
	if g.ending {
		if m.Kind == partner.KindPing {
			g.m.Step(m)
		}
		return
	}
	g.advance()
	switch m.Kind {
	case partner.KindGrant:
		g.noticed[m.Identity] = time.Unix(0, m.Since)
		g.log.Info("granted", "identity", m.Identity, "term", m.Term, "basis", m.Basis, "reason", m.Reason)
	case partner.KindRelease:
		g.log.Info("asked to release", "identity", m.Identity, "reason", m.Reason)
	case partner.KindEnded, partner.KindFenced, partner.KindRefused:
		g.log.Info("partner "+string(m.Kind), "partner", m.Guest, "incarnation", m.Inc, "reason", m.Reason)
	}
	g.m.Step(m)
}

// advance tells the machine the partner's heartbeats, then the time.
func (g *Guest) advance() {
	for id, r := range g.watches {
		g.m.Step(partner.Message{Kind: partner.KindBeat, Identity: id, Beat: r.Heartbeat()})
	}
	g.m.Tick(time.Now())
}

// carryOut does what the machine wants.
func (g *Guest) carryOut() {
	for acts := g.m.Ready(); len(acts) > 0; acts = g.m.Ready() {
		for _, a := range acts {
			g.act(a)
		}
	}
}

func (g *Guest) act(a partner.Action) {
	switch a.Do {
	case partner.DoSend:
		if g.line != nil {
			g.line.Send(a.Message)
		}
	case partner.DoMap:
		g.mapRegion(a)
	case partner.DoUnmap:
		if r := g.watches[a.Identity]; r != nil {
			_ = r.Close() // a mapping that cannot be undone costs address space only
			delete(g.watches, a.Identity)
		}
	case partner.DoOpen:
		since := g.noticed[a.Identity]
		g.wg.Go(func() { g.open(a, since) })
	case partner.DoServe:
		g.serve(a)
	case partner.DoRelease:
		g.wg.Go(func() { g.release(a) })
	case partner.DoStop:
		g.log.Info("told to stop")
		g.stop()
	case partner.DoRaise:
		g.log.Warn("alert", "key", a.Key, "text", a.Text)
	case partner.DoClear:
		g.log.Info("alert is over", "key", a.Key)
	case partner.DoNote:
		g.log.Info(a.Text, "kind", a.Key)
	}
}

// mapRegion maps a region of the partner, read-only: until the partner is
// fenced, only its heartbeat and its header are looked at.
func (g *Guest) mapRegion(a partner.Action) {
	done := partner.Message{Kind: partner.KindMapDone, Identity: a.Identity, Term: a.Term}
	r, err := region.Open(a.Region.Path, true)
	if err == nil && r.Header().Pool != a.Region.Pool {
		err = errors.Join(errors.New("it is of another pool"), r.Close())
	}
	if err != nil {
		done.Reason = err.Error()
	} else {
		g.watches[a.Identity] = r
		done.Beat = r.Heartbeat()
	}
	g.m.Step(done)
}

// acceptLines serves one agent after the other. A line is read to its end
// before the next is answered, so that nothing old is believed after hello.
func (g *Guest) acceptLines() {
	for {
		c, err := g.opt.Line.AcceptUnix()
		if err != nil {
			return // closed: the guest ends
		}
		if err := identity.Send(c, identity.Files(g.opt.Sockets)); err != nil {
			g.log.Warn("agent lost at once", "error", err)
			_ = c.Close()
			continue
		}
		l := NewLine(c)
		g.post(func() {
			g.line = l
			g.input(partner.Message{Kind: partner.KindAgentBack})
		})
		if err := l.Read(g.step); err != nil {
			g.log.Warn("line to the agent broke", "error", err)
		}
		l.Close()
		g.post(func() {
			g.line = nil
			g.input(partner.Message{Kind: partner.KindAgentLost})
		})
	}
}
