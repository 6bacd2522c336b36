package flashmap

import (
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// Whoever the device belongs to has its labels in blocks 0 and 128: nothing that a flash
// device does touches them or what lies behind them.
func TestFrontLeftAlone(t *testing.T) {
	primary, flash := disks(t)
	front := []uint64{0, 1, 63, 128, 129, 191}
	for _, at := range front {
		must(t, writeAt(t, flash, at, pattern(at+7, 1)))
	}
	_, err := Create(flash, CreateOptions{SetBytes: setBytes, Reach: reach, Notes: notes})
	must(t, err)
	f, d := attach(t, primary, flash)
	in(t, f, 10)
	must(t, write(t, d, 10*setBlocks, 1, setBlocks))
	out(t, f, 10)
	_, err = f.Prove()
	must(t, err)
	must(t, d.Close())
	must(t, f.Forget(3))
	sound(t, f)
	for _, at := range front {
		p := make([]byte, block.Size)
		must(t, do(t, flash, &hpdi.Request{Op: hpdi.OpRead, Offset: int64(at) * block.Size, Vec: [][]byte{p}}))
		if p[0] != byte(at+7) {
			t.Errorf("block %d was written to", at)
		}
	}
}
