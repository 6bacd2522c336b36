package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/region"
)

// pooled is what a real pool did with the images, to compare with the simulation.
type pooled struct {
	run    int // 0 shares nothing
	memory bool
	// stored blocks are on the disk and in low-latency memory, inMemory of them there.
	stored, inMemory int64
	read             blocktest.DiskCount
}

// pointBytes is what a consistency point has, as in the simulation.
const pointBytes = 64 << 20

// runPools writes the images to a pool for each THN and reads them back from it.
func runPools(ctx context.Context, images [][]byte) (all []pooled, err error) {
	for _, run := range append([]int{0}, runs...) {
		for _, memory := range [...]bool{false, true} {
			if memory && run < 2 {
				continue // nothing is left over
			}
			p, err := runPool(ctx, images, run, memory)
			if err != nil {
				return nil, fmt.Errorf("pool with THN %d: %w", run, err)
			}
			all = append(all, p)
		}
	}
	return all, nil
}

// runPool writes the images to volumes of a pool in memory, below which lies the disk, and
// reads them with a cache that has nothing. Low-latency memory, with the default threshold,
// takes no time.
func runPool(ctx context.Context, images [][]byte, run int, memory bool) (p pooled, err error) {
	p.run, p.memory = run, memory
	size := int64(1 << 30)
	for _, image := range images {
		size += int64(len(image)) * 5 / 4
	}
	medium, err := mem.New("disk", size/block.TrackBytes*block.TrackBytes)
	if err != nil {
		return p, err
	}
	disk := blocktest.NewDisk(blocktest.BarracudaES2)
	devs := []hpdi.Device{keptOpen{disk.Wrap(medium)}}
	dir, err := os.MkdirTemp("", "dedup-")
	if err != nil {
		return p, err
	}
	regions := filepath.Join(dir, "region")
	defer func() {
		err = errors.Join(err, region.RemoveDir(regions), os.RemoveAll(dir), medium.Close())
	}()
	if _, err := pool.Create(ctx, pool.CreateOptions{Name: "p", Identity: "a", Devices: devs, LogBytes: 4 * pointBytes}); err != nil {
		return p, err
	}
	err = withPool(ctx, devs, regions, func(o *pool.Pool) error {
		if memory {
			m, err := mem.New("memory", size/16/block.TrackBytes*block.TrackBytes)
			if err != nil {
				return err
			}
			devs = append(devs, keptOpen{m})
			if err := o.AddMemory(ctx, devs[1]); err != nil {
				return err
			}
		}
		for i, image := range images {
			if err := fill(ctx, o, fmt.Sprint("v", i), image, run); err != nil {
				return err
			}
		}
		return p.settle(ctx, o)
	})
	if err != nil {
		return p, err
	}
	return p, withPool(ctx, devs, regions, func(o *pool.Pool) error {
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

// settle waits until all references have followed to low-latency memory and what they
// left is free, and looks what is stored.
func (p *pooled) settle(ctx context.Context, o *pool.Pool) error {
	for still := 0; still < 3; {
		if err := o.Fold(ctx); err != nil {
			return err
		}
		s, err := o.Sharing(ctx)
		if err != nil {
			return err
		}
		m := o.Stats().Memory
		stored, inMemory := s.Stored/block.Size, (m.Total-m.Free)/block.Size
		if still++; stored != p.stored || inMemory != p.inMemory || m.Waiting > 0 {
			still = 0
		}
		p.stored, p.inMemory = stored, inMemory
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(transferWait * 2):
		}
	}
	return nil
}

// transferWait is how long blocks wait for others that go to low-latency memory.
const transferWait = 100 * time.Millisecond

// keptOpen is a device that its pool does not close, so that another can open it.
type keptOpen struct{ hpdi.Device }

// Close does nothing.
func (keptOpen) Close() error { return nil }

// withPool opens the pool with an empty cache, runs it for as long as do takes, and closes
// it.
func withPool(ctx context.Context, devs []hpdi.Device, regions string, do func(*pool.Pool) error) error {
	medium, err := region.Dir(regions)
	if err != nil {
		return err
	}
	p, err := pool.Open(ctx, pool.OpenOptions{Devices: devs, RegionPath: filepath.Join(medium.Path, "r"),
		CacheBytes: 64 << 20, Owner: "a", PointBytes: pointBytes, Interval: time.Hour, Cleaner: pool.CleanerOptions{Off: true},
		Transfer: pool.TransferOptions{Rate: 1 << 30, Wait: transferWait}})
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
	fmt.Fprintf(w, "| THN | of exact | simulated | LLRRM of what is stored | simulated | time | simulated | jumps | simulated | blocks a request |\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, p := range m.pools {
		kept, inMemory, read := 0.0, 0.0, &m.whole
		for _, r := range m.rows {
			switch {
			case r.run == p.run && p.memory:
				k := slices.Index(thresholds, cp.DefaultThreshold)
				l := r.memory[k]
				kept, inMemory, read = m.kept(l), float64(l.Memory)/float64(l.Memory+l.Disk), &r.memoryRead[k]
			case r.run == p.run:
				kept, read = m.kept(r.dense), &r.read
			}
		}
		name := fmt.Sprint(p.run)
		if p.memory {
			name += " and LLRRM"
		}
		fmt.Fprintf(w, "| %s | %.1f %% | %.1f %% | %.1f %% | %.1f %% | %v | %v | %d | %d | %.1f |\n", name,
			100*float64(m.blocks-p.stored)/float64(m.exact()), 100*kept, 100*float64(p.inMemory)/float64(p.stored), 100*inMemory,
			round(p.read.Busy), round(read.Busy), p.read.Jumps, read.Jumps, float64(p.read.Blocks)/float64(p.read.Requests))
	}
}
