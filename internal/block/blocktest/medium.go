package blocktest

import (
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// SectorSize is the number of bytes that a device writes atomically.
const SectorSize = 512

// page is the content of one block. A page is never changed once it is in an
// image, so that images share pages.
type page [block.Size]byte

// image is sparse content by block number; an absent page is zero.
type image map[int64]*page

// change is an operation that is not durable yet.
type change struct {
	seq     uint64
	op      hpdi.Op
	off     int64
	n       int64
	data    []byte // of a write
	durable bool   // its request was Durable: it is when it has been reaped
	reaped  bool   // its request was returned by Wait: the next flush covers it
	tear    uint64 // not 0: only some sectors reached the medium, by this seed
}

// arrived tells which sectors of a write reached the device at all.
func (c *change) arrived(sector int64) bool { return c.tear == 0 || mix(c.tear, uint64(sector))&1 == 0 }

// medium is what is behind a Crash: it outlives the handles to it.
type medium struct {
	clock *Clock
	seed  uint64

	mu      sync.Mutex // guards all below
	rng     *rand.Rand
	seq     uint64
	visible image // what reads see: durable with all of pending applied in order
	durable image
	pending []*change // in order of submission
}

func newRand(seed, stream uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, stream)) }

// readLocked fills p from offset off of what is visible.
func (m *medium) readLocked(p []byte, off int64) {
	for len(p) > 0 {
		in := off % block.Size
		n := min(int64(len(p)), block.Size-in)
		if pg := m.visible[off/block.Size]; pg != nil {
			copy(p[:n], pg[in:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
}

// addLocked makes a change of r, visible at once and not durable.
func (m *medium) addLocked(r *hpdi.Request, tear uint64) *change {
	m.seq++
	c := &change{seq: m.seq, op: r.Op, off: r.Offset, n: r.Bytes(), tear: tear}
	if r.Op == hpdi.OpWrite {
		c.data = make([]byte, 0, c.n)
		for _, v := range r.Vec {
			c.data = append(c.data, v...)
		}
	}
	m.pending = append(m.pending, c)
	m.visible.apply(c, m.choice(c))
	return c
}

// flushLocked makes the changes durable that are covered.
func (m *medium) flushLocked(covered func(*change) bool) {
	// From the newest on: reads see the later of two changes that overlap, so the
	// earlier one must not outlive it as pending, whatever made the later one durable.
	goes := make([]bool, len(m.pending))
	for i, c := range slices.Backward(m.pending) {
		goes[i] = covered(c)
		for j := i + 1; j < len(goes) && !goes[i]; j++ {
			o := m.pending[j]
			goes[i] = goes[j] && o.off < c.off+c.n && c.off < o.off+o.n
		}
	}
	kept := m.pending[:0]
	for i, c := range m.pending {
		if !goes[i] {
			kept = append(kept, c)
			continue
		}
		m.durable.apply(c, m.choice(c))
	}
	clear(m.pending[len(kept):])
	m.pending = kept
}

// reapLocked notes that whoever asked for c learns of its end.
func (m *medium) reapLocked(c *change) {
	c.reaped = true
	if c.durable {
		m.flushLocked(func(o *change) bool { return o == c })
	}
}

// choice returns which sectors a change affects while power is on; nil is
// all. For a discard it is by seed, and a pure function of the change, so that
// what reads see is what a flush keeps; and so it is for what arrived torn.
func (m *medium) choice(c *change) func(int64) bool {
	if c.tear != 0 {
		return c.arrived
	}
	if c.op != hpdi.OpDiscard {
		return nil
	}
	return func(sector int64) bool {
		return mix(m.seed^c.seq<<32, uint64(sector*SectorSize/block.Size))&1 == 0
	}
}

// apply carries c out on the image: all of it, or the sectors that want (when
// not nil) says yes to.
func (im image) apply(c *change, want func(sector int64) bool) {
	if c.op == hpdi.OpWrite {
		im.write(c.data, c.off, want)
		return
	}
	im.zero(c.off, c.n, want)
}

func (im image) write(data []byte, off int64, want func(sector int64) bool) {
	for len(data) > 0 {
		b, in := off/block.Size, off%block.Size
		n := min(int64(len(data)), block.Size-in)
		if n == block.Size && want == nil {
			// The change's copy of the data is never written to either.
			im[b] = (*page)(data[:block.Size])
		} else {
			pg := im.copyOf(b)
			for s := int64(0); s < n; s += SectorSize {
				if want == nil || want((off+s)/SectorSize) {
					copy(pg[in+s:in+s+SectorSize], data[s:])
				}
			}
			im[b] = pg
		}
		data, off = data[n:], off+n
	}
}

// zero clears a range. It visits only blocks that are there, so that a range
// of terabytes costs nothing.
func (im image) zero(off, n int64, want func(sector int64) bool) {
	first, last := off/block.Size, (off+n-1)/block.Size
	if n == 0 {
		return
	}
	one := func(b int64) {
		if im[b] == nil {
			return
		}
		from, to := max(off, b*block.Size), min(off+n, (b+1)*block.Size)
		if want == nil && to-from == block.Size {
			delete(im, b)
			return
		}
		pg := im.copyOf(b)
		for s := from; s < to; s += SectorSize {
			if want == nil || want(s/SectorSize) {
				clear(pg[s%block.Size : s%block.Size+SectorSize])
			}
		}
		im[b] = pg
	}
	if last-first < int64(len(im)) {
		for b := first; b <= last; b++ {
			one(b)
		}
		return
	}
	for b := range im {
		if b >= first && b <= last {
			one(b)
		}
	}
}

func (im image) copyOf(b int64) *page {
	pg := new(page)
	if old := im[b]; old != nil {
		*pg = *old
	}
	return pg
}

func (im image) clone() image {
	out := make(image, len(im))
	for b, pg := range im {
		out[b] = pg
	}
	return out
}

// afterCutLocked returns the content that a power cut leaves.
func (m *medium) afterCutLocked(mode CutMode, seed uint64) image {
	switch mode {
	case DropAll:
		return m.durable.clone()
	case KeepAll:
		return m.visible.clone()
	}
	im := m.durable.clone()
	rng := newRand(seed, 1)
	for _, i := range rng.Perm(len(m.pending)) {
		c := m.pending[i]
		switch rng.IntN(3) {
		case 0: // dropped
		case 1:
			im.apply(c, c.arrived)
		case 2:
			tear := rng.Uint64()
			im.apply(c, func(sector int64) bool { return c.arrived(sector) && mix(tear, uint64(sector))&1 == 0 })
		}
	}
	return im
}

// mix hashes two numbers into one (splitmix64's finaliser).
func mix(a, b uint64) uint64 {
	x := a*0x9e3779b97f4a7c15 ^ b
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
