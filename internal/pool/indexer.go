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
//
// An index that outlived the guest before goes on where it was. What it has is counted
// first: that is a look at its memory and at no page.
type indexer struct {
	p     *Pool
	timer *time.Timer
	next  time.Time // no step before
}

// Each step of an indexer reads indexPages pages of 256 leaves, or counts the entries of
// indexBuckets buckets, 4 MiB of memory, and it rests for indexRest times as long as the
// step took.
const (
	indexPages   = 1
	indexBuckets = 64 << 10
	indexRest    = 3
)

func newIndexer(p *Pool) *indexer {
	x := &indexer{p: p, timer: time.NewTimer(0)}
	x.timer.Stop()
	return x
}

// begin begins with another index.
func (x *indexer) begin() {
	x.next = time.Time{}
	x.p.index.set(x.p.machine)
}

// unfinished reports whether an index lacks what is stored.
func (x *indexer) unfinished() bool {
	m := x.p.machine
	return m.Index != nil && (m.Next != nil || !m.Index.Round.Done)
}

// due reports whether there is anything to do.
func (x *indexer) due() bool {
	i := x.p.machine.Index
	return x.unfinished() || i != nil && (i.Counting() || i.Full())
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
	index := m.Index
	if m.Next != nil {
		index = m.Next
	}
	switch {
	case m.Index.Counting():
		m.Index.Count(indexBuckets)
	case index.Round.Begun && !index.Round.Done:
		m.IndexFrom(index, indexPages)
	case m.Folding():
		return false
	default: // it is new, or full
		m.IndexBegin(index)
	}
	if m.Next != nil && m.Next.Round.Done {
		m.UseNext()
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
	return x.p.newIndex(size, m.Index)
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
		m.Next, x.next = made, time.Time{}
	}
	x.p.index.set(m)
}

// indexFigures are those of the index that Stats tells, from other goroutines than
// Run's. The bytes are of the one that takes its place, too; own are those of them that do
// not outlive the guest, and kept is what the others take of the region.
type indexFigures struct{ bytes, own, kept, entries atomic.Int64 }

func (f *indexFigures) set(m *cp.Machine) {
	if m.Index == nil {
		return
	}
	var bytes, own, kept int64
	for _, x := range [...]*dedup.Index{m.Index, m.Next} {
		if x == nil {
			continue
		}
		n := x.Stats().Bytes
		if bytes += n; x.Kept() == 0 {
			own += n
		}
		kept += x.Kept()
	}
	f.bytes.Store(bytes)
	f.own.Store(own)
	f.kept.Store(kept)
	f.entries.Store(int64(m.Index.Stats().Entries))
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
		for p.indexer.unfinished() || p.machine.Index != nil && p.machine.Index.Counting() {
			p.indexer.step()
		}
		return nil
	})
}
