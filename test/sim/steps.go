package sim

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
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
	case "start": // start GUEST slow D | dies N | fails | well [times N]: how its next starts go
		return (*World).doStart
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
	case "offline", "online", "replace": // offline DISK: a copy is taken out, back, or replaced by an empty disk
		return (*World).doCopy
	case "mend": // mend DISK: what is wrong with it ends, and its mirror is made whole
		return (*World).doMend
	case "add": // add IDENTITY [size=S] [llrrm | flash]: another disk for its pool, or low-latency memory, or flash
		return (*World).doAdd
	case "remove": // remove IDENTITY [disk | flash]: its low-latency memory leaves the pool, or a disk, or the flash device
		return (*World).doRemove
	case "grow": // grow DISK SIZE: it is larger by so much when it is opened next
		return (*World).doGrow
	case "pin", "unpin": // pin VOLUME [OFFSET LENGTH]: it shall be on flash
		return (*World).doPin
	case "evacuate": // evacuate IDENTITY [stop]: everything on flash goes back
		return (*World).doEvacuate
	case "scan": // scan VOLUME [undo]: shares what it had before, or makes copies of all that it shares
		return (*World).doScan
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
		r.data = w.content(r)
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
		if d.stuck || d.missing || d.faulty() || d.slow > 20 {
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
	p.jumped += d.Abs()
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

func (w *World) doStart(l Line) error {
	times, err := l.countOf("times", 1)
	if err != nil {
		return err
	}
	s := starting{times: int(times)}
	switch l.arg(2) {
	case "slow":
		s.slow, err = l.duration(3)
	case "dies":
		s.dies, err = l.countOf("dies", 1)
	case "fails":
		s.fails = true
	case "well":
	default:
		err = fmt.Errorf("a start cannot be %q", l.arg(2))
	}
	w.host.starts[l.arg(1)] = s
	return err
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
			// Nothing durable carries the epoch of who adopted the region and
			// made no consistency point: it may come again.
			pl.epoch = pl.named
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
// loses|misdirects OP [times N] | rots | heals | missing | found; and of a copy: vanishes [after N]
// | returns. Of a pool that keeps copies one disk in each mirror is bad at a time,
// and nobody notices.
func (w *World) doDisk(l Line) error {
	d, err := w.disk(l.arg(1))
	if d == nil {
		return err
	}
	pl := w.pools[d.owner]
	mirrored := pl.copies > 1
	if mirrored && pl.isCandidate(d) {
		return nil // whoever adds it looks first whether it works
	}
	if harm := l.arg(2); mirrored && harm != "slow" && harm != "sticks" && harm != "goes-on" && harm != "heals" && harm != "missing" && harm != "found" && !w.hurt(d) {
		return nil
	}
	switch what := l.arg(2); what {
	case "vanishes":
		if !mirrored {
			return nil
		}
		n, err := l.countOf("after", 0)
		d.vanishIn, d.gone = int(n), n == 0
		return err
	case "returns":
		d.gone, d.vanishIn = false, 0
	case "missing", "found":
		for _, d := range pl.groupOf(d) {
			d.missing = what == "missing"
		}
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
		pl.damaged = pl.damaged || !mirrored
		d.rotten = true
		places := 1
		if mirrored {
			places = 500 // and nobody may notice
		}
		d.rot(w, places)
	case "fails", "fails-late", "flips", "loses", "misdirects":
		f := &fault{kind: what, op: opByName[l.arg(3)]}
		if f.op == 0 {
			return fmt.Errorf("a device has no operation %q", l.arg(3))
		}
		n, err := l.countOf("times", 1)
		f.left = int(n)
		d.faults = append(d.faults, f)
		d.stale = d.stale || f.forgets()
		pl.hindered = pl.hindered || !mirrored && (what == "fails" || what == "fails-late")
		pl.damaged = pl.damaged || !mirrored && (what == "flips" || what == "loses" || what == "misdirects")
		return err
	default:
		return fmt.Errorf("a disk cannot %q", what)
	}
	return nil
}

var opByName = map[string]hpdi.Op{"read": hpdi.OpRead, "write": hpdi.OpWrite, "sync": hpdi.OpFlush}

// disk returns the disk of a name. a.flash is the newest flash device of pool a, a.flash2 its
// second copy, and nothing, without an error, as long as there is none.
func (w *World) disk(name string) (found *disk, err error) {
	if id, copied, ok := strings.Cut(name, ".flash"); ok {
		pl, err := w.poolOf(id)
		if err != nil {
			return nil, err
		}
		n, _ := strconv.Atoi(copied)
		for i := max(0, n-1); i < len(pl.disks); i += pl.copies {
			if pl.disks[i].use == useFlash && n <= pl.copies {
				found = pl.disks[i]
			}
		}
		return found, nil
	}
	for _, d := range w.disks {
		if d.name == name {
			return d, nil
		}
	}
	return nil, fmt.Errorf("there is no disk %q", name)
}
