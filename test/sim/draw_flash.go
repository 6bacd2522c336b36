package sim

import (
	"fmt"
	"math/rand/v2"
)

// flashDrawer draws what happens to flash. It has a generator of its own, so that nothing else
// of a seed is drawn otherwise because of it.
type flashDrawer struct {
	d   *drawer
	rng *rand.Rand
	ids []string        // of pools that get flash
	has map[string]bool // those to which it was added
	// fails says that flash devices may return errors, after which less is demanded.
	fails bool
}

func newFlashDrawer(d *drawer, seed uint64) *flashDrawer {
	f := &flashDrawer{d: d, rng: rand.New(rand.NewPCG(seed, 0x666c617368)), has: map[string]bool{}}
	for _, id := range d.ids {
		if f.chance(4) {
			f.ids = append(f.ids, id)
		}
	}
	f.fails = f.chance(4)
	return f
}

func (f *flashDrawer) chance(n int) bool { return f.rng.IntN(n) == 0 }

func (f *flashDrawer) pick(words ...string) string { return words[f.rng.IntN(len(words))] }

// draw says some steps, or none.
func (f *flashDrawer) draw() {
	for _, id := range f.ids {
		if !f.has[id] {
			if f.chance(3) {
				size := 5 + f.rng.IntN(3)
				if f.d.copies[id] > 1 {
					size++ // what mirrors keep for themselves
				}
				f.d.say("add %s size=%dM flash", id, size)
				f.has[id] = true
				f.pin()
			}
			continue
		}
		for range f.rng.IntN(3) {
			f.happens(id)
		}
	}
}

func (f *flashDrawer) happens(id string) {
	flash := id + ".flash"
	mirrored := f.d.copies[id] > 1
	if mirrored && f.chance(2) {
		flash += "2"
	}
	switch f.rng.IntN(24) {
	case 0, 1, 2, 3, 4:
		f.heat()
	case 5, 6, 7:
		f.pin()
	case 8:
		f.d.say("evacuate %s%s", id, f.pick("", "", " stop"))
	case 9:
		f.d.say("evacuate %s", id)
		f.heat()
		f.d.say("evacuate %s stop", id)
	case 10:
		f.d.say("remove %s flash", id)
		f.has[id] = false
		if f.chance(2) {
			f.heat()
		}
	case 11:
		f.d.say("kill %s after %d", id, 1+f.rng.IntN(1<<(1+f.rng.IntN(9))))
	case 12:
		f.heat()
		f.d.say("power cut %s", f.pick("random", "drop", "keep"))
	case 13:
		f.d.say("disk %s missing", flash)
		f.d.say("%s", f.pick("kill "+id, "power cut random"))
		f.d.say("sleep %dms", f.rng.IntN(1500))
		f.d.say("disk %s found", flash)
	case 14:
		f.d.say("disk %s slow %d", flash, 1+f.rng.IntN(100))
	case 15:
		f.d.say("disk %s sticks", flash)
		f.d.say("sleep %dms", f.rng.IntN(2000))
		f.d.say("disk %s goes-on", flash)
	case 16:
		f.errors(flash, mirrored)
	case 17:
		if !mirrored && f.chance(2) {
			f.d.say("add %s size=%dM", id, 8+f.rng.IntN(8))
		} else {
			f.d.say("remove %s disk", id)
		}
	case 18:
		f.d.say("grow %s %dM", f.pick(id+"0", flash), 1+f.rng.IntN(8))
	case 19:
		f.d.say("%s %s", f.pick("fold", "check"), id)
	default:
		f.rush(id)
	}
}

// rush lets clients write much at once where data sets are to come and go, and ends it somewhere
// in the middle.
func (f *flashDrawer) rush(id string) {
	if len(f.d.vols) == 0 {
		return
	}
	v := f.d.vols[f.rng.IntN(len(f.d.vols))]
	at := f.rng.Int64N(min(v.size, 4<<20) >> 20)
	f.d.say("%s %s %dM 1M", f.pick("pin", "unpin"), v.name, at)
	for range 1 + f.rng.IntN(3) {
		for range 4 + f.rng.IntN(16) {
			f.d.say("c%d write %s %s %dK%s", 1+f.rng.IntN(4), v.name, sizeText(at<<20+f.rng.Int64N(224)*4096), 4<<f.rng.IntN(5), f.pick("", "", "", " fua"))
		}
		f.d.say("sleep %dms", 5+f.rng.IntN(150))
		f.d.say("%s %s %dM 1M", f.pick("pin", "unpin"), v.name, at)
		f.d.say("c1 flush %s", v.name)
		f.d.say("ops %d", 1+f.rng.IntN(300))
	}
	f.d.say("%s", f.pick("power cut random", "power cut random", "power cut drop", "kill "+id, "settle"))
}

// errors lets the flash device do what is wrong, one of its copies whatever it may.
func (f *flashDrawer) errors(flash string, mirrored bool) {
	switch {
	case mirrored:
		f.d.say("%s", f.pick("offline ", "replace ", "mend ")+flash)
		f.d.say("disk %s %s", flash, f.pick("rots", "vanishes", fmt.Sprint("vanishes after ", 1+f.rng.IntN(60)), "flips read times 5", "fails write times 3", "misdirects write times 2"))
		if f.chance(2) {
			f.heat()
			f.d.say("mend %s", flash)
		}
	case f.fails:
		f.d.say("disk %s %s %s times %d", flash, f.pick("fails", "fails-late"), f.pick("read", "write", "sync"), 1+f.rng.IntN(20))
		if f.chance(2) {
			f.heat()
			f.d.say("disk %s heals", flash)
		}
	}
}

// pin pins a volume or a part of it, or takes that back.
func (f *flashDrawer) pin() {
	if len(f.d.vols) == 0 {
		return
	}
	v := f.d.vols[f.rng.IntN(len(f.d.vols))]
	switch f.rng.IntN(5) {
	case 0, 1:
		f.d.say("pin %s", v.name)
	case 2:
		f.d.say("unpin %s", v.name)
	default:
		f.d.say("%s %s %dM 1M", f.pick("pin", "pin", "unpin"), v.name, f.rng.Int64N(min(v.size>>20, 8)))
	}
}

// heat lets clients come back to some places again and again, for longer than a decision
// about flash takes.
func (f *flashDrawer) heat() {
	if len(f.d.vols) == 0 {
		return
	}
	v := f.d.vols[f.rng.IntN(len(f.d.vols))]
	size := min(v.size, 8<<20)
	var places []int64
	for range 1 + f.rng.IntN(12) {
		places = append(places, f.rng.Int64N(size/(64<<10))<<16)
	}
	for range 2 + f.rng.IntN(3) {
		for _, at := range places {
			f.d.say("c%d %s %s %s %dK", 1+f.rng.IntN(4), f.pick("read", "write", "write"), v.name, sizeText(at+f.rng.Int64N(8)*4096), 4<<f.rng.IntN(4))
		}
		f.d.say("sleep %dms", 50+f.rng.IntN(400))
	}
	if f.chance(2) {
		f.d.say("commit %s", f.d.ids[f.rng.IntN(len(f.d.ids))])
	}
}
