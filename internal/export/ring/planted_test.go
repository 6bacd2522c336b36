//go:build planted

package ring

import (
	"testing"

	"github.com/pollux-storage/pollux/internal/planted"
)

// The planted fault of the package is found.
func TestPlantedHere(t *testing.T) {
	if err := planted.Select(string(planted.RingTagUnasked)); err != nil {
		t.Fatal(err)
	}
	err := exactlyOnce(t)
	if e := planted.Select(""); e != nil {
		t.Fatal(e)
	}
	if err == nil {
		t.Fatalf("%s was not found", planted.RingTagUnasked)
	}
	t.Logf("%s was found: %v", planted.RingTagUnasked, err)
}
