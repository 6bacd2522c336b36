package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/space"
)

// perTiB is memory for what is stored.
type perTiB struct {
	Stored  int64        `json:"stored"`
	Indexes []indexed    `json:"indexes"`
	Counts  []references `json:"counts"`
	Pools   []filled     `json:"pools"`
}

// filled is a pool that was filled, and one of its size that shares nothing.
type filled struct {
	Size  int64 `json:"size"`
	Dense bool  `json:"dense"` // the index is as large as the pool allows
	Off   ofOne `json:"off"`
	On    ofOne `json:"on"`
}

// rest is what deduplication takes of a full pool beside the index.
func (f *filled) rest() int64 { return f.On.Full.Memory - f.Off.Full.Memory - f.On.Full.Index }

// indexed is a real index that was told of everything stored.
type indexed struct {
	Bytes   int64 `json:"bytes"`
	Entries int   `json:"entries"`
	Every   int   `json:"every"` // one block of so many of a track has an entry
}

// references is what counts take when each block has so many references.
type references struct {
	References int   `json:"references"`
	Bytes      int64 `json:"bytes"`
}

// dense is an index that has every block: as large as its pool allows.
const dense = 1 << 50

// measureMemory fills indexes and counts for all that is to be stored, without a pool,
// and pools of two sizes that are written in minutes to see what else there is, and
// whether it grows with what is stored.
func measureMemory(ctx context.Context, o options, r *report) (missed bool, err error) {
	m := &perTiB{Stored: int64(o.stored)}
	r.Memory = m
	for _, limit := range []int64{pool.DefaultIndexBytes, dense} {
		x, err := fillIndex(ctx, limit, m.Stored/block.Size)
		if err != nil {
			return false, err
		}
		m.Indexes = append(m.Indexes, x)
	}
	if m.Counts, err = fillCounts(ctx, m.Stored/block.Size); err != nil {
		return false, err
	}
	for _, size := range []uint64{o.pool, o.large} {
		f := filled{Size: int64(size)}
		c := one{Size: f.Size, Log: int64(o.log), Cache: int64(o.cache), Spill: o.spill}
		if f.Off, err = c.process(ctx); err != nil {
			return false, err
		}
		c.Shares = true
		for _, c.Index = range []int64{0, dense} {
			f.Dense = c.Index > 0
			if f.On, err = c.process(ctx); err != nil {
				return false, err
			}
			m.Pools = append(m.Pools, f)
		}
	}
	m.print()
	return false, nil
}

// fillIndex tells an index of so many blocks, as a pool of as many would have it.
func fillIndex(ctx context.Context, limit, blocks int64) (r indexed, err error) {
	x, err := dedup.NewIndex(pool.IndexBytes(limit, blocks))
	if err != nil {
		return r, err
	}
	defer func() { _ = x.Close() }() // it is only measured
	begin, rounds := time.Now(), 0
	for rounds == 0 || x.Full() && rounds < 10 {
		// Fingerprints are as good as random, and the same in each round.
		random := rand.New(rand.NewPCG(1, 2))
		x.Begin()
		for b := range blocks {
			if b%(1<<24) == 0 && ctx.Err() != nil {
				return r, ctx.Err()
			}
			x.Put(dedup.Fingerprint(random.Uint64()), block.At(0, uint64(b)))
		}
		x.End()
		rounds++
	}
	s := x.Stats()
	fmt.Fprintf(os.Stderr, "index of %s: %d rounds in %v\n", size(s.Bytes), rounds, time.Since(begin).Round(time.Second))
	return indexed{s.Bytes, s.Entries, s.Every}, nil
}

// fillCounts gives each of so many blocks references, and says what that takes.
func fillCounts(ctx context.Context, blocks int64) (all []references, err error) {
	s := space.New()
	defer s.Close()
	if err := s.AddDevice(uint64(blocks), 0); err != nil {
		return nil, err
	}
	for b := int64(0); b < blocks; b += block.TrackBlocks {
		if _, err := s.Alloc(int(min(block.TrackBlocks, blocks-b)), nil); err != nil {
			return nil, err
		}
	}
	for n := 1; ; n++ {
		if n&(n-1) == 0 || n == manyReferences {
			all = append(all, references{n, s.Memory()})
		}
		if n == manyReferences {
			return all, ctx.Err()
		}
		for b := int64(0); b < blocks; b += block.TrackBlocks {
			if err := s.Inc(space.Run{At: block.At(0, uint64(b)), N: int(min(block.TrackBlocks, blocks-b))}); err != nil {
				return nil, err
			}
		}
	}
}

// manyReferences is as many as fifty volumes make that have all in common.
const manyReferences = 50

func (m *perTiB) print() {
	fmt.Printf("\n## Memory for %s stored\n\n", size(m.Stored))
	fmt.Printf("| index | entries | of blocks | 1 block in |\n|--:|--:|--:|--:|\n")
	for _, x := range m.Indexes {
		fmt.Printf("| %s | %d | %.1f %% | %d |\n", size(x.Bytes), x.Entries, 100*float64(x.Entries)/float64(m.Stored/block.Size), x.Every)
	}
	fmt.Printf("\n| references of each block | counts |\n|--:|--:|\n")
	for _, c := range m.Counts {
		fmt.Printf("| %d | %s |\n", c.References, mib(c.Bytes))
	}
	fmt.Printf("\n| full pool | memory without | with deduplication | more | index | all else | at most, more |\n|---|--:|--:|--:|--:|--:|--:|\n")
	for i := range m.Pools {
		f, name := &m.Pools[i], ""
		if f.Dense {
			name = ", index as large as possible"
		}
		off, on := &f.Off.Full, &f.On.Full
		fmt.Printf("| %s%s | %s | %s | %s | %s | %s | %s |\n", size(f.Size), name, mib(off.Memory), mib(on.Memory), mib(on.Memory-off.Memory),
			mib(on.Index), mib(f.rest()), mib(max(f.On.Scattered.Most-f.Off.Scattered.Most, on.Most-off.Most)))
	}
}
