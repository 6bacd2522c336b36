package cp

import (
	"errors"
	"fmt"
	"math"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
)

// superblockCopies is how many copies there are of each superblock.
const superblockCopies = 2

// SuperblockAt returns the blocks of device 0 that hold the two copies of a
// superblock of the given generation. Generations alternate between two slots;
// the copies of one lie half a MiB apart.
func SuperblockAt(generation uint64) [superblockCopies]uint64 {
	slot := generation % 2
	return [superblockCopies]uint64{1 + slot, 129 + slot}
}

// WriteSuperblock writes both copies of s and syncs all devices: everything
// written before is durable no later than s.
func WriteSuperblock(set *devices.Set, s *Superblock) error {
	buf, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		return err
	}
	defer func() { _ = hpdi.Free(buf) }()
	copy(buf, s.Encode())
	var ios []*devices.IO
	for _, b := range SuperblockAt(s.Generation) {
		ios = append(ios, &devices.IO{Op: hpdi.OpWrite, At: block.At(0, b), Vec: [][]byte{buf}})
	}
	if err := set.Do(ios); err != nil {
		return fmt.Errorf("write superblock of generation %d: %w", s.Generation, err)
	}
	if planted.Has(planted.SuperblockSyncMissing) {
		return nil
	}
	if err := set.Sync(); err != nil {
		return fmt.Errorf("superblock of generation %d: %w", s.Generation, err)
	}
	return nil
}

// ReadSuperblock returns the newest valid superblock of the pool. Copies that
// are damaged or behind are repaired where the device keeps several of each block,
// or else skipped; when none is left the error says what is wrong with each.
func ReadSuperblock(set *devices.Set, pool block.PoolID) (*Superblock, error) {
	buf, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		return nil, err
	}
	defer func() { _ = hpdi.Free(buf) }()
	var newest *Superblock
	var errs []error
	var found []uint64 // generations, of those that are whole
	for generation := range uint64(2) {
		for _, b := range SuperblockAt(generation) {
			if planted.Has(planted.OlderSuperblockWins) && newest != nil {
				continue
			}
			err := set.ReadBest(block.At(0, b), buf, func(buf []byte) uint64 {
				s, err := DecodeSuperblock(buf)
				switch {
				case errors.Is(err, ondisk.ErrVersion):
					return math.MaxUint64
				case err == nil && s.Pool == pool:
					return s.Generation
				}
				return 0
			})
			if err != nil {
				errs = append(errs, err)
				continue
			}
			s, err := DecodeSuperblock(buf)
			switch {
			case errors.Is(err, ondisk.ErrVersion):
				// A newer program wrote here; an older slot must not win.
				return nil, fmt.Errorf("superblock at block %d: %w", b, err)
			case err != nil:
				errs = append(errs, fmt.Errorf("superblock at block %d: %w", b, err))
			case s.Pool != pool:
				errs = append(errs, fmt.Errorf("superblock at block %d is of pool %v: %w", b, s.Pool, block.ErrCorrupt))
			default:
				if found = append(found, s.Generation); newest == nil || s.Generation > newest.Generation {
					newest = s
				}
			}
		}
	}
	if newest == nil {
		return nil, fmt.Errorf("pool %v has no valid superblock: %w", pool, errors.Join(errs...))
	}
	before := 0
	for _, g := range found {
		if g+1 == newest.Generation {
			before++
		}
	}
	newest.Last = before == superblockCopies
	return newest, nil
}
