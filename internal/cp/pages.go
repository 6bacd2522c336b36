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

// pageWriter stores the new metadata pages of one fold.
type pageWriter struct {
	m     *Machine
	fold  *fold
	birth block.CP
	buf   []byte // of a batch, from the first page on
	ios   []*devices.IO
	all   [pageBatch]devices.IO // what ios are part of
	vecs  [pageBatch][1][]byte
	spare []space.Run // allocated, not yet used
	taken []space.Run
	freed []space.Run
}

// WritePage implements blockmap.PageWriter.
func (w *pageWriter) WritePage(page []byte) (block.Pointer, error) {
	if w.buf == nil {
		buf, err := hpdi.Alloc(pageBatch * block.Size)
		if err != nil {
			return block.Pointer{}, fmt.Errorf("metadata page: %w", err)
		}
		w.buf = buf
	}
	at, err := w.allocate()
	if err != nil {
		return block.Pointer{}, err
	}
	p := block.Pointer{Phys: at, Birth: w.birth, Sum: ondisk.CRC(page)}
	frame := w.buf[len(w.ios)*block.Size:][:block.Size]
	copy(frame, page)
	w.m.Reader.Put(p, frame)
	n := len(w.ios)
	w.vecs[n][0] = frame
	w.all[n] = devices.IO{Op: hpdi.OpWrite, At: at, Vec: w.vecs[n][:]}
	w.ios = append(w.ios, &w.all[n])
	if len(w.ios) == pageBatch {
		return p, w.flush()
	}
	return p, nil
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
	w.ios = w.ios[:0]
	if planted.Has(planted.IgnoredPageWriteError) {
		return nil
	}
	return err
}

// finish writes what is left and returns the unused blocks.
func (w *pageWriter) finish() error {
	spare := w.spare
	w.spare = nil
	for _, r := range spare {
		if err := w.m.Space.Dec(r); err != nil {
			return err
		}
	}
	return w.flush()
}

// discard frees everything that was taken.
func (w *pageWriter) discard() error {
	var err error
	for _, r := range append(w.taken, w.spare...) {
		err = errors.Join(err, w.m.Space.Dec(r))
	}
	w.taken, w.spare, w.ios = nil, nil, nil
	return errors.Join(err, w.close())
}

func (w *pageWriter) close() error {
	buf := w.buf
	w.buf = nil
	return hpdi.Free(buf)
}
