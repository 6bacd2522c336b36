package vhostuser

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// A server that is shut down ends what it has taken, and leaves the rest to the next one.
func TestShutdown(t *testing.T) {
	layouts(t, func(t *testing.T, f virtio.Features) {
		v := nbdtest.New("vol", volumeBytes)
		slow := make(chan struct{})
		v.Hook = func(_ context.Context, op nbdtest.Op, _, _ int64) error {
			if op == nbdtest.OpFlush {
				<-slow
			}
			return nil
		}
		s, _ := newServer(t, Options{Volume: v})
		m := newMachine(t, s, setup{features: f | disk, track: true})
		m.start()
		q := m.vqs[0]
		flush := q.queue(virtio.BlkFlushCache, 0, false)
		q.publish()
		for s.Stats().InFlight == 0 {
			time.Sleep(time.Millisecond)
		}
		ended := make(chan error, 1)
		go func() { ended <- s.Shutdown(t.Context()) }()
		for s.leaves() == 0 {
			time.Sleep(time.Millisecond)
		}
		a := buffer{dataStart, 4096}
		pattern(m.data(a), 1)
		later := q.queue(virtio.BlkOut, 8, false, a)
		q.publish()
		close(slow)
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		if err := m.cut(); !errors.Is(err, ErrServerClosed) {
			t.Errorf("the connection ended with %v", err)
		}
		if code := q.wait(flush); code != virtio.BlkOK {
			t.Errorf("what was taken: status %d", code)
		}
		if q.pop() != 0 {
			t.Error("what was not taken is done")
		}
		next, _ := newServer(t, Options{Volume: v})
		m.server = next
		m.connect()
		m.start()
		if code := q.wait(later); code != virtio.BlkOK || !bytes.Equal(v.Bytes(4096, 4096), patterned(4096, 1)) {
			t.Errorf("with the next server: status %d", code)
		}
		if st := next.Stats(); st.Resubmitted != 0 || st.Skipped != 0 {
			t.Errorf("the server left something in flight: %+v", st)
		}
		if v.Count() != 1 {
			t.Errorf("%d sessions", v.Count())
		}
		q.stop()
		m.disconnect()
		if v.Count() != 0 {
			t.Errorf("%d sessions when the machine has ended in good order", v.Count())
		}
	})
}

// leaves counts connections that are ending in good order.
func (s *Server) leaves() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for c := range s.clients {
		if c.leaving.Load() != nil {
			n++
		}
	}
	return n
}

// A shutdown that takes too long cuts what is left.
func TestShutdownCuts(t *testing.T) {
	v := nbdtest.New("vol", volumeBytes)
	v.Hook = func(ctx context.Context, op nbdtest.Op, _, _ int64) error {
		if op == nbdtest.OpFlush {
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	}
	s, err := New(Options{Volume: v})
	must(t, err)
	m := newMachine(t, s, setup{features: disk, track: true})
	m.start()
	q := m.vqs[0]
	q.queue(virtio.BlkFlushCache, 0, false)
	q.publish()
	for s.Stats().InFlight == 0 {
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the shutdown ended with %v", err)
	}
	_ = m.cut()
	if q.pop() != 0 {
		t.Error("a request that was called off is done")
	}
}

// A change whose fate nobody knows ends with an error, and a read is run again.
func TestForgotten(t *testing.T) {
	v := nbdtest.New("vol", volumeBytes)
	s, _ := newServer(t, Options{Volume: v, Log: slog.New(slog.DiscardHandler)})
	m := newMachine(t, s, setup{features: disk, track: true})
	m.disconnect()
	q := m.vqs[0]
	a := buffer{dataStart, 4096}
	write := q.queue(virtio.BlkOut, 8, false, a)
	read := q.queue(virtio.BlkIn, 8, true, buffer{dataStart + 8192, 4096})
	q.drv.Publish()
	d := m.newDoomed()
	for range 2 {
		if r, err := d.q.fetch(); r == nil || err != nil {
			t.Fatal(err)
		}
	}
	d.die()
	other, _ := newServer(t, Options{Volume: nbdtest.New("vol", volumeBytes), Log: slog.New(slog.DiscardHandler)}) // which knows nothing
	m.server = other
	m.connect()
	m.start()
	if code := q.wait(write); code != virtio.BlkIOError {
		t.Errorf("the write: status %d", code)
	}
	if code := q.wait(read); code != virtio.BlkOK {
		t.Errorf("the read: status %d", code)
	}
	if st := other.Stats(); st.Resubmitted != 1 || st.Errors != 1 {
		t.Errorf("%+v", st)
	}
}

// A driver that has switched the write-back cache off sends no flushes, and its front-end
// does not say so again: the next server knows it from the area.
func TestCacheOffOutlivesServer(t *testing.T) {
	v := nbdtest.New("vol", volumeBytes)
	s, _ := newServer(t, Options{Volume: v})
	m := newMachine(t, s, setup{features: disk, track: true})
	m.start()
	write := func(what string, flushed bool) {
		t.Helper()
		if code := m.vqs[0].do(virtio.BlkOut, 0, false, buffer{dataStart, 4096}); code != virtio.BlkOK || (v.Unstable() == 0) != flushed {
			t.Errorf("%s: status %d, %d changes are not flushed", what, code, v.Unstable())
		}
	}
	takeover := func() {
		t.Helper()
		m.disconnect()
		m.server, _ = newServer(t, Options{Volume: v})
		m.connect()
		m.start()
	}
	wce := func(on byte) {
		t.Helper()
		must(t, m.ack(vhost.SetConfig, vhost.Config{Offset: virtio.BlkConfigWriteback, Size: 1, Data: []byte{on}}.Append(nil)))
	}
	write("with the cache on", false)
	wce(0)
	write("with the cache off", true)
	takeover()
	write("after a takeover", true)
	if c := m.config(); c.Writeback {
		t.Error("the next server says that the cache is on")
	}
	must(t, m.ack(vhost.ResetDevice, nil))
	_ = unix.Close(m.area)
	m.getArea() // as a front-end does after a reset
	m.vqs[0].drv.Reset()
	m.start()
	write("after a reset", true)
	wce(1)
	takeover()
	write("with the cache on again", false)
}

// Serve accepts until it is to end, and leaves the listener as it was.
func TestServe(t *testing.T) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	must(t, err)
	defer func() { _ = l.Close() }()
	s, _ := newServer(t, Options{Clients: 2})
	serve := func(ctx context.Context, s *Server) chan error {
		ended := make(chan error, 1)
		go func() { ended <- s.Serve(ctx, l) }()
		return ended
	}
	features := func() error {
		c, err := net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		vc := vhost.NewConn(c)
		if err := vc.Send(vhost.GetFeatures, 0, nil); err != nil {
			return err
		}
		var m vhost.Message
		return vc.Receive(&m)
	}
	why := errors.New("a test")
	ctx, cancel := context.WithCancelCause(t.Context())
	ended := serve(ctx, s)
	must(t, features())
	cancel(why)
	if err := <-ended; !errors.Is(err, why) {
		t.Errorf("when its context ends Serve returns %v", err)
	}
	ended = serve(t.Context(), s)
	must(t, features())
	must(t, s.Shutdown(t.Context()))
	if err := <-ended; !errors.Is(err, ErrServerClosed) {
		t.Errorf("after Shutdown Serve returns %v", err)
	}
	if err := s.Serve(t.Context(), l); !errors.Is(err, ErrServerClosed) {
		t.Errorf("a server that was shut down serves again: %v", err)
	}
	next, _ := newServer(t, Options{})
	ctx, cancel = context.WithCancelCause(t.Context())
	ended = serve(ctx, next)
	must(t, features())
	cancel(why)
	<-ended
}

func TestOptions(t *testing.T) {
	v := nbdtest.New("vol", volumeBytes)
	for name, o := range map[string]Options{
		"no volume":       {},
		"a long serial":   {Volume: v, Serial: "123456789012345678901"},
		"too many queues": {Volume: v, Queues: MaxQueues + 1},
		"an odd size":     {Volume: v, QueueSize: 100},
		"a great size":    {Volume: v, QueueSize: 2 * MaxQueueSize},
		"no workers":      {Volume: v, Workers: -1},
		"odd blocks":      {Volume: v, BlockSize: 1000},
	} {
		if _, err := New(o); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
