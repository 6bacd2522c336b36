package table

import (
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
)

func seeds(t *testing.T, n int) []uint64 {
	t.Helper()
	if s := os.Getenv("POLLUX_SEED"); s != "" {
		v, err := strconv.ParseUint(s, 0, 64)
		if err != nil {
			t.Fatal(err)
		}
		return []uint64{v}
	}
	list := make([]uint64, n)
	for i := range list {
		list[i] = rand.Uint64()
	}
	return list
}

// check proves the invariants and that t holds what model does.
func check(t *testing.T, seed uint64, tab *Table[uint32], model map[uint64]uint32) {
	t.Helper()
	n := 0
	for at := 0; at < len(tab.dir); {
		s := tab.dir[at]
		places := 1 << (tab.depth - uint(s.depth))
		if at%places != 0 {
			t.Fatalf("seed %d: segment of depth %d at place %d", seed, s.depth, at)
		}
		for i := range places {
			if tab.dir[at+i] != s {
				t.Fatalf("seed %d: place %d does not lead to the segment of depth %d at %d", seed, at+i, s.depth, at)
			}
		}
		at += places
		used := 0
		for i, k := range s.keys {
			if k == 0 {
				continue
			}
			used++
			h := hash(k - 1)
			if tab.segment(h) != s {
				t.Fatalf("seed %d: key %d is in another segment", seed, k-1)
			}
			for j := home(h, k-1); j != uint(i); j = (j + 1) % slots {
				if s.keys[j] == 0 {
					t.Fatalf("seed %d: gap before key %d", seed, k-1)
				}
			}
		}
		if used != int(s.n) || used > fill {
			t.Fatalf("seed %d: a segment of %d has %d entries", seed, s.n, used)
		}
		n += used
	}
	got := maps.Collect(tab.All())
	if n != tab.Len() || !maps.Equal(got, model) {
		t.Fatalf("seed %d: %d entries, counted %d, instead of %d, or others", seed, tab.Len(), n, len(model))
	}
	var s Sorter
	defer s.Free()
	Start(&s, tab)
	if !slices.Equal(s.Sort(), slices.Sorted(maps.Keys(model))) {
		t.Fatalf("seed %d: %d keys come out in another order", seed, len(model))
	}
}

// Whatever is put and deleted, in whichever pattern, a table is a map.
func TestAgainstMap(t *testing.T) {
	for _, seed := range seeds(t, 6) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var tab Table[uint32]
		model := map[uint64]uint32{}
		space := uint64(1) << (8 + rng.IntN(14))
		base := uint64(0)
		if rng.IntN(2) == 0 {
			base = MaxKey - space + 1
		}
		for round := range 60 {
			for range rng.IntN(400) {
				key := base + rng.Uint64N(space)
				switch rng.IntN(8) {
				case 0:
					v, ok := tab.Delete(key)
					if w, had := model[key]; had != ok || v != w {
						t.Fatalf("seed %d: deleted %d, %t instead of %d, %t", seed, v, ok, w, had)
					}
					delete(model, key)
				case 2: // the same in place
					at := tab.At(key)
					if *at != model[key] {
						t.Fatalf("seed %d: at %d is %d instead of %d", seed, key, *at, model[key])
					}
					*at++
					model[key]++
					tab.Touch([]uint64{key, key ^ 1, base}) // changes nothing
				case 1: // a run
					for range min(64, MaxKey-key) {
						v := rng.Uint32()
						tab.Put(key, v)
						model[key] = v
						key++
					}
				default:
					v := rng.Uint32()
					old, had := tab.Put(key, v)
					if w, ok := model[key]; had != ok || old != w {
						t.Fatalf("seed %d: replaced %d, %t instead of %d, %t", seed, old, had, w, ok)
					}
					model[key] = v
				}
				key = base + rng.Uint64N(space)
				v, ok := tab.Get(key)
				if w, had := model[key]; v != w || ok != had || tab.Has(key) != had {
					t.Fatalf("seed %d: key %d: %d, %t instead of %d, %t", seed, key, v, ok, w, had)
				}
			}
			switch rng.IntN(12) {
			case 0, 1, 2:
				from := base + rng.Uint64N(space)
				to := min(MaxKey, from+rng.Uint64N([]uint64{50, space}[rng.IntN(2)]))
				tab.DeleteRange(from, to, func(key uint64, v uint32) {
					if w, ok := model[key]; !ok || v != w || key < from || key >= to {
						t.Fatalf("seed %d: range [%d, %d) deletes %d", seed, from, to, key)
					}
					delete(model, key)
				})
			case 3:
				tab.Clear()
				clear(model)
			case 4:
				tab.Grow(rng.IntN(5000)) // nothing, unless it is empty
			}
			if round%10 == 9 {
				check(t, seed, &tab, model)
			}
		}
		check(t, seed, &tab, model)
		tab.Free()
		if tab.Len() != 0 || tab.Bytes() != 0 || tab.Has(base) {
			t.Fatalf("seed %d: a freed table has %d entries, %d bytes", seed, tab.Len(), tab.Bytes())
		}
	}
}

// A table grows to a million entries of any pattern and takes at most five
// words for each.
func TestLarge(t *testing.T) {
	for name, key := range map[string]func(i uint64) uint64{
		"sequential": func(i uint64) uint64 { return i },
		"every 8th":  func(i uint64) uint64 { return i * 8 },
		"volumes":    func(i uint64) uint64 { return i<<32 | i%7 },
		"random":     func(i uint64) uint64 { return i * 0x9e3779b97f4a7c15 >> 20 },
	} {
		var tab Table[uint64]
		const n = 1 << 20
		for i := range uint64(n) {
			tab.Put(key(i), i)
		}
		for i := range uint64(n) {
			if v, ok := tab.Get(key(i)); !ok || v != i {
				t.Fatalf("%s: key %d has %d, %t", name, key(i), v, ok)
			}
		}
		if tab.Len() != n || tab.Bytes() > 40*n {
			t.Errorf("%s: %d entries in %d bytes, directory of %d", name, tab.Len(), tab.Bytes(), len(tab.dir))
		}
		tab.Free()
	}
}

// What was grown ahead holds as much without another step.
func TestGrow(t *testing.T) {
	for _, n := range []int{1, 100, 480, 481, 5000, 100_000} {
		var tab Table[uint32]
		tab.Grow(n)
		before := tab.Bytes()
		for i := range uint64(n) {
			tab.Put(i*8, 1)
		}
		if float64(tab.Bytes()) > 1.2*float64(before)+chunkBytes {
			t.Errorf("%d entries took %d bytes instead of %d", n, tab.Bytes(), before)
		}
		tab.Grow(1 << 20)
		if tab.Len() != n {
			t.Errorf("growing a table of %d left %d", n, tab.Len())
		}
		tab.Free()
	}
}

// Memory is kept for the next time if it was used, and given back if not.
func TestClear(t *testing.T) {
	var tab Table[uint32]
	defer tab.Free()
	put := func(n uint64) {
		for i := range n {
			tab.Put(i, 1)
		}
	}
	put(100_000)
	large := tab.Bytes()
	tab.Clear()
	if tab.Len() != 0 || tab.Has(5) || tab.Bytes() != large {
		t.Errorf("cleared: %d entries, %d bytes instead of %d", tab.Len(), tab.Bytes(), large)
	}
	put(1000)
	tab.Clear()
	if tab.Len() != 0 || tab.Has(5) || tab.Bytes() != 0 {
		t.Errorf("cleared of little: %d entries, %d bytes", tab.Len(), tab.Bytes())
	}
}

// Memory of tables that are forgotten goes back.
func TestForgotten(t *testing.T) {
	freed := make(chan bool, 1)
	func() {
		tab := new(Table[uint32])
		tab.Put(1, 1)
		runtime.AddCleanup(tab.arena.chunks[0], func(bool) { freed <- true }, true)
	}()
	for range 10 {
		runtime.GC()
	}
	<-freed
}

// A table takes no file descriptor, however large it is.
func TestNoDescriptors(t *testing.T) {
	var tab Table[uint32]
	defer tab.Free()
	for i := range uint64(200_000) {
		tab.Put(i, 1)
	}
	if n := len(tab.arena.chunks); n < 2 {
		t.Fatalf("it lies in %d pieces: too little to tell", n)
	}
	for _, c := range tab.arena.chunks {
		if m, ok := hpdi.MappingOf(c.mem); ok {
			t.Fatalf("a piece of %d bytes has descriptor %d", len(c.mem), m.FD)
		}
	}
}

// Values with pointers would be lost to the garbage collector.
func TestPointersRefused(t *testing.T) {
	type deep struct{ _ [2]struct{ S string } }
	for _, put := range []func(){
		func() { new(Table[*int]).Put(1, nil) },
		func() { new(Table[[]byte]).Put(1, nil) },
		func() { new(Table[deep]).Put(1, deep{}) },
		func() { new(Table[int]).Put(MaxKey+1, 0) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Error("put without complaint")
				}
			}()
			put()
		}()
	}
}

// Keys come out in order however small the steps are.
func TestSorterSteps(t *testing.T) {
	for _, seed := range seeds(t, 20) {
		rng := rand.New(rand.NewPCG(seed, 2))
		var s Sorter
		for range 6 {
			keys := make([]uint64, rng.IntN(20_000))
			mask := uint64(1)<<rng.IntN(64) - 1
			high := rng.Uint64()
			for i := range keys {
				keys[i] = rng.Uint64()&mask | high&^mask
			}
			copy(s.Keys(len(keys)), keys)
			s.StartKeys()
			steps := 1
			budget := 1 + rng.IntN(8000)
			got, done := s.Step(budget)
			for ; !done; got, done = s.Step(budget) {
				if steps++; steps > 20*(len(keys)/budget+2) {
					t.Fatalf("seed %d: %d keys are not in order after %d steps of %d", seed, len(keys), steps, budget)
				}
			}
			slices.Sort(keys)
			if !slices.Equal(got, keys) {
				t.Fatalf("seed %d: %d keys come out in another order", seed, len(keys))
			}
			if len(keys) > max(fewKeys, 4*budget) && mask > 0 && steps < len(keys)/budget {
				t.Errorf("seed %d: %d keys took %d steps of %d", seed, len(keys), steps, budget)
			}
		}
		if s.Bytes() == 0 {
			t.Error("no memory")
		}
		s.Free()
	}
}
