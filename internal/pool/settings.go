package pool

import (
	"context"
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/dedup"
)

// SettingsChange says what of a pool's settings changes; what is nil stays.
type SettingsChange struct {
	// IndexBytes is the memory of the index of fingerprints, of which it uses a power of
	// two and no more than its blocks need; 0 leaves it to OpenOptions.
	IndexBytes *int64
	// Threshold is cp.Settings.Threshold; 0 is cp.DefaultThreshold.
	Threshold *int
}

// apply returns what becomes of settings, or why that is impossible.
func (c SettingsChange) apply(s cp.Settings) (cp.Settings, error) {
	if n := c.IndexBytes; n != nil {
		if *n != 0 && *n < dedup.MinIndex {
			return s, fmt.Errorf("an index of fingerprints of %d bytes; %d are the least, 0 leaves it to the guest: %w", *n, dedup.MinIndex, block.ErrInvalid)
		}
		s.IndexBytes = uint64(*n)
	}
	if n := c.Threshold; n != nil {
		if *n < 0 || *n > cp.MaxThreshold {
			return s, fmt.Errorf("a threshold of %d places; 1 to %d are possible, 0 is the default, %d: %w", *n, cp.MaxThreshold, cp.DefaultThreshold, block.ErrInvalid)
		}
		s.Threshold = uint8(*n)
	}
	return s, nil
}

// Settings returns the settings that are kept with the pool.
func (p *Pool) Settings() cp.Settings { return *p.settings.Load() }

// SetSettings changes settings that are kept with the pool. An index that is to have
// another size is made anew in the background; until it has what is stored, both take
// memory. Where there is no memory for it nothing changes.
func (p *Pool) SetSettings(ctx context.Context, c SettingsChange) error {
	return p.do(ctx, func() error {
		if err := p.changeSettings(c); err != nil {
			return fmt.Errorf("pool %s: %w", p.label.Name, err)
		}
		return nil
	})
}

func (p *Pool) changeSettings(c SettingsChange) error {
	sb := p.machine.Superblock()
	s, err := c.apply(sb.Settings)
	if err != nil {
		return err
	}
	size := p.indexSize(s)
	var made *dedup.Index
	if sb.Shares() {
		if made, err = p.indexer.other(size); err != nil {
			return fmt.Errorf("%w; it keeps the index that it has", err)
		}
	}
	if s != sb.Settings {
		if err := p.storeSettings(s); err != nil {
			if made != nil {
				err = errors.Join(err, made.Close())
			}
			return err
		}
	}
	if sb.Shares() {
		p.indexer.resize(size, made)
	}
	return nil
}

// storeSettings makes settings durable.
func (p *Pool) storeSettings(s cp.Settings) error {
	if p.machine.Folding() { // it would write a superblock with those before
		if err := p.foldAll(); err != nil {
			return err
		}
	}
	if err := p.machine.Rewrite(func(sb *cp.Superblock) { sb.Settings = s }); err != nil {
		return err
	}
	p.settings.Store(&s)
	return nil
}
