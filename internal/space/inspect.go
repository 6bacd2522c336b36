package space

import (
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
)

// Counts copies the reference counts of len(dst) blocks of a device, from
// block first on, into dst.
func (s *Space) Counts(dev int, first uint64, dst []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	copy(dst, s.devs[dev].counts[first:])
}

// CheckFree proves the totals of free blocks against the counts.
func (s *Space) CheckFree() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var free int64
	for i, d := range s.devs {
		for t := range d.trackFree {
			lo, hi := d.trackRange(t)
			n := 0
			for _, c := range d.counts[lo:hi] {
				if c == 0 {
					n++
				}
			}
			if n != int(d.trackFree[t]) {
				return &block.CorruptError{What: "free count", Where: fmt.Sprintf("track %d of device %d", t, i),
					Why: fmt.Sprintf("%d instead of %d", d.trackFree[t], n)}
			}
			free += int64(n)
		}
	}
	if free != s.free {
		return &block.CorruptError{What: "free count", Where: "the pool", Why: fmt.Sprintf("%d instead of %d", s.free, free)}
	}
	return nil
}
