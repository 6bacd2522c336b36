package dedup

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// store is what is stored, as a map of addresses.
type store struct {
	prints map[block.Physical]Fingerprint
	every  uint64 // one block in so many is found by its fingerprint
}

func newStore() *store { return &store{prints: map[block.Physical]Fingerprint{}, every: 1} }

// put stores blocks, one for each letter, from an address on.
func (s *store) put(at block.Physical, letters string) *store {
	for i, f := range printsOf(letters) {
		s.prints[at+block.Physical(i)] = f
	}
	return s
}

func (s *store) Candidates(f Fingerprint, to []block.Physical) []block.Physical {
	n := len(to)
	for p, g := range s.prints {
		if f == g && uint64(p)%s.every == 0 {
			to = append(to, p)
		}
	}
	slices.Sort(to[n:])
	return to
}

func (s *store) Fingerprint(p block.Physical) Fingerprint { return s.prints[p] }

// printsOf returns a fingerprint for each letter; a dot has none.
func printsOf(letters string) []Fingerprint {
	var prints []Fingerprint
	for _, r := range letters {
		if r == '.' {
			prints = append(prints, None)
		} else {
			prints = append(prints, Fingerprint(r))
		}
	}
	return prints
}

func at(n uint64) block.Physical { return block.At(1, n) }

func TestMatches(t *testing.T) {
	track := newStore().put(at(512), "abcdefgh").put(at(1000), "fghijkl").put(at(2000), "abc").put(at(766), "wxyz")
	for _, c := range []struct {
		what, received string
		run            int
		before, after  func(block.Physical) int
		want           string
	}{
		{what: "a whole sequence", received: "abcdefgh", run: 4, want: "[0+8=512]"},
		{what: "what is around it is not shared", received: "1abcdefgh2", run: 4, want: "[1+8=512]"},
		{what: "too short", received: "1abc2", run: 4, want: "[]"},
		{what: "just long enough", received: "1abcd2", run: 4, want: "[1+4=512]"},
		{what: "single blocks with THN 1", received: "a1c", run: 1, want: "[0+1=512 2+1=514]"},
		{what: "two sequences that overlap", received: "abcdefghijkl", run: 4, want: "[0+5=512 5+7=1000]"},
		{what: "neither is cut too short", received: "abcdefghijk", run: 6, want: "[0+8=512]"},
		{what: "both are just long enough", received: "abcdefghijkl", run: 6, want: "[0+6=512 6+6=1001]"},
		{what: "the longer one wins", received: "fghij", run: 3, want: "[0+5=1000]"},
		{what: "a block without fingerprint ends a sequence", received: "abcd.fgh", run: 4, want: "[0+4=512]"},
		{what: "a sequence does not cross tracks", received: "wxyz", run: 3, want: "[]"},
		{what: "but ends with one", received: "wxyz", run: 2, want: "[0+2=766 2+2=768]"},
		{what: "what was mapped before counts", received: "cd", run: 4, want: "[0+2=514]",
			before: func(p block.Physical) int { return int(p - at(512)) }},
		{what: "what comes after counts", received: "cd", run: 4, want: "[0+2=514]",
			after: func(p block.Physical) int { return int(at(518) - p) }},
		{what: "but not what is mapped before on another track", received: "yz", run: 3, want: "[]",
			before: func(p block.Physical) int { return int(p - at(700)) }},
		{what: "nor what comes after on another track", received: "wx", run: 4, want: "[]",
			after: func(p block.Physical) int { return 8 }},
		{what: "and not for what is away from it", received: "cd1", run: 4, want: "[]",
			after: func(p block.Physical) int { return 8 }},
		{what: "nothing stored", received: "12345678", run: 2, want: "[]"},
	} {
		m := Matcher{Run: c.run}
		s := Series{Prints: printsOf(c.received), Before: c.before, After: c.after}
		got := m.Matches(s, 0, len(s.Prints), track, nil)
		if s := show(got); s != c.want {
			t.Errorf("%s: %s instead of %s", c.what, s, c.want)
		}
	}
}

func shared(ms []Match) (n int) {
	for _, m := range ms {
		n += m.N
	}
	return n
}

func show(ms []Match) string {
	s := []string{}
	for _, m := range ms {
		s = append(s, fmt.Sprintf("%d+%d=%d", m.First, m.N, m.At.Block()))
	}
	return fmt.Sprint(s)
}

// An index that has one block in eight finds sequences of eight all the same.
func TestMatchesOfSample(t *testing.T) {
	stored := newStore()
	for i := range 1024 {
		stored.prints[at(uint64(i))] = Fingerprint(1000 + i)
	}
	stored.every = 8
	m := Matcher{Run: 8}
	for first := range 1024 - 8 {
		s := Series{Prints: []Fingerprint{5}}
		for i := range 8 {
			s.Prints = append(s.Prints, Fingerprint(1000+first+i))
		}
		want := 8
		if first%block.TrackBlocks > block.TrackBlocks-8 {
			want = 0 // it crosses tracks
		}
		if got := shared(m.Matches(s, 0, 9, stored, nil)); got != want {
			t.Fatalf("%d blocks of those from %d on are found, and not %d", got, first, want)
		}
	}
}

// bestOf returns by trying everything how many blocks can be shared, and in how
// few pieces.
func bestOf(prints []Fingerprint, run int, stored *store) (shared, pieces int) {
	best := make([]choice, len(prints)+1)
	for i := 1; i <= len(prints); i++ {
		best[i] = best[i-1]
		for from := 0; from <= i-run; from++ {
			for p, f := range stored.prints {
				if f != prints[from] {
					continue
				}
				n := 0
				for ; n < i-from && prints[from+n] != None && stored.prints[p+block.Physical(n)] == prints[from+n]; n++ {
					if n > 0 && (p+block.Physical(n)).Block()%block.TrackBlocks == 0 {
						break
					}
				}
				if c := (choice{shared: best[from].shared + i - from, pieces: best[from].pieces + 1}); n == i-from && c.better(best[i]) {
					best[i] = c
				}
			}
		}
	}
	return best[len(prints)].shared, best[len(prints)].pieces
}

// Whatever is received and stored, matches are true, long enough, in order and
// apart, and no choice shares more.
func TestMatchesAreBest(t *testing.T) {
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 1))
		letters := 2 + r.IntN(12)
		word := func(n int) string {
			b := make([]byte, n)
			for i := range b {
				b[i] = 'a' + byte(r.IntN(letters))
			}
			return string(b)
		}
		stored := newStore()
		for range 1 + r.IntN(3) {
			stored.put(at(uint64(240+r.IntN(40))), word(1+r.IntN(5)))
		}
		s := Series{Prints: printsOf(word(1 + r.IntN(14)))}
		m := Matcher{Run: 1 + r.IntN(4)}
		got := m.Matches(s, 0, len(s.Prints), stored, nil)
		if err := valid(got, s.Prints, m.Run, stored); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if n, pieces := bestOf(s.Prints, m.Run, stored); shared(got) != n || len(got) != pieces {
			t.Fatalf("seed %d: %d blocks in %d pieces instead of %d in %d: %v", seed, shared(got), len(got), n, pieces, got)
		}
	}
}

func valid(got []Match, prints []Fingerprint, run int, stored *store) error {
	end := 0
	for _, m := range got {
		if m.First < end || m.N < run || m.End() > len(prints) || m.At.Block()%block.TrackBlocks+uint64(m.N) > block.TrackBlocks {
			return fmt.Errorf("match %+v with THN %d behind block %d of %d", m, run, end, len(prints))
		}
		for i := range m.N {
			if f := prints[m.First+i]; f == None || stored.prints[m.At+block.Physical(i)] != f {
				return fmt.Errorf("block %d of match %+v is another", i, m)
			}
		}
		end = m.End()
	}
	return nil
}

// A long series is matched a window at a time, and no sequence is cut by that.
func TestMatchesByWindows(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 2))
		stored := newStore()
		n := 200 + r.IntN(300)
		prints := make([]Fingerprint, n)
		for i := range prints {
			prints[i] = Fingerprint(i + 1)
		}
		for i := 0; i < n; {
			k := min(1+r.IntN(40), n-i)
			p := at(uint64(seed+1)<<20 + uint64(i)<<8)
			for j := range k {
				stored.prints[p+block.Physical(j)] = prints[i+j]
			}
			i += k
		}
		m := Matcher{Run: 8}
		whole := m.Matches(Series{Prints: prints}, 0, n, stored, nil)
		var pieces []Match
		for lo := 0; lo < n; {
			hi := min(lo+1+r.IntN(60), n)
			pieces = m.Matches(Series{Prints: prints}, lo, hi, stored, pieces)
			if k := len(pieces); k > 0 {
				hi = max(hi, pieces[k-1].End())
			}
			lo = hi
		}
		if err := valid(pieces, prints, 8, stored); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if shared(pieces) > shared(whole) || shared(pieces) < shared(whole)/2 {
			t.Fatalf("seed %d: %d of %d", seed, shared(pieces), shared(whole))
		}
	}
}

func TestSpace(t *testing.T) {
	match := func(first, n int) Match { return Match{First: first, N: n, At: at(uint64(1000 + first))} }
	for _, c := range []struct {
		what string
		in   []Match
		from int
		want string // with THN 4
	}{
		{what: "new blocks enough", in: []Match{match(0, 4), match(6, 4), match(12, 5)}, want: "[0+4=1000 6+4=1006 12+5=1012]"},
		{what: "the third begins later", in: []Match{match(0, 4), match(5, 4), match(10, 6)}, want: "[0+4=1000 5+4=1005 12+4=1012]"},
		{what: "or is too short then", in: []Match{match(0, 4), match(5, 4), match(10, 5), match(16, 4)}, want: "[0+4=1000 5+4=1005 16+4=1016]"},
		{what: "neighbours need no room", in: []Match{match(0, 4), match(4, 4), match(9, 4)}, want: "[0+4=1000 4+4=1004 9+4=1009]"},
		{what: "new blocks in front", in: []Match{match(1, 4), match(6, 6)}, want: "[1+4=1001 8+4=1008]"},
		{what: "earlier ones stay", in: []Match{match(-9, 4), match(-4, 4), match(1, 6)}, from: 2, want: "[-9+4=991 -4+4=996 3+4=1003]"},
		{what: "a short one that others make long stays", in: []Match{match(0, 2), match(8, 3)}, want: "[0+2=1000 8+3=1008]"},
	} {
		m := Matcher{Run: 4}
		if got := show(m.Space(c.in, c.from)); got != c.want {
			t.Errorf("%s: %s instead of %s", c.what, got, c.want)
		}
	}
}

// In no 2*THN blocks are there more than three places where reading goes on elsewhere.
func TestSpaceBoundsJumps(t *testing.T) {
	jumps := func(ms []Match, n, within int) (most int) {
		var at []int
		end := -1
		for _, m := range append(ms, Match{First: n}) {
			if m.First > max(end, 0) {
				at = append(at, max(end, 0))
			}
			at = append(at, m.First)
			end = m.End()
		}
		for i := range at {
			k := i
			for k < len(at) && at[k] < at[i]+within {
				k++
			}
			most = max(most, k-i)
		}
		return most
	}
	before := 0
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 3))
		m := Matcher{Run: 2 + r.IntN(8)}
		var ms []Match
		n := 0
		for range 20 {
			n += r.IntN(4)
			ms = append(ms, Match{First: n, N: m.Run + r.IntN(10), At: at(uint64(1000 * len(ms)))})
			n += ms[len(ms)-1].N
		}
		before = max(before, jumps(ms, n, 2*m.Run))
		shares := shared(ms)
		ms = m.Space(ms, 0)
		if got := jumps(ms, n, 2*m.Run); got > 3 {
			t.Fatalf("seed %d: %d jumps within %d blocks: %v", seed, got, 2*m.Run, ms)
		}
		if shared(ms) < shares*3/4 {
			t.Fatalf("seed %d: %d blocks shared of %d", seed, shared(ms), shares)
		}
	}
	if before != 4 {
		t.Errorf("%d jumps without spacing: the test shows nothing", before)
	}
}

// asked counts the blocks that are looked up by their fingerprints.
type asked struct {
	*store
	of map[Fingerprint]int
}

func (a *asked) Candidates(f Fingerprint, to []block.Physical) []block.Physical {
	a.of[f]++
	return a.store.Candidates(f, to)
}

// A block that is known to have no candidates is not looked up, and is part of the
// sequences that its neighbours find all the same.
func TestMatchesOfUnknown(t *testing.T) {
	for _, c := range []struct {
		what, received, unknown string
		run                     int
		asked                   string // the blocks that are looked up
		want                    string
	}{
		{what: "nobody says anything", received: "1abcdefgh2", run: 4, asked: "1a2", want: "[1+8=512]"},
		{what: "what has none", received: "1abcdefgh2", unknown: "12", run: 4, asked: "a", want: "[1+8=512]"},
		{what: "the first of a sequence", received: "1abcdefgh", unknown: "a", run: 8, asked: "1b", want: "[1+8=512]"},
		{what: "several in front", received: "abcdefgh", unknown: "abcdefg", run: 8, asked: "h", want: "[0+8=512]"},
		{what: "in the middle of one", received: "abcdefgh", unknown: "cd", run: 8, asked: "a", want: "[0+8=512]"},
		{what: "all of them", received: "abcdefgh", unknown: "abcdefgh", run: 1, asked: "", want: "[]"},
	} {
		stored := &asked{newStore().put(at(512), "abcdefgh"), map[Fingerprint]int{}}
		s := Series{Prints: printsOf(c.received)}
		if c.unknown != "" {
			s.Unknown = func(i int) bool { return slices.Contains(printsOf(c.unknown), s.Prints[i]) }
		}
		m := Matcher{Run: c.run}
		if got := show(m.Matches(s, 0, len(s.Prints), stored, nil)); got != c.want {
			t.Errorf("%s: %s instead of %s", c.what, got, c.want)
		}
		want := map[Fingerprint]int{}
		for _, f := range printsOf(c.asked) {
			want[f]++
		}
		if !maps.Equal(stored.of, want) {
			t.Errorf("%s: looked up %v instead of %v", c.what, stored.of, want)
		}
	}
}

// Where it says the truth, Unknown changes nothing: with an index that has some blocks
// only, those that it lacks are found by their neighbours.
func TestMatchesOfUnknownAreTheSame(t *testing.T) {
	found := 0
	for seed := range uint64(500) {
		r := rand.New(rand.NewPCG(seed, 4))
		stored := newStore()
		stored.every = 1 + r.Uint64N(8)
		for i := range 600 {
			stored.prints[at(uint64(i))] = Fingerprint(1 + r.IntN(300))
		}
		s := Series{}
		for len(s.Prints) < 100 {
			from, n := r.IntN(560), 1+r.IntN(40)
			for i := range n {
				s.Prints = append(s.Prints, stored.prints[at(uint64(from+i))])
			}
			s.Prints = append(s.Prints, 9999)
		}
		m := Matcher{Run: 1 + r.IntN(8)}
		want := m.Matches(s, 0, len(s.Prints), stored, nil)
		skipped := 0
		s.Unknown = func(i int) bool {
			none := len(stored.Candidates(s.Prints[i], nil)) == 0
			if none {
				skipped++
			}
			return none
		}
		if got := m.Matches(s, 0, len(s.Prints), stored, nil); !slices.Equal(got, want) {
			t.Fatalf("seed %d: %v instead of %v", seed, got, want)
		}
		if skipped > 0 && len(want) > 0 {
			found++
		}
	}
	if found == 0 {
		t.Error("no series had matches and blocks without candidates")
	}
}
