package sim

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// drawer makes a random script.
type drawer struct {
	rng   *rand.Rand
	lines []Line
	vols  []drawnVolume
	disks []string
	parts []string // disks that are copies
	about bool     // copies: the run looks longest at them
	// sharing says that volumes share blocks.
	sharing bool
	ids     []string
	copies  map[string]int // that pools keep
	made    int
	kinds   []string // of faults, repeated by weight
}

type drawnVolume struct {
	name string
	size int64
}

// Draw returns the script of a seed: a pair of some shape, clients at work,
// and faults of the kinds that the seed has chosen, so that each run looks
// longer at some of them.
func Draw(seed uint64) *Script {
	d := &drawer{rng: rand.New(rand.NewPCG(seed, 0x73696d)), copies: map[string]int{}}
	d.say("seed %d", seed)
	d.about = seed%3 == 0
	d.shape()
	if seed%2 == 0 {
		d.say("cleaner")
	}
	d.resubmits(seed)
	d.sharing = seed%4 == 1
	if d.sharing {
		d.say("sharing %d%s", 1+seed/4%5, map[bool]string{true: " weak"}[seed/4%3 == 0])
	}
	d.chooseKinds()
	memory := d.sharing && seed/4%2 == 0
	if memory {
		d.say("add a size=%dM llrrm", 6+d.rng.IntN(3))
	}
	flash := newFlashDrawer(d, seed)
	starts := newStartDrawer(d, seed)
	leaves := rand.New(rand.NewPCG(seed, 0x6c656176)) // so that it changes nothing else that is drawn
	for range 4 + d.rng.IntN(28) {
		d.traffic()
		if d.chance(2) {
			d.say("ops %d", 1+d.rng.IntN(60))
		}
		if d.chance(3) {
			d.say("sleep %dus", 10+d.rng.IntN(1<<(4+d.rng.IntN(16))))
		}
		for range d.rng.IntN(3) {
			d.fault()
		}
		if d.sharing && len(d.vols) > 0 && d.chance(5) {
			d.say("scan %s%s", d.vols[d.rng.IntN(len(d.vols))].name, d.pick("", "", " undo"))
		}
		if d.chance(8) {
			d.say("settle")
		}
		if memory && leaves.IntN(12) == 0 {
			d.say("remove a")
			if leaves.IntN(2) == 0 {
				d.say("add a size=%dM llrrm", 6+leaves.IntN(3))
			}
		}
		flash.draw()
		starts.draw()
	}
	return &Script{Name: fmt.Sprintf("seed %d", seed), Lines: d.lines}
}

func (d *drawer) say(format string, args ...any) {
	d.lines = append(d.lines, Line{strings.Fields(fmt.Sprintf(format, args...)), len(d.lines) + 1})
}

// resubmits chooses clients that send requests again by number.
func (d *drawer) resubmits(seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 0x7461677)) // so that it changes nothing else that is drawn
	names := ""
	for c := 1; c <= 4; c++ {
		if rng.IntN(2) == 0 {
			names += fmt.Sprintf(" c%d", c)
		}
	}
	if names != "" {
		d.say("resubmits%s", names)
	}
}

func (d *drawer) chance(n int) bool { return d.rng.IntN(n) == 0 }

func (d *drawer) pick(words ...string) string { return words[d.rng.IntN(len(words))] }

func (d *drawer) pick2(n ...int) int { return n[d.rng.IntN(len(n))] }

// shape draws guests, pools and volumes.
func (d *drawer) shape() {
	d.ids = []string{"a", "b"}
	if d.chance(10) {
		d.say("alone")
		d.ids = d.ids[:1]
	}
	for _, id := range d.ids {
		disks, size := 1, 48
		if d.chance(4) {
			disks = 2 + d.rng.IntN(2)
		}
		if d.chance(6) {
			size = 12 + d.rng.IntN(4) // little room: space must come back in time
		}
		extra, copies := "", 1
		if d.about || d.chance(6) {
			copies = 2 + d.rng.IntN(4)/3
			extra = fmt.Sprintf(" copies=%d", copies)
			size++ // what mirrors keep for themselves
		}
		if !d.chance(3) {
			extra += fmt.Sprintf(" journal=%dK", d.pick2(48, 64, 128, 512))
			if size < 40 {
				size -= 3 // as much as the journal is smaller
			}
		}
		if d.chance(10) {
			extra += " battery"
		}
		d.copies[id] = copies
		d.say("pool %s disks=%d size=%dM%s", id, disks, size, extra)
		for i := range disks * copies {
			name := fmt.Sprintf("%s%d", id, i)
			if d.disks = append(d.disks, name); copies > 1 {
				d.parts = append(d.parts, name)
			}
		}
	}
	if d.chance(3) {
		d.say("interval %dms", 5+d.rng.IntN(300))
	}
	if d.chance(3) {
		d.say("giveback-delay %s", d.pick("never", "0s", "100ms", "5s"))
	}
	for i := range 1 + d.rng.IntN(3) {
		d.volume(fmt.Sprintf("volume v%d on %s", i, d.ids[i%len(d.ids)]), fmt.Sprintf("v%d", i))
	}
}

func (d *drawer) volume(prefix, name string) {
	size := int64(1+d.rng.IntN(8)) << 20
	if d.chance(5) {
		size = int64(1+d.rng.IntN(64)) << 30 // thin
	}
	d.say("%s %s", prefix, sizeText(size))
	d.vols = append(d.vols, drawnVolume{name, size})
}

// chooseKinds draws which faults the run is about.
func (d *drawer) chooseKinds() {
	all := []string{"kill", "kill", "kill", "hang", "agent", "line", "move", "power", "cut", "slow", "error", "stick", "damage", "pool", "catalogue", "clock", "memory", "usurp"}
	for range 2 + d.rng.IntN(5) {
		k := all[d.rng.IntN(len(all))]
		if k == "damage" && !d.chance(3) {
			continue // it allows so much that little is left to check
		}
		for range 1 + d.rng.IntN(4) {
			d.kinds = append(d.kinds, k)
		}
	}
	d.kinds = append(d.kinds, "kill", "pool")
	switch {
	case d.about:
		d.kinds = append(d.kinds[max(0, len(d.kinds)-4):], "power", "copy", "copy", "copy", "copy", "copy", "copy")
	case len(d.parts) > 0:
		d.kinds = append(d.kinds, "copy", "copy")
	}
}

// traffic lets clients ask for some things, mostly in few places, so that
// requests meet.
func (d *drawer) traffic() {
	if len(d.vols) == 0 {
		return
	}
	v := d.vols[d.rng.IntN(len(d.vols))]
	switch {
	case v.size >= 32<<30 && d.chance(3):
		d.spread(v)
		return
	case d.chance(6):
		d.churn(v)
		return
	}
	hot := d.rng.Int64N(max(1, v.size/4096-64)) &^ 0xff
	for range 1 + d.rng.IntN(1<<(1+d.rng.IntN(6))) {
		c := fmt.Sprintf("c%d", 1+d.rng.IntN(4))
		off, n := d.place(v.size, hot*4096)
		fua := ""
		if d.chance(12) {
			fua = " fua"
		}
		switch k := d.rng.IntN(100); {
		case k < 55:
			d.say("%s write %s %s %s%s", c, v.name, sizeText(off), sizeText(n), fua)
		case k < 80:
			d.say("%s read %s %s %s", c, v.name, sizeText(off), sizeText(n))
		case k < 88:
			if d.chance(4) {
				n = min(v.size-off, 1<<(12+d.rng.IntN(15)))
			}
			d.say("%s %s %s %s %s%s", c, d.pick("trim", "zero"), v.name, sizeText(off), sizeText(n), fua)
		case k < 96:
			d.say("%s flush %s", c, v.name)
		default: // much of it, so that the log fills
			for i := range int64(8) {
				d.say("%s write %s %s 256K", c, v.name, sizeText(min(off+i<<18, v.size-1<<18)))
			}
		}
	}
}

// churn writes and trims all over a volume, so that space has to come back.
func (d *drawer) churn(v drawnVolume) {
	size := min(v.size, 8<<20)
	for range 8 + d.rng.IntN(48) {
		c := fmt.Sprintf("c%d", 1+d.rng.IntN(4))
		n := int64(16<<10) << d.rng.IntN(5)
		off := d.rng.Int64N(max(1, size/n)) * n
		if d.chance(8) {
			d.say("%s trim %s %s %s", c, v.name, sizeText(off), sizeText(min(v.size-off, 8*n)))
			continue
		}
		d.say("%s write %s %s %s", c, v.name, sizeText(off), sizeText(min(n, v.size-off)))
	}
}

// spread writes to so many far places that a trim of all of them cannot free
// them at once, and then again into the trimmed range.
func (d *drawer) spread(v drawnVolume) {
	d.say("c1 spread %s 256M %d", v.name, v.size>>28)
	if d.chance(2) {
		d.say("settle")
		d.say("fold %s", d.pick(d.ids...))
	}
	d.say("c2 trim %s 0 %s", v.name, sizeText(v.size))
	for range 1 + d.rng.IntN(8) {
		d.say("c3 write %s %dM 8K", v.name, d.rng.Int64N(v.size>>28)<<8)
	}
	if d.chance(2) {
		d.say("settle")
		d.say("fold %s", d.pick(d.ids...))
	}
}

// place draws offset and length of a request, near hot most times.
func (d *drawer) place(size, hot int64) (off, n int64) {
	blocks := int64(32)
	off = hot + d.rng.Int64N(blocks)*4096
	if d.chance(10) {
		off = d.rng.Int64N(size/4096) * 4096
	}
	n = (1 + d.rng.Int64N(int64(1)<<d.rng.IntN(5))) * 4096
	if d.chance(4) {
		off += d.rng.Int64N(4096)
		n = 1 + d.rng.Int64N(3*4096)
	}
	off = min(off, size-1)
	return off, min(n, size-off)
}

func (d *drawer) fault() {
	g := d.ids[d.rng.IntN(len(d.ids))]
	disk := d.disks[d.rng.IntN(len(d.disks))]
	switch d.kinds[d.rng.IntN(len(d.kinds))] {
	case "kill":
		if d.chance(3) {
			d.say("kill %s", g)
		} else {
			d.say("kill %s after %d", g, 1+d.rng.IntN(1<<(1+d.rng.IntN(9))))
		}
	case "hang":
		d.say("hang %s", g)
		if d.chance(2) {
			d.say("sleep %dms", d.rng.IntN(2500))
		}
		if d.chance(2) {
			d.say("thaw %s", g)
		}
	case "agent":
		d.say("agent %s", d.pick("dies", "starts", "starts"))
	case "line":
		d.say("line %s %s", g, d.pick("breaks", "slow", "fast", "repeats 3"))
	case "move":
		d.say("%s %s", d.pick("takeover", "giveback"), g)
	case "power":
		d.say("power cut %s", d.pick("random", "random", "drop", "keep"))
	case "cut":
		d.say("cut c%d", 1+d.rng.IntN(4))
	case "slow":
		d.say("disk %s slow %d", disk, 1+d.rng.IntN(200))
	case "error":
		d.say("disk %s %s %s times %d", disk, d.pick("fails", "fails-late"), d.pick("read", "write", "write", "sync"), 1+d.rng.IntN(5))
	case "stick":
		d.say("disk %s sticks", disk)
		d.say("sleep %dms", d.rng.IntN(4000))
		d.say("disk %s goes-on", disk)
	case "damage":
		d.damage(disk)
	case "copy":
		d.copy()
	case "pool":
		d.say("%s %s", d.pick("commit", "commit", "fold", "check"), g)
	case "catalogue":
		d.catalogue(g)
	case "memory":
		d.say("kill %s", g)
		d.say("memory %s rots %s", g, d.pick("region", "header", "record", "record", "payload"))
	case "usurp":
		d.say("usurp %s", g)
	case "clock":
		d.say("clock %s %dms", g, d.rng.IntN(5000))
	}
}

// copy lets something happen to a disk that is one of several copies.
func (d *drawer) copy() {
	disk := d.pick(d.parts...)
	switch d.rng.IntN(13) {
	case 0:
		d.say("offline %s", disk)
	case 1:
		d.say("online %s", disk)
	case 2:
		d.say("replace %s", disk)
	case 3:
		d.say("disk %s vanishes after %d", disk, 1+d.rng.IntN(1<<(1+d.rng.IntN(8))))
	case 4:
		d.say("disk %s vanishes", disk)
	case 5:
		d.say("disk %s returns", disk)
	case 6:
		d.say("mend %s", disk)
	case 7:
		d.say("disk %s %s %s times %d", disk, d.pick("fails", "fails-late"), d.pick("read", "write", "sync"), 1+d.rng.IntN(5))
	case 8, 9:
		d.say("disk %s rots", disk)
	case 10:
		d.say("disk %s flips read times %d", disk, 1+d.rng.IntN(20))
	case 11:
		d.say("disk %s misdirects write times %d", disk, 1+d.rng.IntN(5))
	case 12:
		d.say("disk %s loses write times -1", disk)
		d.say("disk %s loses sync times -1", disk)
	}
	if d.chance(3) {
		d.say("disk %s returns", disk)
		d.say("online %s", disk)
	}
	if d.chance(4) {
		d.say("mend %s", disk)
	}
}

func (d *drawer) damage(disk string) {
	switch d.rng.IntN(4) {
	case 0:
		d.say("disk %s rots", disk)
	case 1:
		d.say("disk %s flips read times %d", disk, 1+d.rng.IntN(3))
	case 2:
		d.say("disk %s %s write", disk, d.pick("loses", "misdirects"))
	case 3:
		d.say("disk %s loses sync", disk)
	}
}

func (d *drawer) catalogue(g string) {
	if len(d.vols) == 0 || d.chance(3) {
		d.made++
		name := fmt.Sprintf("n%d", d.made)
		d.volume(fmt.Sprintf("create %s on %s", name, g), name)
		return
	}
	i := d.rng.IntN(len(d.vols))
	v := &d.vols[i]
	switch d.rng.IntN(3) {
	case 0:
		v.size += int64(1+d.rng.IntN(256)) * 4096
		d.say("resize %s %s", v.name, sizeText(v.size))
	case 1:
		d.made++
		to := fmt.Sprintf("r%d", d.made)
		d.say("rename %s %s", v.name, to)
		v.name = to
	case 2:
		d.say("delete %s", v.name)
		d.vols = append(d.vols[:i], d.vols[i+1:]...)
	}
}
