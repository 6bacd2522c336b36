package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/estimate"
)

// runs are the THN that are measured, thresholds those of low-latency memory, and sampled
// is how thin the thin index is.
var (
	runs       = []int{1, 2, 4, 8, 16, 32}
	thresholds = []int{1, 2, 3, 4}
)

const sampled = 8

// requestBlocks is what a reader asks for at once: 64 KiB.
const requestBlocks = 16

// row is a THN.
type row struct {
	run         int
	dense, thin *estimate.Layout
	memory      []*estimate.Layout // of each threshold
	memoryThin  []*estimate.Layout
	read        reading // of dense
	memoryRead  []reading
}

// reading is what reading all images took.
type reading struct {
	blocktest.DiskCount
	most int64 // jumps in one request of a reader
	over int64 // requests of a reader with more than maxJumps
	// mostSeeks is most without jumps ahead so short that the head only has to wait: over
	// a block that is in low-latency memory.
	mostSeeks int64
}

func (r *reading) perJump() float64    { return float64(r.Blocks) / float64(max(1, r.Jumps)) }
func (r *reading) perRequest() float64 { return float64(r.Blocks) / float64(r.Requests) }

// measured is all that is known of a set.
type measured struct {
	blocks, zero, distinct int64
	rows                   []*row
	whole                  reading // as if nothing were shared
	extents                int64   // then
	pools                  []pooled
}

// exact is what sharing each duplicate saves.
func (m *measured) exact() int64 { return m.blocks - m.distinct }

// kept is the part of that which a layout saves.
func (m *measured) kept(l *estimate.Layout) float64 { return float64(l.Saved()) / float64(m.exact()) }

// beyond is how much longer than in one piece reading takes.
func (m *measured) beyond(r *reading) time.Duration { return r.Busy - m.whole.Busy }

func measure(ctx context.Context, paths []string, pools bool) (*measured, error) {
	scanned, err := estimate.Scan(ctx, paths, estimate.ScanOptions{Memory: 8 << 30})
	if err != nil {
		return nil, err
	}
	s := scanned.Stream
	if s == nil {
		return nil, fmt.Errorf("%d images are too large to be measured", len(paths))
	}
	images, err := mapAll(paths)
	if err != nil {
		return nil, err
	}
	defer func() {
		for _, mem := range images {
			unix.Munmap(mem)
		}
	}()
	content := func(number int64) []byte {
		volume, lba := s.Where(number)
		off := int64(lba) * block.Size
		return images[volume][off:min(off+block.Size, int64(len(images[volume])))]
	}
	options := estimate.Options{
		Places: true,
		Same: func(received, stored int64) (bool, error) {
			return bytes.Equal(content(received), content(stored)), nil
		},
		Step: ctx.Err,
	}
	whole := s.Whole()
	m := &measured{distinct: s.Distinct(), whole: read(whole), extents: whole.Extents()}
	m.blocks, m.zero = s.Blocks()
	simulate := func(p estimate.Policy) *estimate.Layout {
		if err != nil {
			return nil
		}
		var l *estimate.Layout
		l, err = s.Simulate(p, options)
		return l
	}
	for _, run := range runs {
		r := &row{run: run, dense: simulate(estimate.Policy{Run: run}), thin: simulate(estimate.Policy{Run: run, Every: sampled})}
		for _, threshold := range thresholds {
			r.memory = append(r.memory, simulate(estimate.Policy{Run: run, Threshold: threshold}))
			r.memoryThin = append(r.memoryThin, simulate(estimate.Policy{Run: run, Threshold: threshold, Every: sampled}))
		}
		if err != nil {
			return nil, err
		}
		r.read = read(r.dense)
		for _, l := range r.memory {
			r.memoryRead = append(r.memoryRead, read(l))
		}
		m.rows = append(m.rows, r)
	}
	if pools {
		m.pools, err = runPools(ctx, images)
	}
	return m, err
}

// mapAll maps files into memory.
func mapAll(paths []string) (images [][]byte, err error) {
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		info, err := f.Stat()
		if err != nil {
			return nil, err
		}
		mem, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("map %s: %w", path, err)
		}
		images = append(images, mem)
	}
	return images, nil
}

// read reads all images, one after the other, from a disk.
func read(l *estimate.Layout) (r reading) {
	disk := blocktest.NewDisk(blocktest.BarracudaES2)
	l.Read(requestBlocks, func(extents []estimate.Extent) {
		before := disk.Count()
		for _, e := range extents {
			disk.Service(e.At, e.N)
		}
		did := disk.Count().Minus(before)
		r.most, r.mostSeeks = max(r.most, did.Jumps), max(r.mostSeeks, did.Seeks)
		if did.Jumps > maxJumps {
			r.over++
		}
	})
	r.DiskCount = disk.Count()
	return r
}
