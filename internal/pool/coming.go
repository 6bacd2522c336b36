package pool

import (
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/internal/region"
)

// coming is a section of the region that Run's goroutine is to get. The host has to find and
// clear its memory, a tenth of a second for each 100 MiB of small pages or more: a large one
// comes in the background, so that points and folds go on meanwhile.
//
// It belongs to Run's goroutine, and to who closes the pool when Run has returned.
type coming struct {
	doing  sync.WaitGroup
	stop   atomic.Bool
	result chan arrival // has place for one; nil: nothing is under way
	ended  bool
}

// arrival is what has become of a section.
type arrival struct {
	section region.Section
	mem     []byte
	err     error
}

// begin has a section made that has at least length bytes, after others, which nobody uses
// any more, have been given back. Nothing may be under way. After end it does nothing.
func (c *coming) begin(r *region.Region, kind region.SectionKind, length int64, others []region.Section) {
	if c.ended {
		return
	}
	result := make(chan arrival, 1)
	c.result = result
	do := func() {
		for _, s := range others {
			_ = r.RemoveSection(s) // or the next owner does
		}
		var a arrival
		a.section, a.mem, a.err = r.AddSectionUnless(kind, length, c.stop.Load)
		result <- a
	}
	if length <= readyBytes {
		do()
		return
	}
	c.doing.Go(do)
}

// underWay reports whether a section has not been taken yet that was begun.
func (c *coming) underWay() bool { return c.result != nil }

// take returns the section that was begun; ok is false as long as it has not come.
func (c *coming) take() (a arrival, ok bool) {
	select {
	case a = <-c.result:
		c.result = nil
		return a, true
	default:
		return a, false
	}
}

// cancel ends what is under way, and gives a section back that has come all the same: to
// whoever comes next it would look damaged.
func (c *coming) cancel(r *region.Region) error {
	if c.result == nil {
		return nil
	}
	c.stop.Store(true)
	c.doing.Wait()
	c.stop.Store(false)
	if a, _ := c.take(); a.err == nil {
		return r.RemoveSection(a.section)
	}
	return nil
}

// end is cancel for good.
func (c *coming) end(r *region.Region) error {
	c.ended = true
	return c.cancel(r)
}
