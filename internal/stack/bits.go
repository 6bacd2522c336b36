package stack

import (
	mathbits "math/bits"
	"sync/atomic"
)

// Bits is a set of numbers from 0 on, 64 in a word. Single operations may be used
// concurrently.
type Bits []atomic.Uint64

// NewBits returns an empty set of numbers below n, rounded up to whole words.
func NewBits(n int) Bits { return make(Bits, (n+63)/64) }

// Has reports whether i is a member.
func (b Bits) Has(i int) bool { return b[i/64].Load()&(1<<(i%64)) != 0 }

// Set makes i a member.
func (b Bits) Set(i int) { b[i/64].Or(1 << (i % 64)) }

// Clear takes i out.
func (b Bits) Clear(i int) { b[i/64].And(^(uint64(1) << (i % 64))) }

// Fill makes the numbers below n members.
func (b Bits) Fill(n int) {
	for i := range n / 64 {
		b[i].Store(^uint64(0))
	}
	if rest := n % 64; rest > 0 {
		b[n/64].Store(1<<rest - 1)
	}
}

// Or adds all of c, which has as many words.
func (b Bits) Or(c Bits) {
	for i := range b {
		b[i].Or(c[i].Load())
	}
}

// Next returns the first member from i on, -1 if there is none.
func (b Bits) Next(i int) int { return b.scan(i, 0) }

// Gap returns the first number from i on that is no member, -1 if there is none.
func (b Bits) Gap(i int) int { return b.scan(i, ^uint64(0)) }

func (b Bits) scan(i int, invert uint64) int {
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

// Count returns the number of members.
func (b Bits) Count() (n int) {
	for i := range b {
		n += mathbits.OnesCount64(b[i].Load())
	}
	return n
}

// Resized returns b for numbers below n: those that are new are no members.
func (b Bits) Resized(n int) Bits {
	c := NewBits(n)
	for i := range min(len(b), len(c)) {
		c[i].Store(b[i].Load())
	}
	return c
}
