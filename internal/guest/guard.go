package guest

import (
	"fmt"
	"time"
)

// guardEvery is how often the guard looks.
const guardEvery = time.Second

// clientsMayRead is for how many times the limit a pool may do nothing but reads, which may
// be its clients': one that is stuck looks like that, and so does a long consistency point
// that compares what seems to be stored already.
const clientsMayRead = 10

// stall finds that a number has not changed for a time. It has no clock of its own.
type stall struct {
	limit  time.Duration
	number uint64
	since  time.Time // since when the number stands
	looked time.Time
}

// look takes in the number at a moment, and whether there is an excuse for it to stand, and
// reports whether it has stood for the limit without one. Who looks late begins anew: time
// in which the watcher did not run does not count.
func (s *stall) look(now time.Time, number uint64, excused bool) bool {
	late := now.Sub(s.looked) > s.limit/2
	s.looked = now
	if number != s.number || excused || late {
		s.number, s.since = number, now
	}
	return now.Sub(s.since) >= s.limit
}

// guard ends the guest's process when what takes a pool's data to its devices gets on no
// more and no device is what it waits for: nothing in this process will help it, and the
// partner, or a new process, has all that it needs. Clients would not see it before the log
// is full, and the heartbeat does not show it.
func (g *Guest) guard(t *tenancy) {
	limit := g.cfg.Failover.StuckTimeout
	own, anything := stall{limit: clientsMayRead * limit}, stall{limit: limit}
	tk := time.NewTicker(guardEvery)
	defer tk.Stop()
	for {
		select {
		case <-t.ctx.Done():
			return
		case now := <-tk.C:
			o, a := t.store.Progress()
			waits := g.waitsForDevice(t, now, limit/4)
			stuck := own.look(now, o, waits)
			if stuck = anything.look(now, a, waits) || stuck; !stuck {
				continue
			}
			reason := fmt.Sprintf("the pool of %s has done nothing since %s, and no device is what it waits for", t.identity, own.since.UTC().Format(time.RFC3339))
			g.log.Error("guest is stuck", "reason", reason)
			if g.opt.Stuck != nil {
				g.opt.Stuck(reason)
			}
			return
		}
	}
}

// waitsForDevice tells whether a device of a tenancy has something under way for that long.
func (g *Guest) waitsForDevice(t *tenancy, now time.Time, long time.Duration) bool {
	for _, d := range t.disks() {
		for _, l := range looks(d) {
			if _, since, ok := g.under.oldest(l.name); ok && now.Sub(since) >= long {
				return true
			}
		}
	}
	return false
}

// restOfStall is for how long nothing is told of a heartbeat that stands still again.
const restOfStall = time.Minute

// heartWatch tells when a heart stands still for so long that the guest will soon be
// fenced, so that it can leave word of what it was doing. It has no clock of its own.
type heartWatch struct {
	stall
	told  time.Time
	still bool // it was told that it stands
}

// look takes in a heartbeat, and reports whether to tell that the heart stands still, or
// that it beats again.
func (h *heartWatch) look(now time.Time, beat uint64) (stands, beats bool) {
	switch stands := h.stall.look(now, beat, false); {
	case stands && !h.still && (h.told.IsZero() || now.Sub(h.told) >= restOfStall):
		h.still, h.told = true, now
		return true, false
	case !stands && h.still:
		h.still = false
		return false, true
	}
	return false, false
}

// watchHeart watches the heartbeat of a tenancy until that is given up. It must not share
// the goroutine of the heart, which is what may be stuck.
func (g *Guest) watchHeart(t *tenancy) {
	if g.opt.Stalled == nil {
		return
	}
	hang := g.cfg.Failover.HangTimeout
	h := heartWatch{stall: stall{limit: hang * 3 / 4}}
	tk := time.NewTicker(max(hang/8, time.Millisecond))
	defer tk.Stop()
	for {
		select {
		case <-t.ctx.Done():
			return
		case now := <-tk.C:
			switch stands, beats := h.look(now, t.store.Heartbeat()); {
			case stands:
				g.opt.Stalled(fmt.Sprintf("the heartbeat of %s has stood still for %s", t.identity, now.Sub(h.since).Round(time.Millisecond)))
			case beats:
				g.opt.Stalled("")
			}
		}
	}
}
