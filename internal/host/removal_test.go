package host

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
)

// The settings name a device that is being removed before its guest hears of it, and
// forget it when the pool has no such device any more, and not before.
func TestRemoveDevice(t *testing.T) {
	ctx := context.Background()
	for _, copies := range []int{1, 2} {
		all := []string{"/d/1", "/d/2", "/d/3", "/d/4", "/d/5", "/d/6"}
		has := slices.Clone(all) // devices of the open pool
		removed := all[2:4]
		if copies == 1 {
			removed = all[2:3]
		}
		var asked []control.PoolRemove
		var answer error
		state, stats := "open", control.PoolStatus{}
		var a *agent
		a = answering(t, control.Handlers{
			Pools: func(context.Context) ([]control.Pool, error) {
				p := control.Pool{Name: "pool-b", Guest: "b", State: state, Stats: stats}
				for _, path := range has {
					p.Devices = append(p.Devices, control.DeviceStatus{Path: path})
				}
				return []control.Pool{p}, nil
			},
			RemoveDevice: func(_ context.Context, _ string, c control.PoolRemove) (control.Pool, error) {
				if got := next(t, a, "b").Removing; !c.Cancel && !slices.Equal(got, removed) {
					t.Errorf("%d copies: the settings name %q", copies, got)
				}
				asked = append(asked, c)
				return control.Pool{}, answer
			},
		})
		if err := a.remember(func(st *config.State, cfg *config.Config) {
			gs := st.Guests["b"]
			gs.Devices, gs.Copies = all, copies
			st.Guests["b"] = gs
			cfg.Guest("b").Pool.Devices, cfg.Guest("b").Pool.Copies = all, copies
		}); err != nil {
			t.Fatal(err)
		}
		settings := func(devices, removing []string) {
			t.Helper()
			for what, p := range map[string]config.Pool{"in force": a.settings().Guest("b").Pool, "remembered": next(t, a, "b")} {
				if !slices.Equal(p.Devices, devices) || !slices.Equal(p.Removing, removing) || p.Copies != copies {
					t.Errorf("%d copies, %s: %q, removing %q", copies, what, p.Devices, p.Removing)
				}
			}
		}
		remove := func(c control.PoolRemove) error {
			_, err := a.removeDevice(ctx, "pool-b", c)
			return err
		}
		if err := remove(control.PoolRemove{Device: "/d/9"}); control.KindOf(err) != control.KindNotFound || len(asked) > 0 {
			t.Errorf("%v", err)
		}
		answer = control.NewError(control.KindNoSpace, "full", "")
		if err := remove(control.PoolRemove{Device: "/d/3"}); control.KindOf(err) != control.KindNoSpace {
			t.Errorf("%v", err)
		}
		settings(all, nil)
		answer = control.NewError(control.KindUnavailable, "who knows", "")
		if err := remove(control.PoolRemove{Device: "/d/3"}); control.KindOf(err) != control.KindUnavailable {
			t.Errorf("%v", err)
		}
		settings(all, removed)
		answer = nil
		if err := remove(control.PoolRemove{Device: "/d/3"}); err != nil || !slices.Equal(asked[len(asked)-1].Paths, removed) {
			t.Errorf("%v: %+v", err, asked)
		}
		settings(all, removed)
		if err := remove(control.PoolRemove{Cancel: true}); err != nil {
			t.Error(err)
		}
		settings(all, nil)
		if err := remove(control.PoolRemove{Device: "/d/3"}); err != nil {
			t.Error(err)
		}
		a.tidyRemoved(ctx, control.Status{})
		settings(all, removed)
		state, has = "device missing", nil // who does not serve it does not know
		a.tidyRemoved(ctx, control.Status{})
		settings(all, removed)
		state = "open"
		has = slices.DeleteFunc(slices.Clone(all), func(path string) bool { return slices.Contains(removed, path) })
		a.change.Lock() // a command
		a.tidyRemoved(ctx, control.Status{})
		a.change.Unlock()
		settings(all, removed)
		a.tidyRemoved(ctx, control.Status{})
		settings(has, nil)
		if err := remove(control.PoolRemove{Cancel: true}); err != nil {
			t.Error(err)
		}
		settings(has, nil)

		// A removal that was begun elsewhere, by what the guest tells of it.
		last := has[len(has)-copies:]
		stats = control.PoolStatus{Removal: &control.RemovalStatus{Paths: last[:1]}}
		status := control.Status{Guests: []control.GuestStatus{{PoolStats: []control.PoolStatus{stats}}}}
		a.tidyRemoved(ctx, status)
		settings(has, last)
		if err := a.setRemoving(a.settings().Guest("b"), a.settings().Guest("b").Pool.MemberGroups(), nil); err != nil {
			t.Fatal(err)
		}
		stats = control.PoolStatus{Removed: last[:1]}
		had := has
		has = slices.Clone(has[:len(has)-copies])
		a.tidyRemoved(ctx, control.Status{})
		settings(had, nil)
		status.Guests[0].PoolStats[0] = stats
		a.tidyRemoved(ctx, status)
		settings(has, nil)
		answer = errors.New("broken")
		if err := remove(control.PoolRemove{Cancel: true}); err == nil {
			t.Error("an error was lost")
		}
	}
}
