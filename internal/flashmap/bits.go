package flashmap

import (
	mathbits "math/bits"
	"sync/atomic"
)

// bitset is a set of numbers, of slots or of data sets. Single operations may be used
// concurrently.
type bitset []atomic.Uint64

func newBits(n int) bitset { return make(bitset, (n+63)/64) }

func (b bitset) has(i slotNumber) bool { return b[i/64].Load()&(1<<(i%64)) != 0 }
func (b bitset) set(i slotNumber)      { b[i/64].Or(1 << (i % 64)) }
func (b bitset) clear(i slotNumber)    { b[i/64].And(^(uint64(1) << (i % 64))) }

// next returns the first member from i on, -1 if there is none.
func (b bitset) next(i int) int { return b.scan(i, 0) }

// gap returns the first number from i on that is no member, -1 if there is none.
func (b bitset) gap(i int) int { return b.scan(i, ^uint64(0)) }

func (b bitset) scan(i int, invert uint64) int {
	for w := i / 64; w < len(b); w++ {
		v := b[w].Load() ^ invert
		if w == i/64 {
			v &= ^uint64(0) << (i % 64)
		}
		if v != 0 {
			return w*64 + mathbits.TrailingZeros64(v)
		}
	}
	return -1
}

// count returns the number of members.
func (b bitset) count() (n int) {
	for i := range b {
		n += mathbits.OnesCount64(b[i].Load())
	}
	return n
}

// resized returns b for n numbers, of which those beyond the old ones are no members.
func (b bitset) resized(n int) bitset {
	c := newBits(n)
	for i := range min(len(b), len(c)) {
		c[i].Store(b[i].Load())
	}
	return c
}
