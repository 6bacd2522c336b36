package host

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
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

// answerLimit is how long a living guest may take to answer a new agent.
const answerLimit = 2 * time.Second

func linkPath(c *config.Config, name string) string {
	return filepath.Join(c.RunDir(), "guest-"+name+".link")
}

// prepare finds the guests that run, opens or recovers the sockets, makes the
// medium for regions, and the referee. It returns the lines to the guests that
// answered.
func (a *agent) prepare() (map[string]*net.UnixConn, error) {
	found, alive, err := a.find()
	if err != nil {
		return nil, err
	}
	if alive {
		// What runs goes by the settings it was started with.
		if eff, err := config.ReadEffective(a.cfg.Dir); err == nil {
			a.cfg = eff
		} else {
			a.log.Warn("settings of the running guests", "error", err)
		}
	}
	for _, g := range a.cfg.Guests {
		a.members[g.Name] = &member{name: g.Name, client: control.NewSocketClient(control.GuestSocket(a.cfg.Dir, g.Name))}
	}
	conns, err := a.recoverSockets(found)
	if err != nil {
		return nil, err
	}
	if a.sockets == nil {
		if err := a.openSockets(); err != nil {
			return nil, err
		}
	}
	if a.medium, err = region.Dir(a.base); err != nil {
		return nil, err
	}
	// Too little memory is for the guests to complain of.
	plan, _ := guest.PlanMemory(a.cfg)
	a.medium = a.medium.MakeRoom(plan.Regions())
	a.cfg.RegionDir = a.medium.Path
	if err := a.makeFiles(); err != nil {
		return nil, err
	}
	if err := a.cfg.WriteEffective(); err != nil {
		return nil, err
	}
	a.last = readLast(a.cfg.Dir)
	if err := a.prepareBuilds(alive); err != nil {
		return nil, err
	}
	a.ref = partner.NewReferee(refereeConfig(a.cfg), time.Now())
	a.adopt(found)
	return conns, nil
}

// find returns the recorded domains of all guests.
func (a *agent) find() (found map[string]domain.Domain, alive bool, err error) {
	found = map[string]domain.Domain{}
	for _, g := range a.cfg.Guests {
		d, err := a.opt.Driver.Find(g.Name)
		if err != nil {
			return nil, false, err
		}
		if d != nil {
			found[g.Name] = d
			alive = alive || !hasEnded(d)
		}
	}
	return found, alive, nil
}

func hasEnded(d domain.Domain) bool { return isClosed(d.Ended()) }

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// recoverSockets gets the listening sockets from a guest that lives. Guests
// that live and do not answer, with nobody else to have the sockets from, are
// killed: without sockets no guest can be started.
func (a *agent) recoverSockets(found map[string]domain.Domain) (map[string]*net.UnixConn, error) {
	conns := map[string]*net.UnixConn{}
	for name, d := range found {
		if hasEnded(d) {
			continue
		}
		c, files, err := a.call(name)
		if err != nil {
			a.log.Warn("a running guest does not answer", "guest", name, "error", err)
			continue
		}
		conns[name] = c
		if a.sockets != nil {
			for _, f := range files {
				_ = f.Close()
			}
			continue
		}
		if a.sockets, err = identity.FromFiles(a.names(), files); err != nil {
			return conns, fmt.Errorf("sockets from guest %s: %w", name, err)
		}
	}
	if a.sockets != nil {
		return conns, nil
	}
	for name, d := range found {
		if !hasEnded(d) {
			a.event(name, "fence", nil, "guest %s (process %d) runs, does not answer and is killed", name, d.PID())
			if err := d.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
				return conns, err
			}
			<-d.Ended()
		}
	}
	return conns, nil
}

func (a *agent) names() []string {
	var out []string
	for _, g := range a.settings().Guests {
		out = append(out, g.Name)
	}
	return out
}

// call connects to a guest and takes the descriptors that it sends first.
func (a *agent) call(name string) (*net.UnixConn, []*os.File, error) {
	c, err := net.DialTimeout("unix", linkPath(a.settings(), name), answerLimit)
	if err != nil {
		return nil, nil, err
	}
	u := c.(*net.UnixConn)
	_ = u.SetReadDeadline(time.Now().Add(answerLimit))
	files, err := identity.Receive(u)
	if err != nil {
		_ = u.Close()
		return nil, nil, err
	}
	_ = u.SetReadDeadline(time.Time{})
	return u, files, nil
}

// spareEnd is how long spares of an agent that was killed may take to end. They have the
// sockets until then.
const spareEnd = 5 * time.Second

// listen opens the sockets of one guest.
func (a *agent) listen(g *config.Guest, setting string) (*identity.Sockets, error) {
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		s, err := identity.Listen(g.Name, g.Endpoint(), g.Socket, setting)
		if !errors.Is(err, unix.EADDRINUSE) || time.Since(began) > spareEnd || !a.hadSpares() {
			return s, err
		}
	}
}

// hadSpares tells whether an agent before has left spares, of which there are links.
func (a *agent) hadSpares() bool {
	for _, name := range a.names() {
		if _, err := os.Lstat(sparePath(a.cfg, name)); err == nil {
			return true
		}
	}
	return false
}

// openSockets opens the listening sockets, and remembers ports that were
// chosen.
func (a *agent) openSockets() error {
	st, err := config.ReadState(a.cfg.Dir)
	if err != nil {
		return err
	}
	chosen := false
	for i := range a.cfg.Guests {
		g := &a.cfg.Guests[i]
		s, err := a.listen(g, fmt.Sprintf("guests[%d]", i))
		if err != nil {
			return err
		}
		a.sockets = append(a.sockets, s)
		if *g.Port != 0 {
			continue
		}
		port, err := s.Port()
		if err != nil {
			return err
		}
		g.Port = &port
		gs := st.Guests[g.Name]
		gs.Port = port
		st.Guests[g.Name], chosen = gs, true
	}
	if !chosen {
		return nil
	}
	return st.Write(a.cfg.Dir)
}

// makeFiles makes the device files of pools that are yet to be created. A file
// that belongs to a pool which was seen before is never replaced by an empty
// one.
func (a *agent) makeFiles() error {
	for _, g := range a.cfg.Guests {
		if !g.Pool.Create {
			continue
		}
		for _, path := range g.Pool.Devices {
			if _, err := makeFile(path, int64(g.Pool.Size)); err != nil {
				return fmt.Errorf("device of pool %s: %w", g.Pool.Name, err)
			}
		}
	}
	return nil
}

// makeFile makes a sparse file unless something is there.
func makeFile(path string, size int64) (made bool, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		_ = os.Remove(path)
		return false, err
	}
	return true, nil
}

// adopt tells the referee about the domains that an earlier agent started:
// first of all that were, then of those that have ended, so that it knows at
// the first end whether there is a partner.
func (a *agent) adopt(found map[string]domain.Domain) {
	for _, name := range a.names() {
		if d := found[name]; d != nil {
			m := a.members[name]
			m.dom, m.inc, m.starts = d, d.Inc(), 1
			a.ref.Step(partner.Message{Kind: partner.KindStarted, Guest: name, Inc: m.inc})
		}
	}
	for _, name := range a.names() {
		d := found[name]
		if d == nil {
			continue
		}
		if hasEnded(d) {
			a.ref.Step(partner.Message{Kind: partner.KindReaped, Guest: name, Inc: d.Inc(), Reason: d.Reason()})
			a.report(d)
			continue
		}
		a.event(name, "guest-found", nil, "guest %s runs (process %d)", name, d.PID())
	}
}

// start begins a guest's process. The loop calls it.
func (a *agent) start(m *member) {
	d, err := a.startDomain(m)
	if err != nil {
		m.noStart = err.Error()
		a.event(m.name, "start-failed", nil, "guest %s cannot be started: %v", m.name, err)
		a.ref.Step(partner.Message{Kind: partner.KindNoStart, Guest: m.name, Reason: err.Error()})
		return
	}
	m.noStart, m.end = "", ""
	a.mu.Lock()
	m.dom, m.inc = d, d.Inc()
	m.starts++
	a.mu.Unlock()
	a.event(m.name, "guest-started", nil, "guest %s is started (process %d, number %d)", m.name, d.PID(), d.Inc())
	a.ref.Step(partner.Message{Kind: partner.KindStarted, Guest: m.name, Inc: d.Inc(), Known: true})
	a.attend(m, nil)
}

func (a *agent) startDomain(m *member) (domain.Domain, error) {
	inc := m.inc + 1
	if d := a.startSpare(m, inc); d != nil {
		return d, nil
	}
	cfg := a.settings()
	spec, err := a.spec(m.name, linkPath(cfg, m.name), guest.Args(cfg.Dir, m.name, inc))
	if err != nil {
		return nil, err
	}
	defer spec.Files[0].Close()
	spec.Inc = inc
	return a.opt.Driver.Start(spec)
}

// spec describes a process of a guest. The first of its files, the listener of its
// line, is the caller's to close.
func (a *agent) spec(name, link string, args []string) (domain.Spec, error) {
	ln, err := identity.ListenUnix(link, 0o600)
	if err != nil {
		return domain.Spec{}, err
	}
	defer ln.Close()
	line, err := identity.File(ln)
	if err != nil {
		return domain.Spec{}, err
	}
	return domain.Spec{
		Name:    name,
		Program: a.programOf(name),
		Args:    append(append([]string{}, a.opt.Command...), args...),
		Files:   append([]*os.File{line}, identity.Files(a.sockets)...),
	}, nil
}

// attend watches a living domain and keeps the line to its guest. A line that
// exists already is given as c.
func (a *agent) attend(m *member, c *net.UnixConn) {
	d := m.dom
	go func() { // not waited for: the domain may outlive the agent
		<-d.Ended()
		a.post(func() { a.reaped(m, d) })
	}()
	a.wg.Go(func() { a.keepLine(m, d, c) })
}

func (a *agent) reaped(m *member, d domain.Domain) {
	if m.dom != d {
		return
	}
	a.event(m.name, "guest-ended", nil, "guest %s ended (process %d): %s", m.name, d.PID(), d.Reason())
	m.end = d.Reason()
	a.ref.Step(partner.Message{Kind: partner.KindReaped, Guest: m.name, Inc: d.Inc(), Reason: d.Reason()})
	a.report(d)
}

// brokenLine is how long a guest may take to end after its line has. Only then the
// line is taken up again, which would meet the next run's listener otherwise.
const brokenLine = 100 * time.Millisecond

// keepLine talks to one run of a guest until it ends. While its end and the
// agent's are not known, a broken line is taken up again.
func (a *agent) keepLine(m *member, d domain.Domain, c *net.UnixConn) {
	for {
		if c == nil {
			var files []*os.File
			var err error
			if c, files, err = a.call(m.name); err != nil {
				select {
				case <-d.Ended():
					return
				case <-a.ended:
					return
				case <-time.After(100 * time.Millisecond):
				}
				continue
			}
			for _, f := range files {
				_ = f.Close()
			}
		}
		if hasEnded(d) {
			_ = c.Close() // it is to the run that came after, whose own line waits for it
			return
		}
		l := guest.NewLine(c)
		c = nil
		a.post(func() {
			if m.dom == d {
				m.line = l
			}
		})
		err := l.Read(func(msg partner.Message) {
			a.post(func() {
				if m.dom == d && m.line == l {
					msg.From = m.name
					a.heard(m, msg)
				}
			})
		})
		if err != nil {
			a.log.Warn("line to a guest broke", "guest", m.name, "error", err)
		}
		l.Close()
		a.post(func() {
			if m.dom == d && m.line == l {
				m.line = nil
				a.ref.Step(partner.Message{Kind: partner.KindLinkDown, Guest: m.name, Inc: d.Inc()})
			}
		})
		select {
		case <-d.Ended():
			return
		case <-a.ended:
			return
		case <-time.After(brokenLine):
		}
	}
}

// heard takes a message of a guest, for people first, then for the referee.
func (a *agent) heard(m *member, msg partner.Message) {
	switch msg.Kind {
	case partner.KindReleased:
		a.left[msg.Identity] = msg.Steps
		a.event(m.name, "released", nil, "guest %s has released %s: %s", m.name, msg.Identity, msg.Reason)
	case partner.KindServing:
		a.serving(m, msg)
	case partner.KindRegion:
		if msg.Region.Path != "" {
			a.poolSeen(msg.Identity)
		}
	}
	a.ref.Step(msg)
}
