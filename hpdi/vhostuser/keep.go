package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
)

// Between two attempts to connect.
const (
	firstPause = time.Millisecond
	mostPause  = 20 * time.Millisecond
	// givenUpPause is for when nobody waits any more.
	givenUpPause = 500 * time.Millisecond
	// leastTry is how long an attempt may take at least that was begun before the time
	// for all of them was over.
	leastTry = time.Second
)

// keep makes a connection again whenever one has ended, until the device is closed or
// there is none to come.
func (d *device) keep(l *link) {
	for l != nil {
		<-l.gone
		d.down(l)
		l.close(nil)
		if d.ctx.Err() != nil {
			return
		}
		l = d.again(l.err())
	}
}

// down is for when a connection has ended.
func (d *device) down(l *link) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.link == l {
		d.link = nil
	}
	for _, v := range d.rings {
		v.mu.Lock()
		v.downLocked(d.inflight != nil)
		v.mu.Unlock()
	}
}

// again makes a connection for one that has ended because of why. It returns nil when the
// device ends.
func (d *device) again(why error) *link {
	begun, pause, given := time.Now(), firstPause, false
	for {
		if fatal := d.fatal.Load(); fatal != nil {
			d.kill(*fatal)
			return nil
		}
		if d.o.Reconnect == 0 {
			d.kill(fmt.Errorf("%s: %w", d.path, why))
			return nil
		}
		l, err := d.try(given, begun.Add(d.o.Reconnect))
		if err == nil {
			return l
		}
		if d.ctx.Err() != nil {
			return nil
		}
		if !given && time.Since(begun) >= d.o.Reconnect {
			given = true
			d.kill(fmt.Errorf("%s: %w for %v: %w", d.path, hpdi.ErrDisconnected, d.o.Reconnect, errors.Join(err, why)))
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-d.ctx.Done():
			timer.Stop()
			return nil
		}
		if pause = min(2*pause, mostPause); given {
			pause = givenUpPause
		}
	}
}

// try is one attempt. While requests wait, it ends with the time that they have.
func (d *device) try(given bool, until time.Time) (*link, error) {
	if given {
		return d.connect(d.ctx)
	}
	most := max(time.Until(until), leastTry)
	ctx, cancel := context.WithTimeoutCause(d.ctx, most, fmt.Errorf("the back-end has not brought the device up in the %v that were left: %w", most, os.ErrDeadlineExceeded))
	defer cancel()
	return d.connect(ctx)
}

// kill ends all requests, and those that come, until there is a connection again.
func (d *device) kill(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.forgetLocked()
	for _, v := range d.rings {
		v.mu.Lock()
		v.killLocked(err)
		v.mu.Unlock()
	}
}
