package hpditest

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

// readable waits until a descriptor is readable, at most for a while.
func readable(t *testing.T, fd int, atMost time.Duration) bool {
	t.Helper()
	end := time.Now().Add(atMost)
	for {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, int(max(0, time.Until(end)).Milliseconds()))
		switch {
		case err == unix.EINTR:
		case err != nil:
			t.Fatalf("poll: %v", err)
		case n > 0 && p[0].Revents != unix.POLLIN:
			t.Fatalf("poll says %#x of the descriptor", p[0].Revents)
		default:
			return n > 0
		}
	}
}

// testEvent waits by the descriptor alone.
func testEvent(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 8)
	defer closeQueue(t, q)
	fd := q.Event()
	if !d.Info().Event {
		if fd != -1 {
			t.Errorf("descriptor %d where there are no events", fd)
		}
		return
	}
	if fd < 0 || q.Event() != fd {
		t.Fatalf("descriptor %d, then %d", fd, q.Event())
	}
	quiet := func(when string) {
		t.Helper()
		// Once in vain is allowed, for ever is not.
		for i := 0; readable(t, fd, 0); i++ {
			done, err := q.Wait(0, nil)
			if err != nil || len(done) > 0 || i > 8 {
				t.Fatalf("%s the descriptor is readable, and %d requests come (%v)", when, len(done), err)
			}
		}
	}
	quiet("before anything")
	bs := d.Info().BlockSize
	mem := alloc(t, 16*bs)
	for round := range 20 {
		fill(mem, 0, uint64(round))
		reqs := []*hpdi.Request{write(0, mem[:8*bs])}
		for i := 8; i < 8+round%8; i++ {
			reqs = append(reqs, write(int64(i*bs), mem[i*bs:(i+1)*bs]))
		}
		if round%5 == 4 {
			reqs = append(reqs, read(1, mem[:bs])) // malformed ones come as others do
		}
		if err := q.Submit(reqs...); err != nil {
			t.Fatal(err)
		}
		var done []*hpdi.Request
		for len(done) < len(reqs) {
			if !readable(t, fd, patience) {
				t.Fatalf("%d of %d requests came, and no event", len(done), len(reqs))
			}
			var err error
			if done, err = q.Wait(0, done); err != nil {
				t.Fatal(err)
			}
		}
		quiet("after all came")
	}
	// Those that wait for it otherwise leave no event behind.
	do(t, q, read(0, mem))
	quiet("after a wait")
	wantFill(t, mem[:8*bs], 0, 19)
}

// testPolling takes completions without ever blocking.
func testPolling(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 8)
	defer closeQueue(t, q)
	bs := d.Info().BlockSize
	mem := alloc(t, 8*bs)
	for round := range 20 {
		fill(mem, 0, uint64(round))
		var reqs []*hpdi.Request
		for i := range 8 {
			reqs = append(reqs, write(int64(i*bs), mem[i*bs:(i+1)*bs]))
		}
		if err := q.Submit(reqs...); err != nil {
			t.Fatal(err)
		}
		var done []*hpdi.Request
		for end := time.Now().Add(patience); len(done) < len(reqs); {
			var err error
			if done, err = q.Wait(0, done); err != nil {
				t.Fatal(err)
			}
			if time.Now().After(end) {
				t.Fatalf("%d of %d requests came to who polls", len(done), len(reqs))
			}
		}
	}
	do(t, q, read(0, mem))
	wantFill(t, mem, 0, 19)
}
