package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/cache"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/region"
)

// pooled is what a real pool did with the images, to compare with the simulation.
type pooled struct {
	run     int // 0 shares nothing
	written int64
	read    blocktest.DiskCount
}

// pointBytes is what a consistency point has, as in the simulation.
const pointBytes = 64 << 20

// runPools writes the images to a pool for each THN and reads them back from it.
func runPools(ctx context.Context, images [][]byte) (all []pooled, err error) {
	for _, run := range append([]int{0}, runs...) {
		p, err := runPool(ctx, images, run)
		if err != nil {
			return nil, fmt.Errorf("pool with THN %d: %w", run, err)
		}
		all = append(all, p)
	}
	return all, nil
}

// runPool writes the images to volumes of a pool in memory, below which lies the disk, and
// reads them with a cache that has nothing.
func runPool(ctx context.Context, images [][]byte, run int) (p pooled, err error) {
	p.run = run
	size := int64(1 << 30)
	for _, image := range images {
		size += int64(len(image)) * 5 / 4
	}
	memory, err := mem.New("disk", size/block.TrackBytes*block.TrackBytes)
	if err != nil {
		return p, err
	}
	disk := blocktest.NewDisk(blocktest.BarracudaES2)
	dev := keptOpen{disk.Wrap(memory)}
	dir, err := os.MkdirTemp("", "dedup-")
	if err != nil {
		return p, err
	}
	regions := filepath.Join(dir, "region")
	defer func() {
		err = errors.Join(err, region.RemoveDir(regions), os.RemoveAll(dir), memory.Close())
	}()
	if _, err := pool.Create(ctx, pool.CreateOptions{Name: "p", Identity: "a", Devices: []hpdi.Device{dev}, LogBytes: 4 * pointBytes}); err != nil {
		return p, err
	}
	err = withPool(ctx, dev, regions, func(o *pool.Pool) error {
		for i, image := range images {
			if err := fill(ctx, o, fmt.Sprint("v", i), image, run); err != nil {
				return err
			}
		}
		p.written = int64(o.Stats().BlocksWritten)
		return o.Fold(ctx)
	})
	if err != nil {
		return p, err
	}
	return p, withPool(ctx, dev, regions, func(o *pool.Pool) error {
		before := disk.Count()
		buf := make([]byte, requestBlocks*block.Size)
		for i, image := range images {
			v, err := o.Volume(fmt.Sprint("v", i))
			if err != nil {
				return err
			}
			for off := 0; off < len(image); off += len(buf) {
				if err := v.Read(ctx, buf[:min(len(buf), len(image)-off)], int64(off)); err != nil {
					return err
				}
			}
		}
		p.read = disk.Count().Minus(before)
		return nil
	})
}

// keptOpen is a device that its pool does not close, so that another can open it.
type keptOpen struct{ hpdi.Device }

// Close does nothing.
func (keptOpen) Close() error { return nil }

// withPool opens the pool with an empty cache, runs it for as long as do takes, and closes
// it.
func withPool(ctx context.Context, dev hpdi.Device, regions string, do func(*pool.Pool) error) error {
	medium, err := region.Dir(regions)
	if err != nil {
		return err
	}
	frames, err := hpdi.Alloc(64 << 20)
	if err != nil {
		return err
	}
	defer hpdi.Free(frames)
	p, err := pool.Open(ctx, pool.OpenOptions{Devices: []hpdi.Device{dev}, RegionPath: filepath.Join(medium.Path, "r"),
		Cache: cache.New(frames), Owner: "a", PointBytes: pointBytes, Interval: time.Hour, Cleaner: pool.CleanerOptions{Off: true}})
	if err != nil {
		return err
	}
	loop, end := context.WithCancel(ctx)
	ran := make(chan error, 1)
	go func() { ran <- p.Run(loop) }()
	err = do(p)
	end()
	return errors.Join(err, <-ran, p.Close(ctx))
}

// fill makes a volume that shares series of run blocks, and writes what an image has in it.
func fill(ctx context.Context, p *pool.Pool, name string, image []byte, run int) error {
	if _, err := p.CreateVolume(ctx, name, int64(len(image))); err != nil {
		return err
	}
	if err := p.SetSharing(ctx, name, run); err != nil {
		return err
	}
	v, err := p.Volume(name)
	if err != nil {
		return err
	}
	for off := 0; off < len(image); off += block.TrackBytes {
		w, err := v.Stage(ctx, int64(off), min(block.TrackBytes, len(image)-off))
		if err != nil {
			return err
		}
		rest := image[off:]
		for _, b := range w.Buffers() {
			rest = rest[copy(b, rest):]
		}
		if err := w.Commit(ctx); err != nil {
			return err
		}
	}
	return p.Commit(ctx)
}

func (m *measured) printPools(w io.Writer) {
	fmt.Fprintf(w, "\nA real pool, read in %d KiB at once with nothing in the cache, metadata included, beside the simulation:\n\n", requestBlocks*block.Size>>10)
	fmt.Fprintf(w, "| THN | of exact | simulated | time | simulated | jumps | simulated | blocks a request |\n|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for i, p := range m.pools {
		kept, read := 0.0, &m.whole
		if i > 0 {
			kept, read = m.kept(m.rows[i-1].dense), &m.rows[i-1].read
		}
		fmt.Fprintf(w, "| %d | %.1f %% | %.1f %% | %v | %v | %d | %d | %.1f |\n", p.run,
			100*float64(m.blocks-p.written)/float64(m.exact()), 100*kept, round(p.read.Busy), round(read.Busy), p.read.Jumps, read.Jumps,
			float64(p.read.Blocks)/float64(p.read.Requests))
	}
}
