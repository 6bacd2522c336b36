package devbench

import (
	"math/bits"
	"time"
)

// fine is how many bits of a value a step of the histogram keeps behind the first.
const fine = 5

// histogram counts durations. Recording allocates nothing.
type histogram struct {
	counts [(64 - fine + 1) << fine]uint64
	n      uint64
	sum    time.Duration
	most   time.Duration
}

// step returns which count is for a value.
func step(v uint64) int {
	if v < 1<<fine {
		return int(v)
	}
	e := bits.Len64(v) - fine - 1
	return (e+1)<<fine + int(v>>e)&(1<<fine-1)
}

// top returns the largest value of a step.
func top(i int) uint64 {
	e := i>>fine - 1
	if e < 0 {
		return uint64(i)
	}
	return (uint64(1<<fine+i&(1<<fine-1))+1)<<e - 1
}

func (h *histogram) add(d time.Duration) {
	h.counts[step(uint64(max(d, 0)))]++
	h.n++
	h.sum += d
	h.most = max(h.most, d)
}

func (h *histogram) merge(o *histogram) {
	for i, n := range o.counts {
		h.counts[i] += n
	}
	h.n += o.n
	h.sum += o.sum
	h.most = max(h.most, o.most)
}

// rank returns a duration that a part p of all, from 0 to 1, does not pass: the upper end
// of its step, and never more than the longest. It is 0 for none.
func (h *histogram) rank(p float64) time.Duration {
	left := max(1, uint64(p*float64(h.n)+0.5))
	for i, n := range h.counts {
		if n >= left && n > 0 {
			return min(time.Duration(top(i)), h.most)
		}
		left -= min(left, n)
	}
	return h.most
}
