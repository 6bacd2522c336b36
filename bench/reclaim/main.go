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
	"path/filepath"
	"runtime/pprof"
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
	rate             int
	window           time.Duration
	profile          string
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
	bytes(&o.size, "size", "100GiB", "bytes of data that are freed, or that the fragmented pool holds")
	bytes(&o.log, "log", "256MiB", "bytes of the operation log")
	bytes(&o.cache, "cache", "256MiB", "bytes of the cache")
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

// rig is a pool on a counting device.
type rig struct {
	*pool.Pool
	dev     *counting.Device
	dir     string
	regions string
	mem     []byte
	end     context.CancelFunc
	ran     chan error
}

// newRig makes a pool whose device has size bytes and opens it.
func newRig(ctx context.Context, o options, size int64, c pool.CleanerOptions) (r *rig, err error) {
	r = &rig{ran: make(chan error, 1)}
	if r.dir, err = os.MkdirTemp("", "reclaim-"); err != nil {
		return nil, err
	}
	r.regions = filepath.Join(r.dir, "region")
	if _, err = region.Dir(r.regions); err != nil {
		return nil, err
	}
	if r.dev, err = counting.New(size / track * track); err != nil {
		return nil, err
	}
	if _, err := pool.Create(ctx, pool.CreateOptions{Name: "p", Identity: "a", Devices: []hpdi.Device{r.dev}, LogBytes: int64(o.log)}); err != nil {
		return nil, err
	}
	label, err := pool.ReadLabel(r.dev)
	if err != nil {
		return nil, err
	}
	r.dev.SetFirst(int64(label.Layout.First) * block.Size)
	if r.mem, err = hpdi.Alloc(int(o.cache)); err != nil {
		return nil, err
	}
	return r, r.open(ctx, c)
}

// open opens the pool and runs it.
func (r *rig) open(ctx context.Context, c pool.CleanerOptions) (err error) {
	medium, err := region.Dir(r.regions)
	if err != nil {
		return err
	}
	r.Pool, err = pool.Open(ctx, pool.OpenOptions{Devices: []hpdi.Device{r.dev}, RegionPath: filepath.Join(medium.Path, "r"),
		Cache: cache.New(r.mem), Owner: "a", Cleaner: c})
	if err != nil {
		return err
	}
	loop, end := context.WithCancel(ctx)
	r.end = end
	go func() { r.ran <- r.Run(loop) }()
	return nil
}

// reopen opens the pool with another cleaner.
func (r *rig) reopen(ctx context.Context, c pool.CleanerOptions) error {
	r.end()
	if err := errors.Join(<-r.ran, r.Release(ctx)); err != nil {
		return err
	}
	return r.open(ctx, c)
}

func (r *rig) close(ctx context.Context) error {
	r.end()
	return errors.Join(<-r.ran, r.Close(ctx), region.RemoveDir(r.regions), os.RemoveAll(r.dir))
}

// fill makes a volume of size bytes and writes the first n of them.
func (r *rig) fill(ctx context.Context, name string, size, n int64) (block.Volume, error) {
	if _, err := r.CreateVolume(ctx, name, size); err != nil {
		return nil, err
	}
	v, err := r.Volume(name)
	for off := int64(0); off < n && err == nil; off += track {
		err = write(ctx, v, off, track)
	}
	return v, errors.Join(err, r.Fold(ctx))
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
