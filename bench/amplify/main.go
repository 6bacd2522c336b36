// Command amplify measures write amplification: how many bytes reach the
// devices for each byte that clients write, when they overwrite blocks of a
// full volume at random.
//
//	go run ./bench/amplify -size 1TiB             pool half full
//	go run ./bench/amplify -size 1TiB -full 85    pool 85 % full
//
// The device counts what is written to it. It keeps metadata in memory; of data,
// which all have the same content, it keeps a bit for each block, so that a
// volume of a terabyte needs some 6 GiB of memory and no disk.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/pollux-storage/pollux/bench/counting"
	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cache"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/region"
)

const track = block.TrackBlocks * block.Size

type options struct {
	size, log, cache uint64
	full             int
	folds            uint64
}

func main() {
	var o options
	bytes := func(p *uint64, name, value, usage string) {
		*p, _ = humanize.ParseBytes(value) // a constant of ours
		flag.Func(name, usage+" (default "+value+")", func(s string) (err error) {
			*p, err = humanize.ParseBytes(s)
			return err
		})
	}
	bytes(&o.size, "size", "64GiB", "bytes of the volume")
	bytes(&o.log, "log", "256MiB", "bytes of the operation log")
	bytes(&o.cache, "cache", "1GiB", "bytes of the cache")
	flag.IntVar(&o.full, "full", 50, "how full the pool is, in percent")
	flag.Uint64Var(&o.folds, "folds", 3, "measure until so many folds are complete")
	flag.Parse()
	if err := run(context.Background(), o); err != nil {
		fmt.Fprintln(os.Stderr, "amplify:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp("", "amplify-")
	if err != nil {
		return err
	}
	regions := filepath.Join(dir, "region")
	defer func() { err = errors.Join(err, region.RemoveDir(regions), os.RemoveAll(dir)) }()
	medium, err := region.Dir(regions)
	if err != nil {
		return err
	}
	dev, err := counting.New(int64(o.size)*100/int64(o.full)/track*track + 1<<30)
	if err != nil {
		return err
	}
	devs := []hpdi.Device{dev}
	if _, err := pool.Create(ctx, pool.CreateOptions{Name: "p", Identity: "a", Devices: devs, LogBytes: int64(o.log)}); err != nil {
		return err
	}
	label, err := pool.ReadLabel(dev)
	if err != nil {
		return err
	}
	dev.SetFirst(int64(label.Layout.First) * block.Size)
	dev.SetLog(int64(label.Layout.Flush)*block.Size, int64(label.Layout.Flush+label.Layout.FlushBlocks)*block.Size)
	mem, err := hpdi.Alloc(int(o.cache))
	if err != nil {
		return err
	}
	p, err := pool.Open(ctx, pool.OpenOptions{Devices: devs, RegionPath: filepath.Join(medium.Path, "r"), Cache: cache.New(mem), Owner: "a"})
	if err != nil {
		return err
	}
	ran := make(chan error, 1)
	loop, end := context.WithCancel(ctx)
	go func() { ran <- p.Run(loop) }()
	err = measure(ctx, o, p, dev)
	end()
	return errors.Join(err, <-ran, p.Close(ctx))
}

func measure(ctx context.Context, o options, p *pool.Pool, dev *counting.Device) error {
	if _, err := p.CreateVolume(ctx, "v", int64(o.size)); err != nil {
		return err
	}
	v, err := p.Volume("v")
	if err != nil {
		return err
	}
	begin := time.Now()
	for off := int64(0); off < int64(o.size); off += track {
		if err := write(ctx, v, off, track); err != nil {
			return err
		}
		if off%(64<<30) == 0 {
			fmt.Fprintf(os.Stderr, "filled %s after %v\n", humanize.IBytes(uint64(off)), time.Since(begin).Round(time.Second))
		}
	}
	if err := p.Fold(ctx); err != nil {
		return err
	}
	before, folds := dev.Count(), p.Stats().Folds
	begin = time.Now()
	var writers sync.WaitGroup
	var mu sync.Mutex
	var written int64
	for i := range 2 {
		writers.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(i)))
			n := int64(0)
			for ; err == nil && p.Stats().Folds < folds+o.folds; n++ {
				if e := write(ctx, v, rng.Int64N(int64(o.size)/block.Size)*block.Size, block.Size); e != nil {
					mu.Lock()
					err = e
					mu.Unlock()
				}
			}
			mu.Lock()
			written += n
			mu.Unlock()
		})
	}
	writers.Wait()
	if err != nil {
		return err
	}
	took := time.Since(begin)
	// What is still on its way counts too.
	if err := p.Fold(ctx); err != nil {
		return err
	}
	c := dev.Count().Minus(before)
	clients := float64(written * block.Size)
	fmt.Printf("volume %s, pool %d %% full, %d writes of 4 KiB at random in %v, %d folds\n\n", humanize.IBytes(o.size), o.full, written, took.Round(time.Second), p.Stats().Folds-folds)
	fmt.Printf("| written to the device | bytes | for each byte of clients |\n|---|--:|--:|\n")
	for _, row := range []struct {
		name string
		n    int64
	}{{"data", c.Data}, {"metadata pages", c.Pages}, {"journal and superblocks", c.Journal}, {"log device", c.Log}, {"all", c.Data + c.Pages + c.Journal + c.Log}} {
		fmt.Printf("| %s | %s | %.2f |\n", row.name, humanize.IBytes(uint64(row.n)), float64(row.n)/clients)
	}
	return nil
}

// write stores the pattern.
func write(ctx context.Context, v block.Volume, off int64, n int) error {
	w, err := v.Stage(ctx, off, n)
	if err != nil {
		return err
	}
	for _, b := range w.Buffers() {
		for ; len(b) > 0; b = b[block.Size:] {
			copy(b, counting.Pattern[:])
		}
	}
	return w.Commit(ctx)
}
