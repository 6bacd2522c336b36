package collect

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// KeptBytes returns how many bytes Keep needs for all that a collector with these parameters
// may ever count of a device.
func KeptBytes(p Params, g Geometry) int64 {
	var t table
	t.bound(int64(p.Memory), g.Sets())
	return ondisk.HeaderSize + prefixBytes + int64(t.most)*savedBytes + countBytes
}

// Keep writes what is counted to p, for Recall, and returns how many bytes that is. It is
// Save without the history, in the order of the table and right into p: some milliseconds
// for a table of 16 MiB, in which accesses wait in their recorders. What does not fit is left
// out. Whoever dies meanwhile leaves bytes that Recall refuses.
func (c *Collector) Keep(p []byte, id Identity, now time.Time) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tickLocked(now)
	s := c.countedLocked(now)
	n := min(len(c.table.entries), (len(p)-ondisk.HeaderSize-prefixBytes-countBytes)/savedBytes)
	if n < 0 {
		return 0
	}
	at := c.seconds(now.UnixNano())
	b := s.appendPrefix(p[:ondisk.HeaderSize], n)
	for i := range n {
		e := &c.table.entries[i]
		c.table.roll(e, c.window)
		b = b[:len(b)+savedBytes]
		e.encode(b[len(b)-savedBytes:], at-min(e.last, at))
	}
	b = binary.LittleEndian.AppendUint32(b, 0) // no windows
	id.seal(b)
	return len(b)
}

// Recall replaces what is counted by what Keep has written, and leaves the history as it is;
// else it is Load.
func (c *Collector) Recall(p []byte, pool block.PoolID, now time.Time) error {
	s, err := decode(p, anyOrder)
	if err != nil {
		return fmt.Errorf("kept access information: %w", err)
	}
	s.countsAlone = true
	return c.load(s, pool, now)
}

// Counted returns how many accesses have been counted in all that Keep or Save has written,
// without a look at more than the beginning.
func Counted(p []byte) (uint64, error) {
	const at = ondisk.HeaderSize + 48
	if len(p) < at+8 {
		return 0, fmt.Errorf("kept access information of %d bytes: %w", len(p), block.ErrCorrupt)
	}
	return binary.LittleEndian.Uint64(p[at:]), nil
}
