//go:build planted

package vhostuser

import (
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/planted"
)

// Each planted fault of what a disk finds when its server has died is found by lives with
// such deaths.
func TestPlantedHere(t *testing.T) {
	for _, fault := range planted.All() {
		if !strings.HasPrefix(fault.Where, "internal/export/vhostuser") && !strings.HasPrefix(fault.Where, "internal/vhost:") {
			continue
		}
		must(t, planted.Select(fault.Name))
		lives, err := 1, error(nil)
		if fault.Name == string(planted.InflightTailKept) {
			err = unpublishedTail(t)
		} else {
			lives, err = hunt(t)
		}
		must(t, planted.Select(""))
		if err == nil {
			t.Errorf("%s was not found in %d lives", fault.Name, lives)
		}
		t.Logf("%s was found after %d lives: %v", fault.Name, lives, err)
	}
}

func hunt(t *testing.T) (lives int, err error) {
	for seed := range uint64(50) {
		for _, f := range crashLayouts {
			lives++
			t.Run("life", func(t *testing.T) { _, err = crashLife(t, f, seed, 120) })
			if err != nil {
				return lives, err
			}
		}
	}
	return lives, nil
}
