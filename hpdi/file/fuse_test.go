package file

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
)

// faulty is a file that the kernel serves by asking the test (FUSE): so it is slow, or
// fails, or moves less than it was asked for, as the test wants, and what the driver sees
// is what the kernel makes of that.
type faulty struct {
	dev  *os.File // closing it ends all
	wait sync.WaitGroup

	mu    sync.Mutex // guards what follows
	data  []byte
	fail  struct{ off, end int64 }
	errno unix.Errno
	short bool
	delay time.Duration
	held  chan struct{} // closed by release; nil: nothing is held
}

// What is used of the kernel's interface (linux/fuse.h), all in the machine's own order.
const (
	fuseForget      = 2
	fuseGetattr     = 3
	fuseOpen        = 14
	fuseRead        = 15
	fuseWrite       = 16
	fuseStatfs      = 17
	fuseRelease     = 18
	fuseFsync       = 20
	fuseFlush       = 25
	fuseInit        = 26
	fuseInterrupt   = 36
	fuseDestroy     = 38
	fuseFallocate   = 43
	fuseBatchForget = 42

	fuseHeader    = 40      // bytes before what a request says
	fuseMaxPages  = 1 << 22 // flags of INIT
	fuseBigWrites = 1 << 5
	fuseAsyncDIO  = 1 << 15
	fusePages     = 256
	fuseDirect    = 1<<0 | 1<<6 // of OPEN: not by the page cache; several writes at once
)

// newFaulty mounts a file and opens it.
func newFaulty(t *testing.T, engine Engine) (hpdi.Device, *faulty) {
	t.Helper()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skip(err)
	}
	f := &faulty{data: make([]byte, hpditest.MinSize)}
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var d hpdi.Device
	inMount(t, "fuse", fmt.Sprintf("fd=%d,rootmode=%o,user_id=0,group_id=0", fd, unix.S_IFREG), path, func() (err error) {
		f.dev = os.NewFile(uintptr(fd), "fuse") // mounted: it can be polled only now
		f.wait.Go(f.serve)
		d, err = Open(path, Options{Engine: engine})
		return err
	})
	t.Cleanup(func() {
		if f.dev == nil {
			_ = unix.Close(fd)
			return
		}
		_ = f.dev.Close() // what is under way fails
		f.wait.Wait()
	})
	if d == nil {
		t.Skip("mounting is not permitted here")
	}
	return d, f
}

// serve takes requests until the device is closed. Each is answered by a goroutine of its
// own, because some wait.
func (f *faulty) serve() {
	buf := make([]byte, fusePages*BlockSize+BlockSize)
	for {
		n, err := f.dev.Read(buf)
		if err != nil || n < fuseHeader {
			return
		}
		p := slices.Clone(buf[:n])
		f.wait.Go(func() { f.answer(p) })
	}
}

func (f *faulty) answer(p []byte) {
	ne := binary.NativeEndian
	reply, errno := f.handle(ne.Uint32(p[4:]), p[fuseHeader:])
	if reply == nil && errno == 0 {
		return // FORGET and INTERRUPT want none
	}
	out := make([]byte, 16, 16+len(reply))
	ne.PutUint32(out, uint32(16+len(reply)))
	ne.PutUint32(out[4:], uint32(-int32(errno)))
	copy(out[8:16], p[8:16])
	_, _ = f.dev.Write(append(out, reply...)) // whoever asked may be gone
}

// handle carries out one request.
func (f *faulty) handle(op uint32, p []byte) (reply []byte, errno unix.Errno) {
	ne := binary.NativeEndian
	switch op {
	case fuseForget, fuseBatchForget, fuseInterrupt:
		return nil, 0
	case fuseInit:
		reply = make([]byte, 64)
		ne.PutUint32(reply, 7)
		ne.PutUint32(reply[4:], 31)
		ne.PutUint32(reply[12:], fuseMaxPages|fuseBigWrites|fuseAsyncDIO)
		ne.PutUint16(reply[16:], 256) // under way at once
		ne.PutUint16(reply[18:], 192)
		ne.PutUint32(reply[20:], fusePages*BlockSize)
		ne.PutUint32(reply[24:], 1)
		ne.PutUint16(reply[28:], fusePages)
		return reply, 0
	case fuseGetattr:
		reply = make([]byte, 104)
		ne.PutUint64(reply, 3600) // seconds that this holds
		ne.PutUint64(reply[16:], 1)
		ne.PutUint64(reply[24:], uint64(len(f.data)))
		ne.PutUint32(reply[76:], unix.S_IFREG|0o600)
		ne.PutUint32(reply[80:], 1)
		ne.PutUint32(reply[96:], BlockSize)
		return reply, 0
	case fuseOpen:
		reply = make([]byte, 16)
		ne.PutUint32(reply[8:], fuseDirect)
		return reply, 0
	case fuseStatfs:
		return make([]byte, 80), 0
	case fuseRead, fuseWrite:
		return f.transfer(op == fuseWrite, int64(ne.Uint64(p[8:])), int(ne.Uint32(p[16:])), p[40:])
	case fuseFallocate:
		f.mu.Lock()
		defer f.mu.Unlock()
		if off, n := ne.Uint64(p[8:]), ne.Uint64(p[16:]); off < uint64(len(f.data)) {
			clear(f.data[off:min(off+n, uint64(len(f.data)))])
		}
		return []byte{}, 0
	case fuseRelease, fuseFsync, fuseFlush, fuseDestroy:
		return []byte{}, 0
	}
	return nil, unix.ENOSYS
}

// transfer moves data, with the faults that there are.
func (f *faulty) transfer(write bool, off int64, n int, data []byte) ([]byte, unix.Errno) {
	f.mu.Lock()
	held, delay := f.held, f.delay
	f.mu.Unlock()
	if held != nil {
		<-held
	}
	time.Sleep(delay)
	f.mu.Lock()
	defer f.mu.Unlock()
	if off < f.fail.end && f.fail.off < off+int64(n) {
		return nil, f.errno
	}
	if f.short {
		n = max(1, n*2/5) // no block ends there
	}
	n = max(0, min(n, len(f.data)-int(off)))
	if !write {
		return slices.Clone(f.data[off : off+int64(n)]), 0
	}
	copy(f.data[off:], data[:n])
	reply := make([]byte, 8)
	binary.NativeEndian.PutUint32(reply, uint32(n))
	return reply, 0
}

// faults are what the suite makes the file do. With io_uring the kernel's FUSE goes on at
// the wrong place after a transfer that was short, so that there TestShortTransfer has to
// do.
func (f *faulty) faults(engine Engine) hpditest.Faults {
	locked := func(do func()) {
		f.mu.Lock()
		defer f.mu.Unlock()
		do()
	}
	faults := hpditest.Faults{
		Kinds: []error{hpdi.ErrIO, hpdi.ErrNoSpace},
		Fail: func(off, n int64, kind error) {
			locked(func() {
				if f.fail.off, f.fail.end, f.errno = off, off+n, unix.EIO; kind == hpdi.ErrNoSpace {
					f.errno = unix.ENOSPC
				}
			})
		},
		Short: func(on bool) { locked(func() { f.short = on }) },
		Delay: func(d time.Duration) { locked(func() { f.delay = d }) },
		Hold:  func() { locked(func() { f.held = make(chan struct{}) }) },
		Release: func() {
			locked(func() {
				close(f.held)
				f.held = nil
			})
		},
	}
	if engine == EngineURing {
		faults.Short = nil
	}
	return faults
}

// TestFaults has the kernel pass on what goes wrong below it.
func TestFaults(t *testing.T) {
	for _, engine := range engines(t) {
		t.Run(string(engine), func(t *testing.T) {
			hpditest.RunFaults(t, func(t *testing.T) (hpdi.Device, hpditest.Faults) {
				d, f := newFaulty(t, engine)
				return d, f.faults(engine)
			})
		})
	}
}
