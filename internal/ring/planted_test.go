//go:build planted

package ring

import (
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/planted"
)

// Each planted fault of the package is found by the test that lets back-ends die.
func TestPlantedHere(t *testing.T) {
	for _, fault := range planted.All() {
		if !strings.HasPrefix(fault.Where, "internal/ring") {
			continue
		}
		if err := planted.Select(fault.Name); err != nil {
			t.Fatal(err)
		}
		var found error
		all := 0
		for seed := uint64(1); seed <= 150 && found == nil; seed++ {
			var deaths int
			deaths, found = steps(seed, 4, 60)
			all += deaths
		}
		if err := planted.Select(""); err != nil {
			t.Fatal(err)
		}
		if found == nil {
			t.Errorf("%s was not found in %d deaths", fault.Name, all)
			continue
		}
		t.Logf("%s was found after %d deaths: %v", fault.Name, all, found)
	}
}
