package guest

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// How mirrors are looked after: marks are cleared every tidyEvery, and copies are
// made equal resilverStep tracks of 1 MiB at a time, at a rate that leaves clients
// most of the devices.
const (
	tidyEvery    = 2 * time.Second
	resilverStep = 4
)

// kept is what keepMirror needs of a mirror.
type kept interface {
	Tidy() error
	Resync(tracks int) (done bool, err error)
}

// keepMirror looks after a mirror until ctx ends. Copies are filled with rate bytes
// a second at most.
func keepMirror(ctx context.Context, m kept, rate int64, log *slog.Logger) {
	next, tidy := time.Now(), time.Now()
	var said string // the newest error, which is told once
	for ctx.Err() == nil {
		done, err := m.Resync(resilverStep)
		if time.Since(tidy) >= tidyEvery {
			if e := m.Tidy(); err == nil {
				err = e
			}
			tidy = time.Now()
		}
		switch {
		case err == nil:
			said = ""
		case err.Error() != said:
			said = err.Error()
			log.Error("mirror", "error", err)
		}
		wait := tidyEvery
		if !done && err == nil {
			next = next.Add(resilverStep * block.TrackBytes * time.Second / time.Duration(rate))
			if wait = time.Until(next); wait < 0 {
				next = time.Now() // time that devices lost is not made up for
			}
		} else {
			next = time.Now().Add(wait)
		}
		select {
		case <-ctx.Done():
		case <-time.After(max(wait, 0)):
		}
	}
}

// describeMirror adds the copies of a mirror, and what is wrong with them.
func describeMirror(s *control.GuestStatus, pool string, m *mirror.Mirror) {
	number := 1
	for _, d := range s.Devices {
		if d.Pool == pool {
			number = d.Mirror + 1
		}
	}
	st := m.Status()
	for n, c := range st.Copies {
		d := describeDevice(pool, c.Info, ", if all copies have")
		d.Mirror, d.State, d.Repaired = number, c.State.String(), c.Repaired
		d.ReadErrors, d.WriteErrors = c.ReadErrors, c.WriteErrors
		if c.State == mirror.Resilvering {
			d.Resilver = st.OldBytes
		}
		s.Devices = append(s.Devices, d)
		name := fmt.Sprintf("copy %d of mirror %d of pool %s", n+1, number, pool)
		if c.Info.Name != "" {
			name += " on " + c.Info.Name
		}
		switch c.State {
		case mirror.Absent:
			s.Alerts = append(s.Alerts, name+" is absent: what the other copies lose now is lost")
		case mirror.Resilvering:
			s.Alerts = append(s.Alerts, name+" is being resilvered")
		}
		if c.ReadErrors+c.WriteErrors > 0 {
			s.Alerts = append(s.Alerts, name+" has returned errors since the pool was opened; what it lacked was written again")
		}
	}
}
