package collect

// The limits of what is followed.
const (
	followed   = 32  // runs, and beginnings of more than one access
	beginnings = 64  // single accesses that may become runs
	maxHeld    = 128 // data sets with accesses that are held back, of each
	// density is one part in so many of what a run passes that it must transfer. What is
	// passed within the first vicinity bytes is not looked at, for there order counts for
	// little.
	density  = 4
	vicinity = 64 << 10
	// reach is how far from a run's end its next access may be, in bytes, however long it
	// is. It and vicinity count as often as the accesses' weight.
	reach = 1 << 20
	// patience is how many other accesses may come before a run goes on, and endurance the
	// same for one that is whole. Where random accesses are dense, one close behind
	// another's end comes in time, but not soon.
	patience  = 256
	endurance = 4096
)

// runs tells accesses in sequence from others. What it cannot tell yet it holds back.
type runs struct {
	least int64 // bytes of a run
	pause int64 // nanoseconds after which a run has ended
	clock uint64
	// list has what is followed in front. Behind are the beginnings, single accesses, each
	// of which takes the place of the oldest.
	list [followed + beginnings]run
	ends [followed + beginnings]int64 // the end of each, to look through quickly; nowhere for none
	next int                          // the oldest beginning
	// settle is given each piece of an access once it is known whether it was part of a
	// run.
	settle func(p piece, inRun bool)
}

// nowhere is the end of no run.
const nowhere = -1 << 61

// init forgets everything.
func (s *runs) init() {
	for i := range s.ends {
		s.ends[i] = nowhere
	}
}

// run is what was found to be in sequence.
type run struct {
	start, end int64 // bytes of the device
	bytes      int64 // transferred
	at         int64 // time of the newest access, nanoseconds
	used       uint64
	whole      bool
	held       []piece // of accesses before it was whole
}

// piece is what accesses did to one data set.
type piece struct {
	set    Set
	reads  float32
	writes float32
	bytes  float32 // of the whole requests
	at     int64   // nanoseconds since 1970, of the newest one
}

// continues reports whether an access goes on with the run. It has to lead further: one that
// returns to where others have been is not part of a sequence, but for the stragglers of a
// whole run.
func (r *run) continues(e *event, clock uint64) bool {
	size, far := int64(e.size)*int64(e.weight), reach*int64(e.weight)
	waited, most := clock-r.used, uint64(patience)
	if r.whole {
		most = endurance
	}
	switch {
	case waited > most || e.offset > r.end+far:
		return false
	case e.offset < r.end:
		return r.whole && e.offset >= r.end-far
	}
	passed := e.offset + int64(e.size) - r.start
	return passed <= vicinity*int64(e.weight) || (r.bytes+size)*density >= passed
}

// access takes an event and the pieces that it consists of.
func (s *runs) access(e *event, pieces []piece) {
	s.clock++
	i := s.find(e)
	r := &s.list[i]
	if end := e.offset + int64(e.size); end > r.end {
		// A straggler does not keep it alive, nor make it denser than what it passes:
		// where it ends, accesses may be many.
		r.used, r.at, r.end = s.clock, e.at, end
		s.ends[i] = end
	}
	size := int64(e.size) * int64(e.weight)
	r.bytes = max(size, min(r.bytes+size, r.end-r.start))
	if !r.whole && r.bytes >= s.least {
		r.whole = true
		s.release(r)
	}
	if r.whole {
		for i := range pieces {
			s.settle(pieces[i], true)
		}
		// What it was long ago counts less and less, so that one that comes to where
		// accesses are random ends there.
		if r.bytes > 2*s.least {
			r.bytes /= 2
			r.start = r.end - (r.end-r.start)/2
		}
		return
	}
	if len(r.held)+len(pieces) > maxHeld {
		s.release(r)
		if len(pieces) > maxHeld {
			for i := range pieces {
				s.settle(pieces[i], false)
			}
			return
		}
	}
	for i := range pieces {
		r.hold(pieces[i])
	}
}

// hold keeps a piece, with the last one where that is of the same set.
func (r *run) hold(p piece) {
	if n := len(r.held); n > 0 && r.held[n-1].set == p.set {
		h := &r.held[n-1]
		h.reads, h.writes, h.bytes, h.at = h.reads+p.reads, h.writes+p.writes, h.bytes+p.bytes, max(h.at, p.at)
		return
	}
	r.held = append(r.held, p)
}

// find returns the run that an access continues: the one whose end is furthest of those that
// it does. If there is none, it is a beginning.
func (s *runs) find(e *event) int {
	far := reach * int64(e.weight)
	best := -1
	for i, end := range &s.ends {
		if uint64(e.offset-end+far) <= uint64(2*far) && (best < 0 || end > s.ends[best]) && s.list[i].continues(e, s.clock) {
			best = i
		}
	}
	switch {
	case best >= followed:
		return s.follow(best)
	case best >= 0:
		return best
	}
	i := followed + s.next
	s.next = (s.next + 1) % beginnings
	s.end(i)
	s.list[i].start, s.list[i].end = e.offset, e.offset
	return i
}

// follow makes room for a beginning that goes on, in the place of what was used longest ago.
func (s *runs) follow(from int) int {
	to := 0
	for i := range followed {
		if s.list[i].used < s.list[to].used {
			to = i
		}
	}
	s.end(to)
	s.list[to], s.list[from] = s.list[from], s.list[to]
	s.ends[to], s.ends[from] = s.ends[from], nowhere
	return to
}

// release settles what was held back.
func (s *runs) release(r *run) {
	for i := range r.held {
		s.settle(r.held[i], r.whole)
	}
	r.held = r.held[:0]
}

// end ends a run.
func (s *runs) end(i int) {
	r := &s.list[i]
	s.release(r)
	*r = run{held: r.held}
	s.ends[i] = nowhere
}

// rest ends the runs that have not gone on for long.
func (s *runs) rest(now int64) {
	for i := range s.list {
		if s.ends[i] != nowhere && now-s.list[i].at > s.pause {
			s.end(i)
		}
	}
}

// endAll ends all runs.
func (s *runs) endAll() {
	for i := range s.list {
		s.end(i)
	}
}
