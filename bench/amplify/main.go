// Command amplify measures write amplification: how many bytes reach the
// devices for each byte that clients write, when they overwrite blocks of a
// full volume at random.
//
//	go run ./bench/amplify -size 1TiB             pool half full
//	go run ./bench/amplify -size 1TiB -full 85    pool 85 % full
//	go run ./bench/amplify -size 64GiB -log 16MiB -limit 139264 -folds 14
//
// The last is a sixteenth of the first, and writes as much for each byte.
//
// The device counts what is written to it. It keeps metadata in memory; of data,
// which all have the same content, it keeps a bit for each block, so that no disk is
// needed. Where a page was, memory stays until it is written again: a volume of a
// terabyte needs some 5 GiB, and 4 GiB more for each fold, in a file with -spill DIR.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/pollux-storage/pollux/bench/counting"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
)

type options struct {
	size, log, cache uint64
	full, limit      int
	spill            string
	folds            uint64
}

func main() {
	var o options
	counting.SizeFlag(&o.size, "size", "64GiB", "bytes of the volume")
	counting.SizeFlag(&o.log, "log", "256MiB", "bytes of the operation log")
	counting.SizeFlag(&o.cache, "cache", "1GiB", "bytes of the cache")
	flag.IntVar(&o.full, "full", 50, "how full the pool is, in percent")
	flag.IntVar(&o.limit, "limit", cp.DefaultFoldLimit, "mappings that begin a fold, fold_limit of a guest")
	flag.StringVar(&o.spill, "spill", "", "folder for a file that holds metadata, instead of memory")
	flag.Uint64Var(&o.folds, "folds", 3, "measure until so many folds are complete")
	flag.Parse()
	if err := run(context.Background(), o); err != nil {
		fmt.Fprintln(os.Stderr, "amplify:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	p, err := counting.NewPool(ctx, counting.Options{
		Size: int64(o.size)*100/int64(o.full)/counting.Track*counting.Track + 1<<30, Log: int64(o.log), Cache: int64(o.cache), FoldLimit: o.limit, Spill: o.spill,
	})
	if err != nil {
		return err
	}
	err = measure(ctx, o, p)
	return errors.Join(err, p.Close(ctx))
}

func measure(ctx context.Context, o options, p *counting.Pool) error {
	if _, err := p.CreateVolume(ctx, "v", int64(o.size)); err != nil {
		return err
	}
	v, err := p.Volume("v")
	if err != nil {
		return err
	}
	begin := time.Now()
	for off := int64(0); off < int64(o.size); off += counting.Track {
		if err := counting.Write(ctx, v, off, counting.Track); err != nil {
			return err
		}
		if off%(64<<30) == 0 {
			fmt.Fprintf(os.Stderr, "filled %s after %v\n", humanize.IBytes(uint64(off)), time.Since(begin).Round(time.Second))
		}
	}
	if err := p.Fold(ctx); err != nil {
		return err
	}
	before, folds := p.Device.Count(), p.Stats().Folds
	begin = time.Now()
	var writers sync.WaitGroup
	var done atomic.Int64 // writes
	stop := make(chan struct{})
	go eachFold(p, &done, stop)
	defer close(stop)
	var mu sync.Mutex
	for i := range 2 {
		writers.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(i)))
			for err == nil && p.Stats().Folds < folds+o.folds {
				if e := counting.Write(ctx, v, rng.Int64N(int64(o.size)/block.Size)*block.Size, block.Size); e != nil {
					mu.Lock()
					err = e
					mu.Unlock()
				}
				done.Add(1)
			}
		})
	}
	writers.Wait()
	if err != nil {
		return err
	}
	took, written := time.Since(begin), done.Load()
	// What is still on its way counts too.
	if err := p.Fold(ctx); err != nil {
		return err
	}
	c := p.Device.Count().Minus(before)
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

// eachFold tells of each fold that is completed until stop is closed.
func eachFold(p *counting.Pool, writes *atomic.Int64, stop <-chan struct{}) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	begin, was, w, c := time.Now(), p.Stats(), writes.Load(), p.Device.Count()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		if now := p.Stats(); now.Folds != was.Folds {
			n, d := writes.Load(), p.Device.Count()
			fmt.Fprintf(os.Stderr, "fold after %v: %d writes, %d pages, %d mappings left\n",
				time.Since(begin).Round(10*time.Millisecond), n-w, d.Minus(c).Pages/block.Size, now.Unfolded)
			begin, was, w, c = time.Now(), now, n, d
		}
	}
}
