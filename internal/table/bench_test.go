package table

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

// order is a random order of n keys out of eight times as many.
func order(n int) []uint64 {
	rng := rand.New(rand.NewPCG(1, 1))
	keys := make([]uint64, n)
	for i := range keys {
		keys[i] = rng.Uint64N(8 * uint64(n))
	}
	return keys
}

var sizes = []int{4 << 10, 64 << 10, 1 << 20}

// BenchmarkPut fills, beside Go's map, and clears: an operation is one key.
func BenchmarkPut(b *testing.B) {
	for _, n := range sizes {
		keys := order(n)
		b.Run(fmt.Sprintf("table-%d", n), func(b *testing.B) {
			var t Table[uint64]
			defer t.Free()
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if i%n == 0 {
					t.Clear()
				}
				t.Put(keys[i%n], 1)
			}
		})
		b.Run(fmt.Sprintf("map-%d", n), func(b *testing.B) {
			t := map[uint64]uint64{}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if i%n == 0 {
					clear(t)
				}
				t[keys[i%n]] = 1
			}
		})
	}
}

// BenchmarkGet looks keys up of which most are not there.
func BenchmarkGet(b *testing.B) {
	for _, n := range sizes {
		keys := order(n)
		b.Run(fmt.Sprintf("table-%d", n), func(b *testing.B) {
			var t Table[uint64]
			defer t.Free()
			for _, k := range keys {
				t.Put(k, 1)
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				t.Get(keys[i%n] ^ uint64(i)&1)
			}
		})
		b.Run(fmt.Sprintf("map-%d", n), func(b *testing.B) {
			t := map[uint64]uint64{}
			for _, k := range keys {
				t[k] = 1
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				_ = t[keys[i%n]^uint64(i)&1]
			}
		})
	}
}

// BenchmarkSorted brings all keys in order: an operation is one table.
func BenchmarkSorted(b *testing.B) {
	for _, n := range sizes {
		var t Table[uint64]
		m := map[uint64]uint64{}
		for _, k := range order(n) {
			t.Put(k, 1)
			m[k] = 1
		}
		b.Run(fmt.Sprintf("table-%d", n), func(b *testing.B) {
			var s Sorter
			defer s.Free()
			b.ReportAllocs()
			for b.Loop() {
				Start(&s, &t)
				s.Sort()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/key")
		})
		b.Run(fmt.Sprintf("map-%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				_ = slices.Sorted(maps.Keys(m))
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/key")
		})
		t.Free()
	}
}
