package guest

import (
	"context"
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// changeCopy takes one of several copies out or back, or puts another device in
// its place. It is resilvered in the background.
func (g *Guest) changeCopy(ctx context.Context, name string, c control.CopyChange) (control.Pool, error) {
	t, _, err := g.serving(name)
	if err != nil {
		return control.Pool{}, err
	}
	m, i, err := t.copyAt(c.Place, &g.settings(t.identity).Pool)
	if err != nil {
		return control.Pool{}, err
	}
	switch c.Action {
	case control.CopyOffline:
		err = m.Detach(i)
	case control.CopyOnline:
		err = g.attach(c.Device, m.Attach)
	case control.CopyReplace:
		err = g.attach(c.New, func(d hpdi.Device) error {
			if err := blank(d); err != nil {
				_ = d.Close() // nothing was written through it
				return err
			}
			return m.Replace(i, d)
		})
	default:
		err = control.NewError(control.KindInvalid, fmt.Sprintf("a copy cannot be made %q", c.Action), "")
	}
	if err != nil {
		return control.Pool{}, fmt.Errorf("%s device %s of pool %s: %w", c.Action, c.Device, name, err)
	}
	return g.poolOf(ctx, t.identity)
}

// copyAt returns the mirror and the copy that the pool's device at a place is.
func (t *tenancy) copyAt(place int, set *config.Pool) (*mirror.Mirror, int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	ms := mirrors(t.devices)
	for _, group := range set.Groups() {
		if len(group) > 1 && len(ms) > 0 {
			if place >= 0 && place < len(group) {
				return ms[0], place, nil
			}
			ms = ms[1:]
		}
		place -= len(group)
	}
	return nil, 0, control.NewError(control.KindInvalid, "it is no copy of a mirror: the pool needs it", "")
}

// attach opens a device and hands it to fn, which closes it after an error.
func (g *Guest) attach(path string, fn func(hpdi.Device) error) error {
	// Its last I/O may be under way if it was taken out just now.
	d, err := g.openOne(path, time.Now().Add(reopenLimit), nil)
	if err != nil {
		return err
	}
	return fn(d)
}

// reopenLimit bounds the wait for the lock of a device that was in use.
const reopenLimit = 5 * time.Second
