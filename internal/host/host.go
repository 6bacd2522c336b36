// Package host is the agent: the part of Pollux that starts the guests,
// watches them, fences them and tells people how they are.
//
// One loop owns the referee (package partner) and everything it decides
// about. Starting and killing happens in the loop, for both take little time;
// what waits (the end of a process, a line to a guest, a command) has a
// goroutine of its own that posts to the loop. Commands ask guests over their
// control sockets, outside the loop.
//
// When the agent ends without being told `down`, the guests go on serving.
// The next agent finds their processes by the driver's records, gets the
// listening sockets from one of them, and learns over the lines what each
// holds before it grants anything.
//
// Locks: agent.mu guards settings and members for control requests; it is
// taken by the loop for changes and never held while waiting. eventLog.mu is
// a leaf.
package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/domain"
	"github.com/pollux-storage/pollux/internal/guest"
	"github.com/pollux-storage/pollux/internal/identity"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/region"
)

// Options are what an agent is made from.
type Options struct {
	Driver  domain.Driver
	Version string
	Logger  *slog.Logger
	// Command is put in front of a guest's arguments.
	Command []string
	// Program is the file that this process was started from. Copies of it are kept
	// and guests are started from them; if it is empty, guests are started with the
	// driver's program, and there are no upgrades.
	Program string
	// Failed says why a Successor that was to take this agent's place did not.
	Failed string
}

// agent is the running agent.
type agent struct {
	opt     Options
	log     *slog.Logger
	events  *eventLog
	started time.Time
	base    string // where the regions' memory was asked for
	medium  region.Medium
	sockets []*identity.Sockets
	inputs  chan func()
	wg      sync.WaitGroup
	ended   chan struct{} // closed when the loop has ended
	stop    context.CancelFunc

	// Owned by the loop.
	ref      *partner.Referee
	waiting  map[uint64]chan string // commands, by number
	nextCmd  uint64
	noSpares bool                       // the guests are to end, or none can be made
	grants   map[string]partner.Message // the newest, by identity
	left     map[string][]partner.Step  // steps of the newest release, by identity

	downOnce sync.Once
	downErr  error
	change   sync.Mutex // one change of volumes or pools at a time

	mu      sync.Mutex // guards what follows
	cfg     *config.Config
	members map[string]*member
	last    *control.Takeover
	exports map[string][]control.Export // as last heard, by identity
	builds  builds
	// successor is what the agent ends with.
	successor *Successor
}

// member is a guest as the agent knows it.
type member struct {
	name   string
	inc    uint64 // the highest that was used
	dom    domain.Domain
	line   *guest.Line // of the loop
	spare  *spare      // of the loop; nil when there is none
	client *control.Client
	starts int
	// resumed and late count restarts that came before a takeover: which served
	// again, and which were not in time.
	resumed, late int
	// noStart says why its newest start failed, while it has not succeeded; of the loop.
	noStart string
	end     string // why its newest run ended, while none has begun since; of the loop
	// told is what it said of itself last, with the run that said it.
	told *told
}

// told is a status as a run of a guest told it.
type told struct {
	pid    int
	status control.GuestStatus
}

// RunWith is the life of the agent. It returns nil after `down` and after ctx
// has ended, which leaves the guests as they are; so does a *Successor, which says
// with which program the agent shall go on.
func RunWith(ctx context.Context, cfg *config.Config, o Options) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	for _, d := range []string{cfg.Dir, cfg.RunDir(), cfg.LogDir()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return fmt.Errorf("directory of the pair: %w", err)
		}
	}
	lock, err := lockAgent(cfg)
	if err != nil {
		return err
	}
	defer lock.Close()
	a := &agent{
		opt: o, log: o.Logger, started: time.Now(), base: cfg.RegionDir, cfg: cfg, stop: stop,
		inputs: make(chan func(), 256), ended: make(chan struct{}),
		waiting: map[uint64]chan string{}, grants: map[string]partner.Message{}, left: map[string][]partner.Step{}, members: map[string]*member{},
		exports: map[string][]control.Export{},
	}
	if a.events, err = openEvents(filepath.Join(cfg.Dir, "events.log"), int64(cfg.EventFile)); err != nil {
		return err
	}
	defer a.events.close()
	conns, err := a.prepare()
	if err != nil {
		return errors.Join(err, a.closeSockets())
	}
	ln, err := identity.ListenUnix(control.AgentSocket(cfg.Dir), 0o600)
	if err != nil {
		return errors.Join(err, a.closeSockets())
	}
	endMetrics, err := a.serveMetrics()
	if err != nil {
		return errors.Join(err, ln.Close(), a.closeSockets())
	}
	srv := control.Serve(ln, a.handlers())
	a.event("", "agent-started", nil, "the agent runs (process %d)", os.Getpid())
	for name, m := range a.members {
		// One that did not answer, too: it may yet, and its end must be known.
		if m.dom != nil && !hasEnded(m.dom) {
			a.attend(m, conns[name])
		}
	}
	watch, endWatch := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watching.Go(func() { a.watchAlerts(watch) })
	a.loop(ctx)
	endWatch()
	watching.Wait()
	a.leave()
	endMetrics()
	grace, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_ = srv.Close(grace) // a request that is still under way is cut
	_ = os.Remove(control.AgentSocket(cfg.Dir))
	err = a.closeSockets()
	if a.successor != nil {
		return errors.Join(a.successor, err)
	}
	return err
}

// lockAgent makes sure that one agent runs in a directory.
func lockAgent(cfg *config.Config) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(cfg.RunDir(), "agent.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock of the agent: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, control.NewError(control.KindRefused, "an agent runs in "+cfg.Dir+" already", "see `pollux status`")
	}
	return f, nil
}

func (a *agent) closeSockets() error {
	for _, s := range a.sockets {
		s.Close()
	}
	a.sockets = nil
	return nil
}

// event records what happened.
func (a *agent) event(guest, kind string, fields map[string]string, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	a.log.Info(text, "event", kind, "guest", guest)
	if err := a.events.add(control.Event{Time: time.Now().UTC(), Guest: guest, Kind: kind, Message: text, Fields: fields}); err != nil {
		a.log.Error("event log", "error", err)
	}
}

func (a *agent) settings() *config.Config {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cfg
}

// refereeConfig are the referee's rules by the settings.
func refereeConfig(c *config.Config) partner.RefereeConfig {
	r := partner.RefereeConfig{
		RestartDelay: c.Failover.RestartDelay, RestartMax: c.Failover.RestartMax,
		CrashLimit: c.Failover.CrashLimit, CrashWindow: c.Failover.CrashWindow,
		RestartLimit: c.Failover.RestartLimit,
	}
	for _, g := range c.Guests {
		r.Guests = append(r.Guests, g.Name)
		if g.Policy == config.RestartFirst {
			r.RestartFirst = append(r.RestartFirst, g.Name)
		}
	}
	return r
}

// post hands f to the loop; after its end f is dropped.
func (a *agent) post(f func()) {
	select {
	case a.inputs <- f:
	case <-a.ended:
	}
}

// ask runs f in the loop and waits for it.
func (a *agent) ask(ctx context.Context, f func()) error {
	done := make(chan struct{})
	a.post(func() { f(); close(done) })
	select {
	case <-done:
		return nil
	case <-a.ended:
		return control.NewError(control.KindNotRunning, "the agent is ending", "")
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (a *agent) loop(ctx context.Context) {
	defer close(a.ended)
	t := time.NewTimer(0)
	defer t.Stop()
	tidy := time.NewTicker(time.Minute)
	defer tidy.Stop()
	spares := time.NewTicker(spareEvery)
	defer spares.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case f := <-a.inputs:
			a.ref.Tick(time.Now())
			f()
		case <-t.C:
			a.ref.Tick(time.Now())
		case <-spares.C:
			a.prepareSpare()
		case <-tidy.C:
			for _, m := range a.members {
				if err := a.opt.Driver.Tidy(m.name); err != nil {
					a.log.Warn("tidy", "error", err)
				}
			}
		}
		a.carryOut()
		t.Reset(max(time.Millisecond, time.Until(a.ref.Next())))
	}
}

// carryOut does what the referee wants.
func (a *agent) carryOut() {
	for acts := a.ref.Ready(); len(acts) > 0; acts = a.ref.Ready() {
		for _, act := range acts {
			a.act(act)
		}
	}
}

func (a *agent) act(x partner.Action) {
	switch x.Do {
	case partner.DoSend:
		if x.Message.Kind == partner.KindGrant {
			a.grants[x.Message.Identity] = x.Message
		}
		if m := a.members[x.To]; m != nil && m.line != nil {
			m.line.Send(x.Message)
		}
	case partner.DoStart:
		a.start(a.members[x.Guest])
	case partner.DoKill:
		if m := a.members[x.Guest]; m.dom != nil && m.dom.Inc() == x.Inc {
			if err := m.dom.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
				a.event(x.Guest, "alert", nil, "guest %s (process %d) cannot be killed, and its partner may take nothing over until it has ended: %v", x.Guest, m.dom.PID(), err)
				return
			}
			a.event(x.Guest, "fence", nil, "guest %s (process %d) is killed", x.Guest, m.dom.PID())
		}
	case partner.DoDone:
		if ch := a.waiting[x.Cmd]; ch != nil {
			ch <- x.Text
			delete(a.waiting, x.Cmd)
		}
	case partner.DoRaise:
		a.event("", "alert", map[string]string{"key": x.Key}, "%s", x.Text)
	case partner.DoClear:
		a.event("", "alert-over", map[string]string{"key": x.Key}, "no more: %s", x.Key)
	case partner.DoNote:
		if x.Key == partner.NoteLate {
			a.mu.Lock()
			a.members[x.Guest].late++
			a.mu.Unlock()
		}
		a.event(x.Guest, x.Key, nil, "%s", x.Text)
	}
}

// leave ends what belongs to this agent and nothing of the guests.
func (a *agent) leave() {
	a.dropSpares()
	for _, m := range a.members {
		if m.line != nil {
			m.line.Close()
		}
		m.client.Close()
	}
	done := make(chan struct{})
	go func() { a.wg.Wait(); close(done) }()
	for {
		select {
		case <-a.inputs: // lines report their end
		case <-done:
			return
		}
	}
}

// removeSockets removes the sockets in a directory, and the directory if it is empty then.
func removeSockets(dir string) {
	names, _ := os.ReadDir(dir)
	for _, n := range names {
		if n.Type()&fs.ModeSocket != 0 {
			removeFile(filepath.Join(dir, n.Name()))
		}
	}
	_ = os.Remove(dir)
}

func removeFile(path string) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		slog.Warn("remove", "error", err)
	}
}
