package file

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
)

// boundDevice opens a device whose queues belong to threads, and locks the test to one.
func boundDevice(t *testing.T, opts Options) *device {
	t.Helper()
	if bound, err := probeURing(true); err != nil || !bound {
		t.Skip("no rings that are bound to threads: ", err)
	}
	opts.Engine, opts.Thread = EngineURing, true
	d := open(t, create(t, t.TempDir(), testSize), opts).(*device)
	if !d.Info().Thread {
		t.Error("Info does not say that queues are bound")
	}
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	return d
}

// elsewhere calls f on another thread: that of the test is locked to it.
func elsewhere(f func()) {
	var wg sync.WaitGroup
	wg.Go(f)
	wg.Wait()
}

// threadDevice is one that calls each queue on a thread of the queue's own.
type threadDevice struct{ hpdi.Device }

func (d threadDevice) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	if err != nil {
		return nil, err
	}
	return newThreadQueue(q), nil
}

type threadQueue struct {
	q     hpdi.Queue
	calls chan func()
}

func newThreadQueue(q hpdi.Queue) *threadQueue {
	x := &threadQueue{q, make(chan func())}
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		for f := range x.calls {
			f()
		}
	}()
	return x
}

func (x *threadQueue) do(f func()) {
	done := make(chan struct{})
	x.calls <- func() {
		defer close(done)
		f()
	}
	<-done
}

func (x *threadQueue) Submit(reqs ...*hpdi.Request) (err error) {
	x.do(func() { err = x.q.Submit(reqs...) })
	return err
}

func (x *threadQueue) Wait(least int, done []*hpdi.Request) (all []*hpdi.Request, err error) {
	x.do(func() { all, err = x.q.Wait(least, done) })
	return all, err
}

func (x *threadQueue) Cancel(reqs ...*hpdi.Request) { x.do(func() { x.q.Cancel(reqs...) }) }

func (x *threadQueue) Event() (fd int) {
	x.do(func() { fd = x.q.Event() })
	return fd
}

func (x *threadQueue) Close() (err error) {
	x.do(func() { err = x.q.Close() })
	return err
}

// TestConformanceOfBoundQueues: for its own thread a queue is like any other.
func TestConformanceOfBoundQueues(t *testing.T) {
	if bound, err := probeURing(true); err != nil || !bound {
		t.Skip("no rings that are bound to threads: ", err)
	}
	for name, poll := range map[string]time.Duration{"sleeping": 0, "polling": 50 * time.Microsecond} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir
			if poll > 0 {
				dir = func() string { return memoryDir(t) }
			}
			hpditest.Run(t, func(t *testing.T) hpdi.Device {
				d, err := Open(create(t, dir(), testSize), Options{Engine: EngineURing, Thread: true, Poll: poll})
				if err != nil {
					t.Fatal(err)
				}
				return threadDevice{d}
			})
		})
	}
}

// TestWrongThread: a queue that is bound takes nothing from other threads, gives them
// nothing, and works on for its own. What they handed over comes back with the error.
func TestWrongThread(t *testing.T) {
	d := boundDevice(t, Options{Fixed: FixedOff})
	q := newQueue(t, d, 4)
	defer closeQueue(t, q)
	fast, write := pipeFor(t, d)
	held := reads(t, 1)[0]
	if err := q.Submit(held); err != nil {
		t.Fatal(err)
	}
	fast()
	wrong := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, ErrThread) || !strings.Contains(err.Error(), d.info.Name) || !strings.Contains(err.Error(), "LockOSThread") {
			t.Errorf("%s on another thread: %v", what, err)
		}
	}
	refused := reads(t, 6) // more than there are slots for
	elsewhere(func() {
		wrong("submit", q.Submit(refused...))
		_, err := q.Wait(1, nil)
		if err != nil {
			t.Errorf("what was refused is not to be had: %v", err)
		}
		_, err = q.Wait(1, nil)
		wrong("wait", err)
		wrong("close", q.Close())
	})
	for i, r := range refused {
		wrong(fmt.Sprintf("request %d", i), r.Err)
	}
	write(BlockSize)
	if done := collect(t, q, 1); done[0] != held || held.Err != nil {
		t.Errorf("the request in flight came back as %+v", done[0])
	}
	if err := hpdi.Do(q, reads(t, 8)...); err != nil {
		t.Errorf("its own thread: %v", err)
	}
}

// TestEventBeforeResults: the descriptor tells of a result that the kernel keeps until it
// is asked, and Wait that does not wait asks.
func TestEventBeforeResults(t *testing.T) {
	d := boundDevice(t, Options{Fixed: FixedOff})
	q := newQueue(t, d, 4)
	defer closeQueue(t, q)
	event := q.Event() // before the ring has a thread
	fast, write := pipeFor(t, d)
	if err := q.Submit(reads(t, 1)...); err != nil {
		t.Fatal(err)
	}
	fast()
	if done, err := q.Wait(0, nil); err != nil || len(done) > 0 || readable(t, event, 0) {
		t.Fatalf("%d requests are done before there is data: %v", len(done), err)
	}
	write(BlockSize)
	if !readable(t, event, 10*time.Second) {
		t.Fatal("the descriptor does not tell")
	}
	r := q.(*uringQueue).ring
	if r.results() > 0 || !r.deferred() {
		t.Errorf("%d results came unasked", r.results())
	}
	var err error
	elsewhere(func() { _, err = q.Wait(0, nil) })
	if !errors.Is(err, ErrThread) {
		t.Errorf("another thread asked: %v", err)
	}
	if done, err := q.Wait(0, nil); err != nil || len(done) != 1 || done[0].Err != nil {
		t.Errorf("%d requests are done: %v", len(done), err)
	}
}

// TestRegisterOnBoundQueue: memory that comes and goes while the queue is in use does so
// at its next Submit, in order.
func TestRegisterOnBoundQueue(t *testing.T) {
	d := boundDevice(t, Options{})
	q := newQueue(t, d, 4)
	defer closeQueue(t, q)
	mem := alloc(t, 3*BlockSize)
	a, b := mem[:BlockSize], mem[2*BlockSize:]
	read := func(p []byte, want uint8) {
		t.Helper()
		if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{p}}); err != nil {
			t.Fatal(err)
		}
		if e := lastEntries(q, 1)[0]; e.opcode != want {
			t.Errorf("the kernel was given %+v, want operation %d", e, want)
		}
	}
	call := func(f func([]byte) error, mem []byte) {
		t.Helper()
		elsewhere(func() {
			if err := f(mem); err != nil {
				t.Error(err)
			}
		})
	}
	call(d.Register, a) // the ring has no thread yet
	if note := d.Info().Note; strings.Contains(note, "registered") {
		t.Skip(note)
	}
	read(a, ringOpReadFixed)
	before := pinned(t)
	call(d.Register, b)
	if got := pinned(t) - before; got != 0 {
		t.Errorf("%d bytes were pinned for the ring of another thread", got)
	}
	elsewhere(func() {
		if err := q.Submit(reads(t, 1)...); !errors.Is(err, ErrThread) {
			t.Errorf("submit on another thread: %v", err)
		}
	})
	if done := collect(t, q, 1); !errors.Is(done[0].Err, ErrThread) {
		t.Errorf("what another thread submitted came back with %v", done[0].Err)
	}
	read(b, ringOpReadFixed)
	if got := pinned(t) - before; got != len(b) {
		t.Errorf("%d bytes were pinned, want %d", got, len(b))
	}
	// What goes is not used from that moment on, and its number may be another's.
	call(d.Unregister, a)
	read(a, ringOpRead)
	call(d.Unregister, b)
	call(d.Register, a)
	read(a, ringOpReadFixed)
	read(b, ringOpRead)
	// What comes and goes between two requests never comes.
	call(d.Register, b)
	call(d.Unregister, b)
	read(b, ringOpRead)
	call(d.Unregister, a)
	read(a, ringOpRead)
	if got := pinned(t) - before; got != -len(a) {
		t.Errorf("%d bytes are pinned in the end, want %d", got, -len(a))
	}
}
