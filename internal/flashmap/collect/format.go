package collect

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// stateVersion is the version of the format that docs/format/access.md describes.
const stateVersion = 1

// Sizes of the parts in bytes: what stands before the sets, a set, and the count of windows
// behind them.
const (
	prefixBytes = 84
	savedBytes  = 44
	countBytes  = 4
)

// Identity says whose state it is: what the header carries.
type Identity struct {
	Pool       block.PoolID
	Epoch      block.Epoch
	Generation uint64
}

// Save returns what is counted, for Load, and the history, in limit bytes, which must be some
// hundred at least. Sets and history have a half each of what there is, and what one of them
// does not need the other one gets. Where that is too little, the least used sets are left
// out, and of the history the oldest windows and the least used sets of each.
func (c *Collector) Save(id Identity, limit int, now time.Time) []byte {
	return c.state(now).encode(id, limit)
}

// state returns all that is saved.
func (c *Collector) state(now time.Time) *state {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tickLocked(now)
	s := c.countedLocked(now)
	s.entries = make([]entry, len(c.table.entries))
	s.windows = slices.Clone(c.history.windows) // their sets are never changed
	at := c.seconds(now.UnixNano())
	for i := range c.table.entries {
		c.table.roll(&c.table.entries[i], c.window)
		e := c.table.entries[i]
		e.last = at - min(e.last, at)
		s.entries[i] = e
	}
	return s
}

// countedLocked returns the state without its sets and windows.
func (c *Collector) countedLocked(now time.Time) *state {
	return &state{
		geometry: c.geometry, window: c.p.Window, decay: c.p.Decay,
		elapsed: max(0, min(now.Sub(c.begun), c.p.Window)), age: c.age, counted: c.out, totals: c.totals,
	}
}

// encode writes as much of the state as finds room.
func (s *state) encode(id Identity, limit int) []byte {
	list := s.entries
	room := max(0, limit-ondisk.HeaderSize-prefixBytes-countBytes)
	past := appendHistory(nil, s.windows, max(room/2, room-len(list)*savedBytes))
	if n := (room - (len(past) - countBytes)) / savedBytes; n < len(list) {
		sortByWorth(list)
		list = list[:n]
	}
	slices.SortFunc(list, func(a, b entry) int { return cmp.Compare(a.set, b.set) })

	p := make([]byte, ondisk.HeaderSize, ondisk.HeaderSize+prefixBytes+len(list)*savedBytes+len(past))
	p = s.appendPrefix(p, len(list))
	for i := range list {
		p = append(p, make([]byte, savedBytes)...)
		list[i].encode(p[len(p)-savedBytes:], list[i].last)
	}
	p = append(p, past...)
	id.seal(p)
	return p
}

func (id *Identity) seal(p []byte) {
	ondisk.Seal(p, ondisk.Header{
		Kind: ondisk.KindAccess, Version: stateVersion, Length: len(p),
		Pool: id.Pool, Epoch: id.Epoch, Generation: id.Generation,
	})
}

// appendPrefix appends what stands before so many sets.
func (s *state) appendPrefix(p []byte, sets int) []byte {
	le := binary.LittleEndian
	p = le.AppendUint64(p, uint64(s.geometry.SetBytes))
	p = le.AppendUint64(p, uint64(s.geometry.Size))
	p = le.AppendUint64(p, uint64(s.window))
	p = le.AppendUint64(p, math.Float64bits(s.decay))
	p = le.AppendUint64(p, uint64(s.elapsed))
	p = le.AppendUint64(p, math.Float64bits(s.age))
	p = le.AppendUint64(p, s.counted)
	for _, v := range [3]float64{s.totals.reads, s.totals.writes, s.totals.runs} {
		p = le.AppendUint64(p, math.Float64bits(v))
	}
	return le.AppendUint32(p, uint32(sets))
}

// encode writes a set, whose last access is so many seconds ago, to p, which has savedBytes.
func (e *entry) encode(p []byte, ago uint32) {
	le := binary.LittleEndian
	p = p[:savedBytes]
	le.PutUint64(p, uint64(e.set))
	le.PutUint32(p[8:], ago)
	e.past.encode(p[12:])
	e.current.encode(p[28:])
}

func (c *counts) encode(p []byte) {
	le := binary.LittleEndian
	p = p[:16]
	le.PutUint32(p, math.Float32bits(c.reads))
	le.PutUint32(p[4:], math.Float32bits(c.writes))
	le.PutUint32(p[8:], math.Float32bits(c.runs))
	le.PutUint32(p[12:], math.Float32bits(c.bytes))
}

// sortByWorth brings those in front whose loss would be greatest.
func sortByWorth(list []entry) {
	slices.SortFunc(list, func(a, b entry) int { return cmp.Or(cmp.Compare(b.worth(), a.worth()), cmp.Compare(a.set, b.set)) })
}

// Load replaces what is counted, and the history, by what Save returned. The time since then
// does not count: while nobody collected, nothing grew cold. A state of windows of another
// length is scaled to the present one, and has no history. When the bytes are damaged, of another pool, a newer format or a device
// of another shape, the collector stays as it is, and the error, of package ondisk's or kind
// block.ErrCorrupt, block.ErrUnsupported or block.ErrInvalid, says why.
func (c *Collector) Load(p []byte, pool block.PoolID, now time.Time) error {
	s, err := decode(p, inOrder)
	if err != nil {
		return fmt.Errorf("saved access information: %w", err)
	}
	return c.load(s, pool, now)
}

// load replaces what is counted by a state, and the history, if the state has one.
func (c *Collector) load(s *state, pool block.PoolID, now time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case s.pool != pool:
		return fmt.Errorf("saved access information is of pool %s: %w", s.pool, block.ErrInvalid)
	case s.geometry != c.geometry:
		return fmt.Errorf("saved access information is of a device of %v, which has %v: %w", s.geometry, c.geometry, block.ErrInvalid)
	}
	c.tickLocked(now)
	c.runs.endAll()
	// The time in front of base is where last accesses before now lie.
	oldest := uint32(0)
	for i := range s.entries {
		oldest = max(oldest, s.entries[i].last)
	}
	c.base = now.Add(-time.Duration(oldest) * time.Second)
	t := newTable(int64(c.p.Memory), c.geometry.Sets(), s.decay)
	list := s.entries
	if len(list) > t.most {
		sortByWorth(list)
		list = list[:t.most]
	}
	c.window++
	for i := range list {
		e := &list[i]
		e.last, e.window = oldest-e.last, c.window
	}
	t.entries = list
	t.grow(max(64, len(list)))
	c.table = t
	c.totals, c.age, c.out = s.totals, s.age, s.counted
	c.begun = now.Add(-s.elapsed)
	if !s.countsAlone {
		c.history.windows = s.windows
	}
	if s.window != c.p.Window || s.decay != c.p.Decay {
		f := float64(s.elapsed) / float64(s.window)
		c.age = restate(t.entries, means{s.window, s.decay, f, s.age}, c.p)
		c.begun, c.totals = now, sums{}
	}
	if s.window != c.p.Window {
		c.history.clear()
	}
	c.history.bound(int64(c.p.History), c.p.HistoryWindows)
	t.decay = float32(c.p.Decay)
	return nil
}

// state is what is saved.
type state struct {
	pool     block.PoolID
	geometry Geometry
	window   time.Duration
	decay    float64
	elapsed  time.Duration
	age      float64
	counted  uint64
	totals   sums
	entries  []entry  // last is the age in seconds
	windows  []Window // the oldest first
	// countsAlone says that it says nothing of windows that have ended.
	countsAlone bool
}

// The order of the sets in a state.
const (
	inOrder  = true
	anyOrder = false
)

// decode reads what Save has written, or Keep, of whatever bytes.
func decode(p []byte, ordered bool) (*state, error) {
	h, err := ondisk.Open(p, ondisk.KindAccess, stateVersion)
	if err != nil {
		return nil, err
	}
	d := ondisk.NewDecoder(p[ondisk.HeaderSize:h.Length])
	s := &state{pool: h.Pool, geometry: Geometry{SetBytes: int64(d.U64()), Size: int64(d.U64())}}
	s.window = time.Duration(d.U64())
	s.decay = math.Float64frombits(d.U64())
	s.elapsed = time.Duration(d.U64())
	s.age = math.Float64frombits(d.U64())
	s.counted = d.U64()
	for _, v := range [3]*float64{&s.totals.reads, &s.totals.writes, &s.totals.runs} {
		*v = math.Float64frombits(d.U64())
	}
	n := d.Count(savedBytes)
	if d.Err() == nil {
		s.check(d)
	}
	s.entries = make([]entry, 0, n)
	for i := 0; i < n && d.Err() == nil; i++ {
		s.entries = append(s.entries, s.entry(d))
	}
	sets := make([]Set, len(s.entries))
	for i := range s.entries {
		sets[i] = s.entries[i].set
	}
	if !ordered {
		slices.Sort(sets)
	}
	for i := 1; i < len(sets) && d.Err() == nil; i++ {
		if sets[i] <= sets[i-1] {
			d.Fail("set %d is not in order", sets[i])
		}
	}
	if d.Err() == nil {
		s.past(d)
	}
	return s, d.Err()
}

// check proves the fields before the sets.
func (s *state) check(d *ondisk.Decoder) {
	switch {
	case s.geometry.Validate() != nil:
		d.Fail("a device of %d bytes with data sets of %d", s.geometry.Size, s.geometry.SetBytes)
	case s.window < minWindow || s.window > maxWindow:
		d.Fail("windows of %d ns", int64(s.window))
	case !(s.decay >= minDecay && s.decay <= maxDecay):
		d.Fail("a decay of %v", s.decay)
	case s.elapsed < 0 || s.elapsed > s.window:
		d.Fail("%d ns of a window of %d", int64(s.elapsed), int64(s.window))
	case !(s.age >= 0 && s.age <= steadyAfter):
		d.Fail("%v windows", s.age)
	case !isCount(s.totals.reads) || !isCount(s.totals.writes) || !isCount(s.totals.runs):
		d.Fail("sums of %v, %v and %v accesses", s.totals.reads, s.totals.writes, s.totals.runs)
	}
}

// maxCount is more than any count that is counted.
const maxCount = 1e30

func isCount(v float64) bool { return v >= 0 && v <= maxCount }

// entry reads a set.
func (s *state) entry(d *ondisk.Decoder) (e entry) {
	b := d.Bytes(savedBytes)
	if b == nil {
		return e
	}
	le := binary.LittleEndian
	e.set, e.last = Set(le.Uint64(b)), le.Uint32(b[8:])
	e.past.decode(b[12:])
	e.current.decode(b[28:])
	for _, m := range [2]*counts{&e.past, &e.current} {
		if !isCount(float64(m.reads)) || !isCount(float64(m.writes)) || !isCount(float64(m.runs)) || !isCount(float64(m.bytes)) {
			d.Fail("set %d has counts of %v", e.set, *m)
		}
	}
	if uint64(e.set) >= s.geometry.Sets() {
		d.Fail("set %d is not there", e.set)
	}
	return e
}

func (c *counts) decode(p []byte) {
	le := binary.LittleEndian
	*c = counts{math.Float32frombits(le.Uint32(p)), math.Float32frombits(le.Uint32(p[4:])), math.Float32frombits(le.Uint32(p[8:])), math.Float32frombits(le.Uint32(p[12:]))}
}
