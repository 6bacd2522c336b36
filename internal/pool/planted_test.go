//go:build planted

package pool

import (
	"errors"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
)

// The planted faults of what outlives a guest beside its log, which random runs of the
// simulator meet too seldom, are found by the package's own tests.
func TestPlantedHere(t *testing.T) {
	for fault, hunt := range map[planted.Fault]func(t testing.TB) bool{
		planted.KeptJournalEarly: func(t testing.TB) bool {
			for op := int64(1); ; op++ {
				switch was, err := keptCut(t, 5, op); {
				case err != nil:
					t.Logf("power cut at operation %d: %v", op, err)
					return true
				case !was:
					return false
				}
			}
		},
		planted.KeptJournalUnproved: func(t testing.TB) bool { return olderDevice(t) == nil },
	} {
		if err := planted.Select(string(fault)); err != nil {
			t.Fatal(err)
		}
		found := hunt(t)
		if err := planted.Select(""); err != nil {
			t.Fatal(err)
		}
		if !found {
			t.Errorf("%s was not found", fault)
		}
	}
	if err := olderDevice(t); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("without a fault: %v", err)
	}
}
