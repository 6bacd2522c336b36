package hpditest

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"unsafe"

	"github.com/pollux-storage/pollux/hpdi"
)

// aligned says whether p starts at a multiple of n.
func aligned(p []byte, n int) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(p)))%uintptr(n) == 0
}

// testManyInFlight submits far more requests than the queue is deep, in one
// batch and one by one.
func testManyInFlight(t *testing.T, d hpdi.Device) {
	bs := d.Info().BlockSize
	const n = 200
	mem := alloc(t, n*bs)
	for _, depth := range []int{1, 3, 16, 64} {
		q := newQueue(t, d, depth)
		fill(mem, 0, uint64(depth))
		reqs := make([]*hpdi.Request, n)
		for i := range reqs {
			reqs[i] = write(int64(i*bs), mem[i*bs:(i+1)*bs])
			reqs[i].User = i
		}
		if err := q.Submit(reqs[:n/2]...); err != nil {
			t.Fatal(err)
		}
		for _, r := range reqs[n/2:] {
			if err := q.Submit(r); err != nil {
				t.Fatal(err)
			}
		}
		collect(t, q, reqs)
		for i, r := range reqs {
			if r.Err != nil || r.User != i || r.Offset != int64(i*bs) {
				t.Fatalf("request %d came back as %+v", i, r)
			}
			r.Op = hpdi.OpRead
		}
		clear(mem)
		if err := q.Submit(reqs...); err != nil {
			t.Fatal(err)
		}
		collect(t, q, reqs)
		wantFill(t, mem, 0, uint64(depth))
		closeQueue(t, q)
	}
}

func testWaitBounds(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 8)
	defer closeQueue(t, q)
	bs := d.Info().BlockSize
	mem := alloc(t, 8*bs)
	for _, least := range []int{0, 1, 100} {
		done, err := q.Wait(least, nil)
		if err != nil || len(done) != 0 {
			t.Fatalf("wait for %d on an idle queue: %d requests, %v", least, len(done), err)
		}
	}
	reqs := make([]*hpdi.Request, 8)
	for i := range reqs {
		reqs[i] = write(int64(i*bs), mem[i*bs:(i+1)*bs])
	}
	if err := q.Submit(reqs...); err != nil {
		t.Fatal(err)
	}
	// What done holds already stays, and at least min requests come behind it.
	mark := &hpdi.Request{}
	done, err := q.Wait(5, []*hpdi.Request{mark})
	if err != nil || len(done) < 6 || done[0] != mark {
		t.Fatalf("wait for 5 of 8: %d requests, %v", len(done)-1, err)
	}
	// Asking for more than are in flight does not hang.
	for len(done) < 9 {
		if done, err = q.Wait(100, done); err != nil {
			t.Fatal(err)
		}
	}
	if done, err = q.Wait(1, nil); err != nil || len(done) != 0 {
		t.Fatalf("wait after all came back: %d requests, %v", len(done), err)
	}
}

// testMixedInFlight has a large write, flushes and small reads in flight
// together: they complete in any order, each once, with its own result.
func testMixedInFlight(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 64)
	defer closeQueue(t, q)
	bs := d.Info().BlockSize
	small, large := alloc(t, 32*bs), alloc(t, 512*bs)
	fill(small, 0, 1)
	do(t, q, write(0, small))
	clear(small)
	fill(large, int64(32*bs), 2)
	for range 4 {
		reqs := []*hpdi.Request{write(int64(32*bs), large), {Op: hpdi.OpFlush}}
		for i := range 32 {
			reqs = append(reqs, read(int64(i*bs), small[i*bs:(i+1)*bs]))
		}
		reqs = append(reqs, &hpdi.Request{Op: hpdi.OpFlush})
		if err := q.Submit(reqs...); err != nil {
			t.Fatal(err)
		}
		collect(t, q, reqs)
		for _, r := range reqs {
			if r.Err != nil {
				t.Fatalf("%s at %d: %v", r.Op, r.Offset, r.Err)
			}
		}
		wantFill(t, small, 0, 1)
	}
	clear(large)
	do(t, q, read(int64(32*bs), large))
	wantFill(t, large, int64(32*bs), 2)
}

// testQueues runs one goroutine a queue on its own part of the device, and
// all of them read a part that they share.
func testQueues(t *testing.T, d hpdi.Device) {
	const workers, rounds = 4, 25
	bs := d.Info().BlockSize
	part := int64(32 * bs)
	shared := alloc(t, int(part))
	fill(shared, 0, 77)
	q := newQueue(t, d, 1)
	do(t, q, write(0, shared))
	closeQueue(t, q)

	work := func(w int, mem []byte) error {
		q, err := d.NewQueue(8)
		if err != nil {
			return err
		}
		own, common := mem[:part], mem[part:]
		base := part * int64(w+1)
		for round := range rounds {
			v := uint64(w*1000 + round)
			fill(own, base, v)
			var reqs []*hpdi.Request
			for off := int64(0); off < part; off += int64(4 * bs) {
				reqs = append(reqs, write(base+off, own[off:off+int64(4*bs)]))
			}
			if err := hpdi.Do(q, append(reqs, read(0, common))...); err != nil {
				return err
			}
			clear(own)
			if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush}, read(base, own)); err != nil {
				return err
			}
			want := make([]byte, part)
			if fill(want, base, v); string(want) != string(own) {
				return fmt.Errorf("worker %d, round %d: read back something else", w, round)
			}
			if fill(want, 0, 77); string(want) != string(common) {
				return fmt.Errorf("worker %d, round %d: shared part changed", w, round)
			}
		}
		return q.Close()
	}
	var wg sync.WaitGroup
	for w := range workers {
		mem := alloc(t, int(2*part))
		wg.Go(func() {
			if err := work(w, mem); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// testQueueMoves submits on one goroutine and waits on another: a queue
// belongs to one goroutine at a time, not to one for ever.
func testQueueMoves(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 4)
	defer closeQueue(t, q)
	bs := d.Info().BlockSize
	mem := alloc(t, 4*bs)
	fill(mem, 0, 1)
	for i := range 50 {
		r := write(0, mem)
		if i%2 == 1 {
			r.Op = hpdi.OpRead
		}
		var wg sync.WaitGroup
		var err error
		wg.Go(func() { err = q.Submit(r) })
		wg.Wait()
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() { _, err = q.Wait(1, nil) })
		wg.Wait()
		if err != nil || r.Err != nil {
			t.Fatal(err, r.Err)
		}
	}
	wantFill(t, mem, 0, 1)
}

// testCloseQueue closes a queue with requests in flight. They have ended by
// then, whether or not they were waited for.
func testCloseQueue(t *testing.T, d hpdi.Device) {
	bs := d.Info().BlockSize
	mem := alloc(t, 64*bs)
	fill(mem, 0, 3)
	q := newQueue(t, d, 32)
	var reqs []*hpdi.Request
	for i := range 32 {
		reqs = append(reqs, write(int64(2*i*bs), mem[2*i*bs:(2*i+2)*bs]))
	}
	if err := q.Submit(reqs...); err != nil {
		t.Fatal(err)
	}
	closeQueue(t, q)
	for _, r := range reqs {
		if r.Err != nil {
			t.Fatalf("%s at %d: %v", r.Op, r.Offset, r.Err)
		}
	}
	if err := q.Submit(read(0, mem)); !errors.Is(err, hpdi.ErrClosed) {
		t.Errorf("submit on a closed queue: %v, want %v", err, hpdi.ErrClosed)
	}
	if _, err := q.Wait(1, nil); !errors.Is(err, hpdi.ErrClosed) {
		t.Errorf("wait on a closed queue: %v, want %v", err, hpdi.ErrClosed)
	}
	if err := q.Close(); err != nil && !errors.Is(err, hpdi.ErrClosed) {
		t.Errorf("second close of a queue: %v", err)
	}
	q = newQueue(t, d, 1)
	clear(mem)
	do(t, q, read(0, mem))
	wantFill(t, mem, 0, 3)
	closeQueue(t, q)
}

func testCloseDevice(t *testing.T, d hpdi.Device) {
	closeQueue(t, newQueue(t, d, 4))
	if err := d.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
	if q, err := d.NewQueue(1); !errors.Is(err, hpdi.ErrClosed) {
		t.Errorf("queue of a closed device: %v, %v, want %v", q, err, hpdi.ErrClosed)
	}
	if err := d.Close(); err != nil && !errors.Is(err, hpdi.ErrClosed) {
		t.Errorf("second close: %v", err)
	}
}
