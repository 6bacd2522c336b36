package volume

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/internal/block"
)

// Reading ahead: a client that reads a volume in order finds its next blocks in
// the cache instead of waiting for the device once a request, and the device
// has few large requests instead of many small ones.
//
// A stream is believed once three requests followed each other of which the
// first was not in memory: random reads, and reads of what the cache holds,
// start none. Its window is 128 KiB at first and doubles each time that half of
// it has been used up, to 2 MiB. A goroutine for each stream fills the window
// piece by piece and ends when it is full: so reading ahead ends by itself when
// the client stops or goes elsewhere. Whoever wants what is under way waits for
// it instead of reading it twice. What was fetched is only offered to the cache,
// which keeps it behind what is read often.
const (
	streams     = 8 // followed at once in a volume; beyond that the least recently used is forgotten
	believed    = 3 // requests in a row that make a stream
	windowLeast = 128 << 10
	windowMost  = 2 << 20
	aheadPiece  = chunk * block.Size // one request of a device
	fillers     = 16                 // goroutines, and so pieces under way, in a pool
	// slack is how far from where it is expected a request of a stream may
	// come: several connections of one client do not keep their order.
	slack = 256 << 10
	// patience is how many other requests make a stream that stands still
	// forgotten.
	patience = 4096
)

// ahead is what a volume knows of its sequential readers.
type ahead struct {
	active atomic.Int32 // streams that are believed; without any, hits take no lock

	mu    sync.Mutex // guards what follows; nobody waits under it
	table [streams]stream
	tick  uint64 // counts requests
}

// stream is one sequential reader. Positions are bytes in the volume.
type stream struct {
	next    int64  // where the following request is expected
	run     int    // requests that followed each other; 0 is an unused stream
	used    uint64 // tick of the last of them
	window  int64
	filling bool          // it has a goroutine
	done    int64         // up to here was fetched
	upTo    int64         // the piece under way ends here
	piece   chan struct{} // closed when it has ended; nil when none is under way
}

// saw notes a read that was asked for, in the order in which clients ask, and
// reads ahead. missed says that memory could not answer it.
func (v *Volume) saw(off, n int64, missed bool) {
	a := &v.ahead
	if !missed && a.active.Load() == 0 {
		return
	}
	if s := a.note(off, n, missed); s != nil {
		if v.filling.Add(1) > fillers {
			v.filling.Add(-1)
			a.end(s) // a later request will try again
			return
		}
		go v.fill(s) // ends by itself, and before the gate is closed
	}
}

// note returns a stream that wants a goroutine, if the request makes one.
func (a *ahead) note(off, n int64, missed bool) *stream {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.tick++
	s := a.findLocked(off)
	if s == nil {
		a.ageLocked()
		if missed {
			a.beginLocked(off + n)
		}
		return nil
	}
	s.used, s.next = a.tick, max(s.next, off+n)
	if s.run++; s.run == believed {
		a.active.Add(1)
	}
	if s.run < believed || s.filling || s.done-s.next > s.window/2 {
		return nil
	}
	s.filling = true
	return s
}

// findLocked returns the stream that a request at off goes on with, or nil.
func (a *ahead) findLocked(off int64) *stream {
	for i := range a.table {
		s := &a.table[i]
		if s.run > 0 && s.next == off || s.run >= believed && off > s.next-slack && off < s.next+slack {
			return s
		}
	}
	return nil
}

// ageLocked forgets streams that stand still, so that they cost nothing.
func (a *ahead) ageLocked() {
	for i := range a.table {
		if s := &a.table[i]; s.run >= believed && !s.filling && a.tick-s.used > patience {
			a.active.Add(-1)
			*s = stream{}
		}
	}
}

// beginLocked begins a stream in place of the least recently used one that has
// no goroutine.
func (a *ahead) beginLocked(next int64) {
	var oldest *stream
	for i := range a.table {
		s := &a.table[i]
		if !s.filling && (oldest == nil || s.used < oldest.used) {
			oldest = s
		}
	}
	if oldest == nil {
		return
	}
	if oldest.run >= believed {
		a.active.Add(-1)
	}
	*oldest = stream{next: next, run: 1, used: a.tick, window: windowLeast / 2}
}

// end takes the goroutine from a stream.
func (a *ahead) end(s *stream) {
	a.mu.Lock()
	s.filling = false
	a.mu.Unlock()
}

// advance ends the piece under way and begins the next; without one it ends
// the filling.
func (a *ahead) advance(s *stream, size int64) (from, to int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s.piece != nil {
		close(s.piece)
		s.piece, s.done = nil, s.upTo
	}
	if s.done-s.next <= s.window/2 {
		s.window = min(2*s.window, windowMost)
	}
	from = max(s.done, s.next) &^ (block.Size - 1)
	to = min(from+aheadPiece, size, s.next+s.window)
	if to <= from || to < size && to-from < min(aheadPiece, s.window/4) {
		s.filling = false // what is left of the window waits to become a large request
		return from, from
	}
	s.piece, s.done, s.upTo = make(chan struct{}), from, to
	return from, to
}

// fill fetches until the window of s is full.
func (v *Volume) fill(s *stream) {
	defer v.filling.Add(-1)
	if v.enter("read ahead", 0, 0) != nil {
		v.ahead.end(s)
		return
	}
	defer v.Gate.Exit()
	var ptrs [chunk]block.Pointer
	for {
		from, to := v.ahead.advance(s, v.size.Load())
		if to == from {
			return
		}
		// An error is for whoever wants the block.
		want := ptrs[:(to-from+block.Size-1)/block.Size]
		if !v.closed.Load() && v.Map.Lookup(v.id, block.Logical(from/block.Size), want) == nil {
			v.Reader.Prefetch(want)
		}
	}
}

// await waits while a part of the range is being fetched.
func (a *ahead) await(ctx context.Context, off, n int64) error {
	if a.active.Load() == 0 {
		return nil
	}
	piece := a.under(off, n)
	if piece == nil {
		return nil
	}
	select {
	case <-piece:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// under returns the end of a piece under way that has a part of the range.
func (a *ahead) under(off, n int64) chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := range a.table {
		if s := &a.table[i]; s.piece != nil && off < s.upTo && off+n > s.done {
			return s.piece
		}
	}
	return nil
}
