package vhost

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// Packed tracks what is in flight of one packed queue, as Split does of a split one. Its
// entries hold copies of the descriptors, because a used descriptor overwrites one of
// another request in the ring; the entries that are in use are those that are not in the list of free
// ones.
//
// The first used descriptor of a batch is the last that is written to the ring. So what
// follows it is in the ring before the batch exists, and whoever attaches the area after
// a death takes that back: the driver would else find it behind the first batch
// of the successor, which may be shorter.
type Packed struct {
	Resumed bool // as of Split

	mem     []byte
	trailer []byte
	size    int
	counter uint64

	free, oldFree uint16
	used, oldUsed uint16
	wrap, oldWrap bool
	next          []uint16 // of each entry, as it is in the area
	last, num     []uint16 // of the heads in flight
}

// Ring is what attaching has to know of, and do to, a packed ring.
type Ring interface {
	// Available reports whether the descriptor there is as the driver has made it
	// available: then it was not used, and the driver could not use its place again.
	Available(virtio.PackedPosition) bool
	// Unuse makes the descriptor there one that is available, and taken.
	Unuse(virtio.PackedPosition)
}

// Entry words: inflight in bits 0 to 7, next in 16 to 31, last in 32 to 47, num in 48 to
// 63; the counter; id, flags and len; the address.
func packedAt(slot uint16) int { return packedHeader + int(slot)*packedEntry }

// AttachPacked goes on with a queue of which base is the place of the next used descriptor
// if the region was never used or was left in good order; otherwise the region tells it.
// It returns that place, the next available one, and what was in flight, in the order of submission.
func (a *Area) AttachPacked(queue int, base virtio.PackedPosition, ring Ring) (p *Packed, used, avail virtio.PackedPosition, subs []Submission, err error) {
	fail := func(format string, args ...any) (*Packed, virtio.PackedPosition, virtio.PackedPosition, []Submission, error) {
		return nil, base, base, nil, fmt.Errorf("queue %d: %w: %w", queue, fmt.Errorf(format, args...), ErrProtocol)
	}
	if !a.packed {
		return fail("an in-flight area for split rings")
	}
	p = &Packed{
		mem: a.region(queue), trailer: a.trailer()[counterAt(queue):][:8:8], size: a.size,
		next: make([]uint16, a.size), last: make([]uint16, a.size), num: make([]uint16, a.size),
	}
	if p.counter = load(p.trailer, 0); p.counter > counterLimit {
		return fail("the in-flight area's counter is %d", p.counter)
	}
	h, h2 := load(p.mem, 8), load(p.mem, 16)
	if uint16(h) == 0 {
		p.format(base)
		return p, base, base, nil, nil
	}
	if uint16(h) != regionLayout || int(uint16(h>>16)) != a.size {
		return fail("its in-flight region has version %d and %d descriptors, not %d and %d", uint16(h), uint16(h>>16), regionLayout, a.size)
	}
	p.Resumed = true
	p.free, p.oldFree = uint16(h>>32), uint16(h>>48)
	p.used, p.oldUsed = uint16(h2), uint16(h2>>16)
	p.wrap, p.oldWrap = byte(h2>>32) != 0, byte(h2>>40) != 0
	if int(p.free) > a.size || int(p.oldFree) > a.size || int(p.used) >= a.size || int(p.oldUsed) >= a.size {
		return fail("its in-flight region has free entries from %d or %d and used descriptors from %d or %d of %d", p.free, p.oldFree, p.used, p.oldUsed, a.size)
	}
	p.settleRing(ring)
	if subs, err = p.survey(); err != nil {
		return fail("%w", err)
	}
	p.heads()
	p.counts()
	taken := 0
	for _, s := range subs {
		taken += len(s.Descs)
	}
	used = p.now()
	return p, used, used.Forward(taken, a.size), subs, nil
}

// format begins a new region.
func (p *Packed) format(base virtio.PackedPosition) {
	p.counter = max(p.counter, 1)
	p.used, p.oldUsed, p.wrap, p.oldWrap = base.Index, base.Index, base.Wrap, base.Wrap
	for i := range p.size {
		p.next[i] = uint16(i + 1)
		p.entry(uint16(i), false)
	}
	p.counts()
	p.heads()
}

// settleRing finishes the last batch if the ring has it, and takes it back if not.
func (p *Packed) settleRing(ring Ring) {
	old, now := p.before(), p.now()
	if old != now {
		if !ring.Available(old) {
			p.oldFree, p.oldUsed, p.oldWrap = p.free, p.used, p.wrap
			p.heads()
			p.counts()
			return
		}
		if !planted.Has(planted.InflightTailKept) {
			for at, n := old.Forward(1, p.size), 1; at != now && n < p.size; at, n = at.Forward(1, p.size), n+1 {
				ring.Unuse(at)
			}
		}
	}
	p.free, p.used, p.wrap = p.oldFree, p.oldUsed, p.oldWrap
}

// survey reads the entries: those in the free list are not in flight, whatever they say.
func (p *Packed) survey() ([]Submission, error) {
	words := make([]uint64, p.size)
	for i := range p.size {
		words[i] = load(p.mem, packedAt(uint16(i)))
		p.next[i] = uint16(words[i] >> 16)
		c := load(p.mem, packedAt(uint16(i))+8)
		if c > counterLimit {
			return nil, fmt.Errorf("the counter of entry %d in its in-flight region is %d", i, c)
		}
		p.counter = max(p.counter, c+1)
	}
	seen := make([]bool, p.size)
	for at, n := p.free, 0; int(at) != p.size; at, n = p.next[at], n+1 {
		if int(at) > p.size || seen[at] {
			return nil, fmt.Errorf("the list of free entries in its in-flight region comes to %d after %d of %d", at, n, p.size)
		}
		seen[at] = true
		if byte(words[at]) != 0 {
			p.entry(at, false)
		}
	}
	var subs []Submission
	for i, w := range words {
		if byte(w) == 0 || seen[i] {
			continue
		}
		s := Submission{Slot: uint16(i), Counter: load(p.mem, packedAt(uint16(i))+8)}
		at := uint16(i)
		p.last[i], p.num[i] = uint16(w>>32), uint16(w>>48)
		for n := range p.num[i] {
			if int(at) >= p.size || seen[at] {
				return nil, fmt.Errorf("entry %d of its in-flight region, of %d descriptors, comes to %d after %d", i, p.num[i], at, n)
			}
			seen[at] = true
			m := load(p.mem, packedAt(at)+16)
			s.Descs = append(s.Descs, virtio.PackedDesc{ID: uint16(m), Flags: uint16(m >> 16), Len: uint32(m >> 32), Addr: load(p.mem, packedAt(at)+24)})
			p.last[i] = at
			at = p.next[at]
		}
		if len(s.Descs) == 0 {
			return nil, fmt.Errorf("entry %d of its in-flight region has no descriptors", i)
		}
		subs = append(subs, s)
	}
	if lost := slices.Index(seen, false); lost >= 0 {
		return nil, fmt.Errorf("entry %d of its in-flight region is neither free nor in flight", lost)
	}
	slices.SortFunc(subs, func(x, y Submission) int { return cmp.Compare(x.Counter, y.Counter) })
	return subs, nil
}

func (p *Packed) now() virtio.PackedPosition {
	return virtio.PackedPosition{Index: p.used, Wrap: p.wrap}
}

func (p *Packed) before() virtio.PackedPosition {
	return virtio.PackedPosition{Index: p.oldUsed, Wrap: p.oldWrap}
}

func (p *Packed) entry(slot uint16, inflight bool) {
	store(p.mem, packedAt(slot), flag(inflight)|uint64(p.next[slot])<<16|uint64(p.last[slot])<<32|uint64(p.num[slot])<<48)
}

// heads stores the word with the free lists, counts that with the used indices.
func (p *Packed) heads() {
	store(p.mem, 8, regionLayout|uint64(p.size)<<16|uint64(p.free)<<32|uint64(p.oldFree)<<48)
}

func (p *Packed) counts() {
	store(p.mem, 16, uint64(p.used)|uint64(p.oldUsed)<<16|flag(p.wrap)<<32|flag(p.oldWrap)<<40)
}

// Fetch notes that a request with these descriptors of the ring is in flight, with several
// stores, of which the last counts. It returns the entry and the counter. There are no
// more descriptors in flight than the queue has.
func (p *Packed) Fetch(descs []virtio.PackedDesc) (slot uint16, counter uint64) {
	slot, counter = p.free, p.counter
	p.counter++
	at := slot
	for i := range descs {
		d := &descs[i]
		store(p.mem, packedAt(at)+16, uint64(d.ID)|uint64(d.Flags)<<16|uint64(d.Len)<<32)
		store(p.mem, packedAt(at)+24, d.Addr)
		p.last[slot] = at
		at = p.next[at]
	}
	p.num[slot] = uint16(len(descs))
	store(p.mem, packedAt(slot)+8, counter)
	p.entry(slot, true)
	p.free, p.oldFree = at, at
	p.heads()
	return slot, counter
}

// LinkEntry and LinkHead put the entries of a completion into the list of free ones,
// before the ring has it.
func (p *Packed) LinkEntry(slot uint16) {
	last := p.last[slot]
	p.next[last] = p.free
	p.entry(last, last == slot)
}

// LinkHead is the second half of LinkEntry.
func (p *Packed) LinkHead(slot uint16) {
	p.free = slot
	p.heads()
}

// Advance counts the descriptors of the whole batch, before the ring has it.
func (p *Packed) Advance(descs int) {
	now := p.now().Forward(descs, p.size)
	p.used, p.wrap = now.Index, now.Wrap
	p.counts()
}

// Clear notes that a completion of the batch is in the ring.
func (p *Packed) Clear(slot uint16) { p.entry(slot, false) }

// Unlink and Settle end a batch, of which all are cleared. Between them the region says
// that the batch may be unfinished, and the ring that it is.
func (p *Packed) Unlink() {
	p.oldFree = p.free
	p.heads()
}

// Settle is the second half of Unlink.
func (p *Packed) Settle(int) {
	p.oldUsed, p.oldWrap = p.used, p.wrap
	p.counts()
}

// Retire leaves the region in good order, as Split.Retire does.
func (p *Packed) Retire() {
	store(p.trailer, 0, p.counter)
	store(p.mem, 8, 0)
}
