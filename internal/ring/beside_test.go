package ring

import (
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// twice returns two mappings of one ring, as two processes have them.
func twice(t testing.TB, s Shape) (front, back *Memory) {
	t.Helper()
	front, mem, fd, err := NewMemory(s)
	if err != nil {
		t.Fatal(err)
	}
	other, err := mapSealed(fd, uint64(s.Size()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(unix.Munmap(mem), unix.Munmap(other), unix.Close(fd)); err != nil {
			t.Error(err)
		}
	})
	if back, err = Open(other); err != nil {
		t.Fatal(err)
	}
	return front, back
}

// Back-ends come and go while the front-end submits and takes as fast as it can.
func TestAttachBesideFront(t *testing.T) {
	const most, entries = 20000, 8
	front, back := twice(t, shape(1, entries))
	var stop atomic.Bool
	var wg sync.WaitGroup
	backs := 0
	log := make([]bool, most+1)
	wg.Go(func() {
		for !stop.Load() {
			b, err := NewBack(back, 0)
			if err != nil {
				t.Error(err)
				return
			}
			backs++
			for n := range 1 + backs%23 {
				var e Entry
				ok, again, err := b.Take(&e)
				if err != nil {
					t.Error(err)
					return
				}
				if !ok {
					runtime.Gosched()
					continue
				}
				if log[e.Counter] && !again {
					t.Errorf("request %d comes twice, and nobody says so", e.Counter)
					return
				}
				log[e.Counter] = true
				if (n+backs)%5 == 0 {
					continue // it dies with this one, or never completes it
				}
				b.Post(e.Slot, StatusOK, 0)
				if (n+backs)%3 == 0 {
					b.Publish()
				}
			}
			if b.InFlight() == 0 {
				b.Publish()
			}
		}
	})
	f := NewFront(front, 0)
	put, got := 0, make([]bool, most+1)
	for taken := 0; taken < most && !t.Failed(); {
		for f.Free() > 0 && put < most {
			put++
			f.Put(&Entry{Op: OpFlush})
		}
		f.Publish()
		for {
			c, ok, err := f.Next()
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				break
			}
			if got[c.Counter] {
				t.Fatalf("request %d is answered twice", c.Counter)
			}
			got[c.Counter] = true
			taken++
		}
		f.Release()
		runtime.Gosched()
	}
	stop.Store(true)
	wg.Wait()
	t.Logf("%d back-ends for %d requests", backs, most)
}
