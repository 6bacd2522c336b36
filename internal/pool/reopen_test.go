package pool

import (
	"testing"

	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// Power goes before the first consistency point of a pool was made.
func TestPowerCutBeforeFirstPoint(t *testing.T) {
	r := newRig(t, 2, testSize)
	for seed := range uint64(3) {
		r.mustOpen()
		r.mustCheck()
		r.cutPower(blocktest.CutRandom, seed)
	}
	r.mustOpen()
	r.volume("v", 1<<20)
	r.cutPower(blocktest.DropAll, 9)
	r.mustOpen()
	if _, err := r.Volume("v"); err != nil {
		t.Error(err)
	}
	r.shut()
}
