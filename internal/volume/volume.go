// Package volume reads and writes one volume: it is where requests of any
// alignment meet blocks. It implements [block.Volume].
//
// A block is looked for in the dirty index, then in the map; what the map
// points at, in the cache, then on the devices. No lock is held across these
// steps and none is needed: a block that leaves the dirty index is in the map
// before, and pointers that have become stale show by the checksum, whereupon
// the look-up starts again.
//
// Nor are there range locks. A write of whole blocks is ordered by its
// publication. A write of part of a block takes the rest from the dirty index
// in the same critical section in which it is published; a rest that is only
// on the devices is read before, and the publication is refused and repeated
// if a consistency point came between. So two writers to different parts of a
// block never undo each other, and nobody waits for a device under a lock.
//
// Reads in order are noticed, and what follows is fetched into the cache before
// it is asked for; see ahead.go.
//
// Locks: ahead.mu is a leaf.
package volume

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockio"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/dirty"
	"github.com/pollux-storage/pollux/internal/session"
)

// Store is what all volumes of a pool share.
type Store struct {
	Dirty  *dirty.Set
	Map    *blockmap.Map
	Reader *blockio.Reader
	Gate   *Gate
	// Sessions keeps those of clients that send requests again; nil where there are none.
	Sessions *session.Table
	// Flush makes everything published survive a power cut.
	Flush func(ctx context.Context) error
	// Relieve frees what space it can: it is called before a write is refused
	// for lack of it.
	Relieve func(ctx context.Context) error

	filling atomic.Int32 // goroutines that read ahead, of all volumes
}

// Volume is one volume. Its methods may be called concurrently.
type Volume struct {
	*Store
	id     block.VolumeID
	size   atomic.Int64
	name   atomic.Pointer[string]
	closed atomic.Bool
	print  atomic.Pointer[func([]byte) uint64]
	ahead  ahead
}

var _ block.Volume = (*Volume)(nil)

// New returns the volume id of a store.
func New(s *Store, id block.VolumeID, name string, size int64) *Volume {
	v := &Volume{Store: s, id: id}
	v.Set(name, size)
	return v
}

// Set changes name and size, which must not shrink.
func (v *Volume) Set(name string, size int64) {
	v.name.Store(&name)
	v.size.Store(size)
}

// SetPrint sets what computes the fingerprints of blocks that are received; nil for a
// volume that shares nothing.
func (v *Volume) SetPrint(print func(block []byte) uint64) {
	if print == nil {
		v.print.Store(nil)
		return
	}
	v.print.Store(&print)
}

// Close makes all further requests fail with block.ErrClosed.
func (v *Volume) Close() { v.closed.Store(true) }

// Info implements block.Volume.
func (v *Volume) Info() block.VolumeInfo {
	return block.VolumeInfo{ID: v.id, Name: *v.name.Load(), Size: v.size.Load()}
}

// OpenSession implements block.Volume.
func (v *Volume) OpenSession(ctx context.Context, id block.SessionID, queues, slots int) (block.Session, error) {
	if err := v.enter("session", 0, 0); err != nil {
		return nil, err
	}
	defer v.Gate.Exit()
	if v.Sessions == nil {
		return nil, fmt.Errorf("sessions of volume %s: %w", *v.name.Load(), block.ErrUnsupported)
	}
	s, err := v.Sessions.Open(ctx, v.Info(), id, queues, slots, v.Dirty.Head)
	if err != nil {
		return nil, err
	}
	v.Dirty.AllowTags()
	return s, nil
}

// enter begins a request on a range and must be followed by Gate.Exit if it
// returns nil.
func (v *Volume) enter(what string, off, n int64) error {
	if off < 0 || n < 0 || off > v.size.Load()-n {
		return fmt.Errorf("%s of %d bytes at %d beyond the %d of volume %s: %w", what, n, off, v.size.Load(), *v.name.Load(), block.ErrInvalid)
	}
	if v.closed.Load() || !v.Gate.Enter() {
		return fmt.Errorf("volume %s: %w", *v.name.Load(), block.ErrClosed)
	}
	return nil
}

// Flush implements block.Volume.
func (v *Volume) Flush(ctx context.Context) error {
	if err := v.enter("flush", 0, 0); err != nil {
		return err
	}
	defer v.Gate.Exit()
	return v.Store.Flush(ctx)
}

// Gate counts the requests under way in a pool, so that its memory is not
// unmapped under them. The zero Gate is open.
type Gate struct {
	n    atomic.Int64
	once sync.Once
	idle chan struct{}
	mu   sync.Mutex // guards the making of idle
}

const gateClosed = -1 << 62

// Enter returns false once the gate is closed; otherwise Exit must follow.
func (g *Gate) Enter() bool {
	if g.n.Add(1) > 0 {
		return true
	}
	g.Exit()
	return false
}

// Exit ends what Enter began.
func (g *Gate) Exit() {
	if g.n.Add(-1) == gateClosed {
		g.once.Do(func() { close(g.channel()) })
	}
}

func (g *Gate) channel() chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.idle == nil {
		g.idle = make(chan struct{})
	}
	return g.idle
}

// Close lets nobody in any more and returns a channel that is closed when all
// are out. It must be called once.
func (g *Gate) Close() <-chan struct{} {
	if g.n.Add(gateClosed) == gateClosed {
		g.once.Do(func() { close(g.channel()) })
	}
	return g.channel()
}
