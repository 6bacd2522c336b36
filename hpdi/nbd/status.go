package nbd

import (
	"encoding/binary"

	"github.com/pollux-storage/pollux/hpdi"
	proto "github.com/pollux-storage/pollux/internal/nbdproto"
)

// extents is how many descriptors of a block status are read at once.
const extents = 256

// status reads a chunk of n bytes that describes what a range is made of.
func (s *source) status(c *command, n int64) error {
	if c.got > 0 {
		return broken("block status of %d bytes at %d, told twice", c.n, c.off)
	}
	s.drop(proto.ChunkSize)
	b, err := s.small(4)
	if err != nil {
		return err
	}
	if id := binary.BigEndian.Uint32(b); id != s.context {
		return broken("block status of context %d, where %d was agreed on", id, s.context)
	}
	bs := int64(s.l.d.info.BlockSize)
	for left := (n - 4) / 8; left > 0; {
		k := min(left, extents)
		if b, err = s.small(int(k) * 8); err != nil {
			return err
		}
		for ; len(b) > 0; b = b[8:] {
			length, flags := int64(binary.BigEndian.Uint32(b)), binary.BigEndian.Uint32(b[4:])
			if length == 0 || c.got >= c.n {
				return broken("an extent of %d bytes in the status of %d, of which %d had been told", length, c.n, c.got)
			}
			c.tell(length, stateOf(flags), bs)
		}
		left -= k
	}
	if c.told == 0 {
		c.add(bs, hpdi.Data) // a block at least, of which not all was told
	}
	return nil
}

// stateOf reads the flags of base:allocation. A hole whose contents are not defined is data
// to whoever wants to read it.
func stateOf(flags uint32) hpdi.ExtentState {
	switch {
	case flags&proto.StateZero == 0:
		return hpdi.Data
	case flags&proto.StateHole != 0:
		return hpdi.Hole
	}
	return hpdi.Zero
}

// tell adds an extent that the server has told. A server may tell of less than blocks: one
// that has a border in it is data.
func (c *command) tell(n int64, state hpdi.ExtentState, bs int64) {
	from := c.got
	c.got = min(c.n, c.got+n)
	if state == hpdi.Data {
		c.add(roundUp(c.got, bs)-c.told, hpdi.Data)
		return
	}
	if from, end := roundUp(from, bs), c.got/bs*bs; from < end {
		c.add(from-c.told, hpdi.Data)
		c.add(end-c.told, state)
	}
}

func roundUp(n, bs int64) int64 { return (n + bs - 1) / bs * bs }

// add gives an extent to the request, if that is still waiting and has place for it.
func (c *command) add(n int64, state hpdi.ExtentState) {
	if n <= 0 {
		return
	}
	c.told += n
	if c.op == nil || c.full {
		return
	}
	c.full = !c.op.r.AddExtent(n, state)
}
