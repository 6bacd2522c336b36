package vhost

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
	driver "github.com/pollux-storage/pollux/hpdi/vhostuser"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	export "github.com/pollux-storage/pollux/internal/export/vhostuser"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// serving is a volume that is served at a socket.
type serving struct {
	t    testing.TB
	sock string
	v    *nbdtest.Volume
	l    *net.UnixListener
	stop func()
	s    *export.Server
}

// serve serves a volume until the test ends.
func serve(t testing.TB, v *nbdtest.Volume) *serving {
	t.Helper()
	dir, err := os.MkdirTemp("", "vu") // a socket's path is short
	must(t, err)
	s := &serving{t: t, v: v, sock: filepath.Join(dir, "s")}
	s.l, err = net.ListenUnix("unix", &net.UnixAddr{Name: s.sock})
	must(t, err)
	s.start()
	t.Cleanup(func() {
		s.stop()
		must(t, errors.Join(s.l.Close(), os.RemoveAll(dir)))
	})
	return s
}

// start has a new server of the same volume at the same socket, as after a takeover.
func (s *serving) start() {
	var err error
	s.s, err = export.New(export.Options{Volume: s.v, Queues: 4, Log: slog.New(slog.NewTextHandler(s.t.Output(), nil))})
	must(s.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.s.Serve(ctx, s.l) }()
	s.stop = func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			s.t.Error(err)
		}
	}
}

// layouts are the ways in which queues can be laid out.
var layouts = map[string]driver.Options{
	"packed": {Poll: 50 * time.Microsecond}, "packed, 4 queues": {Queues: 4, QueueSize: 100}, "packed, plain": {Packed: driver.On, NoEventIdx: true, NoIndirect: true},
	"split": {Packed: driver.Off, Poll: 50 * time.Microsecond}, "split, 4 queues": {Packed: driver.Off, Queues: 4},
	"split, plain": {Packed: driver.Off, NoEventIdx: true, NoIndirect: true, QueueSize: 64}, "split, through": {Packed: driver.Off, Writeback: driver.Off},
}

// Our driver and our back-end are a device in every way in which queues can be laid out.
func TestConform(t *testing.T) {
	for name, o := range layouts {
		t.Run(name, func(t *testing.T) {
			s := serve(t, nbdtest.New("v", hpditest.MinSize))
			hpditest.Run(t, func(t *testing.T) hpdi.Device {
				d, err := driver.Open(t.Context(), s.sock, o)
				must(t, err)
				return d
			})
		})
	}
}

// trouble is what a volume is made to have.
type trouble struct {
	mu     sync.Mutex // guards the rest
	off, n int64      // fails
	delay  time.Duration
	held   chan struct{}
}

// hook is that of a volume.
func (tr *trouble) hook(ctx context.Context, op nbdtest.Op, off, n int64) error {
	tr.mu.Lock()
	bad := off < tr.off+tr.n && tr.off < off+n
	delay, held := tr.delay, tr.held
	tr.mu.Unlock()
	switch op {
	case nbdtest.OpTryCommit, nbdtest.OpCommit:
		return nil // what is staged is there
	case nbdtest.OpTryRead, nbdtest.OpTryStage:
		if bad || delay > 0 || held != nil {
			return nbdtest.ErrWouldWait
		}
	}
	if held != nil {
		select {
		case <-held:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if delay > 0 {
		time.Sleep(delay) // the suite measures it
	}
	if bad {
		return fmt.Errorf("%s of %d bytes at %d is made to fail", op, n, off)
	}
	return nil
}

// What goes wrong with the volume or the connection is each request's alone; those in flight
// when a server ends are done by the next one.
func TestFaults(t *testing.T) {
	for name, o := range layouts {
		t.Run(name, func(t *testing.T) {
			o.Reconnect = time.Minute
			hpditest.RunFaults(t, func(t *testing.T) (hpdi.Device, hpditest.Faults) {
				tr := &trouble{}
				v := nbdtest.New("v", hpditest.MinSize)
				v.Hook = tr.hook
				s := serve(t, v)
				d, err := driver.Open(t.Context(), s.sock, o)
				must(t, err)
				set := func(change func()) {
					tr.mu.Lock()
					defer tr.mu.Unlock()
					change()
				}
				return d, hpditest.Faults{
					Fail:  func(off, n int64, _ error) { set(func() { tr.off, tr.n = off, n }) },
					Delay: func(delay time.Duration) { set(func() { tr.delay = delay }) },
					Hold:  func() { set(func() { tr.held = make(chan struct{}) }) },
					Release: func() {
						set(func() {
							close(tr.held)
							tr.held = nil
						})
					},
					Disconnect: func() {
						s.stop()
						s.start()
					},
					Recovers: true,
				}
			})
		})
	}
}

// A volume that has grown is larger for whoever has it open.
func TestResize(t *testing.T) {
	v := nbdtest.New("v", hpditest.MinSize)
	s := serve(t, v)
	d, err := driver.Open(t.Context(), s.sock, driver.Options{})
	must(t, err)
	v.Grow(2 * hpditest.MinSize)
	s.s.Resized()
	for begun := time.Now(); d.Info().Size != 2*hpditest.MinSize; time.Sleep(time.Millisecond) { // a message comes
		if time.Since(begun) > 10*time.Second {
			t.Fatalf("the device has %d bytes", d.Info().Size)
		}
	}
	must(t, d.Close())
}
