package main

import (
	"cmp"
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

// access is a request of a client.
type access struct {
	at     time.Duration // since the beginning of its window
	write  bool
	offset int64
	bytes  int64
	run    bool // part of what is read or written in sequence
}

// scale is how large a workload is.
type scale struct {
	sets     int // of the device
	setBytes int64
	window   time.Duration
	rate     int // accesses in a window, about
	day      int // windows; of those that have days
	stay     int // windows until a hot spot moves
	half     int // windows that are collected, and then as many with flash
}

// workload makes the accesses of a window. Each window is drawn anew from the seed, so that
// any can be made again.
type workload struct {
	name   string
	steady bool // what is hot stays so
	fill   func(w *drawing)
	// apart says of windows that they are not what hit shares are about: a scan's.
	apart func(s scale, window int) bool
	days  bool // it repeats itself with each day
	moves bool // what is hot moves
}

var workloads = []workload{
	{name: "zipf", steady: true, fill: (*drawing).zipf},
	{name: "hot spot that moves", fill: (*drawing).hotSpot, moves: true},
	{name: "database", steady: true, fill: (*drawing).database},
	{name: "file server, scan at night", steady: true, fill: (*drawing).fileServer, days: true, apart: night},
	{name: "clones that boot together", steady: true, fill: (*drawing).clones},
}

// drawing is a window in the making.
type drawing struct {
	scale
	rnd    *rand.Rand
	index  int
	places []int // a permutation of the sets, the same for all windows
	out    []access
}

const (
	kib = 1 << 10
	mib = 1 << 20
)

// draw returns the accesses of a window, in order of time.
func (w *workload) draw(s scale, seed uint64, index int, places []int) []access {
	d := &drawing{scale: s, rnd: rand.New(rand.NewPCG(seed, uint64(index))), index: index, places: places}
	w.fill(d)
	slices.SortStableFunc(d.out, func(a, b access) int { return cmp.Compare(a.at, b.at) })
	return d.out
}

// permute returns where the sets of a workload lie.
func permute(s scale, seed uint64) []int {
	return rand.New(rand.NewPCG(seed, math.MaxUint64)).Perm(s.sets)
}

// anytime draws a time of the window.
func (d *drawing) anytime() time.Duration { return time.Duration(d.rnd.Int64N(int64(d.window))) }

// put adds an access to a place of a set, at a multiple of the request's size.
func (d *drawing) put(set int, bytes int64, write bool) {
	at := d.rnd.Int64N(d.setBytes/bytes) * bytes
	d.out = append(d.out, access{d.anytime(), write, int64(set)*d.setBytes + at, bytes, false})
}

// sequence adds a run from one place to another, with requests of a size, that begins at a
// time and takes so long.
func (d *drawing) sequence(from, to, bytes int64, at, takes time.Duration, write bool) {
	n := (to - from) / bytes
	for i := range n {
		d.out = append(d.out, access{at + takes*time.Duration(i)/time.Duration(n), write, from + i*bytes, bytes, true})
	}
}

// skewed draws numbers below n, by Zipf's law.
func (d *drawing) skewed(s float64, n int) *rand.Zipf { return rand.NewZipf(d.rnd, s, 1, uint64(n-1)) }

// zipf is blocks of 4 KiB all over the device, some more often than others.
func (d *drawing) zipf() {
	z := d.skewed(1.25, d.sets)
	for range d.rate {
		d.put(d.places[z.Uint64()], 4*kib, d.rnd.IntN(10) < 3)
	}
}

// hotSpot has 95 of 100 accesses to one part in twenty of the device, which is another one
// after a while.
func (d *drawing) hotSpot() {
	n := d.sets / 20
	first := d.index / d.stay * n
	for range d.rate {
		set := d.rnd.IntN(d.sets)
		if d.rnd.IntN(20) > 0 {
			set = d.places[(first+d.rnd.IntN(n))%d.sets]
		}
		d.put(set, 4*kib, d.rnd.IntN(10) < 3)
	}
}

// database has pages of 8 KiB of a fifth of the device, some more often than others, a log
// of its own that is written in sequence, and tables that are read whole now and then.
func (d *drawing) database() {
	const apart = 8 // sets around the log that have nothing else
	z := d.skewed(1.2, d.sets/5)
	log := d.sets / 20
	for range d.rate * 65 / 100 {
		set := d.places[z.Uint64()]
		if d.rnd.IntN(30) == 0 {
			set = d.rnd.IntN(d.sets)
		}
		if set < log+apart {
			set = d.sets - 1 - set
		}
		d.put(set, 8*kib, d.rnd.IntN(10) < 2)
	}
	// The log goes round and round in a twentieth of the device.
	size := int64(log) * d.setBytes
	n := int64(d.rate) * 30 / 100
	for i := range n {
		at := (int64(d.index)*n + i) * 16 * kib % size
		d.out = append(d.out, access{d.window * time.Duration(i) / time.Duration(n), true, at, 16 * kib, true})
	}
	for range 2 {
		table := int64(d.sets) / 32 * d.setBytes
		from := d.rnd.Int64N(31) * table
		d.sequence(from, from+table, 128*kib, d.anytime()/2, time.Duration(table)*time.Second/(20*mib), false)
	}
}

// fileServer has files of 16 KiB to 512 KiB, some more often than others, that are read or
// written whole in pieces of 32 KiB; and in the last window of a day all of the device is
// read.
func (d *drawing) fileServer() {
	const piece = 32 * kib
	z := d.skewed(1.3, d.sets)
	n := d.rate
	if night(d.scale, d.index) {
		n /= 4
		d.sequence(0, int64(d.sets)*d.setBytes, 256*kib, d.window/10, d.window*8/10, false)
	}
	for n > 0 {
		file := d.places[z.Uint64()]
		// Where a file begins in its set, and how long it is, follow from its number.
		h := rand.New(rand.NewPCG(uint64(file), 1))
		size := piece * (1 + h.Int64N(16))
		from := int64(file)*d.setBytes + h.Int64N(d.setBytes/piece)*piece
		at, write := d.anytime(), d.rnd.IntN(5) == 0
		for off := int64(0); off < size && from+off+piece <= int64(d.sets)*d.setBytes; off += piece {
			d.out = append(d.out, access{at + time.Duration(off)*time.Millisecond/mib, write, from + off, piece, false})
			n--
		}
	}
}

func night(s scale, window int) bool { return window%s.day == s.day-1 }

// clones has twenty machines that boot together early in each window from what they share,
// and then use a little of their own.
func (d *drawing) clones() {
	const machines = 20
	n := d.sets / 25
	extents := d.rate * 8 / 10 / machines
	for m := range machines {
		// All read the same extents in the same order, each at a speed of its own.
		h := rand.New(rand.NewPCG(uint64(d.sets), 2))
		begin := time.Duration(d.rnd.Int64N(int64(d.window / 20)))
		takes := d.window/10 + time.Duration(d.rnd.Int64N(int64(d.window/10)))
		for i := range extents {
			size := int64(4*kib) << h.IntN(5)
			at := int64(d.places[h.IntN(n)])*d.setBytes + h.Int64N(d.setBytes/size)*size
			d.out = append(d.out, access{begin + takes*time.Duration(i)/time.Duration(extents), false, at, size, false})
		}
		own := n + m*4
		for range d.rate * 15 / 100 / machines {
			d.put(d.places[own+d.rnd.IntN(4)], 4*kib, d.rnd.IntN(2) == 0)
		}
	}
	for range d.rate * 5 / 100 {
		d.put(d.rnd.IntN(d.sets), 4*kib, d.rnd.IntN(2) == 0)
	}
}
