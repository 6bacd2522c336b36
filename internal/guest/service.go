package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/mirror"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/region"
	"github.com/pollux-storage/pollux/internal/release"
)

// handlers answer on the guest's control socket, for what it holds.
func (g *Guest) handlers() control.Handlers {
	return control.Handlers{
		Status:            g.status,
		Volumes:           g.volumes,
		Volume:            g.volume,
		CreateVolume:      g.createVolume,
		ChangeVolume:      g.changeVolume,
		DeleteVolume:      g.deleteVolume,
		Pools:             g.pools,
		CreatePool:        g.createPool,
		AddDevice:         g.addDevice,
		ExportPool:        g.exportPool,
		ImportPool:        g.importPool,
		RemoveDevice:      g.removeDevice,
		ChangeCopy:        g.changeCopy,
		ChangePool:        g.changePool,
		ScrubPool:         g.scrubPool,
		SurveyPool:        g.surveyPool,
		Dedup:             g.dedup,
		Flash:             g.flash,
		FlashPolicy:       g.flashPolicy,
		ChangeFlashPolicy: g.changeFlashPolicy,
		ChangeFlashPin:    g.changeFlashPin,
		EvacuateFlash:     g.evacuateFlash,
		ExplainFlash:      g.explainFlash,
		SimulateFlash:     g.simulateFlash,
		CheckTakeover:     g.checkTakeover,
		Check:             g.check,
		Checking:          g.checking,
	}
}

func (g *Guest) status(ctx context.Context) (control.Status, error) {
	s := control.GuestStatus{
		Name: g.opt.Name, PID: os.Getpid(), Version: release.Version(), Uptime: control.Duration(time.Since(g.started)),
		Serves: []string{}, Pools: []string{}, Exports: []control.Export{},
	}
	if set := g.cfg.Guest(g.opt.Name); set != nil {
		s.Address, s.Socket = set.Endpoint(), set.Socket
	}
	var view partner.View
	phases := map[string]partner.Phase{}
	err := g.ask(ctx, func() {
		view = g.m.View()
		for _, h := range g.m.Holds() {
			phases[h.Identity] = h.Phase
		}
		for id, r := range g.watches {
			s.Region = append(s.Region, regionStatus(id, r, "partner, read-only"))
		}
	})
	if err != nil {
		return control.Status{}, err
	}
	s.State = state(g.opt.Name, phases)
	s.GivebackIn, s.LockedOut = control.Duration(view.GivebackIn), view.Lockout
	for _, k := range sortedKeys(view.Alerts) {
		s.Alerts = append(s.Alerts, view.Alerts[k])
	}
	for _, t := range g.all() {
		if phases[t.identity] == partner.PhaseServing {
			s.Serves = append(s.Serves, t.identity)
		}
		g.describe(&s, t)
	}
	if phases[g.opt.Name] == partner.PhaseServing {
		s.ServedBy = g.opt.Name
	}
	g.measure(&s)
	g.mu.Lock()
	last := g.last
	g.mu.Unlock()
	return control.Status{Guests: []control.GuestStatus{s}, LastTakeover: last}, nil
}

func state(self string, phases map[string]partner.Phase) string {
	for id, p := range phases {
		if p == partner.PhaseReleasing {
			return control.StateReleasing
		}
		if p != partner.PhaseServing && id != self {
			return control.StateTakeover
		}
	}
	for _, p := range phases {
		if p == partner.PhaseServing {
			return control.StateServing
		}
	}
	if len(phases) > 0 {
		return control.StateStarting
	}
	return control.StateWaiting
}

// fullness is the alert of a pool that is nearly full, without a number that would
// change all the time.
func fullness(s control.PoolStatus, limits config.Alerts) string {
	if s.Capacity == 0 {
		return ""
	}
	used := 100 - float64(s.Free)*100/float64(s.Capacity)
	switch {
	case used >= float64(limits.FullCritical):
		return fmt.Sprintf("pool %s is full to %d %% and more: writes to new places will soon fail; delete, trim or add a device", s.Name, limits.FullCritical)
	case used >= float64(limits.FullWarning):
		return fmt.Sprintf("pool %s is full to %d %% and more", s.Name, limits.FullWarning)
	}
	return ""
}

// describeDevice shows a device that is open, and whether it has grown or shrunk
// since it was opened. provided is what else must be so before the pool uses it.
func describeDevice(pool string, i hpdi.Info, provided string) control.DeviceStatus {
	d := control.DeviceStatus{Pool: pool, Path: i.Name, Driver: i.Driver, Size: i.Size, Direct: i.Direct, Note: i.Note}
	switch now := smallest([]string{i.Name}, i.Size); {
	case now/block.TrackBlocks/block.Size > i.Size/block.TrackBlocks/block.Size:
		d.Note = fmt.Sprintf("it has grown to %s, which the pool uses when it is opened next: after a takeover or giveback%s", roundMiB(now), provided)
	case now < i.Size:
		d.Note = fmt.Sprintf("it has SHRUNK to %s: make it as large as it was before the pool is opened next", roundMiB(now))
	}
	return d
}

// faults are the alerts of a device that has failed requests, or has something else
// than what was written to it. Numbers would make new ones of them all the time.
func faults(name, pool string, e control.DeviceErrors) (alerts []string) {
	if e.ReadErrors+e.WriteErrors > 0 {
		alerts = append(alerts, fmt.Sprintf("%s of pool %s has failed requests since the pool was opened: `pollux pool show %s` counts them", name, pool, pool))
	}
	if e.Corrupt > 0 {
		alerts = append(alerts, fmt.Sprintf("%s of pool %s has lost blocks, which clients cannot read: `pollux pool scrub start %s` names all of them", name, pool, pool))
	}
	return alerts
}

// describe adds what a tenancy has to show.
func (g *Guest) describe(s *control.GuestStatus, t *tenancy) {
	st := t.open()
	if st == nil {
		return
	}
	s.Pools = append(s.Pools, st.Name())
	stats := t.stats(st)
	s.PoolStats = append(s.PoolStats, stats)
	if stats.Error != "" {
		s.Alerts = append(s.Alerts, fmt.Sprintf("pool %s cannot write to its devices: %s", stats.Name, stats.Error))
	}
	if stats.Scrub.Unreadable() > 0 {
		s.Alerts = append(s.Alerts, fmt.Sprintf("a scrub of pool %s found blocks that no copy has: `pollux pool scrub status %s` names them", stats.Name, stats.Name))
	}
	if stats.PagesMended > 0 { // how many would make another alert of each
		s.Alerts = append(s.Alerts, fmt.Sprintf("pages of metadata of pool %s were bad since it was opened, and were written again from their twins", stats.Name))
	}
	if m := stats.LLRRM; m != nil && m.Failed {
		s.Alerts = append(s.Alerts, fmt.Sprintf("LLRRM of pool %s could not be written: nothing moves there any more until the pool is opened again; remove the device if it is bad", stats.Name))
	}
	s.Alerts = append(s.Alerts, flashAlerts(stats.Name, stats.Flash)...)
	if full := fullness(stats, g.cfg.Alerts); full != "" {
		s.Alerts = append(s.Alerts, full)
	}
	found := map[string]*control.VolumeSurvey{}
	for _, v := range st.Volumes() {
		found[v.Name] = v.Survey
	}
	for _, v := range g.list(t, st) {
		s.Exports = append(s.Exports, control.Export{
			Volume: v.Name, Guest: t.identity, ServedBy: g.opt.Name, Size: v.Size,
			ReadOnly: g.cfg.Exports[v.Name].ReadOnly, NBD: v.NBD, NBDUnix: v.NBDUnix, Connections: t.connections(v.Name), VhostUser: v.VhostUser, Ring: v.Ring, Survey: found[v.Name],
		})
	}
	for _, d := range t.disks() {
		before := len(s.Devices)
		name := d.Info().Name
		errs := stats.Faults[name]
		class := ""
		switch {
		case stats.LLRRM != nil && slices.Contains(stats.LLRRM.Devices, name):
			class = control.ClassLLRRM
		case stats.Flash != nil && stats.Flash.Device == name:
			class = control.ClassFlash
		}
		if m, ok := d.(*mirror.Mirror); ok {
			describeMirror(s, st.Name(), m)
			name = fmt.Sprintf("mirror %d", s.Devices[before].Mirror)
		} else {
			s.Devices = append(s.Devices, describeDevice(st.Name(), d.Info(), ""))
			s.Devices[before].DeviceErrors = errs
		}
		for i := range s.Devices[before:] {
			s.Devices[before+i].Class = class
		}
		s.Alerts = append(s.Alerts, faults(name, stats.Name, errs)...)
		if r := stats.Removal; r != nil && r.Device == d.Info().Name {
			noteRemoval(s.Devices[before:], r)
		}
	}
	if r := stats.Removal; r != nil && r.Stuck != "" {
		s.Alerts = append(s.Alerts, fmt.Sprintf("device %s of pool %s cannot be removed: %s", r.Device, stats.Name, r.Stuck))
	}
	r := st.Region()
	s.Memory.Region += r.Bytes
	s.Region = append(s.Region, control.RegionStatus{Identity: t.identity, Path: r.Path, Bytes: r.Bytes, Mapped: "owner", Heartbeat: st.Heartbeat()})
}

// stats returns the figures of the pool, with what only the tenancy knows.
func (t *tenancy) stats(st Store) control.PoolStatus {
	s := st.Stats()
	t.mu.Lock()
	defer t.mu.Unlock()
	s.Removed = t.removed
	if s.Removal != nil {
		for _, d := range t.devices {
			if d.Info().Name == s.Removal.Device {
				s.Removal.Paths = pathsOn(d)
			}
		}
	}
	return s
}

func (t *tenancy) connections(volume string) int {
	t.mu.Lock()
	srv := t.server
	t.mu.Unlock()
	n := 0
	if srv != nil {
		for _, c := range srv.Connections() {
			if c.Export == volume {
				n++
			}
		}
	}
	return n
}

// unused refuses what may not be done to a volume that somebody uses.
// The way out is added to what is said.
func (t *tenancy) unused(volume, out string) error {
	if n := t.connections(volume); n > 0 {
		return control.NewError(control.KindRefused, fmt.Sprintf("volume %q has %d connections", volume, n), "detach its clients first"+out)
	}
	vhosts, rings := t.attachments()
	if n := vhosts.clients(volume); n > 0 {
		return control.NewError(control.KindRefused, fmt.Sprintf("volume %q is attached to %s", volume, control.Number(n, "virtual machine")), "detach it there first"+out)
	}
	if n := rings.clients(volume); n > 0 {
		return control.NewError(control.KindRefused, fmt.Sprintf("volume %q is open over rings in %s", volume, control.Number(n, "program")), "end them first"+out)
	}
	return nil
}

func regionStatus(id string, r *region.Region, mapped string) control.RegionStatus {
	return control.RegionStatus{Identity: id, Path: r.Path(), Bytes: int64(r.Header().Size), Mapped: mapped, Heartbeat: r.Heartbeat()}
}

func (g *Guest) list(t *tenancy, st Store) []control.Volume {
	set := g.cfg.Guest(t.identity)
	vhosts, rings := t.attachments()
	var out []control.Volume
	for _, v := range st.Volumes() {
		c := control.Volume{Name: v.Name, Pool: st.Name(), Guest: t.identity, Size: v.Size, Used: v.Used, Created: v.Created, Dedup: v.THN > 0, THN: v.THN}
		c.NBD, c.NBDUnix = URIs(set, v.Name)
		c.VhostUser = vhostStatus(vhosts, v)
		c.Ring, _ = rings.status(v)
		out = append(out, c)
	}
	return out
}

func (g *Guest) volumes(context.Context) ([]control.Volume, error) {
	out := []control.Volume{}
	for _, t := range g.all() {
		if st := t.open(); st != nil {
			out = append(out, g.list(t, st)...)
		}
	}
	return out, nil
}

// find returns the tenancy that has a volume.
func (g *Guest) find(name string) (*tenancy, Store, control.Volume, error) {
	for _, t := range g.all() {
		if st := t.open(); st != nil {
			for _, v := range g.list(t, st) {
				if v.Name == name {
					return t, st, v, nil
				}
			}
		}
	}
	return nil, nil, control.Volume{}, control.NewError(control.KindNotFound, fmt.Sprintf("there is no volume %q", name), "see `pollux volume list`")
}

func (g *Guest) volume(_ context.Context, name string) (control.Volume, error) {
	_, _, v, err := g.find(name)
	return v, err
}

// pool returns the store of an identity that this guest holds.
func (g *Guest) pool(id string) (*tenancy, Store, error) {
	t := g.tenant(id)
	if t == nil || t.isGone() {
		return nil, nil, control.NewError(control.KindUnavailable, fmt.Sprintf("guest %s does not serve %s", g.opt.Name, id), "")
	}
	st := t.open()
	if st == nil {
		return t, nil, control.NewError(control.KindUnavailable, id+" has no pool", "make one with `pollux pool create`")
	}
	return t, st, nil
}

func (g *Guest) createVolume(ctx context.Context, c control.VolumeCreate) (control.Volume, error) {
	t, st, err := g.pool(c.Guest)
	if err != nil {
		return control.Volume{}, err
	}
	thn, err := thnOf(control.Volume{Name: c.Name}, &c.Dedup, c.THN)
	if err != nil {
		return control.Volume{}, err
	}
	if err := st.CreateVolume(ctx, c.Name, c.Size, thn); err != nil {
		return control.Volume{}, fmt.Errorf("create volume %q: %w", c.Name, err)
	}
	t.volumesChanged()
	return g.volume(ctx, c.Name)
}

// thnOf returns THN of a volume whose sharing is switched on or off, or left as it is
// with nil, and for which thn was asked, or nothing with 0.
func thnOf(v control.Volume, sharing *bool, thn int) (int, error) {
	on := v.Dedup
	if sharing != nil {
		on = *sharing
	}
	switch {
	case !on && thn != 0:
		return 0, control.NewError(control.KindInvalid, fmt.Sprintf("volume %q shares no blocks, so that THN %d means nothing", v.Name, thn), "say --dedup on as well")
	case !on:
		return 0, nil
	case thn != 0:
		return thn, nil
	case v.Dedup:
		return v.THN, nil
	}
	return dedup.DefaultRun, nil
}

func (g *Guest) changeVolume(ctx context.Context, name string, c control.VolumeChange) (control.Volume, error) {
	t, st, v, err := g.find(name)
	if err != nil {
		return v, err
	}
	thn, err := thnOf(v, c.Dedup, c.THN)
	if err != nil {
		return v, err
	}
	if c.Size != 0 {
		if err := st.ResizeVolume(ctx, name, c.Size); err != nil {
			return v, fmt.Errorf("resize volume %q: %w", name, err)
		}
		vhosts, rings := t.attachments()
		vhosts.resized(name)
		rings.resized(name)
	}
	if thn != v.THN {
		if err := st.SetSharing(ctx, name, thn); err != nil {
			return v, fmt.Errorf("change deduplication of volume %q: %w", name, err)
		}
	}
	if c.Scan != "" {
		if !slices.Contains(scanActions, c.Scan) {
			return v, control.NewError(control.KindInvalid, fmt.Sprintf("a scan cannot be made to %q", c.Scan), "")
		}
		if err := st.Scan(ctx, name, c.Scan); err != nil {
			return v, err
		}
	}
	if c.Rename != "" && c.Rename != name {
		if err := st.RenameVolume(ctx, name, c.Rename); err != nil {
			return v, fmt.Errorf("rename volume %q: %w", name, err)
		}
		t.volumesChanged()
		name = c.Rename
	}
	return g.volume(ctx, name)
}

// deleteVolume deletes, and then ends connections: the name is not found any
// more by then, so that no new one comes.
func (g *Guest) deleteVolume(ctx context.Context, name string) error {
	t, st, _, err := g.find(name)
	if err != nil {
		return err
	}
	if err := t.unused(name, ""); err != nil {
		return err
	}
	if err := st.DeleteVolume(ctx, name); err != nil {
		return fmt.Errorf("delete volume %q: %w", name, err)
	}
	t.volumesChanged() // machines and rings that came in between are cut, and refused from now on
	t.mu.Lock()
	srv := t.server
	t.mu.Unlock()
	if srv != nil {
		ctx, cancel := context.WithTimeout(ctx, grace)
		defer cancel()
		_ = srv.CloseExport(ctx, name) // clients that came in between are cut
	}
	return nil
}

func (g *Guest) pools(context.Context) ([]control.Pool, error) {
	out := []control.Pool{}
	for _, t := range g.all() {
		st := t.open()
		if st == nil {
			continue
		}
		var s control.GuestStatus
		g.describe(&s, t)
		out = append(out, control.Pool{
			Name: st.Name(), ID: st.Region().Pool.String(), Guest: t.identity, ServedBy: g.opt.Name, State: "open",
			Stats: t.stats(st), Devices: s.Devices, Volumes: len(st.Volumes()),
		})
	}
	return out, nil
}

// createPool makes the pool of an identity that this guest holds without one.
// The devices are in the settings already; the agent put them there.
func (g *Guest) createPool(ctx context.Context, c control.PoolCreate) (control.Pool, error) {
	t := g.tenant(c.Guest)
	if t == nil || t.isGone() || t.open() != nil {
		return control.Pool{}, control.NewError(control.KindRefused, fmt.Sprintf("%s has a pool already, or is not served by guest %s", c.Guest, g.opt.Name), "")
	}
	set := *g.settings(c.Guest)
	set.Pool.Name, set.Pool.Copies = c.Name, max(c.Copies, 1)
	devs, _, err := g.openDevices(&set, nil, func(d hpdi.Device) { _ = d.Close() })
	if err == nil {
		devs, err = g.create(ctx, &set, devs)
	}
	if err != nil {
		closeAll(devs)
		return control.Pool{}, err
	}
	return g.take(ctx, t, &set, devs)
}

// take opens the pool of an identity that is served without one.
func (g *Guest) take(ctx context.Context, t *tenancy, set *config.Guest, devs []hpdi.Device) (control.Pool, error) {
	st, err := g.opt.Storage.Open(t.ctx, g.openSpec(t, set, devs, nil, withoutRecord(errNew)))
	if err != nil {
		return control.Pool{}, err
	}
	t.mu.Lock()
	if t.gone || t.store != nil {
		t.mu.Unlock()
		return control.Pool{}, errors.Join(control.NewError(control.KindUnavailable, t.identity+" moved meanwhile", "try again"), st.Release())
	}
	t.store, t.devices, t.exported = st, devs, ""
	t.mu.Unlock()
	g.begin(t)
	t.volumesChanged()
	g.step(partner.Message{Kind: partner.KindOpened, Identity: t.identity, Term: t.term, Region: st.Region()})
	return g.poolOf(ctx, t.identity)
}

func (g *Guest) poolOf(ctx context.Context, id string) (control.Pool, error) {
	all, err := g.pools(ctx)
	for _, p := range all {
		if p.Guest == id {
			return p, nil
		}
	}
	return control.Pool{}, errors.Join(err, fmt.Errorf("pool of %s: %w", id, block.ErrNotFound))
}

// serving returns the tenancy and the store of an open pool.
func (g *Guest) serving(pool string) (*tenancy, Store, error) {
	for _, t := range g.all() {
		if st := t.open(); st != nil && st.Name() == pool {
			return t, st, nil
		}
	}
	return nil, nil, control.NewError(control.KindNotFound, fmt.Sprintf("guest %s has no open pool %q", g.opt.Name, pool), "see `pollux pool list`")
}

func (g *Guest) check(ctx context.Context) (control.CheckReport, error) {
	r := control.CheckReport{OK: true, Online: true, Pools: []control.PoolCheck{}}
	for _, t := range g.all() {
		st := t.open()
		if st == nil {
			continue
		}
		began := time.Now()
		p, err := st.Check(ctx)
		if err != nil {
			return r, fmt.Errorf("check pool %s: %w", st.Name(), err)
		}
		p.Pool, p.Guest, p.Took = st.Name(), t.identity, control.Duration(time.Since(began))
		p.OK = len(p.Problems) == 0
		r.OK = r.OK && p.OK
		r.Pools = append(r.Pools, p)
	}
	return r, nil
}

// checking tells how far the checks under way have come.
func (g *Guest) checking(context.Context) ([]control.CheckProgress, error) {
	all := []control.CheckProgress{}
	for _, t := range g.all() {
		st := t.open()
		if st == nil {
			continue
		}
		if p, ok := st.Checking(); ok {
			p.Pool, p.Guest = st.Name(), t.identity
			all = append(all, p)
		}
	}
	return all, nil
}

// measure fills in what memory the guest takes.
func (g *Guest) measure(s *control.GuestStatus) {
	m := &s.Memory
	m.Resident, m.Shared = resident()
	m.Anonymous = m.Resident - m.Shared
	m.Limit, m.Cache = g.opt.Plan.Limit, g.opt.Plan.Cache
	m.Heap = heap()
	m.Parts = g.opt.Plan.used(*m, s.PoolStats)
}

// resident is the process's memory, shared mappings included, and these alone,
// in bytes.
func resident() (all, shared int64) {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, 0
	}
	f := strings.Fields(string(b))
	if len(f) < 3 {
		return 0, 0
	}
	pages, _ := strconv.ParseInt(f[1], 10, 64)
	mapped, _ := strconv.ParseInt(f[2], 10, 64)
	return pages * int64(os.Getpagesize()), mapped * int64(os.Getpagesize())
}

func heap() int64 {
	s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(s)
	if s[0].Value.Kind() != metrics.KindUint64 {
		return 0
	}
	return int64(s[0].Value.Uint64())
}
