package pool

import (
	"context"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
)

// prints calls page for each page of the trees of fingerprints, with mu held. What
// they say is not compared with anything: it is a hint.
func (c *checker) prints(ctx context.Context, page func(block.Pointer)) error {
	sb := c.machine.Superblock()
	if sb.Prints.IsHole() {
		return nil
	}
	roots := make([]block.Pointer, len(sb.Devices))
	t := &treeWalk{of: "roots of fingerprints", lost: &c.lost.prints, page: page, leaf: func(_ uint64, frame []byte) {
		for dev := range roots {
			roots[dev] = block.DecodePointer(frame[dev*block.PointerSize:])
		}
	}}
	if err := c.walkLevel(ctx, []node{{ptr: sb.Prints}}, 0, t); err != nil {
		return err
	}
	for dev, root := range roots {
		t := &treeWalk{of: fmt.Sprintf("fingerprints of device %d", dev), lost: &c.lost.prints, page: page, leaf: func(uint64, []byte) {}}
		if err := c.walk(ctx, root, t); err != nil {
			return err
		}
	}
	return nil
}
