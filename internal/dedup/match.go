package dedup

import (
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
)

// Stored is what a Matcher knows of the blocks that are stored.
type Stored interface {
	// Candidates appends the addresses at which a block with the fingerprint may be.
	Candidates(f Fingerprint, to []block.Physical) []block.Physical
	// Fingerprint returns that of a stored block which may be shared, None of others.
	Fingerprint(p block.Physical) Fingerprint
}

// Series is a series of received blocks that are neighbours in their volume.
type Series struct {
	// Prints are the fingerprints of its blocks; a block with None matches nothing.
	Prints []Fingerprint
	// Before returns how many blocks in front of the series are mapped to the
	// blocks in front of p, in order: a consistency point does not cut a sequence.
	// After is the same for what follows the series, from p on. They may be nil, and
	// need not count beyond MaxRun.
	Before, After func(p block.Physical) int
	// Unknown, if not nil, says of a block that it has no candidates: it was looked up
	// before.
	Unknown func(i int) bool
}

// Match says that N blocks of a series, from First on, may be those from At on.
type Match struct {
	First, N int
	At       block.Physical
}

// End returns the first block after the match.
func (m Match) End() int { return m.First + m.N }

// MaxRun is the largest THN: a track.
const MaxRun = block.TrackBlocks

// DefaultRun is THN where nobody has said what it shall be. On images of Debian systems
// it keeps 94 to 96 % of what sharing every equal block saves, and what is read in one
// piece is 3.4 to 4.2 times as long; see docs/performance.md.
const DefaultRun = 8

// most is how many sequences are followed at the same time, and most candidates how
// many of one block are looked at. Blocks that are stored in more places than that
// are such as many files have, and their neighbours find the sequence.
const most = 16

// Matcher finds the matches of series. It has memory that it uses again, and one user
// at a time.
type Matcher struct {
	// Run is THN: how many blocks a match must have, 1 to MaxRun.
	Run int

	live, found []sequence
	candidates  []block.Physical
	best        []choice
}

// sequence is a match that is being followed, or was.
type sequence struct {
	Match
	// from is the block from which on a match that ends here is to begin, for the
	// best choice of all; -1 when none is long enough yet.
	from int
}

// at returns where the sequence has, or would have, block i of the series.
func (s *sequence) at(i int) block.Physical { return s.At + block.Physical(i-s.First) }

// choice is the best choice of matches among the blocks up to one.
type choice struct {
	shared, pieces int
	last           Match // that ends with the block; N is 0 when it is not shared
}

// better reports whether a choice shares more, or as much in fewer pieces.
func (c choice) better(than choice) bool {
	return c.shared > than.shared || c.shared == than.shared && c.pieces < than.pieces
}

// Matches appends the matches of blocks lo to hi-1 of a series, in order, and those
// alone that are long enough. The last one may reach beyond hi.
func (m *Matcher) Matches(s Series, lo, hi int, stored Stored, to []Match) []Match {
	m.find(s, lo, hi, stored)
	if len(m.found) == 0 {
		return to
	}
	return m.choose(s, lo, to)
}

// Space shortens matches, those from index from on, or takes them out, so that whoever
// reads the series goes elsewhere at most three times within 2*Run blocks. What is before
// them in the slice are matches further ahead in the series; a First below 0 is in front of
// it. Blocks that no match has are thought to be written one behind the other.
//
// Without it new blocks, a match of Run, and a few new blocks again lie between two others:
// four seeks for little more than one match. Then the last of them begins later. What that
// costs is a few blocks of long matches.
func (m *Matcher) Space(matches []Match, from int) []Match {
	kept := matches[:from]
	for _, next := range matches[from:] {
		cut := 0
		if n := len(kept); n > 0 {
			last, begin := kept[n-1], 0 // of the new blocks before last
			if n > 1 {
				begin = kept[n-2].End()
			}
			if last.First > begin && next.First > last.End() {
				cut = max(0, begin+2*m.Run-next.First)
			}
		}
		if cut > 0 {
			next = Match{next.First + cut, next.N - cut, next.At + block.Physical(cut)}
			if next.N < m.Run {
				continue
			}
		}
		kept = append(kept, next)
	}
	return kept
}

// find collects all sequences that the blocks lo to hi-1 are part of.
func (m *Matcher) find(s Series, lo, hi int, stored Stored) {
	m.live, m.found = m.live[:0], m.found[:0]
	for i := lo; i < hi || i < len(s.Prints) && len(m.live) > 0; i++ {
		m.live = slices.DeleteFunc(m.live, func(q sequence) bool {
			if p := q.at(i); p.Block()%block.TrackBlocks != 0 && s.Prints[i] != None && stored.Fingerprint(p) == s.Prints[i] {
				return false
			}
			q.N = i - q.First
			m.found = append(m.found, q)
			return true
		})
		// While a sequence goes on no other is looked for. What ends before it would
		// share no more, and what goes on longer is found, from its beginning on, when
		// this one has ended.
		if i < hi && len(m.live) == 0 && s.Prints[i] != None && (s.Unknown == nil || !s.Unknown(i)) {
			m.begin(s, lo, i, stored)
		}
	}
	for _, q := range m.live {
		q.N = len(s.Prints) - q.First
		m.found = append(m.found, q)
	}
}

// begin follows the sequences that block i begins, or continues where the index did
// not know the blocks before it.
func (m *Matcher) begin(s Series, lo, i int, stored Stored) {
	m.candidates = stored.Candidates(s.Prints[i], m.candidates[:0])
	for _, p := range m.candidates[:min(len(m.candidates), most)] {
		if slices.ContainsFunc(m.live, func(q sequence) bool { return q.at(i) == p }) || stored.Fingerprint(p) != s.Prints[i] {
			continue
		}
		first := i
		for ; first > lo && p.Block()%block.TrackBlocks != 0; first-- {
			if s.Prints[first-1] == None || stored.Fingerprint(p-1) != s.Prints[first-1] {
				break
			}
			p--
		}
		if len(m.live) < most {
			m.live = append(m.live, sequence{Match: Match{First: first, At: p}})
		}
	}
}

// choose takes of the sequences found, or of parts of them, those that share most, in
// as few pieces as possible. best[i] is the best choice for the blocks lo to lo+i-1;
// it ends with a block that is not shared, or with a piece of a sequence. Of the
// places where such a piece can begin, each sequence keeps the best one.
func (m *Matcher) choose(s Series, lo int, to []Match) []Match {
	end := lo
	for i := range m.found {
		m.found[i].from = -1
		end = max(end, m.found[i].End())
	}
	m.best = append(m.best[:0], choice{})
	for i := lo + 1; i <= end; i++ {
		c := m.best[i-1-lo]
		c.last = Match{}
		for j := range m.found {
			q := &m.found[j]
			if i <= q.First || i > q.End() {
				continue
			}
			m.extend(s, q, lo, i)
			if q.from < 0 {
				continue
			}
			n := m.best[q.from-lo]
			if n = (choice{n.shared + i - q.from, n.pieces + 1, Match{q.from, i - q.from, q.at(q.from)}}); n.better(c) {
				c = n
			}
		}
		m.best = append(m.best, c)
	}
	first := len(to)
	for i := end; i > lo; {
		if c := m.best[i-lo]; c.last.N > 0 {
			to = append(to, c.last)
			i = c.last.First
		} else {
			i--
		}
	}
	slices.Reverse(to[first:])
	return to
}

// extend looks which block a piece of q that ends before block i may begin with, now
// that one more can.
func (m *Matcher) extend(s Series, q *sequence, lo, i int) {
	consider := func(from int) {
		if from < q.First {
			return
		}
		if q.from >= 0 {
			old, now := m.best[q.from-lo], m.best[from-lo]
			old.shared, now.shared = old.shared-q.from, now.shared-from
			if !now.better(old) {
				return
			}
		}
		q.from = from
	}
	least := m.Run
	if i == len(s.Prints) && s.After != nil && q.at(i).Block()%block.TrackBlocks != 0 {
		rest := block.TrackBlocks - int(q.at(i).Block()%block.TrackBlocks)
		least = max(1, m.Run-min(rest, s.After(q.at(i))))
	}
	for n := least; n <= m.Run; n++ {
		consider(i - n)
	}
	// What is in front of the series counts for a piece that begins with it, as far as it
	// is on the same track.
	if q.from < 0 && q.First == 0 && s.Before != nil && i+min(s.Before(q.At), int(q.At.Block()%block.TrackBlocks)) >= m.Run {
		consider(0)
	}
}
