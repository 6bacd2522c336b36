package cp

import (
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
)

// A block that is written again gets another place, and a layer below the pool keeps
// places on flash, not blocks. So what is hot would leave flash by being written. Where the
// old place is cheap, see internal/space, the new one is to be cheap as well; all other
// blocks stay out of cheap ranges while there is room elsewhere, or flash would fill with
// what nobody looks at.
//
// Where a block has been is asked of memory alone. It has that of what was written since
// the last fold but one, and of what clients read; a block that is neither is not hot.

// hotRun is how many consecutive blocks of a volume are not hot any more when one point
// writes all of them, wherever they have been: a track's worth. A disk takes longer to
// transfer that than to seek it, so flash would gain little by it, and such a stream would
// take the place of what is written here and there. What counts accesses calls as much a
// run, too, and leaves it out.
const hotRun = block.TrackBlocks

// placeHot gives those of some blocks that are hot places in cheap ranges, as far as there
// are any, and returns the others. Both stay in their order, so that neighbours are
// neighbours. The list of blocks is used up.
func (m *Machine) placeHot(p *plan, blocks []int32) (rest []int32) {
	if m.Space.FreeCheap() == 0 {
		return blocks
	}
	n := m.findHot(p, blocks)
	if n == 0 {
		return blocks
	}
	first, known := len(p.runs), len(p.hot)
	p.runs = m.Space.AllocCheap(n, p.runs)
	got := 0
	for _, r := range p.runs[first:] {
		got += r.N
	}
	rest = blocks[:0]
	for _, i := range blocks {
		if got > 0 && p.blocks[i].hot {
			p.hot = append(p.hot, i)
			got--
		} else {
			rest = append(rest, i)
		}
	}
	p.assign(first, p.hot[known:])
	return rest
}

// findHot finds which of some blocks, leaf by leaf in ascending order, are hot, and returns
// how many.
func (m *Machine) findHot(p *plan, blocks []int32) (n int) {
	var lbas [blockmap.LeafBlocks]block.Logical
	var old [blockmap.LeafBlocks]block.Pointer
	var places [blockmap.LeafBlocks]block.Physical
	from, to := 0, 0 // of the series that the last block is in
	for len(blocks) > 0 {
		if i := int(blocks[0]); i < from || i >= to {
			from, to = p.seriesOf(i)
		}
		if to-from >= hotRun {
			for len(blocks) > 0 && int(blocks[0]) >= from && int(blocks[0]) < to {
				blocks = blocks[1:]
			}
			continue
		}
		first, k := &p.blocks[blocks[0]], 0
		for ; k < len(blocks); k++ {
			if i := int(blocks[k]); i < from || i >= to {
				if from, to = p.seriesOf(i); to-from >= hotRun {
					break
				}
			}
			b := &p.blocks[blocks[k]]
			if b.volume != first.volume || b.lba/blockmap.LeafBlocks != first.lba/blockmap.LeafBlocks || k > 0 && b.lba <= lbas[k-1] {
				break
			}
			lbas[k] = b.lba
		}
		m.Map.Known(first.volume, lbas[:k], &old)
		for i, lba := range lbas[:k] {
			places[i] = old[lba%blockmap.LeafBlocks].Phys // None for a hole
		}
		cheap := m.Space.AreCheap(places[:k])
		for i, b := range blocks[:k] {
			hot := places[i] != block.None && cheap[i/64]>>(i%64)&1 != 0
			if p.blocks[b].hot = hot; hot {
				n++
			}
		}
		blocks = blocks[k:]
	}
	return n
}

// seriesOf returns which blocks of the plan, from one on and before another, are the series
// of consecutive blocks of a volume that block i belongs to, those that are not written
// included.
func (p *plan) seriesOf(i int) (from, to int) {
	next := func(k int) bool {
		a, b := &p.blocks[k], &p.blocks[k+1]
		return a.volume == b.volume && a.lba+1 == b.lba
	}
	from, to = i, i+1
	for from > 0 && next(from-1) {
		from--
	}
	for to < len(p.blocks) && next(to-1) {
		to++
	}
	return from, to
}
