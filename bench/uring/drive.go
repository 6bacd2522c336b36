package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
)

// drive keeps requests in flight until the time is over, and returns how many it has
// completed.
func (r *row) drive(ctx context.Context, q hpdi.Queue, mem []byte, size int64, end time.Time, batch bool) (n int, err error) {
	slots := size / int64(r.bytes)
	rng := rand.New(rand.NewPCG(1, 2))
	ready := make([]*hpdi.Request, r.depth)
	for i := range ready {
		ready[i] = &hpdi.Request{Op: r.op, Vec: [][]byte{mem[i*r.bytes : (i+1)*r.bytes]}}
	}
	done := make([]*hpdi.Request, 0, r.depth)
	for next, flying := int64(0), 0; len(ready) > 0 || flying > 0; {
		for _, req := range ready {
			if next++; r.linear {
				req.Offset = next % slots * int64(r.bytes)
			} else {
				req.Offset = rng.Int64N(slots) * int64(r.bytes)
			}
		}
		step := 1
		if batch {
			step = max(1, len(ready))
		}
		for at := 0; at < len(ready); at += step {
			if err := q.Submit(ready[at : at+step]...); err != nil {
				return n, err
			}
		}
		flying += len(ready)
		if done, err = q.Wait(1, done[:0]); err != nil {
			return n, err
		}
		flying -= len(done)
		n += len(done)
		for _, req := range done {
			if req.Err != nil {
				return n, fmt.Errorf("%s at %d: %w", req.Op, req.Offset, req.Err)
			}
		}
		if ready = done; !time.Now().Before(end) || ctx.Err() != nil {
			ready = nil
		}
	}
	return n, ctx.Err()
}

// fill writes the whole file, so that no row has to allocate.
func fill(path string) error {
	d, err := file.Open(path, file.Options{})
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }() // what matters is that all was written
	q, err := d.NewQueue(4)
	if err != nil {
		return err
	}
	defer func() { _ = q.Close() }()
	mem, err := hpdi.Alloc(1 << 20)
	if err != nil {
		return err
	}
	defer func() { _ = hpdi.Free(mem) }()
	for i := range mem {
		mem[i] = byte(i)
	}
	for off := int64(0); off < d.Info().Size; off += int64(len(mem)) {
		if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Offset: off, Vec: [][]byte{mem[:min(int64(len(mem)), d.Info().Size-off)]}}); err != nil {
			return err
		}
	}
	return hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush})
}
