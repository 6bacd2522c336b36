package host

import (
	"os"
	"path/filepath"
	"time"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/domain"
	"github.com/pollux-storage/pollux/internal/guest"
	"github.com/pollux-storage/pollux/internal/partner"
)

// A guest that fails is started again while its clients wait, and to load a program
// takes longer than to open a small pool. So each guest has a spare process, which is
// made while nothing else goes on. It listens for its line under another name, which
// is renamed when the process becomes the guest's.

// spareEvery is how often the agent looks whether a spare is missing. It makes one at
// a time.
const spareEvery = time.Second

// spare is a guest's next process.
type spare struct {
	domain.Spare
	link    string // where its line is for now
	program string // that it was started from
}

func (s *spare) discard() {
	s.Discard()
	removeFile(s.link)
}

func sparePath(c *config.Config, name string) string {
	return filepath.Join(c.RunDir(), "spare-"+name)
}

// prepareSpare makes a spare where one is missing, if the pair is at rest: what is
// under way shall have the processors. The loop calls it.
func (a *agent) prepareSpare() {
	if a.noSpares {
		return
	}
	for _, name := range a.names() {
		s, t := a.ref.Seat(name), a.ref.Title(name)
		if !s.Alive || !s.Linked || t.Phase != partner.PhaseServing || t.To != "" {
			return
		}
	}
	for _, name := range a.names() {
		m := a.members[name]
		if m.spare != nil && isClosed(m.spare.Ended()) {
			a.log.Warn("a spare process has ended", "guest", name)
			m.spare.discard()
			m.spare = nil
		}
		if m.spare != nil {
			continue
		}
		var err error
		if m.spare, err = a.makeSpare(name); err != nil {
			a.noSpares = true // guests start without, and more slowly
			a.log.Warn("no spare processes are made", "guest", name, "error", err)
		}
		return
	}
}

func (a *agent) makeSpare(name string) (*spare, error) {
	cfg := a.settings()
	link := sparePath(cfg, name)
	spec, err := a.spec(name, link, guest.SpareArgs(cfg.Dir, name))
	if err != nil {
		return nil, err
	}
	defer spec.Files[0].Close()
	s, err := a.opt.Driver.Prepare(spec)
	if err != nil {
		removeFile(link)
		return nil, err
	}
	return &spare{s, link, spec.Program}, nil
}

// startSpare makes a guest's spare its next run, or returns nil when there is none
// that can be.
func (a *agent) startSpare(m *member, inc uint64) domain.Domain {
	s := m.spare
	if m.spare = nil; s == nil {
		return nil
	}
	if s.program != a.programOf(m.name) { // it was made before an upgrade came to the guest
		s.discard()
		return nil
	}
	err := os.Rename(s.link, linkPath(a.settings(), m.name))
	if err == nil {
		var d domain.Domain
		if d, err = s.Start(inc); err == nil {
			return d
		}
	}
	a.log.Warn("a spare process is of no use", "guest", m.name, "error", err)
	s.discard()
	return nil
}

// dropSpares ends all spares. The loop calls it.
func (a *agent) dropSpares() {
	for _, m := range a.members {
		if m.spare != nil {
			m.spare.discard()
			m.spare = nil
		}
	}
}
