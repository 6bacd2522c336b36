package oplog

import (
	"fmt"
	"math/bits"
	"sync"
)

// arena says which payload extents are free. It lives in private memory: the
// records say the same after a crash, and Attach rebuilds it from them.
type arena struct {
	mu     sync.Mutex
	bits   []uint64 // one bit an extent, set when free; guarded by mu
	cursor int      // word where the next search begins; guarded by mu
	free   int      // set bits; guarded by mu
}

// init makes all n extents free.
func (a *arena) init(n uint64) {
	a.bits = make([]uint64, (n+63)/64)
	for i := range a.bits {
		a.bits[i] = ^uint64(0)
	}
	if r := n % 64; r != 0 {
		a.bits[len(a.bits)-1] = 1<<r - 1
	}
	a.free = int(n)
}

// alloc appends n free extents to dst, in runs of MaxRecordBlocks as far as
// there are such runs, or returns false and takes none.
func (a *arena) alloc(n int, dst []Extent) ([]Extent, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if n < 0 || n > a.free {
		return dst, false
	}
	run := MaxRecordBlocks
	for n > 0 {
		run = min(run, n)
		first, ok := a.takeLocked(run)
		if !ok {
			// No run of that length is left anywhere: go on with
			// shorter ones. Single extents cannot run out here.
			run = (run + 1) / 2
			continue
		}
		for i := range run {
			dst = append(dst, first+Extent(i))
		}
		n -= run
	}
	return dst, true
}

// takeLocked takes the first run of k free extents within one word, searching
// from the cursor for one lap.
func (a *arena) takeLocked(k int) (Extent, bool) {
	w := a.cursor
	for range len(a.bits) {
		m := a.bits[w]
		// Afterwards bit i of m says that bits i to i+k-1 are set.
		for i := 1; i < k && m != 0; i++ {
			m &= a.bits[w] >> i
		}
		if m != 0 {
			b := bits.TrailingZeros64(m)
			a.bits[w] &^= (1<<k - 1) << b
			a.free -= k
			a.cursor = w
			return Extent(w*64 + b), true
		}
		if w++; w == len(a.bits) {
			w = 0
		}
	}
	return 0, false
}

// take marks a run as used. It returns false, changing nothing, when one of
// its extents already is. Only Attach calls it, before the log is shared.
func (a *arena) take(first Extent, n int) bool {
	for i := range Extent(n) {
		if a.bits[(first+i)/64]&(1<<((first+i)%64)) == 0 {
			return false
		}
	}
	for i := range Extent(n) {
		a.bits[(first+i)/64] &^= 1 << ((first + i) % 64)
	}
	a.free -= n
	return true
}

// putLocked makes one extent free.
func (a *arena) putLocked(e Extent) {
	w, m := e/64, uint64(1)<<(e%64)
	if a.bits[w]&m != 0 {
		panic(fmt.Sprintf("oplog: extent %d freed twice", e))
	}
	a.bits[w] |= m
	a.free++
}

func (a *arena) put(ext []Extent) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, e := range ext {
		a.putLocked(e)
	}
}

func (a *arena) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.free
}
