package pool

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/catalogue"
)

// dataLeaves is how many leaves of a map, of 1 MiB of a volume each, have their
// data read together, in the order of the devices.
const dataLeaves = 128

// mapped is a block of a volume, and where it is stored.
type mapped struct {
	ptr block.Pointer
	lba block.Logical
}

// data reads every block that a volume refers to, from the devices whatever
// the cache holds. The pool may be closed between two batches, which ends it.
func (c *checker) data(ctx context.Context) error {
	p := c.o.Progress
	p.total.Store(c.report.DataBlocks)
	p.done.Store(0)
	p.data.Store(true)
	batch := make([]mapped, 0, dataLeaves*blockmap.LeafBlocks)
	for _, v := range c.catalogue.List() {
		for from, more := uint64(0), true; more; {
			err := c.pass(func() (err error) {
				from, more, err = c.dataBatch(ctx, v, from, batch)
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// dataBatch verifies what the first dataLeaves leaves from leaf from on map,
// and returns where to go on, if there is more.
func (c *checker) dataBatch(ctx context.Context, v catalogue.Volume, from uint64, batch []mapped) (next uint64, more bool, err error) {
	leaves, err := c.bmap.LeavesFrom(v.ID, from, dataLeaves)
	if more = len(leaves) == dataLeaves; err != nil {
		more = false
		c.problem("volume %q: %v", v.Name, err)
	}
	var ptrs [blockmap.LeafBlocks]block.Pointer
	for _, leaf := range leaves {
		first := block.Logical(leaf * blockmap.LeafBlocks)
		next = leaf + 1
		if err := c.bmap.Lookup(v.ID, first, ptrs[:]); err != nil {
			c.problem("volume %q from block %d on: %v", v.Name, first, err)
			continue
		}
		for i, p := range ptrs {
			if !p.IsHole() {
				batch = append(batch, mapped{p, first + block.Logical(i)})
			}
		}
	}
	where := func(i int) string { return c.blockOf(v, batch[i].lba) }
	if err := c.proveCopies(ctx, len(batch), func(i int) block.Pointer { return batch[i].ptr }, where, func(i int, err error) {
		c.unreadable(v, batch[i], err)
	}); err != nil {
		return next, more, err
	}
	var read atomic.Int64
	err = c.bulk.read(ctx, len(batch), func(i int) block.Pointer { return batch[i].ptr }, func(i int, _ []byte, err error) {
		read.Add(1)
		c.o.Progress.done.Add(1)
		if err != nil {
			c.unreadable(v, batch[i], err)
		}
	})
	c.report.BlocksRead += read.Load()
	return next, more, err
}

// unreadable reports a block that could not be read, unless it was overwritten
// meanwhile: then its place may have been used again, and what the map says now
// was written, and proved, since.
func (c *checker) unreadable(v catalogue.Volume, m mapped, err error) {
	var now [1]block.Pointer
	if e := c.bmap.Lookup(v.ID, m.lba, now[:]); e != nil || now[0] == m.ptr {
		c.problem("%s: %v", c.blockOf(v, m.lba), errors.Join(err, e))
	}
}

// blockOf says which block of a volume it is.
func (c *checker) blockOf(v catalogue.Volume, lba block.Logical) string {
	return fmt.Sprintf("block %d of volume %q, from byte %d on", lba, v.Name, int64(lba)*block.Size)
}
