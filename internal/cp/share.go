package cp

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/space"
	"github.com/pollux-storage/pollux/internal/table"
)

// matchWindow is how many blocks of a series are matched at a time: what they
// become is known to those that follow.
const matchWindow = block.TrackBlocks

// planDevice is the number of a device that no pool has: addresses on it stand for
// the blocks that a consistency point will write, in their order.
const planDevice = 1 << 15

// compareBytes is how much is read at once in order to be compared.
const compareBytes = 4 << 20

// sharing finds the blocks of a plan that are stored already. It is memory that is used
// again by the next plan.
type sharing struct {
	m *Machine
	p *plan

	matcher    dedup.Matcher
	matches    []dedup.Match // of a window, and those before it that decide about them
	order      []int32       // blocks of the plan in the order in which they are matched
	fresh      []int32       // blocks that are to be written, as far as is known
	places     table.Table[uint32]
	found      []sharedRun
	leaves     []uint64
	candidates []block.Physical
	buf        []byte
	ios        []*devices.IO
	all        []devices.IO
	vecs       [][1][]byte

	memory memory

	// Of the series that is being matched.
	series series
}

// sharedRun are n blocks in order, from first on, that share those from at on.
type sharedRun struct {
	first, n int
	at       block.Physical
}

// series is a series of blocks of a plan that are neighbours in their volume, but for
// those that memory has.
type series struct {
	volume    block.VolumeID
	lba, end  block.Logical // of the first, and behind the last
	first     int           // of the first, in order
	run       int           // THN
	before    [dedup.MaxRun]block.Pointer
	after     [dedup.MaxRun]block.Pointer
	nBefore   int // how many of before are known, from its end; -1 if nobody looked
	nAfter    int
	beforeFn  func(block.Physical) int
	afterFn   func(block.Physical) int
	unknownFn func(int) bool
}

// share finds what of the plan's blocks is stored already, gives it references, and
// says of all others that they are to be written.
func (m *Machine) share(p *plan) {
	p.fresh, p.shared = p.fresh[:0], p.shared[:0]
	if !p.sharing && m.memoryDevices(DeviceLeaving) == 0 || m.Index == nil || !m.sb.Shares() {
		for i := range p.blocks {
			p.fresh = append(p.fresh, int32(i))
		}
		return
	}
	s := m.sharing()
	s.p = p
	s.beginMemory()
	s.lookUp()
	s.match()
	s.compare()
	s.take()
	for i := range p.blocks {
		if p.blocks[i].at == block.None && !p.blocks[i].single {
			p.fresh = append(p.fresh, int32(i))
		}
	}
}

func (m *Machine) sharing() *sharing {
	if m.shares == nil {
		s := &sharing{m: m}
		s.series.beforeFn, s.series.afterFn, s.series.unknownFn = s.before, s.after, s.unknown
		m.shares = s
	}
	return m.shares
}

// printsAtOnce is how many fingerprints are looked up together.
const printsAtOnce = 64

// lookUp computes the fingerprints of the plan's blocks, and reads those of the
// tracks where some of them may be stored.
func (s *sharing) lookUp() {
	m, p := s.m, s.p
	s.leaves = s.leaves[:0]
	for blocks := range slices.Chunk(p.blocks, printsAtOnce) {
		p.prints = p.prints[:0]
		for i := range blocks {
			if b := &blocks[i]; b.run > 0 {
				if b.print = dedup.Fingerprint(m.dirty.Print(b.slot.Extent)); b.print == dedup.None {
					b.print = m.Print(m.log.Payload(b.slot.Extent, 1))
				}
				p.prints = append(p.prints, b.print)
			}
		}
		m.Index.Touch(p.prints)
		for i := range blocks {
			b := &blocks[i]
			if b.run == 0 {
				continue
			}
			s.candidates = m.Index.Candidates(b.print, s.candidates[:0])
			b.known = len(s.candidates) > 0
			for _, c := range s.candidates {
				if of(s.memory.used, c) && b.memory == block.None {
					b.memory = c
				}
				if leaf := leafOf(c); len(s.leaves) == 0 || s.leaves[len(s.leaves)-1] != leaf {
					s.leaves = append(s.leaves, leaf)
				}
			}
		}
	}
	slices.Sort(s.leaves)
	s.leaves = slices.Compact(s.leaves)
	m.prefetchPrints(s.leaves)
}

// match finds the matches of all series.
func (s *sharing) match() {
	p := s.p
	s.found, s.fresh, s.order = s.found[:0], s.fresh[:0], s.order[:0]
	s.places.Clear()
	s.evacuate()
	s.takeFromMemory()
	for first := 0; first < len(p.blocks); {
		b := &p.blocks[first]
		n := 1
		for first+n < len(p.blocks) && p.blocks[first+n].volume == b.volume && p.blocks[first+n].lba == b.lba+block.Logical(n) {
			n++
		}
		if b.run > 0 {
			s.matchSeries(first, n)
		}
		first += n
	}
}

func (s *sharing) matchSeries(first, n int) {
	p, b := s.p, &s.p.blocks[first]
	q := &s.series
	q.volume, q.lba, q.end, q.first, q.run, q.nBefore, q.nAfter = b.volume, b.lba, b.lba+block.Logical(n), len(s.order), b.run, -1, -1
	p.prints = p.prints[:0]
	for i := first; i < first+n; i++ {
		if !p.blocks[i].taken {
			p.prints = append(p.prints, p.blocks[i].print)
			s.order = append(s.order, int32(i))
		}
	}
	first, n = q.first, len(p.prints)
	s.matcher.Run = b.run
	of := dedup.Series{Prints: p.prints, Before: q.beforeFn, After: q.afterFn, Unknown: q.unknownFn}
	window := matchWindow
	if b.run == 1 {
		window = 1 // the very block before can be the same
	}
	s.matches = s.matches[:0]
	for lo := 0; lo < n; {
		hi := min(lo+window, n)
		// Of earlier matches the last two decide which ones can follow.
		s.matches = slices.Delete(s.matches, 0, max(0, len(s.matches)-2))
		known := len(s.matches)
		s.matches = s.matcher.Space(s.matcher.Matches(of, lo, hi, s, s.matches), known)
		at := lo
		for _, m := range s.matches[known:] {
			s.write(first+at, first+m.First)
			s.found = append(s.found, sharedRun{first + m.First, m.N, m.At})
			at = m.End()
		}
		hi = max(hi, at)
		s.write(first+at, first+hi)
		lo = hi
	}
}

// write says that no match has the blocks lo to hi-1 in order. They are going to be
// written, and may be shared by those that follow.
func (s *sharing) write(lo, hi int) {
	order := s.order[lo:hi:hi]
	s.lookForShort(order)
	for k, i := range order {
		if s.single(i, s.memory.short[k]) {
			continue
		}
		if f := s.p.blocks[i].print; f != dedup.None {
			if place, had := s.places.Put(placeKey(f), uint32(len(s.fresh))); had {
				s.places.Put(placeKey(f), place) // the first one is found
			}
		}
		s.fresh = append(s.fresh, i)
	}
}

// placeKey makes a key of a table of a fingerprint.
func placeKey(f dedup.Fingerprint) uint64 { return uint64(f) >> 1 }

// Candidates implements dedup.Stored.
func (s *sharing) Candidates(f dedup.Fingerprint, to []block.Physical) []block.Physical {
	if place, ok := s.places.Get(placeKey(f)); ok {
		to = append(to, block.At(planDevice, uint64(place)))
	}
	return s.m.Candidates(f, to)
}

// Fingerprint implements dedup.Stored.
func (s *sharing) Fingerprint(p block.Physical) dedup.Fingerprint {
	if p.Device() == planDevice {
		if n := p.Block(); n < uint64(len(s.fresh)) {
			return s.p.blocks[s.fresh[n]].print
		}
		return dedup.None
	}
	return s.m.Fingerprint(p)
}

// before returns how many blocks in front of the series are mapped to those in front of
// p, as far as memory knows.
func (s *sharing) before(p block.Physical) int {
	q := &s.series
	if q.nBefore < 0 {
		q.nBefore = int(min(block.Logical(q.run), q.lba))
		if !s.m.Map.LookupCached(q.volume, q.lba-block.Logical(q.nBefore), q.before[:q.nBefore]) {
			q.nBefore = 0
		}
		q.nBefore = s.onDisks(q.before[:q.nBefore])
	}
	n := 0
	for n < q.nBefore && uint64(n) < p.Block()%block.TrackBlocks && q.before[q.nBefore-1-n].Phys == p-block.Physical(n+1) {
		n++
	}
	return n
}

// unknown reports whether neither the index nor the plan has anything like block i of the
// series.
func (s *sharing) unknown(i int) bool {
	b := &s.p.blocks[s.order[s.series.first+i]]
	return !b.known && !s.places.Has(placeKey(b.print))
}

// onDisks takes those that are in memory out of pointers, and returns how many are left.
func (s *sharing) onDisks(ptrs []block.Pointer) int {
	if s.memory.used == 0 {
		return len(ptrs)
	}
	return len(slices.DeleteFunc(ptrs, func(p block.Pointer) bool { return of(s.memory.used, p.Phys) }))
}

// after returns how many blocks behind the series are mapped to those from p on.
func (s *sharing) after(p block.Physical) int {
	q := &s.series
	if q.nAfter < 0 {
		q.nAfter = q.run
		if !s.m.Map.LookupCached(q.volume, q.end, q.after[:q.nAfter]) {
			q.nAfter = 0
		}
		q.nAfter = s.onDisks(q.after[:q.nAfter])
	}
	n := 0
	for n < q.nAfter && (n == 0 || (p+block.Physical(n)).Block()%block.TrackBlocks != 0) && q.after[n].Phys == p+block.Physical(n) {
		n++
	}
	return n
}

// compare drops what of the matches is not the same byte for byte.
func (s *sharing) compare() {
	if planted.Has(planted.ShareUnverified) {
		return
	}
	kept := s.found[:0]
	for rest := s.found; len(rest) > 0; {
		n, blocks := 0, 0
		for n < len(rest) && blocks+rest[n].n <= compareBytes/block.Size {
			blocks += rest[n].n
			n++
		}
		kept = s.compareBatch(rest[:n], kept)
		rest = rest[n:]
	}
	s.found = kept
}

// needBuffer makes sure that there is a buffer, and reports whether there is.
func (s *sharing) needBuffer() bool {
	if s.buf == nil {
		if buf, err := hpdi.AllocPrivate(compareBytes); err == nil {
			s.buf = buf
		}
	}
	return s.buf != nil
}

// compareBatch appends what of the runs is the same to kept: all of a run, or as much of
// its beginning as is long enough. What the cache does not have is read, all at once.
func (s *sharing) compareBatch(runs []sharedRun, kept []sharedRun) []sharedRun {
	m := s.m
	if !s.needBuffer() {
		return kept // without memory nothing is shared
	}
	same := make([]int, len(runs)) // blocks from the first on; -1 for what is read
	s.ios, s.all, s.vecs = s.ios[:0], slices.Grow(s.all[:0], len(runs)), slices.Grow(s.vecs[:0], len(runs))
	buf := s.buf
	for i, r := range runs {
		if r.at.Device() == planDevice {
			same[i] = s.same(r, func(k int) []byte { return s.payload(int(s.fresh[r.at.Block()+uint64(k)])) })
			continue
		}
		if n, known := s.sameInCache(r); known {
			same[i] = n
			continue
		}
		same[i] = -1
		s.vecs = append(s.vecs, [1][]byte{buf[:r.n*block.Size]})
		s.all = append(s.all, devices.IO{Op: hpdi.OpRead, At: r.at, Vec: s.vecs[len(s.vecs)-1][:]})
		s.ios = append(s.ios, &s.all[len(s.all)-1])
		buf = buf[r.n*block.Size:]
	}
	_ = m.Devices.Do(s.ios) // each has its own result; what cannot be read is not shared
	ios := s.ios
	for i, r := range runs {
		if same[i] < 0 {
			io := ios[0]
			ios = ios[1:]
			if io.Err != nil {
				continue // it may be the same
			}
			same[i] = s.sameOnCopies(r.at, r.n, io.Vec[0], func(n int) int {
				return s.same(sharedRun{r.first, n, r.at}, func(k int) []byte { return io.Vec[0][k*block.Size:][:block.Size] })
			})
		}
		if same[i] < r.n {
			m.stats.unequal.Add(1)
			if r.n = same[i]; r.n == 0 || r.n < s.block(r.first).run {
				continue
			}
		}
		kept = append(kept, r)
	}
	return kept
}

// same returns how many blocks of a run, from the first on, are those that stored returns.
func (s *sharing) same(r sharedRun, stored func(k int) []byte) (n int) {
	for n < r.n && bytes.Equal(stored(n), s.payload(int(s.order[r.first+n]))) {
		n++
	}
	return n
}

// sameOnCopies returns how many of n blocks from at on, which were read into buf, are
// what they are compared with: same says it of buf. Where the device keeps copies, one of
// them was read. It may have lost what was written last and hold what was there before,
// which is just what an old fingerprint leads to; so all must be the same on each copy.
func (s *sharing) sameOnCopies(at block.Physical, n int, buf []byte, same func(n int) int) int {
	set := s.m.Devices
	n = same(n)
	for c, copies := 0, set.Copies(at.Device()); copies > 1 && c < copies && n > 0; c++ {
		switch err := set.ReadCopy(c, at, buf[:n*block.Size]); {
		case err == nil:
			n = same(n)
		case !errors.Is(err, hpdi.ErrNoCopy):
			return 0 // it may be the same
		}
	}
	return n
}

// block returns a block of the plan by its place in order.
func (s *sharing) block(i int) *planned { return &s.p.blocks[s.order[i]] }

// payload returns the content of a block of the plan.
func (s *sharing) payload(i int) []byte { return s.m.log.Payload(s.p.blocks[i].slot.Extent, 1) }

// sameInCache is same for what the cache has; known says that it has all.
func (s *sharing) sameInCache(r sharedRun) (n int, known bool) {
	for k := range r.n {
		i := int(s.order[r.first+k])
		p := block.Pointer{Phys: r.at + block.Physical(k), Sum: s.p.blocks[i].slot.Sum, Shared: true}
		same, here := s.m.Reader.SameCached(p, s.payload(i))
		if !here {
			return 0, false
		}
		if same && n == k {
			n++
		}
	}
	return n, true
}

// take gives the blocks that are shared their references. Those that lie in the plan
// itself get them when they have a place, see settle.
func (s *sharing) take() {
	p := s.p
	for _, r := range s.found {
		if r.at.Device() == planDevice {
			for k := range r.n {
				b := s.block(r.first + k)
				b.at, b.of = inPlan, s.fresh[r.at.Block()+uint64(k)]
			}
			continue
		}
		run := space.Run{At: r.at, N: r.n}
		if !planted.Has(planted.SharedNotCounted) {
			if s.m.Space.Inc(run) != nil {
				continue // they have as many references as a block can have
			}
			p.shared = append(p.shared, run)
		}
		for k := range r.n {
			b := s.block(r.first + k)
			b.at, b.shared = r.at+block.Physical(k), true
		}
	}
}

// inPlan is the address of a block that shares another one of its plan, until that has
// a place.
const inPlan block.Physical = 1<<64 - 1

// settle gives the blocks that share others of the plan their references, now that
// those have places. Where these are not consecutive, or not on one track, a series may
// have become too short; its blocks are written after all.
func (m *Machine) settle(p *plan) error {
	var more, series []int32
	for i := range p.blocks {
		b := &p.blocks[i]
		if b.at != inPlan || !m.inMemory(p.blocks[b.of].at) {
			continue
		}
		run := space.Run{At: p.blocks[b.of].at, N: 1}
		if b.shared = m.Space.Inc(run) == nil; b.shared {
			b.at = run.At
			p.shared = append(p.shared, run)
		} else {
			b.at = block.None
			more = append(more, int32(i))
		}
	}
	for i := 0; i < len(p.blocks); {
		b := &p.blocks[i]
		if b.at != inPlan {
			i++
			continue
		}
		at := p.blocks[b.of].at
		series = append(series[:0], int32(i))
		for i++; i < len(p.blocks); i++ {
			c, n := &p.blocks[i], len(series)
			if c.volume != b.volume || c.lba != p.blocks[i-1].lba+1 {
				break
			}
			if m.inMemory(c.at) {
				continue // it does not part the series
			}
			if c.at != inPlan || c.taken != b.taken || p.blocks[c.of].at != at+block.Physical(n) || (at+block.Physical(n)).Block()%block.TrackBlocks == 0 {
				break
			}
			series = append(series, int32(i))
		}
		n := len(series)
		i = int(series[n-1]) + 1
		run := space.Run{At: at, N: n}
		shared := (n >= b.run || b.taken) && m.Space.Inc(run) == nil
		if shared {
			p.shared = append(p.shared, run)
		}
		for k, i := range series {
			if c := &p.blocks[i]; shared {
				c.at, c.shared = at+block.Physical(k), true
			} else {
				c.at = block.None
				more = append(more, i)
			}
		}
	}
	if len(more) == 0 {
		return nil
	}
	return m.place(p, more)
}

// place allocates blocks of the plan and adds them to those to be written. The list of
// blocks is used up.
func (m *Machine) place(p *plan, blocks []int32) (err error) {
	blocks = m.placeHot(p, blocks)
	first := len(p.runs)
	if p.runs, err = m.Space.Alloc(len(blocks), p.runs); err != nil {
		return err
	}
	p.assign(first, blocks)
	return nil
}

// giveBack gives up all that a plan which comes to nothing has taken.
func (m *Machine) giveBack(p *plan) {
	// No durable structure knows these blocks.
	for _, r := range slices.Concat(p.runs, p.shared) {
		if err := m.Space.Dec(r); err != nil {
			m.broken = errors.Join(m.broken, fmt.Errorf("give up the blocks of a consistency point: %w", err))
		}
	}
	p.runs, p.shared = p.runs[:0], p.shared[:0]
}
