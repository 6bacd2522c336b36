package vhostuser

import (
	"github.com/pollux-storage/pollux/internal/planted"
)

// tracker is what vhost.Split and vhost.Packed have in common: the steps by which a batch
// of completions leaves the in-flight area.
type tracker interface {
	LinkEntry(slot uint16)
	LinkHead(slot uint16)
	Advance(descs int)
	Clear(slot uint16)
	Unlink()
	Settle(n int)
	Retire()
}

// phase is where a completion is.
type phase uint8

const (
	linkEntry phase = iota
	linkHead
	advance
	put
	publish
	clearing
	unlink
	settle
	ended
)

// completion shows a batch of completions to the driver, one store to shared memory a
// step. A back-end that ends between any two steps leaves what its successor can finish or
// take back.
type completion struct {
	q     *queue
	batch []*request
	at    phase
	i     int
}

// begin starts with a batch that is not empty.
func (c *completion) begin(q *queue, batch []*request) {
	*c = completion{q: q, batch: batch}
	if q.track == nil {
		c.at = put
	}
}

// step makes the next store, and returns false when there is none left.
func (c *completion) step() bool {
	t := c.q.track
	r := c.batch[c.i]
	switch c.at {
	case linkEntry:
		t.LinkEntry(r.slot)
		c.at = linkHead
	case linkHead:
		t.LinkHead(r.slot)
		c.next(linkEntry, advance)
	case advance:
		n := 0
		for _, r := range c.batch {
			n += r.chain.Slots()
		}
		t.Advance(n)
		if planted.Has(planted.InflightClearedEarly) {
			for _, r := range c.batch {
				t.Clear(r.slot)
			}
		}
		c.at = put
	case put:
		c.q.dev.Put(&r.chain, r.written)
		c.next(put, publish)
	case publish:
		c.q.dev.Publish()
		c.q.logUsed()
		if c.at = clearing; t == nil {
			c.at = ended
		}
	case clearing:
		t.Clear(r.slot)
		c.next(clearing, unlink)
	case unlink:
		t.Unlink()
		c.at = settle
	case settle:
		t.Settle(len(c.batch))
		c.at = ended
	}
	return c.at != ended
}

// next goes to the next request of the batch with one phase, or on to another.
func (c *completion) next(again, then phase) {
	c.at = again
	if c.i++; c.i == len(c.batch) {
		c.i, c.at = 0, then
	}
}
