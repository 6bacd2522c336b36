package space

import "math/bits"

// trackSet is a set of the tracks of a device in which the next one is found quickly: a
// bit for each track, and above each level of words one with a bit for each of these that
// is not 0, up to a single word. Ten million tracks, 10 TiB, make four levels. They lie
// outside the Go heap, and take memory where a track has been in the set.
type trackSet struct {
	words  []uint64
	levels [][]uint64 // parts of words, the bits of tracks first
}

func newTrackSet(tracks int) (s trackSet, err error) {
	var sizes []int
	total := 0
	for n := tracks; ; {
		n = (n + 63) / 64
		sizes, total = append(sizes, n), total+n
		if n <= 1 {
			break
		}
	}
	if s.words, err = allocWords[uint64](total); err != nil {
		return s, err
	}
	rest := s.words
	for _, n := range sizes {
		s.levels, rest = append(s.levels, rest[:n]), rest[n:]
	}
	return s, nil
}

func (s *trackSet) close() error { return freeWords(s.words) }

// put makes a track a member, or makes it none.
func (s *trackSet) put(t int, in bool) {
	for _, level := range s.levels {
		w := &level[t/64]
		was := *w
		now := was | 1<<(t%64)
		if !in {
			now = was &^ (1 << (t % 64))
		}
		if now == was {
			return // without touching memory
		}
		if *w = now; was != 0 && now != 0 {
			return // nothing is new above
		}
		t /= 64
	}
}

func (s *trackSet) has(t int) bool { return bit(s.levels[0], t) }

// next returns the first member from track t on.
func (s *trackSet) next(t int) (int, bool) {
	for l, level := range s.levels {
		i := t / 64
		if i >= len(level) {
			return 0, false
		}
		rest := level[i] >> (t % 64)
		if rest == 0 {
			t = i + 1 // the words above tell which of those behind this one has some
			continue
		}
		t += bits.TrailingZeros64(rest)
		for l--; l >= 0; l-- {
			t = t*64 + bits.TrailingZeros64(s.levels[l][t])
		}
		return t, true
	}
	return 0, false
}

// count returns how many members there are; ok says that next finds all of them.
func (s *trackSet) count() (n int, ok bool) {
	for _, w := range s.levels[0] {
		n += bits.OnesCount64(w)
	}
	for l, level := range s.levels[1:] {
		for i, w := range s.levels[l] {
			if (w != 0) != bit(level, i) {
				return n, false
			}
		}
	}
	return n, true
}
