// Package stat sums up what benchmarks have measured.
package stat

import (
	"math"
	"slices"
)

// Median returns the median of v, 0 for none.
func Median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	n := len(v)
	switch {
	case n == 0:
		return 0
	case n%2 == 0:
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[n/2]
}

// Rank returns the percentile of v by the nearest rank, 0 for none.
func Rank(v []float64, percent float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return v[max(1, int(math.Ceil(float64(len(v))*percent/100)))-1]
}
