package dirty

import (
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/planted"
)

// Move publishes blocks once more with the content that the devices have for
// them, so that the next consistency point stores them at other places. Each
// record is of one block, whose extent holds what was read after Drops had
// returned asOf. A block that was written or trimmed since is left alone, and
// so are all of them when a consistency point came between, after which the
// devices may have another content: that is the condition under which a move
// cannot be told from no write at all.
//
// Owed says that room was kept for them, see [space.Space.ReserveOwed].
//
// The first n records were published. The extents of the others still belong
// to the caller; with an error those of all.
func (s *Set) Move(recs []oplog.Record, asOf uint64, owed bool) (n int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.owned(); err != nil {
		return 0, err
	}
	if asOf != s.drops {
		return 0, nil
	}
	for i := range recs {
		if _, dirty := s.findLocked(recs[i].Volume, recs[i].LBA); !dirty || planted.Has(planted.MoveIgnoresRace) {
			recs[n], recs[i] = recs[i], recs[n]
			n++
		}
	}
	if n == 0 {
		return 0, nil
	}
	if err := s.publishLocked(recs[:n], owed); err != nil {
		return 0, err
	}
	return n, nil
}
