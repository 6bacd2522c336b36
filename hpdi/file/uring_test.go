package file

import (
	"errors"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// ringDevice opens a device whose queues are rings.
func ringDevice(t *testing.T) hpdi.Device {
	t.Helper()
	if _, err := probeURing(false); err != nil {
		t.Skip(err)
	}
	return open(t, create(t, t.TempDir(), testSize), Options{Engine: EngineURing})
}

// unfixedRingDevice opens a device whose queues read from whatever its descriptor is when
// they are asked to.
func unfixedRingDevice(t *testing.T) *device {
	t.Helper()
	if _, err := probeURing(false); err != nil {
		t.Skip(err)
	}
	return open(t, create(t, t.TempDir(), testSize), Options{Engine: EngineURing, Fixed: FixedOff}).(*device)
}

// reads returns n reads of one block each.
func reads(t *testing.T, n int) []*hpdi.Request {
	mem := alloc(t, n*BlockSize)
	reqs := make([]*hpdi.Request, n)
	for i := range reqs {
		reqs[i] = &hpdi.Request{Op: hpdi.OpRead, Offset: int64(i * BlockSize), Vec: [][]byte{mem[i*BlockSize : (i+1)*BlockSize]}}
	}
	return reqs
}

// unpolled is a descriptor that the runtime's poller does not take.
type unpolled struct{ syscall.RawConn }

func (unpolled) Read(func(uintptr) bool) error { return os.ErrNoDeadline }

func TestRingWaitsWithoutPoller(t *testing.T) {
	q := newQueue(t, ringDevice(t), 8)
	defer closeQueue(t, q)
	q.(*uringQueue).ring.conn = unpolled{}
	for range 20 {
		if err := hpdi.Do(q, reads(t, 30)...); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBrokenRing: when the kernel refuses the ring itself, everything that was
// submitted comes back with the error and nothing hangs.
func TestBrokenRing(t *testing.T) {
	d := ringDevice(t)
	q := newQueue(t, d, 4)
	r := q.(*uringQueue).ring
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	backup, err := unix.Dup(r.fd)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(backup)
	if err := unix.Dup3(int(null.Fd()), r.fd, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	reqs := reads(t, 6)
	if err := q.Submit(reqs...); err == nil {
		t.Fatal("submit to a broken ring worked")
	}
	done, err := q.Wait(len(reqs), nil)
	if err == nil || len(done) != len(reqs) {
		t.Fatalf("wait on a broken ring: %d of %d requests, %v", len(done), len(reqs), err)
	}
	for _, r := range done {
		if r.Err == nil {
			t.Errorf("%s at %d has no error", r.Op, r.Offset)
		}
	}
	if err := q.Submit(reqs...); err == nil {
		t.Error("a broken ring took requests")
	}
	if err := q.Close(); err != nil { // nothing is in flight
		t.Error(err)
	}
}

// TestThreadExits submits from threads that end at once, with fdatasync, which
// the kernel carries out in the submitting thread's name.
func TestThreadExits(t *testing.T) {
	q := newQueue(t, ringDevice(t), 64)
	defer closeQueue(t, q)
	for range 30 {
		reqs := reads(t, 16)
		for range 8 {
			reqs = append(reqs, &hpdi.Request{Op: hpdi.OpFlush})
		}
		var wg sync.WaitGroup
		var err error
		wg.Go(func() {
			runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
			err = q.Submit(reqs...)
		})
		wg.Wait()
		if err != nil {
			t.Fatal(err)
		}
		done, err := q.Wait(len(reqs), nil)
		if err != nil || len(done) != len(reqs) {
			t.Fatal(err, len(done))
		}
		for _, r := range reqs {
			if r.Err != nil {
				t.Fatalf("%s at %d: %v", r.Op, r.Offset, r.Err)
			}
		}
	}
}

// TestCollectorRunsDuringIO drops all references to requests and their memory
// on the Go heap while they are in flight.
func TestCollectorRunsDuringIO(t *testing.T) {
	for _, engine := range engines(t) {
		t.Run(string(engine), func(t *testing.T) {
			d := open(t, create(t, t.TempDir(), testSize), Options{Engine: engine, Direct: DirectOff})
			q := newQueue(t, d, 64)
			defer closeQueue(t, q)
			for range 20 {
				for i := range 64 {
					r := &hpdi.Request{Op: hpdi.OpWrite, Offset: int64(i * BlockSize), Vec: [][]byte{make([]byte, BlockSize)}, User: i}
					for j := range r.Vec[0] {
						r.Vec[0][j] = byte(i)
					}
					if err := q.Submit(r); err != nil {
						t.Fatal(err)
					}
				}
				runtime.GC()
				done, err := q.Wait(64, nil)
				if err != nil {
					t.Fatal(err)
				}
				for _, r := range done {
					if i := r.User.(int); r.Err != nil || r.Vec[0][0] != byte(i) || r.Offset != int64(i*BlockSize) {
						t.Fatalf("request %d came back as %+v", i, r)
					}
				}
			}
			p := alloc(t, 64*BlockSize)
			if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{p}}); err != nil {
				t.Fatal(err)
			}
			for i, b := range p {
				if b != byte(i/BlockSize) {
					t.Fatalf("byte %d is %d", i, b)
				}
			}
		})
	}
}

func TestRefusalKeepsErrno(t *testing.T) {
	for _, errno := range []unix.Errno{unix.ENOSYS, unix.EPERM, unix.ENOMEM, unix.EINVAL} {
		if err := refusal(errno); !errors.Is(err, errno) {
			t.Errorf("%v became %v", errno, err)
		}
	}
}
