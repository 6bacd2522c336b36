package file

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// collect waits for n requests.
func collect(t *testing.T, q hpdi.Queue, n int) []*hpdi.Request {
	t.Helper()
	done, err := q.Wait(n, nil)
	if err != nil || len(done) != n {
		t.Fatalf("waited for %d requests, got %d: %v", n, len(done), err)
	}
	return done
}

// readable reports whether a descriptor becomes readable within that time.
func readable(t *testing.T, fd int, within time.Duration) bool {
	t.Helper()
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	var n int
	err := ignoringEINTR(func() (err error) { n, err = unix.Poll(p, int(within.Milliseconds())); return err })
	if err != nil {
		t.Fatal(err)
	}
	return n == 1
}

// TestCancelInRing: what the kernel has not begun ends at once; each request comes back
// once, and what was written meanwhile does not land in memory of a cancelled one.
func TestCancelInRing(t *testing.T) {
	f := hold(t, ringEngine(t), 8, 4)
	f.q.Cancel(f.held[1], f.held[2], f.held[1], &hpdi.Request{})
	done := collect(t, f.q, 2)
	for _, r := range done {
		if !slices.Contains(f.held[1:3], r) || !errors.Is(r.Err, hpdi.ErrCanceled) || !strings.Contains(r.Err.Error(), f.d.info.Name) {
			t.Errorf("request %d came back with %v", slices.Index(f.held, r), r.Err)
		}
		r.Vec[0][0] = 7
	}
	if err := hpdi.Do(f.q, reads(t, 2)...); err != nil { // beside those that last, and in the slots that came free
		t.Errorf("others on the same queue: %v", err)
	}
	f.release()
	for _, r := range collect(t, f.q, 2) {
		if r != f.held[0] && r != f.held[3] || r.Err != nil {
			t.Errorf("request %d came back with %v", slices.Index(f.held, r), r.Err)
		}
	}
	if f.held[1].Vec[0][0] != 7 || f.held[2].Vec[0][0] != 7 {
		t.Error("data came into memory of a request that had been given back")
	}
	f.q.Cancel(f.held...) // nothing of it is in flight
	if done, err := f.q.Wait(1, nil); len(done) != 0 || err != nil {
		t.Errorf("cancelling what is done brought %d requests, %v", len(done), err)
	}
}

// ringEngine returns EngineURing, or skips the test.
func ringEngine(t *testing.T) Engine {
	if _, err := probeURing(false); err != nil {
		t.Skip(err)
	}
	return EngineURing
}

// TestCancelMany cancels more requests at once than the ring has free entries for.
func TestCancelMany(t *testing.T) {
	const n = 64
	f := hold(t, ringEngine(t), n, n)
	if err := f.q.Submit(); err != nil {
		t.Fatal(err)
	}
	f.q.Cancel(f.held...)
	for _, r := range collect(t, f.q, n) {
		if !errors.Is(r.Err, hpdi.ErrCanceled) {
			t.Errorf("a request came back with %v", r.Err)
		}
	}
}

// TestCancelDone cancels what disks do at once: the requests come back as if nothing had
// been said, or cancelled, and all of them once.
func TestCancelDone(t *testing.T) {
	for _, engine := range engines(t) {
		t.Run(string(engine), func(t *testing.T) {
			d := open(t, create(t, t.TempDir(), testSize), Options{Engine: engine})
			q := newQueue(t, d, 16)
			defer closeQueue(t, q)
			for range 50 {
				reqs := reads(t, 24)
				for i := range 4 {
					reqs[6*i+1] = &hpdi.Request{Op: hpdi.OpFlush}
				}
				if err := q.Submit(reqs...); err != nil {
					t.Fatal(err)
				}
				q.Cancel(reqs...)
				seen := map[*hpdi.Request]bool{}
				for _, r := range collect(t, q, len(reqs)) {
					if r.Err != nil && !errors.Is(r.Err, hpdi.ErrCanceled) || seen[r] {
						t.Fatalf("%s came back with %v, seen before: %v", r.Op, r.Err, seen[r])
					}
					seen[r] = true
				}
			}
		})
	}
}

// TestCancelWaiting: with the sync engine what waits for a goroutine is given up at once,
// and what one has begun is not.
func TestCancelWaiting(t *testing.T) {
	f := hold(t, EngineSync, 16, 8)
	wait := reads(t, 6)
	if err := f.q.Submit(wait...); err != nil {
		t.Fatal(err)
	}
	f.q.Cancel(wait[1], f.held[0], wait[4])
	for _, r := range collect(t, f.q, 2) {
		if r != wait[1] && r != wait[4] || !errors.Is(r.Err, hpdi.ErrCanceled) || !strings.Contains(r.Err.Error(), f.d.info.Name) {
			t.Errorf("%s at %d came back with %v", r.Op, r.Offset, r.Err)
		}
	}
	f.release()
	for _, r := range collect(t, f.q, len(f.held)+4) {
		if r.Err != nil {
			t.Errorf("%s at %d: %v", r.Op, r.Offset, r.Err)
		}
	}
}

// TestDeadlines: a request whose time is over ends though nobody looks, also if the
// application waits by the descriptor alone; one that comes with a deadline that has
// passed is not begun; one that is in time is not disturbed.
func TestDeadlines(t *testing.T) {
	for _, engine := range engines(t) {
		t.Run(string(engine), func(t *testing.T) {
			f := hold(t, engine, 16, 1)
			held := len(f.held)
			event := f.q.Event()
			if event < 0 || f.q.Event() != event {
				t.Fatalf("event descriptors %d, %d", event, f.q.Event())
			}
			late, soon, other, never := reads(t, 1)[0], reads(t, 1)[0], reads(t, 1)[0], reads(t, 1)[0]
			late.Deadline = time.Now().Add(-time.Second)
			other.Deadline, never.Deadline = time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
			soon.Deadline = time.Now().Add(30 * time.Millisecond)
			if err := f.q.Submit(late); err != nil {
				t.Fatal(err)
			}
			if !readable(t, event, 0) {
				t.Error("a request is done and the descriptor is not readable")
			}
			if r := collect(t, f.q, 1)[0]; r != late || !errors.Is(r.Err, hpdi.ErrDeadline) || !strings.Contains(r.Err.Error(), f.d.info.Name) {
				t.Errorf("late request: %v", r.Err)
			}
			if readable(t, event, 0) {
				t.Error("the descriptor is readable and nothing is done")
			}
			fast := func() {}
			if engine == EngineURing { // what is asked for now lasts too
				fast, _ = pipeFor(t, f.d)
			}
			if err := f.q.Submit(other, soon); err != nil {
				t.Fatal(err)
			}
			fast()
			if !readable(t, event, 10*time.Second) {
				t.Fatal("a deadline has passed and the descriptor is not readable")
			}
			if r := collect(t, f.q, 1)[0]; r != soon || !errors.Is(r.Err, hpdi.ErrDeadline) || time.Now().Before(r.Deadline) {
				t.Errorf("%d of %d bytes at %d ended with %v at %v, deadline %v", r.Op, r.Bytes(), r.Offset, r.Err, time.Now(), r.Deadline)
			}
			f.q.Cancel(other)
			if r := collect(t, f.q, 1)[0]; r != other || !errors.Is(r.Err, hpdi.ErrCanceled) {
				t.Errorf("cancelled request with a deadline: %v", r.Err)
			}
			if err := f.q.Submit(never); err != nil {
				t.Fatal(err)
			}
			f.release()
			for _, r := range collect(t, f.q, held+1) {
				if r.Err != nil {
					t.Errorf("%s at %d: %v", r.Op, r.Offset, r.Err)
				}
			}
			if readable(t, event, 0) {
				t.Error("the descriptor is readable and all is done")
			}
		})
	}
}

// TestEvents: with the descriptor alone all requests come back, whatever way they are
// done.
func TestEvents(t *testing.T) {
	for _, engine := range engines(t) {
		t.Run(string(engine), func(t *testing.T) {
			d := open(t, create(t, t.TempDir(), testSize), Options{Engine: engine})
			q := newQueue(t, d, 4)
			event := q.Event()
			for round := range 20 {
				reqs := append(reads(t, 9), &hpdi.Request{Op: 99}, &hpdi.Request{Op: hpdi.OpRead})
				if err := q.Submit(reqs...); err != nil {
					t.Fatal(err)
				}
				for left := len(reqs); left > 0; {
					if !readable(t, event, 10*time.Second) {
						t.Fatalf("round %d: %d requests have not come", round, left)
					}
					done, err := q.Wait(0, nil)
					if err != nil {
						t.Fatal(err)
					}
					left -= len(done)
				}
				if readable(t, event, 0) {
					t.Errorf("round %d: the descriptor is readable and nothing is done", round)
				}
			}
			closeQueue(t, q)
			if fd := q.Event(); fd != -1 {
				t.Errorf("a closed queue gives descriptor %d", fd)
			}
			q.Cancel(reads(t, 1)...) // of a closed queue: does nothing
		})
	}
}

// TestDeadlinesDoNotAllocate, once the queue has its timer.
func TestDeadlinesDoNotAllocate(t *testing.T) {
	for _, engine := range engines(t) {
		t.Run(string(engine), func(t *testing.T) {
			d := open(t, create(t, t.TempDir(), testSize), Options{Engine: engine})
			q := newQueue(t, d, 8)
			defer closeQueue(t, q)
			reqs := reads(t, 8)
			done := make([]*hpdi.Request, 0, len(reqs))
			allocs := testing.AllocsPerRun(100, func() {
				for _, r := range reqs {
					r.Deadline = time.Now().Add(time.Hour)
				}
				if err := q.Submit(reqs...); err != nil {
					t.Fatal(err)
				}
				var err error
				if done, err = q.Wait(len(reqs), done[:0]); err != nil || len(done) != len(reqs) {
					t.Fatal(err, len(done))
				}
			})
			if allocs != 0 {
				t.Errorf("%v allocations for %d requests with deadlines", allocs, len(reqs))
			}
		})
	}
}

// TestStatus: holes and data of a file are told apart, block by block.
func TestStatus(t *testing.T) {
	for _, engine := range engines(t) {
		t.Run(string(engine), func(t *testing.T) {
			d := open(t, create(t, memoryDir(t), testSize), Options{Engine: engine})
			if !d.Info().Status {
				t.Fatalf("a file system in memory tells no holes: %+v", d.Info())
			}
			q := newQueue(t, d, 4)
			defer closeQueue(t, q)
			status := func(off, n int64, room int) string {
				r := &hpdi.Request{Op: hpdi.OpStatus, Offset: off * BlockSize, Length: n * BlockSize, Extents: make([]hpdi.Extent, 0, room)}
				if err := hpdi.Do(q, r); err != nil {
					t.Fatal(err)
				}
				s := ""
				for _, e := range r.Extents {
					s += fmt.Sprintf("%d %s ", e.Length/BlockSize, e.State)
				}
				return s
			}
			const all = testSize / BlockSize
			if got := status(0, all, 4); got != fmt.Sprintf("%d hole ", all) {
				t.Errorf("a fresh file is %q", got)
			}
			p := alloc(t, 3*BlockSize)
			for _, at := range []int64{2, 10, all - 3} {
				if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Offset: at * BlockSize, Vec: [][]byte{p}}); err != nil {
					t.Fatal(err)
				}
			}
			for _, tt := range []struct {
				off, n int64
				room   int
				want   string
			}{
				{0, all, 8, fmt.Sprintf("2 hole 3 data 5 hole 3 data %d hole 3 data ", all-16)},
				{0, all, 2, "2 hole 3 data "},
				{0, 20, 1, "2 hole "},
				{3, 1, 4, "1 data "},
				{4, 3, 4, "1 data 2 hole "},
				{5, 5, 4, "5 hole "},
				{all - 1, 1, 4, "1 data "},
			} {
				if got := status(tt.off, tt.n, tt.room); got != tt.want {
					t.Errorf("%d blocks from %d on are %q, want %q", tt.n, tt.off, got, tt.want)
				}
			}
			r := &hpdi.Request{Op: hpdi.OpStatus, Length: BlockSize, Extents: make([]hpdi.Extent, 0, 1), Deadline: time.Now().Add(-1)}
			if err := hpdi.Do(q, r); !errors.Is(err, hpdi.ErrDeadline) || len(r.Extents) != 0 {
				t.Errorf("block status after its deadline: %v, %v", err, r.Extents)
			}
		})
	}
}

// TestStatusOfPartOfABlock: where the file system keeps less than a block, or the file
// has been shortened, a block with any data is data, and what is gone is a hole.
func TestStatusOfPartOfABlock(t *testing.T) {
	path := create(t, t.TempDir(), testSize)
	d := open(t, path, Options{})
	if err := unix.Truncate(path, 2*BlockSize); err != nil {
		t.Fatal(err)
	}
	q := newQueue(t, d, 1)
	defer closeQueue(t, q)
	r := &hpdi.Request{Op: hpdi.OpStatus, Length: testSize, Extents: make([]hpdi.Extent, 0, 8)}
	if err := hpdi.Do(q, r); err != nil || len(r.Extents) != 1 || r.Extents[0] != (hpdi.Extent{Length: testSize, State: hpdi.Hole}) {
		t.Errorf("a file that was shortened is %v, %v", r.Extents, err)
	}
}

// TestShortTransfer: what the kernel has moved in part goes on where it stopped, as often
// as it takes.
func TestShortTransfer(t *testing.T) {
	d := unfixedRingDevice(t)
	q := newQueue(t, d, 4)
	defer closeQueue(t, q)
	mem := alloc(t, 4*BlockSize)
	for i := range mem {
		mem[i] = byte(1 + i/BlockSize)
	}
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{mem}}); err != nil {
		t.Fatal(err)
	}
	fast, release := pipeFor(t, d)
	r := &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{mem}}
	release(BlockSize / 2)
	if err := q.Submit(r); err != nil {
		t.Fatal(err)
	}
	fast()
	release(BlockSize + BlockSize/2)
	collect(t, q, 1)
	if r.Err != nil || mem[2*BlockSize-1] != 0 || mem[4*BlockSize-1] != 4 {
		t.Errorf("%v: the second block ends with %d, the last with %d", r.Err, mem[2*BlockSize-1], mem[4*BlockSize-1])
	}
}
