package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/export/nbd"
	"github.com/pollux-storage/pollux/internal/identity"
	"github.com/pollux-storage/pollux/internal/mirror"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/restart"
)

// grace is how long clients' requests in flight may take at a handover.
const grace = 200 * time.Millisecond

// closeGrace is how long those of virtual machines and rings may take where the pool is
// closed, which forgets what is known of them: a change that is cut then ends with an error
// in the machine, for nobody could tell whether it was made, and is made again for a ring.
const closeGrace = 5 * time.Second

// tenancy is an identity that this guest holds: its open pool, if it has one,
// and the server that its clients talk to.
type tenancy struct {
	identity string
	term     uint64
	ctx      context.Context // ends when the pool is given up
	cancel   context.CancelFunc
	wg       sync.WaitGroup // of everything that uses the store but the heart
	still    chan struct{}  // closed to stop the heart
	heart    sync.WaitGroup

	mu      sync.Mutex      // guards what follows
	store   Store           // nil when the identity has no pool
	record  *restart.Record // that it was opened by
	devices []hpdi.Device
	keepers map[hpdi.Device]*keeper // of devices
	removed []string                // paths of devices that the pool has no more
	server  *nbd.Server
	vhosts  *sockets // of virtual machines
	rings   *sockets
	gone    bool // given up; store and devices are closed or being closed
	steps   []partner.Step

	left     chan struct{} // closed when it has been given up
	exported string        // name of the pool that was exported from under it
}

func newTenancy(identity string, term uint64) *tenancy {
	ctx, cancel := context.WithCancel(context.Background())
	return &tenancy{identity: identity, term: term, ctx: ctx, cancel: cancel, still: make(chan struct{}), left: make(chan struct{})}
}

// keeper is what looks after a device of an open pool.
type keeper struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// disks returns the devices.
func (t *tenancy) disks() []hpdi.Device {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.devices
}

// stopwatch collects timed steps.
type stopwatch struct {
	at    time.Time
	steps []partner.Step
}

func (s *stopwatch) lap(name string) {
	now := time.Now()
	s.steps = append(s.steps, partner.Step{Name: name, Took: now.Sub(s.at)})
	s.at = now
}

// open takes the locks of an identity's devices and opens its pool.
func (g *Guest) open(a partner.Action, since time.Time) {
	w := &stopwatch{at: since}
	name := "start"
	switch {
	case a.Message.Basis == partner.BasisFenced:
		name = "fence"
	case a.Message.Basis == partner.BasisReleased:
		name = "release"
	case a.Message.Basis == partner.BasisRestart, a.Message.Basis == partner.BasisLate:
		name = "restart"
	}
	w.lap(name)
	t, err := g.openTenancy(a, w)
	if err != nil {
		g.log.Error("open failed", "identity", a.Identity, "error", err)
		g.step(partner.Message{Kind: partner.KindOpenFailed, Identity: a.Identity, Term: a.Term, Reason: err.Error(), Steps: w.steps})
		return
	}
	t.steps = w.steps
	m := partner.Message{Kind: partner.KindOpened, Identity: a.Identity, Term: a.Term}
	if t.store != nil {
		m.Region = t.store.Region()
	}
	g.mu.Lock()
	g.tenants[a.Identity] = t
	closing := g.closing
	g.mu.Unlock()
	if closing {
		_ = g.leave(t, Store.Release)
		return
	}
	g.begin(t)
	g.step(m)
}

func (g *Guest) openTenancy(a partner.Action, w *stopwatch) (*tenancy, error) {
	cfg := g.effective()
	set := cfg.Guest(a.Identity)
	if set == nil {
		return nil, fmt.Errorf("there are no settings for %s", a.Identity)
	}
	t := newTenancy(a.Identity, a.Term)
	var removed []hpdi.Device // as far as their labels tell
	record, why := usableRecord(cfg, set)
	devs, fresh, err := g.openDevices(set, record, func(d hpdi.Device) { removed = append(removed, d) })
	if err != nil {
		t.cancel()
		return nil, err
	}
	w.lap("lock devices")
	if record != nil {
		if changed := g.replaced(record); changed != "" {
			record, why = nil, errors.New(changed)
		}
	}
	if len(devs) == 0 {
		closeAll(removed)
		return t, nil // no pool yet
	}
	if fresh && !a.Takeover {
		devs, err = g.create(t.ctx, set, devs)
		w.lap("create pool")
	} else if devs, err = g.withoutCandidate(set, devs); err == nil {
		err = g.adopt(set, devs)
	}
	if err == nil {
		t.devices = slices.Clone(devs)
		without := Opened{}
		if record == nil {
			without = withoutRecord(why)
		}
		spec := g.openSpec(t, set, devs, record, without)
		spec.LeftOut = func(d hpdi.Device) {
			t.devices = slices.DeleteFunc(t.devices, func(x hpdi.Device) bool { return x == d })
			g.leftOut(a.Identity, d)
		}
		t.store, err = g.opt.Storage.Open(t.ctx, spec)
		devs = nil // the store's now, or closed
		if t.record = record; err == nil {
			g.tellOpened(t, spec.Tell)
		}
	}
	for _, d := range removed {
		if err != nil {
			_ = d.Close() // the store may want it
		} else if err := g.discard(d); err != nil {
			g.log.Warn("a device that was removed is not blank", "device", d.Info().Name, "error", err)
		}
	}
	if err != nil {
		closeAll(devs)
		if set.Pool.Manual && errors.Is(err, ErrNoPool) {
			t.devices = nil
			return t, nil // a pool that is yet to be made
		}
		t.cancel()
		return nil, err
	}
	w.steps = append(w.steps, t.store.Steps()...)
	w.at = time.Now()
	return t, nil
}

// openSpec says how the pool of a tenancy is opened.
func (g *Guest) openSpec(t *tenancy, set *config.Guest, devs []hpdi.Device, record *restart.Record, without Opened) OpenSpec {
	i := set.Pool.Import
	return OpenSpec{
		Identity: t.identity, Owner: g.opt.Name, Devices: devs, RegionPath: g.cfg.RegionPath(t.identity), Restart: record, Without: without,
		AcceptLoss: set.Pool.AcceptLoss || i != nil && i.AcceptLoss, BatteryBacked: set.Pool.BatteryBacked,
		Tell: g.teller(t.ctx, t.identity), Removed: func(d hpdi.Device) { g.removed(t, d) },
	}
}

// create makes the identity's pool on devices that hold nothing, and returns the
// devices that it is made of: where it keeps copies they are mirrors. After an
// error those that are left are to be closed.
func (g *Guest) create(ctx context.Context, set *config.Guest, devs []hpdi.Device) ([]hpdi.Device, error) {
	for _, d := range devs {
		if err := blank(d); err != nil {
			return devs, err
		}
	}
	if len(mirrors(devs)) == 0 {
		var err error
		if devs, err = makeMirrors(devs, set.Pool.Copies, g.memory(&set.Pool)); err != nil {
			return nil, err
		}
	}
	return devs, g.opt.Storage.Create(ctx, CreateSpec{Name: set.Pool.Name, Identity: set.Name, Devices: devs, LogBytes: int64(g.cfg.Log)})
}

// openDevices opens the identity's devices under their locks. Locks that a
// killed guest's last I/O still holds are waited for. Devices whose removal has
// taken their label are not among them: the caller gets, and closes, them. Fresh says that a
// pool may be made of them: it never was, and no device belongs to one.
func (g *Guest) openDevices(set *config.Guest, record *restart.Record, removed func(hpdi.Device)) (devs []hpdi.Device, fresh bool, err error) {
	deadline := time.Now().Add(g.cfg.Failover.FenceTimeout)
	known := knownOf(record)
	var lacks error
	devs, err = disks(&set.Pool, opening{
		open: func(path string) (hpdi.Device, error) { return g.openOne(path, deadline, known[path]) },
		without: func(path string, why error) {
			g.log.Warn("the pool goes on without a copy", "identity", set.Name, "device", path, "error", why)
			lacks = fmt.Errorf("device %s: %w", path, why)
		},
		mirrors: g.memory(&set.Pool),
		removed: removed,
	})
	if err == nil && lacks != nil && set.Pool.Create {
		closeAll(devs)
		err = fmt.Errorf("a pool is to be made, and a device cannot be used or its making was interrupted: %w", lacks)
	}
	if err != nil {
		return nil, false, fmt.Errorf("devices of %s: %w", set.Name, err)
	}
	fresh = set.Pool.Create // else it does not matter, and costs a read
	for _, d := range devs {
		if fresh {
			_, err := g.opt.Storage.Label(d)
			fresh = errors.Is(err, ErrNoPool)
		}
	}
	return devs, fresh, nil
}

func (g *Guest) leftOut(identity string, d hpdi.Device) {
	g.log.Warn("device is no part of the pool, its addition was interrupted: add it again with `pollux pool add`", "identity", identity, "device", d.Info().Name)
}

// withoutCandidate leaves out a device whose addition was begun and did not
// come as far as a whole label.
func (g *Guest) withoutCandidate(set *config.Guest, devs []hpdi.Device) ([]hpdi.Device, error) {
	candidate := set.Pool.Candidate()
	if len(candidate) == 0 || len(devs) < 2 {
		return devs, nil
	}
	i := slices.IndexFunc(devs, func(d hpdi.Device) bool { return isOf(d, candidate) })
	if i < 0 {
		return devs, nil
	}
	if _, err := g.opt.Storage.Label(devs[i]); errors.Is(err, ErrNoPool) || errors.Is(err, block.ErrCorrupt) {
		d := devs[i]
		g.leftOut(set.Name, d)
		return slices.Delete(devs, i, i+1), d.Close()
	}
	return devs, nil
}

// isOf tells whether a device is what was opened by some paths: one by itself, or
// several together.
func isOf(d hpdi.Device, paths []string) bool {
	if m, ok := d.(*mirror.Mirror); ok {
		return slices.ContainsFunc(m.Status().Copies, func(c mirror.CopyStatus) bool { return slices.Contains(paths, c.Info.Name) })
	}
	return slices.Contains(paths, d.Info().Name)
}

func closeAll(devs []hpdi.Device) {
	for _, d := range devs {
		_ = d.Close() // nothing was written through it
	}
}

// blank refuses a device that holds something, as far as its beginning shows.
func blank(d hpdi.Device) error {
	q, err := d.NewQueue(1)
	if err != nil {
		return err
	}
	buf, err := hpdi.AllocPrivate(min(64<<10, int(d.Info().Size)))
	if err != nil {
		return errors.Join(err, q.Close())
	}
	defer func() { _ = hpdi.Free(buf) }()
	err = errors.Join(hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{buf}}), q.Close())
	if err != nil {
		return err
	}
	if slices.ContainsFunc(buf, func(b byte) bool { return b != 0 }) {
		return fmt.Errorf("device %s holds something that is not Pollux's: empty its first 64 KiB if it is not needed, or name another device: %w", d.Info().Name, block.ErrExists)
	}
	return nil
}

// begin starts what keeps an open pool going.
func (g *Guest) begin(t *tenancy) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.store == nil || t.gone {
		return
	}
	t.wg.Go(func() {
		err := t.store.Run(t.ctx)
		if t.ctx.Err() != nil {
			return
		}
		if err == nil {
			err = errors.New("its consistency points ended")
		}
		if untrue := (*pool.RecordError)(nil); errors.As(err, &untrue) {
			g.forgetRecord(t.identity)
		}
		g.log.Error("pool stopped", "identity", t.identity, "error", err)
		g.wg.Go(func() { g.lose(t, err) })
	})
	record := t.record
	t.wg.Go(func() { g.keepRecord(t, record) })
	t.heart.Go(func() { g.beat(t) })
	t.wg.Go(func() { g.guard(t) })
	t.wg.Go(func() { g.watchHeart(t) })
	t.keepers = map[hpdi.Device]*keeper{}
	for _, d := range t.devices {
		g.careLocked(t, d)
	}
}

// careLocked starts what looks after a device of an open pool, until the pool is given
// up or the device removed.
func (g *Guest) careLocked(t *tenancy, d hpdi.Device) {
	ctx, cancel := context.WithCancel(t.ctx)
	k := &keeper{cancel: cancel}
	t.keepers[d] = k
	for _, l := range looks(d) {
		k.wg.Go(func() { g.watchDevice(ctx, t.identity, l) })
	}
	if m, ok := d.(*mirror.Mirror); ok {
		k.wg.Go(func() { keepMirror(ctx, m, int64(g.cfg.Resilver.Rate), g.log.With("identity", t.identity)) })
	}
	t.wg.Go(k.wg.Wait)
}

// serve accepts the clients of an identity. It is called by the loop.
func (g *Guest) serve(a partner.Action) {
	t := g.tenant(a.Identity)
	if t == nil || t.term != a.Term {
		return // lost meanwhile
	}
	w := &stopwatch{at: time.Now()}
	if err := g.startServer(t); err != nil {
		g.log.Error("serve failed", "identity", a.Identity, "error", err)
		g.wg.Go(func() { g.lose(t, err) })
		return
	}
	w.lap("serve")
	steps := append(t.steps, w.steps...)
	since := g.noticed[a.Identity]
	g.record(a, since, steps)
	g.m.Step(partner.Message{Kind: partner.KindServeDone, Identity: a.Identity, Term: a.Term, Steps: steps, Since: since.UnixNano()})
}

// record keeps what was taken over, for status without the agent.
func (g *Guest) record(a partner.Action, since time.Time, steps []partner.Step) {
	total := time.Since(since)
	g.log.Info("serving", "identity", a.Identity, "after", total, "steps", stepText(steps))
	if a.Identity == g.opt.Name {
		return
	}
	t := &control.Takeover{Of: a.Identity, By: g.opt.Name, Kind: control.KindTakeover, Started: since, Total: control.Duration(total)}
	for _, s := range steps {
		t.Steps = append(t.Steps, control.Step{Name: s.Name, Took: control.Duration(s.Took)})
	}
	g.mu.Lock()
	g.last = t
	g.mu.Unlock()
}

// stepText lists steps for the log: a start of one's own is shown nowhere else.
func stepText(steps []partner.Step) string {
	parts := make([]string, len(steps))
	for i, s := range steps {
		parts[i] = fmt.Sprintf("%s: %s", s.Name, s.Took.Round(time.Microsecond))
	}
	return strings.Join(parts, ", ")
}

func (g *Guest) startServer(t *tenancy) error {
	srv, err := g.newServer(t)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(g.opt.Sockets, func(s *identity.Sockets) bool { return s.Name == t.identity })
	if i < 0 {
		return fmt.Errorf("there are no sockets of %s", t.identity)
	}
	lns, err := g.opt.Sockets[i].Listeners()
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.gone {
		for _, l := range lns {
			_ = l.Close()
		}
		return nil // released before it served
	}
	t.server, t.vhosts, t.rings = srv, newVhosts(g.cfg, t.identity, g.log), newRings(g.cfg, t.identity, g.log)
	for _, l := range lns {
		t.wg.Go(func() { g.accept(t, srv, l) })
	}
	t.vhosts.begin(t.store, &t.wg)
	t.rings.begin(t.store, &t.wg)
	return nil
}

// volumesChanged brings the sockets of virtual machines and rings in line with the volumes.
func (t *tenancy) volumesChanged() {
	vhosts, rings := t.attachments()
	if st := t.open(); vhosts != nil && st != nil {
		vhosts.sync(st)
		rings.sync(st)
	}
}

// attachments returns the sockets of virtual machines and those of rings, nil before there
// are any.
func (t *tenancy) attachments() (vhosts, rings *sockets) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.vhosts, t.rings
}

func (g *Guest) accept(t *tenancy, srv *nbd.Server, l net.Listener) {
	err := srv.Serve(t.ctx, l)
	_ = l.Close()
	if err != nil && !errors.Is(err, nbd.ErrServerClosed) && t.ctx.Err() == nil {
		g.log.Error("server ended", "identity", t.identity, "error", err)
		g.wg.Go(func() { g.lose(t, err) })
	}
}

// leave ends the tenancy: clients first, within the grace, then everything
// that uses the store, then end, which gives the store up. The heart beats until
// then: a device that is slow to end a consistency point is no reason for the
// partner to fence this guest. Who comes second waits for the first.
func (g *Guest) leave(t *tenancy, end func(Store) error) error {
	return g.leaveWithin(t, grace, end)
}

// leaveWithin is leave with another grace for virtual machines and rings.
func (g *Guest) leaveWithin(t *tenancy, attachedGrace time.Duration, end func(Store) error) error {
	t.mu.Lock()
	if t.gone {
		t.mu.Unlock()
		<-t.left
		return nil
	}
	t.gone = true
	defer close(t.left)
	srv, vhosts, rings := t.server, t.vhosts, t.rings
	t.mu.Unlock()
	if srv != nil {
		ctx, cancel := context.WithTimeout(context.Background(), grace)
		var detached sync.WaitGroup
		for _, h := range []*sockets{vhosts, rings} {
			detached.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), attachedGrace)
				defer cancel()
				h.close(ctx)
			})
		}
		if err := srv.Shutdown(ctx); err != nil {
			g.log.Info("clients were cut", "identity", t.identity, "error", err)
		}
		detached.Wait()
		cancel()
	}
	t.cancel()
	t.wg.Wait()
	close(t.still)
	t.heart.Wait()
	// It is known until then, so that who is asked to release it waits.
	defer func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.tenants[t.identity] == t {
			delete(g.tenants, t.identity)
		}
	}()
	if t.store == nil {
		return nil
	}
	return end(t.store)
}

// release hands an identity over.
func (g *Guest) release(a partner.Action) {
	w := &stopwatch{at: time.Now()}
	since := w.at
	if t := g.tenant(a.Identity); t != nil {
		if err := g.leave(t, Store.Release); err != nil {
			g.die(fmt.Errorf("release %s: %w", a.Identity, err))
			return
		}
	}
	w.lap("release")
	g.log.Info("released", "identity", a.Identity, "after", time.Since(since))
	g.step(partner.Message{Kind: partner.KindReleaseDone, Identity: a.Identity, Term: a.Term, Steps: w.steps, Since: since.UnixNano()})
}

// lose gives up an identity whose pool or server ended by itself.
func (g *Guest) lose(t *tenancy, why error) {
	if err := g.leave(t, Store.Release); err != nil {
		g.die(fmt.Errorf("give up %s: %w", t.identity, err))
		return
	}
	g.step(partner.Message{Kind: partner.KindLost, Identity: t.identity, Term: t.term, Reason: why.Error()})
}

// die ends the guest at once, when it cannot let go of a pool otherwise: the
// end of the process is the fence, and the partner takes over.
func (g *Guest) die(err error) {
	g.post(func() {
		if g.fatal == nil {
			g.fatal = err
		}
		g.stop()
	})
}

// closeAll ends the guest's pools cleanly.
func (g *Guest) closeAll() error {
	g.mu.Lock()
	g.closing = true
	g.mu.Unlock()
	var errs []error
	for _, t := range g.all() {
		errs = append(errs, g.leaveWithin(t, closeGrace, func(s Store) error {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			return s.Close(ctx)
		}))
	}
	return errors.Join(errs...)
}

func (g *Guest) tenant(identity string) *tenancy {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.tenants[identity]
}

// all returns the tenancies in the order of the settings.
func (g *Guest) all() []*tenancy {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []*tenancy
	for _, s := range g.cfg.Guests {
		if t := g.tenants[s.Name]; t != nil {
			out = append(out, t)
		}
	}
	return out
}

// settings returns those of an identity as they are now: devices may have
// been added since the start.
func (g *Guest) settings(identity string) *config.Guest { return g.effective().Guest(identity) }

// effective returns all settings as they are now.
func (g *Guest) effective() *config.Config {
	cfg, err := config.ReadEffective(g.cfg.Dir)
	if err != nil {
		g.log.Warn("settings of the start are used", "error", err)
		cfg = g.cfg
	}
	return cfg
}
