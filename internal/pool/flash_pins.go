package pool

import (
	"cmp"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/flashmap"
	"github.com/pollux-storage/pollux/internal/flashmap/collect"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

// pinWalk finds the data sets in which what is pinned lies. Volumes are written elsewhere all
// the time, so it comes by again and again; hot rewrites stay on flash by themselves.
//
// A walk looks up some leaves of the maps in a step and rests after it as a survey does, and
// longer when it is through. It remembers no more data sets than flash has room for, and some: others have no place
// anyway.
type pinWalk struct {
	f     *flash
	found []policy.Pin // of the newest walk that came to its end; Name is that of the pin

	next  time.Time // no step before
	walks bool
	rest  []keptPin // still to be looked at; the first from lba on
	lba   block.Logical
	now   []pinnedSet
	took  time.Duration // the steps of this walk
}

// pinnedSet is a data set that holds something of a pin.
type pinnedSet struct {
	pin int // index in kept.Pins
	dev int
	set flashmap.Set
}

func (x pinnedSet) compare(y pinnedSet) int {
	return cmp.Or(cmp.Compare(x.pin, y.pin), cmp.Compare(x.dev, y.dev), cmp.Compare(x.set, y.set))
}

// pinLeaves is how many leaves of a map a step looks up.
const pinLeaves = 16

// again makes a walk begin anew: the pins are others.
func (w *pinWalk) again() { w.walks, w.rest, w.now, w.next = false, nil, nil, time.Time{} }

// has reports whether a data set is pinned.
func (w *pinWalk) has(dev int, set flashmap.Set) bool {
	return slices.ContainsFunc(w.found, func(p policy.Pin) bool {
		n := w.f.layer.SetBytes()
		return p.Device == dev && int64(set)*n >= p.Offset && int64(set)*n < p.Offset+p.Length
	})
}

// work does the next step if it is due.
func (w *pinWalk) work(now time.Time) {
	p := w.f.p
	if now.Before(w.next) || len(w.f.kept.Pins) == 0 && len(w.found) == 0 || !p.loaded.Load() {
		return
	}
	if !w.walks {
		w.walks, w.rest, w.now, w.took = true, slices.Clone(w.f.kept.Pins), nil, 0
		w.lba = 0
	}
	begun := time.Now() // now may lie before other work of this round
	more := w.step()
	end, rest := time.Now(), time.Duration(surveyRest)
	if w.took += end.Sub(begun); !more {
		w.end(now)
		w.next = end.Add(min(max(pressedRest*w.took, pinLeast), pinMost))
		return
	}
	if p.pressed() {
		rest = pressedRest // as moves do
	}
	w.next = end.Add(rest * end.Sub(begun))
}

// step looks up some blocks. It returns false when all pins are through.
func (w *pinWalk) step() (more bool) {
	p := w.f.p
	var ptrs [blockmap.LeafBlocks]block.Pointer
	for range pinLeaves {
		for len(w.rest) > 0 && w.lba >= w.behind(w.rest[0]) {
			if w.rest = w.rest[1:]; len(w.rest) > 0 {
				w.lba = w.rest[0].first()
			}
		}
		if len(w.rest) == 0 {
			return false
		}
		pin := w.rest[0]
		w.lba = max(w.lba, pin.first())
		n := min(blockmap.LeafBlocks-uint64(w.lba)%blockmap.LeafBlocks, uint64(w.behind(pin)-w.lba))
		dst := ptrs[:n]
		if p.bmap.Lookup(pin.Volume, w.lba, dst) == nil { // else a check or scrub says more
			w.note(len(w.f.kept.Pins)-len(w.rest), dst)
		}
		w.lba += block.Logical(n)
	}
	return true
}

// behind returns the block behind a pin's range of its volume.
func (w *pinWalk) behind(pin keptPin) block.Logical {
	v, ok := w.f.p.catalogue.Get(pin.Volume)
	if !ok {
		return 0
	}
	return min(pin.end(), block.Logical((v.Size+block.Size-1)/block.Size))
}

// note takes down in which data sets blocks lie.
func (w *pinWalk) note(pin int, ptrs []block.Pointer) {
	per := uint64(w.f.layer.SetBytes() / block.Size)
	for _, p := range ptrs {
		if p.IsHole() || w.f.disk(p.Phys.Device()) == nil {
			continue
		}
		s := pinnedSet{pin, p.Phys.Device(), flashmap.Set(p.Phys.Block() / per)}
		if n := len(w.now); n > 0 && w.now[n-1] == s {
			continue
		}
		w.now = append(w.now, s)
	}
	if most := w.f.layer.Status().Slots + 1<<16; len(w.now) > 2*most {
		w.compact()
		w.now = w.now[:min(len(w.now), most)]
	}
}

func (w *pinWalk) compact() {
	slices.SortFunc(w.now, pinnedSet.compare)
	w.now = slices.Compact(w.now)
}

// end makes what was found count.
func (w *pinWalk) end(now time.Time) {
	w.compact()
	w.found = w.found[:0]
	bytes := w.f.layer.SetBytes()
	for i, s := range w.now {
		if i > 0 && w.now[i-1].pin == s.pin && w.now[i-1].dev == s.dev && w.now[i-1].set+1 == s.set {
			w.found[len(w.found)-1].Length += bytes
			continue
		}
		w.found = append(w.found, policy.Pin{Name: w.f.kept.Pins[s.pin].key(), Device: s.dev, Offset: int64(s.set) * bytes, Length: bytes})
	}
	w.walks, w.now = false, nil
	if len(w.found) > 0 {
		w.f.decideAt = now
	}
}

// pinned says what has become of each pin.
func (f *flash) pinned(in policy.Input) (out []FlashPinned) {
	byKey := map[string]*FlashPinned{}
	for _, k := range f.kept.Pins {
		out = append(out, FlashPinned{FlashPin: f.pinOf(k)})
	}
	for i, k := range f.kept.Pins {
		byKey[k.key()] = &out[i]
	}
	for _, p := range policy.Pins(in) {
		if x := byKey[p.Name]; x != nil {
			x.Sets, x.On, x.Room = x.Sets+p.Sets, x.On+p.On, x.Room+p.Room
		}
	}
	for i := range out {
		x := &out[i]
		if x.State = policy.PinState(x.Sets, x.On, x.Room); x.Volume == "" {
			x.State = "no volume"
		}
	}
	return out
}

// pinOf returns a pin as people know it.
func (f *flash) pinOf(k keptPin) FlashPin {
	v, _ := f.p.catalogue.Get(k.Volume)
	return FlashPin{Volume: v.Name, Offset: k.Offset, Length: k.Length}
}

// setOf returns the data set of a block, as the engine numbers it.
func (f *flash) setOf(p block.Physical) collect.Set {
	return collect.Set(p.Block() / uint64(f.layer.SetBytes()/block.Size))
}
