package oplog

import (
	"encoding/binary"
	"sync"

	"github.com/pollux-storage/pollux/internal/block"
)

// lastWhole returns the last of the records after from, up to and including end,
// that is whole in either ring, or 0. It begins at once, with a goroutine for
// each ring, and the caller asks for the result when it wants it: the rings of a
// log of 2 GiB are 128 MiB, most of it of an earlier lap.
func (s *memory) lastWhole(from, end block.Seq) (result func() block.Seq) {
	var wg sync.WaitGroup
	var found [2]block.Seq
	for c := range s.geo.ring {
		wg.Go(func() { found[c] = s.lastWholeIn(c, from, end) })
	}
	return func() block.Seq {
		wg.Wait()
		return max(found[0], found[1])
	}
}

// lastWholeIn is lastWhole in one ring. It goes through memory in order and
// looks at the sequence of each slot alone, which hardly ever is one that
// belongs there; only then the checksum is computed.
func (s *memory) lastWholeIn(c int, from, end block.Seq) (last block.Seq) {
	for from < end {
		slot := s.slot(from + 1)
		n := min(end-from, block.Seq(s.geo.slots)-block.Seq(slot/recordSize)) // up to the end of the ring
		ring := s.mem[s.geo.ring[c]+slot:][:int(n)*recordSize]
		for seq := from + 1; len(ring) >= recordSize; seq++ {
			if binary.LittleEndian.Uint64(ring) == uint64(seq) {
				var rec Record
				if rec.decode((*[recordSize]byte)(ring), s.seed, seq) {
					last = seq
				}
			}
			ring = ring[recordSize:]
		}
		from += n
	}
	return last
}
