package sim

import (
	"math/rand/v2"
	"strings"
)

// startDrawer draws what comes first when a guest fails, and how its starts go. It has
// a generator of its own, so that nothing else of a seed is drawn otherwise because of
// it.
type startDrawer struct {
	d   *drawer
	rng *rand.Rand
}

func newStartDrawer(d *drawer, seed uint64) *startDrawer {
	s := &startDrawer{d: d, rng: rand.New(rand.NewPCG(seed, 0x7374617274))}
	var first []string
	for _, id := range d.ids {
		if s.rng.IntN(2) == 0 {
			first = append(first, id)
		}
	}
	if len(first) > 0 {
		d.say("restart-first %s", strings.Join(first, " "))
		d.say("restart-limit %dms", 20+s.rng.IntN(600))
		if s.rng.IntN(3) > 0 { // or only the first failure is answered by a restart
			d.say("crash-window %dms", 1+s.rng.IntN(3000))
		}
	}
	if s.rng.IntN(8) == 0 {
		d.say("poison %dms", s.rng.IntN(3000))
	}
	return s
}

// draw says some steps, or none.
func (s *startDrawer) draw() {
	id := s.d.ids[s.rng.IntN(len(s.d.ids))]
	times := 1 + s.rng.IntN(3)
	switch s.rng.IntN(12) {
	case 0:
		s.d.say("start %s slow %dms times %d", id, 1+s.rng.IntN(1<<(1+s.rng.IntN(10))), times)
	case 1, 2:
		s.d.say("start %s dies %d times %d", id, 1+s.rng.IntN(1<<(1+s.rng.IntN(7))), times)
	case 3:
		s.d.say("start %s fails times %d", id, times)
	default:
		return
	}
	if s.rng.IntN(2) == 0 {
		s.d.say("kill %s", id)
	}
}
