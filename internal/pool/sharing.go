package pool

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"math"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/region"
)

// DefaultIndexBytes is the memory of an index of fingerprints that nobody has said
// more of: every block of 15 GiB, or one in 128 of a TiB.
const DefaultIndexBytes = 32 << 20

// SetSharing makes a volume share series of at least run blocks with what is stored
// already (THN, 1 to dedup.MaxRun), or, with 0, nothing more. What is stored already
// stays as it is.
func (p *Pool) SetSharing(ctx context.Context, name string, run int) error {
	if err := p.prepareSharing(ctx, name, run); err != nil {
		return err
	}
	return p.alter(ctx, name, func(v *catalogue.Volume) error {
		v.Run = run
		return nil
	})
}

// prepareSharing makes the pool ready for a volume that shares runs of blocks, if it
// does.
func (p *Pool) prepareSharing(ctx context.Context, name string, run int) error {
	switch {
	case run < 0 || run > dedup.MaxRun:
		return fmt.Errorf("volume %q: THN of %d blocks; 1 to %d are possible, 0 shares nothing: %w", name, run, dedup.MaxRun, block.ErrInvalid)
	case run == 0:
		return nil
	}
	return p.do(ctx, p.enableSharing)
}

// enableSharing gives the pool a secret for its fingerprints, and an index.
func (p *Pool) enableSharing() error {
	if sb := p.machine.Superblock(); !sb.Shares() {
		if p.machine.Folding() {
			if err := p.foldAll(); err != nil {
				return err
			}
		}
		var secret [8]byte
		_, _ = rand.Read(secret[:]) // documented never to fail
		if err := p.machine.EnableSharing(dedup.Secret(binary.LittleEndian.Uint64(secret[:]) | 1)); err != nil {
			return err
		}
	}
	return p.makeIndex()
}

// IndexBytes returns how much memory the index of a pool of so many blocks takes where
// limit is OpenOptions.IndexBytes: no more than its blocks need.
func IndexBytes(limit, blocks int64) int64 { return dedup.IndexSize(min(limit, 16*blocks)) }

// IndexMemory returns how much of its region that index takes at most.
func IndexMemory(limit, blocks int64) int64 { return region.SectionMemory(IndexBytes(limit, blocks)) }

// indexSize returns how many bytes the pool's index has with these settings.
func (p *Pool) indexSize(s cp.Settings) int64 {
	limit := int64(min(s.IndexBytes, math.MaxInt64))
	if limit == 0 {
		limit = p.opts.IndexBytes
	}
	if limit == 0 {
		limit = DefaultIndexBytes
	}
	return IndexBytes(limit, p.space.Usage().Total)
}

// makeIndex gives the machine an index, if it has none: one that a guest before has left,
// or else an empty one. Run fills it with what the pool has, see indexer.
func (p *Pool) makeIndex() error {
	if p.machine.Index != nil {
		return nil
	}
	size := p.indexSize(p.machine.Superblock().Settings)
	if x := p.adoptIndex(); x != nil {
		p.machine.AdoptIndex(x)
		p.indexer.begin()
		// The settings may have changed since, or the pool has grown.
		if made, err := p.indexer.other(size); err == nil {
			p.indexer.resize(size, made)
		}
		return nil
	}
	x, err := p.newIndex(size, nil)
	if err != nil {
		return err
	}
	p.machine.Index = x
	p.indexer.begin()
	return nil
}

// loadSharing prepares a pool that has just been opened for sharing. Nothing is lost
// but savings when it fails.
func (p *Pool) loadSharing() {
	if sb := p.machine.Superblock(); !sb.Shares() || p.makeIndex() != nil {
		return
	}
	_ = p.machine.LoadPrints() // those that cannot be read are not found
}
