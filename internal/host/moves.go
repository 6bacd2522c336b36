package host

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/guest"
	"github.com/pollux-storage/pollux/internal/region"
)

// Pools leave the pair and come to it. What state.json says is what holds: an
// export is done when it names the pool no more, after the guest has closed it; an
// import is begun when it names the pool, with a mark that lets whoever opens it
// label it for its new guest, and done when the agent has seen it open. Wherever
// that ends, the command can be given again.

// freePool makes sure that no other guest has a pool of that name.
func (a *agent) freePool(name, guest string) error {
	for _, g := range a.settings().Guests {
		if g.Name != guest && g.Pool.Exists() && g.Pool.Name == name {
			return control.NewError(control.KindExists, fmt.Sprintf("there is a pool %q already, of guest %s", name, g.Name), "choose another name")
		}
	}
	return nil
}

// exportPool closes a pool, and makes the pair forget it.
func (a *agent) exportPool(ctx context.Context, name string, c control.PoolExport) (control.Pool, error) {
	if err := a.beginChange(); err != nil {
		return control.Pool{}, err
	}
	defer a.change.Unlock()
	p, err := a.pool(ctx, name)
	if control.KindOf(err) == control.KindNotFound {
		if q, ok := a.exportedBefore(name); ok {
			return q, nil
		}
	}
	if err != nil {
		return p, err
	}
	if g := a.settings().Guest(p.Guest); g.Pool.Import != nil && p.State != "open" {
		return a.dropImport(ctx, p)
	}
	cl, err := a.holder(ctx, p.Guest)
	if err != nil {
		return p, err
	}
	out, err := cl.ExportPool(ctx, name, c)
	if unanswered(ctx, err) {
		return p, fmt.Errorf("it is not known whether pool %s was closed; it is still the pair's: export it again: %w", name, err)
	}
	if err != nil {
		return p, err
	}
	if err := a.forget(p.Guest, name); err != nil {
		return p, fmt.Errorf("pool %s is closed, and the pair could not be made to forget it: export it again: %w", name, err)
	}
	out.Devices = p.Devices
	a.event(p.Guest, "pool-exported", map[string]string{"pool": name, "id": p.ID}, "pool %s is exported: its devices can be taken elsewhere", name)
	return out, nil
}

// exportedBefore returns a pool that the pair had, and that was exported.
func (a *agent) exportedBefore(name string) (control.Pool, bool) {
	st, err := config.ReadState(a.settings().Dir)
	for guest, gs := range st.Guests {
		if err == nil && gs.Exported == name {
			return control.Pool{Name: name, Guest: guest, State: control.FoundExported, Devices: []control.DeviceStatus{}}, true
		}
	}
	return control.Pool{}, false
}

// forget takes the pool of a guest out of what the pair remembers. Exported is its
// name, or empty when it never was the pair's.
func (a *agent) forget(guest, exported string) error {
	return a.remember(func(st *config.State, cfg *config.Config) {
		old := st.Guests[guest]
		gs := config.GuestState{Port: old.Port, Exported: old.Exported}
		if exported != "" {
			gs.Exported = exported
		}
		st.Guests[guest] = gs
		p := &cfg.Guest(guest).Pool
		p.Devices, p.Widths, p.Removing, p.Adding, p.Manual, p.Create, p.Import = nil, nil, nil, 0, true, false, nil
	})
}

// dropImport gives up a pool that was to be imported and that nobody has opened.
// Grants are made by the loop, so while it decides nobody begins to.
func (a *agent) dropImport(ctx context.Context, p control.Pool) (control.Pool, error) {
	var err error
	holder := ""
	if e := a.ask(ctx, func() {
		if holder = a.ref.Title(p.Guest).Holder; holder == "" {
			err = a.forget(p.Guest, "")
		}
	}); e != nil || err != nil {
		return p, errors.Join(e, err)
	}
	if holder != "" {
		return p, control.NewError(control.KindRefused, fmt.Sprintf("pool %s is being imported by guest %s", p.Name, holder), "see `pollux pool list`; `pollux guest restart "+holder+"` begins anew")
	}
	p.State = "not imported"
	a.event(p.Guest, "import-dropped", map[string]string{"pool": p.Name}, "pool %s, whose import was begun, is not the pair's any more", p.Name)
	return p, nil
}

// importPool takes over a pool that was found on devices.
func (a *agent) importPool(ctx context.Context, c control.PoolImport) (control.Pool, error) {
	if err := a.beginChange(); err != nil {
		return control.Pool{}, err
	}
	defer a.change.Unlock()
	f, err := a.findPool(c)
	if err != nil {
		return control.Pool{}, err
	}
	all, err := a.pools(ctx)
	if err != nil {
		return control.Pool{}, err
	}
	for _, p := range all {
		if p.ID == f.ID { // an answer may have been lost
			return p, nil
		}
	}
	g, err := a.importer(c.Guest, f)
	if err != nil {
		return control.Pool{}, err
	}
	if c.Guest = g.Name; c.As == "" {
		c.As = f.Name
	}
	if err := a.freePool(c.As, g.Name); err != nil {
		return control.Pool{}, err
	}
	if err := a.mayImport(f, g, c); err != nil {
		return control.Pool{}, err
	}
	cl, err := a.holder(ctx, g.Name)
	if err != nil {
		return control.Pool{}, err
	}
	if err := a.freeVolumes(ctx, f); err != nil {
		return control.Pool{}, err
	}
	if err := a.rememberImport(g.Name, f, c); err != nil {
		return control.Pool{}, errors.Join(err, a.forget(g.Name, "")) // half of it may have been written
	}
	p, err := cl.ImportPool(ctx, c)
	if unanswered(ctx, err) {
		return p, fmt.Errorf("it is not known whether pool %s was imported; if `pollux pool list` does not show it open soon, `pollux guest restart %s` goes on, and `pollux pool export %s` gives it up: %w", c.As, g.Name, c.As, err)
	}
	if err != nil {
		return p, errors.Join(err, a.forget(g.Name, ""))
	}
	a.poolSeen(g.Name)
	a.event(g.Name, "pool-imported", map[string]string{"pool": c.As, "id": f.ID, "was": f.Name}, "pool %s is imported", c.As)
	return p, nil
}

// findPool looks for the pool that is meant.
func (a *agent) findPool(c control.PoolImport) (f control.FoundPool, err error) {
	var paths []string
	for _, p := range c.Paths {
		paths = append(paths, a.absolute(p))
	}
	all, err := guest.FindPools(paths, a.settings().Dir)
	if err != nil {
		return f, err
	}
	var names []string
	for _, p := range all.Pools {
		if p.ID == c.Pool || p.Name == c.Pool {
			f = p
			names = append(names, p.ID)
		}
	}
	switch len(names) {
	case 0:
		return f, control.NewError(control.KindNotFound, fmt.Sprintf("no pool %q was found there", c.Pool), "`pollux pool import` lists those on the block devices and in the pair's directory; name the folder or the devices where others are")
	case 1:
		return f, nil
	}
	return f, control.NewError(control.KindExists, fmt.Sprintf("there are %d pools of the name %q: %s", len(names), c.Pool, strings.Join(names, ", ")), "import one by its id")
}

// importer returns the guest that shall have a pool: the named one, or that which
// had one of the same guest's name, or any without a pool.
func (a *agent) importer(name string, f control.FoundPool) (*config.Guest, error) {
	idle := func(g *config.Guest) bool {
		i := g.Pool.Import
		return !g.Pool.Exists() || i != nil && i.ID == f.ID
	}
	if name != "" {
		g, err := a.known(name)
		if err == nil && !idle(g) {
			err = control.NewError(control.KindExists, fmt.Sprintf("guest %s has pool %s", name, g.Pool.Name), "a guest has one pool")
		}
		return g, err
	}
	cfg := a.settings()
	for _, name := range append([]string{f.Guest}, a.names()...) {
		if g := cfg.Guest(name); g != nil && idle(g) {
			return g, nil
		}
	}
	return nil, control.NewError(control.KindRefused, "each guest has a pool already, and has one only", "export the pool of one first")
}

// mayImport refuses what would lose something, unless the person has said that it
// may.
func (a *agent) mayImport(f control.FoundPool, g *config.Guest, c control.PoolImport) error {
	who := "whoever had it last"
	if f.Host != "" {
		who = "host " + f.Host
	}
	switch f.State {
	case control.FoundIncomplete:
		why := "its devices cannot be told apart"
		if len(f.Missing) > 0 {
			why = fmt.Sprintf("of its %d devices there is no number %s", max(f.Wants, slices.Max(f.Missing)), strings.Trim(fmt.Sprint(f.Missing), "[]"))
		}
		return control.NewError(control.KindRefused, fmt.Sprintf("pool %s is not complete: %s%s", f.Name, why, remarks(f.Notes)), "name the folder or the devices where all of them are")
	case control.FoundInUse:
		return control.NewError(control.KindRefused, fmt.Sprintf("pool %s is in use: a process on this host has locked its devices", f.Name), "export it there first")
	case control.FoundNotExported:
		if !c.Force {
			return control.NewError(control.KindRefused, fmt.Sprintf("pool %s was closed, but not exported: %s may open it again, and two that write to it destroy it", f.Name, who),
				"export it there; or, if nothing will open it there any more, use --force")
		}
	case control.FoundNotClosed:
		lost := f.Here && !a.hasRegion(g, f)
		switch {
		case lost && !(c.Force && c.AcceptLoss):
			return control.NewError(control.KindRefused, fmt.Sprintf("pool %s was not closed, and its newest writes are in the memory of this host, in region %s of another pair", f.Name, f.Region),
				"start that pair, which loses nothing, and export it there; or give up what was acknowledged and not flushed, with --force --accept-loss")
		case !c.Force:
			return control.NewError(control.KindRefused, fmt.Sprintf("pool %s was not closed: %s may be using it now, and two that write to it destroy it; what was not flushed there is not on the devices", f.Name, who),
				"export it there; or, if that host has ended or can reach the devices no more, use --force")
		}
	}
	return nil
}

func remarks(notes []string) string {
	if len(notes) == 0 {
		return ""
	}
	return " (" + strings.Join(notes, "; ") + ")"
}

// hasRegion tells whether the region that a pool needs is the one of this guest.
func (a *agent) hasRegion(g *config.Guest, f control.FoundPool) bool {
	r, err := region.Open(a.settings().RegionPath(g.Name), true)
	if err != nil {
		return false
	}
	h := r.Header()
	_ = r.Close() // it was only looked at
	return h.ID == f.Region && h.Pool.String() == f.ID
}

// freeVolumes makes sure that no volume of the pair has the name of one that comes.
// It reads what a pool needs to be opened, so that one which does not open is not
// labelled anew.
func (a *agent) freeVolumes(ctx context.Context, f control.FoundPool) error {
	names, err := guest.FoundVolumes(f)
	if err != nil {
		return fmt.Errorf("pool %s cannot be read: %w", f.Name, err)
	}
	have, err := a.volumes(ctx)
	if err != nil {
		return err
	}
	for _, v := range have {
		if slices.Contains(names, v.Name) {
			return control.NewError(control.KindExists, fmt.Sprintf("pool %s has a volume %q, and guest %s has one of that name, too", f.Name, v.Name, v.Guest), "rename the one that is here with `pollux volume rename`")
		}
	}
	return nil
}

// rememberImport makes the settings name a pool that is to be imported.
func (a *agent) rememberImport(guest string, f control.FoundPool, c control.PoolImport) error {
	var devices []string
	var groups [][]string
	for _, d := range f.Devices {
		var group []string
		for i, cp := range d.Copies {
			path := cp.Path
			if path == "" {
				// There is nothing; `pool replace` puts a device in this place.
				path = filepath.Join(a.settings().Dir, "missing", fmt.Sprintf("%s-device%d-copy%d", c.As, d.Number, i+1))
			}
			group = append(group, path)
		}
		groups = append(groups, group)
		devices = append(devices, group...)
	}
	copies := len(groups[0])
	i := &config.Import{ID: f.ID, Epoch: f.Epoch, AcceptLoss: c.AcceptLoss}
	return a.remember(func(st *config.State, cfg *config.Config) {
		gs := config.GuestState{Port: st.Guests[guest].Port, Exported: st.Guests[guest].Exported, Created: true}
		gs.Pool, gs.Devices, gs.Copies, gs.Widths, gs.Import = c.As, devices, copies, config.WidthsOf(groups, copies), i
		st.Guests[guest] = gs
		p := &cfg.Guest(guest).Pool
		p.Name, p.Devices, p.Copies, p.Widths, p.Import = gs.Pool, gs.Devices, gs.Copies, gs.Widths, i
		p.Manual, p.Create, p.Adding, p.Removing = false, false, 0, nil
	})
}
