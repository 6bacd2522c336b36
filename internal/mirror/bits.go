package mirror

import (
	mathbits "math/bits"
	"sync/atomic"
)

// bits is a set of regions. Single operations may be used concurrently.
type bits []atomic.Uint64

func newBits(n int) bits { return make(bits, (n+63)/64) }

func (b bits) has(i int) bool { return b[i/64].Load()&(1<<(i%64)) != 0 }
func (b bits) set(i int)      { b[i/64].Or(1 << (i % 64)) }
func (b bits) clear(i int)    { b[i/64].And(^(uint64(1) << (i % 64))) }

// fill sets the first n.
func (b bits) fill(n int) {
	for i := range n / 64 {
		b[i].Store(^uint64(0))
	}
	if rest := n % 64; rest > 0 {
		b[n/64].Store(1<<rest - 1)
	}
}

// or adds all of c.
func (b bits) or(c bits) {
	for i := range b {
		b[i].Or(c[i].Load())
	}
}

// next returns the first member from i on, -1 if there is none.
func (b bits) next(i int) int {
	for w := i / 64; w < len(b); w++ {
		v := b[w].Load()
		if w == i/64 {
			v &= ^uint64(0) << (i % 64)
		}
		if v != 0 {
			return w*64 + mathbits.TrailingZeros64(v)
		}
	}
	return -1
}

// resized returns b for n regions. There are fewer only if b is empty.
func (b bits) resized(n int) bits {
	c := newBits(n)
	for i := range min(len(b), len(c)) {
		c[i].Store(b[i].Load())
	}
	return c
}

// count returns the number of members.
func (b bits) count() (n int) {
	for i := range b {
		n += mathbits.OnesCount64(b[i].Load())
	}
	return n
}
