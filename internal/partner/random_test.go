package partner

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
	"time"
)

var (
	seed = flag.Uint64("seed", 0, "play only this random run, and print it")
	runs = flag.Int("runs", 1500, "number of random runs")
)

// TestRandom plays runs of random faults and delays, checks at every step that
// no two processes act on one identity, and at the end, when the faults have
// stopped, that every identity is served and a pair is protected again.
func TestRandom(t *testing.T) {
	if *seed != 0 {
		if w, err := randomRun(*seed); err != nil {
			for _, l := range w.trace {
				t.Log(l)
			}
			t.Fatalf("seed %d: %v\n%s", *seed, err, w.show())
		}
		return
	}
	first := uint64(time.Now().UnixNano()) >> 10
	n := *runs
	if testing.Short() {
		n /= 10
	}
	t.Logf("seeds from %d", first)
	for i := range uint64(n) {
		if w, err := randomRun(first + i); err != nil {
			t.Fatalf("%v\n%splay it again with: go test ./internal/partner -run TestRandom -v -seed=%d", err, w.show(), first+i)
		}
	}
}

func randomRun(seed uint64) (*world, error) {
	rng := rand.New(rand.NewPCG(seed, 1))
	w := newWorld()
	w.rcfg.CrashLimit = 1 << 30
	w.mcfg.GivebackDelay = time.Duration(rng.IntN(3000)) * time.Millisecond
	w.mcfg.LockoutCount = 1 + rng.IntN(3)
	for _, g := range w.rcfg.Guests {
		if rng.IntN(2) == 0 {
			w.rcfg.RestartFirst = append(w.rcfg.RestartFirst, g)
		}
	}
	if rng.IntN(2) == 0 { // else a failure is soon forgotten, and the next one is the first
		w.rcfg.CrashWindow = time.Duration(1+rng.IntN(2000)) * time.Millisecond
	}
	w.rcfg.RestartLimit = time.Duration(50+rng.IntN(1000)) * time.Millisecond
	if rng.IntN(4) == 0 {
		w.rcfg.ProvenAfter = time.Duration(rng.IntN(3000)) * time.Millisecond
	}
	if rng.IntN(8) == 0 {
		w.rcfg.Guests = []string{"a"}
	}
	w.startAgent()
	for range 100 + rng.IntN(1500) {
		w.randomEvent(rng)
		if w.failed != nil {
			return w, w.failed
		}
	}
	return w, w.recover()
}

// randomEvent lets one thing happen: mostly what is under way anyway.
func (w *world) randomEvent(rng *rand.Rand) {
	names := w.names()
	if len(names) == 0 {
		w.tick(10 * time.Millisecond)
		return
	}
	p := w.procs[names[rng.IntN(len(names))]]
	switch n := rng.IntN(1000); {
	case n < 300:
		w.deliverHost(p)
	case n < 600:
		w.deliverGuest(p)
	case n < 780:
		if p.alive && !p.hung && len(p.jobs) > 0 {
			w.finish(p, rng.IntN(len(p.jobs)))
		}
	case n < 850:
		if !p.alive && !p.reaped {
			w.reap(p, "killed")
		}
	case n < 950:
		w.tick(time.Duration(rng.IntN(200)) * time.Millisecond)
	case n < 952:
		w.tick(time.Duration(rng.IntN(5000)) * time.Millisecond)
	default:
		w.randomFault(rng, p)
	}
}

func (w *world) randomFault(rng *rand.Rand, p *proc) {
	id := w.rcfg.Guests[rng.IntN(len(w.rcfg.Guests))]
	switch rng.IntN(17) {
	case 0, 1:
		if p.alive {
			w.log("fault: kill %s", p.name)
			w.die(p)
		}
	case 2:
		if p.alive {
			w.log("fault: hang %s", p.name)
			p.hung = true
		}
	case 3, 4:
		p.hung = false
	case 5:
		if w.ref != nil {
			w.log("fault: agent dies")
			w.killAgent()
		}
	case 6, 7:
		if w.ref == nil {
			w.log("agent starts")
			w.startAgent()
		}
	case 8:
		if w.ref != nil {
			w.moveByHand("takeover", id)
		}
	case 9:
		if w.ref != nil {
			w.moveByHand("giveback", id)
		}
	case 10:
		w.broken[p.name+" "+id] = rng.IntN(2) == 0
	case 11:
		if p.acts[id] && p.alive && p.m.Phase(id) == PhaseServing {
			w.log("fault: %s loses the pool of %s", p.name, id)
			w.stopActing(p, id)
			p.m.Step(Message{Kind: KindLost, Identity: id, Term: p.m.ids[id].term, Reason: "fault"})
			w.drain(p)
		}
	case 12: // the line breaks although both ends live
		if w.ref != nil && p.alive && p.line {
			w.log("fault: line to %s breaks", p.name)
			w.cut(p, rng.IntN(len(p.toGuest)+1))
			w.ref.Step(Message{Kind: KindLinkDown, Guest: p.name, Inc: p.inc})
			w.drainRef()
			w.connect(p)
		}
	case 13:
		if p.acts[id] && p.alive {
			p.m.Step(Message{Kind: KindStuck, Identity: id, Reason: "fault"})
			w.drain(p)
		}
	case 14, 15:
		w.setPool(p, id, rng.IntN(2) == 0)
	case 16: // it cannot be started, or can again
		w.noExec[p.name] = !w.noExec[p.name]
	}
}

// recover ends all faults and lets time go by.
func (w *world) recover() error {
	w.log("faults end")
	clear(w.broken)
	clear(w.noExec)
	if w.ref == nil {
		w.startAgent()
	}
	for _, p := range w.procs {
		p.hung = false
	}
	w.pass(60*time.Second, 100*time.Millisecond)
	calm := maps.Clone(w.incs)
	w.pass(10*time.Second, 100*time.Millisecond)
	if !maps.Equal(w.incs, calm) { // as when a closed pool's heartbeat was missed
		return fmt.Errorf("guests are still started: %v, then %v", calm, w.incs)
	}
	for _, p := range w.procs {
		for _, id := range w.rcfg.Guests {
			w.setPool(p, id, true)
		}
	}
	w.settle()
	if w.failed != nil {
		return w.failed
	}
	for _, id := range w.rcfg.Guests {
		t := w.ref.Title(id)
		if t.Phase != PhaseServing || len(w.acting[id]) != 1 || w.acting[id][0].name != t.Holder {
			return fmt.Errorf("%s is not served: held by %q, %s, %d act on it", id, t.Holder, t.Phase, len(w.acting[id]))
		}
		if t.To != "" {
			return fmt.Errorf("the move of %s to %s has not ended", id, t.To)
		}
	}
	for _, g := range w.rcfg.Guests {
		s := w.ref.Seat(g)
		if !s.Alive || !s.Linked {
			return fmt.Errorf("%s is not back: %+v", g, s)
		}
		p := w.procs[g]
		if len(w.rcfg.Guests) == 2 && len(p.m.Holds()) > 0 && !s.Guarded {
			return fmt.Errorf("%s is not protected", g)
		}
		v := p.m.View()
		if other := w.procs[w.other(g)]; other != nil && !v.Lockout && len(p.m.Holds()) == 2 && p.m.ids[other.name].byHand != other.inc {
			return fmt.Errorf("%s has not given back, and is not locked out", g)
		}
		for _, k := range []string{"hang", "partner", "agent"} {
			if v.Alerts[k] != "" {
				return fmt.Errorf("%s still raises %s", g, v.Alerts[k])
			}
		}
	}
	return nil
}
