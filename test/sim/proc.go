package sim

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/mirror"
	"github.com/pollux-storage/pollux/internal/partner"
	spool "github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/region"
)

// tick is how often a guest looks at its partner and shows that it lives.
const tick = 20 * time.Millisecond

// cacheBytes is small, so that reads often go to the devices.
const cacheBytes = 1 << 20

// proc is one run of a guest.
type proc struct {
	w      *World
	name   string
	inc    uint64
	m      *partner.Machine
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // of everything that product code runs in

	dead   atomic.Bool
	reaped bool
	hung   bool
	frozen []*event // what would have happened while it hung
	killIn int64    // counted operations until it dies; 0 for never
	skew   time.Duration
	jumped time.Duration // all jumps of its clock, either way

	handles []*handle
	tenants map[string]*tenant
	watches map[string]*region.Region
	alerts  map[string]string
	line    line
}

// tenant is an identity that a guest holds, with its open pool.
type tenant struct {
	identity string
	term     uint64
	pool     *spool.Pool // nil until it is open
	mirrors  []*mirror.Mirror
	devs     []hpdi.Device // that it was opened with
	ctx      context.Context
	cancel   context.CancelFunc
	wg       sync.WaitGroup // of the pool's Run and of requests
	serving  bool
	lacks    bool        // a disk was missing when the pool was opened
	gone     bool        // being given up
	still    bool        // its heart has stopped
	closed   atomic.Bool // its region is unmapped

	beaten    time.Time // the last heartbeat
	wasSilent time.Time // the last one that followed a long silence
}

func (w *World) spawn(g string) {
	w.incs(g)
	ctx, cancel := context.WithCancel(context.Background())
	p := &proc{w: w, name: g, inc: w.host.incs[g], ctx: ctx, cancel: cancel,
		tenants: map[string]*tenant{}, watches: map[string]*region.Region{}, alerts: map[string]string{}}
	p.line.p = p
	cfg := w.opt.Machine
	cfg.Self, cfg.Partner, cfg.Inc = g, w.other(g), p.inc
	p.m = partner.New(cfg, time.Now())
	w.procs[g] = p
	w.olds = append(w.olds, p)
	w.log("%s#%d starts", g, p.inc)
	p.tick()
}

func (w *World) incs(g string) { w.host.incs[g]++ }

// count counts an operation of p, and ends p when it was to be its last.
func (w *World) count(p *proc, what string) {
	w.ops++
	if p.dead.Load() {
		return
	}
	w.log("%s#%d: %s", p.name, p.inc, what)
	if p.killIn > 0 {
		if p.killIn--; p.killIn == 0 {
			w.kill(p, "dies at a counted operation")
		}
	}
}

// tick is the guest's loop waking up.
func (p *proc) tick() {
	p.advance()
	p.carryOut()
	for _, id := range sortedKeys(p.tenants) {
		t := p.tenants[id]
		if t.pool == nil || t.still {
			continue
		}
		if t.gone || t.pool.Probe(p.ctx) == nil {
			t.pool.Region().Beat()
			if time.Since(t.beaten) > p.w.opt.Machine.HangTimeout/2 {
				t.wasSilent = time.Now()
			}
			t.beaten = time.Now()
		}
	}
	p.w.after(tick, p, "", p.tick)
}

// time is the guest's clock, which may jump.
func (p *proc) time() time.Time { return time.Now().Add(p.skew) }

func (p *proc) advance() {
	for _, id := range sortedKeys(p.watches) {
		p.m.Step(partner.Message{Kind: partner.KindBeat, Identity: id, Beat: p.watches[id].Heartbeat()})
	}
	p.m.Tick(p.time())
}

// input gives the machine a message and does what it wants then.
func (p *proc) input(m partner.Message) {
	p.advance()
	p.m.Step(m)
	p.carryOut()
}

func (p *proc) carryOut() {
	for !p.dead.Load() {
		acts := p.m.Ready()
		if len(acts) == 0 {
			return
		}
		for _, a := range acts {
			if !p.dead.Load() {
				p.act(a)
			}
		}
	}
}

func (p *proc) act(a partner.Action) {
	w := p.w
	if a.Do != partner.DoSend {
		w.log("%s#%d> %s", p.name, p.inc, a)
	}
	switch a.Do {
	case partner.DoSend:
		p.line.toHost(a.Message)
	case partner.DoMap:
		p.mapRegion(a)
	case partner.DoUnmap:
		if r := p.watches[a.Identity]; r != nil {
			_ = r.Close()
			delete(p.watches, a.Identity)
		}
	case partner.DoOpen:
		p.open(a)
	case partner.DoServe:
		if t := p.tenants[a.Identity]; t != nil && t.term == a.Term && !t.gone {
			t.serving = true
			p.m.Step(partner.Message{Kind: partner.KindServeDone, Identity: a.Identity, Term: a.Term})
		}
	case partner.DoRelease:
		p.release(a.Identity, partner.Message{Kind: partner.KindReleaseDone, Identity: a.Identity, Term: a.Term}, (*spool.Pool).Release)
	case partner.DoStop:
		p.stop()
	case partner.DoRaise:
		p.alerts[a.Key] = a.Text
	case partner.DoClear:
		delete(p.alerts, a.Key)
	}
}

func (p *proc) mapRegion(a partner.Action) {
	done := partner.Message{Kind: partner.KindMapDone, Identity: a.Identity, Term: a.Term}
	r, err := region.Open(a.Region.Path, true)
	if err == nil && r.Header().Pool != a.Region.Pool {
		err = errors.Join(errors.New("it is of another pool"), r.Close())
	}
	if err != nil {
		done.Reason = err.Error()
	} else {
		p.watches[a.Identity] = r
		done.Beat = r.Heartbeat()
	}
	p.m.Step(done)
}

// open takes the locks of an identity's disks and opens its pool.
func (p *proc) open(a partner.Action) {
	w := p.w
	pl := w.pools[a.Identity]
	w.acts(p, a.Identity)
	ctx, cancel := context.WithCancel(p.ctx)
	t := &tenant{identity: a.Identity, term: a.Term, ctx: ctx, cancel: cancel}
	p.tenants[a.Identity] = t
	p.wg.Go(func() {
		wanted := pl.wanted()
		t.lacks = len(wanted) < len(pl.disks)+len(pl.candidate)
		devs, err := p.lock(pl, wanted)
		var q *spool.Pool
		if err == nil {
			if devs, err = pl.gather(devs, wanted); err == nil {
				devs = pl.members(devs)
			}
		}
		var ms []*mirror.Mirror
		if err == nil {
			for _, d := range devs {
				if m, ok := d.(*mirror.Mirror); ok {
					ms = append(ms, m)
				}
			}
			q, err = p.openPool(ctx, pl, spool.OpenOptions{
				Devices: devs, RegionPath: pl.path, CacheBytes: cacheBytes, Owner: p.name,
				BatteryBacked: pl.battery, Interval: w.opt.Interval, Cleaner: w.opt.Cleaner, Transfer: spool.TransferOptions{Wait: 20 * time.Millisecond}, BootID: fmt.Sprint("boot", w.boot),
				Fingerprint: w.fingerprint(),
			})
			if err != nil {
				for _, d := range devs {
					_ = d.Close()
				}
			}
		}
		w.post(nil, func() {
			t.mirrors, t.devs = ms, devs
			p.opened(t, q, err)
		})
	})
}

// opened takes in what opening a pool came to.
func (p *proc) opened(t *tenant, q *spool.Pool, err error) {
	w := p.w
	if p.dead.Load() {
		p.wg.Go(func() { t.abandon(q) })
		return
	}
	if p.hung {
		p.freeze(func() { p.opened(t, q, err) })
		return
	}
	m := partner.Message{Kind: partner.KindOpened, Identity: t.identity, Term: t.term}
	if err != nil {
		w.log("%s#%d cannot open %s: %v", p.name, p.inc, t.identity, err)
		w.pools[t.identity].refused(err, t.lacks)
		delete(p.tenants, t.identity)
		w.ceases(p, t.identity)
		m.Kind, m.Reason = partner.KindOpenFailed, err.Error()
		p.input(m)
		return
	}
	t.pool = q
	r := q.Region()
	m.Region = partner.Region{Path: r.Path(), Pool: q.ID(), Bytes: r.Header().Size}
	w.adopted(p, t)
	t.wg.Go(func() {
		err := q.Run(t.ctx)
		if t.ctx.Err() == nil {
			w.post(p, func() { p.lost(t, err) })
		}
	})
	for _, m := range t.mirrors {
		t.wg.Go(func() { keep(t.ctx, m) })
	}
	t.wg.Go(func() { p.keepRecord(t.ctx, w.pools[t.identity], q, t.devs) })
	p.input(m)
}

// lock takes the locks of all disks of a pool that are wanted, for at most as long as the
// agent's fence may take.
func (p *proc) lock(pl *pool, wanted []*disk) ([]hpdi.Device, error) {
	var devs []hpdi.Device
	end := time.Now().Add(10 * time.Second)
	for _, d := range wanted {
		for {
			got := make(chan *handle, 1)
			gone := false
			p.w.post(nil, func() {
				if gone = d.gone && pl.copies > 1; gone {
					got <- nil
					return
				}
				got <- d.open(p)
			})
			if h := <-got; h != nil {
				devs = append(devs, h)
				break
			}
			if gone {
				break
			}
			if p.dead.Load() || time.Now().After(end) {
				for _, h := range devs {
					_ = h.Close()
				}
				return nil, fmt.Errorf("device %s: %w", d.name, hpdi.ErrLocked)
			}
			time.Sleep(time.Millisecond)
		}
	}
	return devs, nil
}

// lost gives up an identity whose pool has stopped by itself.
func (p *proc) lost(t *tenant, err error) {
	p.w.log("%s#%d: the pool of %s stopped: %v", p.name, p.inc, t.identity, err)
	if untrue := (*spool.RecordError)(nil); errors.As(err, &untrue) {
		pl := p.w.pools[t.identity]
		pl.memoryMu.Lock()
		pl.record = nil
		pl.memoryMu.Unlock()
	}
	p.release(t.identity, partner.Message{Kind: partner.KindLost, Identity: t.identity, Term: t.term, Reason: fmt.Sprint(err)}, (*spool.Pool).Release)
}

// release gives an identity up and then says so.
func (p *proc) release(id string, done partner.Message, end func(*spool.Pool, context.Context) error) {
	w := p.w
	t := p.tenants[id]
	if t == nil || t.pool == nil {
		delete(p.tenants, id)
		w.ceases(p, id)
		w.after(0, p, "", func() { p.input(done) })
		return
	}
	if t.gone {
		return
	}
	p.leave(t)
	p.wg.Go(func() {
		t.wg.Wait()
		p.quiet(t)
		err := end(t.pool, context.Background())
		t.closed.Store(true)
		w.post(p, func() {
			if err != nil {
				w.kill(p, fmt.Sprintf("cannot let go of %s: %v", id, err))
				return
			}
			delete(p.tenants, id)
			w.ceases(p, id)
			p.input(done)
		})
	})
}

// leave cuts a tenant's clients and ends its goroutines.
func (p *proc) leave(t *tenant) {
	t.gone, t.serving = true, false
	p.w.unserved(t)
	t.cancel()
}

// quiet stops a tenant's heart: nobody may touch its region while it is closed.
func (p *proc) quiet(t *tenant) {
	done := make(chan struct{})
	p.w.post(nil, func() {
		t.still = true
		close(done)
	})
	<-done
}

// stop ends the guest cleanly.
func (p *proc) stop() {
	w := p.w
	left := len(p.tenants)
	end := func() {
		if left--; left <= 0 {
			w.kill(p, "ended by itself")
		}
	}
	if left == 0 {
		left = 1
		end()
		return
	}
	for _, id := range sortedKeys(p.tenants) {
		t := p.tenants[id]
		if t.pool == nil || t.gone {
			end()
			continue
		}
		p.leave(t)
		p.wg.Go(func() {
			t.wg.Wait()
			p.quiet(t)
			err := t.pool.Close(p.ctx)
			t.closed.Store(true)
			w.post(p, func() {
				if err != nil {
					w.log("%s#%d: close of %s: %v", p.name, p.inc, id, err)
				}
				t.pool = nil
				end()
			})
		})
	}
}

// kill ends a guest at once.
func (w *World) kill(p *proc, why string) {
	if p.dead.Load() {
		return
	}
	w.log("%s#%d %s", p.name, p.inc, why)
	p.dead.Store(true)
	for _, id := range sortedKeys(p.tenants) {
		t := p.tenants[id]
		w.unserved(t)
		if t.pool != nil && !t.closed.Load() {
			if err := privatise(t.pool.Region()); err != nil {
				w.violate("private copy of the region of %s: %v", id, err)
			}
			if !t.gone {
				p.wg.Go(func() {
					t.wg.Wait()
					t.abandon(t.pool)
				})
			}
		}
		if t.pool != nil && !t.closed.Load() {
			w.scribble(id)
			w.blotch(id)
			w.smear(id)
		}
	}
	p.cancel()
	for _, h := range p.handles {
		if !h.orphan && (!h.closed || len(h.flying) > 0) {
			h.desert()
		}
	}
	for _, e := range p.frozen {
		if e.always {
			e.run()
		}
	}
	p.frozen, p.hung = nil, false
	p.line.cut(0)
	w.after(w.between(time.Millisecond, 20*time.Millisecond), nil, "", func() { w.reap(p, why) })
}

// abandon frees what a dead guest's pool holds of this process.
func (t *tenant) abandon(q *spool.Pool) {
	t.cancel()
	if q != nil {
		_ = q.Release(context.Background()) // its devices fail
	}
}

// reap is the moment from which the host knows that nothing of p runs.
func (w *World) reap(p *proc, why string) {
	p.reaped = true
	for _, id := range sortedKeys(w.pools) {
		w.ceases(p, id)
	}
	for _, id := range sortedKeys(p.watches) {
		_ = p.watches[id].Close()
	}
	w.host.reaped(p, why)
}

// freeze puts off what a hung guest has begun until it goes on, or dies.
func (p *proc) freeze(run func()) { p.frozen = append(p.frozen, &event{run: run, always: true}) }

// hang stops a guest until thaw.
func (w *World) hang(p *proc) {
	if !p.dead.Load() && !p.hung {
		w.log("%s#%d hangs", p.name, p.inc)
		p.hung = true
	}
}

func (w *World) thaw(p *proc) {
	if p.dead.Load() || !p.hung {
		return
	}
	w.log("%s#%d goes on", p.name, p.inc)
	p.hung = false
	frozen := p.frozen
	p.frozen = nil
	for _, e := range frozen {
		owner := p
		if e.always {
			owner = nil
		}
		w.after(w.between(0, 100*time.Microsecond), owner, e.what, e.run)
	}
}

// acts and ceases bracket the time in which a guest may touch a pool.
func (w *World) acts(p *proc, id string) {
	pl := w.pools[id]
	for _, q := range pl.acting {
		if q != p {
			w.violate("%s#%d acts on %s while %s#%d may still act on it", p.name, p.inc, id, q.name, q.inc)
		}
	}
	pl.acting = append(pl.acting, p)
}

func (w *World) ceases(p *proc, id string) {
	pl := w.pools[id]
	var rest []*proc
	for _, q := range pl.acting {
		if q != p {
			rest = append(rest, q)
		}
	}
	pl.acting = rest
}

func sortedKeys[V any](m map[string]V) []string {
	var k []string
	for n := range m {
		k = append(k, n)
	}
	sort.Strings(k)
	return k
}
