package devbench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
)

// worker is one queue and who uses it.
type worker struct {
	o      Options
	q      hpdi.Queue
	calls  chan func() // what its goroutine is to do
	rng    *rand.Rand
	first  int64 // block of the device where the part begins
	blocks int64 // of the part
	next   int64 // block that comes next in sequence
	free   []*piece
	batch  []*hpdi.Request
	done   []*hpdi.Request

	busy    []uint64 // a bit for each block of the part that a request touches
	written []uint32 // by block: the number of the last write, 0 if none; nil without Verify

	latency       histogram
	reads, writes int64
	verified      int64
	err           error
}

// piece is a request and what goes with it.
type piece struct {
	hpdi.Request
	began time.Time
	block int64 // of the part
	buf   []byte
	vec   [1][]byte
}

func newWorker(o Options, i int, blocks int64, mem []byte) *worker {
	w := &worker{
		o: o, rng: rand.New(rand.NewPCG(o.Seed, uint64(i))), first: int64(i) * blocks, blocks: blocks,
		busy: make([]uint64, (blocks+63)/64),
		free: make([]*piece, o.Depth), batch: make([]*hpdi.Request, 0, o.Depth), done: make([]*hpdi.Request, 0, o.Depth),
	}
	if o.Verify {
		w.written = make([]uint32, blocks)
	}
	for i := range w.free {
		p := &piece{buf: mem[i*o.Size:][:o.Size]}
		p.vec[0] = p.buf
		p.User = p
		w.free[i] = p
		// Not of zeroes, which a device may have a shorter way for.
		for j := 0; j+8 <= len(p.buf); j += 8 {
			binary.LittleEndian.PutUint64(p.buf[j:], w.rng.Uint64())
		}
	}
	return w
}

// run keeps requests in flight until the time is over.
func (w *worker) run(ctx context.Context, began time.Time) error {
	var begun int64
	var failed error
	most := w.o.Requests / int64(w.o.Queues)
	if w.o.Requests > 0 && w.first/w.blocks < w.o.Requests%int64(w.o.Queues) {
		most++
	}
	for {
		now := time.Now()
		over := failed != nil || ctx.Err() != nil || w.o.Time > 0 && now.Sub(began) >= w.o.Time
		w.batch = w.batch[:0]
		for !over && len(w.free) > 0 && (w.o.Requests == 0 || begun < most) {
			p := w.free[len(w.free)-1]
			w.free = w.free[:len(w.free)-1]
			w.prepare(p, now)
			w.batch = append(w.batch, &p.Request)
			begun++
		}
		if len(w.batch) > 0 {
			if err := w.q.Submit(w.batch...); err != nil {
				return err
			}
		}
		if len(w.free) == w.o.Depth {
			if failed == nil && w.o.Time == 0 {
				failed = ctx.Err() // it was to do all of them
			}
			return failed
		}
		if err := w.collect(&failed); err != nil {
			return err
		}
	}
}

// collect waits for requests and takes them back.
func (w *worker) collect(failed *error) error {
	var err error
	if w.done, err = w.q.Wait(1, w.done[:0]); err != nil {
		return err
	}
	now := time.Now()
	for _, r := range w.done {
		p := r.User.(*piece)
		w.latency.add(now.Sub(p.began))
		if r.Op == hpdi.OpRead {
			w.reads++
		} else {
			w.writes++
		}
		if *failed == nil && r.Err != nil {
			*failed = fmt.Errorf("%s of %d bytes at %d: %w", r.Op, w.o.Size, r.Offset, r.Err)
		}
		if *failed == nil && r.Op == hpdi.OpRead {
			*failed = w.check(p)
		}
		w.busy[p.block/64] &^= 1 << (p.block % 64)
		w.free = append(w.free, p)
	}
	return nil
}

// prepare makes a piece the next request. No other one touches its block.
func (w *worker) prepare(p *piece, now time.Time) {
	op := hpdi.OpRead
	switch w.o.Mode {
	case Write, RandWrite:
		op = hpdi.OpWrite
	case RandRW:
		if w.rng.Uint64()&1 == 0 {
			op = hpdi.OpWrite
		}
	}
	b := w.next
	if w.o.Mode != Read && w.o.Mode != Write {
		b = w.rng.Int64N(w.blocks)
	}
	for w.busy[b/64]>>(b%64)&1 != 0 {
		b = (b + 1) % w.blocks // there are more blocks than pieces
	}
	w.busy[b/64] |= 1 << (b % 64)
	w.next = (b + 1) % w.blocks
	p.block, p.began = b, now
	p.Request = hpdi.Request{Op: op, Offset: (w.first + b) * int64(w.o.Size), Vec: p.vec[:], User: p, Durable: w.o.Durable && op == hpdi.OpWrite}
	if op == hpdi.OpWrite && w.written != nil {
		w.written[b]++
		w.stamp(p.buf, p.Offset, w.written[b])
	}
}

// stampEvery is how far apart the words are that say what a block is.
const stampEvery = 512

// stamp makes each part of a buffer say where it belongs and which write it is of.
func (w *worker) stamp(buf []byte, off int64, n uint32) {
	for i := 0; i < len(buf); i += stampEvery {
		binary.LittleEndian.PutUint64(buf[i:], uint64(off)+uint64(i))
		binary.LittleEndian.PutUint64(buf[i+8:], w.o.Seed^uint64(n))
	}
}

// check compares what was read with what was written, if anything was.
func (w *worker) check(p *piece) error {
	if w.written == nil || w.written[p.block] == 0 {
		return nil
	}
	for i := 0; i < len(p.buf); i += stampEvery {
		at, n := binary.LittleEndian.Uint64(p.buf[i:]), binary.LittleEndian.Uint64(p.buf[i+8:])
		if want := uint64(p.Offset) + uint64(i); at != want || n != w.o.Seed^uint64(w.written[p.block]) {
			return fmt.Errorf("%w: at %d, where write %d was the last, is what write %d brought to %d", ErrWrong, want, w.written[p.block], n^w.o.Seed, at)
		}
	}
	return nil
}

// prove reads all blocks that were written.
func (w *worker) prove(ctx context.Context) error {
	for b := int64(0); ; {
		w.batch = w.batch[:0]
		for ; b < w.blocks && len(w.batch) < w.o.Depth; b++ {
			if w.written[b] == 0 {
				continue
			}
			p := w.free[len(w.batch)]
			p.block = b
			p.Request = hpdi.Request{Op: hpdi.OpRead, Offset: (w.first + b) * int64(w.o.Size), Vec: p.vec[:], User: p}
			w.batch = append(w.batch, &p.Request)
		}
		if len(w.batch) == 0 {
			return nil
		}
		if err := errors.Join(ctx.Err(), hpdi.Do(w.q, w.batch...)); err != nil {
			return fmt.Errorf("verify: %w", err)
		}
		for _, r := range w.batch {
			if err := w.check(r.User.(*piece)); err != nil {
				return err
			}
			w.verified += int64(w.o.Size)
		}
	}
}
