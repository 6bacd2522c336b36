package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
)

// holder returns a client of the guest that serves an identity.
func (a *agent) holder(ctx context.Context, id string) (*control.Client, error) {
	if _, err := a.known(id); err != nil {
		return nil, err
	}
	s, err := a.snapshot(ctx)
	if err != nil {
		return nil, err
	}
	t := s.titles[id]
	if t.Holder == "" || !s.seats[t.Holder].Linked {
		return nil, control.NewError(control.KindUnavailable, "no guest serves "+id+" now", "see `pollux status`")
	}
	return a.client(t.Holder), nil
}

func (a *agent) volumes(ctx context.Context) ([]control.Volume, error) {
	s, err := a.snapshot(ctx)
	if err != nil {
		return nil, err
	}
	got, errs := askAll(ctx, a, s, func(ctx context.Context, c *control.Client) ([]control.Volume, error) { return c.Volumes(ctx) })
	out := []control.Volume{}
	for _, g := range a.names() {
		if err := errs[g]; err != nil {
			return nil, fmt.Errorf("guest %s: %w", g, err)
		}
		out = append(out, got[g]...)
	}
	// By identity, whoever serves it now.
	slices.SortStableFunc(out, func(x, y control.Volume) int {
		return slices.Index(a.names(), x.Guest) - slices.Index(a.names(), y.Guest)
	})
	return out, nil
}

func (a *agent) volume(ctx context.Context, name string) (control.Volume, error) {
	all, err := a.volumes(ctx)
	if err != nil {
		return control.Volume{}, err
	}
	for _, v := range all {
		if v.Name == name {
			return v, nil
		}
	}
	return control.Volume{}, control.NewError(control.KindNotFound, fmt.Sprintf("there is no volume %q", name), "see `pollux volume list`")
}

// free makes sure that a name is not taken on either guest, so that a volume's
// name alone says which it is.
func (a *agent) free(ctx context.Context, name string) error {
	v, err := a.volume(ctx, name)
	switch {
	case err == nil:
		return control.NewError(control.KindExists, fmt.Sprintf("there is a volume %q already, on guest %s", name, v.Guest), "choose another name")
	case control.KindOf(err) == control.KindNotFound:
		return nil
	}
	return err
}

func (a *agent) createVolume(ctx context.Context, c control.VolumeCreate) (control.Volume, error) {
	if err := a.beginChange(); err != nil {
		return control.Volume{}, err
	}
	defer a.change.Unlock()
	if c.Guest == "" {
		c.Guest = a.names()[0]
	}
	cl, err := a.holder(ctx, c.Guest)
	if err != nil {
		return control.Volume{}, err
	}
	if err := a.free(ctx, c.Name); err != nil {
		return control.Volume{}, err
	}
	v, err := cl.CreateVolume(ctx, c)
	if err == nil {
		a.event(c.Guest, "volume-created", map[string]string{"volume": c.Name, "dedup": v.Sharing()},
			"volume %s of %s is created, with deduplication %s", c.Name, config.Size(v.Size), v.Sharing())
	}
	return v, err
}

func (a *agent) changeVolume(ctx context.Context, name string, c control.VolumeChange) (control.Volume, error) {
	if err := a.beginChange(); err != nil {
		return control.Volume{}, err
	}
	defer a.change.Unlock()
	was, err := a.volume(ctx, name)
	if err != nil {
		return was, err
	}
	if c.Rename != "" && c.Rename != name {
		if err := a.free(ctx, c.Rename); err != nil {
			return was, err
		}
	}
	cl, err := a.holder(ctx, was.Guest)
	if err != nil {
		return was, err
	}
	v, err := cl.ChangeVolume(ctx, name, c)
	if err != nil {
		return v, err
	}
	fields := map[string]string{"volume": v.Name}
	if c.Rename != "" || c.Size != 0 {
		what := fmt.Sprintf("volume %s has %s now", v.Name, config.Size(v.Size))
		if name != v.Name {
			what = fmt.Sprintf("volume %s is called %s now", name, v.Name)
		}
		a.event(v.Guest, "volume-changed", fields, "%s", what)
	}
	if v.Sharing() != was.Sharing() {
		fields = map[string]string{"volume": v.Name, "was": was.Sharing(), "dedup": v.Sharing()}
		a.event(v.Guest, "volume-changed", fields, "deduplication of volume %s is %s now; it was %s", v.Name, v.Sharing(), was.Sharing())
	}
	return v, nil
}

func (a *agent) deleteVolume(ctx context.Context, name string) error {
	if err := a.beginChange(); err != nil {
		return err
	}
	defer a.change.Unlock()
	v, err := a.volume(ctx, name)
	if err != nil {
		return err
	}
	cl, err := a.holder(ctx, v.Guest)
	if err != nil {
		return err
	}
	if err := cl.DeleteVolume(ctx, name); err != nil {
		return err
	}
	a.event(v.Guest, "volume-deleted", map[string]string{"volume": name}, "volume %s is deleted", name)
	return nil
}

func (a *agent) pools(ctx context.Context) ([]control.Pool, error) {
	s, err := a.snapshot(ctx)
	if err != nil {
		return nil, err
	}
	got, _ := askAll(ctx, a, s, func(ctx context.Context, c *control.Client) ([]control.Pool, error) { return c.Pools(ctx) })
	out := []control.Pool{}
	for _, g := range a.settings().Guests {
		p := control.Pool{Name: g.Pool.Name, Guest: g.Name, State: "closed", Devices: []control.DeviceStatus{}}
		switch {
		case g.Pool.Manual:
			p.State = "not created"
		case g.Pool.Import != nil:
			p.State = "not imported yet"
		}
		for _, d := range g.Pool.Devices {
			p.Devices = append(p.Devices, control.DeviceStatus{Pool: p.Name, Path: d})
		}
		for _, list := range got {
			for _, q := range list {
				if q.Guest == g.Name {
					p = q
				}
			}
		}
		if p.State == "not created" && len(p.Devices) == 0 {
			continue
		}
		out = append(out, p)
	}
	return out, nil
}

func (a *agent) pool(ctx context.Context, name string) (control.Pool, error) {
	all, err := a.pools(ctx)
	if err != nil {
		return control.Pool{}, err
	}
	for _, p := range all {
		if p.Name == name {
			return p, nil
		}
	}
	return control.Pool{}, control.NewError(control.KindNotFound, fmt.Sprintf("there is no pool %q", name), "see `pollux pool list`")
}

// createPool makes the pool of a guest that has none. The settings name it
// before its devices are written to, as one that is yet to be made: should its
// guest not come that far, its next start makes it.
func (a *agent) createPool(ctx context.Context, c control.PoolCreate) (control.Pool, error) {
	if err := a.beginChange(); err != nil {
		return control.Pool{}, err
	}
	defer a.change.Unlock()
	g, err := a.known(c.Guest)
	if err != nil {
		return control.Pool{}, err
	}
	if !g.Pool.Manual || len(g.Pool.Devices) > 0 {
		return control.Pool{}, control.NewError(control.KindExists, fmt.Sprintf("guest %s has pool %s", c.Guest, g.Pool.Name),
			"a guest has one pool: add devices to it with `pollux pool add`")
	}
	if c.Name == "" || len(c.Devices) == 0 {
		return control.Pool{}, control.NewError(control.KindInvalid, "a pool needs a name and at least one device", "")
	}
	if n := max(c.Copies, 1); len(c.Devices)%n != 0 || n > config.MaxCopies {
		return control.Pool{}, control.NewError(control.KindInvalid, fmt.Sprintf("%d devices cannot be divided into mirrors of %d", len(c.Devices), n),
			fmt.Sprintf("name a multiple of %d devices; up to %d copies are possible", n, config.MaxCopies))
	}
	if err := a.freePool(c.Name, c.Guest); err != nil {
		return control.Pool{}, err
	}
	cl, err := a.holder(ctx, c.Guest)
	if err != nil {
		return control.Pool{}, err
	}
	var made []string
	for i, d := range c.Devices {
		c.Devices[i] = a.absolute(d)
		ok, err := makeDevice(g, c.Devices[i], c.Size)
		if err != nil {
			removeAll(made)
			return control.Pool{}, err
		}
		if ok {
			made = append(made, c.Devices[i])
		}
	}
	set := func(pool string, devices []string) error {
		return a.remember(func(st *config.State, cfg *config.Config) {
			gs := st.Guests[c.Guest]
			gs.Pool, gs.Devices, gs.Copies, gs.Widths, gs.Created = pool, devices, c.Copies, nil, false
			st.Guests[c.Guest] = gs
			p := &cfg.Guest(c.Guest).Pool
			p.Devices, p.Widths, p.Manual, p.Create = devices, nil, pool == "", pool != ""
			p.Copies = max(c.Copies, 1)
			if pool != "" {
				p.Name = pool
			}
		})
	}
	if err := set(c.Name, c.Devices); err != nil {
		_ = set("", nil) // half of it may have been written
		removeAll(made)
		return control.Pool{}, err
	}
	p, err := cl.CreatePool(ctx, c)
	if unanswered(ctx, err) {
		return p, fmt.Errorf("it is not known whether pool %s of %s was made; if `pollux pool list` shows it closed, `pollux guest restart %s` makes it: %w", c.Name, c.Guest, c.Guest, err)
	}
	if err != nil {
		removeAll(made)
		return p, errors.Join(err, set("", nil))
	}
	a.poolSeen(c.Guest)
	a.event(c.Guest, "pool-created", map[string]string{"pool": c.Name}, "pool %s is created", c.Name)
	return p, nil
}

// poolHolder returns a pool, the settings of its guest, and the way to the guest
// that holds it.
func (a *agent) poolHolder(ctx context.Context, name string) (p control.Pool, g *config.Guest, cl *control.Client, err error) {
	if p, err = a.pool(ctx, name); err == nil {
		g, err = a.known(p.Guest)
	}
	if err == nil {
		cl, err = a.holder(ctx, p.Guest)
	}
	return p, g, cl, err
}

// makeDevice makes the file of a device unless something is there; a size of 0 is
// that of the settings.
func makeDevice(g *config.Guest, path string, size int64) (made bool, err error) {
	if size == 0 {
		size = int64(g.Pool.Size)
	}
	if made, err = makeFile(path, size); err != nil {
		err = control.NewError(control.KindInvalid, fmt.Sprintf("device %s: %v", path, err), "")
	}
	return made, err
}

// unanswered tells whether it is not known if a guest did what it was asked.
func unanswered(ctx context.Context, err error) bool {
	if err == nil {
		return false
	}
	k := control.KindOf(err)
	return k == control.KindUnavailable || k == control.KindTimeout || ctx.Err() != nil
}

// absolute makes paths of devices mean the same to all processes.
func (a *agent) absolute(path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(a.settings().Dir, path)
}

func removeAll(paths []string) {
	for _, p := range paths {
		_ = os.Remove(p)
	}
}

func (a *agent) check(ctx context.Context) (control.CheckReport, error) {
	s, err := a.snapshot(ctx)
	if err != nil {
		return control.CheckReport{}, err
	}
	r := control.CheckReport{OK: true, Online: true, Pools: []control.PoolCheck{}}
	got, errs := askAll(ctx, a, s, func(ctx context.Context, c *control.Client) (control.CheckReport, error) { return c.Check(ctx) })
	for _, g := range a.names() {
		if err := errs[g]; err != nil {
			return r, fmt.Errorf("check by guest %s: %w", g, err)
		}
		if s.titles[g].Holder == "" {
			r.Notes = append(r.Notes, "nobody serves "+g+": its pool was not checked")
			r.OK = false
		}
		r.OK = r.OK && (got[g].OK || !s.seats[g].Linked)
		r.Pools = append(r.Pools, got[g].Pools...)
	}
	return r, nil
}
