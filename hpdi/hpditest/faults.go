package hpditest

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
)

// Faults are what a device under test can be made to do. A function that is nil is
// something that the driver's test cannot bring about: what needs it is skipped.
type Faults struct {
	// Fail makes reads and writes that touch n bytes at off fail, with an error that is
	// kind: hpdi.ErrIO or hpdi.ErrNoSpace. It replaces what was set before; 0 bytes: none fail.
	Fail func(off, n int64, kind error)
	// Kinds are the kinds that Fail knows, hpdi.ErrIO alone if there are none.
	Kinds []error
	// Short makes the device move less than it was asked for at a time, or no longer.
	Short func(on bool)
	// Delay makes each request take about that long, or no longer.
	Delay func(time.Duration)
	// Hold makes requests that are submitted from now on stay under way until Release.
	// What is under way before may complete.
	Hold, Release func()
	// Disconnect ends what connects the driver with whoever serves it.
	Disconnect func()
	// Recovers says that the driver finds its peer again after Disconnect, and that
	// requests in flight then complete well. Otherwise they fail with ErrDisconnected,
	// and so do all that follow, unless the queue says that it no longer works.
	Recovers bool
}

// RunFaults subjects devices to the faults that they can be made to have. Each subtest
// calls open once, for a device as in [Run], and closes it.
func RunFaults(t *testing.T, open func(t *testing.T) (hpdi.Device, Faults)) {
	for _, tt := range []struct {
		name string
		can  func(f Faults) bool
		run  func(t *testing.T, d hpdi.Device, f Faults)
	}{
		{"Errors", func(f Faults) bool { return f.Fail != nil }, testErrors},
		{"Short", func(f Faults) bool { return f.Short != nil }, testShort},
		{"Delay", func(f Faults) bool { return f.Delay != nil }, testDelay},
		{"HeldCancel", func(f Faults) bool { return f.Hold != nil }, testHeldCancel},
		{"HeldDeadline", func(f Faults) bool { return f.Hold != nil }, testHeldDeadline},
		{"HeldClose", func(f Faults) bool { return f.Hold != nil }, testHeldClose},
		{"Disconnect", func(f Faults) bool { return f.Disconnect != nil }, testDisconnect},
		{"DisconnectHeld", func(f Faults) bool { return f.Disconnect != nil && f.Hold != nil }, testDisconnectHeld},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, f := open(t)
			defer func() {
				if err := d.Close(); err != nil && !errors.Is(err, hpdi.ErrClosed) {
					t.Errorf("close device: %v", err)
				}
			}()
			if !tt.can(f) {
				t.Skip("nothing makes this device do that")
			}
			tt.run(t, d, f)
		})
	}
}

// spread returns n requests, reads and writes in turn, each of size blocks on its own
// part of the device and of mem.
func spread(d hpdi.Device, mem []byte, n, size int) []*hpdi.Request {
	bs := d.Info().BlockSize
	reqs := make([]*hpdi.Request, n)
	for i := range reqs {
		off := i * size * bs
		reqs[i] = read(int64(off), mem[off:off+size*bs])
		if i%2 == 1 {
			reqs[i].Op = hpdi.OpWrite
		}
	}
	return reqs
}

// prepared returns memory for n requests of size blocks, with what the device holds
// there now.
func prepared(t *testing.T, d hpdi.Device, q hpdi.Queue, n, size int) []byte {
	t.Helper()
	mem := alloc(t, n*size*d.Info().BlockSize)
	fill(mem, 0, 9)
	do(t, q, write(0, mem))
	return mem
}

// testErrors lets a part of the device fail: the requests that touch it do, with an
// error of the right kind, others do not, and afterwards all is well.
func testErrors(t *testing.T, d hpdi.Device, f Faults) {
	const n, size = 16, 4
	q := newQueue(t, d, 8)
	defer closeQueue(t, q)
	bs := int64(d.Info().BlockSize)
	mem := prepared(t, d, q, n, size)
	kinds := f.Kinds
	if len(kinds) == 0 {
		kinds = []error{hpdi.ErrIO}
	}
	for _, kind := range kinds {
		// Of request 5 the third block, and requests 8 and 9 up to the middle.
		bad := []int64{5*size + 2, 1, 8 * size, size + size/2}
		for ; len(bad) > 0; bad = bad[2:] {
			f.Fail(bad[0]*bs, bad[1]*bs, kind)
			reqs := spread(d, mem, n, size)
			if err := q.Submit(reqs...); err != nil {
				t.Fatal(err)
			}
			collect(t, q, reqs)
			for i, r := range reqs {
				first, end := int64(i*size), int64((i+1)*size)
				hit := first < bad[0]+bad[1] && bad[0] < end
				if hit && !errors.Is(r.Err, kind) || !hit && r.Err != nil {
					t.Errorf("%s of blocks %d to %d with %d failing from %d on: %v, kind %v", r.Op, first, end, bad[1], bad[0], r.Err, kind)
				}
			}
			guard(mem)
			f.Fail(0, 0, kind)
			do(t, q, &hpdi.Request{Op: hpdi.OpFlush})
			wantGuard(t, mem)
			fill(mem, 0, 9)
			do(t, q, write(0, mem))
			clear(mem)
			do(t, q, read(0, mem))
			wantFill(t, mem, 0, 9)
		}
	}
}

// testShort moves data in pieces: nobody sees that.
func testShort(t *testing.T, d hpdi.Device, f Faults) {
	const n, size = 8, 16
	q := newQueue(t, d, 8)
	defer closeQueue(t, q)
	f.Short(true)
	mem := prepared(t, d, q, n, size)
	for range 4 {
		reqs := spread(d, mem, n, size)
		for _, r := range reqs {
			p := r.Vec[0]
			if r.Op == hpdi.OpRead {
				clear(p)
			}
			// Vectors that no piece agrees with.
			bs := d.Info().BlockSize
			r.Vec = [][]byte{p[:bs], p[bs : 4*bs], p[4*bs:]}
		}
		do(t, q, reqs...)
		wantFill(t, mem, 0, 9)
	}
	f.Short(false)
	clear(mem)
	do(t, q, read(0, mem))
	wantFill(t, mem, 0, 9)
}

// testDelay has requests that take their time: those that are in flight together do so
// together, and one that has a deadline before that ends at it where the driver can.
func testDelay(t *testing.T, d hpdi.Device, f Faults) {
	const n, size, delay = 4, 4, 50 * time.Millisecond
	q := newQueue(t, d, n)
	defer closeQueue(t, q)
	mem := prepared(t, d, q, n, size)
	f.Delay(delay)
	reqs := spread(d, mem, n, size)
	began := time.Now()
	if err := q.Submit(reqs...); err != nil {
		t.Fatal(err)
	}
	if done, err := q.Wait(0, nil); err != nil || len(done) == n && time.Since(began) < delay/2 {
		t.Fatalf("%d requests came at once, %v", len(done), err)
	} else {
		collect(t, q, slices.DeleteFunc(slices.Clone(reqs), func(r *hpdi.Request) bool { return slices.Contains(done, r) }))
	}
	if took := time.Since(began); took < delay/2 {
		t.Errorf("all came after %v, with a delay of %v", took, delay)
	}
	for _, r := range reqs {
		if r.Err != nil {
			t.Errorf("a delayed %s: %v", r.Op, r.Err)
		}
	}
	f.Delay(0)
	wantFill(t, mem, 0, 9)
}

// testHeldCancel cancels requests that are under way and do not end by themselves.
func testHeldCancel(t *testing.T, d hpdi.Device, f Faults) {
	const n, size = 8, 4
	q := newQueue(t, d, n)
	defer closeQueue(t, q)
	bs := d.Info().BlockSize
	mem := prepared(t, d, q, n, size)
	f.Hold()
	released := false
	release := func() {
		if !released {
			f.Release()
		}
		released = true
	}
	defer release() // or closing the queue would wait for ever
	reqs := spread(d, mem, n, size)
	if err := q.Submit(reqs...); err != nil {
		t.Fatal(err)
	}
	if done, err := q.Wait(0, nil); err != nil || len(done) != 0 {
		t.Fatalf("%d held requests came, %v", len(done), err)
	}
	if fd := q.Event(); d.Info().Event && readable(t, fd, 0) {
		if done, err := q.Wait(0, nil); err != nil || len(done) != 0 || readable(t, fd, 0) {
			t.Fatalf("an event while all are held; %d came, %v", len(done), err)
		}
	}
	half, rest := reqs[:n/2], reqs[n/2:]
	q.Cancel(half...)
	if d.Info().Cancel == hpdi.CancelAll {
		if fd := q.Event(); d.Info().Event && !readable(t, fd, patience) {
			t.Fatal("no event of what was cancelled")
		}
		collect(t, q, half)
		for _, r := range half {
			if !errors.Is(r.Err, hpdi.ErrCanceled) {
				t.Errorf("a held %s that was cancelled: %v", r.Op, r.Err)
			}
		}
		again := mem[:n/2*size*bs]
		guard(again) // theirs again: what comes late must not land here
		release()
		collect(t, q, rest)
		do(t, q, &hpdi.Request{Op: hpdi.OpFlush})
		wantGuard(t, again)
	} else {
		release()
		collect(t, q, reqs)
		for _, r := range half {
			if r.Err != nil && !errors.Is(r.Err, hpdi.ErrCanceled) {
				t.Errorf("a held %s that was cancelled: %v", r.Op, r.Err)
			}
		}
	}
	for _, r := range rest {
		if r.Err != nil {
			t.Errorf("a held %s: %v", r.Op, r.Err)
		}
	}
	// A write that was given up may have run late, but never after one that came behind it.
	fill(mem, 0, 10)
	do(t, q, write(0, mem))
	do(t, q, &hpdi.Request{Op: hpdi.OpFlush})
	clear(mem)
	do(t, q, read(0, mem))
	wantFill(t, mem, 0, 10)
}

// testHeldDeadline lets deadlines pass of requests that do not end by themselves.
func testHeldDeadline(t *testing.T, d hpdi.Device, f Faults) {
	if d.Info().Cancel != hpdi.CancelAll {
		t.Skip("what is under way at the device does not end before it is done")
	}
	const n, size, soon = 8, 4, 30 * time.Millisecond
	q := newQueue(t, d, n)
	defer closeQueue(t, q)
	mem := prepared(t, d, q, n, size)
	f.Hold()
	released := false
	defer func() {
		if !released {
			f.Release()
		}
	}()
	reqs := spread(d, mem, n, size)
	began := time.Now()
	for i, r := range reqs {
		if r.Deadline = began.Add(soon); i == n-1 {
			r.Deadline = began.Add(time.Hour)
		}
	}
	if err := q.Submit(reqs...); err != nil {
		t.Fatal(err)
	}
	collect(t, q, reqs[:n-1])
	if took := time.Since(began); took < soon || took > patience {
		t.Errorf("deadlines in %v passed after %v", soon, took)
	}
	for _, r := range reqs[:n-1] {
		if !errors.Is(r.Err, hpdi.ErrDeadline) {
			t.Errorf("a held %s whose deadline passed: %v", r.Op, r.Err)
		}
	}
	again := mem[:(n-1)*size*d.Info().BlockSize]
	guard(again)
	f.Release()
	released = true
	collect(t, q, reqs[n-1:])
	if err := reqs[n-1].Err; err != nil {
		t.Errorf("one with a deadline far away: %v", err)
	}
	do(t, q, &hpdi.Request{Op: hpdi.OpFlush})
	wantGuard(t, again)
}

// testHeldClose closes a queue whose requests are held: it waits for them.
func testHeldClose(t *testing.T, d hpdi.Device, f Faults) {
	const n, size = 4, 4
	q := newQueue(t, d, n)
	mem := prepared(t, d, q, n, size)
	f.Hold()
	reqs := spread(d, mem, n, size)
	if err := q.Submit(reqs...); err != nil {
		t.Fatal(err)
	}
	released := time.AfterFunc(20*time.Millisecond, f.Release)
	closeQueue(t, q)
	if released.Stop() {
		f.Release()
		t.Error("the queue was closed while requests were under way")
	}
	for _, r := range reqs {
		if r.Err != nil {
			t.Errorf("a held %s: %v", r.Op, r.Err)
		}
	}
	q = newQueue(t, d, n)
	do(t, q, read(0, mem))
	wantFill(t, mem, 0, 9)
	closeQueue(t, q)
}

// testDisconnect ends the connection with requests in flight, again and again.
func testDisconnect(t *testing.T, d hpdi.Device, f Faults) {
	const n, size = 16, 8
	q := newQueue(t, d, n)
	defer func() { _ = q.Close() }() // it may be broken
	mem := prepared(t, d, q, n, size)
	for range 5 {
		reqs := spread(d, mem, n, size)
		if err := q.Submit(reqs...); err != nil {
			afterBreak(t, f, err)
			return
		}
		f.Disconnect()
		if !finish(t, q, f, reqs) {
			return
		}
	}
	aftermath(t, d, q, f, mem)
}

// testDisconnectHeld ends the connection with requests that had not run.
func testDisconnectHeld(t *testing.T, d hpdi.Device, f Faults) {
	const n, size = 16, 8
	q := newQueue(t, d, n)
	defer func() { _ = q.Close() }() // it may be broken
	mem := prepared(t, d, q, n, size)
	f.Hold()
	reqs := spread(d, mem, n, size)
	err := q.Submit(reqs...)
	f.Disconnect()
	f.Release()
	if err != nil {
		afterBreak(t, f, err)
		return
	}
	if finish(t, q, f, reqs) {
		aftermath(t, d, q, f, mem)
	}
}

// finish collects requests that were in flight when the connection ended. It reports
// whether the queue works.
func finish(t *testing.T, q hpdi.Queue, f Faults, reqs []*hpdi.Request) bool {
	t.Helper()
	seen := map[*hpdi.Request]bool{}
	for len(seen) < len(reqs) {
		done, err := q.Wait(1, nil)
		for _, r := range done {
			if seen[r] || !slices.Contains(reqs, r) {
				t.Fatalf("%s at %d came back twice or was never submitted", r.Op, r.Offset)
			}
			seen[r] = true
			if r.Err != nil && (f.Recovers || !errors.Is(r.Err, hpdi.ErrDisconnected)) {
				t.Errorf("%s at %d when the connection ended: %v", r.Op, r.Offset, r.Err)
			}
		}
		if err != nil {
			afterBreak(t, f, err)
			return false
		}
		if len(done) == 0 {
			t.Fatalf("a wait returned none with %d in flight", len(reqs)-len(seen))
		}
	}
	return true
}

// afterBreak checks the error of a queue that no longer works.
func afterBreak(t *testing.T, f Faults, err error) {
	t.Helper()
	if f.Recovers || !errors.Is(err, hpdi.ErrDisconnected) {
		t.Errorf("the queue broke when the connection ended: %v", err)
	}
}

// aftermath checks what becomes of requests after a connection has ended.
func aftermath(t *testing.T, d hpdi.Device, q hpdi.Queue, f Faults, mem []byte) {
	t.Helper()
	guard(mem)
	err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush})
	wantGuard(t, mem)
	if f.Recovers {
		if err != nil {
			t.Fatal(err)
		}
		do(t, q, read(0, mem))
		wantFill(t, mem, 0, 9)
		return
	}
	if !errors.Is(err, hpdi.ErrDisconnected) {
		t.Errorf("a flush after the connection has ended: %v", err)
	}
	other, err := d.NewQueue(1)
	if err == nil {
		err = errors.Join(hpdi.Do(other, read(0, mem[:d.Info().BlockSize])), other.Close())
	}
	if !errors.Is(err, hpdi.ErrDisconnected) {
		t.Errorf("a read by another queue after the connection has ended: %v", err)
	}
}
