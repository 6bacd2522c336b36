package cp

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/space"
)

// Pages are written in batches of so many, and allocated as many at a time.
const pageBatch = 256

// twinBatch is how many pages with twins are allocated at a time: a fold has few.
const twinBatch = 16

// pageWriter stores the new metadata pages of one fold.
type pageWriter struct {
	m     *Machine
	fold  *fold
	birth block.CP
	buf   []byte // of a batch, from the first page on
	pages int    // in it
	ios   []*devices.IO
	all   [2 * pageBatch]devices.IO // what ios are part of
	vecs  [pageBatch][1][]byte
	spare []space.Run  // allocated, not yet used
	pairs []space.Pair // the same, with twins
	alone bool         // there was no room for twins, or it is not wanted
	// settled says that there is a place among spare or pairs for each page.
	settled bool
	taken   []space.Run
	freed   []space.Run
	// Twins lie together as their pages do, and make runs of their own.
	twinsTaken, twinsFreed []space.Run
}

// WritePage implements blockmap.PageWriter.
func (w *pageWriter) WritePage(page []byte, twin bool) (block.Pointer, error) {
	if w.buf == nil {
		buf, err := hpdi.AllocPrivate(pageBatch * block.Size)
		if err != nil {
			return block.Pointer{}, fmt.Errorf("metadata page: %w", err)
		}
		w.buf = buf
	}
	p, ok := w.allocateTwins(twin)
	if !ok {
		var err error
		if p.Phys, err = w.allocate(); err != nil {
			return block.Pointer{}, err
		}
	}
	p.Birth, p.Sum = w.birth, ondisk.CRC(page)
	frame := w.buf[w.pages*block.Size:][:block.Size]
	copy(frame, page)
	w.m.Reader.Put(p, frame)
	w.vecs[w.pages][0] = frame
	w.write(p.Phys)
	if p.Twin != 0 && !planted.Has(planted.TwinNotWritten) {
		w.write(p.Second().Phys)
	}
	if w.pages++; w.pages == pageBatch {
		return p, w.flush()
	}
	return p, nil
}

// write adds a write of the batch's newest page to it.
func (w *pageWriter) write(at block.Physical) {
	io := &w.all[len(w.ios)]
	*io = devices.IO{Op: hpdi.OpWrite, At: at, Vec: w.vecs[w.pages][:]}
	w.ios = append(w.ios, io)
}

// allocateTwins returns a free block with a free one for its twin, where one is wanted
// and there is room. Devices that keep copies need none.
func (w *pageWriter) allocateTwins(wanted bool) (p block.Pointer, ok bool) {
	if !wanted || w.alone {
		return p, false
	}
	if len(w.pairs) == 0 && !w.settled {
		w.pairs = w.pairsOf(twinBatch)
	}
	if w.alone = len(w.pairs) == 0; w.alone {
		return p, false
	}
	r := &w.pairs[0]
	p.Phys, p.Twin = r.At, r.Twin
	if r.At, r.N = r.At+1, r.N-1; r.N == 0 {
		w.pairs = w.pairs[1:]
	}
	w.taken = addRun(w.taken, p.Phys)
	if !planted.Has(planted.TwinNotCounted) {
		w.twinsTaken = addRun(w.twinsTaken, p.Second().Phys)
	}
	return p, true
}

// pairsOf allocates up to n blocks with twins.
func (w *pageWriter) pairsOf(n int) []space.Pair {
	pairs := w.m.Space.AllocTwins(n, func(dev int) bool { return w.m.Devices.LeastCopies(dev) == 1 })
	for _, p := range pairs {
		w.m.unprint(p.Run)
		w.m.unprint(p.Second())
	}
	return pairs
}

// allocate returns a free block. Pages lie together because they are allocated
// together; where the pool is nearly full it takes them one by one.
func (w *pageWriter) allocate() (block.Physical, error) {
	if n := len(w.freed) - 1; planted.Has(planted.ReuseBeforeCommit) && n >= 0 {
		r := &w.freed[n]
		if r.N--; r.N == 0 {
			w.freed = w.freed[:n]
		}
		return r.At + block.Physical(r.N), nil
	}
	if len(w.spare) == 0 {
		var err error
		if w.spare, err = w.m.Space.Alloc(pageBatch/4, nil); err != nil {
			if w.spare, err = w.m.Space.Alloc(1, nil); err != nil {
				return 0, fmt.Errorf("metadata page: %w", err)
			}
		}
		for _, r := range w.spare {
			w.m.unprint(r)
		}
	}
	r := &w.spare[0]
	at := r.At
	if r.At, r.N = r.At+1, r.N-1; r.N == 0 {
		w.spare = w.spare[1:]
	}
	w.taken = addRun(w.taken, at)
	return at, nil
}

// FreePage implements blockmap.PageWriter.
func (w *pageWriter) FreePage(p block.Pointer) error {
	if planted.Has(planted.FreedAtFoldBegin) {
		return w.m.Space.Dec(space.Run{At: p.Phys, N: 1})
	}
	w.freed = addRun(w.freed, p.Phys)
	if p.Twin != 0 {
		w.twinsFreed = addRun(w.twinsFreed, p.Second().Phys)
	}
	if moves := w.fold.frozen.Moves; moves != nil && moves(p) {
		w.fold.moving--
	}
	return nil
}

// addRun adds a block to runs, joining it with the last one where that stays
// on one track.
func addRun(runs []space.Run, at block.Physical) []space.Run {
	if n := len(runs) - 1; n >= 0 && runs[n].At+block.Physical(runs[n].N) == at && at.Block()%block.TrackBlocks != 0 {
		runs[n].N++
		return runs
	}
	return append(runs, space.Run{At: at, N: 1})
}

func (w *pageWriter) flush() error {
	err := w.m.Devices.Do(w.ios)
	w.ios, w.pages = w.ios[:0], 0
	if planted.Has(planted.IgnoredPageWriteError) {
		return nil
	}
	return err
}

// finish writes what is left and returns the unused blocks.
func (w *pageWriter) finish() error {
	for _, r := range w.unused() {
		if err := w.m.Space.Dec(r); err != nil {
			return err
		}
	}
	return w.flush()
}

// unused returns what was allocated and not used, and forgets it.
func (w *pageWriter) unused() []space.Run {
	runs := w.spare
	for _, p := range w.pairs {
		runs = append(runs, p.Run, p.Second())
	}
	w.spare, w.pairs = nil, nil
	return runs
}

// allTaken and allFreed return the blocks of pages and of their twins.
func (w *pageWriter) allTaken() []space.Run { return append(w.taken, w.twinsTaken...) }
func (w *pageWriter) allFreed() []space.Run { return append(w.freed, w.twinsFreed...) }

// discard frees everything that was taken.
func (w *pageWriter) discard() error {
	var err error
	for _, r := range append(w.allTaken(), w.unused()...) {
		err = errors.Join(err, w.m.Space.Dec(r))
	}
	w.taken, w.twinsTaken, w.ios, w.pages = nil, nil, nil, 0
	return errors.Join(err, w.close())
}

func (w *pageWriter) close() error {
	buf := w.buf
	w.buf = nil
	return hpdi.Free(buf)
}
