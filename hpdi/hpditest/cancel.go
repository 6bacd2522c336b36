package hpditest

import (
	"errors"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
)

// testCancelNothing cancels what is not in flight: nothing comes of it.
func testCancelNothing(t *testing.T, d hpdi.Device) {
	q, other := newQueue(t, d, 4), newQueue(t, d, 4)
	defer closeQueue(t, q)
	defer closeQueue(t, other)
	bs := d.Info().BlockSize
	mem := alloc(t, 4*bs)
	fill(mem, 0, 1)
	q.Cancel()
	r := write(0, mem)
	q.Cancel(r) // not submitted
	do(t, q, r)
	q.Cancel(r, r) // complete
	if err := other.Submit(r); err != nil {
		t.Fatal(err)
	}
	q.Cancel(r) // of another queue
	collect(t, other, []*hpdi.Request{r})
	if r.Err != nil {
		t.Errorf("a request that a stranger cancels: %v", r.Err)
	}
	if done, err := q.Wait(0, nil); err != nil || len(done) != 0 {
		t.Errorf("%d requests come of cancelling nothing, %v", len(done), err)
	}
	clear(mem)
	do(t, q, read(0, mem))
	wantFill(t, mem, 0, 1)
}

// testCancel cancels requests at any moment of their lives. Each comes back once, and
// whatever it was then, nobody touches its memory any more.
func testCancel(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 16)
	defer closeQueue(t, q)
	bs := d.Info().BlockSize
	const n, size = 32, 4
	mem := alloc(t, n*size*bs)
	fill(mem, 0, 7)
	do(t, q, write(0, mem))
	canceled := 0
	for round := range 30 {
		reqs := make([]*hpdi.Request, n)
		for i := range reqs {
			off := int64(i * size * bs)
			reqs[i] = read(off, mem[off:off+int64(size*bs)])
			if (i+round)%3 == 0 {
				fill(reqs[i].Vec[0], off, 7)
				reqs[i].Op = hpdi.OpWrite
			} else {
				clear(reqs[i].Vec[0])
			}
		}
		if err := q.Submit(reqs[:n/2]...); err != nil {
			t.Fatal(err)
		}
		q.Cancel(reqs[round%8 : n/2]...)
		if err := q.Submit(reqs[n/2:]...); err != nil {
			t.Fatal(err)
		}
		q.Cancel(reqs[n/2:]...)
		q.Cancel(reqs...) // again
		collect(t, q, reqs)
		for i, r := range reqs {
			switch {
			case r.Err == nil:
				wantFill(t, r.Vec[0], int64(i*size*bs), 7)
			case errors.Is(r.Err, hpdi.ErrCanceled) && d.Info().Cancel != hpdi.CancelNone:
				canceled++
			default:
				t.Fatalf("a cancelled %s (%s are reached): %v", r.Op, d.Info().Cancel, r.Err)
			}
		}
		guard(mem)
		do(t, q, &hpdi.Request{Op: hpdi.OpFlush})
		wantGuard(t, mem)
	}
	t.Logf("%d of %d requests ended as cancelled", canceled, 30*n)
	do(t, q, read(0, mem))
	wantFill(t, mem, 0, 7) // each write that ran wrote the same
}

// guard fills memory with what no device holds.
func guard(mem []byte) {
	for i := range mem {
		mem[i] = 0xa5
	}
}

// wantGuard fails the test if somebody has written to memory since guard.
func wantGuard(t *testing.T, mem []byte) {
	t.Helper()
	for i, b := range mem {
		if b != 0xa5 {
			t.Fatalf("byte %d of memory that is the application's again was changed to %#x", i, b)
		}
	}
}

// testDeadline has deadlines that have passed, that pass meanwhile, and that do not.
func testDeadline(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 16)
	defer closeQueue(t, q)
	info := d.Info()
	bs := info.BlockSize
	mem := alloc(t, 64*bs)
	fill(mem, 0, 2)
	do(t, q, write(0, mem))
	late := write(0, mem)
	late.Deadline = time.Now().Add(-time.Second)
	if err := q.Submit(late); err != nil {
		t.Fatal(err)
	}
	collect(t, q, []*hpdi.Request{late})
	if info.Cancel == hpdi.CancelNone && late.Err != nil || info.Cancel != hpdi.CancelNone && !errors.Is(late.Err, hpdi.ErrDeadline) {
		t.Errorf("a deadline that has passed (%s are reached): %v", info.Cancel, late.Err)
	}
	for round := range 20 {
		reqs := make([]*hpdi.Request, 32)
		for i := range reqs {
			off := int64(2 * i * bs)
			reqs[i] = read(off, mem[off:off+int64(2*bs)])
			switch i % 4 {
			case 0:
				reqs[i].Deadline = time.Now().Add(time.Hour)
			case 1:
				reqs[i].Deadline = time.Now().Add(time.Duration(round*i) * time.Microsecond)
			case 2:
				reqs[i].Deadline = time.Now().Add(time.Microsecond)
			}
		}
		if err := q.Submit(reqs...); err != nil {
			t.Fatal(err)
		}
		collect(t, q, reqs)
		for i, r := range reqs {
			switch near := i%4 == 1 || i%4 == 2; {
			case r.Err == nil:
				wantFill(t, r.Vec[0], r.Offset, 2)
			case !near || info.Cancel == hpdi.CancelNone || !errors.Is(r.Err, hpdi.ErrDeadline):
				t.Fatalf("a read with deadline %v: %v", r.Deadline, r.Err)
			}
			r.Deadline = time.Time{}
		}
		guard(mem)
		do(t, q, &hpdi.Request{Op: hpdi.OpFlush})
		wantGuard(t, mem)
	}
}
