package main

import (
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/flashmap/collect"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

// flashTime is how long an access to flash takes, and flashSpeed how many bytes a second are
// moved to it: those of a plain drive.
const (
	flashTime  = 100 * time.Microsecond
	flashSpeed = 500 << 20
)

// oracleShare is what an oracle hits on a flash of the size that is measured.
const oracleShare = 0.92

// tier is one way to serve the accesses, in one window.
type tier struct {
	Hits     int           // outside of runs
	Time     time.Duration // of all accesses
	Accesses int           // outside of runs
	All      int
}

func (t *tier) share() float64 {
	if t.Accesses == 0 {
		return 0
	}
	return float64(t.Hits) / float64(t.Accesses)
}

func (t *tier) mean() time.Duration {
	if t.All == 0 {
		return 0
	}
	return t.Time / time.Duration(t.All)
}

func (t *tier) add(o tier) {
	t.Hits, t.Time, t.Accesses, t.All = t.Hits+o.Hits, t.Time+o.Time, t.Accesses+o.Accesses, t.All+o.All
}

// window is what one window came to.
type window struct {
	None, Policy, LRU, Oracle tier
	parts                     []tier // of Policy, one for each interval
}

// world is a primary device and flash in virtual time: the collector, the engine, and a mover
// that takes as long as the devices.
type world struct {
	w      *workload
	s      scale
	seed   uint64
	places []int
	p      policy.Params
	slots  int // sets of the flash
	room   int // those that may be used now

	collector *collect.Collector
	recorder  *collect.Recorder
	engine    *policy.Engine
	stats     []collect.Stat

	on      []bool // sets that are on flash
	moves   []policy.Move
	until   time.Duration // when the first move is done
	written uint64

	disk, bare, behind *blocktest.Disk // below the policy, alone, below the LRU cache
	random, runs       tier            // accesses of the disk alone
	streams            tier            // those of runs that went on where the disk was
	lru                *lru
	promoted, demoted  int

	ticked, stepped time.Duration
}

var epoch = time.Unix(1_800_000_000, 0)

func newWorld(w *workload, s scale, seed uint64, p policy.Params) (*world, error) {
	x := &world{w: w, s: s, seed: seed, places: permute(s, seed), p: p, on: make([]bool, s.sets)}
	x.slots = x.size()
	// The budget fills flash in a third of a window, so that its time counts.
	x.p.Budget.Migrate = config.Size(3 * int64(x.slots) * s.setBytes / int64(s.window/time.Second))
	var err error
	g := collect.Geometry{Size: int64(s.sets) * s.setBytes, SetBytes: s.setBytes}
	if x.collector, err = collect.New(g, x.p.Collect, epoch); err != nil {
		return nil, err
	}
	if x.engine, err = policy.New(x.p); err != nil {
		return nil, err
	}
	x.recorder = x.collector.NewRecorder()
	for _, d := range []**blocktest.Disk{&x.disk, &x.bare, &x.behind} {
		*d = blocktest.NewDisk(blocktest.BarracudaES2)
	}
	return x, nil
}

// size returns with how many sets an oracle hits oracleShare.
func (x *world) size() int {
	var all []counts
	for i := range min(x.s.half, 12) {
		if x.apart(i) {
			continue
		}
		c := counts{}
		for _, a := range x.w.draw(x.s, x.seed, i, x.places) {
			if !a.run {
				x.pieces(a, func(set int, _, _ int64) { c[set]++ })
			}
		}
		all = append(all, c)
	}
	return roomFor(oracleShare, all)
}

func (x *world) apart(window int) bool { return x.w.apart != nil && x.w.apart(x.s, window) }

// pieces cuts an access at the borders of data sets, as the device does.
func (x *world) pieces(a access, f func(set int, offset, bytes int64)) {
	for off, end := a.offset, a.offset+a.bytes; off < end; {
		set := off / x.s.setBytes
		n := min(end, (set+1)*x.s.setBytes) - off
		f(int(set), off, n)
		off += n
	}
}

// start gives the policy and the cache their flash.
func (x *world) start() {
	x.room = x.slots
	x.lru = newLRU(x.slots)
}

// play has one window happen.
func (x *world) play(index int) window {
	var out window
	intervals := int(x.s.window / x.p.Interval)
	out.parts = make([]tier, intervals)
	used := counts{}
	base := time.Duration(index) * x.s.window
	for _, a := range x.w.draw(x.s, x.seed, index, x.places) {
		now := base + a.at
		x.advance(now)
		op := hpdi.OpRead
		if a.write {
			op = hpdi.OpWrite
		}
		x.recorder.Record(op, a.offset, a.bytes, epoch.Add(now))
		part := &out.parts[min(int(a.at/x.p.Interval), intervals-1)]
		x.pieces(a, func(set int, off, n int64) {
			if !a.run {
				used[set]++
			}
			x.count(&out, part, set, off, n, a)
		})
	}
	x.advance(base + x.s.window)
	hits, all := used.best(x.slots)
	out.Oracle = tier{Hits: hits, Accesses: all}
	return out
}

// count serves a piece in each of the ways.
func (x *world) count(out *window, part *tier, set int, off, n int64, a access) {
	one := tier{All: 1}
	if !a.run {
		one.Accesses = 1
	}
	serve := func(t *tier, hit bool, d *blocktest.Disk) {
		this := one
		if hit {
			this.Hits, this.Time = this.Accesses, flashTime
		} else {
			this.Time = d.Service(off/block.Size, (n+block.Size-1)/block.Size)
		}
		t.add(this)
	}
	before, jumps := out.None.Time, x.bare.Count().Jumps
	serve(&out.None, false, x.bare)
	if took := (tier{All: 1, Time: out.None.Time - before}); a.run {
		x.runs.add(took)
		if x.bare.Count().Jumps == jumps {
			x.streams.add(took)
		}
	} else {
		x.random.add(took)
	}
	hits := out.Policy.Hits
	serve(&out.Policy, x.on[set], x.disk)
	part.Hits += out.Policy.Hits - hits
	part.Accesses += one.Accesses
	if x.on[set] && a.write {
		x.written += uint64(n)
	}
	hit := x.lru != nil && x.lru.use(set)
	serve(&out.LRU, hit, x.behind)
}

// tickEvery is how often the collector ticks.
const tickEvery = 5 * time.Second

// advance has everything happen that is due until now.
func (x *world) advance(now time.Duration) {
	for {
		next := min(x.ticked+tickEvery, x.stepped+x.p.Interval)
		moving := len(x.moves) > 0 && x.until <= next
		if moving {
			next = x.until
		}
		if next > now {
			return
		}
		switch {
		case moving:
			x.moved()
		case x.stepped+x.p.Interval == next:
			x.step(next)
		default:
			x.collector.Tick(epoch.Add(next))
			x.ticked = next
		}
	}
}

// step asks the engine for moves.
func (x *world) step(now time.Duration) {
	x.stepped = now
	s := x.collector.SnapshotAbove(x.engine.Least("disk"), epoch.Add(now), x.stats)
	x.ticked, x.stats = now, s.Stats
	idle := len(x.moves) == 0
	x.moves = append(x.moves, x.engine.Step(x.input(s, now))...)
	if idle && len(x.moves) > 0 {
		x.until = now + x.duration()
	}
}

func (x *world) input(s collect.Snapshot, now time.Duration) policy.Input {
	var on []collect.Set
	for set, is := range x.on {
		if is {
			on = append(on, collect.Set(set))
		}
	}
	return policy.Input{
		Now: epoch.Add(now), SetBytes: x.s.setBytes, Slots: x.room, Written: x.written,
		Devices: []policy.Device{{Number: 1, Type: "disk", Snapshot: s, On: on}},
	}
}

// duration is how long the first move takes.
func (x *world) duration() time.Duration {
	m := x.moves[0]
	blocks := x.s.setBytes / block.Size
	return x.disk.Service(int64(m.Set)*blocks, blocks) + time.Duration(x.s.setBytes)*time.Second/flashSpeed
}

// moved ends the first move.
func (x *world) moved() {
	m := x.moves[0]
	x.moves = x.moves[1:]
	if is := m.Kind == policy.Promote; x.on[m.Set] == is {
		panic(fmt.Sprintf("%s of set %d, which is so already", m.Kind, m.Set))
	} else if x.on[m.Set] = is; is {
		x.promoted++
	} else {
		x.demoted++
	}
	n := 0
	for _, is := range x.on {
		if is {
			n++
		}
	}
	if n > x.room {
		panic(fmt.Sprintf("%d sets on a flash of %d", n, x.room))
	}
	x.engine.Done(m, nil, epoch.Add(x.until))
	if len(x.moves) > 0 {
		x.until += x.duration()
	}
}

// predict simulates the policy on what has been collected.
func (x *world) predict() (policy.Predicted, error) {
	return policy.Simulate(policy.Trial{
		Params: x.p, Slots: x.slots, SetBytes: x.s.setBytes,
		Latencies: policy.Latencies{Primary: x.random.mean(), Run: x.runs.mean(), Stream: x.streams.mean(), Flash: flashTime},
		Devices: []policy.Past{{
			Number: 1, Type: "disk", Windows: x.collector.History(),
			Geometry: collect.Geometry{Size: int64(x.s.sets) * x.s.setBytes, SetBytes: x.s.setBytes},
		}},
	})
}
