package ring

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
	core "github.com/pollux-storage/pollux/internal/ring"
)

// serveFile serves dev over the ring in a file until the test ends, or stop is called.
func serveFile(t *testing.T, path string, dev hpdi.Device) (stop func() error) {
	t.Helper()
	s, err := NewServer(dev, ServeOptions{Poll: 20 * time.Microsecond})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.ServeFile(path, 0) }()
	ended := false
	stop = func() error {
		if ended {
			return nil
		}
		ended = true
		s.Close()
		return <-done
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return stop
}

// do1 writes and reads a page by memory of the ring.
func do1(t *testing.T, d hpdi.Device, block int, value byte) {
	t.Helper()
	q, err := d.NewQueue(2)
	if err != nil {
		t.Fatal(err)
	}
	mem, err := d.(Allocator).Alloc(8192)
	if err != nil {
		t.Fatal(err)
	}
	for i := range mem {
		mem[i] = value
	}
	off := int64(block) * 8192
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Offset: off, Vec: [][]byte{mem}}); err != nil {
		t.Fatal(err)
	}
	clear(mem)
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: off, Vec: [][]byte{mem}}); err != nil || !bytes.Equal(mem, bytes.Repeat([]byte{value}, 8192)) {
		t.Fatalf("read back %d..., %v", mem[0], err)
	}
	if err := errors.Join(d.(Allocator).Free(mem), q.Close()); err != nil {
		t.Fatal(err)
	}
}

// Front-ends come and go at a ring in a file; there is one of each side at a time.
func TestRingInFile(t *testing.T) {
	path := ringFile(t, 4<<20)
	dev := memory(t, hpditest.MinSize)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, path, Options{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("opened without a back-end: %v", err)
	}
	serveFile(t, path, dev)
	for round := range 3 {
		d := open(t, path, Options{Queues: 2, Entries: 8, Reconnect: time.Minute})
		do1(t, d, round, byte(round+1))
		if i := d.Info(); i.Event || !i.SharedMemory || i.Size != hpditest.MinSize {
			t.Errorf("info %+v", i)
		}
		if _, err := Open(t.Context(), path, Options{}); !errors.Is(err, core.ErrTaken) {
			t.Errorf("a second front-end: %v", err)
		}
		s, err := NewServer(dev, ServeOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.ServeFile(path, 0); !errors.Is(err, core.ErrTaken) {
			t.Errorf("a second back-end: %v", err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// Memory of the application's own is refused: it cannot be handed over.
func TestMemoryOfRing(t *testing.T) {
	path := ringFile(t, 1<<20)
	serveFile(t, path, memory(t, hpditest.MinSize))
	d := open(t, path, Options{Queues: 1, Entries: 4, Reconnect: time.Minute})
	q, err := d.NewQueue(4)
	if err != nil {
		t.Fatal(err)
	}
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{pages(t, 1)}}); !errors.Is(err, hpdi.ErrMemory) {
		t.Errorf("memory from elsewhere: %v", err)
	}
	if q.Event() != -1 {
		t.Error("there is a descriptor")
	}
	a := d.(Allocator)
	var all [][]byte
	for {
		p, err := a.Alloc(3 * 4096)
		if err != nil {
			break
		}
		all = append(all, p)
	}
	if len(all) < 50 {
		t.Errorf("1 MiB has %d pieces of 12 KiB", len(all))
	}
	for i, p := range all {
		if i%2 == 0 {
			if err := a.Free(p); err != nil {
				t.Fatal(err)
			}
		}
	}
	if p, err := a.Alloc(4 * 4096); err == nil {
		t.Errorf("%d bytes where only 12 KiB are free in a row", len(p))
	}
	for _, p := range [][]byte{all[0], all[1][4096:], all[1][:4096], pages(t, 1), nil} {
		if err := a.Free(p); err == nil {
			t.Errorf("%d bytes were freed that are no piece", len(p))
		}
	}
	if _, err := a.Alloc(0); err == nil {
		t.Error("no bytes were allocated")
	}
	if err := errors.Join(q.Close(), d.Close()); err != nil {
		t.Error(err)
	}
}

// A back-end ends, and the next one goes on; when none comes the requests fail, and who comes
// then does not run them.
func TestFileWithoutBackEnd(t *testing.T) {
	path := ringFile(t, 1<<20)
	dev := memory(t, hpditest.MinSize)
	stop := serveFile(t, path, dev)
	d := open(t, path, Options{Queues: 1, Entries: 4})
	do1(t, d, 0, 1)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	q, err := d.NewQueue(4)
	if err != nil {
		t.Fatal(err)
	}
	mem, err := d.(Allocator).Alloc(8192)
	if err != nil {
		t.Fatal(err)
	}
	mem[0] = 9
	w := &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{mem}}
	if err := q.Submit(w); err != nil {
		t.Fatal(err)
	}
	if _, err := q.Wait(1, nil); err != nil || !errors.Is(w.Err, hpdi.ErrDisconnected) {
		t.Fatalf("%v; %v", err, w.Err)
	}
	stop = serveFile(t, path, dev)
	time.Sleep(4 * core.Beat)
	got := pages(t, 1)
	dq, err := dev.NewQueue(1)
	if err != nil {
		t.Fatal(err)
	}
	if err := hpdi.Do(dq, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{got}}); err != nil || got[0] != 1 {
		t.Errorf("the block holds %d: a request that has failed was run later; %v", got[0], err)
	}
	if err := errors.Join(dq.Close(), q.Close(), d.Close(), stop()); err != nil {
		t.Error(err)
	}
}

// A file that is made shorter ends the back-end with an error, and not its process.
func TestFileMadeShorter(t *testing.T) {
	path := ringFile(t, 1<<20)
	s, err := NewServer(memory(t, hpditest.MinSize), ServeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.ServeFile(path, 0) }()
	// The front-end is another process: it does not survive.
	p := start(t, path, frontEnv+"="+path)
	defer p.kill()
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		if !errors.Is(err, core.ErrBroken) {
			t.Errorf("ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the back-end goes on")
	}
	s.Close()
}
