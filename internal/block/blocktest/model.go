package blocktest

import (
	"bytes"
	"errors"
	"fmt"
	"sync"

	"github.com/pollux-storage/pollux/internal/block"
)

// Model knows what a volume must hold after a sequence of changes. Changes are
// begun in the order in which they are published; a test with several writers
// begins a change under the lock that orders them. Several volumes of one pool
// are one model when each is given its own range of blocks.
//
// The life of a change: Write or Zero begins it; Ack says that it was
// acknowledged, Void that it failed and is known to have had no effect. What
// is neither may have happened or not. FlushStart and FlushDone bracket a
// flush.
//
// The methods may be called concurrently.
type Model struct {
	seed uint64

	mu      sync.Mutex // guards all below
	changes []*modelChange
	byBlock map[block.Logical][]int // positions in changes of those that touch the block
	lastID  int
	flushed int // length of the prefix that a completed flush covers
	ids     map[int]*modelChange
}

// modelChange is one change of the volume: bytes [off, off+n).
type modelChange struct {
	id    int   // never reused, unlike positions
	as    int   // names the content: that of another change, or id
	shift int64 // added to an offset gives that of the content
	pos   int
	off   int64
	n     int64
	zero  bool
	acked bool
	void  bool
}

// NewModel returns the model of a volume that reads as zero.
func NewModel(seed uint64) *Model {
	return &Model{seed: seed, byBlock: make(map[block.Logical][]int), ids: make(map[int]*modelChange)}
}

// Write begins a write of n bytes at off, at any alignment, and returns the
// change's number and the data to write.
func (m *Model) Write(off int64, n int) (id int, data []byte) {
	return m.write(&modelChange{off: off, n: int64(n)})
}

// Repeat begins a write, at off, of n bytes that change number of has written, or would
// have written if it had been longer, from the block on in which it began.
func (m *Model) Repeat(off int64, n, of int) (id int, data []byte) {
	c := &modelChange{off: off, n: int64(n)}
	m.mu.Lock()
	if first := m.ids[of]; first != nil {
		c.as, c.shift = first.as, first.shift+first.off&^(block.Size-1)-off
	}
	m.mu.Unlock()
	return m.write(c)
}

// write begins a write and returns what to write.
func (m *Model) write(c *modelChange) (id int, data []byte) {
	id = m.begin(c)
	data = make([]byte, c.n)
	m.fill(data, c.as, c.off+c.shift)
	return id, data
}

// Zero begins a trim or a write of zeroes.
func (m *Model) Zero(off, n int64) (id int) {
	return m.begin(&modelChange{off: off, n: n, zero: true})
}

func (m *Model) begin(c *modelChange) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lastID++
	if c.id, c.pos = m.lastID, len(m.changes); c.as == 0 {
		c.as = c.id
	}
	m.changes = append(m.changes, c)
	m.ids[c.id] = c
	for b := c.off / block.Size; b*block.Size < c.off+c.n; b++ {
		m.byBlock[block.Logical(b)] = append(m.byBlock[block.Logical(b)], c.pos)
	}
	return c.id
}

// Ack says that the change was acknowledged.
func (m *Model) Ack(id int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ids[id].acked = true
}

// Void says that the change failed without any effect.
func (m *Model) Void(id int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ids[id].void = true
}

// FlushStart returns the length of the prefix that a flush which is called now
// must cover: up to the last acknowledged change.
func (m *Model) FlushStart() int { return m.Acked() }

// FlushDone says that the flush succeeded for which FlushStart gave covers.
func (m *Model) FlushDone(covers int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushed = max(m.flushed, covers)
}

// Len returns the number of changes begun.
func (m *Model) Len() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.changes)
}

// Acked returns the length of the shortest prefix that holds every
// acknowledged change: what the death of a guest must leave.
func (m *Model) Acked() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := len(m.changes); i > 0; i-- {
		if m.changes[i-1].acked {
			return i
		}
	}
	return 0
}

// Flushed returns the length of the prefix that a power cut must leave.
func (m *Model) Flushed() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.flushed
}

// Truncate says that the volume was found to be at a prefix: later changes
// never happened, and all others are as good as flushed.
func (m *Model) Truncate(prefix int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.changes[prefix:] {
		delete(m.ids, c.id)
	}
	m.changes = m.changes[:prefix]
	for b, list := range m.byBlock {
		for len(list) > 0 && list[len(list)-1] >= prefix {
			list = list[:len(list)-1]
		}
		if m.byBlock[b] = list; len(list) == 0 {
			// Kept in the map: the block was touched once and must read as zero.
			m.byBlock[b] = nil
		}
	}
	for _, c := range m.changes {
		c.acked = c.acked || !c.void
	}
	m.flushed = prefix
}

// ErrModel is wrapped by every finding of a Model.
var ErrModel = errors.New("volume does not hold what it must")

// CheckPrefix reads every block that was ever touched and finds the longest
// prefix of the changes, of at least mustAtLeast, after which the volume would
// read so. It returns its length.
func (m *Model) CheckPrefix(read func(block.Logical) ([]byte, error), mustAtLeast int) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	// fits[p] counts the blocks that read as they would after prefix p, as
	// differences between neighbours.
	fits := make([]int, len(m.changes)+2)
	found := make([]blockState, 0, len(m.byBlock))
	for _, b := range m.touchedLocked() {
		data, err := read(b)
		if err != nil {
			return 0, fmt.Errorf("read block %d: %w", b, err)
		}
		st := blockState{b, m.matchLocked(b, data)}
		if len(st.spans) == 0 {
			return 0, fmt.Errorf("%w: block %d (seed %d) holds %s; no prefix of the changes leaves that: %s",
				ErrModel, b, m.seed, Describe(data), m.historyLocked(b))
		}
		for _, s := range st.spans {
			fits[s.from]++
			fits[s.to]--
		}
		found = append(found, st)
	}
	best, n := -1, 0
	for p := 0; p <= len(m.changes); p++ {
		if n += fits[p]; n == len(found) {
			best = p
		}
	}
	switch {
	case best < 0:
		return 0, m.contradictionLocked(found)
	case best < mustAtLeast:
		return best, fmt.Errorf("%w: it is at change %d of %d, but the first %d were promised (seed %d): %s",
			ErrModel, best, len(m.changes), mustAtLeast, m.seed, m.lostLocked(found, mustAtLeast))
	}
	return best, nil
}

// CheckBlocks checks each block by itself: it must hold its last acknowledged
// version or that of a later change, whatever other blocks hold. It suits
// several writers without a common order, each to blocks of its own.
func (m *Model) CheckBlocks(read func(block.Logical) ([]byte, error)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range m.touchedLocked() {
		data, err := read(b)
		if err != nil {
			return fmt.Errorf("read block %d: %w", b, err)
		}
		least := 0
		for _, pos := range m.byBlock[b] {
			if m.changes[pos].acked {
				least = pos + 1
			}
		}
		ok := false
		for _, s := range m.matchLocked(b, data) {
			ok = ok || s.to > least
		}
		if !ok {
			return fmt.Errorf("%w: block %d (seed %d) holds %s, but change %d was acknowledged: %s",
				ErrModel, b, m.seed, Describe(data), least, m.historyLocked(b))
		}
	}
	return nil
}

// Acceptable returns the numbers of the changes whose version a block may
// hold after the death of a guest: the last acknowledged one, 0 for none, and
// all later ones.
func (m *Model) Acceptable(b block.Logical) []int {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := []int{0}
	for _, pos := range m.byBlock[b] {
		switch c := m.changes[pos]; {
		case c.void:
		case c.acked:
			out = []int{c.id}
		default:
			out = append(out, c.id)
		}
	}
	return out
}

// Content returns what block b holds after a prefix of the changes.
func (m *Model) Content(b block.Logical, prefix int) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := make([]byte, block.Size)
	for _, pos := range m.byBlock[b] {
		if pos < prefix {
			m.overlay(p, b, m.changes[pos])
		}
	}
	return p
}

// span is the prefixes p with from <= p < to.
type span struct{ from, to int }

type blockState struct {
	b     block.Logical
	spans []span
}

// matchLocked returns the prefixes after which block b would read as data.
func (m *Model) matchLocked(b block.Logical, data []byte) []span {
	var spans []span
	cur := make([]byte, block.Size)
	from := 0
	next := func(to int) {
		// Most versions differ in their first bytes, so comparing is cheap.
		if bytes.Equal(cur, data) {
			if k := len(spans); k > 0 && spans[k-1].to == from {
				spans[k-1].to = to
			} else {
				spans = append(spans, span{from, to})
			}
		}
		from = to
	}
	for _, pos := range m.byBlock[b] {
		next(pos + 1)
		m.overlay(cur, b, m.changes[pos])
	}
	next(len(m.changes) + 1)
	return spans
}

// overlay applies to p, the content of block b, what c writes there.
func (m *Model) overlay(p []byte, b block.Logical, c *modelChange) {
	if c.void {
		return
	}
	start := int64(b) * block.Size
	from, to := max(c.off, start), min(c.off+c.n, start+block.Size)
	if c.zero {
		clear(p[from-start : to-start])
		return
	}
	m.fill(p[from-start:to-start], c.as, from+c.shift)
}
