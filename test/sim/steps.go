package sim

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/partner"
	spool "github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/region"
)

// patience is how long anything may take that nothing hinders.
const patience = 2 * time.Minute

// verb carries out one step.
type verb func(w *World, l Line) error

// clientName tells a client's step from others: c and a number.
var clientName = regexp.MustCompile(`^c[0-9]+$`)

func verbOf(l Line) verb {
	if clientName.MatchString(l.Fields[0]) {
		return (*World).doClient
	}
	switch l.Fields[0] {
	case "settle": // until no client waits for anything
		return func(w *World, _ Line) error { return w.settle() }
	case "sleep": // sleep DURATION
		return func(w *World, l Line) error {
			d, err := l.duration(1)
			w.pass(d)
			return err
		}
	case "ops": // ops N: until so many operations were counted, or nothing goes on
		return (*World).doOps
	case "kill": // kill GUEST [after N]
		return (*World).doKill
	case "hang", "thaw": // hang GUEST
		return (*World).doHang
	case "clock": // clock GUEST DURATION: its clock jumps ahead
		return (*World).doClock
	case "agent": // agent dies | starts
		return (*World).doAgent
	case "line": // line GUEST breaks | slow | fast | repeats N
		return (*World).doLine
	case "memory": // memory IDENTITY rots region | header | record | payload
		return (*World).doMemory
	case "usurp": // usurp IDENTITY: somebody else raises the epoch of its pool
		return (*World).doUsurp
	case "takeover", "giveback": // takeover IDENTITY
		return (*World).doMove
	case "power": // power cut [keep | drop]
		return func(w *World, l Line) error { return w.powerCut(l) }
	case "cut": // cut CLIENT: its connections break
		return (*World).doCut
	case "disk": // disk NAME ...
		return (*World).doDisk
	case "commit", "fold", "check": // commit IDENTITY
		return (*World).doPool
	case "create", "delete", "resize", "rename":
		return (*World).doVolume
	case "verify": // every byte of every volume is read and compared
		return func(w *World, _ Line) error { return w.verify() }
	case "await", "expect":
		return (*World).doExpect
	}
	return nil
}

func (w *World) newest(g string) (*proc, error) {
	if p := w.procs[g]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("there is no guest %q", g)
}

func (w *World) poolOf(id string) (*pool, error) {
	if pl := w.pools[id]; pl != nil {
		return pl, nil
	}
	return nil, fmt.Errorf("there is no pool of %q", id)
}

func (w *World) identityOf(volume string) string {
	for _, id := range sortedKeys(w.pools) {
		if w.pools[id].volumes[volume] != nil {
			return id
		}
	}
	return ""
}

// doClient: CLIENT write|read|trim|zero VOLUME OFFSET LENGTH [fua], CLIENT
// flush VOLUME, CLIENT spread VOLUME STEP COUNT, which writes a block at every
// multiple of STEP. It waits for nothing.
func (w *World) doClient(l Line) error {
	if l.arg(1) == "spread" {
		step, err := bytesOf(l.arg(3))
		n, nerr := strconv.Atoi(l.arg(4))
		for i := range int64(n) {
			if err == nil && nerr == nil {
				err = w.doClient(Line{[]string{l.arg(0), "write", l.arg(2), fmt.Sprint(i * step), "4096"}, l.Number})
			}
		}
		return errors.Join(err, nerr)
	}
	r := &request{op: op(l.arg(1)), fua: l.has("fua")}
	var err error
	switch r.op {
	case opFlush:
	case opRead, opWrite, opTrim, opZero:
		if r.off, err = bytesOf(l.arg(3)); err == nil {
			r.n, err = bytesOf(l.arg(4))
		}
	default:
		err = fmt.Errorf("a client cannot %q", l.arg(1))
	}
	if err != nil {
		return err
	}
	if w.identityOf(l.arg(2)) == "" {
		return nil // deleted; what asked for it is void
	}
	r.s = w.session(l.arg(0), l.arg(2))
	w.requests++
	r.id = w.requests
	if r.op == opWrite {
		r.data = stamped(r.id, r.off, r.n)
	}
	r.s.add(r)
	return nil
}

// settle waits until all clients have their answers. While something hinders
// that, it does not insist.
func (w *World) settle() error {
	if w.hindered() {
		w.until(5*time.Second, w.idle)
		return nil
	}
	if !w.until(patience, w.idle) && w.fail == nil {
		w.violate("starvation: %s", w.waiting())
	}
	return nil
}

// hindered tells whether a fault lasts because of which requests may have to
// wait.
func (w *World) hindered() bool {
	for _, d := range w.disks {
		if d.stuck || len(d.faults) > 0 || d.slow > 20 {
			return true
		}
	}
	for _, p := range w.procs {
		if p.hung {
			return true
		}
	}
	return w.host.ref == nil
}

// waiting describes the requests that have no answer.
func (w *World) waiting() string {
	var b strings.Builder
	for _, s := range w.sessions() {
		for _, r := range s.flying {
			fmt.Fprintf(&b, "%s has waited since %s; ", r, r.issued)
		}
	}
	for _, id := range sortedKeys(w.pools) {
		if p, _ := w.serving(id); p == nil {
			fmt.Fprintf(&b, "nobody serves %s; ", id)
		}
		if err := w.pools[id].refusal; err != nil {
			fmt.Fprintf(&b, "its pool did not open: %v; ", err)
		}
	}
	return b.String()
}

func (w *World) doOps(l Line) error {
	n, err := l.countOf("ops", 0)
	end := w.ops + n
	w.until(3*time.Second, func() bool { return w.ops >= end || w.idle() })
	return err
}

func (w *World) doKill(l Line) error {
	p, err := w.newest(l.arg(1))
	if err != nil || p.dead.Load() {
		return err
	}
	n, err := l.countOf("after", 0)
	if n > 0 {
		p.killIn = n
		return err
	}
	w.kill(p, "is killed")
	return err
}

func (w *World) doHang(l Line) error {
	p, err := w.newest(l.arg(1))
	if err != nil {
		return err
	}
	if l.arg(0) == "hang" {
		w.hang(p)
	} else {
		w.thaw(p)
	}
	return nil
}

func (w *World) doClock(l Line) error {
	p, err := w.newest(l.arg(1))
	if err != nil {
		return err
	}
	d, err := l.duration(2)
	p.skew += d
	return err
}

func (w *World) doAgent(l Line) error {
	switch l.arg(1) {
	case "dies":
		w.killAgent()
	case "starts":
		w.startAgent()
	default:
		return fmt.Errorf("the agent cannot %q", l.arg(1))
	}
	return nil
}

func (w *World) doLine(l Line) error {
	p, err := w.newest(l.arg(1))
	if err != nil || p.dead.Load() {
		return err
	}
	switch l.arg(2) {
	case "breaks":
		p.line.breaks()
	case "slow", "fast":
		p.line.slow = l.arg(2) == "slow"
	case "repeats":
		n, err := l.countOf("repeats", 1)
		p.line.repeat = int(n)
		return err
	default:
		return fmt.Errorf("a line cannot %q", l.arg(2))
	}
	return nil
}

func (w *World) doMemory(l Line) error {
	pl, err := w.poolOf(l.arg(1))
	if err == nil {
		w.rotMemory(pl, l.arg(3))
	}
	return err
}

// doUsurp raises the epoch in a pool's region, as another guest does that took
// the pool over without a fence: its owner must notice before it publishes.
func (w *World) doUsurp(l Line) error {
	pl, err := w.poolOf(l.arg(1))
	if err != nil || pl.region == nil {
		return err
	}
	r, err := region.Open(pl.path, false)
	if err != nil {
		return nil // it is being removed
	}
	defer func() { _ = r.Close() }()
	pl.usurped = true
	return r.SetOwner("usurper", r.Epoch()+1)
}

// doMove asks for a takeover or giveback; it does not wait for its end.
func (w *World) doMove(l Line) error {
	id := l.arg(1)
	if _, err := w.poolOf(id); err != nil {
		return err
	}
	to := id
	if l.arg(0) == "takeover" {
		to = w.other(id)
	}
	if to != "" {
		w.host.move(id, to, l.arg(0)+" by command")
	}
	return nil
}

func (w *World) doCut(l Line) error {
	if c := w.cls[l.arg(1)]; c != nil {
		for _, v := range sortedKeys(c.sessions) {
			c.sessions[v].cut()
		}
	}
	return nil
}

// powerCut ends the host: all guests, the agent, the regions, and what the
// devices had not made durable. Then power comes back.
func (w *World) powerCut(l Line) error {
	mode := blocktest.CutRandom
	switch {
	case l.has("keep"):
		mode = blocktest.KeepAll
	case l.has("drop"):
		mode = blocktest.DropAll
	}
	w.log("the host loses power")
	w.boot++
	w.killAgent()
	for _, g := range w.host.names {
		if p := w.procs[g]; p != nil {
			w.kill(p, "loses power")
			p.reaped = true
			for _, id := range sortedKeys(w.pools) {
				w.ceases(p, id)
			}
		}
	}
	w.rest()
	clock := blocktest.NewClock()
	for _, d := range w.disks {
		d.medium = d.medium.CutTo(clock, mode, w.rng.Uint64())
		d.holder, d.stuck, d.held = nil, false, nil
	}
	for _, id := range sortedKeys(w.pools) {
		pl := w.pools[id]
		pl.unmap()
		if !pl.battery {
			pl.powerLost = true
			if err := w.loseRegion(pl); err != nil {
				return err
			}
		}
	}
	w.procs = map[string]*proc{}
	w.pass(time.Second)
	w.startAgent()
	return nil
}

// doDisk: disk NAME slow FACTOR | sticks | goes-on | fails|fails-late|flips|
// loses|misdirects OP [times N] | rots | heals.
func (w *World) doDisk(l Line) error {
	d := w.disk(l.arg(1))
	if d == nil {
		return fmt.Errorf("there is no disk %q", l.arg(1))
	}
	pl := w.pools[d.owner]
	switch what := l.arg(2); what {
	case "slow":
		n, err := l.countOf("slow", 1)
		d.slow = int(max(1, n))
		return err
	case "sticks":
		d.stuck = true
	case "goes-on":
		d.unstick()
	case "heals":
		d.slow, d.faults = 1, nil
		d.unstick()
	case "rots":
		pl.damaged = true
		d.rot(w)
	case "fails", "fails-late", "flips", "loses", "misdirects":
		f := &fault{kind: what, op: opByName[l.arg(3)]}
		if f.op == 0 {
			return fmt.Errorf("a device has no operation %q", l.arg(3))
		}
		n, err := l.countOf("times", 1)
		f.left = int(n)
		d.faults = append(d.faults, f)
		pl.hindered = pl.hindered || what == "fails" || what == "fails-late"
		pl.damaged = pl.damaged || what == "flips" || what == "loses" || what == "misdirects"
		return err
	default:
		return fmt.Errorf("a disk cannot %q", what)
	}
	return nil
}

var opByName = map[string]hpdi.Op{"read": hpdi.OpRead, "write": hpdi.OpWrite, "sync": hpdi.OpFlush}

func (w *World) disk(name string) *disk {
	for _, d := range w.disks {
		if d.name == name {
			return d
		}
	}
	return nil
}

// errNobody says that a command has to be given again.
var errNobody = errors.New("nobody serves it now")

// ask has a serving guest do something to a pool, until it is done or nothing
// served it for too long.
func (w *World) ask(id string, what string, run func(ctx context.Context, p *spool.Pool) error) error {
	var err error
	w.until(5*time.Second, func() bool {
		err = w.askOnce(id, run)
		if errors.Is(err, errNobody) {
			w.step(time.Now().Add(10 * time.Millisecond))
			return false
		}
		return true
	})
	if errors.Is(err, errNobody) {
		w.log("%s: nobody serves %s", what, id)
	}
	return err
}

// sure ends the doubt about volumes that a command has brought, unless it had no
// answer or one that leaves it open.
func (pl *pool) sure(err error, names ...string) {
	for _, n := range names {
		if err == nil || errors.Is(err, block.ErrNoSpace) {
			delete(pl.unsure, n)
		}
	}
}

// tolerable tells whether a command may fail so: nobody was there, a device
// did it, or the pool is full.
func (pl *pool) tolerable(err error) bool {
	switch {
	case err == nil, errors.Is(err, errNobody), pl.damaged:
		return true
	case pl.hindered && strings.Contains(err.Error(), errMedium.Error()):
		return true
	}
	return errors.Is(err, block.ErrNoSpace) && pl.crowded(0)
}

func (w *World) askOnce(id string, run func(ctx context.Context, p *spool.Pool) error) error {
	p, t := w.serving(id)
	if p == nil || p.hung {
		return errNobody
	}
	done, err := false, error(nil)
	t.wg.Go(func() {
		e := run(t.ctx, t.pool)
		w.post(p, func() { done, err = true, e })
	})
	w.until(patience, func() bool { return done || p.dead.Load() || t.gone })
	if !done || errors.Is(err, block.ErrClosed) || errors.Is(err, context.Canceled) || errors.Is(err, block.ErrStale) {
		return errNobody
	}
	return err
}

func (w *World) doPool(l Line) error {
	id := l.arg(1)
	pl, err := w.poolOf(id)
	if err != nil {
		return err
	}
	err = w.ask(id, l.arg(0), func(ctx context.Context, p *spool.Pool) error {
		switch l.arg(0) {
		case "commit":
			return p.Commit(ctx)
		case "fold":
			return p.Fold(ctx)
		}
		return pl.check(ctx, p)
	})
	if !pl.tolerable(err) {
		w.violate("%s: %v", l, err)
	}
	return nil
}

// check runs the pool's own check. Damage that devices did may show.
func (pl *pool) check(ctx context.Context, p *spool.Pool) error {
	r, err := p.Check(ctx, spool.CheckOptions{Data: true})
	if err == nil && len(r.Problems) > 0 {
		err = fmt.Errorf("check of %s: %s", pl.identity, strings.Join(r.Problems, "; "))
	}
	return err
}

// doVolume: create NAME on ID SIZE | delete NAME | resize NAME SIZE | rename
// NAME NAME.
func (w *World) doVolume(l Line) error {
	name := l.arg(1)
	if l.arg(0) == "create" {
		size, err := bytesOf(l.arg(4))
		if err != nil {
			return err
		}
		return w.create(name, l.arg(3), size)
	}
	id := w.identityOf(name)
	if id == "" {
		return nil // not there (any more)
	}
	pl := w.pools[id]
	v := pl.volumes[name]
	pl.unsure[name] = true
	var err error
	switch l.arg(0) {
	case "delete":
		w.forget(pl, v)
		v.freed = block.Seq(1<<64 - 1) // as long as there is no answer
		err = w.ask(id, l.String(), func(ctx context.Context, p *spool.Pool) error { return p.DeleteVolume(ctx, name) })
		if errors.Is(err, block.ErrNotFound) {
			err = nil
		}
		if err == nil {
			v.freed = pl.shadow.seq
		}
	case "resize":
		size, perr := bytesOf(l.arg(2))
		if perr != nil {
			return perr
		}
		err = w.ask(id, l.String(), func(ctx context.Context, p *spool.Pool) error { return p.ResizeVolume(ctx, name, size) })
		if err == nil {
			v.size = size
		} else if errors.Is(err, block.ErrInvalid) && size < v.size {
			err = nil
		}
	case "rename":
		to := l.arg(2)
		pl.unsure[to] = true
		err = w.ask(id, l.String(), func(ctx context.Context, p *spool.Pool) error { return p.RenameVolume(ctx, name, to) })
		if err == nil || errors.Is(err, block.ErrNotFound) {
			err = nil
			w.renamed(pl, v, to)
		}
		pl.sure(err, to)
	}
	if pl.sure(err, name); !pl.tolerable(err) {
		w.violate("%s: %v", l, err)
	}
	return nil
}

func (w *World) create(name, id string, size int64) error {
	pl, err := w.poolOf(id)
	if err != nil {
		return err
	}
	if pl.volumes[name] != nil {
		return nil
	}
	pl.unsure[name] = true
	var vid block.VolumeID
	err = w.ask(id, "create "+name, func(ctx context.Context, p *spool.Pool) error {
		_, err := p.CreateVolume(ctx, name, size)
		if err != nil && !errors.Is(err, block.ErrExists) {
			return err
		}
		v, err := p.Volume(name)
		if err == nil {
			vid = v.Info().ID
		}
		return err
	})
	if pl.sure(err, name); err != nil {
		if !pl.tolerable(err) {
			w.violate("create %s: %v", name, err)
		}
		return nil
	}
	v := &volume{name: name, id: vid, size: size, blocks: map[block.Logical][]version{}}
	pl.volumes[name], pl.ids[vid] = v, v
	return nil
}

// forget takes a volume out of what must be there, and its clients with it.
func (w *World) forget(pl *pool, v *volume) {
	v.gone = true
	delete(pl.volumes, v.name)
	w.dropSessions(v.name)
}

// renamed gives a volume, and its sessions, a new name.
func (w *World) renamed(pl *pool, v *volume, to string) {
	name := v.name
	delete(pl.volumes, name)
	v.name = to
	pl.volumes[to] = v
	for _, s := range w.sessions() {
		if s.volume == name {
			s.volume = to
			delete(w.cls[s.name].sessions, name)
			w.cls[s.name].sessions[to] = s
		}
	}
}

func (w *World) dropSessions(volume string) {
	for _, s := range w.sessions() {
		if s.volume == volume {
			s.todo, s.flying = nil, nil
			s.cut()
			delete(w.cls[s.name].sessions, volume)
		}
	}
}

// doExpect: expect|await served ID by GUEST | error CLIENT [TEXT] | alert GUEST
// KEY | no-alert GUEST KEY | refused ID | waits CLIENT. await gives it time.
func (w *World) doExpect(l Line) error {
	var holds func() bool
	switch l.arg(1) {
	case "served":
		holds = func() bool {
			p, _ := w.serving(l.arg(2))
			if l.arg(4) == "nobody" {
				return p == nil
			}
			return p != nil && p.name == l.arg(4)
		}
	case "error", "no-error":
		holds = func() bool { return w.hadError(l.arg(2), strings.Join(l.Fields[3:], " ")) == (l.arg(1) == "error") }
	case "alert", "no-alert":
		holds = func() bool { return w.alerted(l.arg(2), l.arg(3)) == (l.arg(1) == "alert") }
	case "refused":
		holds = func() bool { pl := w.pools[l.arg(2)]; return pl != nil && pl.refusal != nil }
	case "waits":
		holds = func() bool { return !w.idle() }
	case "guests":
		holds = func() bool { return w.protected() }
	default:
		return fmt.Errorf("nothing is known of %q", l.arg(1))
	}
	if l.arg(0) == "await" {
		w.until(patience, holds)
	}
	if !holds() {
		w.violate("line %d: %s does not hold", l.Number, l)
	}
	return nil
}

func (w *World) hadError(client, text string) bool {
	if c := w.cls[client]; c != nil {
		for _, v := range sortedKeys(c.sessions) {
			for _, err := range c.sessions[v].errs {
				if strings.Contains(err.Error(), text) {
					return true
				}
			}
		}
	}
	return false
}

func (w *World) alerted(g, key string) bool {
	if g == partner.Host {
		return w.host.ref != nil && w.host.ref.Alerts()[key] != ""
	}
	p := w.procs[g]
	return p != nil && p.alerts[key] != ""
}

// protected says that every identity is served, but for pools that are damaged
// and refused, and that every guest is up.
func (w *World) protected() bool {
	for _, id := range w.host.names {
		if p, _ := w.serving(id); (p == nil || p.hung) && !w.pools[id].lost() {
			return false
		}
		if p := w.procs[id]; p == nil || p.dead.Load() {
			return false
		}
	}
	return true
}
