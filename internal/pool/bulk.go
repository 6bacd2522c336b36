package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

const (
	// bulkRun is the size of one request at most, in blocks, and bulkWorkers
	// how many are under way. Together they keep a disk and two cores busy and
	// leave room for the requests of clients.
	bulkRun     = block.TrackBlocks
	bulkWorkers = 4
	// bulkGap is how many unwanted blocks are read rather than begin another
	// request.
	bulkGap = 8
)

// bulk reads many blocks in the order of the devices, past the cache: what
// reads everything once would only push out what clients use.
type bulk struct {
	set *devices.Set
	mem []byte // a buffer for each worker
}

func newBulk(set *devices.Set) (*bulk, error) {
	mem, err := hpdi.AllocPrivate(bulkWorkers * bulkRun * block.Size)
	if err != nil {
		return nil, err
	}
	return &bulk{set, mem}, nil
}

func (b *bulk) close() { _ = hpdi.Free(b.mem) }

// read reads the blocks that ptr names, counted from 0 to n-1, and calls fn
// with each one's content or the reason why it cannot be had. Several calls of
// fn are made at the same time. Only the end of ctx is an error.
//
// A copy that is bad is repaired where another is good, and so is a page whose twin is
// good: whoever reads pages keeps them from being freed.
func (b *bulk) read(ctx context.Context, n int, ptr func(i int) block.Pointer, fn func(i int, frame []byte, err error)) error {
	return b.readFrom(ctx, anyCopy, n, ptr, fn)
}

// anyCopy stands for the copy that a device chooses.
const anyCopy = -1

// readFrom is read from one copy, from 0, that repairs nothing. The error of a
// block is of kind hpdi.ErrNoCopy where there is no such copy.
func (b *bulk) readFrom(ctx context.Context, copy, n int, ptr func(i int) block.Pointer, fn func(i int, frame []byte, err error)) error {
	order := make([]int32, n)
	for i := range order {
		order[i] = int32(i)
	}
	slices.SortFunc(order, func(x, y int32) int {
		p, q := ptr(int(x)).Phys, ptr(int(y)).Phys
		switch {
		case p < q:
			return -1
		case p > q:
			return 1
		}
		return 0
	})
	runs := make(chan []int32)
	var workers sync.WaitGroup
	for buf := range slices.Chunk(b.mem, bulkRun*block.Size) {
		workers.Go(func() {
			for run := range runs {
				b.readRun(copy, run, buf, ptr, fn)
			}
		})
	}
	err := ctx.Err()
	for len(order) > 0 && err == nil {
		k := runLength(order, ptr)
		select {
		case runs <- order[:k]:
		case <-ctx.Done():
			err = ctx.Err()
		}
		order = order[k:]
	}
	close(runs)
	workers.Wait()
	return err
}

// runLength returns how many of the ordered blocks one request reads.
func runLength(order []int32, ptr func(i int) block.Pointer) int {
	first := ptr(int(order[0])).Phys
	last := first
	for k := 1; k < len(order); k++ {
		p := ptr(int(order[k])).Phys
		if p-first >= bulkRun || p-last > bulkGap+1 {
			return k
		}
		last = p
	}
	return len(order)
}

// proveCopies reads blocks from each copy that is there, where devices keep several,
// and calls bad for each that is not right. Several calls are made at the same
// time. It repairs nothing, and reads nothing where there is one copy.
func (b *bulk) proveCopies(ctx context.Context, n int, ptr func(i int) block.Pointer, bad func(i, copy int, err error)) error {
	copies := b.copies()
	for copy := 0; copies > 1 && copy < copies; copy++ {
		err := b.readFrom(ctx, copy, n, ptr, func(i int, _ []byte, err error) {
			if err != nil && !errors.Is(err, hpdi.ErrNoCopy) {
				bad(i, copy, err)
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// copies returns how many copies the device that keeps most has.
func (b *bulk) copies() (n int) {
	for i := range b.set.Len() {
		n = max(n, b.set.Copies(i))
	}
	return n
}

func (b *bulk) readRun(copy int, run []int32, buf []byte, ptr func(i int) block.Pointer, fn func(int, []byte, error)) {
	first := ptr(int(run[0])).Phys
	blocks := int(ptr(int(run[len(run)-1])).Phys-first) + 1
	err := b.readAt(copy, first, buf[:blocks*block.Size])
	for _, i := range run {
		p := ptr(int(i))
		frame := buf[int(p.Phys-first)*block.Size:][:block.Size]
		bad := err
		if err != nil && blocks > 1 && !errors.Is(err, hpdi.ErrNoCopy) {
			// One bad sector must not hide its neighbours.
			bad = b.readAt(copy, p.Phys, frame)
		}
		switch {
		case copy == anyCopy:
			bad = b.prove(p, frame, bad)
		case bad == nil:
			bad = prove(p, frame)
		}
		fn(int(i), frame, bad)
	}
}

func (b *bulk) readAt(copy int, at block.Physical, buf []byte) error {
	if copy != anyCopy {
		return b.set.ReadCopy(copy, at, buf)
	}
	return b.set.Read(at, buf)
}

// fewLeaves is up to how many leaves of count trees, of 4 GiB of devices, are
// read through the cache, where the next fold wants them.
const fewLeaves = blockmap.Fanout

// load fills the allocator, unless it was filled before. An error, or the end of
// ctx, leaves it to be called again.
func (p *Pool) load(ctx context.Context) error {
	if p.loaded.Load() {
		return nil
	}
	p.long.Add(1)
	defer p.long.Add(-1)
	b, err := newBulk(p.set)
	if err != nil {
		return err
	}
	defer b.close()
	err = p.machine.LoadCounts(func(ps []block.Pointer, fn func(int, []byte) error) error {
		if len(ps) > fewLeaves {
			return b.readLeaves(ctx, ps, fn)
		}
		p.reader.Prefetch(ps)
		for i := range ps {
			var bad error
			if err := p.reader.View(ps[i], func(page []byte) { bad = fn(i, page) }); err != nil || bad != nil {
				return errors.Join(err, bad)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	p.space.Unreserve(p.estimate)
	p.loadSharing()
	p.keepJournal()
	if p.flash.layer == nil {
		p.flash.dropUsage() // of flash that has left
	}
	p.flash.tellCheap()
	p.loaded.Store(true)
	p.tellUnused()
	return nil
}

// tellUnused lets devices that keep copies pass over free blocks when they fill
// one. Whatever the pool would find on its devices after a crash is not free.
func (p *Pool) tellUnused() {
	for i := range p.set.Len() {
		if c, ok := p.set.Device(i).(hpdi.Copies); ok && !p.flash.is(i) { // which tells by itself
			c.Unused(func(off, n int64) bool { return p.unused(i, off, n) })
		}
	}
}

// readLeaves implements cp.ReadLeaves.
func (b *bulk) readLeaves(ctx context.Context, ps []block.Pointer, fn func(int, []byte) error) error {
	var mu sync.Mutex
	var first error
	err := b.read(ctx, len(ps), func(i int) block.Pointer { return ps[i] }, func(i int, page []byte, err error) {
		if err == nil {
			err = fn(i, page)
		}
		if err != nil {
			mu.Lock()
			defer mu.Unlock()
			if first == nil {
				first = err
			}
		}
	})
	return errors.Join(err, first)
}

// prove compares a block with the checksum of its pointer, unless it could not be read,
// and looks for another copy, or the twin, when it is wrong.
func (b *bulk) prove(p block.Pointer, frame []byte, err error) error {
	good := func(frame []byte) bool { return prove(p, frame) == nil }
	if err == nil {
		if err = prove(p, frame); err == nil || b.set.ReadGood(p.Phys, frame, good) {
			return nil
		}
	}
	if p.Twin != 0 {
		if _, e := b.set.FromTwin(p.Phys, p.Second().Phys, frame, good); e == nil {
			return nil
		}
	}
	return err
}

// prove compares a block with the checksum of its pointer.
func prove(p block.Pointer, frame []byte) error {
	if sum := ondisk.CRC(frame); sum != p.Sum {
		return &block.CorruptError{What: "block", Where: p.String(), Why: fmt.Sprintf("checksum %08x instead of %08x", sum, p.Sum)}
	}
	return nil
}
