package space

import (
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

const tib = 1 << 40 / block.Size

// fullSpace returns a full pool of 10 TiB in which of each track keep blocks
// chosen by the lot are free.
func fullSpace(b *testing.B, keep int) *Space {
	b.Helper()
	s := New()
	if err := s.AddDevice(10*tib, 0); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(s.Close)
	rng := rand.New(rand.NewPCG(1, 1))
	var page [block.Size]byte
	for at := uint64(0); at < 10*tib; at += block.Size {
		for i := range page {
			page[i] = 1
		}
		for t := 0; t < block.Size; t += block.TrackBlocks {
			for range keep {
				page[t+rng.IntN(block.TrackBlocks)] = 0
			}
		}
		if err := s.Load(0, at, page[:]); err != nil {
			b.Fatal(err)
		}
	}
	return s
}

// BenchmarkLoad loads the counts of a leaf, of 16 tracks.
func BenchmarkLoad(b *testing.B) {
	for name, fill := range map[string]func(i int) byte{
		"full":   func(int) byte { return 1 },
		"mixed":  func(i int) byte { return byte(i * 7 / 3 % 2) },
		"shared": func(i int) byte { return byte(i % 4) },
	} {
		b.Run(name, func(b *testing.B) {
			var page [block.Size]byte
			for i := range page {
				page[i] = fill(i)
			}
			b.SetBytes(block.Size)
			const leaves = 64 << 10 // of 1 TiB
			var s *Space
			for n := 0; b.Loop(); n++ {
				if n%leaves == 0 {
					b.StopTimer()
					if s != nil {
						s.Close()
					}
					s = New()
					if err := s.AddDevice(tib, 0); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
				if err := s.Load(0, uint64(n%leaves*block.Size), page[:]); err != nil {
					b.Fatal(err)
				}
			}
			s.Close()
		})
	}
}

// BenchmarkAlloc allocates what a consistency point of 4 MiB needs, from a pool
// of 10 TiB, and frees as much elsewhere.
func BenchmarkAlloc(b *testing.B) {
	for name, keep := range map[string]int{"empty": -1, "fragmented": 8} {
		b.Run(name, func(b *testing.B) {
			var s *Space
			if keep < 0 {
				s = New()
				if err := s.AddDevice(10*tib, 0); err != nil {
					b.Fatal(err)
				}
				b.Cleanup(s.Close)
			} else {
				s = fullSpace(b, keep)
			}
			var runs []Run
			for b.Loop() {
				var err error
				if runs, err = s.Alloc(1024, runs[:0]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkAllocCheap allocates as much in cheap ranges, and frees it again. There are
// 100 GiB of them, a hundredth of the pool, all free, or eight blocks of each track.
func BenchmarkAllocCheap(b *testing.B) {
	for name, keep := range map[string]int{"empty": -1, "scattered": 8} {
		b.Run(name, func(b *testing.B) {
			var s *Space
			if keep < 0 {
				s = New()
				if err := s.AddDevice(10*tib, 0); err != nil {
					b.Fatal(err)
				}
				b.Cleanup(s.Close)
			} else {
				s = fullSpace(b, keep)
			}
			for i := range uint64(100) { // 1 GiB each
				s.SetCheap(0, i*(tib/10/block.TrackBlocks)*block.TrackBlocks, tib/1024, true)
			}
			var runs []Run
			for b.Loop() {
				runs = s.AllocCheap(1024, runs[:0])
				if length(runs) < 1024 {
					b.Fatal("less was to be had")
				}
				for _, r := range runs {
					if err := s.Dec(r); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

// BenchmarkFull overwrites single blocks of a pool of 10 TiB in which nothing but
// 1,000 blocks is free: each is allocated, and another one freed by the lot.
func BenchmarkFull(b *testing.B) {
	s := fullSpace(b, 0)
	rng := rand.New(rand.NewPCG(2, 2))
	free := func() {
		at := block.At(0, rng.Uint64N(10*tib))
		if s.Count(at) == 0 {
			return
		}
		if err := s.Dec(Run{at, 1}); err != nil {
			b.Fatal(err)
		}
	}
	for range 1000 {
		free()
	}
	var runs []Run
	for b.Loop() {
		free()
		var err error
		if runs, err = s.Alloc(1, runs[:0]); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkDec drops and adds references of runs of a length.
func BenchmarkDec(b *testing.B) {
	for name, n := range map[string]int{"1": 1, "32": 32, "256": block.TrackBlocks} {
		b.Run(name, func(b *testing.B) {
			s := fullSpace(b, 0)
			rng := rand.New(rand.NewPCG(3, 3))
			for b.Loop() {
				r := Run{block.At(0, rng.Uint64N(10*tib)/256*256), n}
				if err := s.Dec(r); err != nil {
					b.Fatal(err)
				}
				if err := s.Inc(r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkCounts copies the counts of 1 GiB, as a check does.
func BenchmarkCounts(b *testing.B) {
	s := fullSpace(b, 3)
	dst := make([]byte, 1<<30/block.Size)
	b.SetBytes(int64(len(dst)))
	for i := 0; b.Loop(); i++ {
		s.Counts(0, uint64(i%10240*len(dst)), dst)
	}
}
