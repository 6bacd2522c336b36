// Command reclaim measures how space comes back, and what clients of other
// volumes notice of it:
//
//	go run ./bench/reclaim free     a trim of 1 TiB, and the deletion of a full volume
//	go run ./bench/reclaim clean    a fragmented pool before, during and after cleaning
//
// The device counts and answers at once (package counting), so that what
// is seen is the work of the processors and who waits for whom. Clients ask at a
// fixed rate, half reads and half writes of 4 KiB at random; the time of a
// request counts from when it was due.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime/pprof"
	"time"

	"github.com/pollux-storage/pollux/bench/counting"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/pool"
)

type options struct {
	size, log, cache uint64
	rate             int
	window           time.Duration
	profile          string
}

func main() {
	var o options
	counting.SizeFlag(&o.size, "size", "100GiB", "bytes of data that are freed, or that the fragmented pool holds")
	counting.SizeFlag(&o.log, "log", "256MiB", "bytes of the operation log")
	counting.SizeFlag(&o.cache, "cache", "256MiB", "bytes of the cache")
	flag.IntVar(&o.rate, "rate", 4000, "requests a second of the clients")
	flag.DurationVar(&o.window, "window", 5*time.Second, "how long to look at clients alone")
	flag.StringVar(&o.profile, "cpuprofile", "", "write a profile of the processors there")
	flag.Parse()
	measures := map[string]func(context.Context, options) error{"free": free, "clean": clean}
	measure := measures[flag.Arg(0)]
	if measure == nil {
		fmt.Fprintln(os.Stderr, "reclaim: say what to measure: free or clean")
		os.Exit(2)
	}
	if err := measure(context.Background(), o); err != nil {
		fmt.Fprintln(os.Stderr, "reclaim:", err)
		os.Exit(1)
	}
}

// newPool makes a pool whose device has size bytes and runs it.
func newPool(ctx context.Context, o options, size int64, c pool.CleanerOptions) (*counting.Pool, error) {
	return counting.NewPool(ctx, counting.Options{Size: size, Log: int64(o.log), Cache: int64(o.cache), Cleaner: c})
}

// fill makes a volume of size bytes and writes the first n of them.
func fill(ctx context.Context, p *counting.Pool, name string, size, n int64) (block.Volume, error) {
	if _, err := p.CreateVolume(ctx, name, size); err != nil {
		return nil, err
	}
	v, err := p.Volume(name)
	for off := int64(0); off < n && err == nil; off += counting.Track {
		err = counting.Write(ctx, v, off, counting.Track)
	}
	return v, errors.Join(err, p.Fold(ctx))
}

// profiled runs fn and writes a profile if one is wanted.
func profiled(o options, fn func() error) error {
	if o.profile == "" {
		return fn()
	}
	f, err := os.Create(o.profile)
	if err != nil {
		return err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return err
	}
	defer pprof.StopCPUProfile()
	return fn()
}
