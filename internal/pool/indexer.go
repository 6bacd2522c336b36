package pool

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/dedup"
)

// indexer goes through the fingerprints that are stored, in the background: when the
// index is new, and whenever it is full of what may not be true any more. It is a machine
// of Run's goroutine.
//
// An index of another size is made beside the one that there is. That one finds blocks
// until the new one has gone through all of them once, so that nothing is missed
// meanwhile, and is freed then. Its own round rests as long.
type indexer struct {
	p     *Pool
	timer *time.Timer
	next  time.Time  // no step before
	round indexRound // of the machine's Index
	fill  indexRound // of its Next
}

// indexRound is how far an index is with what is stored.
type indexRound struct {
	begun bool
	place cp.PrintPlace
	done  bool
}

// Each step of an indexer reads indexPages pages of 256 leaves, and it rests for
// indexRest times as long as the step took.
const (
	indexPages = 1
	indexRest  = 3
)

func newIndexer(p *Pool) *indexer {
	x := &indexer{p: p, timer: time.NewTimer(0)}
	x.timer.Stop()
	return x
}

// begin begins anew: the index is another one.
func (x *indexer) begin() {
	x.round, x.fill, x.next = indexRound{}, indexRound{}, time.Time{}
	x.p.index.set(x.p.machine)
}

// unfinished reports whether an index lacks what is stored.
func (x *indexer) unfinished() bool {
	m := x.p.machine
	return m.Index != nil && (m.Next != nil || !x.round.done)
}

// due reports whether there is anything to do.
func (x *indexer) due() bool {
	return x.unfinished() || x.p.machine.Index != nil && x.p.machine.Index.Full()
}

// arm makes the timer wake Run when the next step is due, and not otherwise.
func (x *indexer) arm() {
	if !x.due() {
		x.timer.Stop()
		return
	}
	x.p.wakeAt(x.timer, x.next)
}

// work carries out a step, unless clients need what it would take.
func (x *indexer) work(now time.Time) {
	if !x.due() || now.Before(x.next) {
		return
	}
	if x.p.pressed() {
		x.next = now.Add(x.p.soon())
		return
	}
	begun := time.Now() // now may lie before a step of a fold
	if !x.step() {
		x.next = now.Add(x.p.soon() / 4) // folds go on by themselves
		return
	}
	end := time.Now()
	x.next = end.Add(indexRest * end.Sub(begun))
}

// step begins a round, or goes on with it. It does nothing where a round would begin
// while a fold is under way.
func (x *indexer) step() bool {
	m := x.p.machine
	r, index := &x.round, m.Index
	if m.Next != nil {
		r, index = &x.fill, m.Next
	}
	if r.done {
		*r = indexRound{} // it is full
	}
	switch {
	case r.begun:
		r.place, r.done = m.IndexFrom(index, r.place, indexPages)
	case m.Folding():
		return false
	default:
		m.IndexBegin(index)
		r.begun = true
	}
	if m.Next != nil && r.done {
		m.UseNext()
		x.round, x.fill = x.fill, indexRound{}
	}
	x.p.index.set(m)
	return true
}

// other returns an empty index of a size that neither the index nor the one that takes
// its place has, or nil.
func (x *indexer) other(size int64) (*dedup.Index, error) {
	m := x.p.machine
	for _, have := range [...]*dedup.Index{m.Index, m.Next} {
		if have != nil && have.Stats().Bytes == size {
			return nil, nil
		}
	}
	return dedup.NewIndex(size)
}

// resize makes the index one of a size, for which made comes from other.
func (x *indexer) resize(size int64, made *dedup.Index) {
	m := x.p.machine
	switch {
	case m.Index == nil:
		m.Index = made
		x.begin()
	case m.Index.Stats().Bytes == size:
		m.DropNext() // the round of the index goes on where it was
	case made != nil:
		m.DropNext()
		m.Next, x.fill, x.next = made, indexRound{}, time.Time{}
	}
	x.p.index.set(m)
}

// indexFigures are those of the index that Stats tells, from other goroutines than
// Run's. The bytes are of the one that takes its place, too.
type indexFigures struct{ bytes, entries atomic.Int64 }

func (f *indexFigures) set(m *cp.Machine) {
	if m.Index == nil {
		return
	}
	s := m.Index.Stats()
	if m.Next != nil {
		s.Bytes += m.Next.Stats().Bytes
	}
	f.bytes.Store(s.Bytes)
	f.entries.Store(int64(s.Entries))
}

// IndexAll makes the index one of everything that is stored, and of the size that it is
// to have, at once.
func (p *Pool) IndexAll(ctx context.Context) error {
	return p.do(ctx, func() error {
		if p.machine.Folding() {
			if err := p.foldAll(); err != nil {
				return err
			}
		}
		for p.indexer.unfinished() {
			p.indexer.step()
		}
		return nil
	})
}
