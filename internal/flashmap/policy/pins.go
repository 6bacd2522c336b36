package policy

import (
	"cmp"
	"slices"

	"github.com/pollux-storage/pollux/internal/flashmap/collect"
)

// Pin is a range of a primary device that shall be on flash, whatever its use.
type Pin struct {
	Name   string // as people know it
	Device int    // the device's number
	Offset int64  // bytes
	Length int64  // bytes; data sets that lie in the range in part belong to it
}

// Pinned says how much of a pin is on flash.
type Pinned struct {
	Pin
	Sets int // data sets of the range
	On   int // of them on flash
	Room int // of the others that will come
	// State is "whole", "partly", "waiting" while nothing is on flash yet, "no room" when
	// nothing is and nothing can be, or "nothing there" for a range without data sets.
	State string
}

// span is a range of data sets of a device: from first up to and without end.
type span struct {
	device     int
	first, end collect.Set
}

// pins are the pins of an input as data sets.
type pins struct {
	spans  []span // in the order of the pins
	joined []span // sorted, without overlaps
	on     map[int][]collect.Set
}

// newPins turns pins into ranges of data sets. Those of devices that are not there are empty.
func newPins(in Input) pins {
	p := pins{on: map[int][]collect.Set{}}
	sets := map[int]collect.Set{}
	for i := range in.Devices {
		d := &in.Devices[i]
		p.on[d.Number], sets[d.Number] = d.On, collect.Set(d.Snapshot.Geometry.Sets())
	}
	for _, pin := range in.Pins {
		s := span{device: pin.Device}
		if n := sets[pin.Device]; pin.Length > 0 && pin.Offset >= 0 && collect.Set(pin.Offset/in.SetBytes) < n {
			s.first = collect.Set(pin.Offset / in.SetBytes)
			last := s.first + collect.Set((pin.Offset%in.SetBytes+pin.Length-1)/in.SetBytes)
			if pin.Length > 1<<62 || last >= n {
				last = n - 1
			}
			s.end = last + 1
		}
		p.spans = append(p.spans, s)
	}
	p.joined = slices.DeleteFunc(slices.Clone(p.spans), func(s span) bool { return s.first == s.end })
	slices.SortFunc(p.joined, func(a, b span) int {
		return cmp.Or(cmp.Compare(a.device, b.device), cmp.Compare(a.first, b.first))
	})
	n := 0
	for _, s := range p.joined {
		if n > 0 && p.joined[n-1].device == s.device && s.first <= p.joined[n-1].end {
			p.joined[n-1].end = max(p.joined[n-1].end, s.end)
			continue
		}
		p.joined[n] = s
		n++
	}
	p.joined = p.joined[:n]
	return p
}

// has reports whether a set is pinned.
func (p *pins) has(k key) bool {
	i, ok := slices.BinarySearchFunc(p.joined, k, func(s span, k key) int {
		return cmp.Or(cmp.Compare(s.device, k.device), cmp.Compare(s.first, k.set))
	})
	if ok {
		return true
	}
	return i > 0 && p.joined[i-1].device == k.device && k.set < p.joined[i-1].end
}

// within returns the sets of a span that are on flash.
func (p *pins) within(s span) []collect.Set {
	on := p.on[s.device]
	lo, _ := slices.BinarySearch(on, s.first)
	hi, _ := slices.BinarySearch(on, s.end)
	return on[lo:hi]
}

// missing calls f for each pinned set that is not on flash, in the order of the pins, until
// it returns false. Devices that are to be skipped are. A set of two pins is told of twice.
func (p *pins) missing(skip func(device int) bool, f func(key) bool) {
	for _, s := range p.spans {
		if skip(s.device) {
			continue
		}
		on := p.within(s)
		for set := s.first; set < s.end; set++ {
			if len(on) > 0 && on[0] == set {
				on = on[1:]
				continue
			}
			if !f(key{s.device, set}) {
				return
			}
		}
	}
}

// Pins returns the state of each pin of an input.
func Pins(in Input) []Pinned {
	p := newPins(in)
	left := in.Slots
	for _, s := range p.joined {
		left -= len(p.within(s))
	}
	var out []Pinned
	for i, s := range p.spans {
		st := Pinned{Pin: in.Pins[i], Sets: int(s.end - s.first), On: len(p.within(s))}
		st.Room = max(0, min(st.Sets-st.On, left))
		left -= st.Room
		st.State = PinState(st.Sets, st.On, st.Room)
		out = append(out, st)
	}
	return out
}

// PinState returns what Pinned.State says of a pin of so many data sets, of which some are on
// flash and others have room there.
func PinState(sets, on, room int) string {
	switch {
	case sets == 0:
		return "nothing there"
	case on == sets:
		return "whole"
	case on > 0:
		return "partly"
	case room > 0:
		return "waiting"
	}
	return "no room"
}
