package space

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// model is what a Space of one device must be: a byte for each block, and whether it is
// cheap.
type model struct {
	*Space
	first int
	count []byte
	cheap []bool
}

func newModel(t *testing.T, blocks, first int) *model {
	t.Helper()
	s := New()
	t.Cleanup(s.Close)
	if err := s.AddDevice(uint64(blocks), uint64(first)); err != nil {
		t.Fatal(err)
	}
	return &model{s, first, make([]byte, blocks), make([]bool, blocks)}
}

// step does one random thing to both and says what differs.
func (m *model) step(rng *rand.Rand) error {
	at := rng.IntN(len(m.count) + 2)
	n := 1 + rng.IntN(min(1<<rng.IntN(9), block.TrackBlocks-at%block.TrackBlocks))
	r := Run{block.At(0, uint64(at)), n}
	inside := at >= m.first && at+n <= len(m.count)
	switch rng.IntN(11) {
	case 0:
		return m.alloc(1 + rng.IntN(600))
	case 8:
		return m.allocCheap(1 + rng.IntN(600))
	case 9, 10:
		first := rng.IntN(len(m.count)/PieceBlocks+2) * PieceBlocks
		n := (1 + rng.IntN(1<<rng.IntN(9))) * PieceBlocks
		on := rng.IntN(2) == 0
		m.SetCheap(0, uint64(first), uint64(n), on)
		for b := first; b < min(first+n, len(m.count)); b++ {
			m.cheap[b] = on
		}
	case 1, 2, 3:
		times := 1
		if rng.IntN(50) == 0 {
			times = rng.IntN(300)
		}
		for range times {
			err := m.Inc(r)
			if full := inside && slices.Max(m.count[at:at+n]) == MaxCount; (err == nil) != (inside && !full) {
				return fmt.Errorf("Inc(%v): %v", r, err)
			}
			for i := 0; err == nil && i < n; i++ {
				m.count[at+i]++
			}
		}
	case 4, 5, 6:
		times := 1
		if rng.IntN(10) == 0 {
			times = MaxCount
		}
		for range times {
			err := m.Dec(r)
			if free := inside && slices.Min(m.count[at:at+n]) == 0; (err == nil) != (inside && !free) || err != nil && !errors.Is(err, block.ErrCorrupt) {
				return fmt.Errorf("Dec(%v): %v", r, err)
			}
			for i := 0; err == nil && i < n; i++ {
				m.count[at+i]--
			}
		}
	case 7:
		// Free a whole range, so that memory comes back.
		for at := max(at, m.first); at < min(at+4000, len(m.count)); at++ {
			for ; m.count[at] > 0; m.count[at]-- {
				if err := m.Dec(Run{block.At(0, uint64(at)), 1}); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// free returns how many blocks are free that are not cheap, and that are.
func (m *model) free() (dear, cheap int) {
	for i, c := range m.count[m.first:] {
		switch {
		case c > 0:
		case m.cheap[m.first+i]:
			cheap++
		default:
			dear++
		}
	}
	return dear, cheap
}

func (m *model) alloc(n int) error {
	dear, cheap := m.free()
	runs, err := m.Alloc(n, nil)
	if (err == nil) != (n <= dear+cheap) {
		return fmt.Errorf("Alloc(%d) of %d and %d cheap ones: %v", n, dear, cheap, err)
	}
	if err != nil {
		n = 0
	}
	if err := m.took(runs, n); err != nil {
		return err
	}
	if now, left := m.free(); now > 0 && left < cheap {
		return fmt.Errorf("%d cheap blocks are handed out while %d others are free", cheap-left, now)
	}
	return nil
}

func (m *model) allocCheap(n int) error {
	dear, cheap := m.free()
	if got := int(m.FreeCheap()); got != cheap {
		return fmt.Errorf("FreeCheap: %d instead of %d", got, cheap)
	}
	if err := m.took(m.AllocCheap(n, nil), min(n, cheap)); err != nil {
		return err
	}
	if now, _ := m.free(); now != dear {
		return fmt.Errorf("AllocCheap takes %d blocks that are not cheap", dear-now)
	}
	return nil
}

// took takes note of n blocks that were handed out.
func (m *model) took(runs []Run, n int) error {
	for _, r := range runs {
		at := int(r.At.Block())
		if at%block.TrackBlocks+r.N > block.TrackBlocks {
			return fmt.Errorf("run %v leaves its track", r)
		}
		for i := range r.N {
			if at+i < m.first || m.count[at+i] != 0 {
				return fmt.Errorf("block %d is handed out with %d references", at+i, m.count[at+i])
			}
			m.count[at+i] = 1
		}
		n -= r.N
	}
	if n != 0 {
		return fmt.Errorf("%d blocks are missing", n)
	}
	return nil
}

// compare compares all that can be seen.
func (m *model) compare(rng *rand.Rand) error {
	if err := m.CheckFree(); err != nil {
		return err
	}
	lo := rng.IntN(len(m.count))
	got := make([]byte, rng.IntN(len(m.count)-lo)+1)
	for _, lo := range []int{0, lo} {
		if lo == 0 {
			got = make([]byte, len(m.count))
		}
		got = got[:min(len(got), len(m.count)-lo)]
		m.Counts(0, uint64(lo), got)
		for i, c := range got {
			if c != m.count[lo+i] {
				return fmt.Errorf("Counts: block %d has %d references instead of %d", lo+i, c, m.count[lo+i])
			}
		}
	}
	if n := m.Count(block.At(0, uint64(lo))); n != int(m.count[lo]) {
		return fmt.Errorf("Count: block %d has %d references instead of %d", lo, n, m.count[lo])
	}
	if err := m.compareReferences(); err != nil {
		return err
	}
	var list []block.Physical
	for i := lo; i < min(lo+block.TrackBlocks, len(m.count)+2); i++ {
		list = append(list, block.At(0, uint64(i)))
	}
	set := m.AreCheap(list)
	for i := range list {
		if b := lo + i; bit(set[:], i) != (b < len(m.count) && m.cheap[b]) {
			return fmt.Errorf("AreCheap: block %d is cheap: %v", b, bit(set[:], i))
		}
	}
	return m.checkSlabs()
}

// compareReferences compares what is counted of references.
func (m *model) compareReferences() error {
	var want [MaxCount + 1]int64
	var used, more int64
	for _, c := range m.count[m.first:] {
		want[c]++
		if c > 0 {
			used++
			more += int64(c) - 1
		}
	}
	if got := m.References(); got != want {
		return fmt.Errorf("References: %v instead of %v", got, want)
	}
	if u := m.Usage(); u.InUse() != used || u.More != more {
		return fmt.Errorf("%d blocks in use with %d more references instead of %d with %d", u.InUse(), u.More, used, more)
	}
	return nil
}

// checkSlabs proves that each track has just the planes that it needs, and
// that the slabs are those of the tracks.
func (m *model) checkSlabs() error {
	c := &m.devs[0].counts
	var have [maxPlanes + 1]int
	for t, r := range c.refs {
		var most byte
		for b := t * block.TrackBlocks; b < min((t+1)*block.TrackBlocks, len(m.count)); b++ {
			most = max(most, m.count[b])
		}
		need := 0
		for need < maxPlanes && most > 1<<need {
			need++
		}
		k := int(r & (1<<refShift - 1))
		have[k]++
		if k != need || k > 0 && c.slabs[k].at(int(r >> refShift))[0] != uint64(t) {
			return fmt.Errorf("track %d with counts up to %d has %d planes instead of %d, or those of another track", t, most, k, need)
		}
	}
	for k := 1; k <= maxPlanes; k++ {
		if have[k] != c.slabs[k].n {
			return fmt.Errorf("%d slabs of %d planes, %d tracks have one", c.slabs[k].n, k, have[k])
		}
	}
	return nil
}

// A device against a byte for each block.
func TestDeviceAgainstModel(t *testing.T) {
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 4))
		m := newModel(t, 300+rng.IntN(6000), rng.IntN(300))
		for i := range 600 {
			err := m.step(rng)
			if err == nil && i%20 == 0 {
				err = m.compare(rng)
			}
			if err != nil {
				t.Fatalf("seed %d, step %d: %v", seed, i, err)
			}
		}
		// What is loaded is what was there, however it is cut.
		l := newModel(t, len(m.count), m.first)
		for at := 0; at < len(m.count); {
			n := min([]int{block.Size, 1 + rng.IntN(5000)}[rng.IntN(2)], len(m.count)-at)
			for range 1 + rng.IntN(2) { // the second time because the first one failed later on
				if err := l.Load(0, uint64(at), m.count[at:at+n]); err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
			}
			at += n
		}
		copy(l.count, m.count)
		if err := l.compare(rng); err != nil {
			t.Fatalf("seed %d: loaded: %v", seed, err)
		}
		if a, b := m.Usage(), l.Usage(); a != b {
			t.Fatalf("seed %d: %+v loaded as %+v", seed, a, b)
		}
	}
}

// Memory is bounded by what is shared, and comes back.
func TestMemory(t *testing.T) {
	const tracks = 64 << 10 // 64 GiB
	s := newSpace(t, tracks*block.TrackBlocks)
	empty := s.Memory()
	if empty > tracks*2+64<<10 {
		t.Errorf("an empty device takes %d bytes", empty)
	}
	bound := MemoryFor(tracks * block.TrackBlocks)
	if bound > tracks*35 {
		t.Errorf("up to %d bytes are announced", bound)
	}
	runs, err := s.Alloc(tracks*block.TrackBlocks-10, nil)
	if err != nil {
		t.Fatal(err)
	}
	if n := s.Memory(); n > bound {
		t.Errorf("a full device takes %d bytes instead of %d", n, bound)
	}
	for shared := int64(1); shared <= 3; shared++ {
		for _, r := range runs {
			if err := s.Inc(r); err != nil {
				t.Fatal(err)
			}
		}
		planes := (shared + 1) / 2 // of up to 1 and 3 references more
		if n, limit := s.Memory(), bound+tracks*(4+8+32*planes)+2*chunkWords*8*maxPlanes; n > limit {
			t.Errorf("with %d references each it takes %d bytes instead of %d", shared+1, n, limit)
		}
	}
	for range 4 {
		for _, r := range runs {
			if err := s.Dec(r); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n, limit := s.Memory(), empty+2*chunkWords*8*maxPlanes; n > limit {
		t.Errorf("%d bytes are left of an empty device, not %d", n, limit)
	}
	if err := s.CheckFree(); err != nil {
		t.Error(err)
	}
}
