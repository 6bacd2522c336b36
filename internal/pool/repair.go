package pool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/space"
)

// Repair does what Check does and mends what it can: copies that are bad where
// another is good, of labels and superblock too, and reference counts and figures
// of use, which it makes anew from the maps. It reports what it has mended, and as
// problems what remains. The view's devices must have been opened for writing, and
// nobody else may write to them.
//
// Journal and log are left for whoever opens the pool next, and what mends counts is
// one superblock, see [cp.Machine.Rebuild]. Repair may be interrupted anywhere, and be
// made again with another view. It is called once.
//
// Counts stay as they are when a page of a map is lost: nobody knows what it
// referred to, and what is in use must not become free.
func (v *View) Repair(ctx context.Context, o CheckOptions) (CheckReport, error) {
	c, err := v.newChecker(o)
	if err != nil {
		return CheckReport{}, err
	}
	defer c.bulk.close()
	c.mend = true
	v.p.set.LookOnly(false)
	if err := v.still(ctx, c); err != nil {
		return c.report, err
	}
	if err := v.mend(ctx, c); err != nil {
		return c.report, err
	}
	if r := c.report; len(r.Mended) > 0 {
		// What is a problem now remains one.
		c.report = CheckReport{Pool: r.Pool, Mended: r.Mended, MoreMended: r.MoreMended}
		c.lost, c.wrong, c.copiesProved, c.mend = lostPages{}, faults{}, false, false
		if err := v.still(ctx, c); err != nil {
			return c.report, err
		}
		v.sayCannot(c)
	}
	if c.mend = true; o.Data {
		if err := c.data(ctx); err != nil {
			return c.report, err
		}
	}
	return c.report, v.p.set.Sync()
}

// mend writes anew what was found wrong.
func (v *View) mend(ctx context.Context, c *checker) error {
	for _, bad := range c.wrong.labels {
		if err := c.mendLabel(bad.at); err != nil {
			c.problem("block %v: %v", bad.at, err)
		} else {
			c.mended("%s", bad.what)
		}
	}
	cannot := v.sayCannot(c)
	switch {
	case v.behind != nil:
		return nil // the newest superblock may be one that cannot be read
	case len(c.wrong.counts) > 0 && !cannot:
		if done, err := v.rebuild(ctx, c); err != nil || !done {
			return err
		}
		for _, what := range c.wrong.counts {
			c.mended("%s", what)
		}
		c.report.MoreMended += c.wrong.more
	case len(c.wrong.superblock) > 0:
		for range 2 { // one in each slot
			if err := v.p.machine.Rewrite(func(*cp.Superblock) {}); err != nil {
				return err
			}
		}
	}
	for _, bad := range c.wrong.superblock {
		c.mended("%s", bad.what)
	}
	return nil
}

// sayCannot makes it a problem that reference counts cannot be made anew.
func (v *View) sayCannot(c *checker) (cannot bool) {
	why := v.cannot(c)
	if why != "" {
		c.problem("reference counts stay as they are: %s", why)
	}
	return why != ""
}

// cannot says why reference counts cannot be made anew, nothing when they can.
func (v *View) cannot(c *checker) string {
	switch {
	case v.behind != nil:
		return fmt.Sprintf("the devices do not have all that the pool had: %v", v.behind)
	case c.lost.maps || c.lost.list:
		return "pages of maps are lost, so the counts cannot be compared, and what these pages referred to must not become free"
	}
	return ""
}

// rebuild makes the reference counts anew from what is found now.
func (v *View) rebuild(ctx context.Context, c *checker) (done bool, err error) {
	p := v.p
	var held []space.Run
	var failed error // mu is held where it is set
	take := func(ptr block.Pointer) (counted bool, err error) {
		if c.outside(ptr) {
			return false, nil // it was reported, and has no count
		}
		err = p.space.Inc(space.Run{At: ptr.Phys, N: 1})
		return err == nil, err
	}
	count := func(ptr block.Pointer) {
		if _, err := take(ptr); failed == nil {
			failed = err
		}
	}
	holdPage := func(ptr block.Pointer) error { // whatever a damaged tree refers to
		counted, err := take(ptr)
		if counted {
			held = append(held, space.Run{At: ptr.Phys, N: 1})
		}
		return err
	}
	hold := func(ptr block.Pointer) {
		if err := holdPage(ptr); failed == nil {
			failed = err
		}
	}
	list := count
	if len(c.wrong.used) > 0 {
		list = hold // it is replaced
	}
	err = c.maps(ctx, count, count)
	if err == nil {
		err = c.overlays(hold)
	}
	if err == nil {
		err = c.list(ctx, list)
	}
	if dropped := c.lost.prints; err == nil && dropped {
		// They come back as blocks are written.
		err = c.prints(ctx, func(ptr block.Pointer) { _ = holdPage(ptr) })
	} else if err == nil {
		err = c.prints(ctx, count)
	}
	if err == nil {
		err = c.counts(ctx, func(ptr block.Pointer) { _ = holdPage(ptr) }, func(int, uint64, []byte) {})
	}
	if why := v.cannot(c); err == nil && failed == nil && why != "" {
		failed = errors.New(why) // a page could be read before
	}
	if err != nil || failed != nil {
		if failed != nil {
			c.problem("reference counts stay as they are: %v", failed)
		}
		return false, err
	}
	p.space.Unreserve(p.estimate) // all that it stands for is counted
	if err := p.machine.Rebuild(held, c.wrong.used, c.lost.prints); err != nil {
		return false, fmt.Errorf("rebuild the reference counts of pool %s: %w", p.label.Name, err)
	}
	return true, nil
}

// mendLabel writes one copy of a label anew that another copy has.
func (c *checker) mendLabel(at block.Physical) error {
	l, err := ReadLabel(c.set.Device(at.Device()))
	if err != nil {
		return err
	}
	buf, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		return err
	}
	defer func() { _ = hpdi.Free(buf) }()
	copy(buf, l.encode())
	if err := c.set.Do([]*devices.IO{{Op: hpdi.OpWrite, At: at, Vec: [][]byte{buf}}}); err != nil {
		return err
	}
	return c.set.Sync()
}

// proveCopies proves each copy of blocks, which where describes, and calls bad for
// each that is not right. A repair makes it like a good one, if there is one; what no
// copy has is left for whoever reads the block.
func (c *checker) proveCopies(ctx context.Context, n int, ptr func(i int) block.Pointer, where func(i int) string, bad func(i int, err error)) error {
	if !c.mend {
		return c.bulk.proveCopies(ctx, n, ptr, func(i, copy int, err error) { bad(i, fmt.Errorf("copy %d: %w", copy+1, err)) })
	}
	var mu sync.Mutex
	wrong := map[int]error{}
	if err := c.bulk.proveCopies(ctx, n, ptr, func(i, copy int, err error) {
		mu.Lock()
		defer mu.Unlock()
		wrong[i] = errors.Join(wrong[i], fmt.Errorf("copy %d: %w", copy+1, err))
	}); err != nil || len(wrong) == 0 {
		return err
	}
	frame, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		return err
	}
	defer func() { _ = hpdi.Free(frame) }()
	for _, i := range slices.Sorted(maps.Keys(wrong)) {
		p := ptr(i)
		repaired, err := c.set.Repair(p.Phys, frame, func(frame []byte) bool { return prove(p, frame) == nil })
		switch {
		case err == nil && repaired > 0:
			c.mended("%s: %v", where(i), wrong[i])
		case err == nil:
			bad(i, wrong[i])
		}
	}
	return nil
}
