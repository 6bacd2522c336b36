package blockmap

import (
	"sync"

	"github.com/pollux-storage/pollux/internal/block"
)

// leafSlots is how many leaves' places are remembered: those of 1 GiB of
// volumes, in 64 KiB of memory.
const leafSlots = 1024

// place says which leaf is meant, and as of which installation of roots.
type place struct {
	volume     block.VolumeID
	leaf       uint64
	generation uint64
}

// leafCache remembers where leaves were found, which spares the way down from
// the root to look-ups that come back to them. It need not be emptied: what was
// found under other roots goes by another generation.
type leafCache struct {
	slots [leafSlots]leafSlot
}

type leafSlot struct {
	mu sync.Mutex
	at place
	p  block.Pointer
}

func (c *leafCache) slot(at place) *leafSlot {
	return &c.slots[(at.leaf+uint64(at.volume)*0x9e3779b97f4a7c15>>32)%leafSlots]
}

// find returns the pointer to a leaf, if it is remembered.
func (c *leafCache) find(at place) (p block.Pointer, ok bool) {
	s := c.slot(at)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.at != at {
		return p, false
	}
	return s.p, true
}

// add remembers the pointer to a leaf.
func (c *leafCache) add(at place, p block.Pointer) {
	s := c.slot(at)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at, s.p = at, p
}
