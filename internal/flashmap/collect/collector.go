package collect

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Collector counts the accesses to one primary device. Its methods may be called
// concurrently.
type Collector struct {
	geometry Geometry
	taking   atomic.Pointer[taking]

	mu        sync.Mutex // guards all below
	p         Params
	recorders []*Recorder
	closing   []*Recorder // to be forgotten after one more tick
	made      uint64      // recorders ever
	cursors   []cursor
	batch     []event           // at most batchSize
	order     [batchSize]uint64 // of the batch
	pieces    []piece

	runs   runs
	table  *table
	window uint32    // number of the present one
	begun  time.Time // when it began
	base   time.Time // what entry.last counts from
	age    float64   // windows that have ended and count, at most steadyAfter

	totals  sums // of the present window
	history history
	classes []Class
	lost    uint64 // by recorders that are closed
	out     uint64 // accesses taken

	measured time.Time // when it was last looked how many there are
	before   uint64    // accesses until then
	every    int64     // one in so many is taken
}

// sums are the accesses of all sets, outside of runs and in them. They are more than the
// counts of a set can tell exactly.
type sums struct{ reads, writes, runs float64 }

// Class counts requests of one class of sizes.
type Class struct {
	Reads, Writes uint64 // requests; those that stand for others count for all of them
}

// Status tells about a collector itself.
type Status struct {
	Sets    int    // in the table
	Most    int    // that find room there
	Evicted uint64 // sets that had to make room
	Bytes   int64  // memory of table, recorders and history
	Counted uint64 // accesses
	Lost    uint64 // accesses that found a recorder full
	Sample  int    // one access in so many is taken at present
	// Classes are the requests by size, as Params.Classes has them.
	Classes []Class
}

// batchSize is how many accesses are brought into the order of their places. With many more,
// random accesses to few MiB would look like a sequence.
const batchSize = 32

// sectorSize is what places are multiples of; within one their order does not matter.
const sectorSize = 512

// enough is how many accesses a second are counted each; of more, one in several is taken. A
// tick takes about a thousandth of a processor's time for so many, and in a window of ten
// minutes they are more than a million.
const enough = 2000

// steadyAfter is how many windows count as many enough for means to be steady.
const steadyAfter = 1000

// New returns a collector that has counted nothing.
func New(g Geometry, p Params, now time.Time) (*Collector, error) {
	if err := g.Validate(); err != nil {
		return nil, err
	}
	if err := p.Validate(); err != nil {
		return nil, err
	}
	c := &Collector{geometry: g, begun: now, base: now, batch: make([]event, 0, batchSize)}
	c.runs.settle = c.settle
	c.runs.init()
	c.table = newTable(int64(p.Memory), g.Sets(), p.Decay)
	c.adopt(p)
	return c, nil
}

// adopt makes parameters count that are valid.
func (c *Collector) adopt(p Params) {
	c.p = p
	c.p.Classes = slices.Clone(p.Classes)
	c.take(int64(p.Sample))
	c.runs.least, c.runs.pause = int64(p.Run), int64(p.Pause)
	c.table.decay = float32(p.Decay)
	c.history.bound(int64(p.History), p.HistoryWindows)
	c.classes = make([]Class, len(p.Classes)+1)
}

// take has recorders take one access in so many.
func (c *Collector) take(every int64) {
	c.every = every
	c.taking.Store(&taking{c.p.operations(), every})
}

// measure looks, once a second, how many accesses there are, and has the more of them left out
// the more there are.
func (c *Collector) measure(now time.Time) {
	took := now.Sub(c.measured)
	if 0 <= took && took < time.Second {
		return
	}
	all := c.out + c.lost
	for _, r := range c.recorders {
		all += r.lost.Load()
	}
	if n := all - c.before; took > 0 && n > 0 {
		rate := float64(n) / took.Seconds()
		every := int64(min(math.Ceil(rate/enough), maxSample))
		every = max(every, int64(c.p.Sample))
		// It does not follow each little change.
		if every > c.every || every < c.every*3/4 {
			c.take(every)
		}
	}
	c.measured, c.before = now, all
}

// Use makes other parameters count from now on. What was counted stays: with a window of
// another length it is scaled to that. With less memory the least used sets are forgotten,
// and with other classes these begin at 0.
func (c *Collector) Use(p Params, now time.Time) error {
	if err := p.Validate(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tickLocked(now)
	classes := c.classes
	old := c.p
	if p.Window != old.Window || p.Decay != old.Decay {
		for i := range c.table.entries {
			c.table.roll(&c.table.entries[i], c.window)
		}
		c.age = restate(c.table.entries, means{old.Window, old.Decay, c.share(now), c.age}, p)
		c.begun, c.totals = now, sums{}
		c.history.clear() // its windows are others
	}
	t := newTable(int64(p.Memory), c.geometry.Sets(), p.Decay)
	if t.most < len(c.table.entries) {
		slices.SortFunc(c.table.entries, func(a, b entry) int { return cmp.Compare(b.worth(), a.worth()) })
		c.table.evicted += uint64(len(c.table.entries) - t.most)
		c.table.entries = c.table.entries[:t.most]
	}
	if t.most != c.table.most {
		t.entries, t.evicted = c.table.entries, c.table.evicted
		t.grow(max(64, len(t.entries)))
		c.table = t
	}
	c.adopt(p)
	if slices.Equal(p.Classes, old.Classes) {
		c.classes = classes
	}
	return nil
}

// means says what counts are means of: windows of a length and with a decay, of which so
// many have ended and the share f of one more has passed.
type means struct {
	window time.Duration
	decay  float64
	f      float64
	age    float64
}

// restate makes the counts of entries what they were if windows and decay had been those of
// p, and returns how many such windows have been seen. They are of windows that have ended
// then.
func restate(entries []entry, m means, p Params) (age float64) {
	by := float64(p.Window) / float64(m.window)
	age = min((m.age+m.f)/by, steadyAfter)
	by *= 1 - math.Pow(p.Decay, age)
	for i := range entries {
		e := &entries[i]
		e.past = blend(e.past, e.current, m.decay, m.f, m.age).times(float32(by))
		e.current = counts{}
	}
	return age
}

// Params returns the parameters.
func (c *Collector) Params() Params {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.p
	p.Classes = slices.Clone(p.Classes)
	return p
}

// NewRecorder returns a recorder for one queue. It takes 96 KiB of memory, which Close
// gives back.
func (c *Collector) NewRecorder() *Recorder {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.made++
	r := &Recorder{c: c, draw: c.made*0x9e3779b97f4a7c15 | 1}
	c.recorders = append(c.recorders, r)
	return r
}

// Tick counts what the recorders have noted, and closes windows that have ended. It is to be
// called several times a second: a recorder holds some thousand accesses.
func (c *Collector) Tick(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tickLocked(now)
}

func (c *Collector) tickLocked(now time.Time) {
	c.cursors = c.cursors[:0]
	for _, r := range c.recorders {
		if k := (cursor{r, r.tail.Load(), r.head.Load()}); k.next < k.end {
			c.cursors = append(c.cursors, k)
		}
	}
	drain(c.cursors, func(e *event) {
		// A recorder's clock may be ahead; none moves the windows beyond now.
		e.at = min(e.at, now.UnixNano())
		if c.batch = append(c.batch, *e); len(c.batch) == cap(c.batch) {
			c.countBatch()
		}
	})
	c.countBatch()
	for _, r := range c.closing {
		c.lost += r.lost.Load()
		c.recorders = slices.DeleteFunc(c.recorders, func(o *Recorder) bool { return o == r })
	}
	c.closing = c.closing[:0]
	c.measure(now)
	c.runs.rest(now.UnixNano())
	c.closeUntil(now)
}

// closeUntil closes the windows that end until now. A clock that was set back begins the
// present window anew.
func (c *Collector) closeUntil(now time.Time) {
	if now.Before(c.begun) {
		if c.begun.Sub(now) > c.p.Window {
			c.begun = now
		}
		return
	}
	for now.Sub(c.begun) >= c.p.Window {
		c.runs.rest(c.begun.Add(c.p.Window).UnixNano())
		c.history.add(c)
		c.totals = sums{}
		n := int64(1)
		if idle := int64(now.Sub(c.begun) / c.p.Window); idle > steadyAfter {
			n = idle // nothing happened meanwhile
		}
		c.window += uint32(min(n, math.MaxUint16))
		c.age = min(c.age+float64(n), steadyAfter)
		c.begun = c.begun.Add(time.Duration(n) * c.p.Window)
	}
}

// countBatch counts the events of the batch, in the order of their places: what a client had
// under way at once is in sequence, then, however queues have mixed it.
func (c *Collector) countBatch() {
	if len(c.batch) == 0 {
		return
	}
	c.closeUntil(time.Unix(0, c.batch[0].at))
	order := c.order[:len(c.batch)]
	for i := range c.batch {
		order[i] = uint64(c.batch[i].offset)/sectorSize*batchSize | uint64(i)
	}
	slices.Sort(order)
	for _, k := range order {
		c.count(&c.batch[k%batchSize])
	}
	c.batch = c.batch[:0]
}

// count takes an event apart into data sets.
func (c *Collector) count(e *event) {
	w := float32(e.weight)
	c.out += uint64(e.weight)
	class := &c.classes[c.class(int64(e.size))]
	p := piece{bytes: w * float32(e.size), at: e.at}
	if e.write {
		p.writes = w
		class.Writes += uint64(e.weight)
	} else {
		p.reads = w
		class.Reads += uint64(e.weight)
	}
	c.pieces = c.pieces[:0]
	last := Set((e.offset + int64(e.size) - 1) / c.geometry.SetBytes)
	for p.set = Set(e.offset / c.geometry.SetBytes); p.set <= last; p.set++ {
		c.pieces = append(c.pieces, p)
	}
	c.runs.access(e, c.pieces)
}

// class returns the class of a request.
func (c *Collector) class(size int64) int {
	for i, most := range c.p.Classes {
		if size <= int64(most) {
			return i
		}
	}
	return len(c.p.Classes)
}

// settle counts a piece. One that was held back over the end of a window counts in the next.
func (c *Collector) settle(p piece, inRun bool) {
	e := c.table.at(p.set, c.window)
	e.current.bytes += p.bytes
	if inRun {
		e.current.runs += p.reads + p.writes
		c.totals.runs += float64(p.reads + p.writes)
		return
	}
	e.current.reads += p.reads
	e.current.writes += p.writes
	c.totals.reads += float64(p.reads)
	c.totals.writes += float64(p.writes)
	e.last = max(e.last, c.seconds(p.at))
}

// seconds returns the time since base, not below 0.
func (c *Collector) seconds(at int64) uint32 {
	return uint32(max(0, min((at-c.base.UnixNano())/int64(time.Second), math.MaxUint32)))
}

// share returns how much of the present window has passed at now.
func (c *Collector) share(now time.Time) float64 {
	return max(0, min(float64(now.Sub(c.begun))/float64(c.p.Window), 1))
}

// blend returns means of a window of which the share f has passed, after so many windows.
func blend(past, current counts, decay, f, windows float64) counts {
	return blending(decay, f, windows).of(past, current)
}

// blended are the parts of past and present that means consist of.
type blended struct{ past, current float32 }

func (b blended) of(past, current counts) counts {
	return past.times(b.past).plus(current.times(b.current))
}

// blending returns of what the means of a window consist, of which the share f has passed, after
// so many windows.
func blending(decay, f, windows float64) blended {
	ln := math.Log(decay)
	kept := math.Exp(f * ln)
	fresh := -ln
	if f > 1e-6 {
		fresh = (1 - kept) / f
	}
	// Windows before the first one were empty only because nobody counted.
	seen := 1 - math.Exp((windows+f)*ln)
	if seen < 1e-9 {
		return blended{}
	}
	return blended{float32(kept / seen), float32(fresh / seen)}
}

// Stat is how a data set is used. Accesses are those in a window, in the mean, each of the
// pieces into which a request falls at the borders of data sets.
type Stat struct {
	Set           Set
	Reads, Writes float32       // accesses outside of runs
	Runs          float32       // accesses in runs
	Size          float32       // mean size of the requests, bytes
	Age           time.Duration // since the newest access outside of runs
}

// Accesses returns the reads and writes outside of runs.
func (s *Stat) Accesses() float64 { return float64(s.Reads) + float64(s.Writes) }

// Random returns the share of accesses that are outside of runs, 0 without any.
func (s *Stat) Random() float64 {
	if all := s.Accesses() + float64(s.Runs); all > 0 {
		return s.Accesses() / all
	}
	return 0
}

// Snapshot is how a device was used at a time.
type Snapshot struct {
	At       time.Time
	Window   time.Duration
	Windows  float64 // how many windows have been seen, the present one in part
	Geometry Geometry
	Stats    []Stat // of the sets that are known, in their order
}

// Snapshot returns the use of all data sets that are known. It fills stats, which may be
// that of an earlier snapshot, as far as it is large enough.
func (c *Collector) Snapshot(now time.Time, stats []Stat) Snapshot {
	return c.SnapshotAbove(0, now, stats)
}

// SnapshotAbove is Snapshot without the sets that have fewer accesses outside of runs in a
// window. Few sets of many are found fast.
func (c *Collector) SnapshotAbove(least float64, now time.Time, stats []Stat) Snapshot {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tickLocked(now)
	f := c.share(now)
	s := Snapshot{At: now, Window: c.p.Window, Windows: c.age + f, Geometry: c.geometry, Stats: stats[:0]}
	at, parts := c.seconds(now.UnixNano()), blending(c.p.Decay, f, c.age)
	for i := range c.table.entries {
		e := &c.table.entries[i]
		c.table.roll(e, c.window)
		if float64(e.past.accesses()*parts.past+e.current.accesses()*parts.current) < least {
			continue
		}
		s.Stats = append(s.Stats, stat(e.set, parts.of(e.past, e.current), time.Duration(at-min(e.last, at))*time.Second))
	}
	slices.SortFunc(s.Stats, func(a, b Stat) int { return cmp.Compare(a.Set, b.Set) })
	return s
}

// stat tells what the means of a set are.
func stat(set Set, m counts, age time.Duration) Stat {
	s := Stat{Set: set, Reads: m.reads, Writes: m.writes, Runs: m.runs, Age: age}
	if all := m.accesses() + m.runs; all > 0 {
		s.Size = m.bytes / all
	}
	return s
}

// Find returns what is known of a set; the zero Stat with its number where nothing is.
func (s Snapshot) Find(set Set) (Stat, bool) {
	i, ok := slices.BinarySearchFunc(s.Stats, set, func(a Stat, b Set) int { return cmp.Compare(a.Set, b) })
	if !ok {
		return Stat{Set: set, Age: math.MaxInt64}, false
	}
	return s.Stats[i], true
}

// History returns the windows that have ended and are kept, the oldest first. They are not
// changed any more.
func (c *Collector) History() []Window {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.history.windows)
}

// Status returns what the collector says of itself.
func (c *Collector) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := Status{
		Sets: len(c.table.entries), Most: c.table.most, Evicted: c.table.evicted,
		Bytes:   c.table.bytes() + c.history.bytes() + int64(len(c.recorders))*recorderBytes,
		Counted: c.out, Lost: c.lost, Sample: int(c.every), Classes: slices.Clone(c.classes),
	}
	for _, r := range c.recorders {
		s.Lost += r.lost.Load()
	}
	return s
}

// String tells the geometry as messages show it.
func (g Geometry) String() string {
	return fmt.Sprintf("%d sets of %d KiB", g.Sets(), g.SetBytes>>10)
}
