package counting

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"github.com/dustin/go-humanize"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/region"
)

// Track is the size of a track in bytes.
const Track = block.TrackBytes

// Pool is a pool that runs, on a Device unless its Options name another one.
type Pool struct {
	*pool.Pool
	Device  *Device // nil for another one
	on      hpdi.Device
	dir     string
	regions string
	cache   int64
	limit   int
	index   int64
	end     context.CancelFunc
	ran     chan error
}

// Options says what pool to make. Sizes are in bytes.
type Options struct {
	Size       int64       // of the device, which has whole tracks
	Spill      string      // folder for what the device keeps, see New
	On         hpdi.Device // the device instead of one that counts; it has its own size
	Log, Cache int64
	FoldLimit  int   // as cp.Config has it
	Index      int64 // of fingerprints, as pool.OpenOptions has it
	Cleaner    pool.CleanerOptions
}

// NewFile makes a file of so many bytes and opens it as a device for a Pool.
func NewFile(path string, size int64) (hpdi.Device, error) {
	if err := file.Create(path, size); err != nil {
		return nil, err
	}
	dev, err := file.Open(path, file.Options{Lock: true})
	if err == nil {
		fmt.Fprintf(os.Stderr, "device: %+v\n", dev.Info())
	}
	return dev, err
}

// NewPool makes a pool and runs it. Without an error Close must be called.
func NewPool(ctx context.Context, o Options) (p *Pool, err error) {
	p = &Pool{ran: make(chan error, 1)}
	if p.dir, err = os.MkdirTemp("", "counting-"); err != nil {
		return nil, err
	}
	p.regions = filepath.Join(p.dir, "region")
	defer func() {
		if err != nil {
			err = errors.Join(err, p.remove())
		}
	}()
	if p.on = o.On; p.on == nil {
		if p.Device, err = New(o.Size/Track*Track, o.Spill); err != nil {
			return nil, err
		}
		p.on = p.Device
	}
	if _, err := pool.Create(ctx, pool.CreateOptions{Name: "p", Identity: "a", Devices: []hpdi.Device{p.on}, LogBytes: o.Log}); err != nil {
		return nil, err
	}
	if p.Device != nil {
		label, err := pool.ReadLabel(p.Device)
		if err != nil {
			return nil, err
		}
		p.Device.SetFirst(int64(label.Layout.First) * block.Size)
		p.Device.SetLog(int64(label.Layout.Flush)*block.Size, int64(label.Layout.Flush+label.Layout.FlushBlocks)*block.Size)
	}
	p.cache, p.limit, p.index = int64(o.Cache), o.FoldLimit, o.Index
	return p, p.open(ctx, o.Cleaner)
}

func (p *Pool) open(ctx context.Context, c pool.CleanerOptions) error {
	medium, err := region.Dir(p.regions)
	if err != nil {
		return err
	}
	p.Pool, err = pool.Open(ctx, pool.OpenOptions{Devices: []hpdi.Device{p.on}, RegionPath: filepath.Join(medium.Path, "r"),
		CacheBytes: p.cache, Owner: "a", FoldLimit: p.limit, IndexBytes: p.index, Cleaner: c})
	if err != nil {
		return err
	}
	loop, end := context.WithCancel(context.WithoutCancel(ctx)) // it outlives a signal, so that it can close
	p.end = end
	go func() { p.ran <- p.Run(loop) }()
	return nil
}

// Reopen opens the pool with another cleaner.
func (p *Pool) Reopen(ctx context.Context, c pool.CleanerOptions) error {
	p.end()
	if err := errors.Join(<-p.ran, p.Release(ctx)); err != nil {
		return err
	}
	return p.open(ctx, c)
}

// Close closes the pool and removes all that it had outside memory.
func (p *Pool) Close(ctx context.Context) error {
	p.end()
	return errors.Join(<-p.ran, p.Pool.Close(context.WithoutCancel(ctx)), p.remove())
}

func (p *Pool) remove() error { return errors.Join(region.RemoveDir(p.regions), os.RemoveAll(p.dir)) }

// Write stores Pattern in n bytes of a volume from off on.
func Write(ctx context.Context, v block.Volume, off int64, n int) error {
	return write(ctx, v, off, n, 0, 0)
}

// WriteContent stores the Content of numbers from first on in n bytes of a volume from
// off on.
func WriteContent(ctx context.Context, v block.Volume, off int64, n int, first uint64) error {
	return write(ctx, v, off, n, first, 1)
}

func write(ctx context.Context, v block.Volume, off int64, n int, number, step uint64) error {
	w, err := v.Stage(ctx, off, n)
	if err != nil {
		return err
	}
	for _, b := range w.Buffers() {
		for ; len(b) > 0; b = b[block.Size:] {
			Content(b[:block.Size], number)
			number += step
		}
	}
	return w.Commit(ctx)
}

// SizeFlag defines a flag for a number of bytes, such as 64GiB.
func SizeFlag(p *uint64, name, value, usage string) {
	*p, _ = humanize.ParseBytes(value) // a constant of ours
	flag.Func(name, usage+" (default "+value+")", func(s string) (err error) {
		*p, err = humanize.ParseBytes(s)
		return err
	})
}
