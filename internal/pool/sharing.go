package pool

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/dedup"
)

// DefaultIndexBytes is the memory of an index of fingerprints that nobody has said
// more of: every block of 16 GiB, or one in 64 of a TiB.
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

// makeIndex gives the machine an index, if it has none. Run fills it with what the
// pool has, see indexer.
func (p *Pool) makeIndex() error {
	if p.machine.Index != nil {
		return nil
	}
	limit := p.opts.IndexBytes
	if limit == 0 {
		limit = DefaultIndexBytes
	}
	x, err := dedup.NewIndex(IndexBytes(limit, p.space.Usage().Total))
	if err != nil {
		return err
	}
	p.machine.Index, p.indexer = x, indexer{}
	p.index.set(x)
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

// indexer goes through the fingerprints that are stored, in the background: when the
// index is new, and whenever it is full of what may not be true any more.
type indexer struct {
	begun bool
	place cp.PrintPlace
	done  bool
	next  time.Time
}

// Each step of an indexer reads indexPages pages of 256 leaves, and it rests for
// indexRest times as long as the step took.
const (
	indexPages = 1
	indexRest  = 3
)

// work carries out a step, unless clients need what it would take.
func (x *indexer) work(p *Pool, now time.Time) {
	if p.machine.Index == nil || now.Before(x.next) || p.pressed() {
		return
	}
	if x.done {
		if !p.machine.Index.Full() {
			return
		}
		*x = indexer{}
	}
	x.step(p)
	end := time.Now()
	x.next = end.Add(indexRest * end.Sub(now))
}

// step begins a round, when no fold is under way, or goes on with it.
func (x *indexer) step(p *Pool) {
	m := p.machine
	switch {
	case x.begun:
		x.place, x.done = m.IndexFrom(x.place, indexPages)
	case !m.Folding():
		m.IndexBegin()
		x.begun = true
	}
	p.index.set(m.Index)
}

// indexFigures are those of the index that Stats tells, from other goroutines than
// Run's.
type indexFigures struct{ bytes, entries atomic.Int64 }

func (f *indexFigures) set(x *dedup.Index) {
	if x != nil {
		s := x.Stats()
		f.bytes.Store(s.Bytes)
		f.entries.Store(int64(s.Entries))
	}
}

// IndexAll makes the index one of everything that is stored, at once.
func (p *Pool) IndexAll(ctx context.Context) error {
	return p.do(ctx, func() error {
		if p.machine.Index == nil {
			return nil
		}
		if p.machine.Folding() {
			if err := p.foldAll(); err != nil {
				return err
			}
		}
		for x := &p.indexer; !x.done; {
			x.step(p)
		}
		return nil
	})
}
