package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// pageTwins proves both places of pages of a level that have twins. A repair makes the
// one that is bad like the other.
func (c *checker) pageTwins(ctx context.Context, pages []node, level int, t *treeWalk) error {
	pages = slices.DeleteFunc(slices.Clone(pages), func(n node) bool { return n.ptr.Twin == 0 })
	if len(pages) == 0 {
		return nil
	}
	wrong := make([][2]error, len(pages)) // of different workers: no two write the same
	for place := range 2 {
		err := c.bulk.readFrom(ctx, 0, len(pages), func(i int) block.Pointer { return [2]block.Pointer{pages[i].ptr, pages[i].ptr.Second()}[place] },
			func(i int, _ []byte, err error) {
				if !errors.Is(err, hpdi.ErrNoCopy) {
					wrong[i][place] = err
				}
			})
		if err != nil {
			return err
		}
	}
	for i, n := range pages {
		if wrong[i] == [2]error{} {
			continue
		}
		mended, err := c.mendPage(n.ptr, wrong[i])
		if err != nil {
			return err
		}
		for place, name := range []string{"first place", "twin"} {
			switch err := wrong[i][place]; {
			case err != nil && mended:
				c.mended("%s: %s: %v", t.where(level, n.leaf), name, err)
			case err != nil:
				c.problem("%s: %s: %v", t.where(level, n.leaf), name, err)
			}
		}
	}
	return nil
}

// mendPage writes a page that is bad in one of its places again, in a repair.
func (c *checker) mendPage(p block.Pointer, wrong [2]error) (mended bool, err error) {
	if !c.mend || wrong[0] != nil && wrong[1] != nil {
		return false, nil
	}
	frame, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		return false, fmt.Errorf("mend a page: %w", err)
	}
	defer func() { _ = hpdi.Free(frame) }()
	bad, other := p.Phys, p.Second().Phys
	if wrong[1] != nil {
		bad, other = other, bad
	}
	mended, _ = c.set.FromTwin(bad, other, frame, func(frame []byte) bool { return prove(p, frame) == nil })
	return mended, nil
}
