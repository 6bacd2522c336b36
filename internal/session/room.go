package session

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"sort"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

// shares is how many volumes find room for as many sessions, and as many slots, as one may
// have. Whoever reaches one volume takes no more than that from the others.
const shares = 4

// awaited is how long the session of a client whose guest has died is kept for it, even if
// others want its room. Clients are back within seconds; one that is not after that long has
// died as well.
const awaited = time.Hour

// room is where a new session goes, and whose sessions are forgotten for it.
type room struct {
	place int
	first uint64 // of its cells
	gone  []*live
}

// roomLocked finds room for a session. When it is short, sessions that nobody has open are
// forgotten: those of the same volume first, and among the same those that were left first.
// One that nobody has left, for its guest died, is forgotten after those that were left, and
// for the sake of another volume only when it has been awaited for long. With an error
// nothing is forgotten.
func (t *Table) roomLocked(e *entry) (room, error) {
	n, share := e.cells(), t.hdr.cells/shares
	if n > share {
		return room{}, fmt.Errorf("at most %d slots together are possible: %w", share, block.ErrInvalid)
	}
	all := slices.SortedFunc(maps.Values(t.live), func(a, b *live) int { return cmp.Compare(a.first, b.first) })
	spare := t.spareLocked(all, e.volume)
	must := 0 // so many of them have to go in any case
	own, cells := 1, n
	for _, s := range all {
		if s.volume == e.volume {
			own++
			cells += s.cells()
		}
	}
	for ; own > MaxSessions/shares || cells > share; must++ {
		if must == len(spare) || spare[must].volume != e.volume {
			return room{}, fmt.Errorf("with it the volume has %d sessions open of together %d slots, and %d of %d are possible: %w", own, cells, MaxSessions/shares, share, block.ErrNoSpace)
		}
		own--
		cells -= spare[must].cells()
	}
	must = max(must, len(all)+1-MaxSessions)
	may := must + sort.Search(len(spare)-must+1, func(more int) bool {
		_, ok := t.holeLocked(all, must+more, n)
		return ok
	})
	if must > len(spare) || may > len(spare) {
		return room{}, fmt.Errorf("%d sessions are open or awaited, and no memory is left for %d slots more: %w", len(all)-len(spare), n, block.ErrNoSpace)
	}
	var r room
	r.first, _ = t.holeLocked(all, may, n)
	for i, s := range spare[:may] {
		if i < must || uint64(s.first) < r.first+n && r.first < uint64(s.first)+s.cells() {
			r.gone, s.rank = append(r.gone, s), -1
		}
	}
	var used [MaxSessions]bool
	for _, s := range all {
		used[s.place] = s.rank >= 0
	}
	r.place = slices.Index(used[:], false)
	return r, nil
}

// spareLocked returns the sessions that may be forgotten for one of a volume, in that order,
// and ranks all.
func (t *Table) spareLocked(all []*live, id block.VolumeID) (spare []*live) {
	over := time.Since(t.adopted) >= awaited
	for _, s := range all {
		s.rank = math.MaxInt
		if s.holders == 0 && (s.volume == id || s.left != 0 || over) {
			spare = append(spare, s)
		}
	}
	foreign := func(s *live) int {
		if s.volume == id {
			return 0
		}
		return 1
	}
	slices.SortFunc(spare, func(a, b *live) int {
		// One that was not left has 0, and comes last.
		return cmp.Or(cmp.Compare(foreign(a), foreign(b)), cmp.Compare(a.left-1, b.left-1), cmp.Compare(a.place, b.place))
	})
	for i, s := range spare {
		s.rank = i
	}
	return spare
}

// holeLocked finds the first n cells in a row that are no session's but perhaps of the first
// so many that may be forgotten. all is in the order of cells.
func (t *Table) holeLocked(all []*live, gone int, n uint64) (first uint64, ok bool) {
	for _, s := range all {
		if s.rank < gone {
			continue
		}
		if first+n <= uint64(s.first) {
			return first, true
		}
		first = uint64(s.first) + s.cells()
	}
	return first, first+n <= t.hdr.cells
}
