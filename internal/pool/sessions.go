package pool

import (
	"errors"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/region"
	"github.com/pollux-storage/pollux/internal/session"
)

// The table of sessions lies in a section of the pool's region, which there is from the first
// session on: pools whose clients send no requests again have none. The section is advisory. A
// table that is lost costs the requests whose server died with them: those of virtual machines end
// with an error, those of rings are run again.

// SessionMemory is how much of its region the table of sessions of a pool takes at most.
const SessionMemory = session.Size

// adoptSessions takes over the table that a guest before has left. It comes before the log is
// replayed.
func (op *opener) adoptSessions() {
	p := op.Pool
	p.sessions = session.New(p.provideSessions)
	adopted := false
	for _, s := range p.region.Sections(region.SectionSessions) {
		if !adopted {
			mem, err := p.region.MapSection(s)
			if err == nil {
				err = p.sessions.Adopt(mem, op.sb.Pool, func(id block.VolumeID) bool {
					_, ok := p.catalogue.Get(id)
					return ok
				})
			}
			if adopted = err == nil; adopted {
				continue
			}
			if !errors.Is(err, session.ErrNone) {
				p.tell(TellKept, "sessions of pool %s are lost, and nobody knows whether requests of their clients that were under way were done: %v", p.label.Name, err)
			}
		}
		_ = p.region.RemoveSection(s) // or the next owner does
	}
	if n := p.sessions.Stats().Damaged; n > 0 {
		p.tell(TellKept, "%d sessions of pool %s are damaged and lost, and nobody knows whether requests of their clients that were under way were done", n, p.label.Name)
	}
}

// provideSessions gives the table memory that outlives this guest.
func (p *Pool) provideSessions() ([]byte, block.PoolID, block.Epoch, error) {
	_, mem, err := p.region.AddSection(region.SectionSessions, session.Size)
	p.countKept()
	return mem, p.label.Pool, p.epoch, err
}

// Sessions tells of clients that send requests again.
func (p *Pool) Sessions() session.Stats { return p.sessions.Stats() }

// lookSessions says what is damaged in the table of the region that nobody has open.
func (v *View) lookSessions() []error {
	if v.region == nil {
		return nil
	}
	in, err := region.Inspect(v.region.Path())
	if err != nil {
		return []error{err}
	}
	var bad []error
	for _, s := range in.Header().Sections {
		if s.Kind != region.SectionSessions {
			continue
		}
		mem := make([]byte, s.Length)
		_, damaged, err := session.Look(mem[:in.Read(s, mem)])
		if bad = append(bad, damaged...); err != nil {
			bad = append(bad, err)
		}
	}
	_ = in.Close() // it was only looked at
	return bad
}
