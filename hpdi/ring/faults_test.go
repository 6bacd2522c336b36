package ring

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
	core "github.com/pollux-storage/pollux/internal/ring"
)

// again is a back-end that can be ended and comes again at the same socket.
type again struct {
	t    *testing.T
	path string
	dev  hpdi.Device
	mu   sync.Mutex
	s    *Server
	done chan error
	l    interface{ Close() error }
}

func (a *again) start() {
	l, err := Listen(a.path)
	if err != nil {
		a.t.Fatal(err)
	}
	s, err := NewServer(a.dev, ServeOptions{})
	if err != nil {
		a.t.Fatal(err)
	}
	a.s, a.l, a.done = s, l, make(chan error, 1)
	go func() { a.done <- s.Serve(l) }()
}

func (a *again) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.s == nil {
		return
	}
	a.s.Close()
	a.l.Close()
	if err := <-a.done; err != nil {
		a.t.Error(err)
	}
	a.s = nil
}

func faults(t *testing.T, reconnect time.Duration) (hpdi.Device, hpditest.Faults) {
	f := newFaulty(memory(t, hpditest.MinSize))
	a := &again{t: t, path: filepath.Join(t.TempDir(), "ring.sock"), dev: f}
	a.start()
	t.Cleanup(a.end)
	d := open(t, a.path, Options{Queues: 4, Entries: 64, Poll: 20 * time.Microsecond, Reconnect: reconnect})
	return d, hpditest.Faults{
		Fail:    func(off, n int64, kind error) { f.set(func() { f.off, f.n, f.kind = off, n, kind }) },
		Kinds:   []error{hpdi.ErrIO, hpdi.ErrNoSpace},
		Delay:   func(d time.Duration) { f.set(func() { f.delay = d }) },
		Hold:    func() { f.set(func() { f.hold = true }) },
		Release: func() { f.set(func() { f.hold = false }) },
		Disconnect: func() {
			// The back-end ends only when what it runs has ended.
			ended := make(chan bool)
			go func() {
				a.end()
				if reconnect > 0 {
					a.start()
				}
				close(ended)
			}()
			select {
			case <-ended:
			case <-time.After(50 * time.Millisecond):
			}
		},
		Recovers: reconnect > 0,
	}
}

func TestFaults(t *testing.T) {
	hpditest.RunFaults(t, func(t *testing.T) (hpdi.Device, hpditest.Faults) { return faults(t, time.Minute) })
}

func TestFaultsWithoutReconnect(t *testing.T) {
	hpditest.RunFaults(t, func(t *testing.T) (hpdi.Device, hpditest.Faults) { return faults(t, 0) })
}

// pages returns n pages of memory that can be shared.
func pages(t testing.TB, n int) []byte {
	t.Helper()
	p, err := hpdi.Alloc(n * 4096)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := hpdi.Free(p); err != nil {
			t.Error(err)
		}
	})
	return p
}

// killed is a device whose back-end, a process of its own, has just been killed.
func killed(t *testing.T, reconnect time.Duration) (hpdi.Device, hpdi.Queue, string) {
	p := startBack(t, filepath.Join(t.TempDir(), "ring.sock"), "memory", 0)
	d := open(t, p.path, Options{Queues: 2, Entries: 4, Reconnect: reconnect})
	q, err := d.NewQueue(4)
	if err != nil {
		t.Fatal(err)
	}
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush}); err != nil {
		t.Fatal(err)
	}
	p.kill()
	for d.(*device).attached.Load() {
		time.Sleep(time.Millisecond)
	}
	return d, q, p.path
}

// Without a back-end requests wait in the ring; those that are cancelled, or late, come back
// at once, are not run by the next back-end, and the others are.
func TestCancelWithoutBackEnd(t *testing.T) {
	d, q, path := killed(t, time.Minute)
	mem := pages(t, 4)
	for i := range 4 {
		mem[4096*i] = byte(i + 1)
	}
	reqs := make([]*hpdi.Request, 4)
	for i := range reqs {
		reqs[i] = &hpdi.Request{Op: hpdi.OpWrite, Offset: int64(4096 * i), Vec: [][]byte{mem[4096*i : 4096*(i+1)]}}
	}
	reqs[1].Deadline = time.Now().Add(20 * time.Millisecond)
	if err := q.Submit(reqs...); err != nil {
		t.Fatal(err)
	}
	if done, err := q.Wait(0, nil); err != nil || len(done) != 0 {
		t.Fatalf("%d came, %v", len(done), err)
	}
	q.Cancel(reqs[0])
	done, err := q.Wait(2, nil)
	if err != nil || len(done) != 2 || !errors.Is(reqs[0].Err, hpdi.ErrCanceled) || !errors.Is(reqs[1].Err, hpdi.ErrDeadline) {
		t.Fatalf("%d came, %v; %v, %v", len(done), err, reqs[0].Err, reqs[1].Err)
	}
	// The ring is full of what nobody runs: a fifth request waits, until its deadline.
	late := &hpdi.Request{Op: hpdi.OpFlush, Deadline: time.Now().Add(20 * time.Millisecond)}
	if err := q.Submit(late); err != nil {
		t.Fatal(err)
	}
	if done, err = q.Wait(1, done[:0]); err != nil || len(done) != 1 || !errors.Is(late.Err, hpdi.ErrDeadline) {
		t.Fatalf("a request that had no place: %v, %v", late.Err, err)
	}
	// Their memory is the application's again.
	clear(mem[:2*4096])
	mem[0], mem[4096] = 99, 99
	dev := memory(t, hpditest.MinSize)
	serveAt(t, path, dev)
	if done, err = q.Wait(2, done[:0]); err != nil || len(done) != 2 || reqs[2].Err != nil || reqs[3].Err != nil {
		t.Fatalf("%d came, %v; %v, %v", len(done), err, reqs[2].Err, reqs[3].Err)
	}
	back := pages(t, 4)
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{back}}); err != nil {
		t.Fatal(err)
	}
	if got := [4]byte{back[0], back[4096], back[8192], back[3*4096]}; got != [4]byte{0, 0, 3, 4} {
		t.Errorf("the device holds %v: what was called off must not be written, the rest must", got)
	}
	if err := errors.Join(q.Close(), d.Close()); err != nil {
		t.Error(err)
	}
}

// When no back-end comes in time, all requests fail, and so does what follows.
func TestNobodyComes(t *testing.T) {
	d, q, _ := killed(t, 50*time.Millisecond)
	mem := pages(t, 1)
	r := &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{mem}}
	began := time.Now()
	err := hpdi.Do(q, r)
	if !errors.Is(err, hpdi.ErrDisconnected) || time.Since(began) > 10*time.Second {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
	if err := q.Submit(r); !errors.Is(err, hpdi.ErrDisconnected) {
		t.Errorf("submitted: %v", err)
	}
	if _, err := d.NewQueue(1); !errors.Is(err, hpdi.ErrDisconnected) {
		t.Errorf("a queue was made: %v", err)
	}
	if err := errors.Join(q.Close(), d.Close()); err != nil {
		t.Error(err)
	}
}

func TestOpenRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ring.sock")
	if _, err := Open(t.Context(), path, Options{Reconnect: time.Minute}); err == nil {
		t.Error("opened what is not there")
	}
	serveAt(t, path, memory(t, hpditest.MinSize))
	for name, o := range map[string]Options{"queues": {Queues: 65}, "entries": {Entries: 1 << 20}, "negative": {Queues: -1}} {
		if d, err := Open(t.Context(), path, o); err == nil {
			t.Errorf("opened with bad %s", name)
			d.Close()
		}
	}
	if _, err := Listen(path); err == nil {
		t.Error("two listen at one socket")
	}
	d := open(t, path, Options{Queues: 1, Entries: 3})
	defer d.Close()
	q, err := d.NewQueue(1000)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	if _, err := d.NewQueue(1); err == nil {
		t.Error("more queues than there are")
	}
	if err := d.Close(); err == nil {
		t.Error("closed with a queue open")
	}
	private, err := hpdi.AllocPrivate(4096)
	if err != nil {
		t.Fatal(err)
	}
	defer hpdi.Free(private)
	for name, p := range map[string][]byte{"private": private, "heap": make([]byte, 4096)} {
		if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{p}}); !errors.Is(err, hpdi.ErrMemory) {
			t.Errorf("%s memory: %v", name, err)
		}
		if err := d.Register(p); !errors.Is(err, hpdi.ErrMemory) {
			t.Errorf("%s memory was registered: %v", name, err)
		}
	}
	if s, err := NewServer(d, ServeOptions{}); err == nil {
		s.Close()
		t.Error("a ring is served by a ring")
	}
}

// Memory that was freed is not mistaken for what lies at its address now.
func TestMemoryFreed(t *testing.T) {
	path, _ := serve(t, memory(t, hpditest.MinSize))
	d := open(t, path, Options{})
	q, err := d.NewQueue(4)
	if err != nil {
		t.Fatal(err)
	}
	same := 0
	var last *byte
	for i := range 50 {
		mem, err := hpdi.Alloc(4096)
		if err != nil {
			t.Fatal(err)
		}
		if &mem[0] == last {
			same++
		}
		last = &mem[0]
		mem[100] = byte(i)
		if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{mem}}); err != nil {
			t.Fatal(err)
		}
		mem[100] = 0
		if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{mem}}); err != nil || mem[100] != byte(i) {
			t.Fatalf("read %d instead of %d, %v", mem[100], i, err)
		}
		if err := hpdi.Free(mem); err != nil {
			t.Fatal(err)
		}
	}
	if same == 0 {
		t.Log("no address came twice")
	}
	if n := len(d.(*device).table.Load().regions); n != 1 {
		t.Errorf("%d pieces of memory are known, all but one are freed", n)
	}
	if err := errors.Join(q.Close(), d.Close()); err != nil {
		t.Error(err)
	}
}

// watcher is a back-end that looks at requests and completes them when it is told.
type watcher struct {
	got, end chan *core.Request
}

func (w *watcher) Facts() core.Facts {
	return core.Facts{Size: 1 << 20, BlockSize: 4096, MaxLength: core.MaxLength}
}
func (w *watcher) Attach(core.Shape, int) (core.Runner, error) { return w, nil }
func (w *watcher) Detach(bool)                                 {}
func (w *watcher) Run(q *core.Queue) error {
	for {
		r, err := q.Next()
		if err != nil {
			return err
		}
		if r != nil {
			w.got <- r
			q.Done(<-w.end, core.StatusOK, "")
			continue
		}
		if q.Stopping() {
			return nil
		}
		if err := q.Idle(-1, -1, nil); err != nil {
			return err
		}
	}
}

// The memory that the back-end has in its hands is the application's own: what one writes
// there the other reads, before and after, and no byte of payload is anywhere else.
func TestZeroCopy(t *testing.T) {
	w := &watcher{make(chan *core.Request), make(chan *core.Request)}
	s := core.NewServer(w, core.Options{})
	path := filepath.Join(t.TempDir(), "ring.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	d := open(t, path, Options{Queues: 1, Entries: 4})
	q, err := d.NewQueue(4)
	if err != nil {
		t.Fatal(err)
	}
	mem := pages(t, 64)
	vec := [][]byte{mem[7*4096 : 9*4096], mem[:4096], mem[20*4096 : 21*4096]}
	for _, op := range []hpdi.Op{hpdi.OpWrite, hpdi.OpRead} {
		if err := q.Submit(&hpdi.Request{Op: op, Vec: vec}); err != nil {
			t.Fatal(err)
		}
		r := <-w.got
		if len(r.Vec) != len(vec) {
			t.Fatalf("%s: %d vectors became %d", op, len(vec), len(r.Vec))
		}
		for i, v := range vec {
			// The address is that of the vector in its mapping.
			if want := core.Addr(1, uint64(uintptr(unsafe.Pointer(&v[0]))-uintptr(unsafe.Pointer(&mem[0])))); r.Segs[i].Addr != want || r.Segs[i].Len != uint64(len(v)) {
				t.Errorf("%s: vector %d is %d bytes at %#x, want %#x", op, i, r.Segs[i].Len, r.Segs[i].Addr, want)
			}
			for _, at := range []int{0, 4095, len(v) - 1} {
				v[at] = byte(at + i + 1)
				if r.Vec[i][at] != v[at] {
					t.Fatalf("%s: the back-end does not see byte %d of vector %d", op, at, i)
				}
				r.Vec[i][at]++
				if v[at] != byte(at+i+2) {
					t.Fatalf("%s: the application does not see byte %d of vector %d", op, at, i)
				}
			}
		}
		w.end <- r
		if _, err := q.Wait(1, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(q.Close(), d.Close()); err != nil {
		t.Error(err)
	}
	s.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	l.Close()
}

// A device that has changed is seen.
func TestChanged(t *testing.T) {
	f := newFaulty(memory(t, hpditest.MinSize))
	other := &grown{Device: f, size: 1 << 20}
	path, s := serve(t, other)
	d := open(t, path, Options{})
	if n := d.Info().Size; n != 1<<20 {
		t.Fatalf("%d bytes", n)
	}
	other.mu.Lock()
	other.size = 2 << 20
	other.mu.Unlock()
	s.Changed()
	if n := d.Info().Size; n != 2<<20 {
		t.Errorf("%d bytes after the device has grown", n)
	}
	q, err := d.NewQueue(1)
	if err != nil {
		t.Fatal(err)
	}
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: 1 << 20, Vec: [][]byte{pages(t, 1)}}); err != nil {
		t.Error(err)
	}
	if err := errors.Join(q.Close(), d.Close()); err != nil {
		t.Error(err)
	}
}

type grown struct {
	hpdi.Device
	mu   sync.Mutex
	size int64
}

func (g *grown) Info() hpdi.Info {
	g.mu.Lock()
	defer g.mu.Unlock()
	i := g.Device.Info()
	i.Size = g.size
	return i
}

func TestNoAllocation(t *testing.T) {
	path, _ := serve(t, memory(t, hpditest.MinSize))
	d := open(t, path, Options{Queues: 1, Entries: 32, Poll: 20 * time.Microsecond})
	defer d.Close()
	for _, depth := range []int{1, 16} {
		t.Run(fmt.Sprint(depth), func(t *testing.T) {
			q, err := d.NewQueue(depth)
			if err != nil {
				t.Fatal(err)
			}
			defer q.Close()
			mem := pages(t, depth)
			reqs := make([]*hpdi.Request, depth)
			for i := range reqs {
				reqs[i] = &hpdi.Request{Op: hpdi.OpWrite, Offset: int64(4096 * i), Vec: [][]byte{mem[4096*i:][:4096]}}
			}
			done := make([]*hpdi.Request, 0, depth)
			run := func() {
				if err := q.Submit(reqs...); err != nil {
					t.Fatal(err)
				}
				if done, err = q.Wait(depth, done[:0]); err != nil {
					t.Fatal(err)
				}
			}
			for range 100 {
				run()
			}
			// Both sides are in this process, so both are counted.
			if n := testing.AllocsPerRun(300, run); n != 0 {
				t.Errorf("%v allocations for %d requests", n, depth)
			}
		})
	}
}
