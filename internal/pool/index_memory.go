package pool

import (
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/region"
)

// The index of fingerprints lies in a section of the pool's region, so that whoever opens
// the pool after this guest, its partner too, finds what is stored at once. It is advisory:
// what is wrong with it costs savings, and where the region has no room for it, it lies in
// memory of this guest.

// indexMemory returns a section of the region as memory of an index.
func (p *Pool) indexMemory(s region.Section, mem []byte) dedup.Memory {
	// Any block does; pools whose secrets differ have other fingerprints of it.
	var probe [block.Size]byte
	copy(probe[:], p.label.Pool[:])
	return dedup.Memory{Bytes: mem, Pool: p.label.Pool, Check: p.machine.Print(probe[:]), Free: func() error { return p.region.RemoveSection(s) }}
}

// newIndex returns an empty index, which takes the place of another one if there is one.
func (p *Pool) newIndex(size int64, before *dedup.Index) (*dedup.Index, error) {
	s, mem, err := p.region.AddSection(region.SectionIndex, size)
	if err != nil {
		p.indexOwn = err.Error()
		p.tell(TellIndex, "the index of fingerprints of pool %s will not outlive this guest: %v", p.label.Name, err)
		return dedup.NewIndex(size)
	}
	x, err := dedup.NewIndexIn(p.indexMemory(s, mem), size)
	if err == nil && before != nil {
		x.Successor, x.Order = true, before.Order+1
		x.Save()
	}
	return x, err
}

// adoptIndex returns the index that a guest before has left, or nil, and gives back the
// memory of all others. Of two, one of which was to take the place of the other, it is the
// one that was the index; a successor that is complete is one no more.
func (p *Pool) adoptIndex() (best *dedup.Index) {
	for _, s := range p.region.Sections(region.SectionIndex) {
		mem, err := p.region.MapSection(s)
		var x *dedup.Index
		if err == nil {
			x, err = dedup.AdoptIndex(p.indexMemory(s, mem))
		}
		if err != nil {
			p.tell(TellIndex, "the index of fingerprints of pool %s is made anew: %v", p.label.Name, err)
			_ = p.region.RemoveSection(s) // or the next owner does
			continue
		}
		if best != nil && prefer(best, x) {
			best, x = x, best
		}
		if best == nil {
			best = x
		} else {
			_ = x.Drop() // as above
		}
	}
	if best != nil {
		best.Successor = false
		best.Save()
	}
	return best
}

// prefer reports whether b is to be adopted and not a.
func prefer(a, b *dedup.Index) bool {
	if a.Successor != b.Successor {
		return a.Successor
	}
	return b.Order > a.Order
}
