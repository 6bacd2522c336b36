package stat

import "testing"

func TestRank(t *testing.T) {
	var v []float64
	for i := range 100 {
		v = append(v, float64(i+1))
	}
	for percent, want := range map[float64]float64{50: 50, 90: 90, 99: 99, 100: 100, 0: 1} {
		if got := Rank(v, percent); got != want {
			t.Errorf("p%v is %v, want %v", percent, got, want)
		}
	}
	if got := Rank(v[:10], 99); got != 10 {
		t.Errorf("p99 of ten is %v", got)
	}
	if got := Rank(nil, 50); got != 0 {
		t.Errorf("p50 of none is %v", got)
	}
}
