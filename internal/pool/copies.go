package pool

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// copies proves both copies of each label and of the newest superblock:
// one of them is enough to open the pool, so that damage of the other goes
// unnoticed until it is too late. The superblock's copies are written anew by
// each fold. Whoever died while it wrote them has left one as it was before,
// which only the owner of an open pool can tell from a write that was lost.
func (c *checker) copies() error {
	buf, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		return err
	}
	defer func() { _ = hpdi.Free(buf) }()
	read := func(what string, at block.Physical, prove func() error) (bad []badCopy) {
		wrong := func(err error) {
			text := fmt.Sprintf("copy of the %s at block %v: %v", what, at, err)
			bad = append(bad, badCopy{at, text})
			c.problem("%s", text)
		}
		proved := 0
		for k := range c.set.Copies(at.Device()) {
			err := c.set.ReadCopy(k, at, buf)
			if errors.Is(err, hpdi.ErrNoCopy) {
				continue // or not made equal yet after a crash
			}
			proved++
			if err == nil {
				err = prove()
			}
			if err != nil {
				wrong(err)
			}
		}
		if proved > 0 {
			return bad
		}
		err := c.set.Read(at, buf)
		if err == nil {
			err = prove()
		}
		if err != nil {
			wrong(err)
		}
		return bad
	}
	sb := c.machine.Superblock()
	for i, d := range sb.Devices {
		if d.State == cp.DeviceGone {
			continue
		}
		for _, b := range labelBlocks {
			c.wrong.labels = append(c.wrong.labels, read("label", block.At(i, b), func() error {
				l, err := decodeLabel(buf)
				if err == nil && (l.Pool != sb.Pool || l.Device != d.ID || l.Index != i) {
					err = fmt.Errorf("it is of device %v of pool %v: %w", l.Device, l.Pool, block.ErrCorrupt)
				}
				return err
			})...)
		}
	}
	for _, b := range cp.SuperblockAt(sb.Generation) {
		c.wrong.superblock = append(c.wrong.superblock, read("superblock", block.At(0, b), func() error {
			s, err := cp.DecodeSuperblock(buf)
			if !c.owner && (err == nil && s.Pool == sb.Pool && s.Generation < sb.Generation || errors.Is(err, ondisk.ErrMagic) && sb.Generation <= 2) {
				return nil
			}
			if err == nil && (s.Pool != sb.Pool || s.Generation != sb.Generation) {
				err = fmt.Errorf("it is of generation %d instead of %d: %w", s.Generation, sb.Generation, block.ErrCorrupt)
			}
			return err
		})...)
	}
	return nil
}
