package cp

import (
	"bytes"
	"iter"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/table"
)

// LLRRM, low-latency random read memory, takes the single blocks that series leave over:
// to read one there costs no seek. How often a block was received is how many copies of
// it there are on disks, for each time it was too short a match to be shared; with the
// threshold's number of them the next one is written to memory instead, and what refers
// to the copies is moved there afterwards, see TakeMoved. What memory has already is shared
// before series are looked for: no seek is saved by parting them.
//
// Nothing durable says that a block has moved. A copy in memory is a block like others,
// which the index finds by its fingerprint before any on disks, so that look-ups are led
// there; a copy on a disk is as good as long as something refers to it. The list of
// copies to be left is in memory only: without it savings come later, and nothing can
// contradict the maps.

// maxMoved is how many copies wait at most for their references to be moved.
const maxMoved = 1 << 20

// inMemory reports whether a block lies in memory.
func (m *Machine) inMemory(p block.Physical) bool {
	return p.Device() < len(m.sb.Devices) && m.sb.Devices[p.Device()].Class == ClassMemory
}

// memoryDevices returns a bit for each device that is memory and in the given state.
func (m *Machine) memoryDevices(state DeviceState) (set uint64) {
	for i, d := range m.sb.Devices {
		if d.Class == ClassMemory && d.State == state {
			set |= 1 << i
		}
	}
	return set
}

// MemoryFailed reports whether writing to memory has failed: nothing moves there until
// the pool is opened again.
func (m *Machine) MemoryFailed() bool { return m.memoryFailed.Load() }

// memory is what a plan needs to know of LLRRM.
type memory struct {
	used    uint64              // a bit for each device that is some
	leaving uint64              // and for each whose blocks go elsewhere
	room    int64               // blocks that may be written there
	least   int                 // the threshold
	places  table.Table[uint32] // blocks that the plan writes there
	short   []block.Physical    // see lookForShort
	matcher dedup.Matcher
	matches []dedup.Match
}

// beginMemory looks what memory the pool has.
func (s *sharing) beginMemory() {
	q, m := &s.memory, s.m
	q.used, q.leaving, q.room, q.least = m.memoryDevices(DeviceUsed), m.memoryDevices(DeviceLeaving), 0, m.sb.Settings.MinCopies()
	q.places.Clear()
	if q.used != 0 && !m.MemoryFailed() {
		_, q.room = m.Space.Apart()
	}
	if m.moved.Len() >= maxMoved {
		q.room = 0
	}
	m.Index.Whole = q.used
}

// of reports whether a block is on one of a set of devices.
func of(devices uint64, p block.Physical) bool { return devices>>p.Device()&1 != 0 }

// takeFromMemory finds the blocks that memory has, one by one.
func (s *sharing) takeFromMemory() {
	if s.memory.used == 0 {
		return
	}
	for i := range s.p.blocks {
		b := &s.p.blocks[i]
		if b.memory != block.None && !b.taken && s.m.Fingerprint(b.memory) == b.print {
			s.found = append(s.found, sharedRun{len(s.order), 1, b.memory})
			s.order = append(s.order, int32(i))
			b.taken = true
		}
	}
}

// lookForShort finds the matches, however short, of blocks of the plan that no series has:
// of an index that keeps one block of several only their neighbours find some.
func (s *sharing) lookForShort(order []int32) {
	q := &s.memory
	q.short = append(q.short[:0], make([]block.Physical, len(order))...) // none is known
	if q.room == 0 || s.m.Index.Stats().Every == 1 {
		return
	}
	prints := make([]dedup.Fingerprint, len(order))
	for i, k := range order {
		prints[i] = s.p.blocks[k].print
	}
	q.matcher.Run = 1
	series := dedup.Series{Prints: prints, Unknown: func(i int) bool { return !s.p.blocks[order[i]].known }}
	q.matches = q.matcher.Matches(series, 0, len(order), s.m, q.matches[:0])
	for _, match := range q.matches {
		for i := range match.N {
			q.short[match.First+i] = match.At + block.Physical(i)
		}
	}
}

// single decides about a block of the plan that no series has, and of which short may be a
// place: it returns true where the block is shared with another one of the plan, or is to
// be written to memory.
func (s *sharing) single(i int32, short block.Physical) bool {
	q, p := &s.memory, s.p
	b := &p.blocks[i]
	if q.used == 0 || b.run == 0 || b.print == dedup.None {
		return false
	}
	if k, ok := q.places.Get(placeKey(b.print)); ok && s.equal(i, int32(k)) {
		b.at, b.of = inPlan, int32(k)
		return true
	}
	copies := s.copies(b, short)
	first, had := s.places.Get(placeKey(b.print))
	had = had && s.equal(i, s.fresh[first])
	again := len(p.again)
	if had {
		p.again = slices.AppendSeq(p.again, p.alike(s.fresh[first]))
	}
	enough := func() bool { return len(copies)+len(p.again)-again >= q.least }
	if q.room > 0 && enough() {
		// Only what is the same counts: whatever refers to it is going to be moved. And
		// not the place that the block itself has now, and leaves.
		was := s.mapped(b).Phys
		copies = slices.DeleteFunc(copies, func(at block.Physical) bool {
			return at == was && s.m.Space.Count(at) == 1 || !s.equalStored(i, at)
		})
	}
	if q.room == 0 || !enough() {
		if p.again = p.again[:again]; had {
			b.of, p.blocks[s.fresh[first]].of = p.blocks[s.fresh[first]].of, i
		}
		return false
	}
	q.room--
	b.single = true
	p.single = append(p.single, i)
	p.moved = append(p.moved, copies...)
	q.places.Put(placeKey(b.print), uint32(i))
	return true
}

// alike returns a block that the plan writes, and those that it writes besides although
// they are the same. They are a list, which ends with 0: none of the others is the first
// of all blocks.
func (p *plan) alike(first int32) iter.Seq[int32] {
	return func(yield func(int32) bool) {
		for k := first; yield(k); {
			if k = p.blocks[k].of; k == 0 {
				return
			}
		}
	}
}

// mapped returns where a volume has a block of the plan now.
func (s *sharing) mapped(b *planned) block.Pointer {
	var p [1]block.Pointer
	if s.m.Map.Lookup(b.volume, b.lba, p[:]) != nil {
		return block.Pointer{}
	}
	return p[0]
}

// copies returns where a block is stored on disks, as far as is known.
func (s *sharing) copies(b *planned, short block.Physical) (copies []block.Physical) {
	q, m := &s.memory, s.m
	s.candidates = s.candidates[:0]
	if b.known {
		s.candidates = m.Index.Candidates(b.print, s.candidates)
	}
	if short != block.None && !slices.Contains(s.candidates, short) {
		s.candidates = append(s.candidates, short)
	}
	copies = s.candidates[:0]
	for _, c := range s.candidates {
		if !of(q.used, c) && m.Fingerprint(c) == b.print {
			copies = append(copies, c)
		}
	}
	return copies
}

// evacuate finds the blocks that are written once more because they have to leave memory.
// All that refer to one share its new place, and their volumes need not share anything
// else: as many copies as there are references might find no room. Seeks are the price.
func (s *sharing) evacuate() {
	q, p, m := &s.memory, s.p, s.m
	if q.leaving == 0 {
		m.evacuated.Clear()
		return
	}
	for i := range p.blocks {
		b := &p.blocks[i]
		was := s.mapped(b)
		if !of(q.leaving, was.Phys) || was.Sum != b.slot.Sum {
			continue
		}
		// With a fingerprint, also of a volume that shares nothing else: as long as the
		// new place has it, it has not become another block.
		b.taken, b.print = true, m.Print(s.payload(i))
		key := uint64(was.Phys)
		if to, ok := m.evacuated.Get(key); ok && m.Fingerprint(block.Physical(to)) == b.print {
			s.found = append(s.found, sharedRun{len(s.order), 1, block.Physical(to)})
			s.order = append(s.order, int32(i))
		} else if k, ok := q.places.Get(key); ok && s.equal(int32(i), int32(k)) {
			b.at, b.of = inPlan, int32(k)
		} else {
			q.places.Put(key, uint32(i))
			p.evacuated = append(p.evacuated, evacuation{was.Phys, int32(i)})
		}
	}
	q.places.Clear()
}

// evacuation is a block of a plan that leaves its place in memory.
type evacuation struct {
	from  block.Physical
	block int32
}

// equal reports whether two blocks of the plan have the same content.
func (s *sharing) equal(i, k int32) bool {
	return bytes.Equal(s.payload(int(i)), s.payload(int(k)))
}

// equalStored reports whether a block that is stored has the content of one of the plan.
func (s *sharing) equalStored(i int32, at block.Physical) bool {
	p := block.Pointer{Phys: at, Sum: s.p.blocks[i].slot.Sum, Shared: true}
	data := s.payload(int(i))
	if same, here := s.m.Reader.SameCached(p, data); here || !s.needBuffer() {
		return same
	}
	frame := s.buf[:block.Size]
	return s.m.Devices.Read(at, frame) == nil && s.sameOnCopies(at, 1, frame, func(n int) int {
		if !bytes.Equal(frame, data) {
			return 0
		}
		return n
	}) == 1
}

// placeApart gives the blocks that are to be written to memory their places there, and
// returns those for which there is none.
func (m *Machine) placeApart(p *plan) (rest []int32) {
	if len(p.single) == 0 {
		return nil
	}
	first := len(p.runs)
	p.runs = m.Space.AllocApart(len(p.single), p.runs)
	return p.assign(first, p.single)
}

// assign gives blocks the places of the plan's runs from one on, and returns those that
// are left over.
func (p *plan) assign(first int, blocks []int32) (rest []int32) {
	for _, r := range p.runs[first:] {
		for k := range r.N {
			p.blocks[blocks[k]].at = r.At + block.Physical(k)
		}
		p.fresh = append(p.fresh, blocks[:r.N]...)
		blocks = blocks[r.N:]
	}
	return blocks
}

// writeFailed looks whether it was memory or flash that could not be written: without it the
// next attempt succeeds.
func (m *Machine) writeFailed(ios []*devices.IO) {
	for _, io := range ios {
		switch {
		case io.Err == nil:
		case m.inMemory(io.At):
			m.memoryFailed.Store(true)
		default:
			if cheap := m.Space.AreCheap([]block.Physical{io.At}); cheap[0] != 0 {
				m.Space.ShunCheap(true)
			}
		}
	}
}

// noteMoved takes note of what the plan has written to memory.
func (m *Machine) noteMoved(p *plan) {
	for _, i := range p.single {
		if m.inMemory(p.blocks[i].at) {
			m.stats.transferred.Add(1)
		}
	}
	for _, at := range p.moved {
		m.noteCopy(at)
	}
	for _, i := range p.again {
		m.noteCopy(p.blocks[i].at)
	}
	for _, e := range p.evacuated {
		if m.evacuated.Len() < maxMoved {
			m.evacuated.Put(uint64(e.from), uint64(p.blocks[e.block].at))
		}
	}
}

// noteCopy takes note of a copy on a disk of what memory has.
func (m *Machine) noteCopy(at block.Physical) {
	if m.moved.Len() < maxMoved {
		m.moved.Put(uint64(at), 0)
	}
}

// TakeMoved calls fn for the copies on disks whose references are to be moved, because
// memory has the same blocks, and forgets them.
func (m *Machine) TakeMoved(fn func(at block.Physical)) {
	for at := range m.moved.All() {
		if m.Space.Count(block.Physical(at)) > 0 {
			fn(block.Physical(at))
		}
	}
	m.moved.Clear()
}

// MovedLen returns how many there are, some of which may have been freed.
func (m *Machine) MovedLen() int { return m.moved.Len() }

// InMemory reports whether a block with a fingerprint lies in memory, or elsewhere
// although memory has it as far as is known. With it a series is not parted.
func (m *Machine) InMemory(p block.Physical, f dedup.Fingerprint) (here, elsewhere bool) {
	if m.inMemory(p) {
		return true, false
	}
	used := m.memoryDevices(DeviceUsed)
	if used == 0 || f == dedup.None {
		return false, false
	}
	return false, slices.ContainsFunc(m.placesOf(m.Index, f, nil), func(c block.Physical) bool { return of(used, c) })
}

// placesOf appends the places where blocks with a fingerprint are stored that may be
// shared, as far as an index knows.
func (m *Machine) placesOf(x *dedup.Index, f dedup.Fingerprint, to []block.Physical) []block.Physical {
	known := len(to)
	for _, c := range x.Candidates(f, to)[known:] {
		if m.Fingerprint(c) == f {
			to = append(to, c)
		}
	}
	return to
}

// indexInMemory takes note of the copies on disks of a block in memory that has just been
// put into an index: after the pool was opened nobody else knows of them.
func (m *Machine) indexInMemory(x *dedup.Index, f dedup.Fingerprint, p block.Physical) {
	for _, c := range m.placesOf(x, f, nil) {
		if c != p && !m.inMemory(c) {
			m.noteCopy(c)
		}
	}
}
