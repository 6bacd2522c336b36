package process

import (
	"fmt"
	"os"
	"strconv"
	"sync"

	"github.com/pollux-storage/pollux/internal/domain"
)

// spare is a process that waits for its number.
type spare struct {
	d *Driver
	p *proc

	mu      sync.Mutex // guards what follows
	release *os.File   // nil when it was used
}

// Prepare begins a process that waits for its number. It is recorded nowhere until
// it has one: it reads the end of the file when the agent dies, and ends.
func (d *Driver) Prepare(s domain.Spec) (domain.Spare, error) {
	p, release, err := d.begin(s)
	if err != nil {
		return nil, err
	}
	return &spare{d: d, p: p, release: release}, nil
}

func (s *spare) Ended() <-chan struct{} { return s.p.ended }

func (s *spare) take() *os.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.release
	s.release = nil
	return r
}

// Start records the process and tells it its number.
func (s *spare) Start(inc uint64) (domain.Domain, error) {
	release := s.take()
	if release == nil {
		return nil, fmt.Errorf("start guest %s: its spare process was used", s.p.name)
	}
	defer release.Close()
	s.d.makeLastWords(s.p.name, inc)
	err := s.d.name(s.p, inc)
	if err == nil {
		if _, err = release.WriteString(strconv.FormatUint(inc, 10) + "\n"); err != nil {
			err = fmt.Errorf("start guest %s: its spare process has ended: %w", s.p.name, err)
		}
	}
	if err != nil {
		_ = s.p.Kill() // it may have ended
		<-s.p.ended
		return nil, err
	}
	return s.p, nil
}

// Discard ends the process by the end of its input, or by force when it does not
// read.
func (s *spare) Discard() {
	release := s.take()
	if release == nil {
		return
	}
	_ = release.Close()
	_ = s.p.Kill() // it may have ended
	<-s.p.ended
}
