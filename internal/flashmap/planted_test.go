//go:build planted

package flashmap

import (
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/planted"
)

// Each planted fault of the package is found by the tests that cut the power, also those for
// which random runs of the simulator take long.
func TestPlantedHere(t *testing.T) {
	for _, fault := range planted.All() {
		if !strings.HasPrefix(fault.Where, "internal/flashmap") {
			continue
		}
		must(t, planted.Select(fault.Name))
		by := hunts[planted.Fault(fault.Name)]
		if by == nil {
			by = hunt
		}
		cuts, err := by(t)
		must(t, planted.Select(""))
		if err == nil {
			t.Errorf("%s was not found in %d power cuts", fault.Name, cuts)
		}
		t.Logf("%s was found after %d power cuts: %v", fault.Name, cuts, err)
	}
}

// hunts are for faults of what lives do not do.
var hunts = map[planted.Fault]func(t testing.TB) (cuts int, err error){
	planted.FlashNoteEarly:    func(t testing.TB) (int, error) { return notesCut(t, 1, 4) },
	planted.FlashNoteInPlace:  func(t testing.TB) (int, error) { return notesCut(t, 1, 4) },
	planted.FlashNoteUnsure:   func(t testing.TB) (int, error) { return notesCut(t, 1, 16) },
	planted.FlashTableUnsure:  func(t testing.TB) (int, error) { return deathThenCut(t, 40, false) },
	planted.FlashCopyUnseen:   func(t testing.TB) (int, error) { return 0, rotIsSeen(t) },
	planted.FlashReturnUnseen: func(t testing.TB) (int, error) { return 0, fillBesideMove(t) },
}

func hunt(t testing.TB) (cuts int, err error) {
	for seed := uint64(1); seed <= 40; seed++ {
		for cut := int64(1); ; cut++ {
			was, err := life(t, seed, cut, false)
			if err != nil {
				return cuts, err
			}
			if !was {
				break
			}
			cuts++
		}
	}
	return cuts, nil
}
