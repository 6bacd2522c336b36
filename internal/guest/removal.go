package guest

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/mirror"
	"github.com/pollux-storage/pollux/internal/pool"
)

// removeDevice begins to take a device, or a mirror, out of a pool, or cancels that.
func (g *Guest) removeDevice(ctx context.Context, name string, c control.PoolRemove) (control.Pool, error) {
	t, st, err := g.serving(name)
	if err != nil {
		return control.Pool{}, err
	}
	if c.Cancel {
		if err := st.CancelRemoval(ctx); err != nil {
			return control.Pool{}, err
		}
		return g.poolOf(ctx, t.identity)
	}
	devs := t.disks()
	i := slices.IndexFunc(devs, func(d hpdi.Device) bool { return isOneOf(d, c.Paths) })
	if i < 0 {
		return control.Pool{}, control.NewError(control.KindNotFound, fmt.Sprintf("%s is no device of pool %s", c.Device, name), fmt.Sprintf("see `pollux pool show %s`", name))
	}
	if err := st.RemoveDevice(ctx, devs[i].Info().Name); err != nil {
		return control.Pool{}, err
	}
	return g.poolOf(ctx, t.identity)
}

// pathsOn returns the path of a device, or those of the copies of a mirror that are
// there.
func pathsOn(d hpdi.Device) []string {
	m, ok := d.(*mirror.Mirror)
	if !ok {
		return []string{d.Info().Name}
	}
	var paths []string
	for _, c := range m.Status().Copies {
		if c.Info.Name != "" {
			paths = append(paths, c.Info.Name)
		}
	}
	return paths
}

// isOneOf reports whether a device has one of the paths, or is a mirror with a copy
// that has.
func isOneOf(d hpdi.Device, paths []string) bool {
	return slices.ContainsFunc(pathsOn(d), func(path string) bool { return slices.Contains(paths, path) })
}

// removed closes a device that is no part of a pool any more, after whatever looks at
// it has ended. It does not wait for that.
func (g *Guest) removed(t *tenancy, d hpdi.Device) {
	t.mu.Lock()
	t.devices = slices.DeleteFunc(slices.Clone(t.devices), func(x hpdi.Device) bool { return x == d })
	t.removed = append(t.removed[:len(t.removed):len(t.removed)], pathsOn(d)...)
	k := t.keepers[d]
	delete(t.keepers, d)
	t.mu.Unlock()
	t.wg.Go(func() {
		if k != nil {
			k.cancel()
			k.wg.Wait()
		}
		if err := g.discard(d); err != nil {
			g.log.Warn("a device that was removed is not blank", "device", d.Info().Name, "error", err)
		}
	})
}

// discard closes a device without a label, and takes from the copies of a mirror what
// makes them one.
func (g *Guest) discard(d hpdi.Device) error {
	if m, ok := d.(*mirror.Mirror); ok {
		if err := m.Erase(); err != nil {
			_ = d.Close()
			return err
		}
	}
	return d.Close()
}

// withoutRemoved leaves out the devices whose removal was begun and has come so far
// that they have no label any more.
func withoutRemoved(set *config.Pool, devs []hpdi.Device, removed func(hpdi.Device)) ([]hpdi.Device, error) {
	if len(set.Removing) == 0 {
		return devs, nil
	}
	var kept []hpdi.Device
	for i, d := range devs {
		if isOneOf(d, set.Removing) {
			switch _, err := pool.ReadLabel(d); {
			case err != nil && !pool.Wiped(err):
				closeAll(append(kept, devs[i:]...))
				return nil, err
			case err != nil:
				removed(d) // if the pool needs it, it will say that it is missing
				continue
			}
		}
		kept = append(kept, d)
	}
	return kept, nil
}

func removalStatus(r pool.RemovalStats) *control.RemovalStatus {
	if r.Device == "" {
		return nil
	}
	return &control.RemovalStatus{Device: r.Device, State: r.State, Stuck: r.Stuck, Total: r.Total, Left: r.Left}
}

// noteRemoval adds to devices that one of them is being removed.
func noteRemoval(s []control.DeviceStatus, r *control.RemovalStatus) {
	for i := range s {
		d := &s[i]
		if d.Mirror == 0 {
			d.State = "removing"
		}
		note := fmt.Sprintf("being removed, %.0f %%", r.Percent())
		d.Note = strings.TrimPrefix(d.Note+"; "+note, "; ")
	}
}
