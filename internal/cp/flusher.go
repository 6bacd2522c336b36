package cp

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/planted"
)

// Flusher makes published prefixes of the operation log survive a power cut.
// All flushes that wait while one is under way are served by the next: one
// sequential write and one sync for all of them. The first of them leads: it
// alone waits for the turn, appends, and hands the turn on before it tells the
// others, so that the device has the next append while they reply. Its methods
// may be called concurrently.
//
// The chain of batches in the flush log begins with a consistency point, whose
// record says where. Before the first one since the pool was opened, and when
// the area is full, a flush is served by a consistency point instead.
//
// The turn is held during the I/O of a flush and from the choice of a chain
// position until the commit that carries it is durable. It is a channel and not
// a mutex so that a flush whose client has gone does not wait for it. Readers
// and writers never take it.
type Flusher struct {
	log    *oplog.Log
	commit func(ctx context.Context) error // makes a consistency point
	group  group                           // flushes that wait for the next append

	turn     chan struct{} // holds one token while nobody has the turn
	disk     *oplog.Disk   // of who has the turn, as all below but flushed
	started  bool          // the chain has begun with a durable commit and can go on
	starting bool          // the commit being made begins the chain anew
	pos      oplog.DiskPos // in the newest durable commit
	promised block.Seq     // what flushes, this guest's or an earlier one's, may have promised
	flushed  atomic.Uint64
}

// NewFlusher returns a flusher of log to disk. pos is the position in the flush
// log that the newest durable commit carries. commit makes a consistency point
// of everything published before it was called.
func NewFlusher(log *oplog.Log, disk *oplog.Disk, pos oplog.DiskPos, commit func(ctx context.Context) error) *Flusher {
	// Whoever owned the pool before may have promised all that is in the log.
	f := &Flusher{log: log, disk: disk, pos: pos, promised: log.Head(), commit: commit, turn: make(chan struct{}, 1)}
	if planted.Has(planted.FlushBeforeChain) {
		disk.Reset(log.Epoch(), uint64(log.Epoch())<<40)
		f.flushed.Store(uint64(log.Tail()))
		f.started = true
	}
	f.unlock()
	return f
}

// Flush returns once everything published before the call survives a power cut.
func (f *Flusher) Flush(ctx context.Context) error {
	target := uint64(f.log.Head())
	if f.flushed.Load() >= target {
		return nil
	}
	done, err := f.try(ctx)
	if done || err != nil || f.flushed.Load() >= target {
		return err
	}
	if err := f.commit(ctx); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	return nil
}

// outcome is what an append did for a flush. Without done and without an error
// it could do nothing, and a consistency point must.
type outcome struct {
	done bool
	err  error
}

// errNotLed tells the members of a group whose leader left to try again.
var errNotLed = errors.New("the flush that led this one was given up")

// try flushes by an append to the chain, its own or that of the flush which
// leads the group; done is false when that cannot be.
func (f *Flusher) try(ctx context.Context) (done bool, err error) {
	if planted.Has(planted.FlushCoversLess) && f.started && len(f.turn) == 0 {
		<-f.turn
		f.unlock()
		return true, nil
	}
	for {
		var o outcome
		if m := f.group.join(); m == nil {
			o = f.lead(ctx)
		} else {
			o = f.group.wait(ctx, m)
		}
		if o.err != errNotLed {
			return o.done, o.err
		}
	}
}

// lead waits for the turn and serves all flushes that came meanwhile.
func (f *Flusher) lead(ctx context.Context) outcome {
	select {
	case <-f.turn:
	case <-ctx.Done():
		f.group.tell(f.group.close(), outcome{err: errNotLed})
		return outcome{err: waitEnded(ctx)}
	}
	// Whoever is in the group published before this, and so is covered.
	members := f.group.close()
	o := f.appendLocked()
	f.unlock() // first, so that the next append begins before anybody replies
	f.group.tell(members, o)
	return o
}

// appendLocked appends everything published so far.
func (f *Flusher) appendLocked() outcome {
	if !f.started {
		return outcome{}
	}
	head := f.log.Head()
	switch err := f.disk.Append(f.log, block.Seq(f.flushed.Load()), head); {
	case errors.Is(err, oplog.ErrFull):
		return outcome{}
	case err != nil:
		return outcome{err: fmt.Errorf("flush log positions up to %d: %w", head, err)}
	}
	if f.flushed.Load() < uint64(head) {
		f.flushed.Store(uint64(head))
	}
	f.promised = head
	return outcome{done: true}
}

// Close frees memory; no flush may be under way or come.
func (f *Flusher) Close() error { return f.disk.Close() }

func (f *Flusher) lock()   { <-f.turn }
func (f *Flusher) unlock() { f.turn <- struct{}{} }

// positionLocked returns where the flush log has to be scanned from once
// everything up to seq is committed by point cp.
func (f *Flusher) positionLocked(seq block.Seq, epoch block.Epoch, cp block.CP) oplog.DiskPos {
	switch {
	case f.started:
		return f.disk.Position(seq)
	case seq < f.promised:
		// The old chain still holds what somebody was promised.
		return f.pos
	}
	f.starting = true
	if planted.Has(planted.FlushNonceReused) {
		return f.disk.Reset(epoch, 1)
	}
	return f.disk.Reset(epoch, uint64(epoch)<<40^uint64(cp))
}

// committedLocked says that the commit of seq, with pos, is durable.
func (f *Flusher) committedLocked(seq block.Seq, pos oplog.DiskPos) {
	if f.started = f.started || f.starting; f.started {
		f.disk.Committed(seq, pos)
	}
	f.starting = false
	f.pos = pos
	if f.flushed.Load() < uint64(seq) {
		f.flushed.Store(uint64(seq))
	}
}

// invalidateLocked ends the use of the chain, whose position may not be known
// to any durable commit.
func (f *Flusher) invalidateLocked() { f.started, f.starting = false, false }
